"""One engine, two frameworks: what it does on torch and on Paddle, from identical inputs, in a child process each.

Without a torch at hand, its sources at least are held to what both frameworks have.
"""

import ast
import itertools
import json

import numpy as np
import pytest

from tests.support import children, floors
from tests.support.problems import ROUTINGS, make_problem, to_bf16
from tests.workers.torch_names import resolve
from tools.ci.check_house import aliases, engine_modules

WORKER = children.WORKERS / "engine_parity.py"
NAMES_WORKER = children.WORKERS / "torch_names.py"

RECIPES = {
    "sm90": dict(recipe="sm90", iso32=False, pow2=False),
    "sm90 pow2": dict(recipe="sm90", iso32=False, pow2=True),
    "sm100": dict(recipe="sm100", iso32=False, pow2=False),
    "sm100 iso32": dict(recipe="sm100", iso32=True, pow2=False),
}
KINDS = ("swiglu", "geglu", "reglu", "relu_sq", "relu", "gelu", "silu")
GLU = ("swiglu", "geglu", "reglu")

# Bounds on |torch - paddle| / |torch|. Both sum the same float32 products, in another order, which moves a sum by some
# 1e-7 of its size. With float32 storage that is all there is.
FLOAT32 = 1e-5
# A sum next to a rounding boundary of bf16 goes to either side of it: one in 2^16 does, by one part in 2^8, and where
# it is a z or dz all of its token's outputs move along. That makes 1e-5 to 2e-4 here; a truncation instead of a
# rounding makes 4e-3.
BF16 = 1e-3
# An e4m3 code that goes to the other side changes by one part in 2^3 or 2^4, and its token's outputs by that over the
# root of 128 summands, or 1e-2 in one of 100 tokens. A scale of the wrong kind makes 2e-2 and more.
FP8 = 2e-3
# Elementwise functions: each framework has its own exp and tanh, some units in the last place apart.
ELEMENTWISE = 5e-6


def e4m3_values() -> np.ndarray:
    """All finite non-negative e4m3 numbers, in order."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)).astype(np.float32)


def quantizer_input(rng) -> np.ndarray:
    """[R,256] float32: rows of many magnitudes, and rows with whatever a quantizer may get wrong."""
    values = e4m3_values()
    middles = (values[1:] + values[:-1]) / 2  # ties, exactly representable
    below, above = np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))
    rows = [rng.standard_normal(256) * scale for scale in 10.0 ** np.arange(-44, 39, 3)]
    for special in (values, middles, below, above):
        row = np.zeros(256)
        # Each block of 32 holds 448 or its quarter, so that the scale is a power of two and the ties stay ties.
        row[: 2 * 126 : 2] = special[:126]
        row[31::32] = 448.0
        rows += [row, -row / 4]
    holes = rng.standard_normal((6, 256)) * 3
    holes[0, 7], holes[1, 40], holes[2, 200] = np.nan, np.inf, -np.inf
    holes[3] = 0.0
    holes[4, :128] = -0.0
    holes[5] = np.nan
    with np.errstate(over="ignore"):
        return np.concatenate([np.stack(rows), holes]).astype(np.float32)


def native(problem, glu=True):
    """NumPy's way from grouped to native layout, apart from the package's."""
    w1 = problem.w1.transpose(0, 2, 1)
    if glu:
        half = w1.shape[1] // 2
        w1 = np.stack([w1[:, :half], w1[:, half:]], axis=2).reshape(w1.shape)
    return {"w1": w1, "w2": problem.w2.transpose(0, 2, 1)}


def inputs_of(problem, glu=True):
    given = {name: getattr(problem, name) for name in ("x", "dout", "indices", "probs")}
    return given | native(problem, glu)


def exact_problem():
    """Small integers times powers of two: every sum of every stage is exact, in whatever order it is taken."""
    problem = make_problem(n_tokens=24, n_experts=4, topk=2, routing="holes", seed=5)
    rng = np.random.default_rng(6)

    def ternary(shape, scale):
        return (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.2) * scale).astype(np.float32)

    problem.x, problem.dout = ternary(problem.x.shape, 1.0), ternary(problem.dout.shape, 0.5)
    problem.w1, problem.w2 = ternary(problem.w1.shape, 0.5), ternary(problem.w2.shape, 0.25)
    problem.probs = (2.0 ** -rng.integers(0, 3, problem.probs.shape)).astype(np.float32)
    return problem


class Cases:
    """All cases and their arrays: one child a framework runs them, because starting one takes longer than they do."""

    def __init__(self):
        self.arrays, self.cases = {}, []
        self._routings(), self._quantizers(), self._activations(), self._engines()

    def add_inputs(self, name, arrays):
        self.arrays |= {f"{name}/{key}": value for key, value in arrays.items()}

    def add(self, name, kind, inputs, **more):
        self.cases.append(dict(name=name, kind=kind, inputs=inputs, **more))

    def _routings(self):
        rng = np.random.default_rng(1)
        shapes = [(kind, 37, 3, 8) for kind in ROUTINGS]
        shapes += [("uniform", 0, 2, 4), ("uniform", 1, 1, 1), ("holes", 9, 6, 4)]
        for kind, n_tokens, topk, n_experts in shapes:
            problem = make_problem(n_tokens, 8, 8, n_experts, topk, kind, seed=2)
            given = f"routing {kind} T{n_tokens} K{topk} E{n_experts}"
            arrays = {name: getattr(problem, name) for name in ("x", "indices", "probs")}
            arrays["rows"] = rng.standard_normal((n_experts * 128 + 128, 8)).astype(np.float32)
            self.add_inputs(given, arrays)
            for block, dtype, backend in itertools.product((1, 128), ("int32", "int64"), ("auto", "naive")):
                name = f"{given} block {block} {dtype} {backend}"
                more = dict(n_experts=n_experts, block=block, counts=problem.counts, index_dtype=dtype, backend=backend)
                self.add(name, "routing", given, **more)

    def _quantizers(self):
        rng = np.random.default_rng(3)
        weights = {"w1": rng.standard_normal((2, 256, 128)), "w2": rng.standard_normal((2, 128, 256)) * 0.02}
        weights["w1"][0, :32, :32] = 0.0
        weights = {name: to_bf16(value) for name, value in weights.items()}
        self.add_inputs("quantizer", weights | {"x": quantizer_input(rng)})
        for name, recipe in RECIPES.items():
            self.add(f"quantize {name}", "quantize", "quantizer", **recipe)

    def _activations(self):
        rng = np.random.default_rng(4)
        z = rng.standard_normal((64, 128)).astype(np.float32) * 4
        z[:2] = [np.linspace(-100, 100, 128), np.linspace(-1e-4, 1e-4, 128)]
        self.add_inputs("activation", {"z": z, "da": rng.standard_normal((64, 128)).astype(np.float32)})
        for kind in KINDS:
            for clamp in (None, 1.5) if kind == "swiglu" else (None,):
                self.add(f"activation {kind} {clamp}", "activation", "activation", activation=kind, clamp=clamp)

    def _engines(self):
        sizes = dict(n_tokens=96, hidden=256, intermediate=128, n_experts=4, topk=2)
        problems = {
            "plain": make_problem(**sizes, routing="holes", seed=7),
            "narrow": make_problem(**sizes, glu=False, seed=8),
            "idle": make_problem(n_tokens=96, n_experts=8, topk=2, routing="idle_experts", seed=9),
            "exact": exact_problem(),
        }
        for name, problem in problems.items():
            self.add_inputs(name, inputs_of(problem, glu=name != "narrow"))

        def add(label, inputs, activation="swiglu", storage="bfloat16", payload=None, **config):
            problem = problems[inputs]
            more = dict(n_experts=problem.n_experts, counts=problem.counts, payload=payload)
            self.add(label, "engine", inputs, activation=activation, storage=storage, config=config, **more)

        for kind in KINDS:
            inputs = "plain" if kind in GLU else "narrow"
            add(f"bf16 {kind}", inputs, kind)
            add(f"fp32 {kind}", inputs, kind, storage="float32")
        add("bf16 clamped", "plain", swiglu_clamp=0.2)
        add("bf16 from an FP8 dispatch", "plain", payload="sm90")
        add("fp16", "plain", storage="float16")
        add("bf16 idle experts", "idle")
        for label, recipe in RECIPES.items():
            fp8 = dict(
                fp8_mode="perf",
                fp8_recipe=recipe["recipe"],
                fp8_iso32_weight=recipe["iso32"],
                fp8_pow2_scale=recipe["pow2"],
            )
            for wgrad in (False, True):
                add(f"fp8 {label} {'fp8' if wgrad else 'bf16'} wgrad", "plain", **fp8, fp8_wgrad=wgrad)
            add(f"fp8 {label} idle experts", "idle", **fp8, fp8_recompute_z=True)
            for payload in ("sm90", "sm100"):  # used as they are, or quantized anew
                add(f"fp8 {label} from an FP8 dispatch as {payload}", "plain", payload=payload, **fp8)
            if recipe["pow2"] or recipe["recipe"] == "sm100":
                add(f"exact fp8 {label}", "exact", "reglu", **fp8, fp8_wgrad=True)
        add("exact bf16", "exact", "reglu")


CASES = Cases()


def names(*prefixes):
    found = [case["name"] for case in CASES.cases if case["name"].startswith(prefixes)]
    assert found, prefixes
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{framework: {case: {result: array}}}"""
    site, folder = children.torch_site(), tmp_path_factory.mktemp("parity")
    np.savez(folder / "inputs.npz", cases=json.dumps(CASES.cases), **CASES.arrays)
    found = {}
    for framework, path in (("torch", [children.ROOT, site]), ("paddle", [children.ROOT])):
        target = folder / f"{framework}.npz"
        env = children.clean_env(path)
        loaded = children.answer(WORKER, framework, folder / "inputs.npz", target, env=env, timeout=300)
        assert loaded == [framework]  # each alone in its process
        arrays, found[framework] = np.load(target), {}
        for name in arrays.files:
            case, _, result = name.rpartition("/")
            found[framework].setdefault(case, {})[result] = arrays[name]
    return found


def both(results, case):
    for framework in sorted(results):
        if "error" in results[framework][case]:
            pytest.fail(f"{case} on {framework}:\n{results[framework][case]['error']}", pytrace=False)
    ours, theirs = results["paddle"][case], results["torch"][case]
    assert sorted(ours) == sorted(theirs) and ours
    return [(name, ours[name], theirs[name]) for name in sorted(ours)]


def assert_same_bits(results, case):
    for name, ours, theirs in both(results, case):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        different = np.flatnonzero(ours.view(f"u{ours.itemsize}").ravel() != theirs.view(f"u{theirs.itemsize}").ravel())
        assert different.size == 0, (
            f"{case}, {name}: {different.size} of {ours.size} differ, first at {different[0]}: "
            f"paddle {ours.ravel()[different[0]]}, torch {theirs.ravel()[different[0]]}"
        )


def assert_close(results, case, bound):
    for name, ours, theirs in both(results, case):
        assert np.isfinite(theirs).all() and np.linalg.norm(theirs) > 0, name
        error = floors.relative_error(ours, theirs)
        assert error <= bound, f"{case}, {name}: relative difference {error:.1e}, bound {bound:.0e}"


@pytest.mark.torch
@pytest.mark.parametrize("case", names("routing"))
def test_routing_and_data_movement_are_the_same_bits(results, case):
    assert_same_bits(results, case)


@pytest.mark.torch
@pytest.mark.parametrize("case", names("quantize"))
def test_codes_scales_and_weight_copies_are_the_same_bits(results, case):
    assert_same_bits(results, case)


@pytest.mark.torch
@pytest.mark.parametrize("case", names("exact"))
def test_where_sums_are_exact_results_are_the_same_bits(results, case):
    """Then their order does not matter, and any difference is one of meaning: no tolerance hides it."""
    assert_same_bits(results, case)
    assert_close(results, case, 0.0)  # finite, and not zero against zero


@pytest.mark.torch
@pytest.mark.parametrize("case", names("activation"))
def test_activations(results, case):
    assert_close(results, case, ELEMENTWISE)


@pytest.mark.torch
@pytest.mark.parametrize("case", names("fp32", "fp16", "bf16", "fp8"))
def test_forward_and_backward(results, case):
    assert_close(results, case, {"fp32": FLOAT32, "fp16": BF16, "bf16": BF16, "fp8 ": FP8}[case[:4]])


# ---- The sources: names that both frameworks have. What Paddle means otherwise: tools/ci/check_house.py --------------

PACKAGE = children.ROOT / "sonicmoe"
LAUNCH = PACKAGE / "launch.py"  # the one place that asks a framework for streams and devices


def framework_modules():
    """(path, tree) of the package's modules that import a framework and may meet either."""
    for _, path, tree in engine_modules(children.ROOT):
        if any(aliases(tree, name) for name in ("torch", "paddle")):
            yield path, tree


def dotted_uses(tree, framework="torch") -> dict[str, int]:
    """{dotted name: line} of each use of the framework, imports included: ``torch.nn.functional.silu``."""
    local, inner = aliases(tree, framework), set()
    found = dict.fromkeys(local.values(), 1)
    for node in ast.walk(tree):  # outermost first, so that a chain is taken whole
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            parts, base = [node.attr], node.value
            while isinstance(base, ast.Attribute):
                inner.add(id(base))
                parts, base = [base.attr, *parts], base.value
            if isinstance(base, ast.Name) and base.id in local:
                found.setdefault(".".join([local[base.id], *parts]), node.lineno)
    return found


def name_findings(torch, tree, may_ask_for_devices=False) -> list[str]:
    found = []
    for name, line in dotted_uses(tree).items():
        try:
            resolve(torch, name)
        except AttributeError:
            found.append(f"{line}: Paddle has no {name}")
        if name.startswith("torch.cuda") and not may_ask_for_devices:
            found.append(f"{line}: {name}: devices and streams are {LAUNCH.name}'s business")
    return found


@pytest.fixture(scope="module")
def proxied_torch():
    import sonicmoe.ernie_compat  # noqa: F401
    from sonicmoe.gemm import naive

    return naive.torch


def test_paddle_has_every_name_that_the_sources_use(proxied_torch):
    found, used = [], set()
    for path, tree in framework_modules():
        used |= set(dotted_uses(tree))
        found += [f"{path}:{line}" for line in name_findings(proxied_torch, tree, may_ask_for_devices=path == LAUNCH)]
    assert found == []
    assert {"torch", "torch.zeros", "torch.float8_e4m3fn", "torch.matmul", "torch.where"} <= used
    for storage in ("bfloat16", "float16", "float32"):  # getattr(torch, plan.storage)
        assert resolve(proxied_torch, f"torch.{storage}") is not None


@pytest.mark.torch
def test_torch_has_every_name_that_the_sources_use():
    used = sorted({name for _, tree in framework_modules() for name in dotted_uses(tree)})
    missing, on_tensors = children.answer(NAMES_WORKER, *used, env=children.clean_env([children.torch_site()]))
    assert missing == []
    # And the other way round: methods that only torch's tensors have. Ours, and those of Python's own types, aside.
    import paddle

    trees = list(framework_modules())
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    own = {n.name for tree in sources for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    only_torch = set(on_tensors) - set(dir(paddle.Tensor)) - own
    for kind in (list, dict, set, str, bytes, int):
        only_torch -= set(dir(kind))
    assert {"nelement", "untyped_storage"} <= only_torch
    found = [
        f"{path}:{node.lineno}: Paddle's tensors have no .{node.func.attr}()"
        for path, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in only_torch
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import torch\ntorch.no_such_thing(1)", "2: Paddle has no torch.no_such_thing"),
        ("import torch as t\nt.nn.functional.no_such_thing(1)", "Paddle has no torch.nn.functional.no_such_thing"),
        ("from torch import no_such_thing", "Paddle has no torch.no_such_thing"),
        ("import torch\ntorch.cuda.synchronize()", "torch.cuda.synchronize: devices and streams are launch.py's"),
    ],
)
def test_the_checks_notice(proxied_torch, source, says):
    tree = ast.parse(source)
    found = name_findings(proxied_torch, tree)
    assert any(says in line for line in found), found


def test_the_checks_leave_good_code_alone(proxied_torch):
    source = """
import torch
import triton.language as tl
from torch.nn import functional as F
a, b = "one two".split(), "one,two".split(",")
low, high = tl.split(pair)
x = F.silu(torch.zeros([2], dtype=torch.float32, device=y.device))[: int(x.shape[0])]
"""
    tree = ast.parse(source)
    assert name_findings(proxied_torch, tree) == []


def test_the_traps_are_traps(proxied_torch):
    """A rule whose reason is gone should go too: this fails when Paddle comes to agree with torch."""
    x = proxied_torch.arange(6)
    assert not isinstance(x.numel(), int)
    assert [list(part.shape) for part in x.split(2)] != [[2], [2], [2]]
    assert x.as_strided([2], [1], 1).tolist() != [1, 2]
    for name in ("nelement", "storage", "untyped_storage"):
        assert not hasattr(x, name)
