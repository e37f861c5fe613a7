"""benchmarks/moe.py starts and checks what it says it checks; its timings need a GPU."""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import textwrap

import pytest

from tests.support.benchmark_runs import ROOT, run_with_torch, stored

OURS, PEER = "sonicmoe-bf16", "sonic-moe"


# ---- What is made of figures -----------------------------------------------------------------------------------------


@pytest.fixture
def part(monkeypatch):
    """Import benchmarks/moe.py or one of its parts, as the program itself does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def results(part):
    return part("moe_bench.results")


def figures(error=0.002, **changes):
    good = {name: [error, 1.0] for name in ("out", "dx", "drouter", "dw1", "dw2")} | changes
    kernels = [f"forward+backward{how}" for how in ("", "+main_grad", " captured", " do_bench")]
    return {"figures": {"forward": {"out": good["out"]}} | dict.fromkeys(kernels, good), "adds_main_grad": True}


def row(provider, **changes):
    sizes = dict(zip("THIEK", (64, 32, 16, 4, 2), strict=True))
    same = {"kernel": "forward", "device": "GPU", "versions": "1", "check": "ok", "run": "now", "tflops": 1.0}
    return {**sizes, **same, "provider": provider, "wall_ms": 1.0, **changes}


def test_median_and_range(results):
    assert results.median_and_range([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)
    assert results.median_and_range([4.0]) == (4.0, 4.0, 4.0)


def test_flops_of_the_reference_shape(part):
    shapes = part("moe_bench.shapes")
    shape = shapes.SHAPES["reference"]
    assert shape.flops("forward+backward") == 18 * 8192 * 8 * 3072 * 1536
    assert shape.flops("forward") * 3 == shape.flops("forward+backward")
    assert shapes.Shape.parse(str(shape)) == shape
    for wrong in ("1,2,3", "8,8,8,2,4", "8,8,8,8,0"):
        with pytest.raises(ValueError, match="shape"):
            shapes.Shape.parse(wrong)


@pytest.mark.parametrize(
    "reply, says",
    [
        (figures(), "ok"),
        (None, "not run"),
        ({}, "failed: out not compared"),
        (figures(dw1=[0.02, 1.0]), "failed: dw1 off by 2.00%"),
        (figures(dx=[float("nan"), float("nan")]), "failed: dx off by nan%"),
        (figures() | {"adds_main_grad": False}, "failed: main_grad is not where"),
    ],
)
def test_verdict(part, results, reply, says):
    provider = part("moe_bench.providers").PROVIDERS[OURS]
    assert results.verdict("forward+backward+main_grad", provider, reply).startswith(says)


def test_a_cosine_bound_is_kept(part, results):
    provider = dataclasses.replace(part("moe_bench.providers").PROVIDERS[OURS], relative=0.076, cosine=0.997)
    assert results.verdict("forward", provider, figures(error=0.07)) == "ok"
    assert results.verdict("forward", provider, figures(out=[0.07, 0.99])).startswith(
        "failed: out off by 7.00%, cosine"
    )


@pytest.mark.parametrize(
    "ours, peer, reason",
    [
        ({"check": "failed: dx"}, {}, "the check of sonicmoe-bf16 failed"),
        ({}, {"check": "failed: dx"}, "the check of sonic-moe failed"),
        ({}, {"check": "not run"}, "the check of sonic-moe did not run"),
        ({"check": ""}, {}, "the check of sonicmoe-bf16 did not run"),
        ({}, {"wall_ms": ""}, "sonic-moe was not timed"),
        ({"run": "yesterday"}, {}, "not measured in the same run"),
    ],
)
def test_no_speedup_without_a_check(results, ours, peer, reason):
    ours, peer = row(OURS, **ours), row(PEER, **peer)
    with pytest.raises(results.Refused, match=reason):
        results.speedup(ours, peer)
    lines, refused = results.summary(results.Table([ours, peer]).rows.values())
    assert refused and not any("times as fast" in line for line in lines)
    assert any("no speed-up: " in line and reason in line for line in lines)


def test_speedup(results):
    lines, refused = results.summary(results.Table([row(OURS), row(PEER, wall_ms=1.5)]).rows.values())
    assert not refused and "1.500 times as fast as sonic-moe" in "\n".join(lines)


def test_table_keeps_what_it_did_not_measure(results, tmp_path):
    path = tmp_path / "moe.csv"
    first = results.Table([row(OURS, note='a, "b"'), row(PEER), row(OURS, E=8)])
    first.write(path)
    again = results.Table.read(path)
    assert again.rows == first.rows
    again.put(row(OURS, wall_ms=0.5))
    again.put(row(OURS, versions="2"))
    again.write(path)
    found = [(r["provider"], r["E"], r["versions"], r["wall_ms"]) for r in stored(path)]
    assert sorted(found) == [
        (PEER, "4", "1", "1.0000"),
        (OURS, "4", "1", "0.5000"),
        (OURS, "4", "2", "1.0000"),
        (OURS, "8", "1", "1.0000"),
    ]
    assert results.Table.read(tmp_path / "absent.csv").rows == {}


def test_chart_from_the_table(part, results, tmp_path):
    plot = part("moe_bench.plot")
    rows = [row(OURS), row(PEER, wall_ms=1.5), row(OURS, E=8, check="failed: dx")]
    assert plot.chart([row(OURS, check="not run")], tmp_path / "no.png") == "no plot: no checked and timed row"
    pytest.importorskip("matplotlib")
    path = tmp_path / "moe.png"
    assert plot.chart(results.Table(rows).rows.values(), path) == f"wrote {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_gemms_are_found_in_the_order_of_launches(part, results):
    shape = part("moe_bench.shapes").SHAPES["reference"]
    big = [["a", 1800.0], ["b", 900.0], ["c", 910.0], ["d", 920.0], ["e", 1810.0], ["f", 1820.0]]
    launches = [x for kernel in big for x in (["small", 30.0], kernel)]
    found = results.gemm_rows(shape, PEER, launches)
    assert [(gemm, us, name) for gemm, us, _, name in found] == [
        (gemm, us, name) for gemm, (name, us) in zip(("up", "down", "dA", "dW2", "dx", "dW1"), big, strict=True)
    ]
    assert found[0][2] == pytest.approx(4 * 8192 * 8 * 3072 * 1536 / 1800e-6 / 1e12)
    assert results.gemm_rows(shape, PEER, launches[:4]) == []


def test_gemms_that_are_several_launches(part, results):
    shape = part("moe_bench.shapes").SHAPES["reference"]
    names = ["UpKind", *["RowsKind"] * 3, "DownBackwardKind", *["RowsKind"] * 3, "WgradKind", "WgradKind"]
    launches = [x for name in names for x in ([f"gemm<{name}>", 100.0], ["sum_slots", 500.0])]
    found = results.gemm_rows(shape, "sonicmoe-fp8", launches)
    assert [(gemm, us) for gemm, us, _, _ in found] == [
        ("up", 100.0), ("down", 300.0), ("dA", 100.0), ("dx", 300.0), ("dW1", 100.0), ("dW2", 100.0)
    ]  # fmt: skip
    for wrong in (launches[2:], launches[:-2], [*launches, launches[0]]):
        assert results.gemm_rows(shape, "sonicmoe-fp8", wrong) == []
    # Of three launches one may be dW1's and two dW2's, or the other way round, and of four one may be three.
    for more in (1, 2):
        *_, together = results.gemm_rows(shape, "sonicmoe-fp8", launches + more * launches[-2:])
        flops = shape.gemm_flops("dW1") + shape.gemm_flops("dW2")
        assert together[:3] == ("dW1+dW2", 100.0 * (2 + more), flops / (2 + more) / 1e8)


# ---- Processes -------------------------------------------------------------------------------------------------------

# Stands for a provider: answers from FAKE in its environment, prints where libraries print, and may fail on the way.
FAKE_WORKER = """
import json, os, pathlib, time
from moe_bench.protocol import serve
fake = json.loads(os.environ["FAKE"])
calls = {}
def answer(command):
    def reply(**arguments):
        calls[command] = calls.get(command, 0) + 1
        print("a library's chatter")
        if fake.get("sleep") == [command, calls[command]]:
            time.sleep(60)
        if fake.get("die") == [command, calls[command]]:
            os._exit(3)
        if fake.get("raise") == command:
            raise RuntimeError("out of luck")
        if command == "first":
            pathlib.Path(os.environ["TRITON_CACHE_DIR"], f"{len(calls)}").write_text("")
            return {"seconds": 0.5}
        return fake[command]
    return reply
serve({name: answer(name) for name in ("load", "first", "check", "time", "memory", "busy")})
"""


@pytest.fixture
def runner(part, monkeypatch, tmp_path):
    """Run benchmarks/moe.py on two fake providers; ``faults`` are {provider: changes of its answers}."""
    moe = part("moe")
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER)

    def run(*options, faults=None, shapes=("64,32,16,4,2",)):
        for name, wall in ((OURS, 1.0), (PEER, 2.0)):
            answers = {
                "load": {"fingerprint": [1.0], "device": "GPU", "versions": f"{name} 1", "file": ""},
                "check": figures(),
                "time": {"wall_ms": wall, "event_ms": wall, "steps": 3},
                "memory": {"peak_mib": 5.0},
                "busy": {"gpu_us": 900.0 * wall, "span_us": 950.0, "launches": 7.0} | {"totals": {}, "sequence": []},
            }
            env = {"FAKE": json.dumps(answers | (faults or {}).get(name, {}))}
            provider = dataclasses.replace(moe.PROVIDERS[name], command=(sys.executable, str(script)), env=env)
            monkeypatch.setitem(moe.PROVIDERS, name, provider)
        sizes = [word for shape in shapes for word in ("--shape", shape)]
        both = ["--providers", f"{OURS},{PEER}"]
        return moe.main([*sizes, "--peer-site", str(tmp_path), "--rounds", "3", *both, *options])

    return run


def test_a_run(runner, tmp_path, capsys):
    path = tmp_path / "moe.csv"
    assert runner("--csv", str(path), shapes=("64,32,16,4,2", "65,32,16,4,2")) == 0
    printed = capsys.readouterr().out
    assert "2.000 times as fast as sonic-moe" in printed and "no speed-up" not in printed
    rows = stored(path)
    assert len(rows) == 2 * 2 * 3
    assert {(r["check"], r["rounds"], r["peak_mib"], r["launches"]) for r in rows} == {("ok", "3", "5.0000", "7")}
    assert {(r["gpu_us"], r["span_us"]) for r in rows if r["provider"] == PEER} == {("1800.0", "950.0")}


@pytest.mark.parametrize("who", [OURS, PEER])
@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"check": figures(error=0.02)}, "failed"),
        ({"raise": "check"}, "did not run"),
        ({"die": ["check", 1]}, "did not run"),
        ({"raise": "load"}, "did not run"),
        ({"load": {"fingerprint": [2.0], "device": "GPU", "versions": "1"}}, "failed"),
        ({"die": ["time", 2]}, "was not timed"),
    ],
)
def test_no_ratio_when_something_is_wrong(runner, tmp_path, capsys, who, fault, reason):
    path = tmp_path / "moe.csv"
    assert runner("--csv", str(path), "--no-busy", faults={who: fault}) == 1
    printed = capsys.readouterr().out
    assert "times as fast" not in printed
    assert "no speed-up: " in printed and reason in printed
    # The other one's figures are not lost, nor is a wrong one's time kept.
    for r in stored(path):
        assert bool(r["wall_ms"]) == (r["check"] == "ok" and not (r["provider"] == who and "die" in fault))


def test_one_wrong_configuration_does_not_silence_the_others(runner, capsys):
    wrong = figures()
    wrong["figures"]["forward+backward+main_grad"] = figures(dw2=[0.5, 0.8])["figures"]["forward+backward"]
    assert runner("--no-busy", faults={OURS: {"check": wrong}}) == 1
    printed = capsys.readouterr().out
    assert printed.count("no speed-up: the check of sonicmoe-bf16 failed") == 2  # told after the shape and at the end
    assert printed.count("2.000 times as fast as sonic-moe") == 4


def test_a_run_that_is_cut_off_keeps_what_it_has(runner, tmp_path, capsys):
    path = tmp_path / "moe.csv"
    shapes = ("64,32,16,4,2", "65,32,16,4,2")
    # Three kernels of three rounds are the first shape; the next turn hangs.
    assert runner("--csv", str(path), "--limit", "4", faults={PEER: {"sleep": ["time", 10]}}, shapes=shapes) == 1
    assert "stopped at the limit of 4 s; not finished: 65,32,16,4,2" in capsys.readouterr().out
    assert [r["T"] for r in stored(path) if r["wall_ms"]] == ["64"] * 6


def test_captured_and_dense_rows(runner, tmp_path, capsys):
    """Beside the others on request: a graph of those who can be captured, with a check of its own, and torch's
    products, which are no layer and so are compared with none."""
    path = tmp_path / "moe.csv"
    options = ["--csv", str(path), "--captured", "--dense"]
    assert runner(*options) == 0
    rows = {(r["kernel"], r["provider"]): r for r in stored(path)}
    assert len(rows) == 2 * 3 + 2
    captured, dense = rows["forward+backward captured", OURS], rows["dense GEMMs", "torch"]
    assert (captured["check"], captured["wall_ms"], captured["gpu_us"]) == ("ok", "1.0000", "900.0")
    assert (dense["check"], dense["wall_ms"], dense["tflops"]) == ("", "1.0000", captured["tflops"])
    printed = capsys.readouterr().out
    assert "forward+backward captured, T" in printed and printed.count("dense GEMMs") == 1
    wrong = figures()
    wrong["figures"]["forward+backward captured"] = figures(dx=[0.5, 0.8])["figures"]["forward+backward"]
    assert runner(*options, "--no-busy", faults={OURS: {"check": wrong}}) == 1
    row = next(r for r in stored(path) if r["kernel"] == "forward+backward captured")
    assert row["check"].startswith("failed: dx") and row["wall_ms"] == ""


def test_do_bench_rows(runner, tmp_path, capsys):
    """Of everybody on request, compared like the others; a profiler has nothing to add."""
    path = tmp_path / "moe.csv"
    assert runner("--csv", str(path), "--do-bench", "--rounds", "4") == 0
    rows = [r for r in stored(path) if r["kernel"] == "forward+backward do_bench"]
    assert {(r["provider"], r["check"], r["wall_ms"], r["rounds"], r["gpu_us"], r["peak_mib"]) for r in rows} == {
        (OURS, "ok", "1.0000", "3", "", ""),
        (PEER, "ok", "2.0000", "3", "", ""),
    }
    assert "forward+backward do_bench, T" in capsys.readouterr().out


def test_one_provider_alone(runner, capsys):
    assert runner("--providers", PEER, "--no-busy") == 0
    assert "speed-up" not in capsys.readouterr().out
    assert runner("--providers", PEER, "--no-busy", faults={PEER: {"check": figures(error=0.5)}}) == 1


def test_cold_start(runner, tmp_path, capsys):
    path = tmp_path / "moe.csv"
    assert runner("--cold", "--csv", str(path), "--providers", OURS) == 0
    rows = {r["kernel"]: r for r in stored(path)}
    assert list(rows) == ["cold start", "new token count", "warm start"]
    assert [r["T"] for r in rows.values()] == ["64", "57", "64"]
    assert [r["new_files"] for r in rows.values()] == ["1", "1", "0"]
    assert runner("--cold", "--providers", OURS, faults={OURS: {"check": figures(error=0.5)}}) == 1


def test_profile(runner, capsys):
    assert runner("--profile", "--providers", PEER) == 0
    printed = capsys.readouterr().out
    assert "GPU busy 1800.0 us" in printed and "steps differ in their launches" in printed
    assert runner("--profile", "--providers", PEER, faults={PEER: {"check": figures(error=0.5)}}) == 1
    assert "GPU busy" not in capsys.readouterr().out


def test_from_csv(runner, results, part, tmp_path, capsys):
    path, moe = tmp_path / "moe.csv", part("moe")
    assert runner("--csv", str(path), "--no-busy") == 0
    capsys.readouterr()
    assert moe.main(["--from-csv", str(path)]) == 0
    assert "2.000 times as fast as sonic-moe" in capsys.readouterr().out
    # The peer alone, on another day: its rows are newer, and no ratio joins the two runs.
    table = results.Table.read(path)
    for key in [key for key in table.rows if PEER in key]:
        table.put(table.rows[key] | {"run": "another day"})
    table.write(path)
    assert moe.main(["--from-csv", str(path)]) == 1
    assert "times as fast" not in capsys.readouterr().out


def test_unknown_names_are_errors(part, capsys):
    for options in (["--providers", "x"], ["--shapes", "x"], ["--env", "x"], ["--providers", PEER], ["--shape", "1"]):
        with pytest.raises(SystemExit) as stopped:
            part("moe").main(options)
        assert stopped.value.code == 2
    assert "--peer-site is needed" in capsys.readouterr().err


def test_providers_share_nothing(part, tmp_path, monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    providers = part("moe_bench.providers")
    ours = providers.PROVIDERS[OURS].environment(tmp_path / "a", ["/site"], {})
    peer = providers.PROVIDERS[PEER].environment(tmp_path / "b", providers.peer_sites("/peer"), {"QUACK_X": "1"})
    assert ours["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/site", str(ROOT / "benchmarks")]
    assert str(ROOT) not in peer["PYTHONPATH"].split(os.pathsep) and peer["QUACK_X"] == "1"
    assert "SONIC_MOE_FP8_MODE" not in ours and "PYTHONDONTWRITEBYTECODE" not in ours
    for name in providers.CACHES:
        assert ours[name] != peer[name] and pathlib.Path(ours[name]).is_dir()


# ---- The check itself ------------------------------------------------------------------------------------------------

# The layer as autograd has it, under the peer's names, with a fault that a test can ask for.
PLAIN_LAYER = """
import enum, os, torch
from . import enums
FAULT = os.environ.get("FAULT", "")
class KernelBackendMoE(enum.Enum):
    sonicmoe = "sonicmoe"
class Experts(torch.nn.Module):
    def __init__(self, *size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(*size))
class MoE(torch.nn.Module):
    def __init__(self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, **rest):
        super().__init__()
        self.topk = num_experts_per_tok
        self.router = torch.nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc = Experts(num_experts, 2 * intermediate_size, hidden_size)
        self.c_proj = Experts(num_experts, hidden_size, intermediate_size)
    def forward(self, x, kernel_backend_moe):
        best, ids = self.router(x).topk(self.topk)
        probs, out = best.double().softmax(-1), 0
        for e, (w1, w2) in enumerate(zip(self.c_fc.weight.double(), self.c_proj.weight.double())):
            z = x.double() @ w1.T
            gate, up = (z[:, 1::2], z[:, 0::2]) if FAULT == "gate" else (z[:, 0::2], z[:, 1::2])
            out = out + ((ids == e) * probs).sum(-1, keepdim=True) * ((torch.nn.functional.silu(gate) * up) @ w2.T)
        if FAULT == "nan":
            out = out + float("nan")
        return out.bfloat16(), None
"""
CHECK_IT = """
import json, os
from moe_bench.worker import Bench, sequence, span, union
bench = Bench("cpu")
loaded = bench.load([96, 64, 32, 8, 2], 0, [])
again = Bench("cpu").load([96, 64, 32, 8, 2], 0, [])
other = Bench("cpu").load([96, 64, 32, 8, 2], 1, [])
assert loaded["fingerprint"] == again["fingerprint"] != other["fingerprint"]
assert union([(0, 2), (1, 3), (5, 6)]) == 4
assert span([(0, 2), (1, 7), (5, 6)]) == 7 and span([]) == 0
assert sequence([(0, 1, "a"), (1, 3, "b"), (4, 6, "a"), (6, 8, "b")], 2) == [["a", 1.5], ["b", 2.0]]
assert sequence([(0, 1, "a"), (1, 3, "b")], 2) == []
print(json.dumps(bench.check()))
"""


def write_plain_layer(folder, fault=""):
    package = folder / "sonicmoe"
    package.mkdir()
    (package / "__init__.py").write_text(PLAIN_LAYER.replace('os.environ.get("FAULT", "")', repr(fault)))
    (package / "enums.py").write_text("class ActivationType:\n    SWIGLU = 1\n")


@pytest.mark.torch
@pytest.mark.parametrize("fault", ["", "gate", "nan"])
def test_the_check_knows_right_from_wrong(part, results, tmp_path, fault):
    write_plain_layer(tmp_path, fault)
    script = tmp_path / "check_it.py"
    script.write_text(textwrap.dedent(CHECK_IT))
    reply = json.loads(run_with_torch([script], tmp_path, ROOT / "benchmarks"))
    assert reply["adds_main_grad"] is False
    provider = part("moe_bench.providers").PROVIDERS[PEER]
    for kernel in part("moe_bench.shapes").KERNELS:
        verdict = results.verdict(kernel, provider, reply)
        assert verdict.startswith("failed: out off") if fault else verdict == "ok", verdict


@pytest.mark.torch
def test_two_real_workers_without_a_gpu(part, monkeypatch, tmp_path, capsys):
    site = os.environ.get("SONICMOE_TEST_TORCH_SITE")
    if not site:
        pytest.skip("SONICMOE_TEST_TORCH_SITE is not set")
    write_plain_layer(tmp_path)
    for entry in pathlib.Path(site).iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    moe, path = part("moe"), tmp_path / "moe.csv"
    for name in (OURS, PEER):
        changes = {
            "in_checkout": False,
            "adds_main_grad": False,
            "command": (sys.executable, "-m", "moe_bench.worker", "cpu"),
        }
        monkeypatch.setitem(moe.PROVIDERS, name, dataclasses.replace(moe.PROVIDERS[name], **changes))
    options = ["--peer-site", str(tmp_path), "--shape", "64,32,16,4,2", "--rounds", "2", "--seconds", "0.01"]
    options += ["--providers", f"{OURS},{PEER}", "--dense", "--csv", str(path)]
    assert moe.main(options) == 0, capsys.readouterr().out
    rows = stored(path)
    dense = rows.pop([r["kernel"] for r in rows].index("dense GEMMs"))
    assert (dense["provider"], dense["check"], dense["gpu_us"]) == ("torch", "", "") and float(dense["wall_ms"]) > 0
    assert len(rows) == 6 and capsys.readouterr().out.count("times as fast as sonic-moe") == 6
    assert all(
        float(r["wall_ms"]) > 0 and float(r["gpu_us"]) > 0 and r["versions"].startswith("sonicmoe ?; torch")
        for r in rows
    )
