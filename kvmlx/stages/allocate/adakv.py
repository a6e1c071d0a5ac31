"""Ada-KV: more rows for the heads that spread their attention."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from kvmlx.stages.base import Allocate, require
from kvmlx.stages.common import largest_remainder


@dataclass(frozen=True)
class AdaKV(Allocate):
    """Let the rows of all heads of a layer compete, and keep ``floor`` of the mean for every head.

    As in the authors' code a head's scores are first weighted by the part of their sum that the mean budget
    would keep. This has a meaning for attention only: scores with negative values compete as they are.
    """

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "2407.11550"
    summary: ClassVar[str] = "budgets per head by the scores of all heads together"

    floor: float = 0.2
    """Fraction of the mean that every head gets."""

    def __post_init__(self) -> None:
        ok = isinstance(self.floor, int | float) and not isinstance(self.floor, bool) and 0.0 <= self.floor <= 1.0
        require(ok, f"floor must be a fraction in [0, 1], got {self.floor!r}")

    def head_budgets(self, scores: np.ndarray, tokens: int, protected: int) -> np.ndarray:
        """Return the rows of each head ``[H]``, int64, sum ``H * tokens``, each between ``floor`` and T."""
        h, t = scores.shape
        if tokens >= t:
            return np.full(h, tokens)
        ranked = -np.sort(-scores.astype(np.float64), axis=-1)
        if ranked.min() >= 0.0:
            kept, total = ranked[:, :tokens].sum(axis=-1), ranked.sum(axis=-1)
            ranked = ranked * (kept / np.maximum(total, np.finfo(np.float64).tiny))[:, None]
        # Rank first, then head: equal scores are shared out evenly.
        best = np.argsort(-ranked.T.reshape(-1), stable=True)[: h * tokens]
        won = np.bincount(best % h, minlength=h)
        floor = Fraction(str(self.floor))
        shares = [int(count) * (1 - floor) + tokens * floor for count in won]
        return np.array(largest_remainder(shares, h * tokens))
