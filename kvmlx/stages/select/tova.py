"""TOVA: rows that the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Select
from kvmlx.types import Array, Need, Rows


@dataclass(frozen=True)
class TOVA(Select):
    """Score a row by the newest query's attention, averaged over all heads: every head keeps the same rows.

    The paper protects no tokens; here the newest one, the query's own, always stays.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "2401.06104"
    summary: ClassVar[str] = "attention of the newest query, same tokens for all heads"
    needs: ClassVar[frozenset[Need]] = frozenset({"queries"})

    sinks: int = 0
    recent: int = 1

    @property
    def window(self) -> int:
        """One query."""
        return 1

    def score(self, rows: Rows) -> Array:
        """Return the mean attention of all query heads, equal for every head ``[1, H, T]``."""
        assert rows.queries is not None
        newest = rows.queries[:, :, -1:]
        attention = rows.backend.column_sums(newest, rows.keys, scale=rows.scale, bias=rows.bias)
        return rows.xp.broadcast_to(rows.xp.mean(attention, axis=1, keepdims=True), rows.keys.shape[:3])
