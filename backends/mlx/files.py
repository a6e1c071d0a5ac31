"""Cache files of mlx-lm models: kvmlx's own, and those of mlx-lm's ``save_prompt_cache`` for reading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from kvmlx import files
from kvmlx.backends.mlx import choose
from kvmlx.backends.mlx.adapter import KVMLXCache, install, layers_of, make_prompt_cache
from kvmlx.session import Session
from kvmlx.state import layer_from_json, layer_to_json, session_from_json, session_to_json
from kvmlx.types import CacheFileError, KVMLXError, LayerInfo, ModelInfo

Arrays = dict[str, mx.array]

_STOCK: dict[str, Any] = {
    name: cls
    for name, cls in vars(stock).items()
    if isinstance(cls, type) and issubclass(cls, stock._BaseCache) and cls is not stock._BaseCache
}
_USER = "user."


def save_prompt_cache(
    path: str | os.PathLike[str], caches: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the caches of one model, compressed and stock layers alike; the file replaces ``path`` at once.

    As with mlx-lm's own saver, generation goes on from the caches afterwards as it does from the file.

    Raises:
        CacheFileError: a cache cannot be saved, or the file cannot be written; a file that was there stays.
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be text by text, got {key!r}: {value!r}")
    name = os.fspath(path)
    layers = layers_of(caches)
    for layer in layers:
        layer.settle(chunk_end=True)
    arrays: Arrays = {}
    entries = [_to_entry(name, str(i), cache, arrays) for i, cache in enumerate(caches)]
    header = {"backend": "mlx"}
    if layers:
        model = session_to_json(_one_session(name, [layer.session for layer in layers]))
        header |= {"strategy": model.pop("strategy"), "model": _dumps(model)}
    header |= {"caches": _dumps(entries)} | {_USER + key: value for key, value in (metadata or {}).items()}
    mx.eval(list(arrays.values()))
    files.write(path, {key: _to_stored(array) for key, array in arrays.items()}, header)


def load_prompt_cache(path: str | os.PathLike[str], *, model: Any = None, return_metadata: bool = False) -> Any:
    """Read the caches of one model; a file of mlx-lm's own saver gives mlx-lm's own caches.

    Args:
        path: a file of kvmlx's or mlx-lm's ``save_prompt_cache``.
        model: refuse the file unless it was made with a model of this type and these shapes.
        return_metadata: return ``(caches, metadata)``.

    Raises:
        CacheFileError: the file is missing, truncated, damaged, foreign, newer, or of another model.
    """
    name = os.fspath(path)
    contents = files.read(path, stock=True)
    with _consistent(name):
        arrays = _take_arrays(contents.arrays)
        load = _load_own if contents.is_kvmlx else _load_stock
        caches, metadata = load(contents.header, arrays)
    if model is not None:
        _check_model(name, caches, model)
    install()
    return (caches, metadata) if return_metadata else caches


@contextmanager
def _consistent(name: str) -> Iterator[None]:
    """Whatever does not fit together in a file is an error that names the file."""
    try:
        yield
    except KVMLXError as error:
        raise CacheFileError(f"{name} cannot be loaded: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CacheFileError(f"{name} cannot be loaded: its contents do not fit together ({error!r:.200})") from error


def _dumps(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


# -- saving -------------------------------------------------------------------------------------------------


def _one_session(name: str, sessions: Sequence[Session]) -> Session:
    first = sessions[0]
    if any(s != first or s.inspect != first.inspect for s in sessions):
        raise CacheFileError(f"{name} cannot be written: the caches come from different models or strategies")
    return first


def _to_entry(name: str, prefix: str, cache: Any, arrays: Arrays) -> dict[str, Any]:
    """Return a cache as JSON data; its arrays join ``arrays`` under names that begin with ``prefix``."""
    if type(cache) is KVMLXCache:
        arrays |= {f"{prefix}.{key}": array for key, array in cache.layer.arrays().items()}
        return {"class": "KVMLXCache", "batched": cache.batched, "cache": layer_to_json(cache.layer)}
    kind = type(cache).__name__
    if _STOCK.get(kind) is not type(cache):
        raise CacheFileError(f"{name} cannot be written: {kind} is neither a cache of kvmlx nor one of mlx-lm")
    if type(cache) is stock.CacheList:
        parts = [_to_entry(name, f"{prefix}.{i}", c, arrays) for i, c in enumerate(cache.caches)]
        return {"class": kind, "caches": parts}
    return {"class": kind, "state": _to_json(name, prefix, cache.state, arrays)}


def _to_json(name: str, prefix: str, state: Any, arrays: Arrays) -> Any:
    """Return the state of a stock cache as JSON data, with ``{"array": name}`` for each array."""
    if isinstance(state, mx.array):
        arrays[prefix] = state
        return {"array": prefix}
    if isinstance(state, list | tuple):
        return [_to_json(name, f"{prefix}.{i}", part, arrays) for i, part in enumerate(state)]
    if state is None or isinstance(state, str | int | float):
        return state
    raise CacheFileError(f"{name} cannot be written: {type(state).__name__} in a cache's state")


def _to_stored(array: mx.array) -> files.Stored:
    dtype = str(array.dtype).rpartition(".")[2]
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    held = np.ascontiguousarray(np.array(plain, copy=False))
    return files.Stored(dtype, tuple(array.shape), held.reshape(-1).view(np.uint8))


# -- loading ------------------------------------------------------------------------------------------------


def _take_arrays(stored: dict[str, files.Stored]) -> Arrays:
    """Turn stored arrays into MLX arrays, emptying ``stored``: the bytes are never held twice for long."""
    out = {}
    for key in list(stored):
        dtype, shape, data = stored.pop(key)
        plain = np.ndarray(shape, "uint16" if dtype == "bfloat16" else dtype, buffer=data)
        array = mx.array(plain, dtype=mx.float64) if dtype == "float64" else mx.array(plain)
        out[key] = array.view(mx.bfloat16) if dtype == "bfloat16" else array
    return out


def _load_own(header: dict[str, str], arrays: Arrays) -> tuple[list[Any], dict[str, str]]:
    session = None
    if "model" in header:
        model = files.parse_json(header["model"], "its model field")
        session = session_from_json({"strategy": header["strategy"], **model})
    entries = files.parse_json(header["caches"], "its caches field")
    caches = [_from_entry(str(i), entry, arrays, session) for i, entry in enumerate(entries)]
    if arrays:
        raise CacheFileError(f"no cache owns the array {next(iter(arrays))!r:.80}")
    _check_layers(caches, session)
    return caches, {k.removeprefix(_USER): v for k, v in header.items() if k.startswith(_USER)}


def _check_layers(caches: Sequence[Any], session: Session | None) -> None:
    layers = layers_of(caches)
    if session is not None and (len(layers), len(layers)) != (session.n_managed, session.model.n_layers):
        raise CacheFileError(f"it holds {len(layers)} compressed layers, {session.n_managed} belong together")
    if any(layer.layer != number for number, layer in enumerate(layers)):
        raise CacheFileError("its layers are not in order")
    if len({layer.batch for layer in layers if layer.batch}) > 1:
        raise CacheFileError("its layers hold different numbers of sequences")


def _from_entry(prefix: str, entry: Any, arrays: Arrays, session: Session | None) -> Any:
    kind = entry["class"]
    if kind == "KVMLXCache":
        if session is None:
            raise CacheFileError("it has compressed layers, but no strategy")
        start = prefix + "."
        own = {key.removeprefix(start): arrays.pop(key) for key in list(arrays) if key.startswith(start)}
        layer = layer_from_json(choose.backend(), session, entry["cache"], own)
        if unknown := own.keys() - layer.arrays().keys():
            raise CacheFileError(f"layer {layer.layer} does not own the array {min(unknown)!r:.80}")
        return KVMLXCache(layer, batched=bool(entry["batched"]))
    if kind == "CacheList":
        parts = enumerate(entry["caches"])
        return stock.CacheList(*(_from_entry(f"{prefix}.{i}", c, arrays, session) for i, c in parts))
    return _stock_class(kind).from_state(_from_json(entry["state"], arrays))


def _stock_class(kind: Any) -> Any:
    if kind not in _STOCK:
        raise CacheFileError(f"it has a cache of class {kind!r:.80}, this mlx-lm knows {', '.join(_STOCK)}")
    return _STOCK[kind]


def _from_json(state: Any, arrays: Arrays) -> Any:
    if isinstance(state, dict):
        return arrays.pop(state["array"])
    return [_from_json(part, arrays) for part in state] if isinstance(state, list) else state


def _load_stock(header: dict[str, str], arrays: Arrays) -> tuple[list[Any], dict[str, str]]:
    """Do what mlx-lm's loader does, with its classes only, and without trusting the numbers in the keys."""
    metadata, classes, scalars, *_ = _unflatten(header)
    values: dict[str, Any] = dict(arrays)
    for key, kind in scalars[1:]:
        values[key] = _scalar(values[key], kind)
    states = _unflatten(values)
    caches = [_from_state(kind, state) for kind, state in zip(classes, states, strict=True)]
    return caches, metadata


def _scalar(array: Any, kind: str) -> Any:
    if kind == "scalar":
        return array.item()
    if kind == "string":
        return "".join(chr(code) for code in array.tolist())
    if kind == "none":
        return None
    raise CacheFileError(f"it has a scalar of the unknown kind {kind!r:.80}")


def _from_state(kind: Any, state: Any) -> Any:
    if kind == "KVMLXCache":
        return KVMLXCache.from_state(state)
    if kind == "CacheList":
        return stock.CacheList(*(_from_state(k, s) for s, k in state))
    return _stock_class(kind).from_state(state)


def _unflatten(items: Mapping[str, Any]) -> Any:
    """Undo mlx's `tree_flatten`: numbered keys make a list, with ``{}`` for the empty parts it dropped."""
    if list(items) == [""]:
        return items[""]
    children: dict[str, dict[str, Any]] = {}
    for key, value in items.items():
        first, _, rest = key.partition(".")
        children.setdefault(first, {})[rest] = value
    if not all(key.isascii() and key.isdigit() for key in children):
        return {key: _unflatten(child) for key, child in children.items()}
    numbered = {int(key): child for key, child in children.items()}
    length = max(numbered) + 1
    if length > 2 * len(children) + 8:
        raise CacheFileError(f"it numbers {len(children)} parts up to {length - 1}")
    return [_unflatten(numbered[i]) if i in numbered else {} for i in range(length)]


# -- the model ----------------------------------------------------------------------------------------------


def _check_model(name: str, caches: Sequence[Any], model: Any) -> None:
    """Raise unless the caches have the shapes of the model's; a stock file only tells how many there are."""
    expected = make_prompt_cache(model, "full")
    theirs, own = layers_of(caches), layers_of(expected)[0].session.model
    if len(caches) != len(expected):
        raise CacheFileError(
            f"{name} was made with another model: it has {len(caches)} caches, the model given "
            f"({own.model_type}) needs {len(expected)}"
        )
    if not theirs:
        return
    made_with = theirs[0].session.model
    if reason := _difference(made_with, own):
        raise CacheFileError(
            f"{name} was made with another model: {_summary(made_with)}; the model given is {_summary(own)} ({reason})"
        )
    if [isinstance(c, KVMLXCache) for c in caches] != [isinstance(c, KVMLXCache) for c in expected]:
        raise CacheFileError(f"{name} compresses other layers than kvmlx compresses in the model given")


def _summary(model: ModelInfo) -> str:
    layer = model.layers[0]
    heads = f"{layer.n_heads} query and {layer.n_kv_heads} KV heads of {layer.key_dim}"
    return f"{model.model_type}, {model.n_layers} layers of {heads}"


def _difference(a: ModelInfo, b: ModelInfo) -> str:
    """Return what differs between two models, or an empty text; numbers that are not known (0) match any."""
    if a.model_type != b.model_type:
        return "the type differs"
    if a.n_layers != b.n_layers:
        return "the number of layers differs"
    for x, y in zip(a.layers, b.layers, strict=True):
        for field in ("n_heads", "n_kv_heads", "key_dim", "value_dim"):
            if 0 not in (got := (getattr(x, field), getattr(y, field))) and got[0] != got[1]:
                return f"{field} of layer {x.index} differs"
        if not _same_rotary(x, y):
            return f"the rotary embedding of layer {x.index} differs"
    return ""


def _same_rotary(x: LayerInfo, y: LayerInfo) -> bool:
    """Compare loosely: angles are measured on the device, and devices round differently."""
    a, b = x.rotary, y.rotary
    if a is None or b is None:
        return a is b
    return (a.first, a.second) == (b.first, b.second) and bool(
        np.allclose(a.frequency, b.frequency, rtol=1e-2, atol=1e-4) and np.isclose(a.factor, b.factor, rtol=1e-3)
    )
