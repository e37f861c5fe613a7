"""``ExpertParallelMoE`` for torch: router, dispatch, experts, combine.

layer = ExpertParallelMoE(num_experts=32, num_experts_per_tok=8, hidden_size=H, intermediate_size=I)
out, aux_loss = layer(x)
(loss / layer.comm.size).backward()       # each rank's share of the mean over the ranks
layer.sum_shared_gradients(); layer.step(); optimizer.step()
"""

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..config import SonicMoEConfig
from ..enums import ActivationType, is_glu
from ..functional.dispatched import dispatched_experts
from ..functional.layer import checked_topk, route_topk
from ..functional.router import logits_on_tape
from ..functional.streams import compute_input
from ..functional.switch_loss import switch_loss
from ..moe import Experts
from ..routing.counts import count
from . import balance, torch_communicator, torch_tape
from .call import Wire
from .deepep import DeepEp
from .layout import experts_of_rank
from .pieces import cut, run_pieces
from .transport import AllToAll


def make_transport(name: str, comm, group=None):
    """``alltoall``, ``deepep``, or ``auto``: DeepEP where it is installed. A rank alone needs neither."""
    if name not in ("auto", "alltoall", "deepep"):
        raise ValueError(f"transport: got {name!r}, need 'auto', 'alltoall' or 'deepep'")
    installed = find_spec("deep_ep") is not None
    if comm.size == 1 or name == "alltoall" or (name == "auto" and not installed):
        return AllToAll(comm)
    return DeepEp(group)


class SharedExpert(nn.Module):
    """A dense SwiGLU MLP that every token goes through."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_gate_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.up_gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ExpertParallelMoE(nn.Module):
    """Top-k routing over ``num_experts`` experts, of which each rank of ``group`` holds an equal part.

    Parameters: ``router.weight`` [E, H] and those of ``shared`` are the same on every rank; ``c_fc.weight``
    [E/R, 2I, H] and ``c_proj.weight`` [E/R, H, I], in native layout, are this rank's own. On
    one kind of device all begin alike for any number of ranks.

    ``balance_speed``: see ``balance.py``. ``fp8_dispatch``, ``fp8_combine_grad``: what travels as FP8. ``recompute``:
    keep x alone, and run everything after the router again in backward. ``overlap``: into how many pieces a call's
    tokens are cut, so that one piece travels while another is computed. ``transport``: see ``make_transport``;
    ``layer.transport.name`` tells which it is.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        group=None,
        activation_function: ActivationType | str = ActivationType.SWIGLU,
        std: float = 0.02,
        seed: int = 0,
        shared_intermediate_size: int | None = None,
        balance_speed: float | None = None,
        fp8_dispatch: bool = False,
        fp8_combine_grad: bool = False,
        recompute: bool = False,
        overlap: int = 1,
        transport: str = "alltoall",
        config: SonicMoEConfig | None = None,
    ):
        super().__init__()
        self.comm = torch_communicator.of(group)
        self.transport = make_transport(transport, self.comm, group)
        self.num_experts = checks.require_int("num_experts", num_experts)
        self.top_k = checked_topk(num_experts_per_tok, self.num_experts)
        self.hidden_size = checks.require_int("hidden_size", hidden_size)
        self.held = experts_of_rank(self.num_experts, self.comm.rank, self.comm.size)
        self.activation_function = ActivationType.parse(activation_function)
        self.wire = Wire(fp8_dispatch, fp8_combine_grad)
        self.wire.check(self.hidden_size)
        self.recompute, self.overlap = recompute, checks.require_int("overlap", overlap)
        self.balance_speed, self.config = balance.checked_speed(balance_speed), config
        width = intermediate_size * (2 if is_glu(self.activation_function) else 1)
        self.router = nn.Linear(self.hidden_size, self.num_experts, bias=False)
        self.c_fc = Experts(len(self.held), self.hidden_size, width, add_bias=False, std=std)
        self.c_proj = Experts(len(self.held), intermediate_size, self.hidden_size, add_bias=False, std=std)
        self.shared = None
        if shared_intermediate_size is not None:
            self.shared = SharedExpert(self.hidden_size, shared_intermediate_size)
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)
        steps = None if balance_speed is None else torch.zeros(self.num_experts, dtype=torch.int64)
        self.register_buffer("balance_steps", steps)
        self._draw(std, seed)

    @torch.no_grad()
    def _draw(self, std: float, seed: int) -> None:
        """Each expert has a generator of its own, so that its weights do not depend on who holds it."""
        device = self.router.weight.device
        if device.type == "meta":
            return
        generator = torch.Generator(device).manual_seed(seed)
        alike = [self.router.weight] + ([] if self.shared is None else list(self.shared.parameters()))
        for weight in alike:
            weight.copy_(torch.randn(weight.shape, generator=generator, device=device) * std)
        for place, expert in enumerate(self.held):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + expert + 1)
            for weight in (self.c_fc.weight[place], self.c_proj.weight[place]):
                weight.copy_(torch.randn(weight.shape, generator=generator, device=device) * std)

    def forward(self, hidden_states):
        """(out, aux_loss) for hidden_states [..., H]; all ranks call it together, a rank without tokens too.

        ``aux_loss`` is the balance loss of this rank's tokens against the load of all ranks: its mean over ranks with
        equally many tokens is that of one rank with all of them.
        """
        checks.require_tensor("hidden_states", hidden_states)
        if hidden_states.ndim < 1 or hidden_states.shape[-1] != self.hidden_size:
            given = list(hidden_states.shape)
            raise ValueError(f"hidden_states: got shape {given}, need [..., H] with H={self.hidden_size}")
        x = hidden_states.reshape(-1, self.hidden_size)
        logits = logits_on_tape(x, self.router.weight, self._config())
        probs, indices = self._choose(logits)
        frequency = self.comm.sum_(count(indices.reshape(-1), self.num_experts).to(torch.int64))
        if self.training:
            self.load += frequency
        args = (compute_input(x), probs, indices)
        if self.recompute and torch.is_grad_enabled():
            again = partial(self._routed_under, self._config())
            out = checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._routed(*args)
        return out.reshape(hidden_states.shape), switch_loss(logits, frequency, self._config())

    def _choose(self, logits):
        if self.balance_steps is None:
            return route_topk(logits, self.top_k, config=self._config())
        offset = self.balance_steps.to(torch.float32) * self.balance_speed
        indices = balance.choose(logits.detach(), offset, self.top_k)
        return torch.softmax(logits.to(torch.float32).gather(1, indices), dim=-1), indices.to(torch.int32)

    def _routed_under(self, config, x, probs, indices):
        """Backward runs it in a thread and at a time of its own, where another configuration may be active."""
        with config.activate():
            return self._routed(x, probs, indices)

    def _routed(self, x, probs, indices):
        parts = [cut(tensor, self.overlap) for tensor in (x, probs, indices)]
        beside = None if self.shared is None else lambda: self.shared(x)
        found, extra = run_pieces(torch_tape, list(zip(*parts, strict=True)), self._open, self._experts, beside)
        out = found[0] if len(found) == 1 else torch.cat(found)
        return out if extra is None else out + extra.to(out.dtype)

    def _open(self, pieces):
        learn = torch.is_grad_enabled() and (self.c_fc.weight.requires_grad or self.c_proj.weight.requires_grad)
        return torch_tape.open_calls(pieces, self.num_experts, self.transport, self.wire, learn)

    def _experts(self, rows, probs, call):
        return dispatched_experts(
            rows, call.counts, call.local_indices, probs, self.c_fc.weight, self.c_proj.weight,
            self.activation_function, payload=call.take_payload(), combine_grad_handle=call.combine_grad_handle,
            config=self._config(),
        )  # fmt: skip

    def _config(self) -> SonicMoEConfig:
        return SonicMoEConfig.current() if self.config is None else self.config

    def step(self) -> None:
        """Between the last backward and the optimizer's step: moves the balance offset by the load since the last."""
        if self.balance_steps is not None:
            self.balance_steps += balance.change(self.load)
        self.load.zero_()

    def replicated_parameters(self) -> list:
        """Those that every rank holds a copy of. The others are this rank's own, with whole gradients."""
        own = {id(self.c_fc.weight), id(self.c_proj.weight)}
        return [weight for weight in self.parameters() if id(weight) not in own]

    def sum_shared_gradients(self) -> None:
        """Add the replicated parameters' gradients up over the ranks. Once a step, after its last backward."""
        for weight in self.replicated_parameters():
            if weight.requires_grad:
                if weight.grad is None:  # this rank takes part all the same
                    weight.grad = torch.zeros_like(weight)
                self.comm.sum_(weight.grad)

    def expert_tensors(self) -> dict:
        """By name, one tensor for each expert of this rank: what ``checkpoint`` saves."""
        return {"c_fc.weight": list(self.c_fc.weight.detach()), "c_proj.weight": list(self.c_proj.weight.detach())}

    @torch.no_grad()
    def set_expert_tensors(self, tensors: dict) -> None:
        for name, weight in (("c_fc.weight", self.c_fc.weight), ("c_proj.weight", self.c_proj.weight)):
            weight.copy_(torch.stack(list(tensors[name])))

    def extra_repr(self) -> str:
        return f"experts {self.held.start} to {self.held.stop - 1} of {self.num_experts}, top_k={self.top_k}"
