"""What is measured: sizes of the layer, and what is done with it."""

from dataclasses import dataclass

FORWARD = "forward"
BACKWARD = "forward+backward"
MAIN_GRAD = "forward+backward+main_grad"
# Each of these is a configuration with a check of its own. MAIN_GRAD accumulates weight gradients in float32 buffers
# that live on the parameters; the others leave ordinary gradients.
KERNELS = (FORWARD, BACKWARD, MAIN_GRAD)
# BACKWARD as a CUDA graph: what is left of it where the host has nothing to do. On request, and only of those who can.
CAPTURED = "forward+backward captured"
# BACKWARD as Triton's do_bench times it: from a GPU at rest, for a tenth of a second, with an empty L2 cache at each
# step. So published figures are often taken; under load a GPU is slower. On request.
BENCHED = "forward+backward do_bench"
# The same products as torch multiplies them, dense and nothing else. On request.
DENSE = "dense GEMMs"
COLD, WARM, NEW_TOKENS = "cold start", "warm start", "new token count"

# Tensors that the check must have compared before a configuration counts as right.
OUTPUTS = {
    FORWARD: ("out",),
    BACKWARD: ("out", "dx", "drouter", "dw1", "dw2"),
    MAIN_GRAD: ("out", "dx", "drouter", "dw1", "dw2"),
    CAPTURED: ("out", "dx", "drouter", "dw1", "dw2"),
    BENCHED: ("out", "dx", "drouter", "dw1", "dw2"),
}

# Multiply-adds of each grouped GEMM, in units of T*K*H*I; an operation is half of one.
GEMMS = {"up": 2, "down": 1, "dA": 1, "dW2": 1, "dx": 2, "dW1": 2}


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    topk: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) != 5 or min(numbers) < 1 or numbers[4] > numbers[3]:
            raise ValueError(f"shape: got {text!r}, need T,H,I,E,K, all above 0 and K at most E")
        return cls(*numbers)

    def __str__(self) -> str:
        return ",".join(str(n) for n in self.as_list())

    def as_list(self) -> list[int]:
        return [self.tokens, self.hidden, self.intermediate, self.experts, self.topk]

    def gemm_flops(self, name: str) -> int:
        return 2 * GEMMS[name] * self.tokens * self.topk * self.hidden * self.intermediate

    def flops(self, kernel: str) -> int:
        """Of the grouped GEMMs; the router's product is left out, as it is everywhere else."""
        names = ("up", "down") if kernel == FORWARD else GEMMS
        return sum(self.gemm_flops(name) for name in names)


SHAPES = {
    "reference": Shape(8192, 3072, 1536, 8, 8),
    "experts32": Shape(8192, 3072, 1536, 32, 8),
    "wide": Shape(8192, 4096, 4096, 8, 8),
    "tokens16k": Shape(16384, 3072, 1536, 8, 8),
    "experts128": Shape(32768, 4096, 1024, 128, 8),
    "tokens1k": Shape(1024, 3072, 1536, 8, 8),
}
