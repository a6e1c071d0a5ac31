# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Rows to planes in one pass: rotate, find scales, quantize, pack. docs/format.md states the bytes.

After the rotation the arithmetic is that of `kvmlx.stages.encode.codecs` operation by operation, in float32: sums by
halves, divisions and roots correctly rounded, and no product fused with a sum (`fp_fusion=False` below). Butterflies
and sums by halves are made of reductions over an axis of two: the order of two operands does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx import layout
from kvmlx.backends.formats import AFFINE, CHANNEL, CODEBOOK, MAX_DIM, Format, format_of, not_encoded
from kvmlx.backends.torch.triton.launch import TritonKernel, constant
from kvmlx.stages.encode.codecs import CodeBook, Exact
from kvmlx.types import Codec

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
ALIGNED = 8
"""Elements of which the distances between rows are multiples: a thread can then load 16 bytes at once."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What the codes of 8 channels are stored as, by the bits of their plane."""
NUMBERS = {AFFINE: 32, CHANNEL: 32, CODEBOOK: 16}
"""Numbers of a tile that a thread holds: with rows of 16 bits nothing spills on sm_80, sm_90 and gfx942."""
MOST_WARPS = 16
"""Of a program that holds a block. Blocks that do not fit in it are read in parts, and a second time."""

_AFFINE = tl.constexpr(AFFINE)
_CODEBOOK = tl.constexpr(CODEBOOK)
_ALIGNED = tl.constexpr(ALIGNED)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a number from 0 to 255 it leaves that, rounded to even, in the sum's lowest bits."""


@triton.jit
def _halves(x):
    """Add the first half of the last axis to the second."""
    return tl.sum(x.reshape(x.shape[0], 2, x.shape[1] // 2), axis=1)


@triton.jit
def _hadamard(y, P: tl.constexpr, SCALE: tl.constexpr):
    """Multiply consecutive blocks of P channels by the orthonormal Hadamard matrix: butterflies of 1, 2, 4, ..."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    upper = tl.where(tl.arange(0, 2) == 1, -0x80000000, 0)[None, :, None]
    for i in tl.static_range(8):
        if (2 << i) <= P:
            z = y.reshape(R * C // (2 << i), 2, 1 << i)
            # The other of the two, by a sum that wraps: one exchange, and nothing is rounded.
            bits = z.to(tl.int32, bitcast=True)
            other = (tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
            y = (other + (bits ^ upper).to(tl.float32, bitcast=True)).reshape(R, C)
    return y * SCALE


@triton.jit
def _load_rows(x, signs, r, c, stride, n, D: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SCALE: tl.constexpr):
    """Return rows r, channels c of a lane in the codec's basis, float32 [R, C]; zeros where there is none.

    stride: between rows, in units of ALIGNED. signs: None where the codec does not rotate.
    """
    mask = (r < n)[:, None]
    if D % C != 0:
        mask = mask & (c < D)[None, :]
    offsets = (r.to(tl.int64) * stride * _ALIGNED)[:, None] + c[None, :]
    y = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if signs is not None:
        y = _hadamard(y * tl.load(signs + c, mask=c < D, other=1.0)[None, :], P, SCALE)
    return y


@triton.jit
def _fold_columns(v, i, N: tl.constexpr):
    """Add the second half of N columns to the first; columns beyond become garbage."""
    if N == 1:
        return v
    index = tl.broadcast_to(tl.minimum(i + N // 2, v.shape[1] - 1)[None, :], v.shape)
    after = tl.gather(v, index, axis=1)
    return tl.where((i < N // 2)[None, :], v + after, after)


@triton.jit
def _fold_channels(v, D: tl.constexpr, P: tl.constexpr):
    """Sum [R, C] over the D channels in the order of layout.fold_sum: [R]."""
    R: tl.constexpr = v.shape[0]
    C: tl.constexpr = v.shape[1]
    ODD: tl.constexpr = D // P
    WIDE: tl.constexpr = C // P
    if ODD > 1:
        # Halves of D are no halves of C: ODD columns of P, each in a row of WIDE.
        i = tl.arange(0, C)
        index = tl.minimum(i // WIDE * ODD + i % WIDE, C - 1)
        v = tl.gather(v, tl.broadcast_to(index[None, :], (R, C)), axis=1)
    for _ in tl.static_range(8):
        if v.shape[1] > WIDE:
            v = _halves(v)
    if ODD > 1:
        # An odd last column waits for the next round.
        i = tl.arange(0, WIDE)
        for k in tl.static_range(5):
            v = _fold_columns(v, i, (ODD + (1 << k) - 1) >> k)
        v = tl.where((i == 0)[None, :], v, 0.0)
    return tl.sum(v, axis=1)


@triton.jit
def _fold_rows(v):
    """Sum [M, G, C] over the G rows by halves: [M, C]."""
    M: tl.constexpr = v.shape[0]
    C: tl.constexpr = v.shape[2]
    for _ in tl.static_range(8):
        if v.shape[1] > 1:
            v = tl.sum(v.reshape(M, 2, v.shape[1] // 2, C), axis=1)
    return v.reshape(M, C)


@triton.jit
def _rounded(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def _nonzero(x):
    return tl.where(x > 0, x, 1.0)


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr):
    """Return the float16 scale and zero of groups."""
    top = tl.full(low.shape, (1 << BITS) - 1, tl.float32)
    return _rounded(tl.div_rn(high - low, top)), _rounded(low)


@triton.jit
def _affine_codes(x, scale, zero, BITS: tl.constexpr):
    """Return numbers whose lowest bits are the codes; scale and zero in x's shape, or to be broadcast to it."""
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), _nonzero(step)), step)
    code = (x - zero.to(tl.float32)) * inverse
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0)
    return (code + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _codebook_codes(y, book, D: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, UNBIASED: tl.constexpr):
    """Return codes [R, C] and float16 scales [R]. book: the positive half of the borders, then of the levels."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    energy = _fold_channels(y * y, D, P)
    norm = tl.sqrt_rn(energy)
    root: tl.constexpr = D**0.5
    unit = tl.div_rn(tl.full(norm.shape, root, tl.float32), _nonzero(norm))
    u = y * unit[:, None]
    # Borders strictly below u, by its size: of one that is not positive, borders of its very size do not count.
    # The sign bit tells on which side of 0 that is, which costs no register.
    bits = u.to(tl.int32, bitcast=True)
    signed = tl.where(u > 0, bits, (bits | -0x80000000) + 1).to(tl.float32, bitcast=True)
    above = tl.zeros(y.shape, tl.int32)
    level = tl.zeros(y.shape, tl.float32) + tl.load(book + HALF - 1)
    for i in tl.static_range(HALF - 1):
        higher = tl.abs(signed) > tl.load(book + i)
        above = tl.where(higher, i + 1, above)
        if UNBIASED:
            level = tl.where(higher, tl.load(book + HALF + i), level)
    scale = norm
    if UNBIASED:
        # A number and its level have the same sign, but where the number is too small to change any sum.
        scale = tl.div_rn(energy, _nonzero(_fold_channels(tl.abs(y) * level, D, P)))
    return tl.where(signed > 0, HALF + above, HALF - 1 - above), _rounded(scale)


@triton.jit
def _store_codes(
    codes0, codes1, codes, row, exists, slab, D: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """Pack codes [R, C] of rows [R] and store them, the 8 channels of a word by one thread."""
    z = codes.reshape(codes.shape[0], C // 8, 8)
    mask = exists[:, None]
    c8 = slab * (C // 8) + tl.arange(0, C // 8)
    if D % C != 0:
        mask = mask & (c8 < D // 8)[None, :]
    offsets = (row * (D // 8))[:, None] + c8[None, :]
    i = tl.arange(0, 8)[None, None, :]
    if LOW == 8:
        low = tl.sum((z & 255).to(tl.int64) << (i * 8).to(tl.int64), axis=2)
    else:
        low = tl.sum((z & ((1 << LOW) - 1)) << (i * LOW), axis=2)
    tl.store(codes0 + offsets, low.to(codes0.dtype.element_ty), mask=mask)
    if HIGH > 0:
        high = tl.sum(((z >> LOW) & ((1 << HIGH) - 1)) << (i * HIGH), axis=2)
        tl.store(codes1 + offsets, high.to(codes1.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "n_tiles", "stride_lane", "stride_row"])
def encode_rows_kernel(
    x,  # [lanes, n, D], strides in units of ALIGNED
    signs,  # float32 [D], or None
    book,  # float32: the positive half of the borders and levels, or None
    codes0,  # [lanes * n, D / 8] words of 8 codes
    codes1,
    scales,
    offsets,
    n,  # rows of a lane
    n_tiles,  # tiles of a lane
    stride_lane,
    stride_row,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    UNBIASED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Encode rows whose scales are their own: affine codes, and those of a code book without means."""
    BITS: tl.constexpr = LOW + HIGH
    pid = tl.program_id(0)
    lane = pid // n_tiles
    r = pid % n_tiles * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C)
    row = lane.to(tl.int64) * n + r
    y = _load_rows(x + lane.to(tl.int64) * stride_lane * _ALIGNED, signs, r, c, stride_row, n, D, C, P, SCALE)
    if KIND == _AFFINE:
        N: tl.constexpr = C // GROUP
        z = y.reshape(ROWS, N, GROUP)
        scale, zero = _scale_and_zero(tl.min(z, axis=2), tl.max(z, axis=2), BITS)
        codes = _affine_codes(z, scale[:, :, None], zero[:, :, None], BITS).reshape(ROWS, C)
        g = tl.arange(0, N)
        mask = (r < n)[:, None]
        if D % C != 0:
            mask = mask & (g < D // GROUP)[None, :]
        at = (row * (D // GROUP))[:, None] + g[None, :]
        tl.store(scales + at, scale, mask=mask)
        tl.store(offsets + at, zero, mask=mask)
    else:
        codes, scale = _codebook_codes(y, book, D, P, BITS, UNBIASED)
        tl.store(scales + row, scale, mask=r < n)
    _store_codes(codes0, codes1, codes, row, r < n, 0, D, C, LOW, HIGH)


@triton.jit(do_not_specialize=["n", "n_tiles", "stride_lane", "stride_row"])
def encode_blocks_kernel(
    x,  # as in encode_rows_kernel
    signs,
    book,
    codes0,
    codes1,
    scales,
    offsets,
    n,
    n_tiles,
    stride_lane,
    stride_row,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,  # rows of a block, a power of two
    UNBIASED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,  # channels of a program: all of them where they depend on each other
    BLOCKS: tl.constexpr,  # blocks of a program
    PARTS: tl.constexpr,  # parts of a block, which are held one at a time
):
    """Encode blocks of rows that share numbers per channel: affine codes per channel, and a code book with means."""
    BITS: tl.constexpr = LOW + HIGH
    SLABS: tl.constexpr = (D + C - 1) // C
    ROWS: tl.constexpr = BLOCKS * GROUP // PARTS
    pid = tl.program_id(0)
    slab = pid % SLABS
    lane = pid // SLABS // n_tiles
    tile = pid // SLABS % n_tiles
    # Rows of a part are PARTS apart: sums by halves over a block end with sums over its parts.
    r = tile * (BLOCKS * GROUP) + tl.arange(0, ROWS) * PARTS
    c = slab * C + tl.arange(0, C)
    x += lane.to(tl.int64) * stride_lane * _ALIGNED
    first = lane.to(tl.int64) * n
    y = _load_rows(x, signs, r, c, stride_row, n, D, C, P, SCALE)
    z = y.reshape(BLOCKS, GROUP // PARTS, C)
    if KIND == _CODEBOOK:
        total = _fold_rows(z)
        if PARTS > 1:
            k = tl.arange(0, PARTS)[None, :, None]
            totals = tl.broadcast_to(total[:, None, :], (1, PARTS, C))
            for i in range(1, PARTS):
                z = _load_rows(x, signs, r + i, c, stride_row, n, D, C, P, SCALE)[None, :, :]
                totals = tl.where(k == i, _fold_rows(z)[:, None, :], totals)
            total = _fold_rows(totals)
        offset = _rounded(total / GROUP)
        scale = offset
    else:
        low, high = tl.min(z, axis=1), tl.max(z, axis=1)
        for k in range(1, PARTS):
            z = _load_rows(x, signs, r + k, c, stride_row, n, D, C, P, SCALE)[None, :, :]
            low, high = tl.minimum(low, tl.min(z, axis=1)), tl.maximum(high, tl.max(z, axis=1))
        scale, offset = _scale_and_zero(low, high, BITS)
    entry = tile * BLOCKS + tl.arange(0, BLOCKS)
    mask = (entry < n // GROUP)[:, None]
    if D % C != 0:
        mask = mask & (c < D)[None, :]
    at = ((first // GROUP + entry) * D)[:, None] + c[None, :]
    tl.store(offsets + at, offset, mask=mask)
    if KIND != _CODEBOOK:
        tl.store(scales + at, scale, mask=mask)
    for k in range(PARTS):
        if PARTS > 1:
            y = _load_rows(x, signs, r + k, c, stride_row, n, D, C, P, SCALE)
        z = y.reshape(BLOCKS, GROUP // PARTS, C)
        row = first + r + k
        if KIND == _CODEBOOK:
            centered = (z - offset.to(tl.float32)[:, None, :]).reshape(ROWS, C)
            codes, norm = _codebook_codes(centered, book, D, P, BITS, UNBIASED)
            tl.store(scales + row, norm, mask=r + k < n)
        else:
            codes = _affine_codes(z, scale[:, None, :], offset[:, None, :], BITS).reshape(ROWS, C)
        _store_codes(codes0, codes1, codes, row, r + k < n, slab, D, C, LOW, HIGH)


_ENCODE_ROWS = TritonKernel(encode_rows_kernel, fp_fusion=False)
_ENCODE_BLOCKS = TritonKernel(encode_blocks_kernel, fp_fusion=False)


@dataclass(frozen=True)
class Config:
    """How programs divide rows of D channels."""

    channels: int
    """Of a program; a power of two, those beyond D are idle."""
    rows: int
    """Of a program; whole blocks."""
    parts: int
    """In which a block is held."""
    num_warps: int


def supported(codec: Codec, dim: int) -> str | None:
    """Return why there is no kernel for rows of ``dim`` channels, or None where there is one."""
    fits = dim % 8 == 0 and 8 <= dim <= MAX_DIM
    return not_encoded(codec, dim, fits, f"multiples of 8 up to {MAX_DIM} have one")


def encode(codec: Codec, x: Tensor, *, config: Config | None = None) -> dict[str, Tensor]:
    """Return the planes of rows ``x [..., n, D]``: those of ``codec.encode``, byte for byte.

    A part of a larger array is read in place, where its rows lie at multiples of 8 elements.
    """
    if x.ndim < 2 or x.dtype not in DTYPES:
        raise ValueError(f"encode takes rows [..., n, D] of {', '.join(DTYPES.values())}, got {_text(x)}")
    *lead, n, dim = x.shape
    reason = supported(codec, dim)
    if reason is not None:
        raise ValueError(reason)
    if n % codec.block:
        raise ValueError(f"rows are encoded in blocks of {codec.block}, got {n} rows")
    if isinstance(codec, Exact):
        rows = x.to(getattr(torch, codec.dtype))
        return {"rows": rows.view(torch.uint16) if codec.dtype == "bfloat16" else rows}
    planes = {
        spec.name: x.new_empty((*lead, n // spec.rows, spec.width), dtype=getattr(torch, spec.dtype))
        for spec in codec.planes(dim)
    }
    if x.numel() == 0:
        return planes
    fmt = format_of(codec, dim)
    rows = _rows(x)
    config = config or config_of(fmt, dim)
    n_tiles = -(-n // config.rows)
    low, high = (*layout.plane_bits(fmt.bits), 0)[:2]
    power = dim & -dim
    tables = {"signs": _signs(dim, x.device) if fmt.rotated else None, "book": _book(fmt, dim, x.device)}
    outputs: dict[str, Tensor | None] = {
        "codes0": planes["codes0"].view(WORDS[low]),
        "codes1": planes["codes1"].view(WORDS[high]) if high else None,
        "scales": planes["scales"],
        "offsets": planes[fmt.planes["offsets"]] if "offsets" in fmt.planes else None,
    }
    tensors: dict[str, Tensor | None] = {"x": rows, **tables, **outputs}
    arguments = {name: t for name, t in tensors.items() if t is not None} | {
        "n": n,
        "n_tiles": n_tiles,
        "stride_lane": rows.stride(0) // ALIGNED,
        "stride_row": rows.stride(1) // ALIGNED,
    }
    constants: dict[str, Any] = {name: None for name, t in tensors.items() if t is None} | {
        "KIND": fmt.kind,
        "LOW": low,
        "HIGH": high,
        "GROUP": fmt.group,
        "UNBIASED": isinstance(codec, CodeBook) and codec.scale == "unbiased",
        "D": dim,
        "P": power,
        "SCALE": float(np.float32(power**-0.5)),
        "C": config.channels,
    }
    slabs = -(-dim // config.channels)
    grid = (rows.shape[0] * n_tiles * slabs,)
    if fmt.block == 1:
        constants["ROWS"] = config.rows
        _ENCODE_ROWS(grid, arguments, constants, num_warps=config.num_warps)
    else:
        constants |= {"BLOCKS": config.rows // fmt.block, "PARTS": config.parts}
        _ENCODE_BLOCKS(grid, arguments, constants, num_warps=config.num_warps)
    return planes


@cache
def config_of(fmt: Format, dim: int) -> Config:
    """Return how programs divide rows of ``dim`` channels."""
    channels = 1 << (dim - 1).bit_length()
    if fmt.block == 1:
        numbers = NUMBERS[fmt.kind]
        return Config(channels, max(1, min(32, 128 * numbers // channels)), 1, 4)
    if fmt.kind == CHANNEL and not fmt.rotated:
        # Channels are independent: a slab of them, wide enough for whole sectors of memory.
        channels = min(channels, max(32, 4096 // fmt.block))
    rows = max(fmt.block, min(32, 4096 // channels))
    parts = max(1, rows * channels // (MOST_WARPS * 32 * NUMBERS[fmt.kind]))
    threads = rows * channels // parts // NUMBERS[fmt.kind]
    return Config(channels, rows, parts, max(4, threads // 32))


def configurations(fmt: Format, dim: int) -> list[Config]:
    """Return what `config_of` might return as well, for a sweep on a GPU."""
    chosen = config_of(fmt, dim)
    out = {chosen: None}
    for factor in (0.5, 1, 2, 4):
        rows = int(chosen.rows * factor)
        if rows % fmt.block or rows < 8 or (factor > 1 and chosen.parts > 1):
            continue
        for num_warps in (2, 4, 8, 16):
            if 4 <= rows * chosen.channels // chosen.parts // (32 * num_warps) <= NUMBERS[fmt.kind]:
                out[Config(chosen.channels, rows, chosen.parts, num_warps)] = None
    return list(out)


def _rows(x: Tensor) -> Tensor:
    """Return ``[lanes, n, D]`` at distances that a kernel takes, a copy only where it must be one."""
    rows = x.reshape(prod(x.shape[:-2]), *x.shape[-2:])
    distances = [stride for stride, n in zip(rows.stride()[:2], rows.shape, strict=False) if n > 1]
    return rows if rows.stride(2) == 1 and not any(d % ALIGNED for d in distances) else rows.contiguous()


def _text(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"


def _signs(dim: int, device: torch.device) -> Tensor:
    return constant(layout.signs(dim), device)


@cache
def _book(fmt: Format, dim: int, device: torch.device) -> Tensor | None:
    """Return the positive half of a code book's borders and of its levels."""
    if fmt.kind != CODEBOOK:
        return None
    half = 2 ** (fmt.bits - 1)
    book = np.concatenate([layout.thresholds(fmt.bits)[half:], layout.code_book(fmt.bits, dim)[half:]])
    return constant(book, device)
