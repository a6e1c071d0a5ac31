"""H2O: rows that received the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvmlx.stages.base import Select, require
from kvmlx.types import Array, Need, Rows


@dataclass(frozen=True)
class H2O(Select):
    """Score a row by the attention that all queries since it was written paid to it.

    The sum favours old rows, which more queries could see; ``normalize`` divides it by their number.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    summary: ClassVar[str] = "heavy hitters: most attention received so far"
    needs: ClassVar[frozenset[Need]] = frozenset({"sums"})

    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.normalize, bool), f"normalize must be true or false, got {self.normalize!r}")

    def score(self, rows: Rows) -> Array:
        """Return the accumulated attention, or its mean over the queries that saw the row ``[1, H, T]``."""
        assert rows.sums is not None
        if not self.normalize:
            return rows.sums
        seen = rows.length - self._positions(rows.keys.shape[2], rows.length)
        return rows.sums / rows.backend.from_numpy(seen.astype(np.float32))

    def _positions(self, count: int, length: int) -> np.ndarray:
        """Return the positions of the rows ``[T]``: exact until rows were evicted.

        Afterwards sinks and recent rows are still where they were; those between are taken as evenly spread.
        """
        index = np.arange(count, dtype=np.float64)
        between = max(0, count - self.sinks - self.recent)
        return index + (length - count) * np.clip((index - self.sinks + 1) / (between + 1), 0.0, 1.0)
