"""What a kernel must know of a codec: the numbers that choose its template, and which codecs there are kernels for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from kvmlx import layout
from kvmlx.stages.encode.codecs import Affine, Channel, CodeBook, Exact
from kvmlx.types import Codec

FLOAT16, BFLOAT16, FLOAT32, AFFINE, CHANNEL, CODEBOOK = range(6)
"""The kinds of codecs, numbered as in codecs.metal."""
MAX_DIM = 256
"""Channels of a row up to which the attention kernels' threadgroup memory and registers reach."""
GROUPS = (8, 16, 32, 64, 128, 256)
"""Numbers that share a scale, or rows that share numbers, for which there are encode kernels."""
EXACT = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}


@dataclass(frozen=True)
class Format:
    """One side of a body, as templates take it."""

    kind: int
    bits: int
    group: int
    """Channels that share a scale (AFFINE), or rows that share scales or means (CHANNEL, CODEBOOK); 0: none do."""
    rotated: bool
    planes: dict[str, str] = field(hash=False)
    """Plane of the codec for each buffer of a kernel: codes0, codes1, scales, offsets."""
    row_bytes: float

    def template(self, side: str) -> list[tuple[str, Any]]:
        """Return the template arguments of side ``"K"`` or ``"V"``."""
        return [
            (f"{side}_KIND", self.kind),
            (f"{side}_BITS", self.bits),
            (f"{side}_GROUP", self.group),
            (f"{side}_ROTATED", self.rotated),
        ]

    @property
    def block(self) -> int:
        """Rows that share an entry of a plane."""
        return self.group if self.kind in (CHANNEL, CODEBOOK) and self.group else 1


@cache
def format_of(codec: Codec, dim: int) -> Format:
    """Return the format of a codec's planes for rows of ``dim`` channels."""
    row_bytes = layout.row_bytes(codec.planes(dim))
    if isinstance(codec, Exact):
        return Format(EXACT[codec.dtype], codec.bits, 0, False, {"codes0": "rows"}, row_bytes)
    names = {f"codes{i}": f"codes{i}" for i in range(len(layout.plane_bits(codec.bits)))} | {"scales": "scales"}
    if isinstance(codec, Affine):
        kind, group, offsets = AFFINE, codec.group(dim), "zeros"
    elif isinstance(codec, Channel):
        kind, group, offsets = CHANNEL, codec.group_size, "zeros"
    elif isinstance(codec, CodeBook):
        kind, group, offsets = CODEBOOK, codec.center, "means"
    else:
        raise TypeError(f"no kernel knows the codec {codec!r}")
    if group:
        names["offsets"] = offsets
    return Format(kind, codec.bits, group, codec.rotation != "none", names, row_bytes)


def unsupported(codecs: tuple[Codec, Codec] | None, dim: int, value_dim: int) -> str | None:
    """Return why no attention kernel takes a body of these codecs (None: a tail only), None where one does."""
    for name, size in (("key", dim), ("value", value_dim)):
        if size % 8 or not 8 <= size <= MAX_DIM:
            return f"a {name} dim of {size} is not a multiple of 8 up to {MAX_DIM}"
    if codecs is None:
        return None
    values = format_of(codecs[1], value_dim)
    if values.block > 1:
        return f"values that share an entry among {values.block} rows"
    return None


def not_encoded(codec: Codec, dim: int, fits: bool, dims: str) -> str | None:
    """Return why no encode kernel makes rows of ``dim`` channels, or None where one does.

    Args:
        codec: what encodes.
        dim: channels of a row.
        fits: whether a framework's kernels have this number of channels.
        dims: which they have, in words.
    """
    if isinstance(codec, Exact):
        return None
    if not isinstance(codec, (Affine, Channel, CodeBook)):
        return (
            f"encode: no kernel for {type(codec).__name__}; there are kernels for Affine, Channel, CodeBook and Exact"
        )
    if not fits:
        return f"encode: no kernel for a head dim of {dim}; {dims}"
    most = 6 if isinstance(codec, CodeBook) else 8
    if codec.bits not in layout.CODE_BITS or codec.bits > most:
        allowed = ", ".join(str(bits) for bits in layout.CODE_BITS if bits <= most)
        return f"encode: no kernel for {codec.bits} bits; {allowed} have one"
    fmt = format_of(codec, dim)
    if fmt.kind == AFFINE and (fmt.group not in GROUPS or dim % fmt.group):
        divisors = ", ".join(str(g) for g in GROUPS if dim % g == 0)
        return f"encode: no kernel for group_size={fmt.group} at a head dim of {dim}; {divisors} have one"
    if fmt.kind != AFFINE and fmt.group and fmt.group not in GROUPS:
        name = "center" if fmt.kind == CODEBOOK else "group_size"
        return f"encode: no kernel for {name}={fmt.group}; {', '.join(map(str, GROUPS))} have one"
    return None


def levels(fmt: Format, dim: int) -> np.ndarray:
    """Return the code book's float32 levels, padded to 64 so that every format has as many; zeros without one."""
    out = np.zeros(64, np.float32)
    if fmt.kind == CODEBOOK:
        book = layout.code_book(fmt.bits, dim)
        out[: len(book)] = book
    return out
