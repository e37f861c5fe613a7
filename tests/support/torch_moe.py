"""The MoE module on small problems, and its function in float64."""

from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch

if torch:
    from sonicmoe import KernelBackendMoE, MoE
    from sonicmoe.enums import ActivationType


def make(kind="swiglu", E=6, K=2, H=64, I=32, add_bias=False, std=0.15, dtype="float32", seed=0):
    torch.manual_seed(seed)
    return MoE(E, K, H, I, ActivationType(kind), add_bias, std).to(getattr(torch, dtype))


def inputs(*shape, dtype="float32", seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator).to(getattr(torch, dtype)) for _ in range(2)]
    return made[0].requires_grad_(), made[1]


def run(moe, x, dout, backend="sonicmoe", aux_weight=0.5):
    """Output, loss and every gradient by name, with the loss in the total."""
    out, aux = moe(x, kernel_backend_moe=KernelBackendMoE(backend))
    names, tensors = ["x"] + [n for n, _ in moe.named_parameters()], [x, *moe.parameters()]
    grads = torch.autograd.grad([out, aux], tensors, [dout.to(out.dtype), torch.full_like(aux, aux_weight)])
    return {"out": out, "aux": aux} | dict(zip(names, grads, strict=True))


def in_float64(moe, x, dout, chosen=None):
    """The module's function from its definition. ``chosen``: which experts its router took, where it rounds."""
    w = {n: p.detach().double().requires_grad_() for n, p in moe.named_parameters()}
    x = x.detach().double().requires_grad_()
    flat = x.reshape(-1, moe.hidden_size)
    logits = flat @ w["router.weight"].T
    chosen = logits.topk(moe.top_k).indices if chosen is None else chosen.long()
    scores = logits.gather(1, chosen).softmax(dim=1)
    token = torch.arange(len(flat)).repeat_interleave(moe.top_k)
    kind = moe.activation_function.value
    parts = (token, chosen.flatten(), scores.flatten(), w["c_fc.weight"], w["c_proj.weight"])
    out = oracle.experts(flat, *parts, kind).reshape(x.shape)
    share = torch.bincount(chosen.flatten(), minlength=moe.num_experts).double() / max(chosen.numel(), 1)
    mean = logits.softmax(dim=1).sum(dim=0) / max(len(flat), 1)
    aux = moe.num_experts * (mean * share).sum()
    grads = torch.autograd.grad([out, aux], [x, *w.values()], [dout.double(), torch.tensor(0.5).double()])
    return {"out": out, "aux": aux} | dict(zip(["x", *w], grads, strict=True))


def views(moe):
    """(w1, b1, w2, b2) as the published functions take them."""
    return moe.c_fc.weight.permute(1, 2, 0), None, moe.c_proj.weight.permute(1, 2, 0), None
