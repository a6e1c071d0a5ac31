"""One model's caches together, and the life of one layer's cache: append, attend, observe, settle.

`LayerCache` is what both adapters drive. It never waits for the device except where rows are selected, and acts
on each sequence of a batch as if it ran alone: results depend neither on batch mates nor on padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmlx import ops
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.types import Array, LayerInfo, ModelInfo, Rotary, Rows, UnsupportedModelError, resolve_budget

FLUSH_ROWS = 32
"""Decoded rows that gather in the tail, beyond `recent`, before they are encoded together."""


@dataclass(frozen=True)
class Session:
    """What the layers of one model share. Immutable, so that copies of a cache may share it."""

    strategy: Strategy
    model: ModelInfo
    n_managed: int
    unmanaged: tuple[str, ...] = ()
    """Layers that were left as the model made them, with the reason."""
    inspect: bool = field(default=False, compare=False)
    """Keep the position of every row, for tests and tools (4 bytes a row)."""

    def columns(self) -> tuple[str, ...]:
        """Return the numbers that each row carries."""
        strategy = self.strategy
        names = ["sums"] if "sums" in strategy.needs else []
        if strategy.merge is not None and strategy.merge.makes_bias:
            names.append("bias")
        if self.inspect:
            names.append("position")
        return tuple(names)

    @property
    def stores_body(self) -> bool:
        return self.strategy.encodes or self.strategy.ragged


@dataclass(frozen=True)
class Report:
    """What a model's caches hold."""

    strategy: str
    tokens: int
    """Tokens seen, all sequences together."""
    kept_tokens: float
    """Rows kept, mean over heads and managed layers, all sequences together."""
    nbytes: int
    """Bytes held by the managed layers: rows, metadata, head-room."""
    full_nbytes: int
    """Bytes of the same tokens in a full cache of 16-bit rows."""
    unmanaged_nbytes: int
    layers: int
    unmanaged: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Bytes held / bytes of the full 16-bit cache."""
        return self.nbytes / self.full_nbytes if self.full_nbytes else 0.0

    def __str__(self) -> str:
        inverse = f"{1 / self.ratio:.1f}x" if self.ratio else "empty"
        return (
            f"{self.kept_tokens:,.0f} of {self.tokens:,} tokens kept, {self.nbytes / 2**20:.1f} MiB held, "
            f"{self.ratio:.3f} of the full 16-bit cache ({inverse})"
        )


def check_layers(strategy: Strategy, model: ModelInfo, numbers: Sequence[int]) -> None:
    """Raise unless the strategy's stages can serve these layers; ``numbers`` are those that the model gives them.

    Raises:
        StrategyError: a codec cannot store rows of so many channels.
        UnsupportedModelError: a selector needs what a layer has not.
    """
    for layer in model.layers:
        for codec, dim in zip(strategy.codecs(), (layer.key_dim, layer.value_dim), strict=True):
            if codec is not None and dim:
                codec.check(dim)
    bare = [str(i) for i, layer in zip(numbers, model.layers, strict=True) if layer.rotary is None]
    if "query_moments" in strategy.needs and bare:
        raise UnsupportedModelError(
            f"{model.model_type} cannot be served with {str(strategy)!r}: it needs plain rotary position "
            f"embeddings, which layers {', '.join(bare)} have not; use snapkv, h2o or keydiff"
        )


class LayerCache:
    """The compressed cache of one attention layer for B sequences."""

    def __init__(self, backend: Any, session: Session, layer: int) -> None:
        self.backend = backend
        self.session = session
        self.layer = layer
        self.store = self._blank_store()
        self.offsets = np.zeros(0, np.int64)
        """Tokens seen by each sequence ``[B]``: the position of the next one."""
        self.prefilling = np.ones(0, bool)
        self.since_selection = np.zeros(0, np.int64)
        self.remaining: np.ndarray | None = None
        """Real tokens still to come of each right-padded sequence."""
        self.padding = np.zeros(0, np.int64)
        """Padding rows at the end of the tail, from the last forward."""
        self.due = 0
        """Queries of the last forward if it is not settled yet, else 0."""
        self.scale = 1.0
        self.queries: Array = None
        """The newest queries of the prompt ``[B, Hq, W, D]``, right-aligned."""
        self.n_queries = np.zeros(0, np.int64)
        """How many of them are real ``[B]``."""
        self.moments: tuple[Array, Array, np.ndarray] | None = None
        """Sums of the pre-RoPE queries ``[B, Hq, D]``, of their outer products, and how many ``[B]``."""

    # -- shape ----------------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        return self.session.strategy

    @property
    def info(self) -> LayerInfo:
        return self.session.model.layers[self.layer]

    @property
    def batch(self) -> int:
        return len(self.offsets)

    @property
    def empty(self) -> bool:
        return self.store.empty

    def start(self, batch: int) -> None:
        """Become the cache of ``batch`` sequences that have seen nothing yet."""
        self.offsets = np.zeros(batch, np.int64)
        self.prefilling = np.ones(batch, bool)
        self.since_selection = np.zeros(batch, np.int64)
        self.padding = np.zeros(batch, np.int64)
        self.n_queries = np.zeros(batch, np.int64)

    def arrays(self) -> dict[str, Array]:
        """Return every array held, by name."""
        out = self.store.arrays()
        if self.queries is not None:
            out = out | {"queries": self.queries}
        if self.moments is not None:
            out = out | {"moments.sum": self.moments[0], "moments.outer": self.moments[1]}
        return out

    @property
    def nbytes(self) -> int:
        """Bytes held, observation buffers included."""
        return sum(a.nbytes for a in self.arrays().values())

    # -- the model's two calls ------------------------------------------------------------------------------------

    def update(self, keys: Array, values: Array) -> None:
        """Take in post-RoPE ``keys [B, H, L, D]`` and ``values [B, H, L, Dv]`` of the newest tokens."""
        self.settle()
        if self.empty:
            self._check_dims(keys, values)
        if not self.batch:
            self.start(keys.shape[0])
        if keys.shape[0] != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, got keys of {keys.shape[0]}")
        n = keys.shape[2]
        self.store.append(keys, values)
        real: Any = n
        if self.remaining is not None:
            real = np.clip(self.remaining, 0, n)
            self.remaining = self.remaining - real
        self.padding = np.zeros(self.batch, np.int64) + (n - real)
        if self.session.inspect:
            positions = (self.offsets[:, None] + np.arange(n)).astype(np.float32)
            rows = np.broadcast_to(positions[:, None], (self.batch, keys.shape[1], n))
            self._set_newest("position", rows)
        self.offsets = self.offsets + real
        self.due = n
        if n > 1:
            self.prefilling = np.ones(self.batch, bool)
        else:
            self.since_selection = self.since_selection + ~self.prefilling

    def _set_newest(self, name: str, rows: np.ndarray) -> None:
        store, xp = self.store, self.backend.xp
        n = rows.shape[2]
        fresh = xp.concat(
            [
                store.columns[name][:, :, : store.end - n],
                self.backend.from_numpy(rows),
                store.columns[name][:, :, store.end :],
            ],
            axis=2,
        )
        store.columns[name] = fresh

    def _blank_store(self) -> LayerStore:
        session = self.session
        codecs = session.strategy.codecs() if session.stores_body else None
        return LayerStore(self.backend, codecs, sinks=session.strategy.sinks, columns=session.columns())

    def _check_dims(self, keys: Array, values: Array) -> None:
        for codec, x in zip(self.strategy.codecs(), (keys, values), strict=True):
            if codec is not None:
                codec.check(x.shape[3])

    def attend(
        self,
        queries: Array,
        *,
        scale: float,
        sinks: Array | None = None,
        mask: Array | None = None,
        window: int | None = None,
    ) -> Array:
        """Return ``[B, Hq, L, Dv]``: attention of the newest L tokens over every row that is kept.

        Args:
            queries: post-RoPE ``[B, Hq, L, D]``.
            scale: factor of the logits.
            sinks: attention-sink logits ``[Hq]``.
            mask: the model's own mask over every token seen, bool or additive; refused once rows were evicted.
            window: the newest tokens that ``mask`` lets a token see, itself included, if it says nothing else.
        """
        self.scale = scale
        if mask is not None:
            self._check_mask(mask)
        out = self.backend.attend(self.store, queries, scale=scale, sinks=sinks, mask=mask, window=window)
        observed = self._observe(queries)
        return self.backend.after(out, observed)

    def _check_mask(self, mask: Array) -> None:
        held = int(self.store.lengths.max())
        if mask.shape[-1] != held or (self.store.lengths != held).any():
            raise UnsupportedModelError(
                f"layer {self.layer} brings an attention mask of its own over {mask.shape[-1]} tokens, but "
                f"{self.strategy} keeps {held} rows of it: use a strategy without a select stage"
            )

    # -- observation ----------------------------------------------------------------------------------------------

    def _observe(self, queries: Array) -> list[Array]:
        """Note what the stages need of these queries; return arrays that must be evaluated with the output."""
        needs, out = self.strategy.needs, []
        reads = self.prefilling.any() or self.strategy.every is not None
        if "queries" in needs and reads:
            self._keep_queries(queries)
            out.append(self.queries)
        if "sums" in needs:
            self._add_sums(queries)
            out += [
                self.store.columns["sums"],
                *(p for n, p in self.store.planes.items() if n == "column.sums"),
            ]
        rotary = self.info.rotary
        if "query_moments" in needs and rotary is not None and reads:
            out += self._add_moments(queries, rotary)
        return out

    def _keep_queries(self, queries: Array) -> None:
        xp, window = self.backend.xp, self.strategy.window
        b, hq, n, d = queries.shape
        if self.queries is None:
            self.queries = xp.zeros((b, hq, window, d), dtype=queries.dtype)
        self.n_queries = np.minimum(self.n_queries + n - self.padding, window)
        joined = queries if n >= window and not self.padding.any() else xp.concat([self.queries, queries], axis=2)
        held = joined.shape[2]
        if not self.padding.any():
            # Copied: a slice would hold on to the queries of the whole chunk.
            newest = self.backend.from_numpy(np.arange(held - window, held, dtype=np.int32))
            self.queries = xp.take(joined, newest, axis=2)
            return
        rows = (window + n - self.padding)[:, None] - window + np.arange(window)
        index = np.broadcast_to(rows[:, None].astype(np.int32), (b, hq, window))
        self.queries = ops.take_rows(xp, joined, self.backend.from_numpy(np.ascontiguousarray(index)))

    def _add_sums(self, queries: Array) -> None:
        store, xp = self.store, self.backend.xp
        keys, _, valid, bias = store.tail()
        b, h, n_tail, _ = keys.shape
        if bias is None:
            bias = xp.zeros((b, h, n_tail), dtype=xp.float32)
        if valid is not None:
            bias = xp.where(valid, bias, ops.NEG_INF)
        longest = 0
        if store.has_body:
            longest = int(store.length.max())
            tile = store.body_tile(0, longest)
            body = store.key_codec.unrotate(self.backend, tile.keys)
            extra = xp.zeros((b, h, longest), dtype=xp.float32) if tile.bias is None else tile.bias
            if tile.valid is not None:
                extra = xp.where(tile.valid, extra, ops.NEG_INF)
            keys = xp.concat([body, xp.astype(keys, xp.float32)], axis=2)
            bias = xp.concat([extra, bias], axis=2)
        plain = not store.has_body and valid is None and not store.biased
        n_queries = None
        if self.padding.any():
            n_queries = self.backend.from_numpy((queries.shape[2] - self.padding).astype(np.int32))
        sums = self.backend.column_sums(
            queries, keys, scale=self.scale, n_queries=n_queries, bias=None if plain else bias
        )
        sums = ops.group_mean(xp, sums, h)
        store.add_to_column("sums", sums[:, :, longest:], sums[:, :, :longest] if longest else None)

    def _add_moments(self, queries: Array, rotary: Rotary) -> list[Array]:
        """Add to the sums of the pre-RoPE queries and of their outer products, sinks left out."""
        xp = self.backend.xp
        n = queries.shape[2]
        real = n - self.padding
        positions = (self.offsets - real)[:, None] + np.arange(n)
        counted = (positions >= self.strategy.sinks) & (np.arange(n) < real[:, None])
        if self.strategy.every is None:
            counted &= self.prefilling[:, None]
        plain = ops.unrotate(self.backend, xp.astype(queries, xp.float32), positions, rotary)
        plain = plain * self.backend.from_numpy(counted.astype(np.float32))[:, None, :, None]
        total = xp.sum(plain, axis=2)
        outer = xp.matmul(xp.permute_dims(plain, (0, 1, 3, 2)), plain)
        count = counted.sum(axis=1)
        if self.moments is not None:
            total, outer, count = total + self.moments[0], outer + self.moments[1], count + self.moments[2]
        self.moments = (total, outer, count)
        return [total, outer]

    # -- boundaries -----------------------------------------------------------------------------------------------

    def settle(self, *, chunk_end: bool = False, prompt_end: bool = False) -> None:
        """Do what the schedule asks for after the last forward. Idempotent.

        Args:
            chunk_end: the caller knows that the last forward was a chunk of a prompt: with `at_end` a last chunk
                of one token is then not mistaken for the prompt's end.
            prompt_end: the caller knows that the prompt is complete.
        """
        if self.empty:
            return
        last, self.due = self.due, 0
        if last and self.padding.any():
            self.store.drop_newest(self.padding)
            self.padding = np.zeros(self.batch, np.int64)
        if self.strategy.identity or not (last or prompt_end):
            return
        if last == 1 and not (prompt_end or chunk_end) and self._decodes():
            return
        ends = self.prefilling & (prompt_end or (last == 1 and not chunk_end))
        act = self.prefilling.copy() if self.strategy.bounded and (last > 1 or chunk_end) else ends.copy()
        if self.strategy.every is not None:
            act |= ~self.prefilling & (self.since_selection >= self.strategy.every)
        self.prefilling = self.prefilling & ~ends
        if self.strategy.select is not None:
            for b in np.flatnonzero(act):
                self._select(int(b))
                self.since_selection[b] = 0
        if self.strategy.encodes:
            self._encode(act)
        if act.any():
            # Layer by layer: a lazy framework would hold the old and the new rows of all layers at once.
            self.backend.evaluate(list(self.store.arrays().values()))
        if self.strategy.every is None and not self.prefilling.any():
            # Decoding selects nothing: the next prompt brings its own queries.
            self.queries, self.n_queries = None, np.zeros(self.batch, np.int64)
            self.moments = None

    def count_as_decoded(self, n: int) -> None:
        """Take the last forward's ``n`` tokens for decoded ones: no prompt was opened that a selector would end."""
        self.prefilling = np.zeros(self.batch, bool)
        self.since_selection = self.since_selection + n

    def _decodes(self) -> bool:
        """Whether every sequence decodes and nothing is due, as in most steps of decoding."""
        if self.strategy.every is not None or self.prefilling.any():
            return False
        if self.queries is not None or self.moments is not None:
            return False
        return not self.strategy.encodes or self._loose < FLUSH_ROWS

    @property
    def _loose(self) -> int:
        """Rows of the longest lane's tail that are neither sinks nor recent."""
        return self.store.end - self.store.first - self.strategy.sinks - self.strategy.recent

    def _encode(self, act: np.ndarray) -> None:
        """Encode rows older than `recent`: all of them where something acted, else once enough gathered."""
        store = self.store
        if self._loose < FLUSH_ROWS and not act.any():
            return
        held = store.tail_lengths
        spare = held - np.minimum(self.strategy.sinks, held) - self.strategy.recent
        unit = store.unit
        flush = -(-FLUSH_ROWS // unit) * unit
        decoding = (~self.prefilling | self.strategy.bounded)[:, None]
        due = np.where(act[:, None], spare >= unit, decoding & (spare >= flush))
        store.encode_oldest(np.where(due, np.maximum(spare, 0) // unit * unit, 0))

    def _budget(self, b: int) -> int:
        """Return the mean rows per head that sequence ``b`` keeps in this layer."""
        strategy, seen = self.strategy, int(self.offsets[b])
        assert strategy.select is not None
        tokens = resolve_budget(strategy.select.budget, seen)
        protected = min(seen, strategy.sinks + strategy.recent)
        tokens = max(tokens, protected)
        return strategy.allocate.layer_budgets(tokens, seen, self.session.model.n_layers, protected)[self.layer]

    def _select(self, b: int) -> None:
        """Cut sequence ``b`` to its budget: score, allocate, fold, evict."""
        store, select = self.store, self.strategy.select
        assert select is not None
        h = store.shape[1]
        held = store.lengths[b]
        budget = self._budget(b)
        if held.sum() <= budget * h and not (store.has_body and (held > budget).any() and not self.strategy.ragged):
            self._stow(b)
            return
        level = bool((store.begin[b] == store.begin[b, 0]).all() and (store.length[b] == store.length[b, 0]).all())
        groups = [slice(0, h)] if level else [slice(i, i + 1) for i in range(h)]
        rows = [self._rows(b, heads) for heads in groups]
        scores = [self.backend.to_numpy(select.score(r)).astype(np.float32)[0] for r in rows]
        lanes = [s for group in scores for s in group]
        keep = self._choose(b, lanes, budget)
        replaced = None
        if self.strategy.merge is not None:
            replaced = self._fold(b, rows[0], keep)
        self._evict(b, keep, replaced)
        self._stow(b)

    def _rows(self, b: int, heads: slice) -> Rows:
        keys, values, columns = self.store.lane_rows(b, heads)
        hq = 0 if self.queries is None else self.queries.shape[1]
        group = hq // self.store.shape[1]
        picked = slice(heads.start * group, heads.stop * group)
        window = int(self.n_queries[b])
        mean = cov = None
        if self.moments is not None:
            mean, cov = self._moments_of(b, heads)
        return Rows(
            backend=self.backend,
            keys=keys,
            values=values,
            scale=self.scale,
            length=int(self.offsets[b]),
            layer=self.layer,
            n_layers=self.session.model.n_layers,
            queries=None if self.queries is None else self.queries[b : b + 1, picked, self.strategy.window - window :],
            sums=columns.get("sums"),
            query_mean=mean,
            query_cov=cov,
            rotary=self.info.rotary,
            bias=columns.get("bias"),
        )

    def _moments_of(self, b: int, heads: slice) -> tuple[Array, Array]:
        assert self.moments is not None
        total, outer, count = self.moments
        group = total.shape[1] // self.store.shape[1]
        picked = slice(heads.start * group, heads.stop * group)
        n = max(1, int(count[b]))
        mean = total[b : b + 1, picked] / n
        return mean, outer[b : b + 1, picked] / n - mean[..., :, None] * mean[..., None, :]

    def _choose(self, b: int, scores: Sequence[np.ndarray], budget: int) -> list[np.ndarray]:
        """Return the sorted logical rows that each head keeps; sinks and recent rows always, body units whole."""
        strategy, store = self.strategy, self.store
        sinks, recent = strategy.sinks, strategy.recent
        h = len(scores)
        protected = sinks + recent
        budgets = np.full(h, budget)
        if strategy.ragged:
            longest = max(len(s) for s in scores)
            padded = np.full((h, max(longest - protected, 0)), -np.inf, np.float32)
            for i, s in enumerate(scores):
                middle = s[sinks : len(s) - recent]
                padded[i, : len(middle)] = middle
            shares = strategy.allocate.head_budgets(padded, max(budget - protected, 0), protected)
            held = np.array([max(len(s) - protected, 0) for s in scores])
            budgets = _capped(np.asarray(shares), held) + protected
        keep = []
        for i, s in enumerate(scores):
            n_body, unit = int(store.length[b, i]), store.unit
            keep.append(_best(s, int(budgets[i]), sinks, recent, n_body, unit))
        return keep

    def _fold(self, b: int, rows: Rows, keep: list[np.ndarray]) -> dict[str, Array]:
        """Fold the evicted tail rows into the kept ones; rows of the body are left as they are encoded."""
        store, strategy = self.store, self.strategy
        n_body = int(store.length[b, 0])
        if n_body:
            return {}
        t = rows.keys.shape[2]
        kept = np.stack(keep)
        dropped = np.stack([np.setdiff1d(np.arange(t), k) for k in keep])
        index = [self.backend.from_numpy(x[None].astype(np.int32)) for x in (kept, dropped)]
        assert strategy.merge is not None
        keys, values, bias = strategy.merge.fold(rows, *index)
        store.biased = store.biased or bias is not None
        return {"keys": keys, "values": values} | ({} if bias is None else {"bias": bias})

    def _evict(self, b: int, keep: list[np.ndarray], replaced: dict[str, Array] | None) -> None:
        store = self.store
        h, s = store.shape[1], self.strategy.sinks
        tail_kept = [np.arange(lo, store.end) for lo in store.begin.ravel()]
        body_kept = [np.arange(n // store.unit) for n in store.length.ravel()]
        for i, rows in enumerate(keep):
            lane = b * h + i
            n_body, lo = int(store.length[b, i]), int(store.begin[b, i])
            in_body = (rows >= s) & (rows < s + n_body) if n_body else np.zeros(len(rows), bool)
            units = (rows[in_body] - s) // store.unit
            body_kept[lane] = np.unique(units)
            tail = rows[~in_body]
            tail_kept[lane] = lo + np.where(tail >= s + n_body, tail - n_body, tail) if n_body else lo + tail
        store.retain_body(body_kept)
        store.retain_tail(tail_kept)
        for name, rows in (replaced or {}).items():
            self._write_sequence(b, name, rows)

    def _write_sequence(self, b: int, name: str, rows: Array) -> None:
        """Replace the newest rows ``[1, H, n, ...]`` of one sequence's tail."""
        store, xp = self.store, self.backend.xp
        held = getattr(store, name) if name in ("keys", "values") else store.columns[name]
        n = rows.shape[2]
        lane = xp.concat(
            [
                held[b : b + 1, :, : store.end - n],
                xp.astype(rows, held.dtype),
                held[b : b + 1, :, store.end :],
            ],
            axis=2,
        )
        joined = xp.concat([held[:b], lane, held[b + 1 :]], axis=0) if self.batch > 1 else lane
        if name in ("keys", "values"):
            setattr(store, name, joined)
        else:
            store.columns[name] = joined

    def _stow(self, b: int) -> None:
        """Without an encode stage, move rows of unequal heads into the body, where each takes only its own bytes."""
        store = self.store
        if not self.strategy.ragged or self.strategy.encodes:
            return
        held = store.tail_lengths
        spare = np.maximum(held - np.minimum(self.strategy.sinks, held) - self.strategy.recent, 0)
        spare[np.arange(self.batch) != b] = 0
        store.encode_oldest(spare)

    # -- sequences ------------------------------------------------------------------------------------------------

    @property
    def trimmable(self) -> bool:
        """Whether any number of newest tokens can be taken back: nothing may ever have been evicted."""
        return self.strategy.identity or (self.strategy.select is None and self.strategy.bounded)

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; return how many were."""
        if self.empty:
            return 0
        if self.padding.any():
            self.settle()
        n = int(min(n, self.offsets.min()))
        if n:
            # Before anything is encoded: rejected drafts leave no trace in the scales of their neighbours.
            self.store.trim(n)
            self.offsets = self.offsets - n
            self.due = max(self.due - n, 0)
        return n

    def take(self, parts: Sequence[tuple[LayerCache, int]]) -> LayerCache:
        """Return a cache of these sequences, in order. Batching, filtering and extraction are all this."""
        out = LayerCache(self.backend, self.session, self.layer)
        out._fill(parts)
        return out

    def _fill(self, parts: Sequence[tuple[LayerCache, int]]) -> None:
        caches = list({id(c): c for c, _ in parts}.values())
        for cache in caches:
            cache._ensure_batch()
            if any(c.due != caches[0].due for c in caches) or cache.padding.any():
                cache.settle(chunk_end=bool(cache.prefilling.all() and cache.due > 1))
        self.offsets = np.array([c.offsets[b] for c, b in parts], np.int64)
        self.prefilling = np.array([c.prefilling[b] for c, b in parts], bool)
        self.since_selection = np.array([c.since_selection[b] for c, b in parts], np.int64)
        self.padding = np.zeros(len(parts), np.int64)
        self.n_queries = np.array([c.n_queries[b] for c, b in parts], np.int64)
        self.due = caches[0].due if all(c.due == caches[0].due for c in caches) else 0
        if any(c.remaining is not None for c in caches):
            self.remaining = np.array([0 if c.remaining is None else c.remaining[b] for c, b in parts], np.int64)
        filled = next((c for c in caches if not c.empty), None)
        if filled is None:
            return
        self.scale = filled.scale
        self.store = LayerStore.assemble([(c.store, b) for c, b in parts])
        self.queries = _stack([None if c.queries is None else c.queries[b : b + 1] for c, b in parts], self.backend.xp)
        sums = [None if c.moments is None else c.moments[0][b : b + 1] for c, b in parts]
        outer = [None if c.moments is None else c.moments[1][b : b + 1] for c, b in parts]
        counts = np.array([0 if c.moments is None else c.moments[2][b] for c, b in parts])
        total, squares = _stack(sums, self.backend.xp), _stack(outer, self.backend.xp)
        self.moments = None if total is None else (total, squares, counts)

    def _ensure_batch(self) -> None:
        if not self.batch:
            self.start(1)

    def positions(self) -> list[list[np.ndarray]]:
        """Return the position of every row, by sequence and head; needs a session that inspects."""
        b, h, _, _ = self.store.shape
        out = []
        for i in range(b):
            lanes = [self.store.lane_rows(i, slice(j, j + 1))[2]["position"] for j in range(h)]
            out.append([self.backend.to_numpy(x).ravel().astype(np.int64) for x in lanes])
        return out

    def report_rows(self) -> tuple[float, int]:
        """Return rows kept (mean over heads, all sequences) and the bytes of a full 16-bit cache."""
        if self.empty:
            return 0.0, 0
        _, h, d, dv = self.store.shape
        kept = float(self.store.lengths.mean(axis=1).sum()) - float(self.padding.sum())
        return kept, int(self.offsets.sum()) * h * (d + dv) * 2


def _stack(parts: list[Array | None], xp: Any) -> Array | None:
    like = next((p for p in parts if p is not None), None)
    if like is None:
        return None
    return xp.concat([xp.zeros_like(like) if p is None else p for p in parts], axis=0)


def _best(scores: np.ndarray, budget: int, sinks: int, recent: int, n_body: int, unit: int) -> np.ndarray:
    """Return the sorted rows to keep of one head: the protected ones, whole body units, the best of the tail."""
    t = len(scores)
    if budget >= t:
        return np.arange(t)
    ranked = scores.astype(np.float64)
    ranked[np.isnan(ranked)] = -np.inf
    body_stop = sinks + n_body if n_body else 0
    if n_body and unit > 1:
        blocks = ranked[sinks:body_stop].reshape(-1, unit)
        ranked[sinks:body_stop] = np.repeat(blocks.mean(axis=1), unit)
    ranked[:sinks] = np.inf
    ranked[t - recent :] = np.inf
    order = np.argsort(-ranked, stable=True)
    keep = np.sort(order[:budget])
    if not n_body or unit == 1:
        return keep
    in_body = keep[(keep >= sinks) & (keep < body_stop)]
    n_units = len(in_body) // unit
    candidates = order[(order >= sinks) & (order < body_stop)][: n_units * unit]
    outside = order[(order < sinks) | (order >= body_stop)][: budget - n_units * unit]
    return np.sort(np.concatenate([candidates, outside]))


def _capped(shares: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Cap shares at the rows there are and give the rest to the heads that have more, evenly."""
    out = np.minimum(shares, held)
    rest = int(shares.sum() - out.sum())
    while rest > 0 and (out < held).any():
        for i in np.flatnonzero(out < held):
            if rest == 0:
                break
            out[i] += 1
            rest -= 1
    return out


def report(caches: Sequence[LayerCache], *, unmanaged_nbytes: int = 0) -> Report:
    """Sum up what the layers hold."""
    if not caches:
        raise ValueError("there is no compressed layer to report on")
    session = caches[0].session
    rows = [c.report_rows() for c in caches]
    return Report(
        strategy=str(session.strategy),
        tokens=int(caches[0].offsets.sum()),
        kept_tokens=sum(r[0] for r in rows) / len(rows),
        nbytes=sum(c.nbytes for c in caches),
        full_nbytes=sum(r[1] for r in rows),
        unmanaged_nbytes=unmanaged_nbytes,
        layers=len(caches),
        unmanaged=session.unmanaged,
    )
