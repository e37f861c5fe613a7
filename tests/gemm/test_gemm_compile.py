"""The GEMMs of the Hopper engine, really compiled, without a GPU: all that one plan needs, and where others differ.

Each compiled kernel is loaded, and gets what the engine launches it with: it looks at types, shapes, strides and
addresses before it turns to CUDA. Its machine code is read.
"""

import re

import pytest

from tests.support import children, gemm_site

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemm")
    env = gemm_site.environment(folder)
    script, cache = children.WORKERS / "gemm_compile.py", folder / "cache"
    return children.answer(script, cache, gemm_site.cuobjdump(), env=env, timeout=280)


def by_name(compiled, fact) -> dict:
    """{what tells a kernel from the others: the fact}"""
    facts = ("plan", "op", "transposed", "out", "accumulate")
    found = {" ".join(str(kernel[name]) for name in facts): kernel[fact] for kernel in compiled["kernels"]}
    assert len(found) == len(compiled["kernels"]), found
    return found


def test_the_generator_is_the_one_that_users_get(compiled):
    pinned = re.findall(r'"([\w-]+)==([\d.]+)"', (children.ROOT / "setup.py").read_text())
    assert len(pinned) == 2 and {f"{name} {version}" for name, version in pinned} <= set(compiled["tools"])


def test_the_whole_set_of_a_plan_is_compiled(compiled):
    """A new kernel in the engine's set is compiled here as well; this list says that one has come."""
    kernels = [kernel for kernel in compiled["kernels"] if kernel["plan"] == "swiglu"]
    ops = sorted(kernel["op"] for kernel in kernels)
    assert ops == ["down_backward", "rows", "rows", "up", "up_z", "wgrad", "wgrad", "wgrad", "wgrad"]
    assert len(compiled["kernels"]) == len(kernels) + 6


def test_every_kernel_is_launched_and_takes_what_the_engine_gives(compiled):
    assert by_name(compiled, "refusals") == dict.fromkeys(by_name(compiled, "op"), [])
    assert min(by_name(compiled, "launches").values()) >= 3


def test_a_kernel_refuses_what_it_cannot_work_on(compiled):
    for name, answer in compiled["misuses"].items():
        refused = answer is not None and re.match("(Type|Value)Error: ", answer)
        assert bool(refused) == (name != "nothing"), (name, answer)


def test_machine_code_is_hoppers_and_keeps_everything_in_registers(compiled):
    assert set(by_name(compiled, "machine").values()) == {"sm_90a"}
    assert by_name(compiled, "spilled_bytes") == dict.fromkeys(by_name(compiled, "op"), 0)
    assert by_name(compiled, "spills") == dict.fromkeys(by_name(compiled, "op"), 0)
    assert min(by_name(compiled, "tensor_core_products").values()) > 0


def test_what_accumulates_adds_in_its_store_and_nothing_else_does(compiled):
    assert by_name(compiled, "adds_in_the_store") == by_name(compiled, "accumulate")


def test_no_two_kernels_are_the_same_code(compiled):
    """The generator knows an epilogue by an identity that we give it: a mistake there gives one kernel for two."""
    codes = by_name(compiled, "instructions")
    assert len(set(codes.values())) == len(codes), codes
