"""Which FP8 copies a call gets, on stand-ins for them: found again, shared by nobody else, gone with their weights."""

import contextlib
import copy
import gc

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig
    from sonicmoe.functional import clear_all_fp8_weight_caches, fp8_weights
    from sonicmoe.gemm.plan import make_plan


class Copies:
    made = 0

    def __init__(self, recipe):
        Copies.made += 1
        self.number, self.calls = Copies.made, 0

    @staticmethod
    def can_hold(w1, w2, recipe, backend):
        return True

    def current(self, w1, w2):
        self.calls += 1
        return self.number, self.calls


class InTurns:
    count = 0

    @contextlib.contextmanager
    def of(self, tensor):
        self.count += 1
        yield


@pytest.fixture
def ask(monkeypatch):
    """fp8_weights of a Hopper GPU's plan."""
    if not torch:
        yield None
        return
    monkeypatch.setattr(fp8_weights, "WeightCopies", Copies)
    monkeypatch.setattr(fp8_weights, "InTurns", InTurns)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clear_all_fp8_weight_caches()
    plan = make_plan(SonicMoEConfig(use_fp8=True), "swiglu", storage="bfloat16", device="cuda", arch="sm_90a")
    yield lambda w1, w2: fp8_weights.fp8_weights(w1, w2, plan)[0]
    clear_all_fp8_weight_caches()


def weights(dtype="bfloat16"):
    return [torch.zeros(size, dtype=getattr(torch, dtype)) for size in ((2, 256, 128), (2, 128, 128))]


def test_the_same_weights_find_their_copies(ask):
    (a, b), (c, d) = weights(), weights()
    (first, _), (second, _) = ask(a, b), ask(c, d)
    assert first != second and ask(a, b) == (first, 2) and ask(c, d) == (second, 2)
    a.data = a.data.clone()  # a parameter may move; its bytes are looked at, not its place
    assert ask(a, b) == (first, 3)


def test_copies_made_under_inference_mode_may_be_written_outside_it(ask, monkeypatch):
    """As those of a layer that is tried out before it is trained."""
    room = []
    monkeypatch.setattr(Copies, "current", lambda self, w1, w2: room.append(torch.zeros(2)) or room[0].zero_())
    a, b = weights()
    with torch.inference_mode():
        ask(a, b)
        assert torch.zeros(1).is_inference()
    ask(a, b)


def test_one_weight_beside_two_others(ask):
    """Two layers that share their first weights: what one has copied must not be the other's."""
    (a, b), (_, d) = weights(), weights()
    assert ask(a, b)[0] != ask(a, d)[0] and ask(a, b)[1] == ask(a, d)[1] == 2


def test_copies_say_when_another_call_came_between(ask):
    (a, b), (c, d) = weights(), weights()
    plan = make_plan(SonicMoEConfig(use_fp8=True), "swiglu", storage="bfloat16", device="cuda", arch="sm_90a")
    _, still_good = fp8_weights.fp8_weights(a, b, plan)
    ask(c, d)
    assert still_good()
    ask(a, b)
    assert not still_good()


def test_copied_weights_have_their_own(ask):
    """As a model that was copied whole has; and the original keeps its own."""
    layer = torch.nn.ParameterList(weights())
    first, _ = ask(*layer)
    twin = copy.deepcopy(layer)
    second, calls = ask(*twin)
    assert second != first and calls == 1 and ask(*layer) == (first, 2)


def test_views_of_one_tensor_have_their_own(ask):
    """As layers in one flat parameter have."""
    flat = torch.zeros(4, 2, 256, 128, dtype=torch.bfloat16)
    _, w2 = weights()
    numbers = {ask(flat[layer], w2)[0] for layer in range(4)}
    assert len(numbers) == 4 and {ask(flat[layer], w2)[0] for layer in range(4)} == numbers
    assert ask(flat[0].permute(1, 2, 0).permute(2, 0, 1), w2)[1] == 3  # the same view made in another way


def test_copies_go_with_their_weights(ask):
    (a, b), (c, d) = weights(), weights()
    ask(a, b), ask(c, d)
    assert len(fp8_weights._kept) == 2
    del a
    gc.collect()
    assert len(fp8_weights._kept) == 1
    ask(c, b), ask(c, b.clone())  # with others that live no longer than the call
    gc.collect()
    assert len(fp8_weights._kept) == 2
    clear_all_fp8_weight_caches()
    assert len(fp8_weights._kept) == 0 and ask(c, d)[1] == 1


def test_casts_are_not_kept(ask, monkeypatch):
    """A cast is a new tensor each time: what is kept of it would never be found again."""
    monkeypatch.setattr(fp8_weights, "quantize_weights", lambda w1, w2, recipe, backend: (w1.dtype, w2.dtype))
    (_, b), (c, _) = weights(), weights("float32")
    assert ask(c, b) == ask(c, b) == (torch.bfloat16, torch.bfloat16) and len(fp8_weights._kept) == 0
