"""Primitives in plain array operations, written once for every backend's namespace ``xp``.

A backend may replace any of them by a kernel; ``kvmlx.reference`` is the float64 oracle of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvmlx.types import Array, Rotary

NEG_INF = float("-inf")
QUERY_BLOCK_ELEMENTS = 1 << 20
"""Scores that one block of queries may hold at a time: 4 MiB in float32, small beside a layer's activations."""


def softmax(xp: Any, x: Array) -> Array:
    """Softmax over the last axis in float32; a row that is all -inf gives zeros."""
    x = xp.astype(x, xp.float32)
    peak = xp.max(x, axis=-1, keepdims=True)
    peak = xp.where(peak == NEG_INF, xp.zeros_like(peak), peak)
    e = xp.exp(x - peak)
    return e / xp.maximum(xp.sum(e, axis=-1, keepdims=True), 1e-30)


def group_mean(xp: Any, x: Array, n_kv_heads: int) -> Array:
    """Average ``[B, Hq, ...]`` over the query heads of each KV head: ``[B, H, ...]``."""
    b, hq, *rest = x.shape
    return xp.mean(xp.reshape(x, (b, n_kv_heads, hq // n_kv_heads, *rest)), axis=2)


def top_rows(xp: Any, scores: Array, count: int) -> Array:
    """Return the indices of the ``count`` best of ``scores [..., T]``, ascending, int32; ties go to the older row."""
    best = xp.argsort(-scores, axis=-1, **_STABLE.get(xp.__name__, {}))[..., :count]
    return xp.astype(xp.sort(best, axis=-1), xp.int32)


_STABLE: dict[str, dict[str, bool]] = {"numpy": {"stable": True}}
"""NumPy must be asked for a stable order; the other namespaces' is always."""


def take_rows(xp: Any, x: Array, rows: Array) -> Array:
    """Gather ``x [B, H, T, D]`` (or ``[B, H, T]``) at ``rows [B, H, C]``."""
    if len(x.shape) == 3:
        return xp.take_along_axis(x, rows, axis=2)
    return xp.take_along_axis(x, rows[..., None], axis=2)


def causal_mask(xp: Any, n_queries: int, n_keys: int) -> Array:
    """Return bool ``[L, T]``: the last L keys are the queries' own."""
    q = xp.arange(n_queries)[:, None] + (n_keys - n_queries)
    return q >= xp.arange(n_keys)[None, :]


def logits(xp: Any, queries: Array, keys: Array, scale: float) -> Array:
    """Return float32 ``[B, Hq, L, T]`` of ``queries [B, Hq, L, D]`` on ``keys [B, H, T, D]``."""
    b, hq, n, d = queries.shape
    h, t = keys.shape[1], keys.shape[2]
    q = xp.reshape(xp.astype(queries, xp.float32) * scale, (b, h, hq // h * n, d))
    s = xp.matmul(q, xp.permute_dims(xp.astype(keys, xp.float32), (0, 1, 3, 2)))
    return xp.reshape(s, (b, hq, n, t))


def weighted_values(xp: Any, weights: Array, values: Array) -> Array:
    """Return float32 ``[B, Hq, L, Dv]``: ``weights [B, Hq, L, T]`` times ``values [B, H, T, Dv]``."""
    b, hq, n, t = weights.shape
    h, d = values.shape[1], values.shape[3]
    w = xp.reshape(weights, (b, h, hq // h * n, t))
    return xp.reshape(xp.matmul(w, xp.astype(values, xp.float32)), (b, hq, n, d))


def after(xp: Any, x: Array, blocks: Sequence[Array]) -> Array:
    """Return ``x``, made to wait for the last of ``blocks``: a lazy framework would hold all their scratch."""
    if not blocks or not hasattr(xp, "depends"):
        return x
    return xp.depends([x], [blocks[-1]])[0]


def column_sums(
    xp: Any,
    queries: Array,
    keys: Array,
    *,
    scale: float,
    n_queries: Any = None,
    bias: Array | None = None,
) -> Array:
    """Return ``[B, Hq, T]`` float32: the attention that each key receives, summed over the queries.

    Args:
        queries: ``[B, Hq, L, D]``; the last L keys are their own tokens (causal, lower-right aligned).
        keys: ``[B, H, T, D]``.
        scale: factor of the logits.
        n_queries: only the first n of the L queries count, ``[B]`` or None for all (right padding).
        bias: ``[B, H, T]`` added to the logits, -inf for rows that do not exist.
    """
    b, hq, n, _ = queries.shape
    h, t = keys.shape[1], keys.shape[2]
    block = max(16, QUERY_BLOCK_ELEMENTS // max(1, b * hq * t))
    total = xp.zeros((b, hq, t), dtype=xp.float32)
    key_index = xp.arange(t)[None, :]
    for start in range(0, n, block):
        stop = min(n, start + block)
        s = logits(xp, after(xp, queries[:, :, start:stop], [total]), keys, scale)
        own = xp.arange(start, stop)[:, None] + (t - n)
        s = xp.where(own >= key_index, s, NEG_INF)
        if bias is not None:
            s = s + xp.repeat(bias, hq // h, axis=1)[:, :, None, :]
        p = softmax(xp, s)
        if n_queries is not None:
            counted = xp.arange(start, stop)[None, :] < n_queries[:, None]
            p = xp.where(counted[:, None, :, None], p, 0.0)
        total = total + xp.sum(p, axis=2)
    return total


def rotate(backend: Any, x: Array, positions: Any, rotary: Rotary, *, inverse: bool = False) -> Array:
    """Apply a rotary embedding to ``x [B, H, n, D]`` at ``positions [B, n]`` (host integers), or undo it."""
    xp = backend.xp
    angles = positions[..., None] * np.asarray(rotary.frequency, np.float64)
    factor = 1.0 / rotary.factor if inverse else rotary.factor
    cos = backend.from_numpy((np.cos(angles) * factor).astype(np.float32))[:, None]
    sin = backend.from_numpy((np.sin(angles) * factor).astype(np.float32))[:, None]
    if inverse:
        sin = -sin
    first, second = (backend.from_numpy(np.asarray(i, np.int32)) for i in (rotary.first, rotary.second))
    a, b = xp.take(x, first, axis=-1), xp.take(x, second, axis=-1)
    rest = np.setdiff1d(np.arange(x.shape[-1]), np.asarray([*rotary.first, *rotary.second]))
    parts = [a * cos - b * sin, a * sin + b * cos]
    if len(rest):
        parts.append(xp.take(x, backend.from_numpy(rest.astype(np.int32)), axis=-1))
    order = np.argsort(np.concatenate([rotary.first, rotary.second, rest]).astype(np.int64))
    return xp.take(xp.concat(parts, axis=-1), backend.from_numpy(order.astype(np.int32)), axis=-1)


def unrotate(backend: Any, x: Array, positions: Any, rotary: Rotary) -> Array:
    """Undo a rotary embedding: post-RoPE ``x [B, H, n, D]`` at ``positions [B, n]`` to pre-RoPE."""
    return rotate(backend, x, positions, rotary, inverse=True)
