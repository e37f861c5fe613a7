"""The Triton quantizers in Triton's interpreter: the definition's bytes and scales, and which of the two is chosen."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = (
    "check_quantize_rows",
    "check_quantize_weights",
    "check_flags_of_weights",
    "check_weight_copies",
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
        from sonicmoe.quant import triton_quantize

        data = torch.zeros(5, 128, dtype=torch.float8_e4m3fn)
        calls = [
            lambda: triton_quantize.quantize_rows(torch.zeros(4, 100)),
            lambda: triton_quantize.quantize_rows(torch.zeros(4, 128, dtype=torch.float64)),
            lambda: triton_quantize.quantize_weights([torch.zeros(4, 128)]),
            lambda: triton_quantize.quantize_weights([torch.zeros(1, 64, 128)]),
            lambda: triton_quantize.quantize_weights([torch.zeros(1, 128, 128), torch.zeros(2, 128, 128)]),
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
        "TypeError data: got dtype float32, need float8_e4m3fn",
        "ValueError scale: got shape [1, 5], need [5, 1] (one for each 128 columns)",
    ]
