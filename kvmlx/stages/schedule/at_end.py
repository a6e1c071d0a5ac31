"""Act when the prompt is complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Schedule


@dataclass(frozen=True)
class AtEnd(Schedule):
    """Select and encode once the prompt is complete: results do not depend on the prefill chunk size.

    The prompt's own attention is exact, and the peak is that of the uncompressed cache. The default with a selector.
    """

    name: ClassVar[str] = "at_end"
    summary: ClassVar[str] = "act once, when the prompt is complete (default with a selector)"
    saves: ClassVar[str] = "nothing at the peak"
