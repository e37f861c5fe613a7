"""Prints the tables of docs/precision.md: errors of the layer against the float64 oracle, as markdown.

python tools/precision_table.py                 every table; the rows of the first one narrowed to H=256, I=128
python tools/precision_table.py --full rows     the rows at H=3072 and their own I: many minutes and 12 GB of memory
python tools/precision_table.py noise ds        only these tables
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore", category=UserWarning)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from sonicmoe import SonicMoEConfig  # noqa: E402
from tests.support import fp8_model  # noqa: E402
from tests.support.fp8_runs import (  # noqa: E402
    Errors,
    fp8_config,
    fp8_tensors,
    inherent,
    payload,
    row_problem,
    with_heavy_channel,
)
from tests.support.oracle import GLU_GATES, Result  # noqa: E402
from tests.support.paddle_runs import oracle, run_node  # noqa: E402
from tests.support.precision_rows import FULL_HIDDEN, ROWS  # noqa: E402
from tests.support.problems import make_problem, to_bf16  # noqa: E402

TENSORS = ("out", "dx", "ds", "dW1", "dW2")
NARROW = {"hidden": 256, "intermediate": 128}
SAMPLE_ROW = ROWS[3]
PATHS = (
    ("BF16", None),
    ("sm90, BF16 wgrad", ("sm90", False)),
    ("sm90, FP8 wgrad", ("sm90", True)),
    ("sm90-pow2, FP8 wgrad", ("sm90-pow2", True)),
    ("sm100, BF16 wgrad", ("sm100", False)),
    ("sm100, FP8 wgrad", ("sm100", True)),
    ("sm100-iso32, FP8 wgrad", ("sm100-iso32", True)),
)


def table(title, head, lines):
    print(f"\n**{title}**\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |", flush=True)


def percent(value) -> str:
    return f"{100 * value:.2f}"


def columns(errors) -> list[str]:
    """Five relative errors in percent and the lowest cosine."""
    cosine = min(errors.cosine(name) for name in Result.NAMES)
    return [*(percent(errors.relative(name)) for name in Result.NAMES), f"{cosine:.4f}"]


def measure(problem, config, **kwargs) -> Errors:
    return Errors().add(run_node(problem, config=config, **kwargs), oracle(problem))


HEAD = [*(f"{name} %" for name in TENSORS), "lowest cosine"]


def rows(full):
    def lines():
        for row in ROWS:
            sizes = {"hidden": FULL_HIDDEN} if full else NARROW
            problem = row_problem(row, seed=2, **sizes)
            expected = oracle(problem)
            for recipe in ("sm90", "sm100"):
                result = run_node(problem, config=fp8_config(recipe, True))
                yield (*row[:3], problem.intermediate, recipe, *columns(Errors().add(result, expected)))

    hidden = FULL_HIDDEN if full else NARROW["hidden"]
    table(f"Rows, H={hidden}, FP8 wgrad", ["N", "K", "E", "I", "recipe", *HEAD], lines())


def paths(_):
    problem = row_problem(SAMPLE_ROW, seed=2, **NARROW)
    expected = oracle(problem)

    def lines():
        for name, path in PATHS:
            config = fp8_config(*path) if path else SonicMoEConfig(use_fp8=False)
            yield name, *columns(Errors().add(run_node(problem, config=config), expected))

    table("Paths, N=512 K=8 E=8 H=256 I=128", ["path", *HEAD], lines())


def rounding_noise(block, pow2) -> float:
    """Relative error of one rounding of Gaussian values."""
    x = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    return float(np.linalg.norm(fp8_model.rounded(x, block, pow2) - x) / np.linalg.norm(x))


# How many roundings of rows and of weights reach each tensor at first order; docs/precision.md counts them.
ROUNDINGS = {"out": (3, 3), "dx": (4, 3), "ds": (5, 3), "dW1": (5, 2), "dW2": (6, 2)}


def noise(_):
    row, weight = rounding_noise((1, 128), False), rounding_noise((128, 128), False)
    pow2 = rounding_noise((1, 32), True)
    lines = [("float32, 1x128", percent(row)), ("float32, 128x128", percent(weight))]
    lines += [(f"power of two, {b[0]}x{b[1]}", percent(rounding_noise(b, True))) for b in ((1, 32), (32, 32), (1, 128))]
    table("One rounding of Gaussian values to e4m3", ["scale, block", "error %"], lines)

    def tiny(recipe):
        total = Errors()
        for seed in range(8):
            total.add(*runs(row_problem(SAMPLE_ROW, seed=seed, weight_std=0.0005, **NARROW), recipe))
        return total

    sm90, sm100 = tiny("sm90"), tiny("sm100")
    lines = []
    for tensor, name in zip(TENSORS, Result.NAMES, strict=True):
        n_rows, n_weights = ROUNDINGS[tensor]
        by_sm90 = np.sqrt(n_rows * row**2 + n_weights * weight**2)
        by_sm100 = np.sqrt(n_rows + n_weights) * pow2
        errors = (by_sm90, sm90.relative(name), by_sm100, sm100.relative(name))
        lines.append((tensor, n_rows, n_weights, *map(percent, errors)))
    head = ["tensor", "of rows", "of weights", "sm90: sum %", "measured %", "sm100: sum %", "measured %"]
    table("Roundings add in squares (FP8 wgrad, z so small that the gate is a straight line)", head, lines)


def runs(problem, recipe):
    return run_node(problem, config=fp8_config(recipe, True)), oracle(problem)


def ds(_):
    def lines():
        for std in (0.02, 0.0693):
            for recipe in ("sm90", "sm100"):
                total, single = Errors(), []
                for seed in range(48):
                    result, expected = runs(row_problem(ROWS[1], seed=100 + seed, weight_std=std, **NARROW), recipe)
                    total.add(result, expected)
                    single.append(Errors().add(result, expected).relative("ds"))
                spread = f"{percent(min(single))} to {percent(max(single))}"
                yield recipe, f"{std * 16:.1f}", total.count("ds"), percent(total.relative("ds")), spread

    head = ["recipe", "std of z", "values", "error of all %", "of 1024 values at a time %"]
    table("ds over 48 batches of N=128 K=8 E=8 H=256 I=128", head, lines())


def magnitudes(_):
    def lines():
        for magnitude in (1e-4, 1.0, 30.0, 300.0):
            problem = row_problem(SAMPLE_ROW, seed=2, magnitude=magnitude, **NARROW)
            for recipe in ("sm90", "sm100"):
                yield f"{magnitude:g}", recipe, *columns(measure(problem, fp8_config(recipe, True)))
            yield f"{magnitude:g}", "sm90, inherent", *columns(inherent(problem, "sm90"))

    table("Input magnitudes, FP8 wgrad", ["magnitude", "recipe", *HEAD], lines())


def heavy(_):
    problem = with_heavy_channel(row_problem(SAMPLE_ROW, seed=2, **NARROW))

    def lines():
        for recipe in ("sm90", "sm100"):
            yield recipe, *columns(measure(problem, fp8_config(recipe, True)))
            yield f"{recipe}, inherent", *columns(inherent(problem, recipe))

    table("One channel of x a hundred times the rest, FP8 wgrad", ["recipe", *HEAD], lines())


def dispatch(_):
    problem = row_problem(SAMPLE_ROW, seed=2, **NARROW)

    def lines():
        for recipe in ("sm90", "sm100"):
            for carrier, name in (("fp32", "float32 1x128"), ("ue8m0_words", "UE8M0 1x32")):
                data, scales = fp8_tensors(problem.x, carrier)
                result = run_node(
                    problem,
                    config=fp8_config(recipe, True),
                    dispatched_hidden_states_fp8=data,
                    dispatched_hidden_states_scales=scales,
                )
                received = replace(problem, x=payload(problem.x, carrier)[2])
                yield recipe, name, "the bf16 x", *columns(Errors().add(result, oracle(problem)))
                yield recipe, name, "the x that arrived", *columns(Errors().add(result, oracle(received)))

    table("FP8 dispatch, FP8 wgrad", ["recipe", "payload", "oracle fed", *HEAD], lines())


def activations(_):
    def lines():
        for kind in ("swiglu", "geglu", "reglu", "relu_sq", "relu"):
            glu = kind in GLU_GATES
            problem = make_problem(n_tokens=512, topk=8, n_experts=8, weight_std=0.05, glu=glu, seed=2, **NARROW)
            result = run_node(problem, config=fp8_config("sm90", True), activation_type=kind)
            yield kind, "sm90", *columns(Errors().add(result, oracle(problem, kind)))
            yield kind, "inherent", *columns(inherent(problem, "sm90", kind))

    table("Activations, std of z 0.8, FP8 wgrad", ["activation", "recipe", *HEAD], lines())


def clamp(_):
    problem = make_problem(n_tokens=512, topk=8, n_experts=8, weight_std=0.05, seed=2, **NARROW)

    def lines():
        for bound in (0.4, 1.6, 4.0):
            expected = oracle(problem, clamp=bound)
            result = run_node(problem, config=SonicMoEConfig(swiglu_clamp=bound, use_fp8=False))
            yield bound, "BF16", "as it is", *columns(Errors().add(result, expected))
            yield bound, "BF16", "in bf16", *columns(Errors().add(result, oracle(problem, clamp=bound, keep_z=to_bf16)))
            result = run_node(problem, config=fp8_config("sm90", True, swiglu_clamp=bound))
            yield bound, "sm90", "as it is", *columns(Errors().add(result, expected))

    table("swiglu clamp, std of z 0.8", ["clamp", "path", "oracle keeps z", *HEAD], lines())


TABLES = {f.__name__: f for f in (rows, paths, noise, ds, magnitudes, heavy, dispatch, activations, clamp)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"some of {', '.join(TABLES)}; none means all")
    parser.add_argument("--full", action="store_true", help="the rows at their real size")
    options = parser.parse_args()
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"no table {sorted(unknown)[0]!r}; there are {', '.join(TABLES)}")
    for name in options.tables or TABLES:
        TABLES[name](options.full)


if __name__ == "__main__":
    main()
