"""What the attention kernels read of a store and of queries: tensors, numbers, and what is compiled in.

A kernel lists the names of ARGUMENTS among its own and is launched with `Operands.arguments` and
`Operands.constants`. A plane that a format has not, and whatever else is unused, is None among the constants: a kernel
must not touch it, and its constants say so (``K_KIND``, ``K_BITS``, ``K_GROUP``, ``BODY``, ``BIASED``, ``MASKED``).

    queries              [B, Hq, L, D], with strides q_batch, q_head, q_token; channels lie together
    keys_codes0 ..       planes of the body, flat, row-contiguous; exact rows are codes0, in the queries' dtype
    keys_levels          float32 [64]: the code book
    keys_signs           float32 [D]: signs of the rotation, or None
    body_bias            float32, one per row of the body
    tail_keys            [B, H, capacity, D], contiguous; tail_values [B, H, capacity, Dv]; tail_bias [B, H, capacity]
    mask                 bool or additive, with strides mask_batch, mask_head, mask_token (0: one for all), mask_column
    lanes                int32 [B * H, 3]: start and length in the planes, begin in the tail's buffer
    numbers              None, or int32: what `counts` reads instead of end, first and body_rows
    end                  of the tail, in its buffer
    first                first row of the buffer that any lane has: column 0 of the mask
    body_rows            of the longest body: columns of the mask between the sinks and the rest of the tail
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx import layout
from kvmlx.backends.formats import CODEBOOK, EXACT, Format, format_of, levels
from kvmlx.backends.torch.triton.launch import constant, integers
from kvmlx.store import SPAN_STEP, LayerStore

SIDES = ("keys", "values")
PLANES = ("codes0", "codes1", "scales", "offsets")
POINTERS = (
    "queries",
    *(f"{side}_{plane}" for side in SIDES for plane in (*PLANES, "levels", "signs")),
    "body_bias",
    "tail_keys",
    "tail_values",
    "tail_bias",
    "mask",
    "lanes",
    "numbers",
)
NUMBERS = (
    "scale",
    "n_kv_heads",
    "n_queries",
    "capacity",
    "sinks",
    "window",
    "q_batch",
    "q_head",
    "q_token",
    "mask_batch",
    "mask_head",
    "mask_token",
    "mask_column",
    "end",
    "first",
    "body_rows",
)
"""Arguments that a kernel must name in ``do_not_specialize``: a 1 or a 16 among them must compile nothing anew."""
ARGUMENTS = (*POINTERS, *NUMBERS)
UNALIGNED = ("mask",)
"""Pointers for ``do_not_specialize_on_alignment``: what a caller cuts out of something larger."""
_SPAN_STEP = tl.constexpr(SPAN_STEP)
"""Of which a lane's start is a multiple: numbers of single rows are read several at a time."""
HEADER = 4
"""Numbers before the lanes in `numbers_of`, so that these are aligned."""


@dataclass(frozen=True)
class Operands:
    """Arguments and constants of one attention over a store."""

    arguments: dict[str, Tensor | int | float]
    """Tensors and numbers that a kernel reads when it runs."""
    constants: dict[str, Any]
    """What is compiled in: D, DV, GROUP (query heads that share a KV head), {K,V}_{KIND,BITS,GROUP,ROTATED}, BODY,
    BIASED, MASKED (1 bool, 2 additive), and None for each of ARGUMENTS that is not there."""
    keys: Format
    values: Format
    n_batch: int
    n_kv_heads: int
    group: int
    n_queries: int
    key_dim: int
    value_dim: int
    body_rows: int
    """Rows of the longest body; with ``numbers`` of the largest span."""
    tail_rows: int
    """Rows of the longest tail; with ``numbers`` those that it has room for."""

    @property
    def block(self) -> int:
        """Rows that enter a body together: a lane's start and length are multiples of it."""
        return max(self.keys.block, self.values.block)


def operands(
    store: LayerStore,
    queries: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    numbers: Tensor | None = None,
) -> Operands:
    """Gather what a kernel reads; nothing is copied, and nothing waits for the device.

    Args:
        store: of codecs that `formats.unsupported` has nothing against.
        queries: ``[B, Hq, L, D]`` in the dtype of the store's exact rows.
        scale: factor of the logits.
        mask: bool (True = seen) or additive ``[B or 1, Hq or 1, L or 1, T]``.
        window: newest tokens that a token sees, itself included; 0: all. Only for stores that hold every token.
        numbers: int32 on the queries' device, holding `numbers_of` the store when a kernel runs. A captured launch
            can then be replayed over other lengths; grids must be sized from `Operands.body_rows` and `tail_rows`,
            which are then what the buffers have room for.
    """
    b, h, d, dv = store.shape
    n = queries.shape[2]
    if queries.stride(3) != 1:
        queries = queries.contiguous()
    has_body = store.has_body if numbers is None else bool(store.planes)
    if has_body:
        assert store.codecs is not None
        keys, values = format_of(store.codecs[0], d), format_of(store.codecs[1], dv)
    else:
        keys = values = _exact(queries.dtype)
    tensors: dict[str, Tensor | None] = {"queries": queries, "tail_keys": store.keys, "tail_values": store.values}
    for side, fmt, dim in zip(SIDES, (keys, values), (d, dv), strict=True):
        for plane in PLANES:
            tensors[f"{side}_{plane}"] = store.planes[f"{side}.{fmt.planes[plane]}"] if plane in fmt.planes else None
        tensors[f"{side}_levels"], tensors[f"{side}_signs"] = _tables(fmt, dim, queries.device)
        rows = tensors[f"{side}_codes0"]
        if rows is not None and rows.dtype == torch.uint16:
            tensors[f"{side}_codes0"] = rows.view(torch.bfloat16)
    tensors["body_bias"] = store.planes["column.bias"] if store.biased and has_body else None
    tensors["tail_bias"] = store.columns["bias"] if store.biased else None
    tensors["mask"] = mask
    tensors["numbers"] = numbers
    if numbers is None:
        first = store.first
        body_rows = int(store.length.max()) if has_body else 0
        tail_rows = store.end - first
        tensors["lanes"] = integers(_lanes(store), queries.device)
        end = store.end
    else:
        # What a captured launch must not fix; the kernel reads them from the device.
        first = end = 0
        body_rows, tail_rows = int(store.span.max()), store.keys.shape[2]
        tensors["lanes"] = numbers[HEADER:]
    strides = _strides(mask)
    arguments: dict[str, Tensor | int | float] = {k: x for k, x in tensors.items() if x is not None}
    arguments |= {
        "scale": float(scale),
        "n_kv_heads": h,
        "n_queries": n,
        "capacity": store.keys.shape[2],
        "sinks": store.sinks,
        "window": window,
        "q_batch": queries.stride(0),
        "q_head": queries.stride(1),
        "q_token": queries.stride(2),
        "mask_batch": strides[0],
        "mask_head": strides[1],
        "mask_token": strides[2],
        "mask_column": strides[3],
        "end": end,
        "first": first,
        "body_rows": body_rows if numbers is None else 0,
    }
    group = queries.shape[1] // h
    constants: dict[str, Any] = {name: None for name, x in tensors.items() if x is None}
    constants |= {
        "D": d,
        "DV": dv,
        "GROUP": group,
        **dict(keys.template("K")),
        **dict(values.template("V")),
        "BODY": has_body,
        "BIASED": store.biased,
        "MASKED": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    }
    return Operands(arguments, constants, keys, values, b, h, group, n, d, dv, body_rows, tail_rows)


def numbers_of(store: LayerStore) -> np.ndarray:
    """Return what `operands` takes as ``numbers`` (on the device): int32, end, first, body_rows, 0, then the lanes."""
    header = [store.end, store.first, int(store.length.max()), 0]
    return np.concatenate([np.array(header, np.int32), _lanes(store).ravel()])


@triton.jit
def counts(numbers, end, first, body_rows):
    """Return end, first and body_rows: those given, or what `numbers` holds where there is such a tensor."""
    if numbers is not None:
        return tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    return end, first, body_rows


@triton.jit
def lane_of(lanes, i_lane):
    """Return start, length and begin of a lane; the start in 64 bits, since it becomes an offset."""
    start = tl.multiple_of(tl.load(lanes + 3 * i_lane), _SPAN_STEP)
    return start.to(tl.int64), tl.load(lanes + 3 * i_lane + 1), tl.load(lanes + 3 * i_lane + 2)


def _lanes(store: LayerStore) -> np.ndarray:
    return np.stack([store.start, store.length, store.begin], axis=-1).astype(np.int32)


@lru_cache
def _exact(dtype: torch.dtype) -> Format:
    """Return the format of a body that is not there."""
    return Format(EXACT[str(dtype).rpartition(".")[2]], 32 if dtype == torch.float32 else 16, 0, False, {}, 0.0)


@lru_cache
def _tables(fmt: Format, dim: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return the levels and the signs of a format, None where it has none."""
    book = constant(levels(fmt, dim), device) if fmt.kind == CODEBOOK else None
    return book, constant(layout.signs(dim), device) if fmt.rotated else None


def _strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Return the elements between sequences, heads, queries and columns of a mask ``[B or 1, Hq or 1, L or 1, T]``."""
    if mask is None:
        return 0, 0, 0, 0
    b, h, n, t = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return b, h, n, t
