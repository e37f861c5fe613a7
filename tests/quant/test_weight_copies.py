"""When copies of weights are brought up to date by the launches of the call before, and when everything is looked at
again."""

from types import SimpleNamespace

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe.quant import api
    from sonicmoe.quant.formats import make_recipe


class Kernels:
    """In the place of both modules of kernels: notes what is called, and what is launched again."""

    def __init__(self):
        self.calls, self.repeats, self.fails = [], True, False
        self.state = torch.ones(2)

    def make_memory(self, weights):
        return SimpleNamespace(state=self.state)

    def again(self, name):
        def run(stream):
            self.calls.append((name, stream))
            if self.fails:
                raise RuntimeError("no launch")

        return run if self.repeats else None

    def fingerprint(self, weights, table, memory, repeatable):
        assert repeatable
        self.calls.append("look")
        return SimpleNamespace(table="table", changed="changed", again=self.again("look again"))

    def quantize_weights_repeatable(self, weights, pow2, into, changed):
        self.calls.append("copy")
        return ((1, 2, 3, 4), (5, 6, 7, 8)) if into is None else into, self.again("copy again")


@pytest.fixture
def kernels(monkeypatch):
    if not torch:
        return None
    found = Kernels()
    monkeypatch.setattr(api, "triton_fingerprint", found)
    monkeypatch.setattr(api, "triton_quantize", found)
    monkeypatch.setattr(api, "current_stream", lambda tensor: 7)
    return found


def weights():
    return [torch.zeros(size, dtype=torch.bfloat16) for size in ((2, 256, 128), (2, 128, 128))]


FULL, AGAIN = ["look", "copy"], [("look again", 7), ("copy again", 7)]


def test_the_same_tensors_where_they_lay(kernels):
    copies, (w1, w2) = api.WeightCopies(make_recipe("sm90")), weights()
    first = copies.current(w1, w2)
    for _ in range(2):
        w1.add_(1.0)  # whether bytes have changed is for the device to find out
        assert copies.current(w1.detach(), w2) is first
    assert kernels.calls == FULL + AGAIN + AGAIN


CHANGES = {
    "moved": lambda w: w.clone(),
    "another shape": lambda w: w.view(1, -1, 128),
    "another type": lambda w: w.view(torch.float16),
    "another order": lambda w: w.transpose(0, 1).as_strided(w.shape, (128, 256, 1)),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_else_is_looked_at(kernels, change, number):
    copies, given = api.WeightCopies(make_recipe("sm90")), weights()
    copies.current(*given)
    kept, given[number] = given[number], change(given[number])
    copies.current(*given)
    copies.current(*given)
    assert kernels.calls == FULL + FULL + AGAIN
    given[number] = kept
    copies.current(*given)
    assert kernels.calls[-2:] == FULL


def test_a_launch_that_failed_is_not_taken_for_done(kernels):
    copies, given = api.WeightCopies(make_recipe("sm90")), weights()
    copies.current(*given)
    kernels.fails = True
    with pytest.raises(RuntimeError):
        copies.current(*given)
    kernels.fails, kernels.calls = False, []
    copies.current(*given)
    assert kernels.calls == FULL and not kernels.state.any(), "what had been noted is forgotten"
    copies.current(*given)
    assert kernels.calls == FULL + AGAIN


def test_where_nothing_can_be_repeated(kernels):
    """As in Triton's interpreter."""
    kernels.repeats = False
    copies, given = api.WeightCopies(make_recipe("sm90")), weights()
    for _ in range(3):
        copies.current(*given)
    assert kernels.calls == FULL * 3
