"""Attention over a LayerStore in plain array operations: what a backend's `attend` does until a kernel replaces it."""

from __future__ import annotations

from typing import Any

from kvmlx import ops
from kvmlx.store import LayerStore
from kvmlx.types import Array, Backend

SCORE_ELEMENTS = 1 << 20
"""Numbers that one tile's scratch may hold (4 MiB in float32): it does not grow with the history."""
MIN_TILE_ROWS = 128
MIN_QUERY_BLOCK = 128
"""Queries that a block of exact attention has at least: a long history must not leave one query a call."""


class Softmax:
    """A softmax-weighted sum that takes its keys in tiles (online softmax); float32, shapes ``[B, Hq, L, *]``."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.peak: Array | None = None
        self.total: Array | None = None
        self.out: Array | None = None

    def add(self, scores: Array, values: Array) -> None:
        """Take in ``scores [B, Hq, L, t]`` (-inf where hidden) of ``values [B, H, t, Dv]``."""
        xp = self.xp
        peak = xp.max(scores, axis=-1, keepdims=True)
        if self.peak is not None:
            peak = xp.maximum(self.peak, peak)
        safe = xp.where(peak == ops.NEG_INF, xp.zeros_like(peak), peak)
        weights = xp.exp(scores - safe)
        total = xp.sum(weights, axis=-1, keepdims=True)
        out = ops.weighted_values(xp, weights, values)
        if self.peak is not None:
            shrink = xp.exp(self.peak - safe)
            total, out = self.total * shrink + total, self.out * shrink + out
        self.peak, self.total, self.out = peak, total, out

    @property
    def done(self) -> list[Array]:
        """What the tiles taken in so far have become."""
        return [] if self.out is None else [self.out]

    def map_out(self, f: Any) -> None:
        """Apply a linear map to the output gathered so far (bring it back from a codec's basis)."""
        if self.out is not None:
            self.out = f(self.out)

    def result(self, sinks: Array | None = None) -> Array:
        """Return the weighted mean; ``sinks [Hq]`` are logits that take weight and give no value."""
        xp = self.xp
        total = self.total
        safe = xp.where(self.peak == ops.NEG_INF, xp.zeros_like(self.peak), self.peak)
        if sinks is not None:
            total = total + xp.exp(xp.astype(sinks, xp.float32)[None, :, None, None] - safe)
        return self.out / xp.maximum(total, 1e-30)


def tile_rows(queries: Array, values: Array) -> int:
    """Return how many rows a tile may have: its scores, and its decoded keys or values, stay within SCORE_ELEMENTS."""
    b, hq, n, _ = queries.shape
    _, h, _, d = values.shape
    return max(MIN_TILE_ROWS, SCORE_ELEMENTS // (b * max(hq * n, h * d)))


def attend(
    backend: Backend,
    store: LayerStore,
    queries: Array,
    *,
    scale: float,
    sinks: Array | None = None,
    mask: Array | None = None,
    window: int | None = None,
) -> Array:
    """Return ``[B, Hq, L, Dv]`` in the queries' dtype: attention over every row of the store.

    Args:
        queries: ``[B, Hq, L, D]``; the newest L rows of the tail are their own (causal, lower-right aligned).
        scale: factor of the logits.
        sinks: logits ``[Hq]`` that take attention and give no value.
        mask: additional bool (True = seen) or additive mask, broadcastable to ``[B, Hq, L, T]``, T the rows in
            logical order; only for stores that hold every token.
        window: given where ``mask`` is a causal sliding window of so many tokens and nothing else; a kernel then
            need not read the mask. Plain operations do.
    """
    xp = backend.xp
    n = queries.shape[2]
    # A bias differs by head: as a mask of a whole chunk it would be as large as the score matrix.
    if not store.has_body and (n == 1 or not store.biased):
        return _attend_exact(backend, store, queries, scale, sinks, mask)
    rows = tile_rows(queries, store.values)
    acc = Softmax(xp)
    if store.has_body:
        _add_body(backend, store, acc, queries, scale, mask, rows)
    keys, values, valid, bias = store.tail()
    held = keys.shape[2]
    for first in range(0, held, rows):
        stop = min(held, first + rows)
        scores = ops.logits(xp, ops.after(xp, queries, acc.done), keys[:, :, first:stop], scale)
        part = slice(first, stop)
        scores = _restrict(
            xp,
            scores,
            None if valid is None else valid[:, :, part],
            None if bias is None else bias[:, :, part],
        )
        if n > 1 and stop > held - n:
            scores = xp.where(ops.causal_mask(xp, n, held)[:, part], scores, ops.NEG_INF)
        if mask is not None:
            scores = _mask(xp, scores, _tail_mask(xp, store, mask)[..., part])
        acc.add(scores, values[:, :, part])
    return xp.astype(acc.result(sinks), queries.dtype)


def _add_body(
    backend: Backend, store: LayerStore, acc: Softmax, queries: Array, scale: float, mask: Array | None, rows: int
) -> None:
    xp = backend.xp
    assert store.codecs is not None
    key_codec, value_codec = store.codecs
    turned = key_codec.rotate(backend, xp.astype(queries, xp.float32))
    for first, stop in store.tiles(rows):
        tile = store.body_tile(first, stop, after=acc.done)
        scores = ops.logits(xp, turned, tile.keys, scale)
        scores = _restrict(xp, scores, tile.valid, tile.bias)
        if mask is not None:
            scores = _mask(xp, scores, mask[..., store.sinks + first : store.sinks + stop])
        acc.add(scores, tile.values)
    acc.map_out(lambda out: value_codec.unrotate(backend, out))


def _tail_mask(xp: Any, store: LayerStore, mask: Array) -> Array:
    body = int(store.length.max())
    return xp.concat([mask[..., : store.sinks], mask[..., store.sinks + body :]], axis=-1)


def _restrict(xp: Any, scores: Array, valid: Array | None, bias: Array | None) -> Array:
    """Add the bias ``[B, H, t]`` and hide rows that are not valid ``[B, H, t]``, for every head of the group."""
    for x in (valid, bias):
        if x is not None:
            wide = xp.repeat(x, scores.shape[1] // x.shape[1], axis=1)[:, :, None, :]
            scores = xp.where(wide, scores, ops.NEG_INF) if x is valid else scores + wide
    return scores


def _mask(xp: Any, scores: Array, mask: Array) -> Array:
    if "bool" in str(mask.dtype):
        return xp.where(mask, scores, ops.NEG_INF)
    return scores + xp.astype(mask, xp.float32)


def _attend_causal(
    backend: Backend, queries: Array, keys: Array, values: Array, scale: float, sinks: Array | None
) -> Array:
    """Attend over dense rows, a block of queries at a time where the framework may hold all scores at once.

    A block reads the keys up to its own end only, so that blocks also save the masked half of a chunk's scores.
    """
    xp = backend.xp
    b, hq, n, _ = queries.shape
    held = keys.shape[2]
    block = max(MIN_QUERY_BLOCK, 4 * SCORE_ELEMENTS // (b * hq * held))
    if n <= block:
        return backend.sdpa(queries, keys, values, scale=scale, causal=n > 1, mask=None, sinks=sinks)
    out: list[Array] = []
    for first in range(0, n, block):
        stop = min(n, first + block)
        seen = held - n + stop
        part = ops.after(xp, queries[:, :, first:stop], out)
        rows = (keys[:, :, :seen], values[:, :, :seen])
        out.append(backend.sdpa(part, *rows, scale=scale, causal=True, mask=None, sinks=sinks))
    return xp.concat(out, axis=2)


def _attend_exact(
    backend: Backend,
    store: LayerStore,
    queries: Array,
    scale: float,
    sinks: Array | None,
    mask: Array | None,
) -> Array:
    """Attend over a store without body through the framework's own attention."""
    xp = backend.xp
    keys, values, valid, bias = store.tail()
    n, held, hq = queries.shape[2], keys.shape[2], queries.shape[1]
    if valid is None and bias is None and mask is None:
        return _attend_causal(backend, queries, keys, values, scale, sinks)
    full = xp.zeros((1, 1, n, held), dtype=xp.float32)
    if n > 1:
        full = xp.where(ops.causal_mask(xp, n, held), full, ops.NEG_INF)
    if mask is not None:
        full = _mask(xp, full, mask)
    if valid is not None:
        level = bool((store.begin == store.begin[:, :1]).all())
        wide = valid[:, :1] if level else xp.repeat(valid, hq // valid.shape[1], axis=1)
        full = xp.where(wide[:, :, None, :], full, ops.NEG_INF)
    if bias is not None:
        full = full + xp.repeat(bias, hq // bias.shape[1], axis=1)[:, :, None, :]
    # A padding query of a batch may see no row at all; the lowest finite value keeps its softmax from NaN.
    full = xp.maximum(full, float(xp.finfo(queries.dtype).min))
    return backend.sdpa(
        queries, keys, values, scale=scale, causal=False, mask=xp.astype(full, queries.dtype), sinks=sinks
    )
