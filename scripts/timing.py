"""The spread of the samples of every measurement; `kvmlx.machine` says where they were made."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def quartiles(x: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile, within the range of ``x``."""
    if len(x) < 2:
        return x[0], x[0]
    low, _, high = statistics.quantiles(x, n=4, method="inclusive")
    return low, high


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and number of samples, in milliseconds."""
    low, high = quartiles(seconds)
    return {
        "ms": statistics.median(seconds) * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "samples": len(seconds),
    }
