"""``SonicMoEMlpNode``: the experts of one layer between a dispatch and a combine, for Paddle.

node = SonicMoEMlpNode(experts, n_experts=E, hidden_size=H, intermediate_size=I)
out = node(x, tokens_per_expert, dispatched_indices, dispatched_probs)
out.backward(grad)
node.step()        # before optimizer.step(): main_grad is whole only after it
"""

import paddle

from .. import checks, expert_mlp
from ..config import SonicMoEConfig
from ..enums import ActivationType
from ..gemm.plan import Plan, make_plan
from ..launch import make_current, raw_stream
from . import dispatch
from .autocast import without_autocast
from .call import ExpertCall, needs_grad, require_gradient_carrier, require_leaf, run, storage_of
from .main_grad import GradAccumulator
from .weights import WeightStore


class SonicMoEMlpNode:
    """Experts as one differentiable call. Gradients of x and probs flow on the tape; those of the weights accumulate
    in the node's own fp32 buffers until ``step()`` adds them to each ``weight.main_grad``.

    ``experts``: a list with ``.up_gate_proj.weight`` [H, 2I] and ``.down_proj.weight`` [I, H], or one object with
    ``.weight1`` [E, H, 2I] and ``.weight2`` [E, I, H].
    ``config``: fixes the configuration; without it each call takes the active one, or the environment's.

    ``copy.deepcopy`` of a model that holds a node gives a node of the copied experts. It begins like a new one: weight
    copies, gradients that wait for ``step()`` and calls in flight stay with the original.
    """

    def __init__(
        self,
        experts,
        n_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation_type=ActivationType.SWIGLU,
        stream_id=None,
        config: SonicMoEConfig | None = None,
    ):
        self.n_experts = checks.require_int("n_experts", n_experts)
        self.hidden_size = checks.require_int("hidden_size", hidden_size)
        self.intermediate_size = checks.require_int("intermediate_size", intermediate_size)
        self.activation_type = ActivationType.parse(activation_type)
        if config is not None and not isinstance(config, SonicMoEConfig):
            raise TypeError(f"config: got {type(config).__name__}, need a SonicMoEConfig or None")
        raw_stream(stream_id)  # checked here; a launch asks the framework for its current stream
        self.config = config
        self._store = WeightStore(
            experts, self.n_experts, self.hidden_size, self.intermediate_size, self.activation_type
        )
        self._grads = GradAccumulator(self._store)
        self._last_path: str | None = None

    def __getstate__(self) -> dict:
        """Of a copy; its store and its gradients see to themselves."""
        return {**vars(self), "_last_path": None}

    def _config(self) -> SonicMoEConfig:
        return self.config if self.config is not None else SonicMoEConfig.current()

    def _plan(self, storage: str, config: SonicMoEConfig) -> Plan:
        checks.require_layer_sizes(self.hidden_size, self.intermediate_size, storage, config.use_fp8)
        return make_plan(config, self.activation_type, storage=storage, **dispatch.place_facts(self._store.place_of()))

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(
        self,
        x,
        tokens_per_expert,
        dispatched_indices,
        dispatched_probs,
        *,
        dispatched_hidden_states_fp8=None,
        dispatched_hidden_states_scales=None,
        dispatched_hidden_states_scale_layout: str | None = None,
        fp8_combine_grad_handle: dict | None = None,
    ):
        """out [T,H] in x's type (bf16 for an FP8 dispatch). Ids under 0 or at and above E are not on this rank.

        An FP8 dispatch is x itself in e4m3, or ``dispatched_hidden_states_fp8`` beside a bf16 x that only carries the
        gradient; ``dispatched_hidden_states_scales`` in any of the carriers that ``fp8_payload`` lists.
        """
        config = self._config()
        dispatch.check_hidden("x", x, self.hidden_size)
        require_gradient_carrier("x", x)
        seen = self._store.look()
        checks.require_same_place("x", x, "the first expert weight", seen.first[0])
        dispatch.check_topk(
            dispatched_indices,
            dispatched_probs,
            checks.shape_of(x)[0],
            ("dispatched_indices", "dispatched_probs"),
            ("x", x),
        )
        counts = checks.host_counts(tokens_per_expert, self.n_experts)
        dispatch.check_handle(fp8_combine_grad_handle)
        engine_x = dispatch.engine_input(
            ("x", "dispatched_hidden_states_fp8", "dispatched_hidden_states_scales"),
            x,
            dispatched_hidden_states_fp8,
            dispatched_hidden_states_scales,
            dispatched_hidden_states_scale_layout,
        )
        plan = self._plan(storage_of(engine_x), config)
        make_current(x)
        with paddle.no_grad(), without_autocast():
            routing = dispatch.route(
                dispatched_indices, dispatched_probs, counts, self.n_experts, plan, config, "dispatched_indices"
            )
            weights = self._store.current(plan, seen)
        if not seen.leaves:
            for name, param, _, _ in self._store.named():
                require_leaf(name, param)
        experts1, experts2 = self._store.trainable(seen)
        call = ExpertCall(
            x=engine_x,
            routing=routing,
            weights=weights,
            plan=plan,
            need_dx=needs_grad(x),
            need_ds=needs_grad(dispatched_probs),
            experts1=experts1,
            experts2=experts2,
            on_wgrad=self._grads.accumulate,
            combine_grad_handle=fp8_combine_grad_handle,
        )
        self._last_path = plan.path
        return run(x, dispatched_probs, call)

    @property
    def last_path(self) -> str | None:
        """What the latest forward really ran, as ``device/backend/recipe``; None before the first."""
        return self._last_path

    @property
    def weight_epoch(self) -> int:
        """Grows by one each time that a forward finds other weight bytes than the one before."""
        return self._store.epoch

    @property
    def has_pending_grads(self) -> bool:
        """Whether a backward has accumulated what no ``step()`` has flushed yet."""
        return self._grads.pending

    def step(self) -> None:
        """Add the accumulated weight gradients to each ``main_grad`` and drop weight copies. Call it before the
        optimizer's step."""
        self._grads.flush()
        self._store.invalidate()

    def flush_grads(self) -> None:
        """The gradient half of ``step()``: weight copies stay, for a flush between micro-batches."""
        self._grads.flush()

    def discard_grads(self) -> None:
        """Forget what was accumulated since the last flush, as after an overflowed step."""
        self._grads.discard()

    def invalidate_caches(self) -> None:
        """Drop every weight copy. Never needed for right results: it frees memory."""
        self._store.invalidate()

    def prequantize_weights(self) -> None:
        """Make the FP8 copies now instead of in the next forward."""
        config = self._config()
        if not config.use_fp8:
            raise ValueError("prequantize_weights: FP8 is off in this configuration; set SONIC_MOE_FP8_MODE or use_fp8")
        weight = checks.dtype_name(self._store.place_of())
        storage = "bfloat16" if weight == "float32" else weight
        make_current(self._store.place_of())
        with paddle.no_grad(), without_autocast():
            self._store.current(self._plan(storage, config))

    def release_fp8_weights(self) -> None:
        """Free the FP8 copies; the next FP8 forward makes them again."""
        self._store.release_fp8()

    def warmup(self, n_tokens: int = 8, topk: int = 1) -> None:
        """Run one forward and backward on zeros, so that all is compiled. Gradients stay as they are."""
        n_tokens, topk = checks.require_int("n_tokens", n_tokens), checks.require_int("topk", topk)
        e, h = self.n_experts, self.hidden_size
        weight = checks.dtype_name(self._store.place_of())
        place = self._store.place_of().place
        storage = "bfloat16" if weight == "float32" else weight
        config = self._config()
        plan = self._plan(storage, config)
        topk = min(topk, e)
        make_current(self._store.place_of())
        with paddle.no_grad(), without_autocast():
            x = paddle.zeros([n_tokens, h], dtype=storage, device=place)
            slot = paddle.arange(n_tokens * topk, dtype="int32").reshape([n_tokens, topk]) % e
            probs = paddle.zeros([n_tokens, topk], dtype="float32", device=place)
            routing = dispatch.metadata.build(slot.to(place), probs, e, plan.row_block, config)
            out, saved = expert_mlp.forward(x, routing, self._store.current(plan), plan)
            grads = expert_mlp.backward(saved, paddle.zeros_like(out))
            scratch = GradAccumulator(self._store)
            scratch.accumulate(grads.wgrad, (True,) * e, (True,) * e)
