"""Knorm: rows whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Select
from kvmlx.stages.common import norm
from kvmlx.types import Array, Rows


@dataclass(frozen=True)
class Knorm(Select):
    """Score a row by minus the length of its key: short keys tend to draw attention. Reads no attention."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "2406.11430"
    summary: ClassVar[str] = "keys with the smallest L2 norm"

    def score(self, rows: Rows) -> Array:
        """Return ``-|k|`` ``[1, H, T]``."""
        return -norm(rows.xp, rows.keys)
