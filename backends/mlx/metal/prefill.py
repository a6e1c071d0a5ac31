"""Launch prefill.metal: attention of a chunk of new tokens over a store."""

from __future__ import annotations

import mlx.core as mx

from kvmlx.backends.mlx.metal.loader import MetalKernel, floats
from kvmlx.backends.mlx.metal.operands import CONSTANTS, NAMES, operands
from kvmlx.store import LayerStore

THREADS = 256

_PREFILL = MetalKernel(
    "attend_prefill",
    file="prefill",
    inputs=[*NAMES, "sinks"],
    outputs=["out"],
    constants=CONSTANTS,
    body="""
    threadgroup float4 tile[Prefill<D, DV>::TILE / 4];
    threadgroup float levels[2 * LEVELS];
    threadgroup float2 partial[Prefill<D, DV>::PARTIAL];
    attend_prefill<D, DV, K_KIND, K_BITS, K_GROUP, K_ROTATED, V_KIND, V_BITS, V_GROUP, V_ROTATED, BIASED, MASKED,
                   SINKS>(
        queries, scale, Shape(shape, view), lanes,
        Planes{(const device uchar*)keys_codes0, keys_codes1, keys_scales, keys_offsets}, keys_levels, keys_signs,
        Planes{(const device uchar*)values_codes0, values_codes1, values_scales, values_offsets}, values_levels,
        values_signs, body_bias, tail_keys, tail_values, tail_bias, mask, sinks, out, (threadgroup float*)tile, levels,
        partial, threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)


def attend_prefill(
    store: LayerStore,
    queries: mx.array,
    *,
    scale: float,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    window: int = 0,
) -> mx.array:
    """Return ``[B, Hq, L, Dv]``: `kvmlx.attention.attend` for ``queries [B, Hq, L, D]``, as one launch.

    Its only memory is the output: what it needs does not grow with the history.

    Args:
        store: rows to attend over, of codecs that `formats.unsupported` has nothing against.
        queries: float16, bfloat16 or float32, in the dtype of the store's exact rows.
        scale: factor of the logits.
        sinks: logits ``[Hq]`` that take attention and give no value.
        mask: bool (True = seen) or additive ``[B or 1, Hq or 1, L or 1, T]``.
        window: newest tokens that a token sees, itself included; 0: all.
    """
    x = operands(store, queries, scale=scale, mask=mask, window=window)
    given = x.inputs | {"sinks": floats(sinks)}
    blocks = -(-x.group * x.n_queries // block_rows(x.key_dim, x.value_dim))
    (out,) = _PREFILL(
        given,
        template=[*x.template, ("SINKS", sinks is not None)],
        grid=(blocks, x.n_kv_heads, x.n_batch),
        threadgroup=(THREADS, 1, 1),
        outputs=[((*queries.shape[:3], x.value_dim), queries.dtype)],
    )
    return out


def block_rows(dim: int, value_dim: int) -> int:
    """Return the query rows of a threadgroup: heads of a KV head's group times positions."""
    return 64 if max(dim, value_dim) <= 128 else 32
