"""The small Triton kernels through Triton's compiler, for a GPU that is not there, on tensors of both frameworks."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

KERNELS = {"_sum_slots", "_finish_ds", "_topk_softmax", "_topk_softmax_backward", "_hash_parts"}
KERNELS |= {"_column_sums", "_loss", "_loss_backward", "_scores_by_row", "_slots_of_experts", "_products", "_sum_parts"}
KERNELS |= {"_count_blocks", "_place_rows", "_to_slots", "_logits", "_add_product"}
KERNELS |= {"_quantize_rows", "_quantize_weights", "_dequantize_rows"}
KERNELS |= {"_to_native", "_count_change", "_spoil_if_changed", "_gather_without_pads"}


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


def test_what_is_left_out_of_tritons_launcher_does_nothing():
    """Triton's own launcher and the way around it hand on the same; one that makes room is not gone around."""
    script = """
        import json
        from types import SimpleNamespace
        from triton.backends.nvidia.driver import CudaLauncher
        from sonicmoe import triton_launch

        got, launcher = [], object.__new__(CudaLauncher)
        launcher.launch = lambda *given: got.append(given)
        launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, "grid", "pdl"
        launcher.global_scratch_size = launcher.profile_scratch_size = 0
        launcher.global_scratch_align = launcher.profile_scratch_align = 1
        compiled = SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")

        def look_up():
            started = triton_launch._Started(compiled)
            started.look_up()
            return started

        short = look_up()
        short.start(3, 1, 1, 7, *short.fixed, "x", 5)
        launcher(3, 1, 1, 7, "function", "metadata", None, None, None, "x", 5)
        ways = [short.start is launcher.launch]
        launcher.profile_scratch_size = 8
        ways.append(look_up().start is launcher)
        launcher.profile_scratch_size, triton_launch._KNOWN_LAUNCHERS = 0, ("0.",)
        ways.append(look_up().start is launcher)
        print(json.dumps([ways, got[0] == got[1], len(got[0])]))
    """
    env = children.clean_env([children.ROOT, triton_runs.triton_site(), children.torch_site()])
    assert children.answer(script, env=env) == [[True] * 3, True, 15]


def test_wrong_counts_are_still_noticed_once_compiled(tmp_path):
    """Triton leaves assertions out where it is not told to keep them; the interpreter's test cannot see that."""
    script = """
        import json
        import torch
        from tests.workers.triton_compile import compile_only

        made = compile_only()
        from sonicmoe.routing import triton_metadata

        triton_metadata.build(torch.zeros([8, 2], dtype=torch.int32), torch.ones(8, 2), 4, 32, [16, 0, 0, 0])
        print(json.dumps({name: "__assertfail" in kernel.asm["ptx"] for name, (kernel,) in made.items()}))
    """
    found = triton_runs.compiled(script, folder=tmp_path)
    assert [name for name, asserts in found.items() if asserts] == ["_place_experts"] and len(found) == 4
