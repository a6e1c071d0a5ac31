"""Move what is kept of a ragged body to new spans: bytes as they are, whatever they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx.backends.torch.triton.launch import TritonKernel, upload

DTYPES = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""What planes are moved as. Four neighbouring int32 are one access of 16 bytes where a unit is a multiple of them."""
LANE_NUMBERS = 8
"""Numbers of a lane, of which 5 are used: what lies behind them stays aligned."""

_LANE_NUMBERS = tl.constexpr(LANE_NUMBERS)


@triton.jit(do_not_specialize=["n_tiles", "base"])
def compact_kernel(
    plane,  # the source: words of `plane`, and units from `base` on of `fresh` (None: there is none)
    fresh,
    units,  # kept units, relative to their lane's first
    lanes,  # [lanes, LANE_NUMBERS]: first unit in the source, first in `out`, units of the span, kept, first in `units`
    out,
    n_tiles,  # of the longest span
    base,
    WIDTH: tl.constexpr,  # words of a unit
    WORDS: tl.constexpr,  # words of a program
):
    """Write words of a lane's new span. What a span has beyond the units kept becomes zero."""
    pid = tl.program_id(0)
    lane = lanes + pid // n_tiles * _LANE_NUMBERS
    first = pid % n_tiles * WORDS
    end = tl.load(lane + 2) * WIDTH
    if first >= end:
        return
    i = first + tl.arange(0, WORDS)
    unit = i // WIDTH
    word = i % WIDTH
    kept = unit < tl.load(lane + 3)
    source = tl.load(units + tl.load(lane + 4) + unit, mask=kept, other=0) + tl.load(lane)
    if fresh is None:
        moved = tl.load(plane + source.to(tl.int64) * WIDTH + word, mask=kept, other=0)
    else:
        old = source < base
        moved = tl.load(plane + source.to(tl.int64) * WIDTH + word, mask=kept & old, other=0)
        more = tl.load(fresh + (source - base).to(tl.int64) * WIDTH + word, mask=kept & (source >= base), other=0)
        moved = tl.where(old, moved, more)
    tl.store(out + tl.load(lane + 1).to(tl.int64) * WIDTH + i, moved, mask=i < end)


_COMPACT = TritonKernel(compact_kernel)


@dataclass(frozen=True)
class Config:
    """What a program moves."""

    words: int
    """Of 1, 2 or 4 bytes."""
    num_warps: int


def compact(
    planes: Mapping[str, Tensor],
    starts: np.ndarray,
    units: Sequence[np.ndarray],
    spans: np.ndarray,
    *,
    per: Mapping[str, int],
    fresh: Mapping[str, Tensor] | None = None,
    config: Config | None = None,
) -> dict[str, Tensor]:
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
        config: words and warps of a program; None for those of `config_of`.
    """
    kept = np.array([len(u) for u in units], np.int64)
    if (kept > spans).any():
        lane = int(np.argmax(kept - spans))
        raise ValueError(f"lane {lane} keeps {kept[lane]} units, but its span has {spans[lane]}")
    total, most = int(spans.sum()), int(spans.max(initial=0))
    if total == 0:
        return {name: plane.new_empty((0, plane.shape[1])) for name, plane in planes.items()}
    last = max(int(start + u[-1]) for start, u in zip(starts, units, strict=True) if len(u)) if kept.any() else -1
    for name, plane in planes.items():
        n = per[name]
        more = 0 if fresh is None else fresh[name].shape[0]
        if plane.shape[0] % n or more % n:
            raise ValueError(f"{name} has {plane.shape[0]} entries, not a multiple of the {n} of a unit")
        if last >= (plane.shape[0] + more) // n:
            raise ValueError(f"unit {last} is to be kept, but {name} has {(plane.shape[0] + more) // n}")
    lanes = np.zeros((len(units), LANE_NUMBERS), np.int64)
    lanes[:, :5] = np.stack([starts, np.cumsum(spans) - spans, spans, kept, np.cumsum(kept) - kept], axis=-1)
    described = np.concatenate([lanes.ravel(), *units]).astype(np.int32)
    moves = upload(torch.from_numpy(described), next(iter(planes.values())).device)
    shared = {"lanes": moves[: lanes.size], "units": moves[lanes.size :]}
    out = {}
    for name, plane in planes.items():
        more = None if fresh is None else fresh[name]
        out[name] = plane.new_empty((total * per[name], plane.shape[1]))
        _move(plane, more, out[name], per[name], most, len(lanes), shared, config)
    return out


def _move(
    plane: Tensor,
    fresh: Tensor | None,
    out: Tensor,
    per: int,
    most: int,
    n_lanes: int,
    shared: Mapping[str, Tensor],
    config: Config | None,
) -> None:
    n_bytes = per * plane.shape[1] * plane.element_size()
    arrays = {"plane": plane, "fresh": fresh, "out": out}
    flat = {k: x.contiguous().view(torch.uint8).reshape(-1) for k, x in arrays.items() if x is not None}
    # What is cut from an array may start anywhere in it.
    size = next(n for n in DTYPES if n_bytes % n == 0 and not any(x.storage_offset() % n for x in flat.values()))
    config = config or config_of(n_bytes // size)
    width = n_bytes // size
    n_tiles = -(-most * width // config.words)
    constants = {"WIDTH": width, "WORDS": config.words} | ({"fresh": None} if fresh is None else {})
    tensors = {k: x.view(DTYPES[size]) for k, x in flat.items()}
    arguments = {**tensors, **shared, "n_tiles": n_tiles, "base": plane.shape[0] // per}
    _COMPACT((n_lanes * n_tiles,), arguments, constants, num_warps=config.num_warps)


def config_of(width: int) -> Config:
    """Return what a program moves of units of ``width`` words."""
    return Config(2048 if width >= 4 else 1024, 4)


def configurations(width: int) -> list[Config]:
    """Return what `config_of` might return as well, for a sweep on a GPU."""
    chosen = config_of(width)
    return [chosen] + [c for c in (Config(256 * k, w) for k in (2, 4, 8, 16, 32) for w in (2, 4, 8)) if c != chosen]
