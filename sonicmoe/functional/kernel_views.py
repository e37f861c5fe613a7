"""Weights as the published functions take them: [2I,H,E] and [H,I,E], native [E,2I,H] and [E,H,I] permuted."""

from .. import checks


def native_view(name: str, view):
    """The native weight behind a kernel view, without a copy. Any other order of strides is an error.

    A view of a whole parameter with a ``main_grad`` gives the parameter itself: its gradient goes there, and a view
    has no such attribute.
    """
    checks.require_tensor(name, view)
    checks.require_rank(name, view, 3, "[rows, columns, E]")
    native = view.permute(2, 0, 1)
    if not native.is_contiguous():
        raise ValueError(
            f"{name}: got shape {list(checks.shape_of(view))} with strides {list(view.stride())}, need stride order "
            "(2, 0, 1): a contiguous [E, rows, columns] tensor after .permute(1, 2, 0)"
        )
    base = view._base
    if getattr(base, "main_grad", None) is not None and base.is_contiguous() and base.shape == native.shape:
        return base
    return native


def refuse_bias(**biases) -> None:
    for name, bias in biases.items():
        if bias is not None:
            raise NotImplementedError(
                f"{name}: got {type(bias).__name__}, need None: expert biases are not in the fused path; MoE with "
                "kernel_backend_moe=KernelBackendMoE.torch has them"
            )
