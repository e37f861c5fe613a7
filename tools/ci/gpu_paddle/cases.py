"""The Paddle process: runs the named cases on one device and prints a line for each.

    cases.py [--backend naive] [--tiny] [--recipes NAME ... --] DEVICE WORK [NAME ...]

WORK holds what the torch process left: parity.npz, time.json.
"""

import argparse
import copy
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import gpu_paddle.no_torch  # noqa: F401  before anything that could import it
import numpy as np
import paddle
from gpu_paddle import rig
from gpu_paddle.problem import RECIPES, REFERENCE, SMALL, TINY, inputs

# Against the reference engine on the CPU, which has the same roundings: what is left is the order of sums, and under
# FP8 the codes that it moves by one. x and the weights have the same codes in both; no result has more than five
# roundings after those (tests/support/floors.py), which cost 5.9% together. 3% allows a quarter of that, in squares, to
# differ; another weight, order or scale is ten times as far.
NEAR = {"bf16": 6e-3, "fp8": 3e-2, "fp8_wgrad": 3e-2}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def same_bits(found: dict, wanted: dict, what: str) -> None:
    for name, value in wanted.items():
        if found[name].tobytes() != value.tobytes():
            differ = int((found[name].view(np.uint8) != value.view(np.uint8)).sum())
            raise AssertionError(f"{what}: {name} differs in {differ} of {value.nbytes} bytes")


def near(found: dict, wanted: dict, limit: float, what: str) -> float:
    worst = 0.0
    for name, value in wanted.items():
        apart = rig.distance(found[name], value)
        worst = max(worst, apart)
        if not apart <= limit:
            raise AssertionError(f"{what}: {name} is {apart:.2e} away, more than {limit:.0e}")
    return worst


def on_cpu(given, recipe: str, **settings) -> dict:
    before = paddle.device.get_device()
    paddle.set_device("cpu")
    try:
        return rig.Layer(given, recipe, paddle.CPUPlace(), backend="naive", **settings).results(rig.numbers)
    finally:
        paddle.set_device(before)


@case
def numerics(work):
    """Forward and backward against the CPU's engine, for lists of experts and fused weights."""
    said = []
    for recipe, limit in NEAR.items():
        given = inputs(SMALL)
        wanted = on_cpu(given, recipe)
        layer = rig.Layer(given, recipe)
        worst = near(layer.results(rig.numbers), wanted, limit, recipe)
        near(rig.Layer(given, recipe, fused=True).results(rig.numbers), wanted, limit, f"{recipe}, fused")
        said.append(f"{layer.node.last_path} {worst:.1e}")
    return ", ".join(said)


@case
def edges(work):
    """No token, no slot, experts without tokens, one expert with all of them, ids at and above E."""
    changes = {
        "no token": lambda g: g | {name: g[name][:0] for name in ("x", "dout", "ids", "probs")},
        "no slot": lambda g: g | {"ids": np.full_like(g["ids"], -1)},
        "two experts": lambda g: g | {"ids": np.where(g["ids"] < 2, g["ids"], -1)},
        "one expert": lambda g: g | {"ids": np.where(np.arange(g["ids"].shape[1]) == 1, 5, -1 + 0 * g["ids"])},
        "ids above E": lambda g: g | {"ids": np.where(g["ids"] == -1, 1000, g["ids"])},
    }
    for recipe in RECIPES:
        for name, change in changes.items():
            given = change(inputs(SMALL))
            given["ids"] = given["ids"].astype(np.int32)
            here = given["ids"][(given["ids"] >= 0) & (given["ids"] < SMALL.experts)]
            given["counts"] = np.bincount(here, minlength=SMALL.experts)
            found = rig.Layer(given, recipe)
            out = found.step()
            found.node.step()
            wanted = on_cpu(given, recipe) if len(here) else None
            if wanted is None:
                assert not rig.numbers(out).any(), f"{recipe}, {name}: out is not 0"
                continue
            answer = {"out": rig.numbers(out), "dx": rig.numbers(found.x.grad), "ds": rig.numbers(found.probs.grad)}
            near(answer | found.weight_gradients(rig.numbers), wanted, NEAR[recipe], f"{recipe}, {name}")


@case
def parity(work):
    """The bits of the torch process, from the same inputs."""
    wanted, said = np.load(work / "parity.npz"), []
    for problem_name, problem in (("small", SMALL), ("reference", REFERENCE)):
        given = inputs(problem)
        for recipe in RECIPES:
            prefix = f"{problem_name}/{recipe}/"
            of_torch = {name.removeprefix(prefix): wanted[name] for name in wanted.files if name.startswith(prefix)}
            same_bits(rig.Layer(given, recipe).results(), of_torch, f"{problem_name}, {recipe}")
            said.append(prefix.rstrip("/"))
    return ", ".join(said)


@case
def again(work):
    """The same inputs give the same bits, from one call to the next and from another node."""
    for recipe in RECIPES:
        given = inputs(SMALL)
        wanted = rig.Layer(given, recipe).results()
        layer = rig.Layer(given, recipe)
        for _ in range(3):
            same_bits(layer.results() | {}, {k: v for k, v in wanted.items() if k not in ("dw1", "dw2")}, recipe)


@case
def layers(work):
    """Three layers, one after the other on the tape. Each is held to the CPU's engine from what it was really given, x
    and the gradient of its output, so that the bounds are those of one layer: from layer to layer FP8 would make two
    runs as different as if each had been rounded by itself."""
    for recipe, limit in NEAR.items():
        given = [inputs(replace(SMALL, seed=seed)) for seed in range(3)]
        chain = [rig.Layer(one, recipe) for one in given]
        values = [chain[0].x]
        for layer in chain:
            values.append(layer.forward(values[-1], layer.probs))
            values[-1].retain_grads()
        values[-1].backward(chain[-1].dout)
        for number, (layer, x, out) in enumerate(zip(chain, values, values[1:], strict=False)):
            layer.node.step()
            seen = {"x": rig.bits(x).view(np.uint16), "dout": rig.bits(out.grad).view(np.uint16)}
            wanted = on_cpu(given[number] | seen, recipe)
            found = {"out": rig.numbers(out), "dx": rig.numbers(x.grad), "ds": rig.numbers(layer.probs.grad)}
            near(found | layer.weight_gradients(rig.numbers), wanted, limit, f"{recipe}, layer {number}")


@case
def one_forward_one_backward(work):
    """Micro-batches in flight: the sums of the weights' gradients are those of one after the other, and each dx its
    own."""
    for recipe in RECIPES:
        given = inputs(SMALL)
        steady, mixed = rig.Layer(given, recipe), rig.Layer(given, recipe)
        batches = [steady.fresh() for _ in range(4)]
        for number, (x, _) in enumerate(batches):
            with paddle.no_grad():
                x.set_value(paddle.roll(x.cpu().astype("float32"), number, 0).astype("bfloat16"))
        wanted = []
        for x, probs in batches:
            steady.forward(x, probs).backward(steady.dout)
            wanted.append(rig.bits(x.grad))
            x.clear_gradient(False)
        steady.node.step()
        x, probs = zip(*batches, strict=True)
        for leaf in (*x, *probs):
            leaf.grad = None
        first, second = (mixed.forward(x[i], probs[i]) for i in range(2))
        first.backward(mixed.dout)
        third = mixed.forward(x[2], probs[2])
        second.backward(mixed.dout)
        fourth = mixed.forward(x[3], probs[3])
        third.backward(mixed.dout)
        fourth.backward(mixed.dout)
        mixed.node.step()
        for number, value in enumerate(wanted):
            assert rig.bits(x[number].grad).tobytes() == value.tobytes(), f"{recipe}: dx of micro-batch {number}"
        same_bits(mixed.weight_gradients(), steady.weight_gradients(), recipe)


@case
def recompute(work):
    """A forward that is run again before its backward."""
    from paddle.distributed.fleet.utils import recompute as again_later

    for recipe in RECIPES:
        given = inputs(SMALL)
        wanted = rig.Layer(given, recipe).results()
        layer = rig.Layer(given, recipe)
        out = again_later(lambda x, probs, layer=layer: layer.forward(x, probs), layer.x, layer.probs)
        out.backward(layer.dout)
        layer.node.step()
        found = {"out": rig.bits(out), "dx": rig.bits(layer.x.grad), "ds": rig.bits(layer.probs.grad)}
        same_bits(found | layer.weight_gradients(), wanted, recipe)


@case
def weights_that_change(work):
    """The next forward sees what an optimizer, ``set_value`` or a state dict wrote, told or not."""
    for recipe in RECIPES:
        given, other = inputs(SMALL), inputs(replace(SMALL, seed=9))
        given2 = given | {"w1": other["w1"], "w2": other["w2"]}
        wanted = rig.Layer(given2, recipe).results()
        layer = rig.Layer(given, recipe)
        first = layer.results()
        assert first["out"].tobytes() != wanted["out"].tobytes()
        source = rig.Layer(given2, recipe)
        for step_first in (False, True):
            layer.forward()
            if step_first:
                layer.node.step()
            before = layer.node.weight_epoch
            for mine, new in zip(layer.parameters(), source.parameters(), strict=True):
                mine.set_value(new)
            assert rig.bits(layer.forward()).tobytes() == wanted["out"].tobytes(), f"{recipe}: stale weights"
            assert layer.node.weight_epoch == before + 1, f"{recipe}: epoch {layer.node.weight_epoch} after {before}"
            layer.forward()
            assert layer.node.weight_epoch == before + 1, f"{recipe}: an epoch without a change"
            last = layer.parameters()[-1]  # one of them alone
            changed = last.cpu().astype("float32").numpy()
            changed[-1, -1] += 1.0
            last.set_value(paddle.to_tensor(changed, place=paddle.CPUPlace()).astype("bfloat16"))
            assert layer.node.weight_epoch == before + 1
            assert rig.bits(layer.forward()).tobytes() != wanted["out"].tobytes(), f"{recipe}: a stale expert"
            for mine, old in zip(layer.parameters(), rig.Layer(given, recipe).parameters(), strict=True):
                mine.set_value(old)


@case
def weights_that_move(work):
    """Other tensors in the parameters' places, some of them changed about, and back, for two recipes of one node by
    turns; and those of a copied model."""
    given, other = inputs(SMALL), inputs(replace(SMALL, seed=9))
    turned = given | {name: np.concatenate([given[name][:2][::-1], given[name][2:]]) for name in ("w1", "w2")}
    problems = {"first": given, "other": given | {"w1": other["w1"], "w2": other["w2"]}, "turned": turned}
    recipes = list(RECIPES)[:2]
    wanted = {(name, r): rig.bits(rig.Layer(of, r).forward()) for name, of in problems.items() for r in recipes}
    layer = rig.Layer(given, recipes[0])
    configs = {recipe: rig.Layer(given, recipe).node.config for recipe in recipes}
    first = layer.parameters()
    half = len(first) // 2
    tensors = {"first": first, "other": rig.Layer(problems["other"], recipes[0]).parameters()}
    tensors["turned"] = [first[1], first[0], *first[2:half], first[half + 1], first[half], *first[half + 2 :]]
    for name in ("first", "other", "first", "turned", "first"):
        for expert, w1, w2 in zip(layer.experts, tensors[name][:half], tensors[name][half:], strict=True):
            expert.up_gate_proj.weight, expert.down_proj.weight = w1, w2
        for recipe in (*recipes, recipes[0]):
            layer.node.config = configs[recipe]
            found = rig.bits(layer.forward())
            assert found.tobytes() == wanted[name, recipe].tobytes(), f"{recipe}: not the weights of {name}"
    twin = copy.deepcopy(layer)
    for mine, new in zip(twin.parameters(), tensors["other"], strict=True):
        mine.set_value(new)
    for model, name in ((twin, "other"), (layer, "first")):
        assert rig.bits(model.forward()).tobytes() == wanted[name, recipe].tobytes(), f"{recipe}: not its weights"


@case
def weights_that_change_in_flight(work):
    """Weights that change between a forward and its backward. Behind ``step()`` the backward is that of its forward's
    weights; else, once another forward has been, it is that or NaN throughout, and the node says why."""
    said = []
    for recipe in RECIPES:
        given, other = inputs(SMALL), inputs(replace(SMALL, seed=9))
        wanted = rig.Layer(given, recipe).results()
        source = rig.Layer(given | {"w1": other["w1"], "w2": other["w2"]}, recipe)
        for step_first in (True, False):
            layer = rig.Layer(given, recipe)
            out = layer.forward()
            if step_first:
                layer.node.step()
            for mine, new in zip(layer.parameters(), source.parameters(), strict=True):
                mine.set_value(new)
            layer.forward(*layer.fresh())
            out.backward(layer.dout)
            layer.node.step()
            answer = {"dx": layer.x.grad, "ds": layer.probs.grad}
            found = {name: rig.bits(value) for name, value in answer.items()} | layer.weight_gradients()
            none = all(np.isnan(rig.numbers(value)).all() for value in answer.values())
            none = none and all(np.isnan(value).all() for value in layer.weight_gradients(rig.numbers).values())
            if step_first or not none:
                same_bits(found, {name: wanted[name] for name in found}, f"{recipe}, step() first: {step_first}")
                layer.node.weight_epoch  # noqa: B018  must not raise
                said.append(f"{recipe} {'behind step() ' if step_first else ''}exact")
                continue
            try:
                layer.node.weight_epoch  # noqa: B018
            except RuntimeError as error:
                assert "changed between a forward and its backward" in str(error), error
            else:
                raise AssertionError(f"{recipe}: NaN and no reason")
            for p in layer.parameters():
                p.main_grad = None
            again_ = layer.results()  # and it goes on
            same_bits(again_, source.results(), f"{recipe}, afterwards")
            said.append(f"{recipe} NaN")
    return ", ".join(said)


@case
def weights_in_another_type(work):
    """Parameters that are replaced by wider ones, and by others that mean something else by the very same bytes."""

    def replace_all(layer, change):
        for expert in layer.experts:
            for projection in (expert.up_gate_proj, expert.down_proj):
                new = change(projection.weight.detach().cpu()).to(DEVICE)
                new.stop_gradient = False
                projection.weight = new

    changes = {
        "float32": lambda weight: weight.astype("float32"),
        "float16 of the same bytes": lambda weight: weight.view("int16").view("float16"),
    }
    for recipe in RECIPES:
        for name, change in changes.items():
            layer, fresh = rig.Layer(inputs(SMALL), recipe), rig.Layer(inputs(SMALL), recipe)
            layer.forward()
            replace_all(layer, change)
            replace_all(fresh, change)
            wanted = rig.bits(fresh.forward())
            same_bits({"out": rig.bits(layer.forward())}, {"out": wanted}, f"{recipe}, {name}")
            assert layer.node.weight_epoch == 2, f"{recipe}, {name}: epoch {layer.node.weight_epoch}"


@case
def adamw(work):
    """Five AdamW steps on main_grad, fp32 masters on the host: each forward reads the weights of its step."""
    for recipe in RECIPES:
        given = inputs(SMALL)
        layer = rig.Layer(given, recipe)
        masters = [paddle.create_parameter(p.shape, "float32") for p in layer.parameters()]
        for master, p in zip(masters, layer.parameters(), strict=True):
            master.set_value(p.astype("float32"))
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=masters)
        for number in range(5):
            out = layer.step()
            layer.node.step()
            for master, p in zip(masters, layer.parameters(), strict=True):
                master.grad, p.main_grad = p.main_grad, None
            optimizer.step()
            optimizer.clear_grad()
            for master, p in zip(masters, layer.parameters(), strict=True):
                p.set_value(master.astype("bfloat16"))
            half = len(masters) // 2
            now = [rig.bits(p).view(np.uint16) for p in layer.parameters()]
            fresh = given | {"w1": np.stack(now[:half]), "w2": np.stack(now[half:])}
            out = rig.bits(layer.forward())
            assert out.tobytes() == rig.bits(rig.Layer(fresh, recipe).forward()).tobytes(), f"{recipe}, step {number}"


@case
def checkpoint(work):
    """Weights saved and loaded into another node give the same bits."""
    for recipe in RECIPES:
        layer = rig.Layer(inputs(SMALL), recipe)
        wanted = layer.results()
        path = str(work / f"{recipe}.pdparams")
        paddle.save({str(i): p for i, p in enumerate(layer.parameters())}, path)
        other = rig.Layer(inputs(SMALL) | {k: inputs(replace(SMALL, seed=5))[k] for k in ("w1", "w2")}, recipe)
        other.forward()
        for name, value in paddle.load(path).items():
            other.parameters()[int(name)].set_value(value)
        same_bits(other.results(), wanted, recipe)


@case
def two_streams(work):
    """Turn by turn on two streams, with nothing but Paddle's own waits between them."""
    for recipe in RECIPES:
        given = inputs(SMALL)
        wanted = rig.Layer(given, recipe).results()
        layer = rig.Layer(given, recipe)
        main = paddle.device.current_stream(DEVICE)
        side = paddle.device.Stream(DEVICE)
        for number in range(6):
            side.wait_stream(main)
            with paddle.device.stream_guard(side if number % 2 else main):
                found = layer.step()
            main.wait_stream(side)
            assert rig.bits(found).tobytes() == wanted["out"].tobytes(), f"{recipe}, call {number}"
            assert rig.bits(layer.x.grad).tobytes() == wanted["dx"].tobytes(), f"{recipe}, backward {number}"


@case
def no_wait(work):
    """Steady steps: what the plugin was asked to wait for or to copy to the host."""
    plugin = rig.Plugin()
    if plugin.library is None:
        return "skipped: Paddle's own GPU backend has no such counters"
    said = []
    for recipe in RECIPES:
        layer = rig.Layer(inputs(SMALL), recipe)
        for _ in range(3):
            layer.step()
        before = plugin.counts()
        for _ in range(20):
            layer.step()
        found = {name: value - before[name] for name, value in plugin.counts().items()}
        waits = {name: found[name] for name in rig.WAITS if found[name]}
        assert not waits, f"{recipe}: 20 steps made {waits}"
        before = plugin.counts()
        layer.node.step()
        found = {name: value - before[name] for name, value in plugin.counts().items()}
        said.append(f"{recipe}: none; node.step() {sum(found[name] for name in rig.WAITS)}")
    return ", ".join(said)


@case
def memory(work):
    """After 1000 steps as much is in use as after 10."""
    plugin = rig.Plugin()
    if plugin.library is None:
        return "skipped: counted by the plugin"
    said = []
    for recipe in RECIPES:
        layer, at = rig.Layer(inputs(SMALL), recipe), {}
        for number in range(1, 1001):
            layer.step()
            layer.node.step()
            for p in layer.parameters():
                p.main_grad = None
            if number in (10, 1000):
                paddle.device.synchronize(DEVICE)
                at[number] = plugin.bytes_held(), plugin.bytes_in_use()
        assert at[10] == at[1000], f"{recipe}: {at}"
        said.append(f"{recipe} {at[1000][0] / 2**20:.0f} MiB")
    return ", ".join(said)


@case
def training(work):
    """200 steps of the demo's model: the curve beside those of torch and of the CPU."""
    from gpu_paddle import training as curves

    curves.run(work, "paddle_gpu", **rig.SETTINGS)
    found = curves.curves(work)
    curves.write(found, work / "training.csv")
    missing = [name for name in curves.CURVES if name not in found]
    assert not missing, f"no curve of {', '.join(missing)} to compare with"
    return curves.compare(found)


@case
def times(work):
    """At the reference shape, beside the torch process."""
    from gpu_paddle import timing

    from sonicmoe.launch import current_stream

    file = work / "time.json"
    of_torch, said = json.loads(file.read_text()) if file.exists() else {}, []
    for recipe in RECIPES:
        layer = rig.Layer(inputs(REFERENCE), recipe)
        mine = timing.measure(layer.step, current_stream(layer.x))
        for name, found in (("paddle", mine), ("torch", of_torch.get(recipe))):
            if found:
                ratio = found["wall"] / found["gpu"]
                said.append(
                    f"{recipe} {name}: wall {found['wall']:.3f} gpu {found['gpu']:.3f} host {found['host']:.3f} ms, "
                    f"wall/gpu {ratio:.3f}{'' if found['queue_was_full'] else ' (queue ran empty: gpu is too long)'}"
                )
        if of_torch.get(recipe):
            said.append(f"{recipe} paddle/torch wall {mine['wall'] / of_torch[recipe]['wall']:.3f}")
    return "\n    " + "\n    ".join(said)


def main():
    names, failed = ASKED.names or list(CASES), 0
    paddle.set_device(DEVICE)
    rig.SETTINGS.update(backend=ASKED.backend)
    for name in names:
        begin = time.perf_counter()
        try:
            said, verdict = CASES[name](WORK), "ok"
        except Exception:
            said, verdict, failed = traceback.format_exc(), "FAILED", failed + 1
        finally:
            paddle.set_device(DEVICE)
        print(f"{verdict} {name} ({time.perf_counter() - begin:.1f} s) {said or ''}", flush=True)
    loaded = sys.modules.get("torch")
    assert loaded is None or "paddle" in loaded.__file__, f"real torch is in the Paddle process: {loaded.__file__}"
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="auto", help="naive: without kernels, as on a device that is none")
    parser.add_argument("--tiny", action="store_true", help="a smaller problem, for a CPU that stands in for a GPU")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="these alone")
    parser.add_argument("device")
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    ASKED = parser.parse_args()
    DEVICE, WORK, SMALL = ASKED.device, ASKED.work, TINY if ASKED.tiny else SMALL
    for unwanted in set(RECIPES) - set(ASKED.recipes or RECIPES):
        del RECIPES[unwanted], NEAR[unwanted]
    main()
