"""One provider on one device. Started by the runner with the provider's own packages on its path.

Both providers export `sonicmoe.MoE` with the same parameters, so the code that drives and measures them is the same.
A step is what a user of the layer writes: the module's call (router, top K, experts, auxiliary loss) and, unless only
the forward is asked for, a backward from a given gradient of its output.
"""

import gc
import importlib.metadata
import sys
import time

import torch

from . import dense, reference
from .protocol import serve
from .shapes import BACKWARD, BENCHED, CAPTURED, DENSE, FORWARD, MAIN_GRAD

REST = 0.5  # seconds in which a GPU that was under load finds its highest clock again


class Bench:
    def __init__(self, device: str = "cuda"):
        self.device = device
        self.on_gpu = device == "cuda"
        self.moe = self.problem = self.kernel = None
        self.replay = None
        self.iterations = {}

    # ---- what is run

    def load(self, shape: list[int], seed: int, packages: list[str]) -> dict:
        import sonicmoe
        from sonicmoe.enums import ActivationType

        self.moe = self.problem = self.kernel = self.replay = None
        self.iterations, self.shape = {}, shape
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        _, hidden, intermediate, experts, topk = shape
        sizes = dict(num_experts=experts, num_experts_per_tok=topk, hidden_size=hidden, intermediate_size=intermediate)
        with torch.device(self.device):
            moe = sonicmoe.MoE(**sizes, activation_function=ActivationType.SWIGLU, add_bias=False, std=0.02)
        self.moe = moe.to(device=self.device, dtype=torch.bfloat16)
        self.backend = sonicmoe.KernelBackendMoE.sonicmoe
        self.problem = reference.draw(shape, seed, self.device)
        with torch.no_grad():
            self.moe.router.weight.copy_(self.problem.router_EH)
            self.moe.c_fc.weight.copy_(self.problem.w1_EFH)
            self.moe.c_proj.weight.copy_(self.problem.w2_EHI)
        fingerprint = self.problem.fingerprint()
        # The parameters hold the same numbers; a second copy of them would only take room.
        self.problem.router_EH = self.moe.router.weight.detach()
        self.problem.w1_EFH = self.moe.c_fc.weight.detach()
        self.problem.w2_EHI = self.moe.c_proj.weight.detach()
        self.x = self.problem.x_TH.detach().requires_grad_()
        self.dout = self.problem.dout_TH
        return {
            "fingerprint": fingerprint,
            "device": torch.cuda.get_device_name() if self.on_gpu else self.device,
            "versions": versions(sonicmoe, packages),
            "file": sonicmoe.__file__,
        }

    def choose(self, kernel: str) -> None:
        """Give the parameters the buffers that ``kernel`` accumulates in, and take away those it does not. What is not
        run call by call is made ready."""
        if kernel == self.kernel:
            return
        self.replay = None
        for parameter in self.moe.parameters():
            if kernel == MAIN_GRAD:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            elif hasattr(parameter, "main_grad"):
                del parameter.main_grad
        self.kernel = kernel
        if kernel == CAPTURED:
            self.replay = self.captured()
        if kernel == DENSE:
            self.replay = dense.products(self.shape, self.device)

    def captured(self):
        """A step as a CUDA graph, which puts the gradients where a step puts them."""
        for _ in range(3):
            self.clear()
            self.step()
        self.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.step()
        grads = [(tensor, tensor.grad) for tensor in (self.x, *self.moe.parameters())]

        def replay():
            graph.replay()
            for tensor, grad in grads:
                tensor.grad = grad
            return out

        return replay

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.moe.parameters():
            parameter.grad = None

    def step(self) -> torch.Tensor:
        if self.replay is not None:
            return self.replay()
        out, _ = self.moe(self.x, kernel_backend_moe=self.backend)
        if self.kernel != FORWARD:
            out.backward(self.dout)
        if self.kernel == MAIN_GRAD:
            # As a framework with float32 gradient buffers does it, for every gradient that the layer has not put
            # there itself.
            for parameter in self.moe.parameters():
                if parameter.grad is not None:
                    parameter.main_grad.add_(parameter.grad)
                    parameter.grad = None
        return out

    def repeat(self, times: int) -> None:
        for _ in range(times):
            self.step()
            self.clear()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    # ---- what is asked

    def first(self, kernel: str) -> dict:
        """One step, seen to its end."""
        self.choose(kernel)
        begin = time.perf_counter()
        self.step()
        self.wait()
        seconds = time.perf_counter() - begin
        self.clear()
        return {"seconds": seconds}

    def check(self, captured: bool = False) -> dict:
        runs = {}
        for kernel in (BACKWARD, MAIN_GRAD, *([CAPTURED] if captured else [])):
            self.choose(kernel)
            self.clear()
            if kernel == MAIN_GRAD:
                for parameter in self.moe.parameters():
                    parameter.main_grad.fill_(reference.MAIN_GRAD_START)
            runs[kernel] = {"out": self.step().detach(), "dx": self.x.grad}
            weights = {"drouter": self.moe.router, "dw1": self.moe.c_fc, "dw2": self.moe.c_proj}
            for name, part in weights.items():
                if kernel == MAIN_GRAD:
                    runs[kernel][name] = part.weight.main_grad.sub_(reference.MAIN_GRAD_START)
                else:
                    runs[kernel][name] = part.weight.grad
            self.clear()
        figures = reference.compare(self.problem, runs)
        figures[FORWARD] = {"out": figures[BACKWARD]["out"]}
        figures[BENCHED] = figures[BACKWARD]  # the same steps
        self.kernel = None
        return {"figures": figures, "adds_main_grad": self.adds_main_grad()}

    def adds_main_grad(self) -> bool:
        """Whether a backward beside `main_grad` leaves the experts' `.grad` alone."""
        self.choose(MAIN_GRAD)
        out, _ = self.moe(self.x, kernel_backend_moe=self.backend)
        out.backward(self.dout)
        alone = self.moe.c_fc.weight.grad is None and self.moe.c_proj.weight.grad is None
        self.clear()
        return alone

    def time(self, kernel: str, seconds: float) -> dict:
        """One turn: steps back to back for about ``seconds``, on the host's clock and on the device's, after as many
        that are not timed: at its power limit a GPU needs a while to find the clock of what it does now, and till then
        has that of the one whose turn it was before."""
        self.choose(kernel)
        self.repeat(2)
        self.wait()
        if kernel == BENCHED:
            return self.benched()
        if kernel not in self.iterations:
            begin = time.perf_counter()
            self.repeat(3)
            self.wait()
            self.iterations[kernel] = min(max(round(3 * seconds / (time.perf_counter() - begin)), 3), 1000)
        times = self.iterations[kernel]
        self.repeat(times)
        self.wait()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_gpu else []
        begin = time.perf_counter()
        for event in events[:1]:
            event.record()
        self.repeat(times)
        for event in events[1:]:
            event.record()
        self.wait()
        wall_ms = (time.perf_counter() - begin) / times * 1e3
        event_ms = events[0].elapsed_time(events[1]) / times if events else wall_ms
        return {"wall_ms": wall_ms, "event_ms": event_ms, "steps": times}

    def benched(self) -> dict:
        from triton.testing import do_bench

        time.sleep(REST)
        ms = do_bench(lambda: self.repeat(1), return_mode="median")
        return {"wall_ms": ms, "event_ms": ms}

    def memory(self, kernel: str) -> dict:
        """The highest allocation during a step, above parameters, inputs and gradient buffers."""
        if not self.on_gpu:
            return {}
        self.choose(kernel)
        self.repeat(1)
        gc.collect()
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self.step()
        self.wait()
        peak = torch.cuda.max_memory_allocated() - before
        del out
        self.clear()
        return {"peak_mib": peak / 2**20}

    def busy(self, kernel: str) -> dict:
        """GPU time a step, the time from the first kernel to the last one's end, which has the waits in between, and
        every launch of a step in the order in which they began.

        After as many steps as one timed turn has, over as many again: a GPU at its power limit slows down within
        milliseconds, and a shorter look would see another clock than the turns did. Of twice as many that are recorded
        the second half counts: the profiler's own start leaves the GPU idle for some milliseconds, and cooler.
        """
        self.choose(kernel)
        steps = min(max(self.iterations.get(kernel, 0), 5), 200)
        self.repeat(steps)
        self.wait()
        kind = self.device.upper()
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
            self.repeat(2 * steps)
            self.wait()
        events = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profile.events()
            if event.device_type == getattr(torch.autograd.DeviceType, kind)
        )
        events = events[len(events) // 2 :]
        totals = {}
        for start, end, name in events:
            launches, spent = totals.get(name, (0, 0.0))
            totals[name] = (launches + 1 / steps, spent + (end - start) / steps)
        return {
            "gpu_us": union(events) / steps,
            "span_us": span(events) / steps,
            "launches": len(events) / steps,
            "totals": totals,
            "sequence": sequence(events, steps),
        }


def union(events) -> float:
    """Time in which at least one of the events ran."""
    total, reached = 0.0, float("-inf")
    for start, end, *_ in events:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def span(events) -> float:
    """From the first event's begin to the last one's end."""
    return max(end for _, end, *_ in events) - min(begin for begin, *_ in events) if events else 0.0


def sequence(events, steps: int) -> list:
    """[[name, mean microseconds], ...] of one step; empty if steps do not launch the same kernels."""
    each, rest = divmod(len(events), steps)
    parts = [events[i * each : (i + 1) * each] for i in range(steps)]
    found = []
    for launches in zip(*parts, strict=True):
        if rest or len({name for _, _, name in launches}) > 1:
            return []
        found.append([launches[0][2], sum(end - start for start, end, _ in launches) / steps])
    return found


def versions(package, distributions: list[str]) -> str:
    found = [f"sonicmoe {getattr(package, '__version__', '?')}", f"torch {torch.__version__}"]
    for name in ("triton", *distributions):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def main() -> None:
    # A device other than the GPU is for trying this program out.
    bench = Bench(*sys.argv[1:])
    names = ("load", "first", "check", "time", "memory", "busy")
    serve({name: getattr(bench, name) for name in names})


if __name__ == "__main__":
    main()
