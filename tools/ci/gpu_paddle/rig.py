"""The Paddle process on a GPU: its device, tensors there, a layer of experts, and what the plugin counted."""

import ctypes
import os
from pathlib import Path

import numpy as np
import paddle
from gpu_paddle.problem import RECIPES

from sonicmoe import SonicMoEConfig, SonicMoEMlpNode

COUNTERS = (
    "synchronize device",
    "synchronize stream",
    "synchronize event",
    "copy to device",
    "copy to host",
    "copy to device async",
    "copy to host async",
    "allocations",
    "releases",
    "streams",
    "events",
)
WAITS = COUNTERS[:7]  # an asynchronous copy of pageable memory waits as well


class Plugin:
    """The plugin's own counts; nothing of it on Paddle's own GPU backend."""

    def __init__(self):
        files = sorted(Path(os.environ.get("CUSTOM_DEVICE_ROOT", "/nowhere")).glob("libsonicmoe_gpu.so"))
        self.library = ctypes.CDLL(str(files[0])) if files else None
        if self.library is not None:
            for name in ("counter", "bytes_in_use", "bytes_held"):
                getattr(self.library, f"paddle_cuda_device_{name}").restype = ctypes.c_int64

    def counts(self) -> dict[str, int]:
        if self.library is None:
            return {}
        return {name: self.library.paddle_cuda_device_counter(number) for number, name in enumerate(COUNTERS)}

    def bytes_held(self, device: int = 0) -> int:
        return self.library.paddle_cuda_device_bytes_held(device)

    def bytes_in_use(self, device: int = 0) -> int:
        return self.library.paddle_cuda_device_bytes_in_use(device)


def tensor(value: np.ndarray, place=None):
    """On the current device, or at ``place``. bf16 as uint16 bits."""
    if value.dtype != np.uint16:
        return paddle.to_tensor(np.ascontiguousarray(value), place=place)
    return paddle.to_tensor(np.ascontiguousarray(value).view(np.int16), place=place).view("bfloat16")


def bits(tensor_) -> np.ndarray:
    """On the host; bf16 as int16 bits."""
    host = tensor_.detach().cpu()
    return host.contiguous().view("int16").numpy() if host.dtype == paddle.bfloat16 else host.numpy()


def numbers(tensor_) -> np.ndarray:
    return tensor_.detach().cpu().astype("float32").numpy()


SETTINGS = {}  # of every layer that does not say otherwise


class _Projection:
    def __init__(self, weight):
        self.weight = weight


class Expert:
    def __init__(self, w1, w2):
        self.up_gate_proj, self.down_proj = _Projection(w1), _Projection(w2)


def parameter(value: np.ndarray, place=None):
    made = tensor(value, place)
    made.stop_gradient = False
    return made


class Layer:
    """A node over its own experts, and inputs that want gradients."""

    def __init__(self, given, recipe: str = "bf16", place=None, fused: bool = False, **settings):
        self.given, self.place = given, place
        w1, w2 = given["w1"], given["w2"]
        if fused:
            self.experts = type("Fused", (), {})()
            self.experts.weight1, self.experts.weight2 = parameter(w1, place), parameter(w2, place)
        else:
            self.experts = [Expert(parameter(a, place), parameter(b, place)) for a, b in zip(w1, w2, strict=True)]
        self.ids, self.dout = tensor(given["ids"], place), tensor(given["dout"], place)
        self.counts = given["counts"].tolist()
        n_experts, hidden, width = w1.shape
        config = SonicMoEConfig(**(SETTINGS | RECIPES[recipe] | settings))
        self.node = SonicMoEMlpNode(self.experts, n_experts, hidden, width // 2, config=config)
        self.x, self.probs = self.fresh()

    def fresh(self):
        x, probs = tensor(self.given["x"], self.place), tensor(self.given["probs"], self.place)
        x.stop_gradient = probs.stop_gradient = False
        return x, probs

    def parameters(self) -> list:
        if hasattr(self.experts, "weight1"):
            return [self.experts.weight1, self.experts.weight2]
        return [e.up_gate_proj.weight for e in self.experts] + [e.down_proj.weight for e in self.experts]

    def forward(self, x=None, probs=None):
        x, probs = (self.x, self.probs) if x is None else (x, probs)
        return self.node(x, self.counts, self.ids, probs)

    def step(self):
        """Forward and backward with nothing added up on the tape's leaves."""
        self.x.clear_gradient(False)
        self.probs.clear_gradient(False)
        self.x.grad = self.probs.grad = None
        out = self.forward()
        out.backward(self.dout)
        return out

    def results(self, convert=bits) -> dict[str, np.ndarray]:
        out = self.step()
        found = {"out": convert(out), "dx": convert(self.x.grad), "ds": convert(self.probs.grad)}
        self.node.step()
        return found | self.weight_gradients(convert)

    def weight_gradients(self, convert=bits) -> dict[str, np.ndarray]:
        grads = [convert(p.main_grad) for p in self.parameters()]
        half = len(grads) // 2
        w1, w2 = (grads[0], grads[1]) if half == 1 and grads[0].ndim == 3 else (grads[:half], grads[half:])
        return {"dw1": np.stack(list(w1)), "dw2": np.stack(list(w2))}


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm; NaN and Inf are not close to anything."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return float("inf")
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / norm if norm else float(np.linalg.norm(found))
