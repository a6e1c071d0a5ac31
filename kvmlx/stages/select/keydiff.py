"""KeyDiff: rows whose keys differ from the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Select
from kvmlx.stages.common import unit
from kvmlx.types import Array, Rows


@dataclass(frozen=True)
class KeyDiff(Select):
    """Score a row by minus the cosine of its key and the mean of the normalized keys. Reads no attention."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "2504.15364"
    summary: ClassVar[str] = "keys that differ most from the average key"

    def score(self, rows: Rows) -> Array:
        """Return ``-cos(k, mean(k / |k|))`` ``[1, H, T]``."""
        xp = rows.xp
        keys = unit(xp, rows.keys)
        anchor = unit(xp, xp.mean(keys, axis=2, keepdims=True))
        return -xp.sum(keys * anchor, axis=-1)
