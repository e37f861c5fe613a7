"""Mistakes in what only PaddleFleet hands over, and those that a configuration, a size or a device makes of a call at
either entry point."""

import types
from dataclasses import replace

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig, checks
from sonicmoe.ernie_compat import (
    fleet,
    quantize_activation_blockscaled_fast,
    quantize_native_fp8_weights,
    run_sonic_moe,
)
from sonicmoe.functional import set_wgrad_deferral_hook
from sonicmoe.gemm.plan import make_plan
from tests.support.lifecycle import Flight, assert_same_bits, bits, forbid_engine, fresh_results, refused, weight_grads
from tests.support.paddle_runs import expert_list, forward_node, make_node, native_parameters, tensor
from tests.support.problems import make_problem

pytestmark = pytest.mark.contract

PROBLEM = make_problem(n_tokens=12, n_experts=3)
E, K = 3, 2
FP8 = SonicMoEConfig(use_fp8=True)


def call_fleet(problem=PROBLEM, **changes):
    w1, w2 = native_parameters(problem)
    given = {
        "hidden_states": tensor(problem.x),
        "topk_indices": tensor(problem.indices, "int32"),
        "topk_scores": tensor(problem.probs, "float32"),
        "K": problem.indices.shape[1],
        "E": problem.n_experts,
        "w1": w1,
        "w2": w2,
    }
    return run_sonic_moe(**{**given, **changes})


def weight(values, dtype="bfloat16"):
    return tensor(values, dtype)


FLEET = {
    "K other": ({"K": 3}, ValueError, "^K: got 3, but topk_indices has 2 columns"),
    "K zero": ({"K": 0}, ValueError, "^K: got 0, need at least 1"),
    "K fraction": ({"K": 2.5}, TypeError, "^K: got 2.5, need an integer"),
    "K none": ({"K": None}, TypeError, "^K: got None, need an integer"),
    "E other": ({"E": 4}, ValueError, r"^w1, w2: got shapes .* with E=4, H=128"),
    "E inf": ({"E": float("inf")}, TypeError, "^E: got inf, need an integer"),
    "E text": ({"E": "3"}, TypeError, "^E: got '3', need an integer"),
    "w1 none": ({"w1": None}, TypeError, "^w1: got NoneType, need a tensor"),
    "w2 numpy": ({"w2": PROBLEM.w2}, TypeError, "^w2: got ndarray, need a tensor"),
    "activation": ({"activation_type": "swish"}, ValueError, "^activation_type: got 'swish', need one of"),
    "not glu": ({"activation_type": "relu"}, ValueError, r"^w1, w2: got shapes .* need native \[E, I, H\]"),
    "config number": ({"fp8_config": 3}, TypeError, "^fp8_config: got int, need "),
    "config text": ({"fp8_config": "perf"}, TypeError, "^fp8_config: got str, need "),
    "config dict": ({"fp8_config": {"swiglu_clamp_value": 7.0}}, TypeError, "^fp8_config: got dict, need "),
}


@pytest.mark.parametrize("name", FLEET)
def test_fleet_alone(name, monkeypatch):
    changes, kind, message = FLEET[name]
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(**changes), kind, message)


WEIGHTS = {
    "w1 2-d": (lambda: {"w1": weight(PROBLEM.w1[0])}, ValueError, r"^w1: got shape \[128, 256\], need 3 dimensions"),
    "w1 int": (lambda: {"w1": weight(PROBLEM.w1, "int32")}, TypeError, "^w1: got dtype int32, need bfloat16"),
    "grouped": (
        lambda: {"w1": weight(PROBLEM.w1), "w2": weight(PROBLEM.w2)},
        ValueError,
        r"^w1, w2: got shapes \[3, 128, 256\] and \[3, 128, 128\], need native .*grouped layout: convert them with "
        "weight_layout_fusion$",
    ),
    "another H": (
        lambda: dict(zip(("w1", "w2"), native_parameters(sized(256, 128)), strict=True)),
        ValueError,
        r"^w1, w2: got shapes .* need native \[E, 2I, H\] and \[E, H, I\] with E=3, H=128$",
    ),
    "x of another H": (lambda: {"hidden_states": tensor(PROBLEM.x[:, :64])}, ValueError, "^w1, w2: got .* H=64$"),
}


def sized(hidden, intermediate):
    return make_problem(n_tokens=4, n_experts=3, hidden=hidden, intermediate=intermediate)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_fleet(name, monkeypatch):
    changes, kind, message = WEIGHTS[name]
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(**changes()), kind, message)


def without_memory(shape):
    made = paddle.zeros(shape)
    made._clear_data()
    return made


MAIN_GRADS = {
    "w1 grouped": ("w1", lambda: paddle.zeros([3, 128, 256]), ValueError, r"got shape \[3, 128, 256\], need \[3, 256"),
    "w2 native": ("w2", lambda: paddle.zeros([3, 128, 384]), ValueError, r"got shape \[3, 128, 384\], need \[3, 384, "),
    "bf16": ("w2", lambda: paddle.zeros([3, 384, 128], "bfloat16"), TypeError, "got dtype bfloat16, need float32"),
    "number": ("w1", lambda: 5, TypeError, "got int, need a tensor"),
    "emptied": ("w1", lambda: without_memory([3, 256, 128]), ValueError, "got a tensor whose storage is empty, need"),
    "view": ("w2", lambda: paddle.zeros([3, 128, 384]).transpose([0, 2, 1]), ValueError, "got a non-contiguous tensor"),
}


@pytest.mark.parametrize("name", MAIN_GRADS)
def test_main_grad_of_fleet(name, monkeypatch):
    which, value, kind, message = MAIN_GRADS[name]
    problem = sized(128, 384 if which == "w2" else 128)
    weights = dict(zip(("w1", "w2"), native_parameters(problem), strict=True))
    weights[which].main_grad = value()
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(problem, **weights), kind, f"^{which}.main_grad: {message}")


FOREIGN = {
    "enabled": ({"enabled": True}, ValueError, "^fp8_config.enabled: got True with fp8=False"),
    "epilogue_quant": ({"epilogue_quant": False}, ValueError, "^fp8_config.epilogue_quant: got False, need True"),
    "save_z_fp8": ({"save_z_fp8": False}, ValueError, "^fp8_config.save_z_fp8: got False, need True"),
    "fused_gated": ({"fused_gated": False}, ValueError, "^fp8_config.fused_gated: got False, need True"),
    "clamp negative": ({"swiglu_clamp_value": -1.0}, ValueError, "swiglu_clamp.*: got -1.0, need"),
    "clamp nan": ({"swiglu_clamp_value": float("nan")}, ValueError, "swiglu_clamp.*: got nan, need"),
    "clamp text": ({"swiglu_clamp_value": "seven"}, TypeError, "swiglu_clamp.*: got 'seven', need"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_settings_of_a_foreign_config(name, monkeypatch):
    attributes, kind, message = FOREIGN[name]
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(fp8_config=types.SimpleNamespace(**attributes)), kind, message)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_config_that_says_the_opposite_of_fp8(fp8, monkeypatch):
    """What the environment says is no contradiction: there the argument wins."""
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "mem")
    call_fleet(fp8=fp8, fp8_config=SonicMoEConfig())
    monkeypatch.delenv("SONIC_MOE_FP8_MODE")
    call_fleet(fp8=fp8, fp8_config=SonicMoEConfig())
    forbid_engine(monkeypatch)
    for config in (SonicMoEConfig(use_fp8=not fp8), SonicMoEConfig(fp8_mode=None if fp8 else "perf")):
        message = f"^fp8_config.use_fp8: got {not fp8} with fp8={fp8}; need the same"
        refused(lambda config=config: call_fleet(fp8=fp8, fp8_config=config), ValueError, message)


# ---- Emptied weights and their FP8 copies ----------------------------------------------------------------------------


def emptied(recipe="sm90", iso32=False, **attributes):
    """Both weights without bf16 storage, with FP8 copies; ``w1_fp8=...`` replaces one of these."""
    w1, w2 = native_parameters(PROBLEM)
    w1.fp8, w1.transposed_fp8, w2.fp8, w2.transposed_fp8 = quantize_native_fp8_weights(w1, w2, iso32, recipe)
    for name, value in attributes.items():
        which, attribute = name.split("_", 1)
        target = {"w1": w1, "w2": w2}[which]
        setattr(target, attribute, value(*getattr(target, attribute)) if callable(value) else value)
    w1._clear_data()
    w2._clear_data()
    return {"w1": w1, "w2": w2}


COPIES = {
    "missing": (lambda: emptied(w1_fp8=None), ValueError, r"^w1: .*empty and w1.fp8 is NoneType; need a pair"),
    "missing transposed": (lambda: emptied(w2_transposed_fp8=None), ValueError, "^w2: .*w2.transposed_fp8 is NoneType"),
    "no pair": (lambda: emptied(w2_fp8=3), ValueError, r"^w2: .*w2.fp8 is int; need a pair \(data, scale\)"),
    "pair of none": (lambda: emptied(w2_fp8=(None, None)), TypeError, r"^w2.fp8\[0\]: got NoneType, need a tensor"),
    "scale none": (lambda: emptied(w1_fp8=lambda d, s: (d, None)), TypeError, r"^w1.fp8\[1\]: got NoneType, need a"),
    "data bf16": (
        lambda: emptied(w1_fp8=lambda d, s: (d.astype("bfloat16"), s)),
        TypeError,
        r"^w1.fp8\[0\]: got dtype bfloat16, need float8_e4m3fn",
    ),
    "orientations swapped": (
        lambda: emptied(w1_fp8=lambda d, s: (d.astype("float32").transpose([0, 2, 1]).astype(d.dtype), s)),
        ValueError,
        r"^w1.fp8\[0\]: got shape \[3, 128, 256\], need \[3, 256, 128\]",
    ),
    "scale fp16": (
        lambda: emptied(w2_fp8=lambda d, s: (d, s.astype("float16"))),
        TypeError,
        r"^w2.fp8\[1\]: got dtype float16, need float32 or uint8",
    ),
    "scale 2-d": (lambda: emptied(w2_fp8=lambda d, s: (d, s[0])), ValueError, r"^w2.fp8\[1\]: got shape \[1, 1\]"),
    "scale rows": (
        lambda: emptied(w1_fp8=lambda d, s: (d, s[:, :1].clone())),
        ValueError,
        r"w1.*\(256, 128\).*\(128, 128\)",
    ),
    "sm100 copies": (lambda: emptied("sm100"), ValueError, r"w1.* \(1, 32\) blocks with UE8M0 scales.*'sm90' needs"),
    "iso32 copies": (lambda: emptied("sm100", True), ValueError, r"w1.* \(32, 32\) blocks with UE8M0 .*'sm90' needs"),
}


@pytest.mark.parametrize("name", COPIES)
def test_fp8_copies(name, monkeypatch):
    weights, kind, message = COPIES[name]
    weights = weights()
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(fp8=True, **weights), kind, message)


def test_a_view_of_a_copy_where_kernels_read_by_address():
    weights = emptied(w2_transposed_fp8=lambda d, s: (d.transpose([0, 2, 1]), s))
    plan = make_plan(SonicMoEConfig(use_fp8=True), "swiglu", storage="bfloat16", device="cpu")
    on_a_gpu = replace(plan, backend="sm90_fp8")
    given = (weights["w1"], weights["w2"], 128, 128)
    fleet._weights(*given, plan, tensor(PROBLEM.x))
    message = "^w2_t FP8 copy: got a non-contiguous tensor, need a contiguous one"
    refused(lambda: fleet._weights(*given, on_a_gpu, tensor(PROBLEM.x)), ValueError, message)


def test_iso32_is_asked_for_and_1x32_is_given(monkeypatch):
    forbid_engine(monkeypatch)
    config = SonicMoEConfig(fp8_recipe="sm100", fp8_iso32_weight=True)
    message = r"w1.* \(1, 32\) blocks .*\(32, 32\) blocks"
    refused(lambda: call_fleet(fp8=True, fp8_config=config, **emptied("sm100")), ValueError, message)


def test_emptied_weights_in_bf16_mode(monkeypatch):
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(**emptied()), ValueError, "^w1: its bf16 storage is empty and fp8 is False")


# ---- The gradient that the combine hands over ------------------------------------------------------------------------


def rows(count=12):
    return quantize_activation_blockscaled_fast(tensor(PROBLEM.x[:count]))


HANDLES = {
    "data alone": (lambda: {"data": rows()[0]}, r"got keys \['data'\].*, need 'data' and 'scale'"),
    "scale alone": (lambda: {"scale": rows()[1]}, r"got keys \['scale'\].*, need 'data' and 'scale'"),
    "data none": (lambda: {"data": None, "scale": rows()[1]}, "need 'data' and 'scale'"),
    "data bf16": (lambda: {"data": tensor(PROBLEM.x), "scale": rows()[1]}, "got dtype bfloat16, need float8_e4m3fn"),
    "data list": (lambda: {"data": [1.0], "scale": rows()[1]}, "got list, need a tensor"),
    "short": (lambda: dict(zip(("data", "scale"), rows(5), strict=True)), r"got shape \[5, 128\], need \[12, 128\]"),
    "scale short": (lambda: {"data": rows()[0], "scale": rows(5)[1]}, r"got float32 \[5, 1\], need float32 \[12, 1\]"),
}


@pytest.mark.parametrize("entry", ["node", "fleet"])
@pytest.mark.parametrize("name", HANDLES)
def test_combine_gradient_handle(name, entry):
    """Found in backward, so Paddle wraps it in an error of its own; the sentence must survive, and the gradients."""
    value, message = HANDLES[name]
    problem, handle = PROBLEM, {}
    experts = expert_list(problem)
    expected = fresh_results(experts, problem)
    node = make_node(problem, experts)
    w1, w2 = native_parameters(problem)
    if entry == "node":
        Flight(node, problem).land()
        out = forward_node(node, problem, fp8_combine_grad_handle=handle)[0]
    else:
        out = call_fleet(w1=w1, w2=w2, fp8_combine_grad_handle=handle)
    handle.update(value())
    with pytest.raises(Exception, match=r"fp8_combine_grad_handle.*" + message):
        out.backward(tensor(problem.dout))
    assert getattr(w1, "main_grad", None) is None and getattr(w2, "main_grad", None) is None
    if entry == "node":
        node.step()
        names = expected.keys() - {"out", "dx", "ds"}
        assert_same_bits(weight_grads(experts), {name: expected[name] for name in names})


# ---- Configuration, sizes, devices: both entry points ----------------------------------------------------------------


def through_node(problem=PROBLEM, config=None, kind="swiglu", dtype="bfloat16", **changes):
    experts = expert_list(problem, dtype)
    node = make_node(problem, experts, config=config, activation_type=kind)
    if "indices" in changes:
        x, probs = tensor(problem.x, dtype), tensor(problem.probs, "float32")
        return node(x, changes["counts"], tensor(changes["indices"], "int32"), probs)
    return forward_node(node, problem, dtype=dtype, **changes)[0]


def through_fleet(problem=PROBLEM, config=None, kind="swiglu", dtype="bfloat16", **changes):
    given = {"fp8": config is not None and config.use_fp8, "fp8_config": config, "activation_type": kind}
    names = {"counts": "tokens_per_expert", "indices": "topk_indices"}
    given |= {names[name]: value for name, value in changes.items()}
    if "indices" in changes:
        given["topk_indices"] = tensor(changes["indices"], "int32")
    return call_fleet(problem, hidden_states=tensor(problem.x, dtype), **given)


ENTRIES = pytest.mark.parametrize("through", [through_node, through_fleet], ids=["node", "fleet"])
SIZES = {
    "fp8 H": (192, 128, FP8, "hidden_size: got 192, need a multiple of 128 for FP8 blocks"),
    "fp8 I": (128, 192, FP8, "intermediate_size: got 192, need a multiple of 128 for FP8 blocks"),
    "bf16 H": (100, 128, None, "hidden_size: got 100, need a multiple of 8 for 16-byte rows of bfloat16"),
    "bf16 I": (128, 100, None, "intermediate_size: got 100, need a multiple of 8 for 16-byte rows of bfloat16"),
}


@ENTRIES
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, through, monkeypatch):
    hidden, intermediate, config, message = SIZES[name]
    problem = sized(hidden, intermediate)
    forbid_engine(monkeypatch)
    refused(lambda: through(problem, config), ValueError, f"^{message}$")


def test_sizes_that_are_allowed():
    through_node(sized(192, 136))
    through_node(sized(132, 132), dtype="float32")  # 16 bytes are four of these
    message = "^hidden_size: got 130, need a multiple of 4 for 16-byte rows of float32$"
    refused(lambda: through_node(sized(130, 132), dtype="float32"), ValueError, message)


CONFIGS = {
    "clamp": (SonicMoEConfig(swiglu_clamp=2.0), "geglu", ValueError, "^swiglu_clamp: got 2.0 with activation 'geglu'"),
    "clamp silu": (SonicMoEConfig(swiglu_clamp=2.0), "reglu", ValueError, "^swiglu_clamp: got 2.0 .*'reglu'"),
    "iso32": (SonicMoEConfig(use_fp8=True, fp8_iso32_weight=True), "swiglu", ValueError, "^fp8_iso32_weight: .*'sm90'"),
}


@ENTRIES
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, through, monkeypatch):
    config, kind, error, message = CONFIGS[name]
    forbid_engine(monkeypatch)
    refused(lambda: through(config=config, kind=kind), error, message)


@ENTRIES
def test_fp32_x_under_fp8(through, monkeypatch):
    forbid_engine(monkeypatch)
    name = "x" if through is through_node else "hidden_states"
    message = f"^{name}: got dtype float32 under FP8, need bfloat16 or float16"
    refused(lambda: through(config=FP8, dtype="float32"), TypeError, message)


@ENTRIES
def test_counts_that_are_not_aligned_though_the_user_said_so(through, monkeypatch):
    forbid_engine(monkeypatch)
    config = SonicMoEConfig(use_fp8=True, fp8_assume_aligned=True)
    message = "^tokens_per_expert: got .* SONIC_MOE_FP8_ASSUME_ALIGNED=1, need a multiple of 128"
    refused(lambda: through(config=config, counts=PROBLEM.counts), ValueError, message)


@ENTRIES
@pytest.mark.parametrize("flag", ["argument", "environment"])
def test_an_expert_twice_in_a_row(flag, through, monkeypatch):
    indices = PROBLEM.indices.copy()
    indices[7] = [2, 2]
    indices[9] = [-1, -1]  # this may repeat, and so may an id of another rank
    indices[10] = [5, 5]
    counts = [int((indices == e).sum()) for e in range(E)]
    assert bits(through(indices=indices, counts=counts)), "unchecked, it is the caller's word"
    if flag == "environment":
        monkeypatch.setenv("SONIC_MOE_VALIDATE_DISPATCH", "1")
    config = SonicMoEConfig(validate_dispatch=True) if flag == "argument" else None
    forbid_engine(monkeypatch)
    name = "dispatched_indices" if through is through_node else "topk_indices"
    message = rf"^{name}: row 7 .*\[2, 2\].* more than once"
    with pytest.raises(ValueError, match=message) as caught:
        through(config=config, indices=indices, counts=counts)
    assert "\n" not in str(caught.value)
    indices[7] = [2, 0]
    counts = [int((indices == e).sum()) for e in range(E)]
    with pytest.raises(AssertionError, match="the engine ran"):
        through(config=config, indices=indices, counts=counts)


@ENTRIES
def test_counts_and_indices_that_disagree_name_the_callers_argument(through, monkeypatch):
    forbid_engine(monkeypatch)
    name = "dispatched_indices" if through is through_node else "topk_indices"
    wrong = [PROBLEM.counts[0] + 1, PROBLEM.counts[1] - 1, PROBLEM.counts[2]]
    refused(lambda: through(counts=wrong), ValueError, f"^tokens_per_expert: got .* but {name} hold ")


def pretend(monkeypatch, place) -> None:
    """Tensors are where ``place`` says."""
    monkeypatch.setattr(checks, "place_of", place)
    monkeypatch.setattr(checks, "place_name", place)


@ENTRIES
def test_a_device_without_kernels(through, monkeypatch):
    pretend(monkeypatch, lambda tensor: "xpu:0")
    forbid_engine(monkeypatch)
    refused(through, ValueError, "^device: got xpu, .*set backend='naive' in SonicMoEConfig")
    with pytest.raises(AssertionError, match="the engine ran"):
        through(config=SonicMoEConfig(backend="naive"))


@ENTRIES
@pytest.mark.parametrize("elsewhere", ["x", "indices", "probs"])
def test_tensors_on_two_devices(elsewhere, through, monkeypatch):
    names = {"indices": "dispatched_indices", "probs": "dispatched_probs", "x": "x"}
    if through is through_fleet:
        names = {"indices": "topk_indices", "probs": "topk_scores", "x": "hidden_states"}
    kind = {"x": paddle.bfloat16, "indices": paddle.int32, "probs": paddle.float32}[elsewhere]

    def place(given):
        # Weights are bf16 as well: told from x by being parameters.
        away = given.dtype == kind and not isinstance(given, paddle.base.framework.EagerParamBase)
        return "gpu:1" if away else "cpu"

    pretend(monkeypatch, place)
    forbid_engine(monkeypatch)
    blamed = names[elsewhere] if elsewhere != "x" or through is through_node else "topk_indices|w1"
    refused(through, ValueError, f"^({blamed}): got a tensor on (gpu:1|cpu), need (gpu:1|cpu), where")


def test_fleet_weights_on_another_device(monkeypatch):
    def place(given):
        return "gpu:1" if isinstance(given, paddle.base.framework.EagerParamBase) else "cpu"

    pretend(monkeypatch, place)
    forbid_engine(monkeypatch)
    refused(through_fleet, ValueError, "^w1: got a tensor on gpu:1, need cpu, where hidden_states is")


def test_a_main_grad_on_another_device(monkeypatch):
    weights = dict(zip(("w1", "w2"), native_parameters(PROBLEM), strict=True))
    weights["w2"].main_grad = away = paddle.zeros([3, 128, 128])
    pretend(monkeypatch, lambda given: "gpu:1" if given is away else "cpu")
    forbid_engine(monkeypatch)
    message = "^w2.main_grad: got a tensor on gpu:1, need cpu, where the layer is"
    refused(lambda: call_fleet(**weights), ValueError, message)


def test_a_main_grad_at_an_odd_place(monkeypatch):
    """Kernels move 16 bytes at a time; nothing on a CPU does."""
    weights = dict(zip(("w1", "w2"), native_parameters(PROBLEM), strict=True))
    weights["w2"].main_grad = odd = paddle.zeros([3 * 128 * 128 + 1])[1:].reshape([3, 128, 128])
    assert odd.data_ptr() % 16 == 4
    call_fleet(**weights)
    is_cpu = checks.is_cpu
    monkeypatch.setattr(checks, "is_cpu", lambda given: given is not odd and is_cpu(given))
    forbid_engine(monkeypatch)
    refused(lambda: call_fleet(**weights), ValueError, "^w2.main_grad: begins 4 bytes behind a multiple of 16")


@pytest.mark.parametrize("hook", [3, "hook", [print]])
def test_deferral_hook(hook):
    refused(lambda: set_wgrad_deferral_hook(hook), TypeError, f"^hook: got {type(hook).__name__}, need a callable or")


def test_a_config_that_cannot_be(monkeypatch):
    """What the node is asked to do through the environment is checked at the call, and named by its flag."""
    node = make_node(PROBLEM)
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "fast")
    refused(lambda: forward_node(node, PROBLEM), ValueError, "^SONIC_MOE_FP8_MODE: got 'fast', need perf or mem")
    refused(call_fleet, ValueError, "^SONIC_MOE_FP8_MODE: got 'fast', need perf or mem")
    monkeypatch.delenv("SONIC_MOE_FP8_MODE")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRADS", "1")
    with pytest.raises(ValueError, match="^SONIC_MOE_FP8_WGRADS: there is no such flag; the nearest is "):
        forward_node(node, PROBLEM)
    monkeypatch.delenv("SONIC_MOE_FP8_WGRADS")
    assert np.isfinite(forward_node(node, PROBLEM)[0].astype("float32").numpy()).all()
    with pytest.raises(ValueError, match="^prequantize_weights: FP8 is off .*; set SONIC_MOE_FP8_MODE"):
        node.prequantize_weights()
