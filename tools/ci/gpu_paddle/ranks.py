"""One rank of ``gpu_paddle_ranks.py``: collectives, and the layer with its experts spread over the ranks beside one
that holds all of them.

    ranks.py [--backend naive] [--tiny] FOLDER NAME ...

A failure ends the process at once, and with it the job: the other ranks would wait for this one, and so would this one
for them where it leaves their communicator in order.
"""

import argparse
import faulthandler
import os
import time
import traceback
from pathlib import Path

import gpu_paddle.no_torch  # noqa: F401  before anything that could import it
import numpy as np
import paddle
import paddle.distributed as dist
from gpu_paddle import collectives, rig

# What a token's experts give is rounded to bf16 on each rank before it is added, and FP8 moves by a code where that
# changes what is quantized: 2e-3 in all of them on the CPU.
NEAR = {"bf16": 1e-2, "fp8_payload": 2e-2, "fp8": 3e-2}
WIRE = dict(fp8_dispatch=True, fp8_combine_grad=True)
LAYERS = {"bf16": ({}, {}), "fp8_payload": (WIRE, {}), "fp8": (WIRE, dict(use_fp8=True, fp8_wgrad=True))}
SIZES = dict(num_experts=8, num_experts_per_tok=2, hidden_size=256, intermediate_size=128, std=0.08)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def exact():
    return " ".join(collectives.check_all(RANK, SIZE))


@case
def movement():
    """Dispatch and combine of small integers: y = 2 x + each slot's score times its number from 1."""
    from sonicmoe.ep import paddle_communicator, paddle_tape
    from sonicmoe.ep.transport import AllToAll

    tokens, hidden, slots, experts = 100 + 37 * RANK, 128, 3, 4 * SIZE
    draw = np.random.default_rng([1, RANK])
    x, dout = (draw.integers(-8, 9, [tokens, hidden]).astype(np.float32) for _ in range(2))
    scores = draw.integers(1, 9, [tokens, slots]).astype(np.float32)
    ids = np.argsort(draw.random([tokens, experts]), axis=1)[:, :slots].astype(np.int32)
    ids[draw.random(ids.shape) < 0.3] = -1
    place = np.arange(1, slots + 1, dtype=np.float32)

    given, given_scores = paddle.to_tensor(x).astype("bfloat16"), paddle.to_tensor(scores)
    given.stop_gradient = given_scores.stop_gradient = False
    transport = AllToAll(paddle_communicator.of())
    (call,) = paddle_tape.open_calls([(given, given_scores, paddle.to_tensor(ids))], experts, transport)
    ticket = paddle_tape.begin_dispatch(given, given_scores, call)
    rows, row_scores = paddle_tape.finish_dispatch(ticket, given, call)
    y = rows.astype("float32") * 2 + (row_scores * paddle.to_tensor(place)).sum(-1).reshape([-1, 1])
    out = paddle_tape.finish_combine(paddle_tape.begin_combine(y.astype("bfloat16"), call), call)
    out.backward(paddle.to_tensor(dout).astype("bfloat16"))

    goes = np.stack([((ids >= 4 * rank) & (ids < 4 * rank + 4)).any(axis=1) for rank in range(SIZE)])
    copies = goes.sum(axis=0)[:, None]
    wanted = {
        "out": 2 * x * copies + (np.where(ids >= 0, scores, 0) * place).sum(axis=1, keepdims=True),
        "dx": 2 * copies * dout,
        "ds": np.where(ids >= 0, dout.sum(axis=1, keepdims=True) * place, 0),
    }
    for name, found in {"out": out, "dx": given.grad, "ds": given_scores.grad}.items():
        np.testing.assert_array_equal(rig.numbers(found), wanted[name], err_msg=name)
    assert sum(call.counts) == int((rig.numbers(call.local_indices) >= 0).sum())
    return f"{int(goes.sum())} rows left"


@case
def speed():
    """An equal share of the bytes to each rank, itself included."""
    width, rounds = 4096, 20
    rows = (16 if ASKED.tiny else 16384) // SIZE * SIZE
    given = paddle.zeros([rows, width], dtype="int32")
    found = paddle.empty_like(given)
    for number in range(2 * rounds):
        if number == rounds:
            paddle.device.synchronize(DEVICE)
            begin = time.perf_counter()
        dist.alltoall_single(found, given)
    paddle.device.synchronize(DEVICE)
    seconds = (time.perf_counter() - begin) / rounds
    sent = rows * width * 4
    away = sent * (SIZE - 1) / SIZE / seconds
    return f"all_to_all of {sent >> 20} MiB: {seconds * 1e3:.3f} ms, {away / 1e9:.0f} GB/s to others"


def layer_over(group, name: str):
    from sonicmoe import SonicMoEConfig
    from sonicmoe.ep.paddle_layer import ExpertParallelMoE

    options, config = LAYERS[name]
    return ExpertParallelMoE(**SIZES, **options, group=group, config=SonicMoEConfig(backend=ASKED.backend, **config))


def run(layer, x: np.ndarray, dout: np.ndarray) -> dict:
    given = paddle.to_tensor(x).astype("bfloat16")
    given.stop_gradient = False
    out, _ = layer(given)
    out.backward(paddle.to_tensor(dout).astype("bfloat16"))
    layer.sum_shared_gradients()
    layer.step()
    found = {"out": rig.numbers(out), "dx": rig.numbers(given.grad), "router": rig.numbers(layer.router.weight.grad)}
    layer.router.weight.clear_gradient(False)
    for expert, module in zip(layer.held, layer.experts.children(), strict=True):
        for weight_name in ("up_gate_proj", "down_proj"):
            weight = getattr(module, weight_name).weight
            grad = getattr(weight, "main_grad", None)
            found[f"{weight_name} {expert}"] = np.zeros(weight.shape) if grad is None else rig.numbers(grad)
            weight.main_grad = None
    return found


def beside_one_rank(name: str, rows: list[int]) -> str:
    """Every rank computes the whole as well; what is its own must be near, and the same bits each time."""
    bounds = np.concatenate([[0], np.cumsum(rows)])
    mine = slice(int(bounds[RANK]), int(bounds[RANK + 1]))
    draw = np.random.default_rng(2)
    x, dout = (draw.standard_normal([sum(rows), SIZES["hidden_size"]]).astype(np.float32) for _ in range(2))
    wanted = run(layer_over(ALONE, name), x, dout)
    wanted |= {"out": wanted["out"][mine], "dx": wanted["dx"][mine]}
    layer = layer_over(None, name)
    found, worst = run(layer, x[mine], dout[mine]), 0.0
    for key, value in found.items():
        apart = rig.distance(value, wanted[key]) if value.size else 0.0
        worst = max(worst, apart)
        assert apart <= NEAR[name], f"{name}: {key} is {apart:.2e} away, more than {NEAR[name]:.0e}"
    for _ in range(1 if ASKED.tiny else 3):
        for key, value in run(layer, x[mine], dout[mine]).items():
            assert value.tobytes() == found[key].tobytes(), f"{name}: {key} has other bits than before"
    if name == "bf16":
        return f"{worst:.1e}"
    # Both sides quantize alike, and are near each other for that. How far bf16 is away tells that they do, and that a
    # side which does not would not be near.
    plain, least = run(layer_over(ALONE, "bf16"), x, dout), np.inf
    plain |= {"out": plain["out"][mine], "dx": plain["dx"][mine]}
    for key in ("out", "dx", "router"):
        if wanted[key].size:
            least = min(least, rig.distance(plain[key], wanted[key]))
    assert least > 1.5 * NEAR[name], f"{name}: bf16 is only {least:.2e} away: nothing was quantized"
    return f"{worst:.1e} and bf16 {least:.1e}"


def _layer_case(name: str):
    def compare():
        tokens = 48 if ASKED.tiny else 256
        kinds = {"uneven": [tokens + 16 * rank for rank in range(SIZE)], "one without": [tokens] * (SIZE - 1) + [0]}
        said = [f"{kind} {beside_one_rank(name, rows)}" for kind, rows in kinds.items()]
        return "at most " + ", ".join(said)

    CASES[name] = compare


for _name in LAYERS:
    _layer_case(_name)


def main() -> None:
    for name in ASKED.names:
        begin = time.perf_counter()
        said = CASES[name]()
        dist.barrier()
        if RANK == 0:
            print(f"ok {name} ({time.perf_counter() - begin:.1f} s) {said or ''}", flush=True)
    (ASKED.folder / f"done.{RANK}").touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    ASKED = parser.parse_args()
    # A rank that waits for ever for another one says where.
    faulthandler.dump_traceback_later(ASKED.limit, exit=True)
    (ASKED.folder / f"pid.{os.environ['PADDLE_TRAINER_ID']}").write_text(str(os.getpid()))
    dist.init_parallel_env()
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    DEVICE = paddle.device.get_device()
    ALONE = [dist.new_group([rank]) for rank in range(SIZE)][RANK]
    try:
        main()
    except Exception:
        traceback.print_exc()
        os._exit(1)
