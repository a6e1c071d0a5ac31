"""What the memory allows: a copy, and a read."""

from __future__ import annotations

from typing import Any

import torch

from scripts.gpu.run import Run


def copy(run: Run, found: dict[str, Any]) -> None:
    """Measure a copy within the device's memory, bytes read and written; and a sum, bytes read."""
    n = run.sizes.copy_bytes
    x = torch.empty(n // 4, dtype=torch.float32, device=run.device).normal_()
    y = torch.empty_like(x)
    found["copy"] = run.measure([lambda: y.copy_(x)]) | {"bytes": 2 * x.nbytes}
    found["read"] = run.measure([lambda: x.sum()]) | {"bytes": x.nbytes}
    for row in found.values():
        row["bytes_per_s"] = row["bytes"] / row["ms"] * 1e3
    run.say(" ".join(f"{name} {row['bytes_per_s'] / 1e9:,.0f} GB/s;" for name, row in found.items()))


def copy_rate(run: Run) -> float | None:
    """Return the measured bytes per second of a copy, None where none was measured."""
    row = run.document["parts"].get("copy", {}).get("copy")
    return row["bytes_per_s"] if row else None
