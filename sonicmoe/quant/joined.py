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

    def __init__(self, height: int, width: int, memory):
        start = memory.data_ptr() or 0  # there is none of an empty one under Paddle
        self.memory, self.shape, self._places = memory, (height, width), (start, start + height * width)

    @property
    def data(self):
        height, width = self.shape
        return self.memory.view(torch.uint8)[: height * width].view(torch.float8_e4m3fn).reshape([height, width])

    @property
    def scale(self):
        height, width = self.shape
        # Cut after the change of type: Paddle mistakes where a slice begins in a view of a type of another width.
        return self.memory.view(torch.float32)[height * width // 4 :].reshape(self.scale_shape())

    def places(self) -> tuple[int, int]:
        return self._places

    def taken_apart(self):
        return (self.memory,), partial(type(self), *self.shape)


class JoinedRows(Joined, QuantTensor):
    """Rows, quantized along them as recipe ``sm90`` does it."""

    block, shape = (1, FP8_ROW_BLOCK), None

    def scale_shape(self) -> list[int]:
        return [self.shape[0], self.shape[1] // FP8_ROW_BLOCK]


@dataclass(eq=False)
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

    def scale_shape(self) -> list[int]:
        return [self.shape[1] // FP8_ROW_BLOCK, self.shape[0]]


# Codes come in 128s, so that their scales, 4 bytes each, begin where a multiple of 128 bytes ends.
_CODES_A_SCALE_BYTE = FP8_ROW_BLOCK // 4


def room_for_rows(n_rows: int, columns: int, like) -> JoinedRows:
    codes = n_rows * columns
    size = codes + codes // _CODES_A_SCALE_BYTE
    return JoinedRows(n_rows, columns, torch.empty(size, dtype=torch.float8_e4m3fn, device=beside(like)))


def room_for_token_major(columns: int, n_rows: int, like) -> JoinedTokenMajor:
    codes = n_rows * columns
    size = codes + codes // _CODES_A_SCALE_BYTE
    return JoinedTokenMajor(columns, n_rows, torch.empty(size, dtype=torch.float8_e4m3fn, device=beside(like)))
