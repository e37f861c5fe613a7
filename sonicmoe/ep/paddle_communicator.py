"""A paddle.distributed group as a ``Communicator``.

Gloo in Paddle knows no alltoall: there pairs of ranks send to each other, round by round.
"""

import paddle
import paddle.distributed as dist

from .communicator import Alone, Landed, OfProcesses


class _Task:
    def __init__(self, rows, task, source):
        self.rows, self.task, self.source = rows, task, source

    def wait(self):
        if self.task is not None:
            self.task.wait()
            self.task = self.source = None
        return self.rows


def _cut(rows, counts: list[int]) -> list:
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return [rows[start : start + count] for start, count in zip(starts, counts, strict=True)]


class _AllToAll(OfProcesses):
    """Where the backend has it."""

    def __init__(self, group):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange_counts(self, counts_RC):
        found = paddle.empty_like(counts_RC)
        dist.alltoall_single(out_tensor=found, in_tensor=counts_RC, group=self.group)
        return found

    def begin_exchange(self, rows, sent, received):
        found = paddle.empty([sum(received), rows.shape[1]], dtype=rows.dtype)
        task = dist.alltoall_single(
            out_tensor=found, in_tensor=rows, in_split_sizes=sent, out_split_sizes=received, group=self.group,
            sync_op=False,
        )  # fmt: skip
        return _Task(found, task, rows)

    def sum_(self, tensor):
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self):
        dist.barrier(self.group)


class _OnPlugin(_AllToAll):
    """For a device plugin (xccl). Operators that it has no kernel for run on the CPU, and may leave their results
    there, as those without an element; collectives take what is on the device."""

    def __init__(self, group):
        super().__init__(group)
        self.place = paddle.zeros([1]).place

    def _moved(self, tensor):
        return tensor if tensor.place == self.place else tensor.to(self.place)

    def exchange_counts(self, counts_RC):
        return super().exchange_counts(self._moved(counts_RC))

    def begin_exchange(self, rows, sent, received):
        return super().begin_exchange(self._moved(rows), sent, received)

    def sum_(self, tensor):
        there = super().sum_(self._moved(tensor))
        return tensor if there is tensor else tensor.copy_(there)


class _Pairs(_AllToAll):
    """Composed of send and recv, for gloo.

    A message there has a number that each rank counts for itself, one a call, and it reaches only the call with the
    same number. So every rank makes the same number of calls: each round pairs all of them, each pair sends both ways,
    and no rows are sent as one that nobody reads. Of a pair the lower rank sends first: no two wait for each other.
    """

    def __init__(self, group):
        super().__init__(group)
        if self.size % 2:
            raise ValueError(f"group: got {self.size} ranks on gloo, need an even number: they exchange in pairs")
        self.names = list(group.ranks) if group is not None else list(range(self.size))

    def exchange_counts(self, counts_RC):
        return self.begin_exchange(counts_RC, [1] * self.size, [1] * self.size).wait()

    def begin_exchange(self, rows, sent, received):
        mine, came = _cut(rows, sent), {}
        for number in range(self.size - 1):
            peer = self._partner(number)
            leaves = mine[peer].clone() if sent[peer] else paddle.zeros([1, rows.shape[1]], dtype=rows.dtype)
            came[peer] = paddle.zeros([max(received[peer], 1), rows.shape[1]], dtype=rows.dtype)
            steps = [(dist.send, leaves), (dist.recv, came[peer])]
            for move, part in steps if self.rank < peer else reversed(steps):
                move(part, self.names[peer], group=self.group)
        came[self.rank] = mine[self.rank]
        return Landed(paddle.concat([came[rank][: received[rank]] for rank in range(self.size)]))

    def _partner(self, number: int) -> int:
        """As in a tournament: the last rank sits still, and pairs of the others add up to the round's number."""
        around = self.size - 1
        if self.rank == around:
            return number * self.size // 2 % around
        partner = (number - self.rank) % around
        return around if partner == self.rank else partner


def of(group=None):
    """The group's communicator; without paddle.distributed, or in a group of one, that of a rank alone."""
    if group is None and not dist.is_initialized():
        return Alone()
    # Of a group of one Paddle says that nobody is in it.
    if dist.get_world_size(group) == 1 or (group is not None and list(group.ranks) == [dist.get_rank()]):
        return Alone()
    if group is not None and dist.get_rank() not in group.ranks:
        raise ValueError(f"group: got ranks {list(group.ranks)}, need some with this process, rank {dist.get_rank()}")
    return {"gloo": _Pairs, "xccl": _OnPlugin}.get(dist.get_backend(group).lower(), _AllToAll)(group)
