"""Launch column_sums.metal: the attention that each key receives."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from kvmlx.backends.mlx.metal.loader import SMALL, MetalKernel, floats, integers

THREADS = 256
BLOCK = 64
"""Rows that a threadgroup holds in registers: queries in the first pass, keys in the second."""
MAX_DIM = 256
TARGET_THREADGROUPS = 64
MAX_SPLITS = 32
"""Parts of the keys in the first pass: what it writes stays within so many pairs of floats for each query."""
SPLIT_KEYS = 256
"""Keys of a part, at least."""
MANY_QUERIES = 32
"""Queries from which on the heads of a group go to threadgroups of their own: reading the keys is then little."""

_QUERY_SUMS = MetalKernel(
    "query_sums",
    file="column_sums",
    inputs=["queries", "keys", "scale", "sizes", "bias"],
    outputs=["peaks", "totals"],
    body="""
    threadgroup float4 tile[Columns<D>::TILE / 4];
    query_sums<D, BIASED>(
        queries, keys, scale, sizes, bias, peaks, totals, (threadgroup float*)tile,
        threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)

_COLUMN_SUMS = MetalKernel(
    "column_sums",
    file="column_sums",
    inputs=["queries", "keys", "scale", "sizes", "bias", "n_counted", "peaks", "totals"],
    outputs=["out"],
    body="""
    threadgroup float4 tile[Columns<D>::TILE / 4];
    threadgroup float2 known[Columns<D>::ROWS];
    column_sums<D, BIASED, MAXIMA>(
        queries, keys, scale, sizes, bias, n_counted, peaks, totals, out, (threadgroup float*)tile, known,
        threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)


def column_sums(
    queries: mx.array, keys: mx.array, *, scale: float, n_queries: Any = None, bias: mx.array | None = None
) -> mx.array:
    """Return ``[B, Hq, T]`` float32: `kvmlx.ops.column_sums`, as two launches and with memory for the queries only.

    Args:
        queries: ``[B, Hq, L, D]``, float16, bfloat16 or float32; the last L keys are their own tokens.
        keys: ``[B, H, T, D]``, float16, bfloat16 or float32.
        scale: factor of the logits.
        n_queries: only the first n of the L queries count, integers ``[B]``; None for all.
        bias: ``[B, H, T]`` added to the logits, -inf for rows that do not exist.
    """
    return _columns(queries, keys, scale, n_queries, bias, maxima=False)


def column_maxima(
    queries: mx.array, keys: mx.array, *, scale: float, n_queries: Any = None, bias: mx.array | None = None
) -> mx.array:
    """Return ``[B, Hq, T]`` float32: the largest weight that each key receives from any query, else `column_sums`."""
    return _columns(queries, keys, scale, n_queries, bias, maxima=True)


def supported(dim: int) -> str | None:
    """Return why the kernels do not take keys of ``dim`` channels, None where they do."""
    if dim % 8 or not 8 <= dim <= MAX_DIM:
        return f"a key dim of {dim} is not a multiple of 8 up to {MAX_DIM}"
    return None


def _columns(
    queries: mx.array, keys: mx.array, scale: float, n_queries: Any, bias: mx.array | None, *, maxima: bool
) -> mx.array:
    b, hq, n, d = queries.shape
    h, t = keys.shape[1], keys.shape[2]
    group = hq // h
    blocks = -(-group * n // BLOCK)
    n_splits, split_keys = splits(b * h * blocks, t)
    n_heads = 1 if n >= MANY_QUERIES else group
    template = [("D", d), ("BIASED", bias is not None)]
    inputs = {
        "queries": queries,
        "keys": keys,
        "scale": mx.array(scale, mx.float32),
        "sizes": integers(h, group, n, t, n_splits, split_keys, n_heads, least=SMALL),
        "bias": floats(bias),
    }
    peaks, totals = _QUERY_SUMS(
        inputs,
        template=template,
        grid=(blocks * n_splits, h, b),
        threadgroup=(THREADS, 1, 1),
        outputs=[((b, hq, n, n_splits), mx.float32)] * 2,
    )
    counted = integers(*[n] * b, least=SMALL) if n_queries is None else mx.array(n_queries).astype(mx.int32)
    (out,) = _COLUMN_SUMS(
        inputs | {"n_counted": counted, "peaks": peaks, "totals": totals},
        template=[*template, ("MAXIMA", maxima)],
        grid=(-(-t // BLOCK), hq // n_heads, b),
        threadgroup=(THREADS, 1, 1),
        outputs=[((b, hq, t), mx.float32)],
    )
    return out


def splits(threadgroups: int, n_keys: int) -> tuple[int, int]:
    """Return the parts that the first pass makes of the keys, and the keys of each: few queries alone fill no GPU."""
    n = max(1, min(TARGET_THREADGROUPS // threadgroups, MAX_SPLITS, n_keys // SPLIT_KEYS))
    keys = -(-n_keys // (32 * n)) * 32
    return -(-n_keys // keys), keys
