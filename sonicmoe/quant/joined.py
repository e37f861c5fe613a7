"""e4m3 codes and behind them their float32 scales, one for each 128 codes, in one allocation.

Kernels take addresses. A view costs the host as much as an allocation, so none is made but for who asks for one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..launch import address, beside
from .formats import FP8_ROW_BLOCK, QuantTensor


class Joined:
    """In the place of a class with ``data`` and ``scale``: these are views, made anew for each who asks."""

    # The frozen class beside it has another, which would cost more than all the rest.
    __setattr__ = object.__setattr__

    def __init__(self, memory, sizes: tuple[int, int], scale_sizes: tuple[int, int]):
        self.memory, self.shape, self.scale_shape = memory, sizes, scale_sizes
        start = address(memory)
        self._places = start, start + sizes[0] * sizes[1]

    @property
    def data(self):
        height, width = self.shape
        return self.memory[: height * width].view(torch.float8_e4m3fn).reshape([height, width])

    @property
    def scale(self):
        height, width = self.shape
        return self.memory[height * width :].view(torch.float32).reshape(list(self.scale_shape))

    def places(self) -> tuple[int, int]:
        return self._places

    def taken_apart(self):
        return (self.memory,), partial(_around, type(self), self.shape, self.scale_shape)


def _around(kind, sizes, scale_sizes, memory) -> Joined:
    return kind(memory, sizes, scale_sizes)


class JoinedRows(Joined, QuantTensor):
    """Rows, quantized along them as recipe ``sm90`` does it."""

    block, shape = (1, FP8_ROW_BLOCK), None


@dataclass(frozen=True)
class TokenMajor:
    """An operand of wgrad: e4m3 [C,M] with a scale for each column of C and block of 128 tokens, [M/128,C]."""

    data: Any
    scale: Any

    @property
    def shape(self):
        return self.data.shape

    def places(self) -> tuple[int, int]:
        return address(self.data), address(self.scale)


class JoinedTokenMajor(Joined, TokenMajor):
    shape = None


def room_for_rows(n_rows: int, columns: int, like) -> JoinedRows:
    return JoinedRows(_room(n_rows * columns, like), (n_rows, columns), (n_rows, columns // FP8_ROW_BLOCK))


def room_for_token_major(columns: int, n_rows: int, like) -> JoinedTokenMajor:
    return JoinedTokenMajor(_room(columns * n_rows, like), (columns, n_rows), (n_rows // FP8_ROW_BLOCK, columns))


def _room(codes: int, like):
    # Codes come in 128s, so that their scales, 4 bytes each, begin where a multiple of 128 bytes ends.
    return torch.empty(codes + codes // (FP8_ROW_BLOCK // 4), dtype=torch.uint8, device=beside(like))
