"""The small Triton kernels through Triton's compiler, for a GPU that is not there, on tensors of both frameworks."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

KERNELS = {"_sum_slots", "_finish_ds", "_topk_softmax", "_topk_softmax_backward", "_hash_parts", "_judge"}
KERNELS |= {"_column_sums", "_loss", "_loss_backward", "_scores_by_row", "_slots_of_experts"}
KERNELS |= {"_quantize_rows", "_quantize_weight", "_quantize_tokens"}


@pytest.fixture(scope="module", params=["torch", "paddle"])
def compiled(request, tmp_path_factory):
    folder, script = tmp_path_factory.mktemp("triton"), children.WORKERS / "triton_compile.py"
    return triton_runs.compiled(script, request.param, folder=folder, torch=request.param == "torch")


def test_every_kernel_compiles_to_what_it_should(compiled):
    """Loads of 16 bytes, no atomics, nothing in local memory; and in the quantizers exact arithmetic."""
    assert {name: found["faults"] for name, found in compiled.items()} == dict.fromkeys(KERNELS, [])


def test_new_counts_of_tokens_compile_nothing(compiled):
    """Nor do new counts of slots and rows, other weights, or index arrays at other addresses."""
    assert {name: found["compiled"] for name, found in compiled.items()} == dict.fromkeys(KERNELS, 1)
