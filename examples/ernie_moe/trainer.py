"""One model's training: accumulation over micro-batches, learning-rate schedule, held-out loss, checkpoint state."""

import math
import time
from dataclasses import dataclass

import numpy as np
import paddle

from .data import Corpus
from .model import ErnieMoELM, ModelConfig
from .optimizer import MainGradAdamW


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the model."""

    steps: int = 80
    batch: int = 16
    micro_batches: int = 4
    learning_rate: float = 5e-3
    warmup: int = 10
    balance: float = 0.05
    eval_batch: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.batch % self.micro_batches:
            raise ValueError(f"batch: got {self.batch}, need a multiple of micro_batches = {self.micro_batches}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * progress)))


class Trainer:
    """A model with its optimizer and its history. Two trainers with one seed start equal and see the same text."""

    def __init__(self, model_config: ModelConfig, config: TrainConfig, corpus: Corpus):
        self.config, self.corpus = config, corpus
        paddle.seed(config.seed)
        self.model = ErnieMoELM(model_config)
        self.optimizer = MainGradAdamW(self.model.named_parameters())
        self.step_count = 0
        self.seconds = 0.0
        self.losses = []  # one a step
        self.held_out = []  # (steps done, loss)
        self.loads = []  # load_LE of each step: token slots by MoE layer and expert

    def step(self) -> float:
        """One optimizer step over all micro-batches; returns their mean loss in nats a byte."""
        started = time.perf_counter()
        config = self.config
        total, load_LE = 0.0, 0
        for micro in range(config.micro_batches):
            windows = self.corpus.batch(self.step_count, micro, config.batch // config.micro_batches)
            loss, balance_loss, micro_load_LE = self.model.loss(windows)
            ((loss + config.balance * balance_loss) / config.micro_batches).backward()
            total += float(loss) / config.micro_batches
            load_LE = load_LE + micro_load_LE
        for runner in self.model.expert_runners():
            runner.step()  # the experts' gradients appear in main_grad here
        self.optimizer.set_lr(config.learning_rate_at(self.step_count))
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.step_count += 1
        self.losses.append(total)
        self.loads.append(load_LE)
        self.seconds += time.perf_counter() - started
        return total

    def evaluate(self) -> float:
        """Held-out loss in nats a byte, also noted in the history."""
        config = self.config
        windows = self.corpus.held_out_batch(config.eval_batch)
        chunk = min(16, config.eval_batch)
        total = 0.0
        with paddle.no_grad():
            for start in range(0, len(windows), chunk):
                part = windows[start : start + chunk]
                total += float(self.model.loss(part)[0]) * len(part)
        loss = total / len(windows)
        self.held_out.append((self.step_count, loss))
        return loss

    def final_train_loss(self) -> float:
        """Mean over the last tenth of the steps: one step's loss depends on which text it drew."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))

    def state_dict(self) -> dict:
        """All that the next step depends on, and the history for the plot."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step_count": self.step_count,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "held_out": list(self.held_out),
            "loads": [load_LE.tolist() for load_LE in self.loads],
        }

    def set_state_dict(self, state: dict):
        self.model.set_state_dict(state["model"])
        self.optimizer.set_state_dict(state["optimizer"])
        self.step_count, self.seconds = state["step_count"], state["seconds"]
        self.losses = list(state["losses"])
        self.held_out = [tuple(point) for point in state["held_out"]]
        self.loads = [np.array(load_LE) for load_LE in state["loads"]]
