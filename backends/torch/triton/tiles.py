# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Tiles of rows on their way to the matrix units: read from their planes and dequantized in registers.

`tile` gives rows of one side, ``[ROWS, P]``, channels in order, and is written twice. The plain way unpacks byte by
byte and scales in float32: it runs in the interpreter and on any GPU. On NVIDIA, but for float32 models, most formats
(`ptx_of`) go through pairs of halves in 32-bit registers, two codes an instruction and without a conversion: a byte is
copied into both lanes, each keeps one code where it stands, and OR puts it into the mantissa of the power of two that
makes an integer of it there (1024 at bit 0, 64 at bit 4). Subtracting that power leaves the code, exactly; one
multiply-add applies scale and zero. For two values that is 4 instructions with 4 bits, 3 with 8, 3.5 with 2. The levels
of a code book of 2 to 5 bits are looked up in registers: `prmt` takes four bytes out of eight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvmlx import layout
from kvmlx.backends.formats import AFFINE, CHANNEL, CODEBOOK, FLOAT32, Format
from kvmlx.backends.torch.triton.codecs import compile_time

_AFFINE = tl.constexpr(AFFINE)
_CHANNEL = tl.constexpr(CHANNEL)
_CODEBOOK = tl.constexpr(CODEBOOK)
_EXACT = tl.constexpr(FLOAT32)
"""Kinds up to this one are rows as they are."""

_FOUR = tl.constexpr((tl.int32, tl.int32, tl.int32, tl.int32))

ONES = 0x11111111
BITS_APART = ((12, 0x000F000F), (6, 0x03030303), (3, ONES))
"""Shifts and masks that put 8 bits into 8 nibbles."""
LOOKED_UP = (2, 3, 4, 5)
"""Bits of the code books whose levels `prmt` looks up."""


# PTX


@cache
def codes_ptx(bits: int) -> str:
    """Return PTX that makes the codes of 8 channels pairs of halves: $0 to $3 of $4 (and $5, the second plane).

    A plane's 8 codes lie in one register, as they are stored; those of 8 bits in one of 64 bits.
    """
    low, *more = layout.plane_bits(bits)
    lines = [".reg .b32 t, u, v, a, b;"]
    if low == 8:
        lines += ["mov.b64 {a, b}, $4;", "mov.b32 u, 0x64646464;", "mov.b32 v, 0xe400e400;"]
        for pair in range(4):
            lines += [
                f"prmt.b32 t, {'aabb'[pair]}, u, 0x{(0x4140, 0x4342)[pair % 2]:x};",
                f"add.rn.f16x2 ${pair}, t, v;",
            ]
        return _block(lines)
    for pair in range(4):
        byte, at = divmod(2 * pair * low, 8)
        # The half with exponent field 25 - k counts bit k of its mantissa as 1.
        power = (25 - at) << 10 | (25 - at - low) << 26
        lines += [f"prmt.b32 t, $4, 0, 0x{1111 * byte};", f"mov.b32 v, 0x{power:08x};"]
        lines += [f"lop3.b32 t, t, 0x{_pair_mask(low, at, at + low):08x}, v, 0xea;"]
        if more:
            high = more[0]
            byte, bit = divmod(2 * pair * high, 8)
            if bit == 0:
                # A pair's second code moves `low - high` bits further than its first: one product moves both.
                lines += [f"prmt.b32 u, $5, 0, 0x444{byte};", f"mul.lo.u32 u, u, 0x{1 | 1 << 16 + low - high:x};"]
            left = at + low - bit
            lines += [f"{'shl.b32' if left >= 0 else 'shr.u32'} v, u, {abs(left)};"]
            lines += [f"lop3.b32 t, v, 0x{_pair_mask(high, at + low, at + 2 * low):08x}, t, 0xea;"]
        lines += [f"mov.b32 v, 0x{power | 0x80008000:08x};", f"add.rn.f16x2 ${pair}, t, v;"]
    return _block(lines)


def _pair_mask(width: int, low_lane: int, high_lane: int) -> int:
    """Return ones for a field of ``width`` bits from a bit of each lane on."""
    return (1 << width) - 1 << low_lane | (1 << width) - 1 << high_lane + 16


def _block(lines: list[str]) -> str:
    return "{ " + " ".join(lines) + " }"


@cache
def levels_ptx(bits: int) -> str:
    """Return PTX that makes the codes of 8 channels pairs of their levels: $0 to $3 of the planes and of `table_of`.

    The codes become nibbles, of which `prmt` takes four as indices into 8 bytes. Code books of 4 and 5 bits are
    symmetric: a code of the lower half is looked up as the one that mirrors it, and the sign of its level is turned.
    """
    planes = len(layout.plane_bits(bits))
    lines = [".reg .b32 x, y, z, s, l, h, m, a0, a1, b0, b1, c0, c1, d0, d1;"]
    for i, name in enumerate("abcd"[: 2 if bits < 5 else 4]):
        lines += [f"mov.b64 {{{name}0, {name}1}}, ${4 + planes + i};"]
    if bits == 4:
        lines += ["not.b32 s, $4;", "and.b32 s, s, 0x88888888;", "shr.u32 y, s, 3;", "sub.u32 y, s, y;"]
        lines += ["lop3.b32 x, $4, y, 0x77777777, 0x28;"]
    elif bits == 5:
        lines += [*_spread("y", "$5", BITS_APART), f"xor.b32 s, y, 0x{ONES:08x};", "mul.lo.u32 y, s, 15;"]
        lines += ["xor.b32 m, $4, y;", "shl.b32 s, s, 3;", "and.b32 x, m, 0x77777777;"]
    else:
        lines += _spread("x", "$4", ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)))
    if bits == 3:
        lines += [*_spread("y", "$5", BITS_APART), "shl.b32 y, y, 2;", "or.b32 x, x, y;"]
    for half in range(2):
        bytes_of_half = f"0x{(0x1100, 0x3322)[half]:x}"
        if half:
            lines += ["shr.u32 x, x, 16;"]
        lines += ["prmt.b32 l, a0, a1, x;", "prmt.b32 h, b0, b1, x;"]
        if bits == 5:
            # Bit 3 of a nibble, as a byte of ones or zeros, takes the second 8 entries.
            lines += [f"prmt.b32 z, m, 0, {bytes_of_half};", "shl.b32 y, z, 4;", "lop3.b32 y, y, z, 0x00ff00ff, 0xe4;"]
            lines += ["prmt.b32 y, y, 0, 0xba98;", "prmt.b32 z, c0, c1, x;", "lop3.b32 l, z, l, y, 0xe4;"]
            lines += ["prmt.b32 z, d0, d1, x;", "lop3.b32 h, z, h, y, 0xe4;"]
        if bits >= 4:
            lines += [f"prmt.b32 z, s, 0, {bytes_of_half};", "shl.b32 y, z, 4;"]
            lines += ["lop3.b32 h, y, 0x00800080, h, 0x6a;", "lop3.b32 h, z, 0x80008000, h, 0x6a;"]
        lines += [f"prmt.b32 ${2 * half}, l, h, 0x5140;", f"prmt.b32 ${2 * half + 1}, l, h, 0x7362;"]
    return _block(lines)


def _spread(to: str, of: str, steps: tuple[tuple[int, int], ...]) -> list[str]:
    """Move fields apart, half of them at a time."""
    lines = []
    for shift, mask in steps:
        lines += [f"shl.b32 z, {of}, {shift};", f"lop3.b32 {to}, {of}, z, 0x{mask:08x}, 0xa8;"]
        of = to
    return lines


def table_of(fmt: Format, dim: int) -> np.ndarray | None:
    """Return what `levels_ptx` looks up, int64 [4]: of levels as halves the low, then the high bytes, 8 at a time.

    They are those of codes up to 3 bits, the positive ones of codes of 4 and 5. None for formats without.
    """
    if fmt.kind != CODEBOOK or fmt.bits not in LOOKED_UP:
        return None
    book = layout.code_book(fmt.bits, dim).astype(np.float16)
    halves = np.resize(book[len(book) // 2 :] if fmt.bits >= 4 else book, 16)
    return np.ascontiguousarray(halves.view(np.uint8).reshape(2, 8, 2).transpose(0, 2, 1)).reshape(-1).view(np.int64)


def ptx_of(backend: str, kind: int, bits: int, dtype: Any) -> str:
    """Return the PTX of a format's tiles, nothing where they are made the plain way."""
    if backend != "cuda" or dtype != tl.float16 or kind <= FLOAT32:
        return ""
    if kind == CODEBOOK:
        return levels_ptx(bits) if bits in LOOKED_UP else ""
    return codes_ptx(bits)


_ptx = compile_time(ptx_of)


# Kernels


@triton.jit
def _load(p, rows, columns, ROWS_MASKED: tl.constexpr, COLUMNS_MASKED: tl.constexpr):
    """Load [rows, columns]; zeros where a mask that is asked for says so."""
    if ROWS_MASKED and COLUMNS_MASKED:
        x = tl.load(p, mask=rows[:, None] & columns[None, :], other=0)
    elif ROWS_MASKED:
        x = tl.load(p, mask=rows[:, None], other=0)
    elif COLUMNS_MASKED:
        x = tl.load(p, mask=columns[None, :], other=0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def _repeat_columns(x, N: tl.constexpr):
    """Repeat each column N times, in its place."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.broadcast_to(x[:, :, None], (R, C, N)).reshape(R, C * N)


@triton.jit
def _repeat_rows(x, N: tl.constexpr):
    """Repeat each row N times, in its place."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    return tl.broadcast_to(x[:, None, :], (R, N, C)).reshape(R * N, C)


@triton.jit
def _twice(p, first, r, valid, N: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr):
    """Load rows of N halves, each into both lanes of an int32: [ROWS, COLUMNS], COLUMNS >= N; p: aligned, first even.

    They are read 4 bytes at a time: what is smaller cannot be on its way early.
    """
    words = p.to(tl.pointer_type(tl.int32))
    c = tl.arange(0, COLUMNS)
    if N % 2 == 0:
        w = tl.arange(0, COLUMNS // 2)
        at = words + first * (N // 2) + (r[:, None] * (N // 2) + w[None, :])
        x = _repeat_columns(_load(at, valid, w < N // 2, CHECKED, COLUMNS != N), 2)
        lane = c[None, :] % 2
    else:
        i = r[:, None] * N + c[None, :]
        x = _load(words + (first * N >> 1) + (i >> 1), valid, c < N, CHECKED, COLUMNS != N)
        lane = i & 1
    x = (x >> (lane * 16)) & 0xFFFF
    return x | (x << 16)


@triton.jit
def _of_groups(p, first, r, valid, D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
               CHECKED: tl.constexpr):  # fmt: skip
    """Return a number per row and group for every channel: float32 [ROWS, P], or pairs of halves [ROWS, P // 2]."""
    N: tl.constexpr = D // GROUP
    if PAIRS:
        x = _repeat_columns(_twice(p, first, r, valid, N, P // GROUP, CHECKED), GROUP // 2)
    else:
        g = tl.arange(0, P // GROUP)
        x = _load(p + first * N + (r[:, None] * N + g[None, :]), valid, g < N, CHECKED, P != D)
        x = _repeat_columns(x.to(tl.float32), GROUP)
    return x


@triton.jit
def _of_blocks(p, first, left, ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
               PAIRS: tl.constexpr, CHECKED: tl.constexpr):  # fmt: skip
    """Return a number per channel and GROUP rows for every row: float32 [ROWS, P], or pairs of halves [ROWS, P // 2].

    The tile's rows are whole blocks, or lie within one. left: rows of the lane from the tile's first on.
    """
    BLOCKS: tl.constexpr = ROWS // GROUP if ROWS > GROUP else 1
    e = tl.arange(0, BLOCKS)
    valid = e * GROUP < left
    entry = first // GROUP
    if PAIRS:
        c = tl.arange(0, P // 2)
        at = p.to(tl.pointer_type(tl.int32)) + entry * (D // 2) + (e[:, None] * (D // 2) + c[None, :])
        x = _load(at, valid, c < D // 2, CHECKED, P != D)
    else:
        c = tl.arange(0, P)
        x = _load(p + entry * D + (e[:, None] * D + c[None, :]), valid, c < D, CHECKED, P != D).to(tl.float32)
    return _repeat_rows(x, ROWS // BLOCKS)


@triton.jit
def _plane(p, first, r, valid, D: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """Return one plane's part of every code, int32 [ROWS, P]."""
    BYTES: tl.constexpr = D * WIDTH // 8
    b = tl.arange(0, P * WIDTH // 8)
    x = _load(p + first * BYTES + (r[:, None] * BYTES + b[None, :]), valid, b < BYTES, CHECKED, P != D).to(tl.int32)
    if WIDTH < 8:
        shift = tl.arange(0, 8 // WIDTH) * WIDTH
        x = ((x[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1)).reshape(r.shape[0], P)
    return x


@triton.jit
def _words(p, first, r, valid, D: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """Return one plane's codes as registers of 8, [ROWS, P // 8]: int64 where WIDTH is 8, else int32."""
    if WIDTH == 1:
        q = p
    elif WIDTH == 2:
        q = p.to(tl.pointer_type(tl.uint16))
    elif WIDTH == 4:
        q = p.to(tl.pointer_type(tl.int32))
    else:
        q = p.to(tl.pointer_type(tl.int64))
    N: tl.constexpr = D // 8
    w = tl.arange(0, P // 8)
    x = _load(q + first * N + (r[:, None] * N + w[None, :]), valid, w < N, CHECKED, P != D)
    if WIDTH < 4:
        x = x.to(tl.int32)
    return x


@triton.jit
def _halves(pairs):
    """Return the halves in int32 [R, C] as float16 [R, 2 C]."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    x = tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])
    # Not pure, so that what is above stays where the tile is read: Triton would move it behind the exchange between
    # threads, where on sm_80 every warp would dequantize the whole tile.
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def _scaled(x, scales, zeros):
    """Return x * scales + zeros (None: without) of pairs of halves."""
    if zeros is None:
        y = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, scales], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        y = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, scales, zeros], dtype=tl.int32, is_pure=True, pack=1
        )
    return y


@triton.jit
def tile(
    codes0, codes1, scales, offsets, levels, t0, t1, t2, t3, lane, row, stop,
    ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    T: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Return rows ``row`` to ``row + ROWS`` of a lane in the codec's basis: T [ROWS, P], P >= D.

    codes0 .. levels: the side's planes (`operands`). t0 .. t3: `table_of`, where there is one. lane: int64, the lane's
    first row in the planes. row: a multiple of ROWS. stop: rows of the lane; those from it on are zeros where CHECKED,
    else there are none. Channels from D on may be anything finite.
    """
    r = tl.arange(0, ROWS)
    first = lane + row
    left = stop - row
    valid = r < left
    if KIND <= _EXACT:
        c = tl.arange(0, P)
        x = _load(codes0 + first * D + (r[:, None] * D + c[None, :]), valid, c < D, CHECKED, P != D)
    else:
        ASM: tl.constexpr = _ptx(KIND, BITS, T)
        PAIRS: tl.constexpr = ASM != ""
        LOW: tl.constexpr = 2 if BITS == 3 else 4 if BITS == 5 or BITS == 6 else BITS
        HIGH: tl.constexpr = BITS - LOW
        if KIND == _AFFINE:
            s = _of_groups(scales, first, r, valid, D, P, GROUP, PAIRS, CHECKED)
            z = _of_groups(offsets, first, r, valid, D, P, GROUP, PAIRS, CHECKED)
        elif KIND == _CHANNEL:
            s = _of_blocks(scales, first, left, ROWS, D, P, GROUP, PAIRS, CHECKED)
            z = _of_blocks(offsets, first, left, ROWS, D, P, GROUP, PAIRS, CHECKED)
        else:
            s = _of_groups(scales, first, r, valid, P, P, P, PAIRS, CHECKED)
            z = None
            if GROUP > 0:
                z = _of_blocks(offsets, first, left, ROWS, D, P, GROUP, PAIRS, CHECKED)
        if PAIRS:
            x = _words(codes0, first, r, valid, D, P, LOW, CHECKED)
            if KIND == _CODEBOOK:
                if HIGH > 0:
                    y = _words(codes1, first, r, valid, D, P, HIGH, CHECKED)
                    x0, x1, x2, x3 = tl.inline_asm_elementwise(
                        ASM, "=&r,=&r,=&r,=&r,r,r,l,l,l,l", [x, y, t0, t1, t2, t3], dtype=_FOUR, is_pure=True, pack=1
                    )
                else:
                    x0, x1, x2, x3 = tl.inline_asm_elementwise(
                        ASM, "=&r,=&r,=&r,=&r,r,l,l", [x, t0, t1], dtype=_FOUR, is_pure=True, pack=1
                    )
            elif HIGH > 0:
                y = _words(codes1, first, r, valid, D, P, HIGH, CHECKED)
                x0, x1, x2, x3 = tl.inline_asm_elementwise(
                    ASM, "=&r,=&r,=&r,=&r,r,r", [x, y], dtype=_FOUR, is_pure=True, pack=1
                )
            else:
                REGISTERS: tl.constexpr = "=&r,=&r,=&r,=&r,l" if LOW == 8 else "=&r,=&r,=&r,=&r,r"
                x0, x1, x2, x3 = tl.inline_asm_elementwise(ASM, REGISTERS, [x], dtype=_FOUR, is_pure=True, pack=1)
            pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(ROWS, P // 2)
            x = _halves(_scaled(pairs, s, z))
        else:
            x = _plane(codes0, first, r, valid, D, P, LOW, CHECKED)
            if HIGH > 0:
                x = x | (_plane(codes1, first, r, valid, D, P, HIGH, CHECKED) << LOW)
            x = (tl.load(levels + x) if KIND == _CODEBOOK else x.to(tl.float32)) * s
            if z is not None:
                x = x + z
            x = x.to(T)
    return x
