"""Drive one layer's cache with random rows, and say in float64 what its attention must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvmlx import reference
from kvmlx.session import LayerCache, Session
from kvmlx.strategy import Strategy
from kvmlx.types import LayerInfo, ModelInfo, Rotary

ROTARY = Rotary(tuple(range(8)), tuple(range(8, 16)), tuple(1e4 ** (-i / 8) for i in range(8)))


@dataclass(frozen=True)
class Sequence_:
    """The rows of one sequence: keys and values ``[H, T, D]``, queries ``[Hq, T, D]``."""

    seed: int
    tokens: int
    n_kv_heads: int = 2
    group: int = 2
    dim: int = 16

    def _normal(self, stream: int, heads: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, stream])
        return rng.standard_normal((self.tokens, heads, self.dim)).astype(np.float32).transpose(1, 0, 2)

    @cached_property
    def keys(self) -> np.ndarray:
        return self._normal(0, self.n_kv_heads)

    @cached_property
    def values(self) -> np.ndarray:
        return self._normal(1, self.n_kv_heads)

    @cached_property
    def queries(self) -> np.ndarray:
        return self._normal(2, self.n_kv_heads * self.group) * 1.5


def make_layer(backend: Any, strategy: str, *, inspect: bool = True, layer: int = 0, n_layers: int = 2) -> LayerCache:
    """Return an empty cache of layer ``layer`` of a model of ``n_layers``."""
    info = tuple(LayerInfo(i, rotary=ROTARY) for i in range(n_layers))
    session = Session(Strategy.parse(strategy), ModelInfo("test", info), n_layers, inspect=inspect)
    return LayerCache(backend, session, layer)


SCALE = 0.25


def feed(cache: LayerCache, sequences: Sequence[Sequence_], start: Sequence[int], n: int) -> np.ndarray:
    """Run one forward of ``n`` tokens of each sequence from ``start`` on; rows past a sequence's end are noise."""
    xp, backend = cache.backend.xp, cache.backend

    def rows(name: str) -> Any:
        parts = []
        for s, at in zip(sequences, start, strict=True):
            x = getattr(s, name)[:, at : at + n]
            noise = np.full((x.shape[0], n - x.shape[1], x.shape[2]), 3.0, np.float32)
            parts.append(np.concatenate([x, noise], axis=1))
        return backend.from_numpy(np.stack(parts))

    cache.update(rows("keys"), rows("values"))
    out = cache.attend(rows("queries"), scale=SCALE)
    assert out.shape == (len(sequences), sequences[0].n_kv_heads * sequences[0].group, n, sequences[0].dim)
    return backend.to_numpy(xp.astype(out, xp.float32))


def prefill(cache: LayerCache, sequences: Sequence[Sequence_], lengths: Sequence[int], chunk: int) -> None:
    """Prefill ``lengths[i] - 1`` tokens of each sequence in chunks, padded on the right, as mlx-lm does."""
    lengths = [n - 1 for n in lengths]
    if not cache.batch:
        cache.start(len(sequences))
    if len(set(lengths)) > 1:
        cache.remaining = np.array(lengths, np.int64)
    for at in range(0, max(lengths), chunk):
        feed(cache, sequences, [at] * len(sequences), min(chunk, max(lengths) - at))
        cache.settle(chunk_end=True)
    cache.remaining = None


def expected(cache: LayerCache, sequence: Sequence_, b: int, position: int) -> np.ndarray:
    """Return in float64 the attention ``[Hq, D]`` of the token at ``position`` over the rows that lane b holds now."""
    out = []
    lanes = cache.positions()[b]
    for h, rows in enumerate(lanes):
        keys, values = held_rows(cache, sequence, b, h, rows)
        q = sequence.queries[h * sequence.group : (h + 1) * sequence.group, position][None, :, None]
        o, _ = reference.attention(q, keys[None, None], values[None, None], scale=SCALE)
        out.append(o[0, :, 0])
    return np.concatenate(out)


def held_rows(
    cache: LayerCache, sequence: Sequence_, b: int, h: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys and values ``[T, D]`` that the lane must hold: exact, or a round trip through the codec."""
    store = cache.store
    keys = sequence.keys[h, rows].astype(np.float64)
    values = sequence.values[h, rows].astype(np.float64)
    n = int(store.length[b, h])
    if n:
        body = slice(store.sinks, store.sinks + n)
        assert store.codecs is not None
        for codec, x in zip(store.codecs, (keys, values), strict=True):
            given = cache.backend.from_numpy(x[body].astype(np.float32))
            planes = codec.encode(cache.backend, given)
            back = codec.unrotate(cache.backend, codec.decode(cache.backend, planes, x.shape[1]))
            x[body] = cache.backend.to_numpy(back)
    return keys, values
