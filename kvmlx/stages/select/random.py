"""Keep random rows: the baseline that every scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvmlx.stages.base import Select, require_int
from kvmlx.types import Array, Rows


@dataclass(frozen=True)
class Random(Select):
    """Uniform scores from a counter-based generator, so that every backend draws the same rows.

    A score depends on (seed, layer, tokens seen, head, row index) alone. The tokens seen are part of it:
    a score fixed to the row index would evict the same index at every step, which is a sliding window.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random tokens (baseline)"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("seed", self.seed, 0, (1 << 64) - 1)

    def score(self, rows: Rows) -> Array:
        """Return uniform scores in [0, 1) with 24 bits ``[1, H, T]``."""
        _, h, t, _ = rows.keys.shape
        state = np.array([self.seed], dtype=np.uint64)
        for counter in (rows.layer, rows.length):
            state = _splitmix64(state + np.uint64(counter))
        heads = _splitmix64(state + np.arange(h, dtype=np.uint64))
        bits = _splitmix64(heads[:, None] + np.arange(t, dtype=np.uint64))
        uniform = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        return rows.backend.from_numpy(uniform[None])


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Return the output of SplitMix64 for the states ``x`` (uint64, wraps)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
