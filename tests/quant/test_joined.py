"""Codes and scales in one allocation: where they lie, what they look like, and what is saved of them."""

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe.quant import naive
    from sonicmoe.quant.formats import QuantTensor, make_recipe
    from sonicmoe.quant.joined import TokenMajor, room_for_rows, room_for_token_major

    LIKE = torch.zeros(1)

MAKE = {"rows": lambda: room_for_rows(3, 256, LIKE), "token major": lambda: room_for_token_major(256, 384, LIKE)}
SIZES = {"rows": ((3, 256), (3, 2)), "token major": ((256, 384), (3, 256))}


@pytest.mark.parametrize("kind", MAKE)
def test_places_are_those_of_the_views(kind):
    made = MAKE[kind]()
    assert (tuple(made.data.shape), tuple(made.scale.shape)) == SIZES[kind] and tuple(made.shape) == SIZES[kind][0]
    assert made.places() == (made.data.data_ptr(), made.scale.data_ptr())
    assert made.data.dtype == torch.float8_e4m3fn and made.scale.dtype == torch.float32
    assert made.data.is_contiguous() and made.scale.is_contiguous()
    assert (made.places()[1] - made.places()[0]) % 128 == 0
    end = made.scale.data_ptr() + made.scale.numel() * 4
    assert end == made.memory.data_ptr() + made.memory.numel(), "no more memory than both take"
    assert isinstance(made, QuantTensor) == (kind == "rows") and isinstance(made, TokenMajor) == (kind != "rows")


def test_rows_stand_for_the_same_numbers_and_fit_the_same_recipes():
    wanted = naive.quantize_rows(torch.randn(3, 256), make_recipe("sm90"))
    made = room_for_rows(3, 256, LIKE)
    made.data.copy_(wanted.data), made.scale.copy_(wanted.scale)
    assert torch.equal(naive.dequantize(made), naive.dequantize(wanted))
    assert made.matches(make_recipe("sm90")) and not made.matches(make_recipe("sm100"))


@pytest.mark.parametrize("joined", [True, False])
def test_taken_apart_and_put_together_elsewhere(joined):
    """As hooks on saved tensors do it: what makes it again must know nothing of where it was."""
    made = room_for_rows(3, 256, LIKE) if joined else naive.quantize_rows(torch.randn(3, 256), make_recipe("sm90"))
    parts, together = made.taken_apart()
    assert len(parts) == (1 if joined else 2)
    again = together(*[part.clone() for part in parts])
    assert type(again) is type(made) and again.block == made.block and again.shape == made.shape
    assert again.places() == (again.data.data_ptr(), again.scale.data_ptr()) != made.places()
    assert torch.equal(again.data.view(torch.uint8), made.data.view(torch.uint8))
    assert torch.equal(again.scale.view(torch.int32), made.scale.view(torch.int32))


def test_no_rows():
    made = room_for_rows(0, 256, LIKE)
    assert tuple(made.data.shape) == (0, 256) and tuple(made.scale.shape) == (0, 2)
