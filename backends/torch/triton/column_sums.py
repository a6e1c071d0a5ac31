"""The attention that each key receives, summed (or the largest) over the queries, without a matrix of it.

    query_sums_kernel    a program per (block of query rows, part of the keys, KV head): each query's largest logit and
                         its sum of weights over that part
    column_sums_kernel   a program per (block of keys, heads of a KV head): goes through the queries again, with their
                         peaks and totals known, and adds up in registers

Nothing is added up between programs, so that results do not depend on their order. A weight is
2 ** (factor * (logit - peak)): large logits lose nothing to a scale, which their differences meet instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx.backends.formats import MAX_DIM
from kvmlx.backends.torch.triton.codecs import INTERPRETED, bound
from kvmlx.backends.torch.triton.launch import TritonKernel, integers, processors

LOG2_E = 1.4426950408889634
ALIGNED = 8
"""Elements of which the distances between rows are multiples: a thread can then load 16 bytes at once."""
MAX_SPLITS = 32
"""Parts of the keys in the first pass: what it writes stays within so many pairs of floats for each query."""
SPLIT_KEYS = 256
"""Keys of a part, at least."""
PROGRAMS_PER_PROCESSOR = 4
MERGED = 64
"""Queries whose parts a program merges."""

_ALIGNED = tl.constexpr(ALIGNED)

NUMBERS = (
    "scale",
    "factor",
    "n_kv_heads",
    "group",
    "n_queries",
    "n_keys",
    "n_splits",
    "split_keys",
    "n_heads",
    "q_batch",
    "q_head",
    "q_row",
    "k_batch",
    "k_head",
    "k_row",
)
"""Arguments that are numbers: none of them is compiled in. Strides are in units of ALIGNED."""


@triton.jit
def _load(x, offsets, exists, c, D: tl.constexpr, C: tl.constexpr):
    """Return channels c [C] of the rows at offsets [R], zeros where there is nothing."""
    mask = exists[:, None]
    if D % C != 0:
        mask = mask & (c < D)[None, :]
    return tl.load(x + offsets[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def _product(a, b):
    """Return float32 [M, N] of a [M, C] and b [N, C]: the same of two rows, wherever in a tile they lie."""
    if INTERPRETED:
        # What a BLAS rounds differs by a row's place. And bfloat16 is kept as its bits, which it would multiply.
        a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return tl.dot(a, tl.trans(b)).to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _product_by_parts(queries, q_offsets, q_exists, keys, k_offsets, k_exists, D: tl.constexpr, C: tl.constexpr):
    """Return float32 [M, N] of rows of queries and keys, C channels at a time."""
    s = tl.zeros([q_offsets.shape[0], k_offsets.shape[0]], tl.float32)
    for first in range(0, D, C):
        c = first + tl.arange(0, C)
        q = _load(queries, q_offsets, q_exists, c, D, C).to(tl.float32)
        s += _product(q, _load(keys, k_offsets, k_exists, c, D, C).to(tl.float32))
    return s


@triton.jit
def _known(peak, total):
    """Return what makes a weight of a logit: the query's peak, infinite where it sees nothing, and 1 / its total."""
    nothing = peak == float("-inf")
    return tl.where(nothing, float("inf"), peak), tl.div_rn(1.0, tl.where(nothing, 1.0, total))


@triton.jit(do_not_specialize=NUMBERS)
def query_sums_kernel(
    queries,  # [B, Hq, L, D]
    keys,  # [B, H, T, D]
    bias,  # float32 [B, H, T], or None
    peaks,  # float32 [n_splits, B, Hq, L]: largest logit
    totals,  # float32 [n_splits, B, Hq, L]: sum of weights; where n_splits is 1, both are `_known`
    scale,  # of products, where a bias is added to them
    factor,  # from logits, or from products without a bias, to powers of 2
    n_kv_heads,
    group,
    n_queries,
    n_keys,
    n_splits,
    split_keys,
    n_heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    D: tl.constexpr,
    C: tl.constexpr,  # channels that are multiplied at once: all of them where a tile is held, and then a power of two
    HELD: tl.constexpr,
    M: tl.constexpr,  # queries of a tile
    N: tl.constexpr,  # keys of a tile
):
    count = group * n_queries
    n_blocks = tl.cdiv(count, M)
    pid = tl.program_id(0)
    first = pid % n_blocks * M
    split = pid // n_blocks % n_splits
    lane = (pid // n_blocks // n_splits).to(tl.int64)
    batch = lane // n_kv_heads
    kv_head = lane % n_kv_heads
    # Rows are the group's heads at one position after another: those of a tile see about the same keys.
    row = first + tl.arange(0, M)
    exists = row < count
    position = row // group
    head = row % group
    queries += (batch * q_batch + kv_head * group * q_head) * _ALIGNED
    offsets = (head.to(tl.int64) * q_head + position.to(tl.int64) * q_row) * _ALIGNED
    c = tl.arange(0, C)
    if HELD:
        q = _load(queries, offsets, exists, c, D, C)
    keys += (batch * k_batch + kv_head * k_head) * _ALIGNED
    i = tl.arange(0, N)
    key_offsets = i * k_row * _ALIGNED

    own = n_keys - n_queries
    begin = split * split_keys
    last = tl.minimum(first + M, count) - 1
    stop = tl.minimum(begin + split_keys, own + last // group + 1)
    seen = tl.minimum(own + position + 1, stop)
    seen_by_all = tl.minimum(own + first // group + 1, stop)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(bound(begin), bound(stop), N):
        tile = keys + tl.cast(start, tl.int64) * k_row * _ALIGNED
        key = start + i
        if HELD:
            s = _product(q, _load(tile, key_offsets, key < stop, c, D, C))
        else:
            s = _product_by_parts(queries, offsets, exists, tile, key_offsets, key < stop, D, C)
        if bias is not None:
            s = s * scale + tl.load(bias + lane * n_keys + key, mask=key < stop, other=0.0)[None, :]
        if start + N > seen_by_all:
            s = tl.where(key[None, :] < seen[:, None], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - safe) * factor) + tl.sum(tl.exp2((s - safe[:, None]) * factor), axis=1)
        peak = higher
    if n_splits == 1:
        peak, total = _known(peak, total)
    n_lanes = tl.num_programs(0) // n_blocks // n_splits
    at = ((split * n_lanes + lane) * group + head) * n_queries + position
    tl.store(peaks + at, peak, mask=exists)
    tl.store(totals + at, total, mask=exists)


@triton.jit(do_not_specialize=["factor", "count", "n_splits"])
def merge_kernel(
    peaks,  # [n_splits, count]
    totals,
    factor,
    count,
    n_splits,
    SPLITS: tl.constexpr,  # at least n_splits
    R: tl.constexpr,
):
    """Merge the parts of each query into the first of them."""
    at = tl.program_id(0) * R + tl.arange(0, R)
    i = tl.arange(0, SPLITS)
    offsets = (i.to(tl.int64) * count)[:, None] + at[None, :]
    mask = (i < n_splits)[:, None] & (at < count)[None, :]
    parts = tl.load(peaks + offsets, mask=mask, other=float("-inf"))
    peak = tl.max(parts, axis=0)
    total = tl.load(totals + offsets, mask=mask, other=0.0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(total * tl.exp2((parts - safe[None, :]) * factor), axis=0)
    peak, inverse = _known(peak, total)
    tl.store(peaks + at, peak, mask=at < count)
    tl.store(totals + at, inverse, mask=at < count)


@triton.jit(do_not_specialize=NUMBERS)
def column_sums_kernel(
    queries,  # as in query_sums_kernel
    keys,
    bias,
    counted,  # int32 [B]: queries that count, or None
    peaks,  # float32 [B, Hq, L]
    inverses,  # float32 [B, Hq, L]
    out,  # float32 [B, Hq, T]
    scale,  # of products, where a bias is added to them
    factor,  # from logits, or from products without a bias, to powers of 2
    n_kv_heads,
    group,
    n_queries,
    n_keys,
    n_splits,
    split_keys,
    n_heads,  # of the group, to a program
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    MAXIMA: tl.constexpr,  # the largest weight instead of their sum
    D: tl.constexpr,
    C: tl.constexpr,
    HELD: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a tile
    L: tl.constexpr,  # queries of each
    N: tl.constexpr,  # keys of a tile
):
    M: tl.constexpr = HEADS * L
    n_blocks = tl.cdiv(n_keys, N)
    n_parts = tl.cdiv(group, n_heads)
    pid = tl.program_id(0)
    first = pid % n_blocks * N
    first_head = pid // n_blocks % n_parts * n_heads
    last_head = tl.minimum(first_head + n_heads, group)
    lane = (pid // n_blocks // n_parts).to(tl.int64)
    batch = lane // n_kv_heads
    kv_head = lane % n_kv_heads
    i = tl.arange(0, N)
    key = first + i
    keys += (batch * k_batch + kv_head * k_head + first.to(tl.int64) * k_row) * _ALIGNED
    key_offsets = i * k_row * _ALIGNED
    c = tl.arange(0, C)
    if HELD:
        k = _load(keys, key_offsets, key < n_keys, c, D, C)
    if bias is not None:
        own_bias = tl.load(bias + lane * n_keys + key, mask=key < n_keys, other=0.0)
    own = n_keys - n_queries
    stop = n_queries
    if counted is not None:
        stop = tl.minimum(stop, tl.load(counted + batch))
    # The first query that sees a key of this block.
    begin = tl.maximum(0, first - own)
    i_head = tl.arange(0, M) // L
    i_query = tl.arange(0, M) % L
    queries += (batch * q_batch + kv_head * group * q_head) * _ALIGNED
    offsets = (i_head * q_head + i_query * q_row) * _ALIGNED
    in_tile = i_head * n_queries + i_query
    for head in range(bound(first_head), bound(last_head), HEADS):
        sums = tl.zeros([M, N], tl.float32)
        for start in range(bound(begin), bound(stop), L):
            tile = queries + (tl.cast(head, tl.int64) * q_head + tl.cast(start, tl.int64) * q_row) * _ALIGNED
            query = start + i_query
            exists = (head + i_head < last_head) & (query < stop)
            if HELD:
                s = _product(_load(tile, offsets, exists, c, D, C), k)
            else:
                s = _product_by_parts(tile, offsets, exists, keys, key_offsets, key < n_keys, D, C)
            if bias is not None:
                s = s * scale + own_bias[None, :]
            at = (lane * group + head) * n_queries + start
            peak = tl.load(peaks + at + in_tile, mask=exists, other=float("inf"))
            inverse = tl.load(inverses + at + in_tile, mask=exists, other=0.0)
            if first + N > own + start + 1:
                s = tl.where(key[None, :] <= (own + query)[:, None], s, float("-inf"))
            weights = tl.exp2((s - peak[:, None]) * factor) * inverse[:, None]
            sums = tl.maximum(sums, weights) if MAXIMA else sums + weights
        result = sums.reshape(HEADS, L, N)
        result = tl.max(result, axis=1) if MAXIMA else tl.sum(result, axis=1)
        j = tl.arange(0, HEADS)
        to = out + (lane * group + head) * n_keys + first
        mask = (head + j < last_head)[:, None] & (key < n_keys)[None, :]
        tl.store(to + (j * n_keys)[:, None] + i[None, :], result, mask=mask)


_QUERY_SUMS = TritonKernel(query_sums_kernel)
_MERGE = TritonKernel(merge_kernel)
_COLUMN_SUMS = TritonKernel(column_sums_kernel)


@dataclass(frozen=True)
class Config:
    """Tiles of the two passes. What a program holds of one side meets tiles of the other."""

    rows: int
    """Query rows of a tile; a program of the first pass holds them."""
    queries: int
    """Of each head in a tile of the second pass; a power of two."""
    keys: int
    """Of a tile of the first pass."""
    held_keys: int
    """Of a program of the second pass."""
    channels: int
    """That are multiplied at once."""
    num_warps: int
    num_stages: int

    @property
    def heads(self) -> int:
        """Of a tile of the second pass."""
        return self.rows // self.queries


def supported(dim: int) -> str | None:
    """Return why the kernels do not take keys of ``dim`` channels, None where they do."""
    if dim % 8 or not 8 <= dim <= MAX_DIM:
        return f"a key dim of {dim} is not a multiple of 8 up to {MAX_DIM}"
    return None


def column_sums(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    n_queries: Any = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return ``[B, Hq, T]`` float32: `kvmlx.ops.column_sums`, as two launches and with memory for the queries only.

    Args:
        queries: ``[B, Hq, L, D]``, float16, bfloat16 or float32; the last L keys are their own tokens.
        keys: ``[B, H, T, D]``, float16, bfloat16 or float32; a part of a larger array is read in place, where its rows
            lie at multiples of 8 elements.
        scale: factor of the logits, positive.
        n_queries: only the first n of the L queries count, integers ``[B]``; None for all.
        bias: ``[B, H, T]`` added to the logits, -inf for rows that do not exist.
        config: tiles; None for those of `config_of`.
    """
    return _columns(queries, keys, scale, n_queries, bias, config, maxima=False)


def column_maxima(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    n_queries: Any = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return ``[B, Hq, T]`` float32: the largest weight that each key receives from any query, else `column_sums`."""
    return _columns(queries, keys, scale, n_queries, bias, config, maxima=True)


def _columns(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    n_queries: Any,
    bias: Tensor | None,
    config: Config | None,
    *,
    maxima: bool,
) -> Tensor:
    if not scale > 0:
        raise ValueError(f"column sums need a positive scale, got {scale!r}")
    b, hq, n, d = queries.shape
    h, t = keys.shape[1], keys.shape[2]
    group, device = hq // h, queries.device
    queries, keys = _aligned(queries), _aligned(keys)
    exact = queries.dtype != keys.dtype or queries.dtype == torch.float32
    config = config or config_of(n, group, d, exact)
    wanted = PROGRAMS_PER_PROCESSOR * processors(device)
    n_blocks = -(-group * n // config.rows)
    n_splits, split_keys = splits(b * h * n_blocks, t, config.keys, wanted)
    key_blocks = -(-t // config.held_keys)
    n_heads = group if b * h * key_blocks >= wanted else config.heads
    peaks, totals = (queries.new_empty((n_splits, b, hq, n), dtype=torch.float32) for _ in range(2))
    out = queries.new_empty((b, hq, t), dtype=torch.float32)
    given = {"queries": queries, "keys": keys, "bias": None if bias is None else bias.contiguous()}
    strides = [x // ALIGNED for x in (*queries.stride()[:3], *keys.stride()[:3])]
    factor = LOG2_E * (scale if bias is None else 1.0)
    values = (scale, factor, h, group, n, t, n_splits, split_keys, n_heads, *strides)
    numbers: dict[str, int | float] = dict(zip(NUMBERS, values, strict=True))
    constants = {"D": d, "C": config.channels, "HELD": not exact}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tensors = given | {"peaks": peaks, "totals": totals}
    tile = {"M": config.rows, "N": config.keys}
    _launch(_QUERY_SUMS, b * h * n_blocks * n_splits, tensors, numbers, constants | tile, options)
    if n_splits > 1:
        sizes = {"factor": factor, "count": b * hq * n, "n_splits": n_splits}
        tensors, merged = {"peaks": peaks, "totals": totals}, {"SPLITS": MAX_SPLITS, "R": MERGED}
        _launch(_MERGE, -(-b * hq * n // MERGED), tensors, sizes, merged, {"num_warps": 4})
    tensors = given | {"counted": _counted(n_queries, device), "peaks": peaks, "inverses": totals, "out": out}
    constants |= {"MAXIMA": maxima, "HEADS": config.heads, "L": config.queries, "N": config.held_keys}
    _launch(_COLUMN_SUMS, b * h * -(-group // n_heads) * key_blocks, tensors, numbers, constants, options)
    return out


def _launch(
    kernel: TritonKernel,
    programs: int,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> None:
    absent = {name: None for name, x in tensors.items() if x is None}
    given = {name: x for name, x in tensors.items() if x is not None}
    kernel((programs,), {**given, **numbers}, {**constants, **absent}, **options)


def config_of(n_queries: int, group: int, dim: int, exact: bool) -> Config:
    """Return the tiles for so many queries of a group; ``exact``: products in float32, without matrix units."""
    rows = 16 if n_queries * group <= 16 else 64
    queries = 1 if n_queries == 1 else min(rows, 16 if n_queries <= 16 else 32 if n_queries <= 32 else 64)
    if exact:
        return Config(rows, queries, 64, 64, 16, 4, 1)
    return Config(rows, queries, 64, 64, max(16, 1 << (dim - 1).bit_length()), 4 if rows == 16 else 8, 2)


def configurations(n_queries: int, group: int, dim: int, exact: bool) -> list[Config]:
    """Return what `config_of` might return as well, for a sweep on a GPU."""
    chosen = config_of(n_queries, group, dim, exact)
    keys = (32, 64) if exact or dim > 128 else (64, 128)
    out = {chosen: None}
    for tile, held, warps, stages in product(keys, keys, (4, 8), (1, 2, 3)):
        out[replace(chosen, keys=tile, held_keys=held, num_warps=warps, num_stages=stages)] = None
    return list(out)


def splits(programs: int, n_keys: int, tile: int, wanted: int) -> tuple[int, int]:
    """Return the parts that the first pass makes of the keys, and the keys of each: few queries alone fill no GPU."""
    n = max(1, min(wanted // max(programs, 1), MAX_SPLITS, n_keys // SPLIT_KEYS))
    keys = -(-n_keys // (tile * n)) * tile
    return -(-n_keys // keys), keys


def _aligned(x: Tensor) -> Tensor:
    """Return rows at distances that the kernels take, a copy only where it must be one."""
    level = x.stride(3) == 1 and all(s % ALIGNED == 0 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1)
    return x if level else x.contiguous()


def _counted(n_queries: Any, device: torch.device) -> Tensor | None:
    if n_queries is None:
        return None
    if isinstance(n_queries, Tensor):
        return n_queries.to(device, torch.int32)
    return integers(np.asarray(n_queries), device)
