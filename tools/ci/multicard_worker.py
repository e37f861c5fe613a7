"""One rank of ``multicard_smoke.py``: trains a small expert-parallel layer and says so, step by step.

    multicard_worker.py FRAMEWORK FOLDER STEPS [RANK STEP]     the last two: that rank is killed at that step

Runs on GPUs where the framework finds as many as there are ranks, else on the CPU.
"""

import os
import pathlib
import signal
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SIZES = dict(num_experts=8, num_experts_per_tok=2, hidden_size=128, intermediate_size=128, std=0.1)
TOKENS, RATE = 64, 2.0


def torch_steps(ranks: int):
    """(rank, a function that runs one step and returns the loss, a function that ends it all)."""
    import torch

    # Optimizers import this, and where that comes after the group was made, it keeps the group alive for good: gloo's
    # threads then outlive Python's end, and now and then one of them aborts there.
    import torch._dynamo
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= ranks
    if on_gpu:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    from sonicmoe.ep.torch_layer import ExpertParallelMoE

    layer = ExpertParallelMoE(**SIZES).to(device, torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), RATE)
    x = torch.randn(TOKENS, SIZES["hidden_size"], generator=torch.Generator().manual_seed(layer.comm.rank))
    x = x.to(device, torch.bfloat16)

    def step():
        out, balance = layer(x)
        loss = (out.float() - x.float()).square().mean() + 0.01 * balance
        (loss / layer.comm.size).backward()
        layer.sum_shared_gradients()
        layer.step()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return layer.comm.rank, step, dist.destroy_process_group


def paddle_steps(ranks: int):
    import paddle
    import paddle.distributed as dist

    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() >= ranks:
        # The pool of a device that nobody has used yet refuses whoever comes from another thread.
        paddle.device.set_device(f"gpu:{int(os.environ.get('PADDLE_LOCAL_RANK', os.environ['PADDLE_TRAINER_ID']))}")
        paddle.zeros([1])
    dist.init_parallel_env()
    from sonicmoe.ep.paddle_layer import ExpertParallelMoE

    layer = ExpertParallelMoE(**SIZES)
    paddle.seed(layer.comm.rank)
    x = paddle.randn([TOKENS, SIZES["hidden_size"]])

    def step():
        out, balance = layer(x)
        loss = ((out - x) ** 2).mean() + 0.01 * balance
        (loss / layer.comm.size).backward()
        layer.sum_shared_gradients()
        layer.step()
        for weight in layer.parameters():
            main_grad = getattr(weight, "main_grad", None)
            gradient = weight.grad if main_grad is None else main_grad
            if gradient is not None:
                weight.set_value((weight.astype("float32") - RATE * gradient).astype(weight.dtype))
            weight.main_grad = None
            weight.clear_gradient(set_to_zero=False)
        return float(loss)

    return layer.comm.rank, step, lambda: None


def main():
    framework, folder, steps, *victim = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ["PADDLE_TRAINERS_NUM"])
    rank, step, end = {"torch": torch_steps, "paddle": paddle_steps}[framework](ranks)
    pathlib.Path(folder, f"pid.{rank}").write_text(str(os.getpid()))
    for number in range(int(steps)):
        if victim == [str(rank), str(number)]:
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"rank {rank} step {number} loss {step():.5f}", flush=True)
    pathlib.Path(folder, f"done.{rank}").touch()
    end()


if __name__ == "__main__":
    main()
