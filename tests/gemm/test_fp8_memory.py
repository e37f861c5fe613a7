"""What the FP8 stages on Hopper hold at a time, with kernels that do nothing."""

import weakref
from types import SimpleNamespace

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig
    from sonicmoe.gemm import sm90_fp8
    from sonicmoe.gemm.api import GradBuffers
    from sonicmoe.gemm.plan import make_plan

    E4M3 = torch.float8_e4m3fn


def token_major(columns: int, rows: int):
    return torch.empty([columns, rows], dtype=E4M3), torch.empty([rows // 128, columns])


@pytest.mark.parametrize("pieces", [1, 3])
def test_one_piece_of_x_at_a_time(monkeypatch, pieces):
    """Two of them would be what decides the layer's peak."""
    rows, hidden, width, experts = 256, 768, 256, 2
    made, alive, calls = [], [], []

    def pieces_of_x(x, routing, plan, columns):
        alive.append(sum(piece() is not None for piece in made))
        data, scale = token_major(columns[1] - columns[0], rows)
        made.append(weakref.ref(data))
        return sm90_fp8.TokenMajor(data, scale)

    kernels = SimpleNamespace(wgrad=lambda *given: calls.append(given))
    monkeypatch.setattr(sm90_fp8, "_gemms", lambda routing, plan: kernels)
    monkeypatch.setattr(sm90_fp8, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(sm90_fp8, "token_major", pieces_of_x)
    monkeypatch.setattr(sm90_fp8, "_ROOM_BYTES", rows * hidden / pieces)
    config = SonicMoEConfig(use_fp8=True, fp8_wgrad=True)
    plan = make_plan(config, "swiglu", storage="bfloat16", device="cuda", arch="sm_90a")
    routing = SimpleNamespace(n_rows=rows)
    dz = sm90_fp8.Gradient(None, sm90_fp8.TokenMajor(*token_major(width, rows)))
    target, everyone = torch.zeros([experts, width, hidden]), (True,) * experts
    buffers = GradBuffers(target, None, False, everyone, everyone)
    sm90_fp8.accumulate_dw1(dz, torch.zeros([4, hidden], dtype=torch.bfloat16), routing, plan, buffers)
    assert len(made) == len(calls) == pieces
    assert alive == [0] * pieces
