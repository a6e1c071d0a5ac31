"""Keep every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Select, require
from kvmlx.types import Array, Rows


@dataclass(frozen=True)
class Full(Select):
    """The uncompressed cache, as the baseline or under an encode stage."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "keeps every token"
    saves: ClassVar[str] = "nothing (baseline)"

    def __post_init__(self) -> None:
        require(
            isinstance(self.budget, float) and self.budget == 1.0,
            f"full keeps every token, so its budget is 1.0, got {self.budget!r}; "
            "to evict, use streaming, snapkv, keydiff, ...",
        )
        super().__post_init__()

    def score(self, rows: Rows) -> Array:
        """Return zeros ``[1, H, T]``."""
        return rows.xp.zeros(rows.keys.shape[:3], dtype=rows.xp.float32)
