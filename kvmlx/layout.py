"""The byte format: bit planes, fp16 metadata, the rotation's signs and the code books. See docs/format.md.

Everything here is exact by construction, so that every backend makes the same bytes: integer shifts,
elementwise float32 operations in a stated order, sums by halves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kvmlx.types import Array, PlaneSpec

FLOAT16_MAX = 65504.0
CODE_BITS = (1, 2, 3, 4, 5, 6, 8)
"""Bits of one code that the planes can hold."""
CHANNEL_MULTIPLE = 8
"""Head dims must be multiples of it: then every plane fills whole bytes."""
SIGN_SEED = 0
"""State from which splitmix64 makes the rotation's signs, in every file and on every backend."""

_PLANE_BITS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def plane_bits(bits: int) -> tuple[int, ...]:
    """Return the widths of the bit planes of a code, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2."""
    return _PLANE_BITS[bits]


def code_planes(bits: int, dim: int) -> tuple[PlaneSpec, ...]:
    """Return the planes ``codes0`` (and ``codes1``) of rows of ``dim`` codes."""
    return tuple(PlaneSpec(f"codes{i}", "uint8", dim * w // 8) for i, w in enumerate(plane_bits(bits)))


def row_bytes(planes: Iterable[PlaneSpec]) -> float:
    """Return the bytes that one row takes in ``planes``, metadata included."""
    return sum(plane.row_bytes for plane in planes)


def pack(xp: Any, codes: Array, bits: int) -> tuple[Array, ...]:
    """Pack uint8 ``codes [..., D]`` to bit planes, uint8 ``[..., D * width / 8]`` each.

    A plane of width w holds code d in byte ``d * w // 8`` from bit ``d * w % 8`` up. Planes of 2, 4 and 8
    bits read as little-endian uint32 are thus MLX's own affine packing.
    """
    *lead, dim = codes.shape
    planes, shift = [], 0
    for width in plane_bits(bits):
        part = codes if width == bits else (codes >> shift) & (2**width - 1)
        if width < 8:
            part = xp.reshape(part, (*lead, dim * width // 8, 8 // width))
            byte = part[..., 0]
            for i in range(1, 8 // width):
                byte = byte | (part[..., i] << (i * width))
            part = byte
        planes.append(part)
        shift += width
    return tuple(planes)


def unpack(xp: Any, planes: Sequence[Array], bits: int) -> Array:
    """Undo ``pack``: return uint8 codes ``[..., D]``."""
    codes, shift = None, 0
    for plane, width in zip(planes, plane_bits(bits), strict=True):
        part = plane
        if width < 8:
            *lead, n = plane.shape
            part = (plane[..., None] >> xp.arange(0, 8, width, dtype=xp.uint8)) & (2**width - 1)
            part = xp.reshape(part, (*lead, n * 8 // width))
        codes = part if codes is None else codes | (part << shift)
        shift += width
    return codes


def to_float16(xp: Any, x: Array) -> Array:
    """Round float32 to float16, values beyond its range to the largest finite one."""
    return xp.astype(xp.clip(x, -FLOAT16_MAX, FLOAT16_MAX), xp.float16)


def fold_sum(xp: Any, x: Array, width: int = 1) -> Array:
    """Sum ``x [..., n * width]`` over n by halves, to ``[..., width]``.

    Item i is added to item i + n // 2, again and again; an odd last item waits for the next round. The order
    of a framework's own reduction is its own, and so is the last bit of a scale made by it.
    """
    while (n := x.shape[-1] // width) > 1:
        half = n // 2 * width
        folded = x[..., :half] + x[..., half : 2 * half]
        x = xp.concat([folded, x[..., 2 * half :]], axis=-1) if n % 2 else folded
    return x


def hadamard_block(dim: int) -> int:
    """Return the largest power of two that divides ``dim``: the rotation mixes channels within it."""
    return dim & -dim


@cache
def signs(dim: int) -> np.ndarray:
    """Return the rotation's float32 signs ``[dim]``: -1 where output i of splitmix64 has its top bit."""
    mask, state, out = (1 << 64) - 1, SIGN_SEED, np.ones(dim, np.float32)
    for i in range(dim):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        if (z ^ (z >> 31)) >> 63:
            out[i] = -1.0
    out.flags.writeable = False
    return out


@cache
def code_book(bits: int, dim: int = 1) -> np.ndarray:
    """Return the ``2**bits`` float32 levels of the Lloyd-Max quantizer of N(0, 1 / dim), ascending."""
    half = np.array(_LEVELS[bits]) / np.sqrt(dim)
    return _frozen(np.concatenate([-half[::-1], half]))


@cache
def byte_levels(bits: int, dim: int) -> np.ndarray:
    """Return ``[256, 8 / bits]`` float32: the levels of the codes in each byte, for codes of one plane."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    return code_book(bits, dim)[unpack(np, (byte,), bits)]


@cache
def thresholds(bits: int) -> np.ndarray:
    """Return the ``2**bits - 1`` float32 borders for N(0, 1): a code counts the borders strictly below."""
    half = np.array(_LEVELS[bits])
    middle = (half[1:] + half[:-1]) / 2
    return _frozen(np.concatenate([-middle[::-1], [0.0], middle]))


def _frozen(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    x.flags.writeable = False
    return x


# fmt: off
_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (
        0.128395030, 0.388048299, 0.656759119, 0.942340456,
        1.256231197, 1.618046386, 2.069017227, 2.732589571,
    ),
    5: (
        0.065889660, 0.198051830, 0.331378306, 0.466699523,
        0.604933624, 0.747135704, 0.894565117, 1.048783320,
        1.211804381, 1.386340340, 1.576228079, 1.787233218,
        2.028728399, 2.317739404, 2.691119577, 3.260732493,
    ),
    6: (
        0.033409506, 0.100278289, 0.167296903, 0.234566985,
        0.302192846, 0.370282645, 0.438949672, 0.508313781,
        0.578503031, 0.649655581, 0.721921941, 0.795467656,
        0.870476587, 0.947154945, 1.025736349, 1.106488240,
        1.189720142, 1.275794486, 1.365141020, 1.458276375,
        1.555831225, 1.658588900, 1.767541883, 1.883977241,
        2.009611043, 2.146810217, 2.298981210, 2.471304798,
        2.672273835, 2.917406791, 3.240437055, 3.744101271,
    ),
}
# fmt: on
"""The positive half of the levels, from a Lloyd iteration in float64 (tests/test_layout.py runs it again)."""
