"""Launch the compaction kernel: the units of a ragged body that are kept, in new spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import mlx.core as mx
import numpy as np

from kvmlx.backends.mlx.metal.loader import SMALL, MetalKernel

WORDS = (16, 8, 4, 2, 1)
"""Bytes that one thread may move at a time."""
THREADS = 256
EACH = 4
"""Words that a thread moves: loads that wait together."""

_BODY = """
    compact<BYTES, EACH>(
        (const device uchar*)plane, (const device uchar*)fresh, units, lanes, shape, (device uchar*)out,
        threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        thread_index_in_threadgroup, threads_per_threadgroup.x);
"""


def compact(
    planes: Mapping[str, mx.array],
    starts: np.ndarray,
    units: Sequence[np.ndarray],
    spans: np.ndarray,
    *,
    per: Mapping[str, int],
    fresh: Mapping[str, mx.array] | None = None,
) -> dict[str, mx.array]:
    """Return planes in which each lane holds the units that are kept, in order, and zeros up to its new span.

    A unit is ``per[name]`` consecutive entries of plane ``name``. So all planes have the same units, and what
    describes the move is handed to the device once; each plane is then one launch that reads and writes once.

    Args:
        planes: flat planes ``[entries, width]``, of any dtype.
        starts: the first unit of each lane.
        units: what each lane keeps, in units from its start.
        spans: room of each lane in what comes out, in units.
        per: entries per unit of each plane, a divisor of the plane's entries.
        fresh: planes ``[entries, width]`` that the source goes on with, behind those of ``planes``.
    """
    kept = np.array([len(u) for u in units], np.int64)
    if (kept > spans).any():
        lane = int(np.argmax(kept - spans))
        raise ValueError(f"lane {lane} keeps {kept[lane]} units, but its span has {spans[lane]}")
    total, most = int(spans.sum()), int(spans.max(initial=0))
    if total == 0:
        return {name: mx.zeros((0, plane.shape[1]), dtype=plane.dtype) for name, plane in planes.items()}
    last = max(int(start + u[-1]) for start, u in zip(starts, units, strict=True) if len(u)) if kept.any() else -1
    lanes = np.stack([starts, np.cumsum(spans) - spans, spans, kept, np.cumsum(kept) - kept], axis=-1)
    shared = {"lanes": _integers(lanes), "units": _integers(np.concatenate(units))}
    out = {}
    for name, plane in planes.items():
        n = per[name]
        more = None if fresh is None else fresh[name]
        if plane.shape[0] % n or (more is not None and more.shape[0] % n):
            raise ValueError(f"{name} has {plane.shape[0]} entries, not a multiple of the {n} of a unit")
        held = (plane.shape[0] + (0 if more is None else more.shape[0])) // n
        if last >= held:
            raise ValueError(f"unit {last} is to be kept, but {name} has {held}")
        entry = plane.shape[1] * plane.dtype.size
        # Planes start where MLX lets arrays start; fresh rows may be cut from others, at a multiple of an entry.
        word = next(w for w in WORDS if (entry if fresh else n * entry) % w == 0)
        n_words = n * entry // word
        threads = min(THREADS, -(-most * n_words // 32) * 32)
        (out[name],) = _kernel()(
            shared
            | {
                "plane": plane,
                "fresh": plane if more is None else more,
                "shape": _integers(np.array([n_words, plane.shape[0] // n])),
            },
            template=[("BYTES", word), ("EACH", EACH)],
            grid=(-(-most * n_words // (threads * EACH)), len(lanes), 1),
            threadgroup=(threads, 1, 1),
            outputs=[((total * n, plane.shape[1]), plane.dtype)],
        )
    return out


@cache
def _kernel() -> MetalKernel:
    names = ["plane", "fresh", "units", "lanes", "shape"]
    return MetalKernel("compact", file="compact", body=_BODY, inputs=names, outputs=["out"])


def _integers(x: np.ndarray) -> mx.array:
    x = x.reshape(-1).astype(np.int32)
    return mx.array(np.pad(x, (0, max(0, SMALL - len(x)))))
