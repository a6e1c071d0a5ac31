"""Cache files of transformers models: kvmlx's own, of any backend, and for reading those of mlx-lm's own saver too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from kvmlx import files
from kvmlx.backends import files as common
from kvmlx.backends.torch import choose
from kvmlx.backends.torch.adapter import KVMLXCache, KVMLXLayer, make_prompt_cache
from kvmlx.backends.torch.hybrid import HYBRIDS, joined, parted
from kvmlx.session import LayerCache
from kvmlx.types import CacheFileError

_EMPTY: Any = getattr(cache_utils, "DummyLayer", ())
"""Layers without a cache of their own: files do not have them, as mlx-lm's lists of caches do not (since 5.2x)."""
_SAVED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer)
_LIBRARY = cache_utils.__name__
_MANAGED = {DynamicLayer: KVMLXLayer, HYBRIDS[DynamicLayer]: HYBRIDS[KVMLXLayer]}
"""What kvmlx makes in the place of the library's own."""


class _Transformers:
    """transformers' caches, as file code sees them: the entries are the layers of one Cache.

    Args:
        devices: where the model's layers are, in order; the last one is that of all further entries.
    """

    name = "torch"

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices

    def _device(self, name: str) -> torch.device:
        index = name.partition(".")[0]
        number = int(index) if index.isascii() and index.isdigit() and len(index) < 9 else 0
        return self.devices[min(number, len(self.devices) - 1)]

    def backend(self, entry: str) -> Any:
        return choose.backend(self._device(entry))

    def is_array(self, x: Any) -> bool:
        return isinstance(x, Tensor)

    def to_stored(self, arrays: Mapping[str, Tensor]) -> dict[str, files.Stored]:
        return {key: _to_stored(array) for key, array in arrays.items()}

    def from_stored(self, stored: files.Stored, name: str) -> Tensor:
        out = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        if out.numel():
            # Copied: the tensor must own memory that can be written to, and is aligned.
            out.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(stored.data, np.uint8)
        return out.to(self._device(name))

    def layer_of(self, cache: Any) -> LayerCache | None:
        return cache.layer if type(cache) is KVMLXLayer else None

    def numbers_of(self, cache: KVMLXLayer) -> dict[str, Any]:
        return {"batched": cache.layer.batch > 1, "columns": cache.columns, "padded_until": cache.padded_until}

    def compressed(self, layer: LayerCache, numbers: Mapping[str, Any]) -> KVMLXLayer:
        out = KVMLXLayer(layer)
        if "columns" in numbers:
            columns, padded = numbers["columns"], numbers["padded_until"]
            if not (type(columns) is type(padded) is int and out.columns <= columns < 2**31 and 0 <= padded <= columns):
                raise CacheFileError(
                    f"layer {layer.layer} has seen {columns!r:.20} columns, {padded!r:.20} with padding"
                )
            if not padded and (layer.offsets != columns).any():
                raise CacheFileError(f"layer {layer.layer} has fewer tokens than columns, but no padding")
            out.columns, out.padded_until = columns, padded
        return out

    def parts_of(self, cache: Any) -> Sequence[Any] | None:
        return parted(cache)

    def several(self, parts: Sequence[Any]) -> Any:
        kinds = [type(part) for part in parts]
        if len(kinds) != 2 or kinds[0] is not LinearAttentionLayer or kinds[1] not in HYBRIDS:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise CacheFileError(
                f"it has a layer with several caches ({names}): transformers' have a LinearAttentionLayer and one of "
                + ", ".join(kind.__name__ for kind in HYBRIDS)
            )
        states, rows = parts
        batches = {x.shape[0] for side in _states_of(states) for x in side if x is not None}
        held = rows.layer.batch if kinds[1] is KVMLXLayer else 0 if rows.keys is None else rows.keys.shape[0]
        if len(batches | {held} - {0}) > 1:
            raise CacheFileError(f"it has states of {sorted(batches)} sequences beside rows of {held} in one layer")
        return joined(states, rows)

    def state_of(self, cache: Any) -> Any:
        if type(cache) is DynamicLayer:
            return [cache.keys, cache.values]
        if type(cache) is DynamicSlidingWindowLayer:
            newest = slice(1 - cache.sliding_window, None)  # more of them while tokens may be taken back
            rows = [None if x is None else x[:, :, newest] for x in (cache.keys, cache.values)]
            return [*rows, cache.cumulative_length, cache.sliding_window]
        if type(cache) is LinearAttentionLayer:
            return _states_of(cache)
        known = ", ".join(cls.__name__ for cls in (*_SAVED, *HYBRIDS.values()) if cls.__module__ == _LIBRARY)
        raise CacheFileError(
            f"{type(cache).__name__} is neither a layer of kvmlx nor one of transformers' that can be saved: {known}"
        )

    def tokens_of(self, cache: Any) -> int:
        return cache.get_seq_length()

    def stock(self, kind: str, state: Any) -> Any:
        if kind == "DynamicLayer":
            return _dynamic(*state)
        if kind == "DynamicSlidingWindowLayer":
            return _sliding(*state)
        if kind == "LinearAttentionLayer":
            return _linear(*state)
        if kind == "KVCache":
            return _from_kv(*state)
        if kind == "RotatingKVCache":
            return _from_rotating(*state)
        known = ", ".join(cls.__name__ for cls in _SAVED)
        raise CacheFileError(
            f"it has a cache of class {kind!r:.80}: of transformers' own {known} can be loaded, and of those of mlx-lm "
            "KVCache and RotatingKVCache can be converted"
        )


def _to_stored(array: Tensor) -> files.Stored:
    held = array.detach().cpu().contiguous()
    data = held.reshape(-1).view(torch.uint8).numpy() if held.numel() else b""
    return files.Stored(str(array.dtype).removeprefix("torch."), tuple(array.shape), data)


# -- transformers' own layers ---------------------------------------------------------------------------------


def _filled(layer: Any, keys: Tensor, values: Tensor) -> Any:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _dynamic(keys: Tensor | None, values: Tensor | None) -> Any:
    if keys is None or values is None:
        return DynamicLayer()
    common.check_rows(keys, values)
    return _filled(DynamicLayer(), keys, values)


def _sliding(keys: Tensor | None, values: Tensor | None, seen: int, window: int) -> Any:
    if type(window) is not int or not 1 < window < 2**31:
        raise CacheFileError(f"it has a sliding window of {window!r:.20} tokens")
    layer = DynamicSlidingWindowLayer(window)
    if keys is None or values is None:
        return layer
    common.check_rows(keys, values, seen=seen, window=window)
    _filled(layer, keys, values).cumulative_length = seen
    return layer


def _states_of(layer: LinearAttentionLayer) -> list[list[Tensor | None]]:
    """Return the states of convolutions and of recurrences; a layer of an older version has one of each."""

    def numbered(x: Any) -> dict[int, Any]:
        return x if isinstance(x, dict) else {0: x}

    convolutions, begun = dict(numbered(layer.conv_states)), numbered(layer.has_previous_state)
    recurrences = dict(numbered(layer.recurrent_states))
    for i, x in convolutions.items():
        if x is None:
            continue
        if not begun[i]:  # reset: zeros that no token has reached
            convolutions[i] = recurrences[i] = None
        elif getattr(layer, "record_past", False):  # longer or shorter than it needs while tokens may be taken back
            convolutions[i] = functional.pad(x, (layer.conv_kernel_size[i] - x.shape[-1], 0))
    return [list(convolutions.values()), list(recurrences.values())]


def _linear(convolutions: list[Tensor | None], recurrences: list[Tensor | None]) -> Any:
    if not 0 < len(convolutions) == len(recurrences):
        raise CacheFileError(f"it has {len(convolutions)} and {len(recurrences)} states in a layer of linear attention")
    one = len(convolutions) == 1  # older versions know no number of states
    layer = LinearAttentionLayer() if one else LinearAttentionLayer(number_of_states=len(convolutions))
    for i, (convolution, recurrence) in enumerate(zip(convolutions, recurrences, strict=True)):
        if convolution is not None:
            layer.update_conv_state(convolution, state_idx=i)
        if recurrence is not None:
            layer.update_recurrent_state(recurrence, state_idx=i)
    return layer


# -- mlx-lm's caches ------------------------------------------------------------------------------------------


def _from_kv(keys: Tensor | None, values: Tensor | None, seen: int) -> Any:
    """Return mlx-lm's KVCache: rows ``[1, H, T, D]`` with head-room behind them."""
    if keys is None or values is None:
        return DynamicLayer()
    held = common.check_rows(keys, values, foreign=True)
    if type(seen) is not int or not 0 <= seen <= held:
        raise CacheFileError(f"it holds {held} rows of {seen!r:.20} tokens")
    return _filled(DynamicLayer(), keys[:, :, :seen].clone(), values[:, :, :seen].clone())


def _from_rotating(keys: Tensor | None, values: Tensor | None, seen: int, keep: int, window: int, at: int) -> Any:
    """Return mlx-lm's RotatingKVCache: a ring of rows ``[1, H, T, D]`` whose next row is written at ``at``.

    The newest ``window - 1`` of them are what the next token sees beside itself; the ring's oldest has no reader.
    """
    if keep != 0:
        raise CacheFileError(
            f"it has a RotatingKVCache that keeps the first {keep!r:.20} tokens: no layer of transformers does; "
            "in mlx-lm it goes on"
        )
    if keys is None or values is None:
        return _sliding(None, None, 0, window)
    held = common.check_rows(keys, values, foreign=True)
    if not (type(seen) is type(window) is type(at) is int and 0 <= at <= held and 0 <= seen < 2**31 and window > 1):
        raise CacheFileError(f"it has a ring of {held} rows at {at!r:.20}, of {seen!r:.20} tokens")
    n = min(seen, window - 1)
    wrapped = at < held and at < seen
    rows = [torch.cat([x[:, :, at:], x[:, :, :at]], dim=2) if wrapped else x[:, :, :at] for x in (keys, values)]
    newest = [x[:, :, x.shape[2] - n :].clone() if n <= x.shape[2] else x for x in rows]
    return _sliding(newest[0], newest[1], seen, window)


# -- the functions --------------------------------------------------------------------------------------------


def save_prompt_cache(path: str | os.PathLike[str], cache: Cache, metadata: Mapping[str, str] | None = None) -> None:
    """Write a model's cache, compressed and stock layers alike; the file replaces ``path`` at once.

    Generation goes on from the cache afterwards as it does from the file.

    Raises:
        CacheFileError: a layer cannot be saved, or the file cannot be written; a file that was there stays.
    """
    with torch.inference_mode(False), torch.no_grad():
        common.save(_Transformers([torch.device("cpu")]), path, _entries(cache.layers), metadata)


def load_prompt_cache(path: str | os.PathLike[str], *, model: Any = None, return_metadata: bool = False) -> Any:
    """Read the cache of one model; a file without compressed layers gives a cache of transformers' own.

    Args:
        path: a file of kvmlx's ``save_prompt_cache``, of any backend, or of mlx-lm's.
        model: refuse the file unless it was made with a model of this type and these shapes; the cache lies where
            the model does, and the model attends through kvmlx from now on (`make_prompt_cache`). Without it the
            cache lies on the machine's best device.
        return_metadata: return ``(cache, metadata)``.

    Raises:
        CacheFileError: the file is missing, truncated, damaged, foreign, newer, or of another model.
        UnsupportedModelError: the model cannot be served with the file's strategy.
    """
    with torch.inference_mode(False), torch.no_grad():
        if model is None:
            loaded = common.load(_Transformers([choose.backend().device]), path)
            layers = loaded.caches
        else:
            expected = make_prompt_cache(model, "full")
            adapter = _Transformers([_device_of(layer, model) for layer in _entries(expected.layers)])
            loaded = common.load(adapter, path)
            common.check_model(adapter, path, loaded, _entries(expected.layers))
            if loaded.session is not None:
                expected = make_prompt_cache(model, loaded.session.strategy)
            layers = _placed(os.fspath(path), loaded.caches, expected)
    cache = _cache(os.fspath(path), layers)
    return (cache, loaded.metadata) if return_metadata else cache


def _entries(layers: Sequence[Any]) -> list[Any]:
    """Return the layers that have a cache."""
    return [layer for layer in layers if not isinstance(layer, _EMPTY)]


def _device_of(layer: Any, model: Any) -> torch.device:
    return layer.layer.backend.device if isinstance(layer, KVMLXLayer) else model.device


def _placed(name: str, loaded: Sequence[Any], expected: Cache) -> list[Any]:
    """Return the layers of a model's cache, with those that were loaded in their places."""
    left, layers = list(loaded), []
    for fresh in expected.layers:
        layer: Any = fresh if isinstance(fresh, _EMPTY) else left.pop(0)
        theirs, ours = ((type(x).__name__, getattr(x, "sliding_window", None)) for x in (layer, fresh))
        # A full cache of the library's own may stand where kvmlx would manage one.
        full = _MANAGED.get(type(layer)) is type(fresh)
        if theirs != ours and not full:
            was, has = (kind + (f" of {window} tokens" if window else "") for kind, window in (theirs, ours))
            raise CacheFileError(
                f"{name} was made with another model: it has a {was} where the model given has a {has}"
            )
        if isinstance(layer, KVMLXLayer) and isinstance(fresh, KVMLXLayer):
            layer.early = fresh.early
        layers.append(layer)
    return layers


def _cache(name: str, layers: list[Any]) -> Cache:
    managed = [layer for layer in layers if isinstance(layer, KVMLXLayer)]
    if len({(layer.columns, layer.padded_until) for layer in managed}) > 1:
        raise CacheFileError(f"{name} cannot be loaded: its layers have seen different numbers of columns")
    if managed:
        return KVMLXCache(layers)
    cache = DynamicCache()
    cache.layers = layers
    return cache
