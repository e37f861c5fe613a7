"""What dispatch and combine ask of a process group, and the group of one.

Rows are int32 words [N,W]: bytes on their way, whatever they mean at either end.
"""

from typing import Any, Protocol


class Flight(Protocol):
    """Rows under way."""

    def wait(self) -> Any:
        """The rows that came, in order of the ranks they came from."""


class Communicator(Protocol):
    """Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def exchange_counts(self, counts_RC):
        """int64 [R,C]: row r goes to rank r; row r of the result came from rank r. Waits for no device."""

    def begin_exchange(self, rows, sent: list[int], received: list[int]) -> Flight:
        """Send the first ``sent[0]`` rows to rank 0, the next to rank 1 and so on."""

    def sum_(self, tensor):
        """The sum over the ranks, in the tensor's own memory."""

    def barrier(self) -> None: ...


class OfProcesses:
    """What stands for a group of processes: the copy of a layer talks to the same ones, over the same connections."""

    def __deepcopy__(self, memo):
        return self


class Landed:
    """Rows that are there already."""

    def __init__(self, rows):
        self.rows = rows

    def wait(self):
        return self.rows


class Alone:
    """One rank that holds all experts, without a process group."""

    rank, size = 0, 1

    def exchange_counts(self, counts_RC):
        return counts_RC

    def begin_exchange(self, rows, sent, received):
        return Landed(rows)

    def sum_(self, tensor):
        return tensor

    def barrier(self):
        pass
