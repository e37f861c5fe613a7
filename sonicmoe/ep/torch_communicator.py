"""A torch.distributed group as a ``Communicator``. On NCCL exchanges run on a stream of their own."""

import torch
import torch.distributed as dist

from .communicator import Alone, OfProcesses


class _Work:
    def __init__(self, rows, work, source):
        self.rows, self.work, self.source = rows, work, source

    def wait(self):
        if self.work is not None:
            self.work.wait()  # on a GPU the stream waits, not the host
            self.work = self.source = None
        return self.rows


class TorchCommunicator(OfProcesses):
    def __init__(self, group=None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange_counts(self, counts_RC):
        found = torch.empty_like(counts_RC)
        dist.all_to_all_single(found, counts_RC.contiguous(), group=self.group)
        return found

    def begin_exchange(self, rows, sent, received):
        found = torch.empty([sum(received), rows.shape[1]], dtype=rows.dtype, device=rows.device)
        work = dist.all_to_all_single(found, rows, received, sent, group=self.group, async_op=True)
        return _Work(found, work, rows)

    def sum_(self, tensor):
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self):
        dist.barrier(self.group)


def of(group=None):
    """The group's communicator; without torch.distributed, or in a group of one, that of a rank alone."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Alone()
    if dist.get_rank(group) < 0:  # and its size is -1: experts could be shared out by that, and nobody would get any
        raise ValueError(f"group: got one without this process, rank {dist.get_rank()}; need a group that it is in")
    return Alone() if dist.get_world_size(group) == 1 else TorchCommunicator(group)
