"""The network: pre-norm transformer with rotary attention, whose MLPs after the first layer are Mixture-of-Experts.

Everything but the experts is fp32 (CPU Paddle multiplies no bf16 matrices). Tokens are rounded to bf16 where they
enter the experts, whose weights are bf16.

Shapes: B sequences, S positions, T = B * S tokens, H hidden, N heads, D channels of a head, E experts, K slots a
token, L MoE layers, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from .experts import GatedMLP, bf16_expert, init_linear, make_runner


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, and how the experts run."""

    vocabulary: int = 256
    hidden: int = 128
    intermediate: int = 128
    layers: int = 3
    heads: int = 4
    experts: int = 8
    topk: int = 2
    kind: str = "sonic"
    precision: str = "bf16"
    recipe: str = "sm90"

    def __post_init__(self):
        if self.layers < 2:
            raise ValueError(f"layers: got {self.layers}, need at least 2 (the first is dense)")
        if not 1 <= self.topk <= self.experts:
            raise ValueError(f"topk: got {self.topk}, need 1 to {self.experts} (the experts of a layer)")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden: got {self.hidden}, need a multiple of {2 * self.heads} (twice the heads)")


class RMSNorm(nn.Layer):
    def __init__(self, hidden: int, epsilon: float = 1e-6):
        super().__init__()
        self.weight = self.create_parameter([hidden], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x_BSH):
        return x_BSH * paddle.rsqrt((x_BSH * x_BSH).mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotary_tables(seq: int, head_dim: int, base: float = 10000.0):
    """Cosine and sine of each position's angles, [S, D/2] each."""
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(seq)[:, None] * frequency
    return paddle.to_tensor(np.cos(angle).astype(np.float32)), paddle.to_tensor(np.sin(angle).astype(np.float32))


def rotate(x_BNSD, cos, sin):
    """Turn each pair (channel d, channel d + D/2) by its position's angle."""
    first, second = paddle.chunk(x_BNSD, 2, axis=-1)
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Layer):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, gain: float):
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.hidden // config.heads
        self.qkv = init_linear(config.hidden, 3 * config.hidden)
        self.out = init_linear(config.hidden, config.hidden, gain)

    def forward(self, x_BSH):
        batch, seq, hidden = x_BSH.shape
        qkv = self.qkv(x_BSH).reshape([batch, seq, 3, self.heads, self.head_dim]).transpose([2, 0, 3, 1, 4])
        q_BNSD, k_BNSD, v_BNSD = qkv.unbind(0)
        cos, sin = rotary_tables(seq, self.head_dim)
        q_BNSD, k_BNSD = rotate(q_BNSD, cos, sin), rotate(k_BNSD, cos, sin)
        score_BNSS = paddle.matmul(q_BNSD, k_BNSD, transpose_y=True) / math.sqrt(self.head_dim)
        future_SS = paddle.triu(paddle.full([seq, seq], -1e9, dtype="float32"), diagonal=1)
        mixed_BNSD = paddle.matmul(F.softmax(score_BNSS + future_SS, axis=-1), v_BNSD)
        return self.out(mixed_BNSD.transpose([0, 2, 1, 3]).reshape([batch, seq, hidden]))


class Router(nn.Layer):
    """Sends each token to K experts: fp32 linear, softmax, top-k, probabilities normalised over the K."""

    def __init__(self, hidden: int, experts: int, topk: int):
        super().__init__()
        self.experts, self.topk = experts, topk
        self.gate = init_linear(hidden, experts)

    def forward(self, x_TH):
        """Returns idx_TK (int32), prob_TK (fp32), the counts of tokens by expert (a host list), the balance loss."""
        softmax_TE = F.softmax(self.gate(x_TH), axis=-1)
        top_TK, idx_TK = paddle.topk(softmax_TE, self.topk, axis=-1)
        counts_E = np.bincount(idx_TK.numpy().ravel(), minlength=self.experts)
        # Switch Transformer's balance loss: 1 when even, E when one expert takes all. The counts have no gradient,
        # the mean probabilities carry it.
        load_E = paddle.to_tensor((counts_E / counts_E.sum()).astype(np.float32))
        balance_loss = self.experts * (load_E * softmax_TE.mean(0)).sum()
        prob_TK = top_TK / top_TK.sum(-1, keepdim=True)
        return idx_TK.astype("int32"), prob_TK, counts_E.tolist(), balance_loss


class MoE(nn.Layer):
    """Router and experts."""

    def __init__(self, config: ModelConfig, gain: float):
        super().__init__()
        self.router = Router(config.hidden, config.experts, config.topk)
        self.experts = nn.LayerList(
            [bf16_expert(config.hidden, config.intermediate, gain) for _ in range(config.experts)]
        )
        self.run = make_runner(
            config.kind, config.precision, config.recipe, self.experts, config.hidden, config.intermediate
        )

    def forward(self, x_BSH):
        x_TH = x_BSH.reshape([-1, x_BSH.shape[-1]])
        idx_TK, prob_TK, tokens_per_expert, balance_loss = self.router(x_TH)
        out_TH = self.run(x_TH.astype("bfloat16"), tokens_per_expert, idx_TK, prob_TK)
        return out_TH.astype("float32").reshape(x_BSH.shape), balance_loss, tokens_per_expert


class ExpertParallelBlock(nn.Layer):
    """Router and experts, these spread over the ranks of the job: the same results as ``MoE``."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        from sonicmoe.ep.paddle_layer import ExpertParallelMoE

        sizes = (config.experts, config.topk, config.hidden, config.intermediate)
        self.run = ExpertParallelMoE(*sizes, std=1.0 / math.sqrt(config.hidden), seed=seed)

    def forward(self, x_BSH):
        before_E = self.run.load
        out_BSH, balance_loss = self.run(x_BSH)
        return out_BSH, balance_loss, (self.run.load - before_E).tolist()


class Block(nn.Layer):
    """Attention and an MLP, dense or MoE, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        is_moe = layer > 0
        gain = 1.0 / math.sqrt(2 * config.layers)  # keeps the residual sum of 2 * layers branches near 1
        self.attention_norm, self.mlp_norm = RMSNorm(config.hidden), RMSNorm(config.hidden)
        self.attention = Attention(config, gain)
        self.is_moe = is_moe
        if is_moe and config.kind == "expert parallel":
            self.mlp = ExpertParallelBlock(config, seed=layer)
        elif is_moe:
            self.mlp = MoE(config, gain)
        else:  # as wide as the K experts that a token meets in the other layers
            self.mlp = GatedMLP(config.hidden, config.topk * config.intermediate, gain)

    def forward(self, x_BSH):
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        normed_BSH = self.mlp_norm(x_BSH)
        if not self.is_moe:
            return x_BSH + self.mlp(normed_BSH), None, None
        out_BSH, balance_loss, tokens_per_expert = self.mlp(normed_BSH)
        return x_BSH + out_BSH, balance_loss, tokens_per_expert


class ErnieMoELM(nn.Layer):
    """Next-byte language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Rows of magnitude 1, as large as what the blocks add to them: smaller ones would drown in the first branches.
        initializer = nn.initializer.Normal(0.0, 1.0)
        self.embedding = nn.Embedding(
            config.vocabulary, config.hidden, weight_attr=paddle.ParamAttr(initializer=initializer)
        )
        self.blocks = nn.LayerList([Block(config, layer) for layer in range(config.layers)])
        self.norm = RMSNorm(config.hidden)
        self.head = init_linear(config.hidden, config.vocabulary)

    def forward(self, tokens_BS):
        """Returns logits_BSV, the balance loss (mean over MoE layers), the load as a NumPy array load_LE."""
        x_BSH = self.embedding(tokens_BS)
        balance_losses, loads = [], []
        for block in self.blocks:
            x_BSH, balance_loss, tokens_per_expert = block(x_BSH)
            if balance_loss is not None:
                balance_losses.append(balance_loss)
                loads.append(tokens_per_expert)
        return self.head(self.norm(x_BSH)), paddle.add_n(balance_losses) / len(balance_losses), np.array(loads)

    def loss(self, windows):
        """Cross-entropy in nats a byte over int64 [B, S + 1], then the balance loss and load_LE of ``forward``."""
        tokens = paddle.to_tensor(windows)
        logits_BSV, balance_loss, load_LE = self(tokens[:, :-1])
        logits_TV = logits_BSV.reshape([-1, self.config.vocabulary])
        return F.cross_entropy(logits_TV, tokens[:, 1:].reshape([-1])), balance_loss, load_LE

    def expert_runners(self):
        """What ``step()`` must be called on between the last backward and the optimizer."""
        return [block.mlp.run for block in self.blocks if block.is_moe]
