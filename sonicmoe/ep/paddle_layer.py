"""``ExpertParallelMoE`` for Paddle: router, dispatch, ``SonicMoEMlpNode``, combine.

layer = ExpertParallelMoE(num_experts=32, num_experts_per_tok=8, hidden_size=H, intermediate_size=I)
out, aux_loss = layer(x)
(loss / layer.comm.size).backward()       # each rank's share of the mean over the ranks
layer.sum_shared_gradients(); layer.step(); optimizer.step()
"""

# First: it makes `import torch` mean Paddle in everything below.
from . import paddle_tape  # isort: skip

from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute as run_again_in_backward

from .. import checks
from ..config import SonicMoEConfig
from ..enums import ActivationType, is_glu
from ..ernie_compat import SonicMoEMlpNode
from ..ernie_compat.autocast import without_autocast
from ..ernie_compat.call import needs_grad
from . import balance, paddle_communicator
from .call import Wire
from .layout import experts_of_rank
from .pieces import cut, run_pieces
from .transport import AllToAll


def _weight(layer: nn.Layer, rng, shape, dtype: str, std: float):
    """A parameter of ``layer``, the same for the same ``rng`` on every framework's CPU and GPU."""
    weight = layer.create_parameter(shape, dtype=dtype, default_initializer=nn.initializer.Constant(0.0))
    weight.set_value(paddle.to_tensor((rng.standard_normal(shape) * std).astype(np.float32)).astype(dtype))
    return weight


class _Projection(nn.Layer):
    """``x @ weight [in, out]``."""

    def __init__(self, rng, in_features: int, out_features: int, dtype: str, std: float):
        super().__init__()
        self.weight = _weight(self, rng, [in_features, out_features], dtype, std)


class _GatedMLP(nn.Layer):
    """An expert in ERNIE's layout, ``up_gate_proj.weight`` [H, 2I] with the gate's columns first."""

    def __init__(self, rng, hidden: int, intermediate: int, dtype: str, std: float, glu: bool = True):
        super().__init__()
        self.up_gate_proj = _Projection(rng, hidden, intermediate * (2 if glu else 1), dtype, std)
        self.down_proj = _Projection(rng, intermediate, hidden, dtype, std)

    def forward(self, x):
        gate, up = paddle.chunk(paddle.matmul(x, self.up_gate_proj.weight.astype(x.dtype)), 2, axis=-1)
        return paddle.matmul(F.silu(gate) * up, self.down_proj.weight.astype(x.dtype))


class ExpertParallelMoE(nn.Layer):
    """Top-k routing over ``num_experts`` experts, of which each rank of ``group`` holds an equal part.

    ``router.weight`` [H, E] and ``shared`` (both float32) are the same on every rank. ``experts`` has this rank's own,
    named by their number in the whole layer, of ``dtype``; their gradients reach ``main_grad`` at ``step()``. All begin
    alike for any number of ranks.

    ``balance_speed``: see ``balance.py``. ``fp8_dispatch``, ``fp8_combine_grad``: what travels as FP8. ``recompute``:
    keep x alone, and run everything after the router again in backward. ``overlap``: into how many pieces a call's
    tokens are cut, so that one piece travels while another is computed.
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
        config: SonicMoEConfig | None = None,
        dtype: str = "bfloat16",
    ):
        super().__init__()
        self.comm = paddle_communicator.of(group)
        self.transport = AllToAll(self.comm)
        self.num_experts = checks.require_int("num_experts", num_experts)
        self.top_k = checks.require_int("num_experts_per_tok", num_experts_per_tok)
        if self.top_k > self.num_experts:
            raise ValueError(f"num_experts_per_tok: got {self.top_k}, need at most num_experts, {self.num_experts}")
        self.hidden_size = checks.require_int("hidden_size", hidden_size)
        self.held = experts_of_rank(self.num_experts, self.comm.rank, self.comm.size)
        self.wire = Wire(fp8_dispatch, fp8_combine_grad)
        self.wire.check(self.hidden_size)
        self.recompute, self.overlap = recompute, checks.require_int("overlap", overlap)
        self.balance_speed, self.compute_dtype = balance.checked_speed(balance_speed), dtype
        kind = ActivationType.parse(activation_function)
        alike = np.random.default_rng([seed, 0])
        self.router = _Projection(alike, self.hidden_size, self.num_experts, "float32", std)
        self.shared = None
        if shared_intermediate_size is not None:
            self.shared = _GatedMLP(alike, self.hidden_size, shared_intermediate_size, "float32", std)
        self.experts = nn.Layer()
        for expert in self.held:
            rng = np.random.default_rng([seed, 1 + expert])
            made = _GatedMLP(rng, self.hidden_size, intermediate_size, dtype, std, is_glu(kind))
            self.experts.add_sublayer(str(expert), made)
        sizes = (len(self.held), self.hidden_size, intermediate_size)
        self.node = SonicMoEMlpNode(list(self.experts.children()), *sizes, activation_type=kind, config=config)
        self.load = paddle.zeros([self.num_experts], dtype="int64")
        steps = None if balance_speed is None else paddle.zeros([self.num_experts], dtype="int64")
        self.register_buffer("balance_steps", steps)

    def forward(self, hidden_states):
        """(out, aux_loss) for hidden_states [..., H]; all ranks call it together, a rank without tokens too.

        ``aux_loss`` is the balance loss of this rank's tokens against the load of all ranks: its mean over ranks with
        equally many tokens is that of one rank with all of them.
        """
        checks.require_tensor("hidden_states", hidden_states)
        checks.require_dtype("hidden_states", hidden_states, checks.FLOAT_DTYPES)
        if len(hidden_states.shape) < 1 or hidden_states.shape[-1] != self.hidden_size:
            given = list(hidden_states.shape)
            raise ValueError(f"hidden_states: got shape {given}, need [..., H] with H={self.hidden_size}")
        with without_autocast():  # for the router too: narrow logits would choose other experts
            return self._forward(hidden_states)

    def _forward(self, hidden_states):
        # All branches begin at a float32 x, and end so: Paddle's CPU cannot add gradients in bf16, nor join them.
        x = hidden_states.astype("float32").reshape([-1, self.hidden_size])
        logits = self._logits(x)
        probs, indices, frequency = self._choose(logits)
        if self.training:
            self.load = self.load + frequency
        if self.recompute and paddle.is_grad_enabled():
            # Paddle runs nothing again where no input wants a gradient, and the experts would never learn.
            if x.stop_gradient and probs.stop_gradient and self._routed_part_learns():
                probs = probs.detach()
                probs.stop_gradient = False
            config = SonicMoEConfig.current() if self.node.config is None else self.node.config
            # Asked here, because under recompute the forward runs without gradients.
            again = partial(self._routed_under, config, self._backward_comes(x, probs))
            out = run_again_in_backward(again, x, probs, indices, preserve_rng_state=False)
        else:
            out = self._routed(self._backward_comes(x, probs), x, probs, indices)
        out = out.astype(hidden_states.dtype).reshape(hidden_states.shape)
        return out, self._switch_loss(logits, frequency)

    def _logits(self, x):
        if x.shape[0]:
            return paddle.matmul(x, self.router.weight)
        # Paddle has no gradient of a product without rows; that of the scores must all the same be wanted here as on
        # other ranks, or these would wait for it.
        none = paddle.zeros([0, self.num_experts], dtype="float32")
        none.stop_gradient = self.router.weight.stop_gradient and x.stop_gradient
        return none

    def _shared(self, x):
        if not x.shape[0]:
            return paddle.zeros_like(x)
        wide = x if checks.is_cpu(x) else x.astype(self.compute_dtype)
        return self.shared(wide).astype("float32")

    def _choose(self, logits):
        """(scores [T,K], experts [T,K] int32, slots of each expert from all ranks [E] int64)."""
        with paddle.no_grad():
            offset = self.balance_steps
            if offset is not None:
                offset = offset.astype("float32") * self.balance_speed
            chosen = balance.choose(logits, offset, self.top_k)
            counts = (chosen.reshape([-1, 1]) == paddle.arange(self.num_experts)).astype("int64").sum(axis=0)
            frequency = self.comm.sum_(counts)
        scores = F.softmax(paddle.take_along_axis(logits, chosen, axis=1), axis=-1)
        return scores, chosen.astype("int32"), frequency

    def _switch_loss(self, logits, frequency):
        """``routing.switch_loss`` in differentiable operators."""
        share = frequency.astype("float32") / frequency.sum().astype("float32").clip(min=1.0)
        n_tokens = max(int(logits.shape[0]), 1)
        return self.num_experts * (F.softmax(logits, axis=-1).sum(axis=0) * share).sum() / n_tokens

    def _routed_part_learns(self) -> bool:
        parts = [self.experts] if self.shared is None else [self.experts, self.shared]
        return any(not weight.stop_gradient for part in parts for weight in part.parameters())

    def _backward_comes(self, x, probs) -> bool:
        """Through dispatch and combine."""
        if not paddle.is_grad_enabled():
            return False
        return needs_grad(x) or needs_grad(probs) or any(map(needs_grad, self.experts.parameters()))

    def _routed_under(self, config, backward: bool, x, probs, indices):
        """Backward runs it in a thread and at a time of its own, where another configuration may be active."""
        with config.activate():
            return self._routed(backward, x, probs, indices)

    def _routed(self, backward: bool, x, probs, indices):
        parts = [cut(tensor, self.overlap) for tensor in (x, probs, indices)]
        parts[0] = [piece.astype(self.compute_dtype) for piece in parts[0]]
        beside = None if self.shared is None else lambda: self._shared(x)
        found, extra = run_pieces(
            paddle_tape, list(zip(*parts, strict=True)), partial(self._open, backward), self._experts, beside
        )
        found = [piece.astype("float32") for piece in found]
        out = found[0] if len(found) == 1 else paddle.concat(found)
        return out if extra is None else out + extra

    def _open(self, backward: bool, pieces):
        return paddle_tape.open_calls(pieces, self.num_experts, self.transport, self.wire, backward)

    def _experts(self, rows, probs, call):
        payload = call.take_payload()
        given = {"fp8_combine_grad_handle": call.combine_grad_handle}
        if payload is not None:
            given["dispatched_hidden_states_fp8"] = payload.data
            given["dispatched_hidden_states_scales"] = payload.scale
        return self.node(rows, call.counts, call.local_indices, probs, **given)

    def step(self) -> None:
        """Between the last backward and the optimizer's step: the experts' gradients go to ``main_grad``, and the
        balance offset moves by the load since the last step."""
        self.node.step()
        with without_autocast():
            if self.balance_steps is not None:
                self.balance_steps.set_value(self.balance_steps + balance.change(self.load))
            self.load = paddle.zeros_like(self.load)

    def replicated_parameters(self) -> list:
        """Those that every rank holds a copy of. The others are this rank's own, with whole gradients."""
        own = {weight.name for weight in self.experts.parameters()}
        return [weight for weight in self.parameters() if weight.name not in own]

    def sum_shared_gradients(self) -> None:
        """Add the replicated parameters' gradients up over the ranks. Once a step, after its last backward."""
        for weight in self.replicated_parameters():
            if not weight.stop_gradient:
                if weight.grad is None:  # this rank takes part all the same
                    weight.grad = paddle.zeros_like(weight)
                self.comm.sum_(weight.grad)

    def expert_tensors(self) -> dict:
        """By name, one tensor for each expert of this rank: what ``checkpoint`` saves."""
        names = ("up_gate_proj", "down_proj")
        found = {f"{name}.weight": [] for name in names}
        for expert in self.experts.children():
            for name in names:
                found[f"{name}.weight"].append(getattr(expert, name).weight.detach())
        return found

    def set_expert_tensors(self, tensors: dict) -> None:
        for place, expert in enumerate(self.experts.children()):
            for name in ("up_gate_proj", "down_proj"):
                getattr(expert, name).weight.set_value(tensors[f"{name}.weight"][place])
