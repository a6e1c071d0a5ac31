"""The spread of the samples of every measurement; `kvmlx.machine` says where they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvmlx.bench import statistics


def quartiles(x: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile, within the range of ``x``."""
    low, _, high = statistics.quartiles(x)
    return low, high


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and number of samples, in milliseconds."""
    low, median, high = statistics.quartiles(seconds)
    return {
        "ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "samples": len(seconds),
    }
