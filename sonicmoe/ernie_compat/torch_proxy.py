"""Makes `import torch` inside this package mean Paddle: the one place that switches the proxy on.

The kernel-side modules are written once against the torch API. Paddle can answer `import torch` for chosen packages
(`paddle.enable_compat`, earlier `paddle.compat.enable_torch_proxy`). It has to happen before those modules are
imported, and no real torch must have reached them.
"""

import sys
from importlib.util import find_spec

import paddle

# Packages that import torch by themselves and must meet Paddle as well.
_COMPANIONS = ("quack", "triton")


def package_root() -> str:
    """The name that this package goes by here: ``sonicmoe``, or ``some_parent.sonicmoe``."""
    return __package__.rpartition(".")[0]


def _enabler():
    """Newer Paddle has only the first name, older Paddle only the second."""
    found = getattr(paddle, "enable_compat", None)
    if found is None:
        found = getattr(getattr(paddle, "compat", None), "enable_torch_proxy", None)
    if found is None:
        raise ImportError(
            f"sonicmoe: paddle {paddle.__version__} has neither paddle.enable_compat nor "
            "paddle.compat.enable_torch_proxy; need paddlepaddle 3.3 or newer"
        )
    return found


def _modules_on_torch() -> dict:
    """This package's loaded modules that have imported torch, whichever that is, by name."""
    inside = f"{package_root()}."
    loaded = list(sys.modules.items())
    return {name: module for name, module in loaded if name.startswith(inside) and hasattr(module, "torch")}


def is_paddle(torch_module) -> bool:
    """Whether a module's ``torch`` is Paddle behind its proxy."""
    return getattr(torch_module, "Tensor", None) is paddle.Tensor


def ensure() -> None:
    """Switch the proxy on for this package. Calling it again, or after the user did so, changes nothing."""
    root = package_root()
    loaded = [is_paddle(module.torch) for module in _modules_on_torch().values()]
    if not all(loaded):
        raise ImportError(
            "sonicmoe: its kernels are already loaded on real torch in this process, and one process runs one "
            "framework; import sonicmoe.ernie_compat before anything of sonicmoe that runs on torch"
        )
    if not loaded:
        cover(root)


def cover(root: str) -> None:
    """Switch the proxy on for the package under this name, which may be one that a caller gave it later."""
    enable = _enabler()
    if _covers(root):
        return
    # Only those that are installed: real torch, where a process uses it beside us, looks for triton while it loads, and
    # Paddle's finder empties half-loaded torch modules out of sys.modules when asked for a name in its scope.
    scope = {root, *(name for name in _COMPANIONS if find_spec(name) is not None)}
    try:
        enable(scope=scope, silent=True)
    except TypeError:  # versions without ``silent`` warn when a scope grows, and do the same
        enable(scope=scope)
    _drop_repeated_finders()


def _finders() -> list:
    return [finder for finder in sys.meta_path if type(finder).__name__ == "TorchProxyMetaFinder"]


def _covers(name: str) -> bool:
    """Whether the proxy is on for ``name`` already. Then it must be left alone: Paddle 3.3 takes a scope that is added
    to a global proxy for the new, narrower scope, and the user's own `import torch` would stop meaning Paddle."""
    for finder in _finders():
        scope = getattr(finder, "_local_enabled_scope", ())
        if getattr(finder, "_globally_enabled", False) or any(name == s or name.startswith(f"{s}.") for s in scope):
            return True
    return False


def _drop_repeated_finders() -> None:
    """Each enabling puts Paddle's one finder in once more, and every import below it would then run that often."""
    for position in reversed(range(len(sys.meta_path))):
        finder = sys.meta_path[position]
        if finder in _finders() and sys.meta_path.count(finder) > 1:
            del sys.meta_path[position]


def verify() -> None:
    """After the imports: fail here, by name, if a real torch slipped in."""
    for name, module in _modules_on_torch().items():
        if not is_paddle(module.torch):
            raise ImportError(f"sonicmoe: {name} was loaded on real torch, but this process runs it under Paddle")
