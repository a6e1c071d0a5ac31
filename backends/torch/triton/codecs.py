# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Packed codes on their way to the matrix units: what a word of a plane becomes, without leaving its registers.

A tile of a plane is loaded as WORDS, each with the `codes_per_word` codes of consecutive channels: code j of every word
is STREAM j, a tile as wide as there are words. Attention needs no more than that: q . k is the sum over the streams of
q_j . k_j, and the output's channels are the streams' accumulators, dealt back at the end. So nothing is joined or
interleaved, words go to the matrix units' operand layout while they are packed, and two of 16 bits lie in a register.

`streams` is written twice. On NVIDIA (`ptx`) a code is masked into the mantissa of the half 1024, where it counts in
units of two to the bit that it stands at, two codes at a time; one multiply-add leaves the number. Elsewhere, and for
float32, integers are converted. Levels of a code book are a polynomial in the centered code, as near to them as a half
can be (`POLYNOMIALS`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvmlx import layout
from kvmlx.backends.formats import CODEBOOK, FLOAT32, Format

EXACT_KINDS = tl.constexpr(FLOAT32)
"""Kinds up to this one are rows as they are."""
_CODEBOOK = tl.constexpr(CODEBOOK)

POLYNOMIALS: dict[int, tuple[float, ...]] = {
    1: (1.5957691669464111,),
    2: (1.7857557041665308, 0.2275390625),
    3: (1.9538987436374118, 0.2147216796875, 0.0521240234375, 0.14111328125),
    4: (2.0555372811176573, 0.1953125, 0.34912109375, -0.4853515625, 0.51318359375),
    5: (2.111705796611969, 0.16064453125, 1.0302734375, -3.982421875, 9.0, -9.4921875, 4.03515625),
}
"""(p0, p1, ...) by bits: the level of code c is p0 u (1 + p1 u^2 + p2 u^4 + ...), u = (c + 1/2) / 2^(bits - 1) - 1.

The least largest error in halves: 2e-4 (2 bits), 4e-4 (3), 6e-4 (4) and 7e-4 (5) of a channel's standard deviation,
where rounding the levels themselves to halves costs up to 1e-3. 6 bits have no such polynomial and are looked up.
"""

PLACES: dict[int, tuple[int, ...]] = {
    1: (0, 1, 2, 3, 4, 5, 6, 7),
    2: (0, 2, 4, 6, 8, 2, 4, 6),
    3: (0, 2, 4, 6, 1, 3, 5, 7),
    4: (0, 4, 0, 4),
    5: (0, 4, 1, 5, 0, 4, 1, 5),
    6: (0, 4, 1, 4),
    8: (0, 0),
}
"""Bit of a half's mantissa to which stream j's code goes: with few shifts, and not beyond bit 9."""
CENTERED_PLACES: dict[int, tuple[int, ...]] = PLACES | {
    1: (1, 1, 2, 3, 4, 5, 6, 7),
    2: (1, 2, 4, 6, 8, 2, 4, 6),
    3: (1, 2, 4, 6, 1, 3, 5, 7),
    4: (1, 4, 1, 5),
    5: (1, 4, 1, 5, 1, 4, 1, 5),
}
"""The same where 1/2 is added to the code: there must be a bit below it."""


def codes_per_word(bits: int) -> int:
    """Return the codes of a word: of 16 bits, of 32 (5 bits), and of 8 in a plane of 1 bit a code or a second plane."""
    return len(PLACES[bits])


def streams_of(fmt: Format) -> int:
    """Return the streams into which rows of a format fall: 1 where they are exact."""
    return 1 if fmt.kind <= FLOAT32 else codes_per_word(fmt.bits)


def looked_up(fmt: Format, float32: bool) -> bool:
    """Whether `streams` reads levels from memory: exactly, and slowly."""
    return fmt.kind == CODEBOOK and (float32 or fmt.bits not in POLYNOMIALS)


def level_factor(fmt: Format, dim: int, float32: bool) -> float:
    """Return by what the numbers of `streams` must be multiplied to be codes or levels."""
    return 1.0 if fmt.kind != CODEBOOK or looked_up(fmt, float32) else POLYNOMIALS[fmt.bits][0] / sqrt(dim)


# PTX


@cache
def ptx(bits: int, centered: bool) -> str:
    """Return PTX that makes of two words each stream's pair of halves: codes, or levels where `centered`.

    Operands: the streams; the words, in one register, or in two where they have 32 bits, or none where the first plane
    has words of 8; words of 8 bits in pairs as they lie in memory, and a mask of the own one's bits.
    """
    places = (CENTERED_PLACES if centered else PLACES)[bits]
    n, (low, *more) = len(places), layout.plane_bits(bits)
    code = _Code()
    words = {8: [], 16: [f"${n}"], 32: [f"${n}", f"${n + 1}"]}[n * low]
    if len(words) == 2:
        words = [code.new(f"prmt.b32 {{}}, ${n}, ${n + 1}, 0x{lanes:x};") for lanes in (0x5410, 0x7632)]
    if more or not words:
        at = n + n * low // 16
        mine = code.new(f"and.b32 {{}}, ${at}, ${at + 1};")
        other = code.new(f"shr.u32 {{}}, {mine}, 8;")
        byte = code.new(f"or.b32 {{}}, {mine}, {other};")
        words = words or [byte]
    for j, place in enumerate(places):
        bit = j * low
        source = code.moved(words[bit // 16], place - bit % 16)
        half = 0x6400 | (1 << place >> 1 if centered else 0)
        x = code.new(f"lop3.b32 {{}}, {source}, {_twice((1 << low) - 1 << place)}, {_twice(half)}, 0xea;")
        if more:
            source = code.moved(byte, place + low - j * more[0])
            x = code.new(f"lop3.b32 {{}}, {source}, {_twice((1 << more[0]) - 1 << place + low)}, {x}, 0xea;")
        unit = 2.0 ** -(place + bits - 1 if centered else place)
        x = code.new(f"fma.rn.f16x2 {{}}, {x}, {code.half(unit)}, {code.half(-1024 * unit - centered)};")
        if centered and bits > 1:
            *higher, last = POLYNOMIALS[bits][1:]
            square = code.new(f"mul.rn.f16x2 {{}}, {x}, {x};")
            y = code.half(last)
            for p in (*reversed(higher), 1.0):
                y = code.new(f"fma.rn.f16x2 {{}}, {y}, {square}, {code.half(p)};")
            x = code.new(f"mul.rn.f16x2 {{}}, {y}, {x};")
        code.lines.append(f"mov.b32 ${j}, {x};")
    return code.text()


@cache
def table_ptx(bits: int) -> str:
    """Return PTX that makes of two words each stream's pair of levels, exactly, for code books of 2 and 4 bits.

    ``prmt`` looks four bytes up among eight, by nibbles: once for the levels' low bytes, once for the high ones. It is
    of another pipe than the polynomial's multiply-adds: one side with each keeps both busy.
    """
    n = codes_per_word(bits)
    code = _Code()
    # Words a and b become the bytes a0 b0 a1 b1: two nibbles of each are the selectors of one look-up.
    y = code.new(f"prmt.b32 {{}}, ${n}, ${n}, 0x3120;")
    half = 1 << bits - 1
    levels = (layout.code_book(bits) / POLYNOMIALS[bits][0]).astype(np.float16)
    table = levels[half:] if bits == 4 else levels
    low, high = table.view(np.uint8).reshape(-1, 2).T
    words = [code.new(f"mov.b32 {{}}, 0x{int(x):08x};") for x in (*low.copy().view("<u4"), *high.copy().view("<u4"))]
    lows, highs = words[: len(words) // 2], words[len(words) // 2 :]
    if bits == 4:
        # A code below 8 is looked up as 7 less it, and its level's sign is turned.
        positive = code.new(f"shr.u32 {{}}, {y}, 3;")
        positive = code.new(f"and.b32 {{}}, {positive}, 0x11111111;")
        positive = code.new(f"mul.lo.u32 {{}}, {positive}, 7;")
        selectors = [(code.new(f"lop3.b32 {{}}, {y}, {positive}, 0x77777777, 0x82;"), (0, 1), (2, 3))]
        moved = code.new(f"shl.b32 {{}}, {y}, 4;")
    else:
        odd = code.new(f"shr.u32 {{}}, {y}, 2;")
        even, odd = (code.new(f"and.b32 {{}}, {x}, 0x33333333;") for x in (y, odd))
        selectors = [(even, (0, 2), (4, 6)), (odd, (1, 3), (5, 7))]
        moved = ""
    for selector, *streams_ in selectors:
        for i, pair in enumerate(streams_):
            at = code.new(f"shr.u32 {{}}, {selector}, 16;") if i else selector
            low = code.new(f"prmt.b32 {{}}, {lows[0]}, {lows[-1]}, {at};")
            high = code.new(f"prmt.b32 {{}}, {highs[0]}, {highs[-1]}, {at};")
            if moved:
                sign = code.new(f"prmt.b32 {{}}, {moved}, {y}, 0x{(0xD9C8, 0xFBEA)[i]:x};")
                high = code.new(f"lop3.b32 {{}}, {high}, {sign}, 0x80808080, 0xd2;")
            for stream, lanes in zip(pair, (0x6240, 0x7351), strict=True):
                code.lines.append(f"prmt.b32 ${stream}, {low}, {high}, 0x{lanes:x};")
    return code.text()


class _Code:
    """Lines of PTX and their temporary registers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self.known: dict[str, str] = {}

    def new(self, line: str) -> str:
        """Add a line whose result goes into a new register, the {} in it; the same line is not added twice."""
        if line not in self.known:
            self.known[line] = f"t{self.count}"
            self.lines.append(line.format(self.known[line]))
            self.count += 1
        return self.known[line]

    def moved(self, register: str, by: int) -> str:
        return self.new(f"{'shl.b32' if by > 0 else 'shr.u32'} {{}}, {register}, {abs(by)};") if by else register

    def half(self, x: float) -> str:
        """Return a register with two halves of x, which must be one."""
        bits = int(np.float16(x).view(np.uint16))
        return self.new(f"mov.b32 {{}}, {_twice(bits)};")

    def text(self) -> str:
        return " ".join(["{", f".reg .b32 t<{self.count}>;", *self.lines, "}"])


def _twice(bits: int) -> str:
    return f"0x{bits:04x}{bits:04x}"


def _constraints(bits: int) -> str:
    n, (low, *more) = codes_per_word(bits), layout.plane_bits(bits)
    inputs = n * low // 16 + (2 if more or n * low == 8 else 0)
    return ",".join(["=&r"] * n + ["r"] * inputs)


def compile_time(f: Callable[..., Any]) -> Any:
    """Make of ``f(backend, *numbers)`` what kernels can call as they are compiled.

    The backend, ``cuda`` or ``hip``, is that of what is compiled for, not of the machine; the interpreter has no name.
    Triton does not see f, and keeps compiled kernels by their source and the constants that it names: what f gives must
    depend on nothing else, or on what such a constant stands for (`_TEXTS`).
    """

    def called(*numbers: Any, _semantic: Any = None, _builder: Any = None) -> Any:
        # Triton hands itself to what it takes for its own; Triton before 3.4 hands its builder.
        options = getattr(getattr(_semantic, "builder", _builder), "options", None)
        backend = getattr(options, "backend_name", "")
        return tl.constexpr(f(backend, *(getattr(x, "value", x) for x in numbers)))

    called.__triton_builtin__ = True  # type: ignore[attr-defined]
    return called


compiled_for = compile_time(lambda backend, name: backend == name)
_assembly = compile_time(lambda _, bits, centered, table: table_ptx(bits) if table else ptx(bits, centered))
_registers = compile_time(lambda _, bits: _constraints(bits))
_halves = compile_time(lambda _, bits: (tl.float16,) * codes_per_word(bits))
_terms = compile_time(lambda _, bits: len(POLYNOMIALS[bits]))
_coefficient = compile_time(lambda _, bits, i: (1.0, *POLYNOMIALS[bits][1:])[i])


def _texts() -> str:
    """Return a digest of what the functions above give."""
    made = [ptx(b, centered) for b in PLACES for centered in (False, True) if b in POLYNOMIALS or not centered]
    return hashlib.sha256(repr((made, [table_ptx(b) for b in (2, 4)], POLYNOMIALS)).encode()).hexdigest()


_TEXTS = tl.constexpr(_texts())


# Kernels


@triton.jit
def product(a, b, acc):
    """Return acc + a b, float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def bound(x):
    """Return a bound of a loop: NumPy 2.4 makes no integer of the interpreter's arrays of one element."""
    if INTERPRETED:
        return x if isinstance(x, int) else int(x.handle.data.item())
    return x


INTERPRETED = tl.constexpr(not isinstance(product, triton.JITFunction))


@triton.jit
def load_words(codes0, codes1, first, rows, live, D: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
               BITS: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Load rows of a plane as words: a tuple of tiles ``[rows, W]``, or ``[W, rows]`` where TURNED, for `streams`.

    first: int64, entry of row 0. rows, live: [T], those to load; zeros elsewhere, and beyond a row's words.
    Exact rows are words of one channel. W: words of a row, padded to a power of two.
    """
    if KIND <= EXACT_KINDS:
        words = (_load(codes0 + first * D, rows, live, D, W, TURNED),)
    elif BITS == 1:
        words = _load_bytes(codes0, first, rows, live, D // 8, W, TURNED)
    elif BITS == 2 or BITS == 4 or BITS == 8:
        N: tl.constexpr = D * BITS // 16
        words = (_load(codes0.to(tl.pointer_type(tl.int16)) + first * N, rows, live, N, W, TURNED),)
    else:
        N: tl.constexpr = D // 4 if BITS == 6 else D // 8
        low = codes0.to(tl.pointer_type(tl.int32 if BITS == 5 else tl.int16)) + first * N
        words = (_load(low, rows, live, N, W, TURNED),)
        words += _load_bytes(codes1, first, rows, live, N, W, TURNED)
    return words


@triton.jit
def _load(p, rows, live, N: tl.constexpr, W: tl.constexpr, TURNED: tl.constexpr):
    """Load the N words of rows, each in its place of W."""
    w = tl.arange(0, W)
    if TURNED:
        at = rows[None, :] * N + w[:, None]
        mask = live[None, :] if W == N else live[None, :] & (w < N)[:, None]
    else:
        at = rows[:, None] * N + w[None, :]
        mask = live[:, None] if W == N else live[:, None] & (w < N)[None, :]
    return tl.load(p + at, mask=mask, other=0)


@triton.jit
def _load_bytes(p, first, rows, live, N: tl.constexpr, W: tl.constexpr, TURNED: tl.constexpr):
    """Load words of 8 bits: int16 tiles of the two that lie together, and of masks of the own one's 8 bits."""
    if N % 2 == 0:
        p = p.to(tl.pointer_type(tl.int16)) + first * (N // 2)
        w = tl.arange(0, W) % 2
        if TURNED:
            x = _load(p, rows, live, N // 2, W // 2, TURNED)
            x = tl.reshape(tl.broadcast_to(x[:, None, :], (W // 2, 2, x.shape[1])), (W, x.shape[1]))
            mask = tl.where(w == 0, 0x00FF, -0x0100).to(tl.int16)[:, None]
        else:
            x = _load(p, rows, live, N // 2, W // 2, TURNED)
            x = tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], W // 2, 2)), (x.shape[0], W))
            mask = tl.where(w == 0, 0x00FF, -0x0100).to(tl.int16)[None, :]
    else:
        x = _load(p + first * N, rows, live, N, W, TURNED).to(tl.int16)
        mask = tl.full((1, 1), 0x00FF, tl.int16)
    return x, mask


@triton.jit
def streams(words, levels, KIND: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, TABLE: tl.constexpr,
            T: tl.constexpr):  # fmt: skip
    """Return the numbers that words hold: a tuple of S tiles, one for each stream, in the dtype T.

    Codes of affine formats; levels of code books, but for the factor `level_factor`; exact rows as they are.
    S: `streams_of` the format. TABLE: whether `table_ptx` is preferred. T: float16 or float32; of exact rows their own.
    """
    texts: tl.constexpr = _TEXTS  # noqa: F841
    if KIND <= EXACT_KINDS:
        out = words
    elif KIND == _CODEBOOK and (tl.float32 == T or BITS == 6):
        out = ()
        for j in tl.static_range(S):
            out += (tl.load(levels + _code(words, j, BITS).to(tl.int32)).to(T),)
    elif tl.float16 == T and compiled_for("cuda"):
        out = _streams_by_ptx(words, BITS, KIND == _CODEBOOK, TABLE and KIND == _CODEBOOK and (BITS == 2 or BITS == 4))
    else:
        out = ()
        for j in tl.static_range(S):
            x = _code(words, j, BITS).to(T)
            out += (_level(x, BITS) if KIND == _CODEBOOK else x,)
    return out


@triton.jit
def _streams_by_ptx(words, BITS: tl.constexpr, CENTERED: tl.constexpr, TABLE: tl.constexpr):
    text: tl.constexpr = _assembly(BITS, CENTERED, TABLE)
    registers: tl.constexpr = _registers(BITS)
    types: tl.constexpr = _halves(BITS)
    if BITS == 1:
        out = tl.inline_asm_elementwise(text, registers, [words[0], words[1]], dtype=types, is_pure=True, pack=2)
    elif BITS == 3 or BITS == 5 or BITS == 6:
        args = [words[0], words[1], words[2]]
        out = tl.inline_asm_elementwise(text, registers, args, dtype=types, is_pure=True, pack=2)
    else:
        out = tl.inline_asm_elementwise(text, registers, [words[0]], dtype=types, is_pure=True, pack=2)
    return out


@triton.jit
def _code(words, j: tl.constexpr, BITS: tl.constexpr):
    """Return the integer codes of stream j."""
    LOW: tl.constexpr = 2 if BITS == 3 else 4 if BITS == 5 or BITS == 6 else BITS
    if BITS == 1:
        x = (_byte(words[0], words[1]) >> j) & 1
    else:
        x = (words[0] >> (j * LOW)) & ((1 << LOW) - 1)
        if BITS != LOW:
            HIGH: tl.constexpr = BITS - LOW
            y = (_byte(words[1], words[2]) >> (j * HIGH)) & ((1 << HIGH) - 1)
            x = x | (y.to(x.dtype) << LOW)
    return x


@triton.jit
def _byte(x, mask):
    x = x & mask
    return x | (x >> 8)


@triton.jit
def _level(code, BITS: tl.constexpr):
    """Return u (1 + p1 u^2 + p2 u^4 + ...) of `POLYNOMIALS`."""
    u = code * (2.0 / (1 << BITS)) + (1.0 / (1 << BITS) - 1.0)
    if BITS > 1:
        square = u * u
        z = square * _coefficient(BITS, _terms(BITS) - 1) + _coefficient(BITS, _terms(BITS) - 2)
        for i in tl.static_range(3, _terms(BITS) + 1):
            z = z * square + _coefficient(BITS, _terms(BITS) - i)
        u = z * u
    return u


@triton.jit
def deal(x, S: tl.constexpr):
    """Return the streams of ``x [R, W * S]``, channels in their order: a tuple of S tiles ``[R, W]``."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // S
    parts = (x,)
    # Bit by bit of the stream's number, the lowest first.
    for i in tl.static_range(3 if S == 8 else 2 if S == 4 else 1 if S == 2 else 0):
        even = ()
        odd = ()
        for j in tl.static_range(1 << i):
            a, b = tl.split(tl.reshape(parts[j], (R, W * (S >> (i + 1)), 2)))
            even += (a,)
            odd += (b,)
        parts = even + odd
    return parts


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """Multiply blocks of channels of float32 ``x [R, P]`` by the orthonormal Hadamard matrix, P a power of two."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    for i in tl.static_range(8):
        if (1 << i) < BLOCK:
            a, b = tl.split(tl.permute(tl.reshape(x, (R, P // (2 << i), 2, 1 << i)), (0, 1, 3, 2)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, P))
    return x * (1.0 / tl.sqrt(BLOCK * 1.0))
