"""Rank 1 adds up twice as many numbers as rank 0: neither may come to a result."""

import os

import paddle
import paddle.distributed as dist

dist.init_parallel_env()
dist.all_reduce(paddle.ones([4]))  # in step
try:
    dist.all_reduce(paddle.ones([4 * (1 + dist.get_rank())]))
except OSError:
    os._exit(0)
raise AssertionError("a sum of vectors of different lengths")
