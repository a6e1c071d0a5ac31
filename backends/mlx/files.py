"""Cache files of mlx-lm models: kvmlx's own, of any backend, and for reading those of mlx-lm's own saver too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from kvmlx import files
from kvmlx.backends import files as common
from kvmlx.backends.mlx import choose
from kvmlx.backends.mlx.adapter import KVMLXCache, install, make_prompt_cache
from kvmlx.session import LayerCache
from kvmlx.types import CacheFileError

_STOCK: dict[str, Any] = {
    name: cls
    for name, cls in vars(stock).items()
    if isinstance(cls, type) and issubclass(cls, stock._BaseCache) and cls is not stock._BaseCache
}


class _MLXLM:
    """mlx-lm's caches, as file code sees them."""

    name = "mlx"

    def backend(self, entry: str) -> Any:
        return choose.backend()

    def is_array(self, x: Any) -> bool:
        return isinstance(x, mx.array)

    def to_stored(self, arrays: Mapping[str, mx.array]) -> dict[str, files.Stored]:
        mx.eval(list(arrays.values()))
        return {key: _to_stored(array) for key, array in arrays.items()}

    def from_stored(self, stored: files.Stored, name: str) -> mx.array:
        dtype, shape, data = stored
        plain = np.ndarray(shape, "uint16" if dtype == "bfloat16" else dtype, buffer=data)
        array = mx.array(plain, dtype=mx.float64) if dtype == "float64" else mx.array(plain)
        return array.view(mx.bfloat16) if dtype == "bfloat16" else array

    def layer_of(self, cache: Any) -> LayerCache | None:
        return cache.layer if type(cache) is KVMLXCache else None

    def numbers_of(self, cache: Any) -> dict[str, Any]:
        return {"batched": cache.batched}

    def compressed(self, layer: LayerCache, numbers: Mapping[str, Any]) -> KVMLXCache:
        return KVMLXCache(layer, batched=bool(numbers["batched"]))

    def parts_of(self, cache: Any) -> Sequence[Any] | None:
        return cache.caches if type(cache) is stock.CacheList else None

    def several(self, parts: Sequence[Any]) -> Any:
        return stock.CacheList(*parts)

    def state_of(self, cache: Any) -> Any:
        kind = type(cache).__name__
        if _STOCK.get(kind) is not type(cache):
            raise CacheFileError(f"{kind} is neither a cache of kvmlx nor one of mlx-lm")
        return cache.state

    def tokens_of(self, cache: Any) -> int:
        return cache.offset

    def stock(self, kind: str, state: Any) -> Any:
        if kind in _STOCK:
            return _STOCK[kind].from_state(state)
        if kind == "DynamicLayer":
            return _from_dynamic(*state)
        if kind == "DynamicSlidingWindowLayer":
            return _from_sliding(*state)
        raise CacheFileError(
            f"it has a cache of class {kind!r:.80}, this mlx-lm knows {', '.join(_STOCK)}, and of those of "
            "transformers DynamicLayer and DynamicSlidingWindowLayer can be converted"
        )


MLXLM = _MLXLM()


def _to_stored(array: mx.array) -> files.Stored:
    dtype = str(array.dtype).rpartition(".")[2]
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    held = np.ascontiguousarray(np.array(plain, copy=False))
    return files.Stored(dtype, tuple(array.shape), held.reshape(-1).view(np.uint8))


def _from_dynamic(keys: mx.array | None, values: mx.array | None) -> Any:
    """Return transformers' DynamicLayer, whose rows ``[1, H, T, D]`` are all the tokens seen."""
    if keys is None or values is None:
        return stock.KVCache()
    tokens = common.check_rows(keys, values, foreign=True)
    return stock.KVCache.from_state((keys, values, tokens))


def _from_sliding(keys: mx.array | None, values: mx.array | None, seen: int, window: int) -> Any:
    """Return transformers' sliding layer, whose rows ``[1, H, T, D]`` are the newest ``window - 1`` tokens at most."""
    if keys is None or values is None:
        return stock.RotatingKVCache(max_size=window)
    held = common.check_rows(keys, values, seen=seen, window=window, foreign=True)
    if seen >= window:
        # A ring that is full has one row more than the next token sees: the oldest, overwritten before it is read.
        keys, values = (mx.concatenate([x[:, :, :1], x], axis=2) for x in (keys, values))
        held = window
    return stock.RotatingKVCache.from_state((keys, values, seen, 0, window, held))


def save_prompt_cache(
    path: str | os.PathLike[str], caches: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the caches of one model, compressed and stock layers alike; the file replaces ``path`` at once.

    As with mlx-lm's own saver, generation goes on from the caches afterwards as it does from the file.

    Raises:
        CacheFileError: a cache cannot be saved, or the file cannot be written; a file that was there stays.
    """
    common.save(MLXLM, path, caches, metadata)


def load_prompt_cache(path: str | os.PathLike[str], *, model: Any = None, return_metadata: bool = False) -> Any:
    """Read the caches of one model; a file of mlx-lm's own saver gives mlx-lm's own caches.

    Args:
        path: a file of kvmlx's ``save_prompt_cache``, of any backend, or of mlx-lm's.
        model: refuse the file unless it was made with a model of this type and these shapes.
        return_metadata: return ``(caches, metadata)``.

    Raises:
        CacheFileError: the file is missing, truncated, damaged, foreign, newer, or of another model.
        UnsupportedModelError: the model cannot be served with the file's strategy.
    """
    loaded = common.load(MLXLM, path)
    if model is not None:
        common.check_model(MLXLM, path, loaded, make_prompt_cache(model, "full"))
        if loaded.session is not None:
            make_prompt_cache(model, loaded.session.strategy)  # refuses what cannot work together
    install()
    return (loaded.caches, loaded.metadata) if return_metadata else loaded.caches
