"""The demo model with its experts spread over the ranks of a job.

    make demo-ep                                                                 two ranks on the CPU
    python -m paddle.distributed.launch ... examples/train_ernie_moe_ep.py       any number; without a launcher, one

Every rank takes its part of each batch. Whatever the number of ranks, the model begins with the same weights, sees the
same text, and the printed loss is the mean over all of it.
"""

import argparse
import sys
import time

import numpy as np
import paddle
import paddle.distributed as dist
from ernie_moe.data import Corpus, standard_text
from ernie_moe.model import ErnieMoELM, ModelConfig
from ernie_moe.optimizer import MainGradAdamW
from ernie_moe.trainer import TrainConfig

from sonicmoe.ep import paddle_communicator

CLIP_NORM = 1.0


class Trainer:
    def __init__(self, config: TrainConfig, corpus: Corpus, comm):
        self.config, self.corpus, self.comm = config, corpus, comm
        paddle.seed(config.seed)  # replicated weights are drawn alike on every rank
        self.model = ErnieMoELM(ModelConfig(kind="expert parallel"))
        # Without its clipping: that would see this rank's experts alone, and ranks would clip each by another norm.
        self.optimizer = MainGradAdamW(self.model.named_parameters(), clip_norm=None)
        self.step_count = 0
        self.load_LE = 0

    def step(self) -> float:
        """One optimizer step; the mean loss of all ranks in nats a byte."""
        config, comm = self.config, self.comm
        share, total, self.load_LE = 1.0 / (config.micro_batches * comm.size), 0.0, 0
        for micro in range(config.micro_batches):
            windows = self.corpus.batch(self.step_count, micro, config.batch // config.micro_batches)
            mine = np.array_split(windows, comm.size)[comm.rank]
            loss, balance_loss, load_LE = self.model.loss(mine)
            ((loss + config.balance * balance_loss) * share).backward()
            total += float(loss) * share
            self.load_LE = self.load_LE + load_LE
        for runner in self.model.expert_runners():
            runner.step()  # the experts' gradients appear in main_grad here
        self._gather_and_clip()
        self.optimizer.set_lr(config.learning_rate_at(self.step_count))
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.step_count += 1
        return comm.sum_(paddle.to_tensor([total])).item()

    @paddle.no_grad()
    def _gather_and_clip(self):
        """Gradients of replicated weights added up over the ranks, and all of them cut to one norm."""
        own, everyones = paddle.zeros([1]), paddle.zeros([1])
        gradients = []
        for name, weight in self.optimizer.parameters.items():
            is_own = ".experts." in name
            if is_own:
                gradient = getattr(weight, "main_grad", None)  # None: no token has come to this expert
            else:
                gradient = self.comm.sum_(weight.grad)
            if gradient is None:
                continue
            gradients.append(gradient)
            square = (gradient.astype("float32") ** 2).sum()
            own, everyones = (own + square, everyones) if is_own else (own, everyones + square)
        norm = paddle.sqrt(self.comm.sum_(own) + everyones).item()
        if norm > CLIP_NORM:
            for gradient in gradients:
                gradient.scale_(CLIP_NORM / norm)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, of all ranks (default: 16)")
    parser.add_argument("--micro-batches", type=int, default=2, help="parts of a batch (default: 2)")
    parser.add_argument("--seq", type=int, default=64, help="bytes of a sequence (default: 64)")
    args = parser.parse_args()
    if paddle.distributed.ParallelEnv().world_size > 1:
        dist.init_parallel_env()
    comm = paddle_communicator.of()
    if args.batch % (args.micro_batches * comm.size):
        sys.exit(f"--batch: got {args.batch}, need a multiple of {args.micro_batches * comm.size}, parts times ranks")
    config = TrainConfig(steps=args.steps, batch=args.batch, micro_batches=args.micro_batches)
    corpus = Corpus(standard_text(), args.seq, config.seed)
    trainer, began = Trainer(config, corpus, comm), time.perf_counter()
    losses = []
    for step in range(1, args.steps + 1):
        losses.append(trainer.step())
        if comm.rank == 0 and (step == 1 or step * 10 // args.steps != (step - 1) * 10 // args.steps):
            print(f"step {step:>4}/{args.steps}  loss {losses[-1]:.4f}", flush=True)
    if comm.rank == 0:
        load = trainer.load_LE * trainer.load_LE.shape[1] / trainer.load_LE.sum(axis=1, keepdims=True)
        print(
            f"{comm.size} rank{'s' * (comm.size > 1)}, each with {8 // comm.size} of 8 experts of a layer: loss "
            f"{losses[0]:.4f} to {losses[-1]:.4f} nats a byte, busiest and idlest expert {load.max():.2f} and "
            f"{load.min():.2f} of an even share, {time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
