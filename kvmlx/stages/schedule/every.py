"""Select again while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Schedule, require_int


@dataclass(frozen=True)
class Every(Schedule):
    """Select again after every ``tokens`` decoded tokens, so that a long answer obeys the budget too."""

    name: ClassVar[str] = "every"
    summary: ClassVar[str] = "select again after every n decoded tokens"
    saves: ClassVar[str] = "tokens while decoding"

    tokens: int = 64
    """Decoded tokens between selections."""

    def __post_init__(self) -> None:
        require_int("tokens", self.tokens, 1)
