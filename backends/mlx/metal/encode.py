"""Launch the encode kernels: rows to the planes of a codec, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from kvmlx import layout
from kvmlx.backends.formats import CHANNEL, CODEBOOK, EXACT, Format, format_of, not_encoded
from kvmlx.backends.mlx.metal.loader import SMALL, MetalKernel, integers, nothing
from kvmlx.stages.encode.codecs import CodeBook, Exact
from kvmlx.types import Codec

INPUTS = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}
SIMDGROUPS = 8
"""Of a threadgroup that encodes rows one by one."""
MOST_SIMDGROUPS = 8
"""Of a threadgroup that encodes a block: 256 threads can be launched whatever registers each of them takes."""
STATISTICS = 4096
"""Floats of threadgroup memory that the statistics of a block may take: 16 of the 32 KB there are."""

_PLANES = ("codes0", "codes1", "scales", "offsets")
_TEMPLATE = "KIND, BITS, GROUP, UNBIASED, X, D"
_ROWS = f"""
    threadgroup float shared[Memory<KIND, BITS, D, 1, SIMDGROUPS>::FLOATS];
    encode_rows<{_TEMPLATE}, ROTATED, SIMDGROUPS>(
        (const device uchar*)x, signs, book, shape, Encoded{{PLANES}}, shared,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
_BLOCKS = f"""
    threadgroup float shared[Memory<KIND, BITS, CHANNELS, GROUP, SIMDGROUPS>::FLOATS];
    encode_block<{_TEMPLATE}, CHANNELS, ROTATED, SIMDGROUPS>(
        (const device uchar*)x, signs, book, Encoded{{PLANES}}, shared,
        threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
_CONVERT = """
    long i = thread_position_in_grid.x;
    if (i < long(shape[0]) * shape[1]) {
      convert<TO>(x, rows, i);
    }
"""


def supported(codec: Codec, dim: int) -> str | None:
    """Return why there is no kernel for rows of ``dim`` channels, or None where there is one."""
    fits = dim % 8 == 0 and 8 <= dim <= 512 and (dim <= 256 or dim % 16 == 0)
    return not_encoded(codec, dim, fits, "multiples of 8 up to 256 and multiples of 16 up to 512 have one")


def encode(codec: Codec, x: mx.array) -> dict[str, mx.array]:
    """Return the planes of rows ``x [..., n, D]``: those of ``codec.encode``, byte for byte.

    Rows are read in words of 16 bytes, so each must start at a multiple of that in its buffer: as rows of such D do
    in any array ``[..., D]``, or in a part of it.
    """
    if x.ndim < 2 or x.dtype not in INPUTS:
        raise ValueError(f"encode takes rows [..., n, D] of {', '.join(INPUTS.values())}, got {x.shape} of {x.dtype}")
    *lead, n, dim = x.shape
    reason = supported(codec, dim)
    if reason is not None:
        raise ValueError(reason)
    if n % codec.block:
        raise ValueError(f"rows are encoded in blocks of {codec.block}, got {n} rows")
    shapes = {spec.name: (*lead, n // spec.rows, spec.width) for spec in codec.planes(dim)}
    dtypes = {spec.name: getattr(mx, spec.dtype) for spec in codec.planes(dim)}
    if x.size == 0:
        return {name: mx.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    if isinstance(codec, Exact):
        return {"rows": _exact(codec, x)}
    fmt = format_of(codec, dim)
    names = [fmt.planes[plane] for plane in _PLANES if plane in fmt.planes]
    rows = x.size // dim
    tile = tile_of(fmt, dim)
    template = [
        ("KIND", fmt.kind),
        ("BITS", fmt.bits),
        ("GROUP", fmt.group),
        ("UNBIASED", isinstance(codec, CodeBook) and codec.scale == "unbiased"),
        ("X", EXACT[INPUTS[x.dtype]]),
        ("D", dim),
        ("CHANNELS", tile.channels),
        ("ROTATED", fmt.rotated),
        ("SIMDGROUPS", tile.simdgroups),
    ]
    inputs = {"x": x, "signs": _sign_bits(dim), "book": _book(fmt.kind == CODEBOOK, fmt.bits, dim)}
    if fmt.block == 1:
        inputs["shape"] = integers(rows, least=SMALL)
        grid = (-(-rows // (tile.rows * tile.simdgroups)), 1, 1)
    else:
        grid = (rows // fmt.block, -(-dim // tile.channels), 1)
    planes = _kernel(fmt.block > 1, tuple(plane for plane in _PLANES if plane in fmt.planes))(
        inputs,
        template=template,
        grid=grid,
        threadgroup=(32 * tile.simdgroups, 1, 1),
        outputs=[(shapes[name], dtypes[name]) for name in names],
    )
    return dict(zip(names, planes, strict=True))


def _exact(codec: Exact, x: mx.array) -> mx.array:
    if INPUTS[x.dtype] == codec.dtype:
        return x.view(mx.uint16) if codec.dtype == "bfloat16" else x
    rows, dim = x.size // x.shape[-1], x.shape[-1]
    dtype = mx.uint16 if codec.dtype == "bfloat16" else getattr(mx, codec.dtype)
    shape = mx.array([rows, dim] + [0] * (SMALL - 2), mx.int32)
    (out,) = _converter()(
        {"x": x, "shape": shape},
        template=[("TO", EXACT[codec.dtype])],
        grid=(-(-x.size // 256), 1, 1),
        threadgroup=(256, 1, 1),
        outputs=[(x.shape, dtype)],
    )
    return out


@dataclass(frozen=True)
class Tile:
    """Channels of a row that a threadgroup takes, rows in a simdgroup, simdgroups: as encode.metal's Tile has it."""

    channels: int
    rows: int
    simdgroups: int


@cache
def tile_of(fmt: Format, dim: int) -> Tile:
    """Return how a threadgroup divides rows of ``dim`` channels."""
    channels = dim
    if fmt.kind == CHANNEL and not fmt.rotated:
        # Channels are independent: a slab of them with about a row for each lane, at least 32 for the loads' sake.
        channels = min(_power_up_to(dim), 256, max(32, 4096 // fmt.block))
    parts = channels // (8 if channels <= 256 else 16)
    if fmt.block == 1:
        return Tile(channels, 32 // parts, SIMDGROUPS)
    rows = min(_power_up_to(32 // parts), fmt.block)
    per_simdgroup = 2 * channels
    if fmt.kind == CODEBOOK:
        odd = parts // (parts & -parts)
        per_simdgroup = channels + (rows * odd * (channels // parts) if odd > 1 else 0)
    most = min(MOST_SIMDGROUPS, fmt.block // rows, STATISTICS // per_simdgroup)
    return Tile(channels, rows, _power_up_to(most))


def _power_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@cache
def _kernel(blocks: bool, planes: tuple[str, ...]) -> MetalKernel:
    given = ", ".join(plane if plane in planes else "nullptr" for plane in _PLANES)
    return MetalKernel(
        "encode_block" if blocks else "encode_rows",
        file="encode",
        body=(_BLOCKS if blocks else _ROWS).replace("PLANES", given),
        inputs=["x", "signs", "book"] if blocks else ["x", "signs", "book", "shape"],
        outputs=list(planes),
    )


@cache
def _converter() -> MetalKernel:
    return MetalKernel("convert_rows", file="encode", body=_CONVERT, inputs=["x", "shape"], outputs=["rows"])


@cache
def _sign_bits(dim: int) -> mx.array:
    """Return the rotation's signs as a bit per channel, lowest bit first, set where the sign is negative."""
    bits = np.packbits(layout.signs(dim) < 0, bitorder="little")
    return mx.array(np.pad(bits, (0, max(0, SMALL - len(bits)))))


@cache
def _book(is_book: bool, bits: int, dim: int) -> mx.array:
    """Return the levels of a code book and the borders between them; zeros without one."""
    if not is_book:
        return nothing(mx.float32)
    book = np.concatenate([layout.code_book(bits, dim), layout.thresholds(bits)])
    return mx.array(np.pad(book, (0, max(0, SMALL - len(book)))))
