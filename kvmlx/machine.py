"""What every measurement states of where it was made. Imports no array framework."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvmlx import __version__


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
    return found | {"kvmlx": __version__}
