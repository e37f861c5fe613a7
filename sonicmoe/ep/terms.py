"""What all ranks must have alike in a call.

It rides beside the counts as one number, so ranks that differ learn of it before a row has left. All of them get an
error that says in what, where they would wait for rows that nobody sends, or read others' bytes as something else.
"""

from typing import NamedTuple, NoReturn

import torch

from .. import checks
from ..launch import beside


class Terms(NamedTuple):
    n_experts: int
    slots: int
    channels: int
    dtype: str
    fp8_dispatch: bool
    fp8_combine_grad: bool
    any_gradient: bool  # also for the experts alone: whether there will be a backward
    x_wants_gradient: bool
    probs_wants_gradient: bool

    def column(self, counts_RC):
        """[R,1] int64, to go beside the counts."""
        size, place = checks.shape_of(counts_RC)[0], beside(counts_RC)
        return torch.full([size, 1], self._number(), dtype=torch.int64, device=place)

    def require_same(self, numbers: list[int]) -> None:
        """``numbers``: what came from each rank. A GPU waits meanwhile."""
        mine = self._number()
        for rank, number in enumerate(numbers):
            if number != mine:
                self._tell(number, rank)

    def _tell(self, number: int, rank: int) -> NoReturn:
        for value, (name, bits) in zip(reversed(self._values()), reversed(_FIELDS), strict=True):
            number, theirs = divmod(number, 1 << bits)
            if theirs != value % (1 << bits):
                given, other = (_spelled(name, code) for code in (value, theirs))
                raise ValueError(f"{name}: got {given}, but {other} on rank {rank}; need the same on all ranks")
        raise ValueError(f"counts: what came from rank {rank} are no counts of this call; need the same calls on all")

    def _values(self) -> list[int]:
        return [_DTYPES.index(value) if isinstance(value, str) else int(value) for value in self]

    def _number(self) -> int:
        number = 0
        for value, (_, bits) in zip(self._values(), _FIELDS, strict=True):
            number = number << bits | value % (1 << bits)
        return number


_DTYPES = checks.FLOAT_DTYPES
# As an error names them, and how many bits each gets: 51 together, which float64 holds, through which a framework's
# scalar may go.
_FIELDS = (
    ("n_experts", 14), ("slots of a token in indices", 10), ("channels of x", 20), ("dtype of x", 2),
    ("fp8_dispatch", 1), ("fp8_combine_grad", 1), ("any gradient of x, probs and experts wanted", 1),
    ("gradient of x wanted", 1), ("gradient of probs wanted", 1),
)  # fmt: skip


def _spelled(name: str, code: int) -> str:
    if name.startswith("dtype"):
        return _DTYPES[code] if code < len(_DTYPES) else str(code)
    return str(bool(code) if dict(_FIELDS)[name] == 1 else code)
