"""Runs the engine on one framework: arrays and cases in, arrays out. The same lines run on torch and on Paddle.

    engine_parity.py torch|paddle INPUTS.npz OUTPUTS.npz

INPUTS holds ``cases``, a JSON list of {"name", "kind", "inputs", ...}, and each array as ``<inputs>/<array>``; OUTPUTS
gets each result as ``<name>/<result>``, or ``<name>/error`` alone. bf16 leaves as float32 (exactly), FP8 as its bytes.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np

if sys.argv[1] == "paddle":
    importlib.import_module("sonicmoe.ernie_compat")  # turns the proxy on

from sonicmoe import SonicMoEConfig, expert_mlp
from sonicmoe.activation import naive as activation
from sonicmoe.enums import ActivationType, is_glu
from sonicmoe.gemm.naive import torch
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import naive as quant
from sonicmoe.quant.formats import make_recipe
from sonicmoe.routing import metadata
from sonicmoe.routing import naive as routing_ops

ROUTING_ARRAYS = (
    "expert_offset",
    "x_gather_idx",
    "s_scatter_idx",
    "s_reverse_scatter_idx",
    "slot_offset",
    "scores",
    "score_src_idx",
)
ROUTING_SIZES = ("n_tokens", "n_topk", "n_experts", "n_slots", "n_rows", "block", "n_pad_rows")


def tensor(values, dtype=None):
    made = torch.from_numpy(np.ascontiguousarray(values))
    return made if dtype is None else made.to(getattr(torch, dtype))


def array(value) -> np.ndarray:
    if value.dtype == torch.float8_e4m3fn:
        value = value.contiguous().view(torch.uint8)
    elif value.dtype == torch.bfloat16:
        value = value.to(torch.float32)
    return np.array(value.detach().numpy())


def quantized(name, value) -> dict:
    return {f"{name}.data": array(value.data), f"{name}.scale": array(value.scale)}


def route(case, given):
    config = SonicMoEConfig(metadata_backend=case.get("backend", "auto"))
    indices = tensor(given["indices"], case.get("index_dtype", "int32"))
    probs, counts = tensor(given["probs"]), case["counts"]
    return metadata.build(indices, probs, case["n_experts"], case["block"], config, counts)


def run_routing(case, given):
    routing = route(case, given)
    found = {name: array(getattr(routing, name)) for name in ROUTING_ARRAYS}
    found["sizes"] = np.array([getattr(routing, name) for name in ROUTING_SIZES])
    # Movement of rows: to the experts, back with and without scores, and of the score gradients.
    rows = tensor(given["rows"])[: routing.n_rows]
    found["gathered"] = array(tensor(given["x"]).index_select(0, routing.x_gather_idx.to(torch.int64)))
    found["combined"] = array(routing_ops.sum_slots(rows, routing, torch.bfloat16, routing.scores))
    found["summed"] = array(routing_ops.sum_slots(rows, routing, torch.float32))
    found["slot grads"] = array(routing_ops.scatter_slot_grads(rows[: routing.n_slots, 0].contiguous(), routing))
    return found


def run_quantize(case, given):
    recipe = make_recipe(case["recipe"], iso32=case["iso32"], pow2=case["pow2"])
    found = {}
    rows = quant.quantize_rows(tensor(given["x"]), recipe)
    found |= quantized("rows", rows) | {"rows back": array(quant.dequantize(rows))}
    found |= quantized("rows from bf16", quant.quantize_rows(tensor(given["x"], "bfloat16"), recipe))
    weights = quant.quantize_weights(tensor(given["w1"], "bfloat16"), tensor(given["w2"], "bfloat16"), recipe)
    for name in ("w1", "w2", "w1_t", "w2_t"):
        found |= quantized(name, getattr(weights, name))
    return found


def run_activation(case, given):
    kind, clamp = ActivationType(case["activation"]), case["clamp"]
    z = tensor(given["z"])
    da = tensor(given["da"])[:, : z.shape[1] // 2 if is_glu(kind) else z.shape[1]]
    return {
        "forward": array(activation.forward(z, kind, clamp)),
        "backward": array(activation.backward(z, da, kind, clamp)),
    }


def run_engine(case, given):
    storage = case["storage"]
    plan = make_plan(SonicMoEConfig(**case["config"]), case["activation"], storage=storage, device="cpu")
    routing = route(case | {"block": plan.row_block}, given)
    w1, w2 = tensor(given["w1"], storage), tensor(given["w2"], storage)
    n_experts, width, hidden = (int(size) for size in w1.shape)
    intermediate = int(w2.shape[2])
    if plan.recipe is None:
        weights = expert_mlp.ExpertWeights(w1, w2, None, hidden, intermediate)
    else:
        copies = quant.quantize_weights(w1, w2, plan.recipe)
        weights = expert_mlp.ExpertWeights(None, None, copies, hidden, intermediate)
    x, dout = tensor(given["x"], storage), tensor(given["dout"], storage)
    if case["payload"]:
        x, dout = (quant.quantize_rows(rows, make_recipe(case["payload"])) for rows in (x, dout))
    out, saved = expert_mlp.forward(x, routing, weights, plan)
    grads = expert_mlp.backward(saved, dout)
    found = {"out": out, "dx": grads.dx, "ds": grads.ds}
    everyone = (True,) * n_experts
    dw1 = torch.zeros([n_experts, width, hidden], dtype=torch.float32)
    for grouped in (False, True):
        shape = [n_experts, intermediate, hidden] if grouped else [n_experts, hidden, intermediate]
        dw2 = torch.zeros(shape, dtype=torch.float32)
        grads.wgrad.accumulate_dw2(expert_mlp.GradBuffers(dw1, dw2, grouped, everyone, everyone))
        found["dw2 grouped" if grouped else "dw2"] = dw2
    grads.wgrad.accumulate_dw1(expert_mlp.GradBuffers(dw1, dw2, True, everyone, everyone))
    return {name: array(value) for name, value in (found | {"dw1": dw1}).items()}


RUN = {"routing": run_routing, "quantize": run_quantize, "activation": run_activation, "engine": run_engine}


def main():
    framework, source, target = sys.argv[1:]
    assert Path(torch.__file__).parent.name == framework, torch.__file__
    inputs, results = np.load(source), {}
    for case in json.loads(str(inputs["cases"])):
        prefix = f"{case['inputs']}/"
        given = {name.removeprefix(prefix): inputs[name] for name in inputs.files if name.startswith(prefix)}
        try:
            found = RUN[case["kind"]](case, given)
        except Exception:  # of this case alone: the others still tell what they found
            found = {"error": np.array(traceback.format_exc())}
        for name, value in found.items():
            results[f"{case['name']}/{name}"] = value
    np.savez(target, **results)
    print(json.dumps(sorted(module for module in sys.modules if module in ("torch", "paddle"))))


if __name__ == "__main__":
    main()
