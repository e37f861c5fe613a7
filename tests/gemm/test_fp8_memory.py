"""What the FP8 stages on Hopper hold at a time, with kernels that do nothing."""

import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig
    from sonicmoe.gemm import sm90_bf16, sm90_fp8
    from sonicmoe.gemm.api import GradBuffers
    from sonicmoe.gemm.plan import make_plan

    E4M3 = torch.float8_e4m3fn


def token_major(columns: int, rows: int):
    return torch.empty([columns, rows], dtype=E4M3), torch.empty([rows // 128, columns])


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, HIDDEN, WIDTH, EXPERTS = 2048, 768, 256, 2


def stub_kernels(monkeypatch):
    """(pieces by token that were made, how many others were there each time, calls of wgrad)."""
    made, alive, calls = [], [], []

    def piece_of(rows, routing, plan, columns):
        alive.append(sum(piece() is not None for piece in made))
        data, scale = token_major(columns[1] - columns[0], ROWS)
        made.append(weakref.ref(data))
        return sm90_fp8.TokenMajor(data, scale)

    kernels = SimpleNamespace(wgrad=lambda *given: calls.append(given))
    monkeypatch.setattr(sm90_fp8, "_gemms", lambda routing, plan: kernels)
    monkeypatch.setattr(sm90_fp8, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(sm90_fp8, "token_major", piece_of)
    return made, alive, calls


def plan_and_routing():
    config = SonicMoEConfig(use_fp8=True, fp8_wgrad=True)
    plan = make_plan(config, "swiglu", storage="bfloat16", device="cuda", arch="sm_90a")
    return plan, SimpleNamespace(n_rows=ROWS, n_experts=EXPERTS)


def places(calls, target) -> list[tuple[int, int]]:
    """(row, column) at which each call began, all of them in the first expert."""
    return [divmod((given[6] - target.data_ptr()) // 4, target.shape[2]) for given in calls]


@pytest.mark.parametrize("overwrite, least_room, pieces", [(True, 1.0, 3), (True, 1e9, 1), (False, 1.0, 1)])
def test_one_piece_of_x_at_a_time(monkeypatch, overwrite, least_room, pieces):
    """Two of them would be what decides the layer's peak. In pieces only beside gradients that are new, and only as
    many as are worth it: dz is read for each."""
    made, alive, calls = stub_kernels(monkeypatch)
    monkeypatch.setattr(sm90_fp8, "_LEAST_ROOM", least_room)
    plan, routing = plan_and_routing()
    dz = sm90_fp8.Gradient(None, sm90_fp8.TokenMajor(*token_major(WIDTH, ROWS)))
    target, everyone = torch.zeros([EXPERTS, WIDTH, HIDDEN]), (True,) * EXPERTS
    buffers = GradBuffers(target, None, False, everyone, everyone, overwrite)
    sm90_fp8.accumulate_dw1(dz, torch.zeros([4, HIDDEN], dtype=torch.bfloat16), routing, plan, buffers)
    assert len(made) == len(calls) == pieces
    assert alive == [0] * pieces
    assert places(calls, target) == [(0, 0), (0, 256), (0, 512)][:pieces]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_piece_of_dout_at_a_time(monkeypatch, grouped, overwrite):
    """In the room that dz and x by token had, less what a new gradient takes of it."""
    made, alive, calls = stub_kernels(monkeypatch)
    monkeypatch.setattr(sm90_fp8, "_LEAST_ROOM", 1.0)
    plan, routing = plan_and_routing()
    pa = sm90_fp8.TokenMajor(*token_major(WIDTH, ROWS))
    target = torch.zeros([EXPERTS, WIDTH, HIDDEN] if grouped else [EXPERTS, HIDDEN, WIDTH])
    everyone = (True,) * EXPERTS
    buffers = GradBuffers(None, target, grouped, everyone, everyone, overwrite)
    sm90_fp8.accumulate_dw2(pa, torch.zeros([4, HIDDEN], dtype=torch.bfloat16), routing, plan, buffers)
    wanted = ([(0, 0), (0, 512)] if grouped else [(0, 0), (512, 0)])[: 2 if overwrite else 1]
    assert alive == [0] * len(made)
    assert places(calls, target) == wanted
    assert all(given[7:9] == tuple(target.shape[1:]) for given in calls)
    assert sum(given[4] for given in calls) == (WIDTH * len(wanted) if grouped else HIDDEN)


def test_pieces_are_few():
    """``columns_at_once`` of 4096 columns and 128 MiB for each byte a number."""
    at_once = [sm90_fp8._columns_at_once(32768, 4096, 2, 384, room << 20) for room in (0, 127, 128, 255, 256, 1000)]
    assert at_once == [1536, 1536, 2304, 2304, 4224, 4224]
    assert sm90_fp8._columns_at_once(1 << 20, 4096, 2, 384, 0) == 1152, "at most four pieces"
    assert sm90_fp8._columns_at_once(0, 4096, 2, 384, 0) == 4224


@pytest.mark.parametrize("stages", ["sm90_bf16", "sm90_fp8"])
def test_the_benchmark_knows_which_gradient_comes_first(monkeypatch, stages):
    """It tells launches by their order alone, and who makes dx first makes dW1, for whose operands there is room then,
    before dW2."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    providers = importlib.import_module("moe_bench.providers").PROVIDERS
    told = providers[stages.replace("sm90", "sonicmoe").replace("_", "-")].gemms
    dx_first = {"sm90_bf16": sm90_bf16, "sm90_fp8": sm90_fp8}[stages].DX_FIRST
    assert told[3:] == (("dx", "dW1", "dW2") if dx_first else ("dW2", "dx", "dW1"))
