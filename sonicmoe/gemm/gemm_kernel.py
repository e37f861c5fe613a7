"""Names for compiled GEMMs: what one computes and how it is tiled. Static facts only, never a token count.

The grouped problems, over M sorted rows in E segments (legend in ``api.py``):

    up             z [M,F] = x[gather] @ W1^T, and a = activation(z) beside it
    up_z           z alone, where forward is run again for its backward
    rows           y [M,N] = a [M,K] @ B, B [E,N,K] (down-projection) or [E,K,N] read transposed (dx)
    down_backward  dA = dout[gather] @ W2; z -> dz = activation'(z, p dA), pa = p*a, and parts of ds = <dA, a>
    wgrad          D[e] = (+=) left[gather]^T @ right, the sum over the segment's rows
"""

import hashlib
import json
from dataclasses import asdict, dataclass

OPS = ("up", "up_z", "rows", "down_backward", "wgrad")
GATHERING = ("up", "up_z", "down_backward", "wgrad")


@dataclass(frozen=True)
class Tile:
    """What one thread block computes at a time. ``pingpong``: two warpgroups take turns on tiles of their own, so that
    one's epilogue hides behind the other's products."""

    m: int
    n: int
    cluster_m: int = 2
    cluster_n: int = 1
    pingpong: bool = False
    k: int | None = None  # of one step along the summed dimension; None is 64

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n


@dataclass(frozen=True)
class GemmKernel:
    op: str
    tile: Tile
    storage: str = "bfloat16"
    activation: str | None = None
    clamp: float | None = None
    transposed: bool = False  # rows: B is [E,K,N]; wgrad: D lies as [E,N,M]
    out: str | None = None  # wgrad: dtype of D; None is the storage type
    accumulate: bool = False  # wgrad: D += in the store
    arch: str = "sm_90a"

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def unsupported(op: str, tile: Tile, glu: bool = True, transposed: bool = False) -> str | None:
    """Why the generator cannot make this tile for sm_90, or None."""
    if tile.cluster_m not in (1, 2) or tile.cluster_n not in (1, 2):
        return "a cluster has 1 or 2 blocks a side"
    if op in GATHERING and tile.cluster_n != 1:
        return "gathered rows cannot be shared across a cluster"
    if op in GATHERING and tile.n == 208:
        return "gathering leaves too little shared memory for 208 columns"
    if op == "up" and glu and tile.n % 32:
        return "pairs of gate and up leave in groups of 32 columns"
    if tile.m == 192 and tile.n > 128 and (transposed or op in ("down_backward", "wgrad")):
        return "192 rows halve the columns between two warpgroups, and transposed operands come in 64 columns"
    if tile.pingpong:
        most = {64: 256, 128: 208, 192: 128}.get(tile.m, 0)
        return None if tile.n % 16 == 0 and 0 < tile.n <= most else f"pingpong holds at most {most} columns"
    if tile.m not in (64, 128, 192, 256):
        return "rows come in 64, 128, 192 or 256"
    most = 256 if tile.m <= 192 else 208
    if tile.n % (32 if tile.m == 192 else 16) or not 0 < tile.n <= most:
        return f"{tile.m} rows hold at most {most} columns"
    return None
