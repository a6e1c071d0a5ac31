"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Select
from kvmlx.types import Array, Rows


@dataclass(frozen=True)
class Streaming(Select):
    """Keep ``sinks`` first tokens and fill the rest of the budget with the newest.

    Rows keep their original positions; the paper renumbers them inside the cache.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "2309.17453"
    summary: ClassVar[str] = "attention sinks and a sliding window (StreamingLLM)"

    def score(self, rows: Rows) -> Array:
        """Return the row index ``[1, H, T]``."""
        xp = rows.xp
        return xp.broadcast_to(xp.arange(rows.keys.shape[2], dtype=xp.float32), rows.keys.shape[:3])
