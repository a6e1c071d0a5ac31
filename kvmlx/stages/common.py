"""Small helpers that several stages share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from kvmlx.types import Array

BLOCK_ELEMENTS = 1 << 20
"""Elements that a stage's own temporary may hold at a time: 4 MiB in float32."""


def spans(count: int, width: int) -> Iterator[slice]:
    """Cut ``count`` rows of ``width`` elements into slices of at most BLOCK_ELEMENTS."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def norm(xp: Any, x: Array) -> Array:
    """Return the float32 length of the vectors ``x [..., D]``: ``[...]``."""
    x = xp.astype(x, xp.float32)
    return xp.sqrt(xp.sum(x * x, axis=-1))


def unit(xp: Any, x: Array) -> Array:
    """Scale the vectors ``x [..., D]`` to length 1 in float32; a zero vector stays zero."""
    return xp.astype(x, xp.float32) / xp.maximum(norm(xp, x)[..., None], 1e-12)


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Round ``shares``, whose sum is ``total``, to integers of the same sum; ties go to the first."""
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
