"""Act after each prefill chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Schedule


@dataclass(frozen=True)
class Bounded(Schedule):
    """Select and encode after each prefill chunk, so that the peak obeys the budget.

    Later chunks attend to compressed earlier ones, so quality depends on the prefill chunk size.
    The default where nothing is selected.
    """

    name: ClassVar[str] = "bounded"
    summary: ClassVar[str] = (
        "act after each prefill chunk, so that the peak obeys the budget (default without a selector)"
    )
    saves: ClassVar[str] = "peak"
