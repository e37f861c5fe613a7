"""One rank of data-parallel training, or all of it in one process.

    data_parallel.py SETTINGS.json FOLDER

Runs every case of SETTINGS and writes ``FOLDER/rank<N>.npz``. A process that Paddle's launcher started takes its own
part of each batch and averages ``main_grad`` over the ranks. Without a launcher there is one process, which takes all
parts: one after the other as micro-batches, or, for a case that is ``whole``, in one piece.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from sonicmoe.config import SonicMoEConfig
from sonicmoe.ernie_compat import SonicMoEMlpNode
from tests.support import problems

PARTS = 2


def array(tensor) -> np.ndarray:
    return np.array(tensor.detach().astype("float32").numpy())


def parameter(values, dtype):
    made = paddle.create_parameter(list(values.shape), dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
    made.set_value(paddle.to_tensor(np.asarray(values, np.float32)).astype(dtype))
    return made


class Expert(paddle.nn.Layer):
    def __init__(self, w1, w2):
        super().__init__()
        self.up_gate_proj, self.down_proj = paddle.nn.Layer(), paddle.nn.Layer()
        self.up_gate_proj.weight, self.down_proj.weight = parameter(w1, "bfloat16"), parameter(w2, "bfloat16")


class Model:
    """A router and a layer of experts behind a residual connection; ``main_grad`` holds every gradient, in fp32."""

    def __init__(self, problem, config):
        rng = np.random.default_rng(11)
        self.topk = problem.indices.shape[1]
        self.router = parameter(rng.standard_normal((problem.hidden, problem.n_experts)) * 0.1, "float32")
        self.experts = [Expert(problem.w1[e], problem.w2[e]) for e in range(problem.n_experts)]
        sizes = (problem.n_experts, problem.hidden, problem.intermediate)
        self.node = SonicMoEMlpNode(self.experts, *sizes, config=config)

    def named_parameters(self):
        yield "router", self.router
        for number, expert in enumerate(self.experts):
            yield f"expert {number} w1", expert.up_gate_proj.weight
            yield f"expert {number} w2", expert.down_proj.weight

    def loss(self, x, target):
        """Mean squared error of x + experts(x) against the target."""
        scores = paddle.nn.functional.softmax(paddle.matmul(x.astype("float32"), self.router), axis=-1)
        probs, indices = paddle.topk(scores, self.topk, axis=-1)
        counts = np.bincount(indices.numpy().ravel(), minlength=len(self.experts)).tolist()
        # In fp32: Paddle's CPU cannot add bf16 tensors.
        out = x.astype("float32") + self.node(x, counts, indices, probs).astype("float32")
        return ((out - target) ** 2).mean()

    def collect(self):
        """After backward: every parameter has its main_grad, also an expert that no token chose, and those of all
        ranks are averaged. All ranks go through the same list: a reduction waits for each of them."""
        self.node.step()
        if self.router.grad is not None:
            self.router.main_grad = self.router.grad.detach().clone()
            self.router.clear_gradient()
        for _, weight in self.named_parameters():
            if getattr(weight, "main_grad", None) is None:
                weight.main_grad = paddle.zeros(weight.shape, dtype="float32")
            if dist.is_initialized():
                dist.all_reduce(weight.main_grad)
                weight.main_grad.scale_(1.0 / PARTS)


def parts_of(case, n_rows: int) -> list[slice]:
    """The rows of each micro-batch that this process runs."""
    step = n_rows // PARTS
    if dist.is_initialized():
        rank = dist.get_rank()
        return [slice(rank * step, (rank + 1) * step)]
    return [slice(0, n_rows)] if case["whole"] else [slice(part * step, (part + 1) * step) for part in range(PARTS)]


def gradients(case, problem):
    """main_grad after one backward from a given gradient of the output."""
    model = Model(problem, SonicMoEConfig(**case["config"]))
    indices = problem.indices.copy()
    if case["idle_rank"]:  # the last rank's tokens are meant for experts elsewhere
        indices[len(indices) // PARTS :] = -1
    # The mean over the ranks of what each rank's loss gives. Halving is exact in every format.
    share = 1.0 if dist.is_initialized() else 1.0 / PARTS
    for rows in parts_of(case, len(indices)):
        x, probs = paddle.to_tensor(problem.x[rows]).astype("bfloat16"), paddle.to_tensor(problem.probs[rows])
        x.stop_gradient = probs.stop_gradient = False
        here = indices[rows][indices[rows] >= 0]
        counts = np.bincount(here, minlength=problem.n_experts).tolist()
        out = model.node(x, counts, paddle.to_tensor(indices[rows]), probs)
        out.backward(paddle.to_tensor(problem.dout[rows] * share).astype("bfloat16"))
    model.collect()
    return {name: array(weight.main_grad) for name, weight in model.named_parameters() if name != "router"}


def training(case, problem):
    """Some steps of AdamW on fp32 masters, which are rounded into the bf16 weights that the node reads."""
    model = Model(problem, SonicMoEConfig(**case["config"]))
    masters = {name: parameter(array(weight), "float32") for name, weight in model.named_parameters()}
    found = {f"before {name}": array(weight) for name, weight in model.named_parameters()}
    optimizer = paddle.optimizer.AdamW(learning_rate=2e-3, parameters=list(masters.values()), weight_decay=0.01)
    rng, losses = np.random.default_rng(12), []
    for _ in range(case["steps"]):
        x = problems.to_bf16(rng.standard_normal(problem.x.shape))
        target, parts, total = np.roll(x, 1, axis=1), parts_of(case, len(x)), 0.0
        for rows in parts:
            given = paddle.to_tensor(x[rows]).astype("bfloat16")
            loss = model.loss(given, paddle.to_tensor(target[rows])) / len(parts)
            loss.backward()
            total += float(loss)
        model.collect()
        if dist.is_initialized():
            mean = paddle.to_tensor([total], dtype="float64")
            dist.all_reduce(mean)
            total = float(mean[0]) / PARTS
        losses.append(total)
        for name, weight in model.named_parameters():
            masters[name].grad, weight.main_grad = weight.main_grad, None
        optimizer.step()
        for name, weight in model.named_parameters():
            weight.set_value(masters[name].astype(weight.dtype))
            masters[name].clear_gradient(set_to_zero=False)
    found |= {f"after {name}": array(weight) for name, weight in model.named_parameters()}
    return found | {"losses": np.array(losses)}


def main():
    settings, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # A rank that waits for ever for another one says where, in its log, and ends.
    faulthandler.dump_traceback_later(settings["limit_s"], exit=True)
    rank = 0
    if "PADDLE_TRAINER_ENDPOINTS" in os.environ:
        endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
        assert [endpoint.partition(":")[0] for endpoint in endpoints] == ["127.0.0.1"] * PARTS, endpoints
        dist.init_parallel_env()
        rank = dist.get_rank()
        assert dist.get_world_size() == PARTS
    problem = problems.make_problem(**settings["problem"])
    found = {}
    for name, case in settings["cases"].items():
        results = training(case, problem) if case["steps"] else gradients(case, problem)
        found |= {f"{name}/{key}": value for key, value in results.items()}
    np.savez(folder / f"rank{rank}.npz", **found)


if __name__ == "__main__":
    main()
