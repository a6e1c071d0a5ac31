"""What the attention kernels read of a store, in the order of operands.metal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kvmlx import layout
from kvmlx.backends.formats import EXACT, Format, format_of, levels
from kvmlx.backends.mlx.metal.loader import SMALL, integers, nothing
from kvmlx.store import LayerStore

SIDES = ("keys", "values")
PLANES = ("codes0", "codes1", "scales", "offsets")
PLANE_DTYPES = {"codes0": mx.uint8, "codes1": mx.uint8, "scales": mx.float16, "offsets": mx.float16}
NAMES = [
    "queries",
    "scale",
    "shape",
    "view",
    "lanes",
    *(f"{side}_{plane}" for side in SIDES for plane in (*PLANES, "levels", "signs")),
    "body_bias",
    "tail_keys",
    "tail_values",
    "tail_bias",
    "mask",
]
"""The inputs of an attention kernel."""
CONSTANTS = ["shape", "view"]
"""Those of them that lie in the constant address space."""


@dataclass(frozen=True)
class Operands:
    """Arrays and template arguments of one attention over a store."""

    inputs: dict[str, mx.array]
    template: list[tuple[str, Any]]
    keys: Format
    values: Format
    n_batch: int
    n_kv_heads: int
    group: int
    """Query heads that share a KV head."""
    n_queries: int
    key_dim: int
    value_dim: int
    body_rows: int
    """Rows of the longest body."""
    tail_rows: int
    """Rows of the longest tail."""

    @property
    def unit(self) -> int:
        """Rows that one simdgroup takes at a time: whole blocks of the body's planes, at least one per lane."""
        return max(32, self.keys.block, self.values.block)


def operands(store: LayerStore, queries: mx.array, *, scale: float, mask: mx.array | None, window: int = 0) -> Operands:
    """Gather what a kernel reads.

    ``window``: newest tokens that a token sees, itself included; 0: all. Only for stores that hold every token.
    Nothing is copied, and nothing here waits for the device: lengths are host integers and go in as data.
    """
    b, h, d, dv = store.shape
    hq, n = queries.shape[1], queries.shape[2]
    name = str(queries.dtype).rpartition(".")[2]
    has_body = store.has_body
    if has_body:
        assert store.codecs is not None
        keys, values = (format_of(codec, dim) for codec, dim in zip(store.codecs, (d, dv), strict=True))
    else:
        keys = values = Format(EXACT[name], 32 if name == "float32" else 16, 0, False, {}, 0.0)
    inputs: dict[str, mx.array] = {"queries": queries, "scale": mx.array(scale, mx.float32)}
    for side, fmt, dim in zip(SIDES, (keys, values), (d, dv), strict=True):
        for plane in PLANES:
            held = store.planes.get(f"{side}.{fmt.planes[plane]}") if has_body and plane in fmt.planes else None
            inputs[f"{side}_{plane}"] = nothing(PLANE_DTYPES[plane]) if held is None else held
        inputs[f"{side}_levels"] = _constant(levels, fmt, dim)
        inputs[f"{side}_signs"] = signs_of(fmt, dim)
    biased = store.biased
    unused = nothing(mx.float32)
    inputs["body_bias"] = store.planes["column.bias"] if biased and has_body else unused
    inputs["tail_keys"], inputs["tail_values"] = store.keys, store.values
    inputs["tail_bias"] = store.columns["bias"] if biased else unused
    inputs["mask"] = unused if mask is None else mask
    first = store.first
    body_rows = int(store.length.max()) if has_body else 0
    inputs["shape"] = integers(h, hq // h, n, store.keys.shape[2], store.end, first, store.sinks)
    inputs["view"] = integers(body_rows, *_strides(mask), window)
    lanes = np.stack([store.start, store.length, store.begin], axis=-1)
    inputs["lanes"] = integers(*lanes.ravel().tolist(), least=SMALL)
    template: list[tuple[str, Any]] = [
        ("T", queries.dtype),
        ("D", d),
        ("DV", dv),
        *keys.template("K"),
        *values.template("V"),
        ("BIASED", biased),
        ("MASKED", 0 if mask is None else 1 if mask.dtype == mx.bool_ else 2),
    ]
    tail_rows = int(store.tail_lengths.max())
    return Operands(inputs, template, keys, values, b, h, hq // h, n, d, dv, body_rows, tail_rows)


def _strides(mask: mx.array | None) -> list[int]:
    """Return the elements between sequences, heads and queries of a mask ``[B or 1, Hq or 1, L or 1, T]``."""
    if mask is None:
        return [0, 0, 0]
    b, h, n, t = mask.shape
    return [h * n * t if b > 1 else 0, n * t if h > 1 else 0, t if n > 1 else 0]


def signs_of(fmt: Format, dim: int) -> mx.array:
    """Return the signs of the format's rotation, ``[dim]``."""
    return _constant(_signs, fmt, dim)


def _signs(fmt: Format, dim: int) -> np.ndarray:
    return layout.signs(dim) if fmt.rotated else np.ones(dim, np.float32)


_CONSTANTS: dict[Any, mx.array] = {}


def _constant(make: Any, fmt: Format, dim: int) -> mx.array:
    """Keep the arrays that only depend on the format: a step must not upload them again."""
    key = (make.__name__, fmt.kind, fmt.bits, fmt.rotated, dim)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = mx.array(make(fmt, dim))
    return _CONSTANTS[key]
