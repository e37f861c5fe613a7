"""Tensors as rows of int32 words, for the way between ranks: one type to gather, to join and to send, whatever the
backend can do with bf16 and e4m3."""

import torch

from .. import checks
from ..launch import beside

WORD_BYTES = 4
ITEM_BYTES = {**checks.ITEMSIZE, checks.FP8_DTYPE: 1, "int32": 4}


def words_in(columns: int, dtype: str) -> int:
    return columns * ITEM_BYTES[dtype] // WORD_BYTES


def to_words(rows):
    """[N,C] -> [N, words], the same bytes."""
    n_rows, columns = checks.shape_of(rows)
    wide = words_in(columns, checks.dtype_name(rows))
    if n_rows == 0:
        return torch.zeros([0, wide], dtype=torch.int32, device=beside(rows))
    rows = rows.contiguous()
    view = rows.view(torch.int32)
    # Paddle's view of a slice in another item size begins at the wrong byte: then that of a copy.
    return view if view.data_ptr() == rows.data_ptr() else rows.clone().view(torch.int32)


def from_words(words, dtype: str):
    """[N, words] -> [N,C] of ``dtype``. ``words`` are what an exchange brought, no slice of it."""
    n_rows, wide = checks.shape_of(words)
    if n_rows == 0:
        return torch.zeros(
            [0, wide * WORD_BYTES // ITEM_BYTES[dtype]], dtype=getattr(torch, dtype), device=beside(words)
        )
    return words.view(getattr(torch, dtype))
