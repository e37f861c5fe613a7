"""The benchmark on the CPU, and the model beside it."""

import csv
import importlib.util
import math
import sys

import numpy as np
import pytest

from tests.support import children

BENCHMARKS = children.ROOT / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model, benchmark = load("ep_model"), load("ep")


@pytest.mark.dist
@pytest.mark.torch
def test_the_benchmark_runs_on_the_cpu(tmp_path):
    table = tmp_path / "ep.csv"
    env = children.clean_env([children.ROOT, children.torch_site()])
    options = ["--tiny", "--ranks", "1,2", "--experts", "4", "--providers", "bf16/bf16,fp8/fp8", "--iterations", "3"]
    options += ["--warmup", "1", "--limit", "90"]
    command = [sys.executable, BENCHMARKS / "ep.py", *options, "--csv", table]
    done = children.check(children.run(command, env=env, timeout=200))
    assert done.ended == 0
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == list(benchmark.COLUMNS)
    found = {(row["ranks"], row["payload"], row["precision"], row["part"], row["pieces"]) for row in rows}
    parts = [("step", "1"), ("step", "2"), *((part, "1") for part in (*benchmark.PARTS, "rest"))]
    assert found == {(r, p, p, *part) for r in "12" for p in ("bf16", "fp8") for part in parts}
    assert len(rows) == len(found)
    for row in rows:
        if row["part"] == "step":
            tokens = int(row["ranks"]) * 32 / float(row["milliseconds"]) * 1e3
            assert float(row["tokens_per_second"]) == pytest.approx(tokens, rel=0.01)
    sent = {(row["ranks"], row["payload"]): float(row["sent_mib"]) for row in rows if row["part"] == "dispatch"}
    assert sent["1", "bf16"] == sent["1", "fp8"] == 0
    assert 0 < sent["2", "fp8"] == pytest.approx(sent["2", "bf16"] * (1 + 4 / 128) / 2, abs=1e-3)
    head, _, *points = model.compare(table)
    assert len(points) == 2 * 2  # ranks, providers
    for line in points:
        cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
        # Measured / predicted for all parts and a step in two pieces. Efficiency is against one rank of the same table.
        assert all(" / " in cells[name] for name in ("dispatch", "experts", "combine", "step", "two pieces"))
        step = {row["ranks"]: row["milliseconds"] for row in rows if belongs(row, cells)}
        assert cells["efficiency |"] == f"{float(step['1']) / float(step[cells['ranks']]):.0%} |", line


def belongs(row: dict, cells: dict) -> bool:
    """Whether a row is that of a whole step, at any number of ranks, of a line's provider."""
    whole = row["part"] == "step" and row["pieces"] == "1"
    return whole and f"{row['payload']}, {row['precision']}" == cells["payload, experts"]


BROKEN = """
import sys
import ep
from sonicmoe.ep import transport
right = transport._sum_by_token
transport._sum_by_token = lambda rows, layout: right(rows, layout) * (1.1 if len(layout.sent) > 1 else 1.0)
ep.work(ep.parse(sys.argv[1:]))
"""


@pytest.mark.dist
@pytest.mark.torch
def test_the_benchmark_refuses_wrong_numbers(tmp_path):
    """A layer whose results are off is not timed: there are no rows, and a status that says so."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    env = children.clean_env([children.ROOT, BENCHMARKS, children.torch_site()])
    options = ["--worker", "--tiny", "--experts", "4", "--providers", "bf16/bf16", "--csv", tmp_path / "ep.csv"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *options]
    done = children.run(command, env=env, timeout=120)
    assert done.status == 1 and "out is off by" in done.stderr and not (tmp_path / "ep.csv").exists(), done.report()


def test_an_unknown_provider_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--csv", str(tmp_path / "x"), "--providers", "fp4/bf16"])
    assert "--providers: got fp4/bf16, need some of" in capsys.readouterr().err


@pytest.mark.parametrize("experts, ranks, topk", [(128, 4, 8), (128, 32, 8), (16, 16, 4), (8, 2, 8)])
def test_share_of_tokens_by_drawing(experts, ranks, topk):
    rng = np.random.default_rng(0)
    drawn = np.argsort(rng.random((20000, experts)), axis=1)[:, :topk]
    hit = (drawn // (experts // ranks) == 0).any(axis=1).mean()
    shape = model.Shape(experts=experts, ranks=ranks, topk=topk)
    assert model.share_of_tokens(shape) == pytest.approx(hit, abs=0.012)


def test_predictions_follow_the_bandwidths():
    shape = model.Shape(experts=128, ranks=4)
    found = model.predict(shape)
    no_start = dict(start=0.0, per_peer=0.0, host=0.0)
    slow = model.predict(shape, model.Machine(nvlink=model.Machine().nvlink / 2, **no_start))
    fast = model.predict(shape, model.Machine(nvlink=math.inf, **no_start))
    plain = model.predict(shape, model.Machine(**no_start))
    assert slow.combine - fast.combine == pytest.approx(2 * (plain.combine - fast.combine))
    assert found.experts == slow.experts == fast.experts and found.step > plain.step
    # Three quarters of a token's copies leave a rank of four, as two bytes a channel, twice in a combine's two ways.
    moved = 3 * model.share_of_tokens(shape) * shape.tokens * 2 * shape.hidden / model.Machine().nvlink
    assert plain.combine - fast.combine == pytest.approx(2 * moved)
    fp8 = model.predict(model.Shape(experts=128, ranks=16, payload="fp8"))
    assert fp8.dispatch < model.predict(model.Shape(experts=128, ranks=16)).dispatch
    # Anchors: what was measured is what the model says of it.
    for precision, (few, many) in model.Machine().measured:
        assert model.predict(model.Shape(experts=8, precision=precision)).experts == pytest.approx(few)
        assert model.predict(model.Shape(experts=32, precision=precision)).experts == pytest.approx(many)


def test_overlap_hides_the_smaller_part():
    found = model.Prediction(dispatch=1.0, experts=10.0, combine=1.0)
    assert found.overlapped(1) == found.step == 12.0 and found.overlapped(2) == 11.0
    assert model.Prediction(6.0, 4.0, 6.0).overlapped(2) == 14.0
    # What the host does once stays, and each piece reads the weights for itself.
    cut = model.Prediction(dispatch=1.5, experts=10.0, combine=1.0, host=0.5, weights=3.0)
    assert cut.overlapped(1) == cut.step == 12.5 and cut.overlapped(2) == 14.5


def test_the_page_shows_what_the_command_prints(capsys):
    assert model.main([]) == 0
    page = (children.ROOT / "docs" / "scaling.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page, "paste the output of `python benchmarks/ep_model.py` into docs/scaling.md"
