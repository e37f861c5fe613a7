"""The tile of each GEMM, chosen from ``benchmarks/tiles.csv``, which ``tools/tune_tiles.py`` made; nothing is tuned
where people train.

One tile an operation serves every shape: each more would have to be compiled, and what a shape could gain by one of its
own is a few percent of one GEMM in that table.
"""

from .gemm_kernel import Tile

TILES = {
    "up": Tile(128, 192, 2, 1, pingpong=True),
    "up_z": Tile(128, 192, 2, 1, pingpong=True),
    "down": Tile(128, 192, 1, 2, pingpong=True),
    "dx": Tile(128, 192, 1, 2, pingpong=True),
    # Larger ones spill: the accumulator, z and three results share the registers.
    "down_backward": Tile(128, 128, 2, 1, pingpong=True),
    "wgrad": Tile(256, 192, 2, 1),
}
