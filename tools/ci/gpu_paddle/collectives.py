"""Paddle's collectives on a device of the plugin, each held exactly to NumPy: all that they do here is move numbers and
add small integers."""

import numpy as np
import paddle
import paddle.distributed as dist

CHECKS = {}
# Paddle gathers no int16, and knows no collective of e4m3.
MOVED = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "bool")
ADDED = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")


def check(function):
    CHECKS[function.__name__] = function
    return function


def drawn(rank: int, *shape, high: int = 8) -> np.ndarray:
    """What a rank has: every rank knows what all others drew."""
    return np.random.default_rng([rank, *shape]).integers(0, high, shape)


def tensor(values, dtype: str):
    return paddle.to_tensor(np.asarray(values, np.float32 if dtype != "int64" else np.int64)).astype(dtype)


def same(found, wanted, dtype: str, what=""):
    wanted = wanted.astype(bool) if dtype == "bool" else wanted
    assert list(found.shape) == list(wanted.shape), (what, found.shape, wanted.shape)
    values = found.cpu().astype("float64").numpy()
    np.testing.assert_array_equal(values, wanted.astype(np.float64), err_msg=f"{dtype} {what}")


def every(size: int, *shape, **settings) -> list[np.ndarray]:
    return [drawn(rank, *shape, **settings) for rank in range(size)]


@check
def all_reduce(rank, size):
    reductions = {"SUM": np.sum, "MAX": np.max, "MIN": np.min, "PROD": np.prod}
    for dtype in ADDED:
        for name, reduction in reductions.items():
            given = every(size, 33, 5, high=4)
            found = tensor(given[rank], dtype)
            dist.all_reduce(found, op=getattr(dist.ReduceOp, name))
            same(found, reduction(given, axis=0), dtype, name)
    large = tensor([1 << 40, rank], "int64")  # no float in between
    dist.all_reduce(large)
    assert large.tolist() == [size << 40, size * (size - 1) // 2]


@check
def all_reduce_of_a_view(rank, size):
    given = every(size, 6, 4)
    found = tensor(given[rank], "float32")
    part = found[2:4]
    dist.all_reduce(part)
    same(part, sum(values[2:4] for values in given), "float32")


@check
def reduce(rank, size):
    for root in range(size):
        given = every(size, 9)
        found = tensor(given[rank], "float32")
        dist.reduce(found, dst=root)
        if rank == root:
            same(found, sum(given), "float32", root)


@check
def broadcast(rank, size):
    for dtype in MOVED:
        for root in range(size):
            given = every(size, 17, 3)
            found = tensor(given[rank], dtype)
            dist.broadcast(found, src=root)
            same(found, given[root], dtype, root)


@check
def all_gather(rank, size):
    for dtype in MOVED:
        given, found = every(size, 5, 3), []
        dist.all_gather(found, tensor(given[rank], dtype))
        assert len(found) == size
        for one, wanted in zip(found, given, strict=True):
            same(one, wanted, dtype)


@check
def reduce_scatter(rank, size):
    for dtype in ADDED:
        given, found = every(size, size * 4, 3), tensor(np.zeros([4, 3]), dtype)
        parts = paddle.chunk(tensor(given[rank], dtype), size)
        dist.reduce_scatter(found, parts)
        same(found, sum(given)[4 * rank : 4 * rank + 4], dtype)


@check
def send_and_recv(rank, size):
    """Around in a ring: even ranks send first."""
    after, before = (rank + 1) % size, (rank - 1) % size
    for dtype in MOVED:
        found = tensor(np.zeros([11]), dtype)
        steps = [lambda: dist.send(tensor(drawn(rank, 11), dtype), after), lambda: dist.recv(found, before)]  # noqa: B023
        for step in steps if rank % 2 == 0 else reversed(steps):
            step()
        same(found, drawn(before, 11), dtype)


def exchanged(rank, size, counts, width: int, dtype: str, sync_op: bool = True):
    """counts[i][j]: rows from i to j. Empty on a side is no row at all."""
    given = [drawn(source, sum(counts[source]), width) for source in range(size)]
    received = [counts[source][rank] for source in range(size)]
    found = paddle.empty([sum(received), width], dtype=dtype)
    task = dist.alltoall_single(
        found, tensor(given[rank], dtype), in_split_sizes=counts[rank], out_split_sizes=received, sync_op=sync_op
    )
    parts = []
    for source in range(size):
        start = sum(counts[source][:rank])
        parts.append(given[source][start : start + received[source]])
    return task, found, np.concatenate(parts)


@check
def all_to_all(rank, size):
    for dtype in MOVED:
        given = every(size, size * 2, 3)
        found = tensor(np.zeros([size * 2, 3]), dtype)
        dist.alltoall_single(found, tensor(given[rank], dtype))
        same(found, np.concatenate([values[2 * rank : 2 * rank + 2] for values in given]), dtype, "even")
        counts = [[(3 * i + 5 * j + i * j) % 7 for j in range(size)] for i in range(size)]
        _, found, wanted = exchanged(rank, size, counts, 4, dtype)
        same(found, wanted, dtype, "uneven")


@check
def all_to_all_with_nothing(rank, size):
    """Where nothing goes to some, where one rank has or gets nothing, and where nobody sends at all."""
    kinds = {
        "to the next alone": lambda i, j: 3 if j == (i + 1) % size else 0,
        "all to rank 0": lambda i, j: 2 + i if j == 0 else 0,
        "all from the last": lambda i, j: 1 + j if i == size - 1 else 0,
        "to itself alone": lambda i, j: 4 if i == j else 0,
        "nowhere": lambda i, j: 0,
    }
    for name, rows in kinds.items():
        counts = [[rows(i, j) for j in range(size)] for i in range(size)]
        _, found, wanted = exchanged(rank, size, counts, 3, "int32")
        same(found, wanted, "int32", name)


@check
def several_under_way(rank, size):
    """Begun in a row and waited for later, with work of the device between: streams keep the order."""
    rows = 64
    counts = [[rows] * size for _ in range(size)]
    begun = [exchanged(rank, size, counts, 256, "int32", sync_op=False) for _ in range(4)]
    extra = paddle.ones([256, 256])
    for _ in range(20):
        extra = extra + extra * 0.5
    for task, found, wanted in begun:
        task.wait()
        same(found + found, 2 * wanted, "int32")


@check
def groups_of_some(rank, size):
    """Even and odd ranks apart; with fewer than four a group would have one rank."""
    if size < 4:
        return
    apart = [dist.new_group(list(range(first, size, 2))) for first in range(2)]
    mine, members = apart[rank % 2], list(range(rank % 2, size, 2))
    given = every(size, 9)
    found = tensor(given[rank], "int32")
    dist.all_reduce(found, group=mine)
    same(found, sum(given[member] for member in members), "int32")
    found = tensor(given[rank], "int32")
    dist.broadcast(found, src=members[-1], group=mine)
    same(found, given[members[-1]], "int32")
    parts = every(size, len(members), 3)
    found = tensor(np.zeros([len(members), 3]), "int32")
    dist.alltoall_single(found, tensor(parts[rank], "int32"), group=mine)
    same(found, np.stack([parts[member][members.index(rank)] for member in members]), "int32")


@check
def barrier(rank, size):
    for _ in range(3):
        dist.barrier()


def check_all(rank: int, size: int) -> list[str]:
    for function in CHECKS.values():
        function(rank, size)
    return list(CHECKS)
