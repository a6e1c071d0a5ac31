"""The same budget for every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Allocate


@dataclass(frozen=True)
class Uniform(Allocate):
    """What happens without an allocate stage, by name."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "equal budgets for all layers and heads"
