"""What every measurement states: machine, versions, and the spread of its samples. Imports no array framework."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kvmlx


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


def cpu() -> str:
    """Return the processor's name and its cores."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def software(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, of packages (None: not installed) and of kvmlx."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"kvmlx": kvmlx.__version__}
