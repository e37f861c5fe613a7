"""The Triton quantizers in Triton's interpreter: the definition's bytes and scales, and which of the two is chosen."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = (
    "check_quantize_rows",
    "check_quantize_weights",
    "check_flags_of_weights",
    "check_weight_copies",
    "check_quantize_tokens",
    "check_quantize_tokens_of_fp8",
    "check_dequantize_rows",
    "check_choice",
)


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "quantize")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_bytes_and_scales(differences, check):
    assert differences[check] == []


def test_what_is_refused():
    script = """
        import json, torch
        from types import SimpleNamespace
        from sonicmoe.quant import triton_quantize

        index = torch.zeros(128, dtype=torch.int32)
        routing = SimpleNamespace(n_tokens=5, n_rows=128, n_slots=3, x_gather_idx=index, s_scatter_idx=index)
        odd = SimpleNamespace(n_tokens=5, n_rows=96, n_slots=3, x_gather_idx=index, s_scatter_idx=index)
        data = torch.zeros(5, 128, dtype=torch.float8_e4m3fn)
        calls = [
            lambda: triton_quantize.quantize_rows(torch.zeros(4, 100)),
            lambda: triton_quantize.quantize_rows(torch.zeros(4, 128, dtype=torch.float64)),
            lambda: triton_quantize.quantize_weights([torch.zeros(4, 128)]),
            lambda: triton_quantize.quantize_weights([torch.zeros(1, 64, 128)]),
            lambda: triton_quantize.quantize_weights([torch.zeros(1, 128, 128), torch.zeros(2, 128, 128)]),
            lambda: triton_quantize.quantize_tokens(torch.zeros(6, 128), routing),
            lambda: triton_quantize.quantize_tokens(torch.zeros(5, 128), routing, gathered=False),
            lambda: triton_quantize.quantize_tokens(torch.zeros(5, 128), odd),
            lambda: triton_quantize.quantize_tokens(data, routing),
            lambda: triton_quantize.quantize_tokens((data, torch.zeros(5, 4)), routing),
            lambda: triton_quantize.quantize_tokens((data, torch.zeros(5, 4, dtype=torch.uint8)), routing),
            lambda: triton_quantize.dequantize_rows(data.float(), torch.zeros(5, 1), torch.bfloat16),
            lambda: triton_quantize.dequantize_rows(data, torch.zeros(1, 5), torch.bfloat16),
        ]
        said = []
        for call in calls:
            try:
                call()
                said.append("nothing")
            except (TypeError, ValueError) as error:
                said.append(f"{type(error).__name__} {error}")
        print(json.dumps(said))
    """
    floats = "bfloat16 or float16 or float32"
    assert triton_runs.interpreted(script) == [
        "ValueError x: got shape [4, 100], need multiples of 128 after the first dimension",
        f"TypeError x: got dtype float64, need {floats}",
        "ValueError w: got shape [4, 128], need 3 dimensions [E, R, C]",
        "ValueError w: got shape [1, 64, 128], need multiples of 128 after the first dimension",
        "ValueError w: got 2 experts in the second weight, need 1 as in the first",
        "ValueError rows: got shape [6, 128], need [5, 128] (as many as the routing has)",
        "ValueError rows: got shape [5, 128], need [128, 128] (as many as the routing has)",
        "ValueError routing: got 96 rows, need a multiple of 128",
        f"TypeError rows: got dtype float8_e4m3fn, need {floats}",
        "ValueError scale: got shape [5, 4], need [5, 1] (one for each 128 columns)",
        "TypeError scale: got dtype uint8, need float32",
        "TypeError data: got dtype float32, need float8_e4m3fn",
        "ValueError scale: got shape [1, 5], need [5, 1] (one for each 128 columns)",
    ]
