"""Text that ships with Python, as bytes, and deterministic batches of it.

The language reference behind ``help()`` (``pydoc_data.topics``) is real English prose with code, is in every
Python, and needs no download. A byte is a token, so there is no vocabulary to build: V = 256.

A batch is a pure function of (seed, step, micro-batch). A run that resumes from a checkpoint therefore sees the
batches that it would have seen without the interruption, and two models with one seed see the same text.

Shapes: B sequences, S positions.
"""

from pathlib import Path

import numpy as np

VOCABULARY = 256
BLOCK_BYTES = 4096  # held-out text is cut out in blocks, so that most of its sequences have no training neighbour
HELD_OUT_EVERY = 12


def standard_text() -> str:
    """The language reference, each paragraph once: topics quote each other, which would leak held-out text."""
    from pydoc_data.topics import topics

    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(paragraph.strip("\n"))
    return "\n\n".join(paragraphs)


def read_text(path=None) -> str:
    """The file at ``path``, or the standard text."""
    return standard_text() if path is None else Path(path).read_text(encoding="utf-8")


class Corpus:
    """Training and held-out bytes of one text."""

    def __init__(self, text: str, seq: int, seed: int = 0):
        self.seq, self.seed = seq, seed
        tokens = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        block = np.arange(tokens.size) // BLOCK_BYTES
        is_held_out = block % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self.train, self.held_out = tokens[~is_held_out], tokens[is_held_out]
        shortest = min(self.train.size, self.held_out.size)
        if shortest <= seq:
            raise ValueError(
                f"text: {tokens.size} bytes leave a split of {shortest}, need more than seq = {seq} in each; "
                f"a block of {BLOCK_BYTES} bytes in {HELD_OUT_EVERY} is held out"
            )

    def batch(self, step: int, micro: int, size: int) -> np.ndarray:
        """``size`` random windows of training text for one micro-batch: int64 [B, S + 1], inputs and next bytes."""
        rng = np.random.default_rng([self.seed, step, micro])
        starts_B = rng.integers(0, self.train.size - self.seq, size)
        return self._windows(self.train, starts_B)

    def held_out_batch(self, size: int) -> np.ndarray:
        """Evenly spread windows of held-out text, always the same ones: int64 [B, S + 1]."""
        starts_B = np.linspace(0, self.held_out.size - self.seq - 1, size).astype(np.int64)
        return self._windows(self.held_out, starts_B)

    def unigram_entropy(self) -> float:
        """Held-out nats a byte of the best guess that ignores context: what a model must beat to have learnt."""
        counts_V = np.bincount(self.train, minlength=VOCABULARY) + 1.0  # one each: an unseen byte is not impossible
        log_p_V = np.log(counts_V / counts_V.sum())
        return float(-log_p_V[self.held_out].mean())

    def _windows(self, tokens, starts_B):
        return tokens[starts_B[:, None] + np.arange(self.seq + 1)].astype(np.int64)
