"""Who is measured, and how each provider's process is started."""

import os
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1]
CHECKOUT = BENCHMARKS.parent
WORKER = (sys.executable, "-m", "moe_bench.worker")

# Below the provider's own folder, so that nothing one provider compiled or tuned serves another, or an earlier run.
CACHES = {
    "SONIC_MOE_CACHE_DIR": "cache/sonicmoe",
    "TRITON_CACHE_DIR": "cache/triton",
    "QUACK_CACHE_DIR": "cache/quack",
    "CUTE_DSL_CACHE_DIR": "cache/cute",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
    "CUDA_CACHE_PATH": "cache/cuda",
    "XDG_CACHE_HOME": "cache/xdg",
    "HOME": "home",
    "TMPDIR": "tmp",
}
# What a caller's shell may have set and what must not change what a provider does. Without bytecode every start would
# compile the sources of torch, which takes longer than all of ours.
DROPPED = ("SONIC_MOE_", "QUACK_", "CUTE_DSL_", "PYTHONPATH", "USE_QUACK_GEMM", "PYTHONDONTWRITEBYTECODE")


@dataclass(frozen=True)
class Provider:
    """``relative`` and ``cosine`` bound the difference from the float64 reference, for each tensor."""

    name: str
    in_checkout: bool  # the package of this checkout, or one from a folder of site packages
    relative: float = 0.01
    cosine: float = 0.0
    # Adds weight gradients into `.main_grad` itself and leaves `.grad` alone; else the caller adds them after backward.
    adds_main_grad: bool = False
    captures: bool = False  # its forward and backward wait for nothing, so that a CUDA graph can hold them
    # For the per-kernel table: GEMMs in the order of their launches, and with them, where one may be several launches,
    # what tells its kernel from others.
    gemms: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()  # distributions whose versions belong to a result
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = WORKER

    def pythonpath(self, sites: list[str]) -> str:
        own = [str(CHECKOUT)] if self.in_checkout else []
        return os.pathsep.join([*own, *sites, str(BENCHMARKS)])

    def environment(self, folder: pathlib.Path, sites: list[str], extra: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
        caches = {name: str(folder / below) for name, below in CACHES.items()}
        for path in caches.values():
            pathlib.Path(path).mkdir(parents=True, exist_ok=True, mode=0o700)
        return kept | caches | dict(self.env) | dict(extra) | {"PYTHONPATH": self.pythonpath(sites)}


GEMMS_IN_ORDER = ("up", "down", "dA", "dW2", "dx", "dW1")

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            name="sonicmoe-bf16",
            in_checkout=True,
            adds_main_grad=True,
            captures=True,
            gemms=GEMMS_IN_ORDER,
            packages=("quack-kernels", "nvidia-cutlass-dsl"),
        ),
        Provider(
            name="sonicmoe-fp8",
            in_checkout=True,
            # The format's floors (docs/precision.md), of which the router's gradient has more from few values.
            relative=0.08,
            cosine=0.9965,
            adds_main_grad=True,
            captures=True,
            gemms=("up", "down", "dA", "dx", "dW1", "dW2"),
            kernels=("UpKind", "RowsKind", "DownBackwardKind", "RowsKind", "WgradKind", "WgradKind"),
            env={"SONIC_MOE_FP8_MODE": "perf", "SONIC_MOE_FP8_WGRAD": "1"},
        ),
        Provider(
            name="sonic-moe",
            in_checkout=False,
            gemms=GEMMS_IN_ORDER,
            packages=("quack-kernels", "nvidia-cutlass-dsl"),
        ),
    )
}
BASELINE = "sonic-moe"


def peer_sites(site: str) -> list[str]:
    """The published package's cutlass-dsl keeps its Python below a folder that only a .pth file would add."""
    return [site, str(pathlib.Path(site, "nvidia_cutlass_dsl", "python_packages"))]
