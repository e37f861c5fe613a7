"""The benchmark programs beside moe.py start and check what they say they check; their timings need a GPU."""

import subprocess
import sys

import pytest

from tests.support.benchmark_runs import ROOT, run_with_torch, stored


@pytest.mark.torch
def test_metadata_compares_with_the_definition():
    printed = run_with_torch(["benchmarks/metadata.py", "--check", "5", "--backends", "host"])
    assert printed.startswith("5 random routings, host: all arrays equal the definition's")


@pytest.mark.torch
def test_training_in_both_precisions(tmp_path):
    table, png = tmp_path / "t.csv", tmp_path / "t.png"
    sizes = "--layers 1 --hidden 128 --intermediate 128 --heads 4 --experts 4 --topk 2 --batch 4 --seq 32 --warmup 5"
    command = ["benchmarks/training.py", "--device", "cpu", *sizes.split(), "--steps", "40", "--learning-rate", "0.005"]
    command += ["--seeds", "3", "--precisions", "bf16", "fp8"]
    printed = run_with_torch([*command, "--bound", "0.02", "--csv", table])
    assert "FP8 against BF16, mean of 1 seeds" in printed
    rows = stored(table)
    assert [(r["precision"], r["seed"]) for r in rows] == [("bf16", "3")] * 40 + [("fp8", "3")] * 40
    # Two different computations, and both learn.
    for first, last in ((rows[0], rows[39]), (rows[40], rows[79])):
        assert float(last["loss"]) < 0.8 * float(first["loss"])
        assert last["held_out"] != last["held_out_in_other"]
    assert rows[39]["held_out"] != rows[79]["held_out"]
    compare = [sys.executable, ROOT / "benchmarks/training.py", "--from-csv", table, "--plot", png]
    assert subprocess.run([*compare, "--bound", "0.02"], capture_output=True).returncode == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert subprocess.run([*compare, "--bound", "0"], capture_output=True).returncode == 1
    alone = subprocess.run([*compare, "--precisions", "fp8"], capture_output=True, text=True)
    assert alone.returncode == 2 and "need bf16 and fp8" in alone.stderr


def test_training_tells_how_far_seeds_lie_apart(tmp_path):
    """+2% and -4% by seed: the mean is -1%, its standard error 3%."""
    table = tmp_path / "t.csv"
    rows = [(0, "bf16", 2.0), (0, "fp8", 2.04), (1, "bf16", 3.0), (1, "fp8", 2.88)]
    lines = [f"{seed},0,{precision},{loss},{loss},{loss},GPU" for seed, precision, loss in rows]
    table.write_text("\n".join(["seed,step,precision,loss,held_out,held_out_in_other,device", *lines]))
    command = [sys.executable, ROOT / "benchmarks/training.py", "--from-csv", table, "--bound", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True)
    wanted = "mean of 2 seeds: -1.00% and -1.00%, bound 2.0%, standard error 3.00% and 3.00%"
    assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr
