"""The codecs: how rows become planes. Stages choose among them, backends and kernels know only these.

All arithmetic is float32, elementwise and in the order that docs/format.md states, so that NumPy, MLX and
torch make the same bytes. Metadata is rounded to float16 before the codes are computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from kvmlx import layout
from kvmlx.stages.base import require
from kvmlx.types import Array, Backend, PlaneSpec, StrategyError

Rotation = Literal["none", "hadamard"]
Scale = Literal["unbiased", "norm"]


@dataclass(frozen=True)
class _Packed:
    """Codes of ``bits`` bits, with an optional randomized Hadamard rotation of the channels before."""

    bits: int
    rotation: Rotation = "none"

    @property
    def block(self) -> int:
        return 1

    def check(self, dim: int) -> None:
        _check_packing(dim)

    def rotate(self, backend: Backend, x: Array) -> Array:
        """Multiply by the signs, then by the Hadamard matrix within blocks of channels."""
        if self.rotation == "none":
            return x
        x = backend.xp.astype(x, backend.xp.float32) * backend.from_numpy(layout.signs(x.shape[-1]))
        return _hadamard(backend, x)

    def unrotate(self, backend: Backend, x: Array) -> Array:
        if self.rotation == "none":
            return x
        x = _hadamard(backend, backend.xp.astype(x, backend.xp.float32))
        return x * backend.from_numpy(layout.signs(x.shape[-1]))

    def _in_basis(self, backend: Backend, x: Array) -> Array:
        return backend.xp.astype(self.rotate(backend, x), backend.xp.float32)

    def _pack(self, xp: Any, codes: Array) -> dict[str, Array]:
        packed = layout.pack(xp, codes, self.bits)
        return {f"codes{i}": plane for i, plane in enumerate(packed)}

    def _unpack(self, xp: Any, planes: Mapping[str, Array]) -> Array:
        n_planes = len(layout.plane_bits(self.bits))
        return layout.unpack(xp, [planes[f"codes{i}"] for i in range(n_planes)], self.bits)


@dataclass(frozen=True)
class Affine(_Packed):
    """Per token: ``x^ = scale * code + zero`` for each group of ``group_size`` consecutive channels.

    A ``group_size`` of None takes the largest of 64, 32, 16, 8 that divides the head dim.
    """

    group_size: int | None = None

    def check(self, dim: int) -> None:
        super().check(dim)
        fits = [g for g in (8, 16, 32, 64, 128, 256) if dim % g == 0]
        require(
            self.group_size is None or self.group_size in fits,
            f"group_size={self.group_size} does not divide the head dim {dim}; one of {_list(fits)} does",
        )

    def group(self, dim: int) -> int:
        """Return the channels per group for vectors of ``dim`` channels."""
        return self.group_size or min(64, layout.hadamard_block(dim))

    def planes(self, dim: int) -> tuple[PlaneSpec, ...]:
        n = dim // self.group(dim)
        metadata = (PlaneSpec("scales", "float16", n), PlaneSpec("zeros", "float16", n))
        return layout.code_planes(self.bits, dim) + metadata

    def encode(self, backend: Backend, x: Array) -> dict[str, Array]:
        xp = backend.xp
        *lead, dim = x.shape
        group = self.group(dim)
        x = xp.reshape(self._in_basis(backend, x), (*lead, dim // group, group))
        codes, scales, zeros = _to_levels(xp, x, self.bits, axis=-1)
        planes = self._pack(xp, xp.reshape(codes, (*lead, dim)))
        return planes | {"scales": scales[..., 0], "zeros": zeros[..., 0]}

    def decode(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        xp = backend.xp
        codes = self._unpack(xp, planes)
        group = self.group(dim)
        grouped = xp.reshape(codes, (*codes.shape[:-1], dim // group, group))
        return xp.reshape(_from_levels(xp, grouped, planes, axis=-1), codes.shape)


@dataclass(frozen=True)
class Channel(_Packed):
    """Per channel: ``x^ = scale * code + zero`` for each channel over ``group_size`` consecutive tokens."""

    group_size: int = 32

    @property
    def block(self) -> int:
        return self.group_size

    def planes(self, dim: int) -> tuple[PlaneSpec, ...]:
        metadata = tuple(PlaneSpec(name, "float16", dim, self.group_size) for name in ("scales", "zeros"))
        return layout.code_planes(self.bits, dim) + metadata

    def encode(self, backend: Backend, x: Array) -> dict[str, Array]:
        xp = backend.xp
        shape = x.shape
        x = _in_blocks(xp, self._in_basis(backend, x), self.group_size)
        codes, scales, zeros = _to_levels(xp, x, self.bits, axis=-2)
        planes = self._pack(xp, xp.reshape(codes, shape))
        return planes | {"scales": scales[..., 0, :], "zeros": zeros[..., 0, :]}

    def decode(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        xp = backend.xp
        codes = self._unpack(xp, planes)
        blocks = _in_blocks(xp, codes, self.group_size)
        return xp.reshape(_from_levels(xp, blocks, planes, axis=-2), codes.shape)


@dataclass(frozen=True)
class CodeBook(_Packed):
    """Per token: ``x^ = scale * level[code]``, with the Lloyd-Max levels of N(0, 1 / D).

    The rotation makes the channels of any row of length 1 nearly that normal. The scale is
    ``|x|^2 / <x, level[code]>``, which makes ``<q, x^>`` unbiased (EDEN), or the paper's ``|x|`` ("norm").
    With ``center`` the mean of every ``center`` consecutive rows is removed first and stored.
    """

    rotation: Rotation = "hadamard"
    scale: Scale = "unbiased"
    center: int = 0

    @property
    def block(self) -> int:
        return self.center or 1

    def planes(self, dim: int) -> tuple[PlaneSpec, ...]:
        metadata = (PlaneSpec("scales", "float16", 1),)
        if self.center:
            metadata += (PlaneSpec("means", "float16", dim, self.center),)
        return layout.code_planes(self.bits, dim) + metadata

    def encode(self, backend: Backend, x: Array) -> dict[str, Array]:
        xp = backend.xp
        shape = x.shape
        x = self._in_basis(backend, x)
        means = {}
        if self.center:
            x = _in_blocks(xp, x, self.center)
            flat = xp.reshape(x, (*x.shape[:-2], self.center * shape[-1]))
            mean = layout.to_float16(xp, layout.fold_sum(xp, flat, shape[-1]) / self.center)
            x = xp.reshape(x - xp.astype(mean, xp.float32)[..., None, :], shape)
            means = {"means": mean}
        energy = layout.fold_sum(xp, x * x)
        norm = xp.sqrt(energy)
        normal = x * (_constant(xp, sqrt(shape[-1])) / _nonzero(xp, norm))
        borders = backend.from_numpy(layout.thresholds(self.bits))
        codes = xp.astype(xp.searchsorted(borders, normal), xp.uint8)
        scales = norm
        if self.scale == "unbiased":
            levels = xp.take(self._levels(backend, shape[-1]), codes)
            scales = energy / _nonzero(xp, layout.fold_sum(xp, x * levels))
        return self._pack(xp, codes) | {"scales": layout.to_float16(xp, scales)} | means

    def decode(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        xp = backend.xp
        x = self._look_up(backend, planes, dim) * xp.astype(planes["scales"], xp.float32)
        if self.center:
            mean = xp.astype(planes["means"], xp.float32)[..., None, :]
            x = xp.reshape(_in_blocks(xp, x, self.center) + mean, x.shape)
        return x

    def _look_up(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        xp = backend.xp
        if len(layout.plane_bits(self.bits)) > 1:
            return xp.take(self._levels(backend, dim), self._unpack(xp, planes))
        # A byte's codes at once: on a CPU 2 (4 bits) to 7 (1 bit) times faster than code by code.
        plane = planes["codes0"]
        table = backend.from_numpy(layout.byte_levels(self.bits, dim))
        return xp.reshape(xp.take(table, plane, axis=0), (*plane.shape[:-1], dim))

    def _levels(self, backend: Backend, dim: int) -> Array:
        return backend.from_numpy(layout.code_book(self.bits, dim))


@dataclass(frozen=True)
class Exact:
    """Rows as they are, for bodies that hold rows without encoding them. bfloat16 is stored as its bits."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @property
    def bits(self) -> int:
        return 32 if self.dtype == "float32" else 16

    @property
    def block(self) -> int:
        return 1

    def check(self, dim: int) -> None:
        pass

    def planes(self, dim: int) -> tuple[PlaneSpec, ...]:
        return (PlaneSpec("rows", "uint16" if self.dtype == "bfloat16" else self.dtype, dim),)

    def encode(self, backend: Backend, x: Array) -> dict[str, Array]:
        xp = backend.xp
        if self.dtype != "bfloat16":
            return {"rows": xp.astype(x, getattr(xp, self.dtype))}
        word = xp.astype(x, xp.float32).view(xp.int32)
        word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        return {"rows": xp.astype(word & 0xFFFF, xp.uint16)}

    def decode(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        xp = backend.xp
        if self.dtype != "bfloat16":
            return xp.astype(planes["rows"], xp.float32)
        return (xp.astype(planes["rows"], xp.int32) << 16).view(xp.float32)

    def rotate(self, backend: Backend, x: Array) -> Array:
        return x

    def unrotate(self, backend: Backend, x: Array) -> Array:
        return x


def _to_levels(xp: Any, x: Array, bits: int, axis: int) -> tuple[Array, Array, Array]:
    """Return uint8 codes and the groups' float16 scales and zeros, with length 1 along ``axis``."""
    top = 2**bits - 1
    low, high = xp.min(x, axis=axis, keepdims=True), xp.max(x, axis=axis, keepdims=True)
    scales = layout.to_float16(xp, (high - low) / _constant(xp, top))
    zeros = layout.to_float16(xp, low)
    step = xp.astype(scales, xp.float32)
    inverse = xp.where(step > 0, 1.0 / _nonzero(xp, step), step)
    codes = xp.clip(xp.round((x - xp.astype(zeros, xp.float32)) * inverse), 0, top)
    return xp.astype(codes, xp.uint8), scales, zeros


def _from_levels(xp: Any, codes: Array, planes: Mapping[str, Array], axis: int) -> Array:
    scales = xp.expand_dims(xp.astype(planes["scales"], xp.float32), axis=axis)
    zeros = xp.expand_dims(xp.astype(planes["zeros"], xp.float32), axis=axis)
    return xp.astype(codes, xp.float32) * scales + zeros


def _in_blocks(xp: Any, x: Array, block: int) -> Array:
    """Reshape ``[..., n, D]`` to ``[..., n / block, block, D]``."""
    *lead, n, dim = x.shape
    if n % block:
        raise ValueError(f"rows are encoded in blocks of {block}, got {n} rows")
    return xp.reshape(x, (*lead, n // block, block, dim))


def _constant(xp: Any, value: float) -> Array:
    """Return a float32 array to divide by, or to divide: with a number, torch multiplies by a reciprocal instead."""
    return xp.full((1,), value, dtype=xp.float32)


def _nonzero(xp: Any, x: Array) -> Array:
    return xp.where(x > 0, x, xp.ones_like(x))


def _hadamard(backend: Backend, x: Array) -> Array:
    # MLX refuses empty arrays.
    return x if 0 in x.shape else backend.hadamard(x, layout.hadamard_block(x.shape[-1]))


def _check_packing(dim: int) -> None:
    multiple = layout.CHANNEL_MULTIPLE
    if dim % multiple or dim < multiple:
        raise StrategyError(
            f"encoded rows need a head dim that is a multiple of {multiple}, got {dim}; "
            "select stages without an encode stage work with any head dim"
        )


def _list(values: list[int]) -> str:
    return ", ".join(str(v) for v in values)
