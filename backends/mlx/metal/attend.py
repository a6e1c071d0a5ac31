"""Launch attend.metal: attention of one or a few new tokens over a store."""

from __future__ import annotations

from functools import cache
from math import gcd

import mlx.core as mx

from kvmlx.backends.formats import AFFINE, CHANNEL, CODEBOOK, Format
from kvmlx.backends.mlx.metal import prefill
from kvmlx.backends.mlx.metal.loader import MetalKernel, floats, integers
from kvmlx.backends.mlx.metal.operands import CONSTANTS, NAMES, Operands, operands, signs_of
from kvmlx.store import LayerStore

MAX_QUERIES = 8
"""New tokens up to which this kernel is always the one to take."""
MAX_ROWS = 8
"""Query rows that share a threadgroup: their accumulators are in registers."""
MAX_SPLITS = 128
TARGET_THREADGROUPS = 128
"""Splits are made until there are as many: the largest GPUs of the M series have 80 cores."""
FEW_THREADGROUPS = 32
"""As many there are even if their partial results are then more than WRITTEN of what is read."""
SPLIT_ROWS = 256
"""Rows of a split, at least, of tiles of 32: one for each simdgroup."""
WRITTEN = 0.014
"""Bytes of partial results beside those that a split reads."""
SIMDGROUPS = 8
SHARED_FLOATS = 8192
"""Threadgroup memory of Metal, 32 KB."""

_DECODE = MetalKernel(
    "attend_decode",
    file="attend",
    inputs=[*NAMES, "splits"],
    outputs=["partial", "lse"],
    constants=[*CONSTANTS, "splits"],
    body="""
    threadgroup float4 shared[
        (attend_shared<T, K_KIND, K_BITS, K_GROUP, V_KIND, V_BITS, V_GROUP, D, DV, R, N_SIMD>() + 3) / 4];
    attend_decode<T, D, DV, K_KIND, K_BITS, K_GROUP, K_ROTATED, V_KIND, V_BITS, V_GROUP, V_ROTATED, BIASED, MASKED, R,
                  N_SIMD>(
        queries, scale, Shape(shape, view), splits, lanes,
        Planes{(const device uchar*)keys_codes0, keys_codes1, keys_scales, keys_offsets}, keys_levels, keys_signs,
        Planes{(const device uchar*)values_codes0, values_codes1, values_scales, values_offsets}, values_levels,
        body_bias, tail_keys, tail_values, tail_bias, mask, partial, lse, (threadgroup float*)shared,
        threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)

_MERGE = MetalKernel(
    "attend_merge",
    file="attend",
    inputs=["partial", "lse", "sinks", "signs", "numbers"],
    outputs=["out"],
    constants=["numbers"],
    body="""
    threadgroup float x[DV];
    threadgroup float weights[MAX_SPLITS];
    attend_merge<T, DV, V_ROTATED, N_THREADS>(
        partial, lse, sinks, signs, numbers, out, x, weights,
        threadgroup_position_in_grid.x, thread_index_in_threadgroup);
    """,
)


def attend_decode(
    store: LayerStore,
    queries: mx.array,
    *,
    scale: float,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    window: int = 0,
) -> mx.array:
    """Return ``[B, Hq, L, Dv]``: `kvmlx.attention.attend` for ``queries [B, Hq, L, D]``, L small, as two launches.

    Args:
        store: rows to attend over, of codecs that `formats.unsupported` has nothing against.
        queries: float16, bfloat16 or float32, in the dtype of the store's exact rows.
        scale: factor of the logits.
        sinks: logits ``[Hq]`` that take attention and give no value.
        mask: bool (True = seen) or additive ``[B or 1, Hq or 1, L or 1, T]``.
        window: newest tokens that a token sees, itself included; 0: all.
    """
    n_rows = queries.shape[1] // store.shape[1] * queries.shape[2]
    n_blocks = -(-n_rows // MAX_ROWS)
    x = operands(store, queries, scale=scale, mask=mask, window=window)
    body, tail = splits(x, n_blocks)
    rows = -(-n_rows // n_blocks)
    n_simd = simdgroups(x, rows)
    n_splits = body[0] + tail[0]
    all_rows = x.n_batch * x.n_kv_heads * n_rows
    partial, lse = _DECODE(
        x.inputs | {"splits": integers(*body, *tail)},
        template=[*x.template, ("R", rows), ("N_SIMD", n_simd)],
        grid=(n_splits, n_blocks, x.n_batch * x.n_kv_heads),
        threadgroup=(32 * n_simd, 1, 1),
        outputs=[((all_rows, n_splits, x.value_dim), queries.dtype), ((all_rows, n_splits), mx.float32)],
    )
    threads = min(256, -(-x.value_dim // 32) * 32)
    (out,) = _MERGE(
        {
            "partial": partial,
            "lse": lse,
            "sinks": floats(sinks),
            "signs": signs_of(x.values, x.value_dim),
            "numbers": integers(queries.shape[1], queries.shape[2], body[0], tail[0], sinks is not None),
        },
        template=[
            ("T", queries.dtype),
            ("DV", x.value_dim),
            ("V_ROTATED", x.values.rotated and body[0] > 0),
            ("N_THREADS", threads),
        ],
        grid=(all_rows, 1, 1),
        threadgroup=(threads, 1, 1),
        outputs=[((*queries.shape[:3], x.value_dim), queries.dtype)],
    )
    return out


def takes(store: LayerStore, queries: mx.array) -> bool:
    """Whether this kernel attends, and not prefill's: for a few tokens, and for one block of prefill's on few lanes.

    Prefill does not split the history: a chat's short turn would leave most of a GPU idle.
    """
    b, h, dim, value_dim = store.shape
    n = queries.shape[2]
    one_block = queries.shape[1] // h * n <= prefill.block_rows(dim, value_dim)
    return n <= MAX_QUERIES or (one_block and b * h < FEW_THREADGROUPS)


def splits(x: Operands, n_blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (how many, rows of each) of the body's splits and of the tail's.

    So many that there are TARGET_THREADGROUPS, unless splits of SPLIT_ROWS would write too much beside what they read;
    but FEW_THREADGROUPS in any case that the rows allow.
    """
    threadgroups = x.n_batch * x.n_kv_heads * n_blocks
    partial = min(MAX_ROWS, x.group * x.n_queries) * (x.value_dim * x.inputs["queries"].itemsize + 4)

    def cut(rows: int, unit: int, row_bytes: float, most: int) -> tuple[int, int]:
        least = SPLIT_ROWS * unit // 32
        cheap = int(rows * row_bytes * WRITTEN / partial)
        wanted = min(-(-TARGET_THREADGROUPS // threadgroups), max(cheap, -(-FEW_THREADGROUPS // threadgroups)))
        n = max(1, min(wanted, most, rows // least))
        step = max(unit, -(-rows // (n * unit)) * unit)
        return -(-rows // step), step

    exact = (x.key_dim + x.value_dim) * x.inputs["queries"].itemsize
    body, tail = (
        cut(x.body_rows, x.unit, x.keys.row_bytes + x.values.row_bytes, MAX_SPLITS * 3 // 4),
        cut(x.tail_rows, 32, exact, MAX_SPLITS // 4),
    )
    return body, (max(1, tail[0]), tail[1])


def simdgroups(x: Operands, rows: int) -> int:
    """Return the simdgroups of a threadgroup: as many as its memory has room for, a power of two up to SIMDGROUPS."""
    return _simdgroups(x.keys, x.values, x.key_dim, x.value_dim, rows)


@cache
def _simdgroups(keys: Format, values: Format, dim: int, value_dim: int, rows: int) -> int:
    least = 48 if rows > 2 else 24
    lanes = next(n for n in (8, 4, 2, 1) if n == 1 or (dim % (8 * n) == 0 and dim // n >= least))
    channels = 16 if rows <= 2 and value_dim % 16 == 0 else 8
    common = rows * (dim + 4 * lanes) + 128
    own = 32 * rows
    if keys.kind == AFFINE:
        common += 2 * rows * dim // gcd(8, keys.group)
        own += 32 * dim // keys.group
    blocks = max(1, 32 // keys.group) if keys.group else 0
    if keys.kind == CHANNEL:
        own += blocks * dim
    if keys.kind == CODEBOOK:
        own += blocks * rows
    if values.kind == AFFINE:
        folded = value_dim <= 2 * values.group and values.group % channels == 0
        own += 32 * (rows * (value_dim // values.group - 1) if folded else value_dim // values.group)
    last = 32 * channels + 2 * rows
    room = min((SHARED_FLOATS - common) // own, SHARED_FLOATS // last)
    return max(n for n in (1, 2, 4, SIMDGROUPS) if n <= room)
