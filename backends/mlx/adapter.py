"""The adapter to mlx-lm: a prompt cache that its models, generators, server and files take for one of their own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models import cache as stock

from kvmlx.backends.mlx import choose
from kvmlx.backends.mlx.models import describe, refusal
from kvmlx.backends.rows import RefusingRows
from kvmlx.session import LayerCache, Report, Session, check_layers
from kvmlx.session import report as session_report
from kvmlx.stages.base import Stage
from kvmlx.state import from_state, to_state
from kvmlx.strategy import Strategy
from kvmlx.types import UnsupportedModelError

_STOCK_ATTENTION = base.scaled_dot_product_attention


class CompressedRows(RefusingRows):
    """Stands for keys or values that only kvmlx can read; mlx-lm hands it on to attention untouched.

    Anything else done with it is an error, so that a model that computes with its cache cannot go wrong silently.
    """

    __slots__ = ("cache",)

    def __init__(self, cache: KVMLXCache) -> None:
        self.cache = cache

    @property
    def session(self) -> Session:
        return self.cache.layer.session

    @property
    def dtype(self) -> mx.Dtype:
        return self.cache.layer.store.keys.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (B, H, T, D) of the keys as if every token seen were held: models read a position off it."""
        b, h, dim, _ = self.cache.layer.store.shape
        seen = self.cache.layer.offsets
        if (seen != seen[0]).any() or self.cache.layer.padding.any():
            self._refuse(".shape, in a batch of unequal lengths")
        return b, h, int(seen[0]), dim

    def astype(self, dtype: mx.Dtype) -> CompressedRows:
        """Return the same rows: attention reads them in the precision of the queries."""
        return self


class _Forward(threading.local):
    """What the caches of a model note for each other during one forward."""

    causal: mx.array | None = None
    """The last causal mask that one of them made as an array: it says nothing that attention does not know."""
    windowed: tuple[mx.array, int] | None = None
    """The last sliding-window mask that one of them made, and its window."""


_FORWARD = _Forward()


class KVMLXCache:
    """One layer's compressed cache, as mlx-lm's models and generators want it.

    Not a subclass of mlx-lm's caches: their `merge` and `to_quantized` would swap in plain ones.
    """

    def __init__(self, layer: LayerCache, *, batched: bool = False) -> None:
        self.layer = layer
        self.batched = batched
        self.attended = False
        """Whether the newest tokens' own layer has attended: further layers may share its rows."""

    # -- what models call -----------------------------------------------------------------------------------------

    @property
    def offset(self) -> Any:
        """Return the position of the next token: an int, or ``[B]`` for a batch."""
        if self.batched:
            return mx.array(self.layer.offsets.astype(np.int32))
        return int(self.layer.offsets[0]) if self.layer.batch else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.layer.update(keys, values)
        self.attended = False
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        if self.layer.strategy.identity:
            return self.layer.store.tail()[:2]
        rows = CompressedRows(self)
        return rows, rows

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return the mask for N new tokens: None, "causal", or an array where the model insists on one."""
        self.layer.settle()
        _FORWARD.causal = _FORWARD.windowed = None
        store = self.layer.store
        held = 0 if store.empty else int(store.lengths.max())
        if window_size is not None:
            mask = base.create_causal_mask(N, held, window_size=window_size)
            _FORWARD.windowed = mask, window_size
            return mask
        padded = self.batched and self.layer.strategy.identity
        if padded and not store.empty:
            first = store.first
            left = mx.array((store.begin[:, 0] - first).astype(np.int32))
            return base.create_causal_mask(N, store.end - first, left_padding=left)
        if return_array and (N > 1 or not self.batched):
            _FORWARD.causal = base.create_causal_mask(N, held)
            return _FORWARD.causal
        return None if N == 1 else "causal"

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        own = mask is None or isinstance(mask, str) or mask is _FORWARD.causal
        mask = None if own else mask
        made = _FORWARD.windowed
        window = made[1] if mask is not None and made is not None and mask is made[0] else None
        if not self.attended:
            self.attended = True
            return self.layer.attend(queries, scale=scale, sinks=sinks, mask=mask, window=window)
        # A further layer that shares these rows; the observations are those of the rows' own layer.
        if mask is not None:
            self.layer._check_mask(mask)
        return self.layer.backend.attend(self.layer.store, queries, scale=scale, sinks=sinks, mask=mask, window=window)

    # -- what generators call -------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """Return everything that is held, as mlx-lm saves and evaluates it.

        mlx-lm reads it after each chunk of a prompt and when it saves; so what is due is done first.
        """
        self.layer.settle(chunk_end=True)
        return to_state(self.layer, batched=self.batched)

    @state.setter
    def state(self, value: Any) -> None:
        self.layer, self.batched = from_state(choose.backend(), value)
        self.attended = False

    @classmethod
    def from_state(cls, state: Any) -> KVMLXCache:
        out = cls.__new__(cls)
        out.state = state
        return out

    def size(self) -> int:
        return int(self.layer.offsets.max()) if self.layer.batch else 0

    def empty(self) -> bool:
        return self.layer.empty

    @property
    def nbytes(self) -> int:
        return self.layer.nbytes

    def is_trimmable(self) -> bool:
        return self.layer.trimmable

    def trim(self, n: int) -> int:
        if not self.is_trimmable():
            raise UnsupportedModelError(
                f"{self.layer.strategy} selects or encodes at the prompt's end: it cannot take {n} tokens back"
            )
        return self.layer.trim(n)

    # -- what batches call ----------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, caches: Sequence[KVMLXCache]) -> KVMLXCache:
        first = caches[0]
        for cache in caches:
            cache.layer._ensure_batch()
        return cls(first.layer.take([(c.layer, 0) for c in caches]), batched=True)

    def extract(self, idx: int) -> KVMLXCache:
        return KVMLXCache(self.layer.take([(self.layer, idx)]))

    def filter(self, batch_indices: Any) -> None:
        keep = np.array(batch_indices).ravel()
        self.layer = self.layer.take([(self.layer, int(b)) for b in keep])

    def extend(self, other: KVMLXCache) -> None:
        mine = [(self.layer, b) for b in range(self.layer.batch)]
        self.layer = self.layer.take(mine + [(other.layer, b) for b in range(other.layer.batch)])

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        if left_padding is not None and max(left_padding) > 0:
            raise UnsupportedModelError("kvmlx pads batches on the right, as mlx-lm's own batch generator does")
        if lengths is not None and right_padding is not None and max(right_padding) > 0:
            self.layer.settle(chunk_end=True)
            self.layer.remaining = np.array([int(n) for n in lengths], np.int64)

    def finalize(self) -> None:
        self.layer.settle(chunk_end=True)
        self.layer.remaining = None


def attention(queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None) -> mx.array:
    """Attend over a compressed cache; everything else goes to mlx-lm's own function."""
    if type(keys) is CompressedRows:
        return keys.cache.attend(queries, scale, mask, sinks)
    return _STOCK_ATTENTION(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def install() -> None:
    """Let mlx-lm's attention and its cache files know kvmlx's caches. Idempotent; stock caches run as before."""
    stock.KVMLXCache = KVMLXCache  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.") and getattr(module, "scaled_dot_product_attention", None) is _STOCK_ATTENTION:
            module.scaled_dot_product_attention = attention  # type: ignore[attr-defined]


def make_prompt_cache(model: Any, strategy: str | Stage | Strategy, *, inspect: bool = False) -> list[Any]:
    """Return a prompt cache for an mlx-lm ``model``: compressed where the model attends fully, stock elsewhere.

    Args:
        model: as `mlx_lm.load` returns it.
        strategy: text such as ``"snapkv(budget=0.25) | int4"``, a stage, or a Strategy.
        inspect: keep every row's position too (`LayerCache.positions`), 4 bytes a row.

    Raises:
        StrategyError: the strategy is not one, or does not fit the model's head dim.
        UnsupportedModelError: no layer of the model can be served; the message says why.
        KVMLXError: $KVMLX_KERNELS asks for Metal kernels on a machine without Metal.
    """
    strategy = Strategy.of(strategy)
    backend = choose.backend()
    install()
    original = getattr(model, "_kvmlx_make_cache" if _wrapped(model) else "make_cache", None)
    entries = original() if original else [stock.KVCache() for _ in model.layers]
    reason = refusal(model)
    if reason and not strategy.identity:
        raise UnsupportedModelError(
            f"{model_type(model)} cannot be served with {str(strategy)!r}: {reason}; 'full' works"
        )
    slots = [slot for i, entry in enumerate(entries) if (slot := _slot(entries, i))]
    if not slots:
        kinds = sorted({_kind(e) for e in entries})
        raise UnsupportedModelError(
            f"{model_type(model)} has no full-attention layer with a plain KV cache (it has {', '.join(kinds)}): "
            "there is nothing that kvmlx could compress"
        )
    managed = [i for i, _, _ in slots]
    unmanaged = tuple(
        f"layer {i}: {_kind(part)}"
        for i, entry in enumerate(entries)
        for part in (getattr(entry, "caches", [entry]) if i in managed else [entry])
        if i not in managed or type(part) is not stock.KVCache
    )
    info = describe(model, managed, len(entries))
    check_layers(strategy, info, managed)
    session = Session(strategy, info, len(managed), unmanaged, inspect)
    for number, (_, owner, at) in enumerate(slots):
        owner[at] = KVMLXCache(LayerCache(backend, session, number))
    return entries


def _slot(entries: list[Any], i: int) -> tuple[int, list[Any], int] | None:
    """Return (layer, list, place in it) of the plain KV cache of a layer, or None where it has none.

    A layer of attention beside a state-space model or a convolution lists one cache for each. Two KV caches mean
    that one holds an index over the other.
    """
    entry = entries[i]
    if type(entry) is stock.KVCache:
        return i, entries, i
    if type(entry) is stock.CacheList:
        entry.caches = list(entry.caches)
        plain = [j for j, part in enumerate(entry.caches) if type(part) is stock.KVCache]
        if len(plain) == 1:
            return i, entry.caches, plain[0]
    return None


def _kind(entry: Any) -> str:
    parts = f"({', '.join(_kind(part) for part in entry.caches)})" if type(entry) is stock.CacheList else ""
    return type(entry).__name__ + parts


def wrap_model(model: Any, strategy: str | Stage | Strategy) -> Any:
    """Give the model instance a compressed ``make_cache``, so that every mlx-lm generator and server uses it.

    Returns the same model. `unwrap_model` undoes it. The strategy is checked at once, not at the first use.
    """
    strategy = Strategy.of(strategy)
    make_prompt_cache(model, strategy)
    unwrap_model(model)
    object.__setattr__(model, "_kvmlx_make_cache", getattr(model, "make_cache", None))
    object.__setattr__(model, "make_cache", lambda: make_prompt_cache(model, strategy))
    return model


def unwrap_model(model: Any) -> Any:
    """Give the model its own ``make_cache`` back."""
    if not _wrapped(model):
        return model
    original = model.__dict__["_kvmlx_make_cache"]
    for name in ("make_cache", "_kvmlx_make_cache"):
        object.__delattr__(model, name)
    if getattr(model, "make_cache", None) != original:  # not the class's method, but one of the instance's own
        object.__setattr__(model, "make_cache", original)
    return model


def _wrapped(model: Any) -> bool:
    return "_kvmlx_make_cache" in getattr(model, "__dict__", {})


def model_type(model: Any) -> str:
    """Return the name by which mlx-lm knows the model."""
    return getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]


def layers_of(caches: Sequence[Any]) -> list[LayerCache]:
    """Return the compressed layers among a model's caches."""
    return [c.layer for c in _flat(caches) if isinstance(c, KVMLXCache)]


def _flat(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        if type(cache) is stock.CacheList:
            yield from _flat(cache.caches)
        else:
            yield cache


def report(caches: Sequence[Any]) -> Report:
    """Return what the caches of one model hold."""
    rest = sum(c.nbytes for c in _flat(caches) if not isinstance(c, KVMLXCache))
    return session_report(layers_of(caches), unmanaged_nbytes=rest)


def settle(caches: Sequence[Any]) -> None:
    """Say that the prompt is complete, and do what the strategy does then."""
    for layer in layers_of(caches):
        layer.settle(prompt_end=True)
    mx.eval([list(layer.arrays().values()) for layer in layers_of(caches)])


__all__ = [
    "CompressedRows",
    "KVMLXCache",
    "attention",
    "install",
    "layers_of",
    "make_prompt_cache",
    "report",
    "settle",
    "unwrap_model",
    "wrap_model",
]
