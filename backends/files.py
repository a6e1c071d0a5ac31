"""Cache files as every backend reads and writes them: what a file says of the caches, and whether it fits together.

What a framework must add is a small `Adapter`. A file of one backend loads in another: rows that kvmlx manages are the
same bytes everywhere, caches that the model's library made are converted by the adapter, or refused by name.
docs/format.md describes the file, `kvmlx.files` is its container.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kvmlx import files
from kvmlx.session import LayerCache, Session
from kvmlx.state import from_state, layer_from_json, layer_to_json, session_from_json, session_to_json
from kvmlx.types import Array, CacheFileError, KVMLXError, LayerInfo, ModelInfo

COMPRESSED, SEVERAL = "KVMLXCache", "CacheList"
"""Classes of entries that are the same in every file: a compressed layer, and several caches of one layer."""
_USER = "user."
_TEXT_MODEL = "_text"
"""What transformers adds to the type of the language model inside a model of several modalities."""


class Adapter(Protocol):
    """What reading and writing files needs of a backend and of the library whose models it serves."""

    @property
    def name(self) -> str | None:
        """The backend's, as files give it; None for a reader that takes every backend's caches as they are."""
        ...

    def backend(self, entry: str) -> Any:
        """Return the primitives of the cache that is loaded as this entry, such as ``"3"`` or ``"3.0"``."""
        ...

    def is_array(self, x: Any) -> bool: ...

    def to_stored(self, arrays: Mapping[str, Array]) -> dict[str, files.Stored]: ...

    def from_stored(self, stored: files.Stored, name: str) -> Array:
        """Return an array; its name begins with that of its entry, such as ``"3.tail.keys"``."""
        ...

    def layer_of(self, cache: Any) -> LayerCache | None:
        """Return the compressed layer that a cache of kvmlx is of, None for any other cache."""
        ...

    def numbers_of(self, cache: Any) -> dict[str, Any]:
        """Return what a cache of kvmlx knows beside its layer, as JSON data."""
        ...

    def compressed(self, layer: LayerCache, numbers: Mapping[str, Any]) -> Any:
        """Return a layer as a cache of kvmlx's that the library's models take."""
        ...

    def parts_of(self, cache: Any) -> Sequence[Any] | None:
        """Return the caches that one is a list of, None where it is not a list."""
        ...

    def several(self, parts: Sequence[Any]) -> Any:
        """Undo `parts_of`."""
        ...

    def state_of(self, cache: Any) -> Any:
        """Return the state of a cache of the library's own: arrays, text and numbers in lists.

        Raises:
            CacheFileError: it is not one that can be saved; the message begins with its class.
        """
        ...

    def tokens_of(self, cache: Any) -> int:
        """Return how many tokens a cache of the library's own has seen, that was converted."""
        ...

    def stock(self, kind: str, state: Any) -> Any:
        """Return a cache of the library's own from its state; ``kind`` may be that of another backend's library.

        Raises:
            CacheFileError: it is unknown, or has no counterpart in this library.
        """
        ...


# -- saving ---------------------------------------------------------------------------------------------------


def save(
    adapter: Adapter, path: str | os.PathLike[str], caches: Sequence[Any], metadata: Mapping[str, str] | None
) -> None:
    """Write the caches of one model, compressed and stock ones alike; the file replaces ``path`` at once.

    Raises:
        CacheFileError: a cache cannot be saved, or the file cannot be written; a file that was there stays.
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be text by text, got {key!r}: {value!r}")
    name = os.fspath(path)
    layers = layers_of(adapter, caches)
    for layer in layers:
        layer.settle(chunk_end=True)
    arrays: dict[str, Array] = {}
    header = {"backend": str(adapter.name)}
    try:
        entries = [_to_entry(adapter, str(i), cache, arrays) for i, cache in enumerate(caches)]
        if layers:
            model = session_to_json(_one_session([layer.session for layer in layers]))
            header |= {"strategy": model.pop("strategy"), "model": _dumps(model)}
    except CacheFileError as error:
        raise CacheFileError(f"{name} cannot be written: {error}") from error
    header |= {"caches": _dumps(entries)} | {_USER + key: value for key, value in (metadata or {}).items()}
    files.write(path, adapter.to_stored(arrays), header)


def layers_of(adapter: Adapter, caches: Sequence[Any]) -> list[LayerCache]:
    """Return the compressed layers among a model's caches, in order."""
    return [layer for cache in _flat(adapter, caches) if (layer := adapter.layer_of(cache)) is not None]


def _flat(adapter: Adapter, caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        parts = adapter.parts_of(cache)
        if parts is None:
            yield cache
        else:
            yield from _flat(adapter, parts)


def _dumps(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _one_session(sessions: Sequence[Session]) -> Session:
    first = sessions[0]
    if any(s != first or s.inspect != first.inspect for s in sessions):
        raise CacheFileError("the caches come from different models or strategies")
    return first


def _to_entry(adapter: Adapter, prefix: str, cache: Any, arrays: dict[str, Array]) -> dict[str, Any]:
    """Return a cache as JSON data; its arrays join ``arrays`` under names that begin with ``prefix``."""
    layer = adapter.layer_of(cache)
    if layer is not None:
        arrays |= {f"{prefix}.{key}": array for key, array in layer.arrays().items()}
        return {"class": COMPRESSED, **adapter.numbers_of(cache), "cache": layer_to_json(layer)}
    parts = adapter.parts_of(cache)
    if parts is not None:
        return {
            "class": SEVERAL,
            "caches": [_to_entry(adapter, f"{prefix}.{i}", c, arrays) for i, c in enumerate(parts)],
        }
    return {"class": type(cache).__name__, "state": _to_json(adapter, prefix, adapter.state_of(cache), arrays)}


def _to_json(adapter: Adapter, prefix: str, state: Any, arrays: dict[str, Array]) -> Any:
    """Return the state of a stock cache as JSON data, with ``{"array": name}`` for each array."""
    if adapter.is_array(state):
        arrays[prefix] = state
        return {"array": prefix}
    if isinstance(state, list | tuple):
        return [_to_json(adapter, f"{prefix}.{i}", part, arrays) for i, part in enumerate(state)]
    if state is None or isinstance(state, str | int | float):
        return state
    raise CacheFileError(f"{type(state).__name__} in a cache's state")


# -- loading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What a file holds."""

    header: dict[str, str]
    caches: list[Any]
    """In the order of the model's layers, as the adapter made them."""
    session: Session | None
    """Of the compressed layers; None where there are none."""
    metadata: dict[str, str]
    """The caller's."""
    writer: str
    """The backend that wrote the file, or that serves the models of the library that did."""
    is_kvmlx: bool
    """Whether kvmlx wrote the file; else it is one of mlx-lm's own, without version and checksum."""


def load(adapter: Adapter, path: str | os.PathLike[str], *, data: bool = True) -> Loaded:
    """Read the caches of one model from a file of kvmlx's, of any backend, or of mlx-lm's own.

    Args:
        adapter: of the library whose caches are made.
        path: the file.
        data: False for an adapter that asks for shapes only: arrays are verified, but not held (`kvmlx.files.read`).

    Raises:
        CacheFileError: the file is missing, truncated, damaged, foreign, newer, or holds what the library has not.
    """
    contents = files.read(path, stock=True, data=data)
    writer = _writer(contents)
    foreign = adapter.name not in (None, writer)
    by = f", written by kvmlx's {writer} backend," if foreign and contents.is_kvmlx else ""
    what = f"{os.fspath(path)}{by} cannot be loaded"
    try:
        loaded = (_load_own if contents.is_kvmlx else _load_stock)(adapter, contents)
        return _converted(adapter, loaded) if foreign else loaded
    except KVMLXError as error:
        raise CacheFileError(f"{what}: {error}") from error
    # Whatever does not fit together in a file: the message names the file, the caller need not know how.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CacheFileError(f"{what}: its contents do not fit together ({error!r:.200})") from error


def _writer(contents: files.Contents) -> str:
    """Return the backend that wrote a file, or that serves the models of the library that did."""
    return contents.header.get("backend", "?")[:20] if contents.is_kvmlx else "mlx"


def _take_arrays(adapter: Adapter, stored: dict[str, files.Stored]) -> dict[str, Array]:
    """Turn stored arrays into the adapter's, emptying ``stored``: the bytes are never held twice for long."""
    return {key: adapter.from_stored(stored.pop(key), key) for key in list(stored)}


def _load_own(adapter: Adapter, contents: files.Contents) -> Loaded:
    header = contents.header
    session = None
    if "model" in header:
        model = files.parse_json(header["model"], "its model field")
        session = session_from_json({"strategy": header["strategy"], **model})
        bare = [layer.index for layer in session.model.layers if layer.rotary is None]
        if bare and "query_moments" in session.strategy.needs:
            raise CacheFileError(
                f"{session.strategy} needs rotary embeddings, it says nothing of those of layers {bare}"
            )
    entries = files.parse_json(header["caches"], "its caches field")
    arrays = _take_arrays(adapter, contents.arrays)
    caches = [_from_entry(adapter, str(i), entry, arrays, session) for i, entry in enumerate(entries)]
    if arrays:
        raise CacheFileError(f"no cache owns the array {next(iter(arrays))!r:.80}")
    _check_layers(layers_of(adapter, caches), session)
    metadata = {k.removeprefix(_USER): v for k, v in header.items() if k.startswith(_USER)}
    return Loaded(header, caches, session, metadata, _writer(contents), True)


def _converted(adapter: Adapter, loaded: Loaded) -> Loaded:
    """Check the caches that were converted from another library's, and call them what they are now."""
    layers = layers_of(adapter, loaded.caches)
    places = [(i, c) for i, cache in enumerate(loaded.caches) for c in _flat(adapter, [cache])]
    stocks = [(i, cache) for i, cache in places if adapter.layer_of(cache) is None]
    for i, cache in stocks:
        seen = adapter.tokens_of(cache)
        if any((layer.offsets != seen).any() for layer in layers):
            raise CacheFileError(
                f"cache {i}, which kvmlx does not manage, has seen {seen} tokens, the others "
                f"{layers[0].offsets.tolist()}: with padding among them it passes to no other library"
            )
    if loaded.session is None:
        return loaded
    session = replace(loaded.session, unmanaged=tuple(f"layer {i}: {type(cache).__name__}" for i, cache in stocks))
    for layer in layers:
        layer.session = session
    return replace(loaded, session=session)


def _check_layers(layers: Sequence[LayerCache], session: Session | None) -> None:
    if session is not None and (len(layers), len(layers)) != (session.n_managed, session.model.n_layers):
        raise CacheFileError(f"it holds {len(layers)} compressed layers, {session.n_managed} belong together")
    if any(layer.layer != number for number, layer in enumerate(layers)):
        raise CacheFileError("its layers are not in order")
    if len({layer.batch for layer in layers if layer.batch}) > 1:
        raise CacheFileError("its layers hold different numbers of sequences")


def _from_entry(adapter: Adapter, prefix: str, entry: Any, arrays: dict[str, Array], session: Session | None) -> Any:
    kind = entry["class"]
    if kind == COMPRESSED:
        if session is None:
            raise CacheFileError("it has compressed layers, but no strategy")
        start = prefix + "."
        own = {key.removeprefix(start): arrays.pop(key) for key in list(arrays) if key.startswith(start)}
        layer = layer_from_json(adapter.backend(prefix), session, entry["cache"], own)
        if unknown := own.keys() - layer.arrays().keys():
            raise CacheFileError(f"layer {layer.layer} does not own the array {min(unknown)!r:.80}")
        return adapter.compressed(layer, entry)
    if kind == SEVERAL:
        parts = enumerate(entry["caches"])
        return adapter.several([_from_entry(adapter, f"{prefix}.{i}", c, arrays, session) for i, c in parts])
    return adapter.stock(_text(kind), _from_json(entry["state"], arrays))


def _text(kind: Any) -> str:
    if not isinstance(kind, str):
        raise CacheFileError(f"it has a cache of class {kind!r:.80}, which is no name")
    return kind


def _from_json(state: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(state, dict):
        return arrays.pop(state["array"])
    return [_from_json(part, arrays) for part in state] if isinstance(state, list) else state


def check_rows(
    keys: Array, values: Array, *, seen: int | None = None, window: int | None = None, foreign: bool = False
) -> int:
    """Return how many rows ``[B, H, T, D]`` a stock cache holds.

    Args:
        keys: of the newest tokens, oldest first.
        values: of the same tokens.
        seen: tokens seen, if the cache slides.
        window: tokens that a token sees, itself included, if the cache slides: it then holds ``window - 1``.
        foreign: whether another library made the cache. How one pads a batch the other cannot know.

    Raises:
        CacheFileError: they are not that.
    """
    shapes = tuple(keys.shape), tuple(values.shape)
    if not all(len(shape) == 4 for shape in shapes) or shapes[0][:3] != shapes[1][:3]:
        raise CacheFileError(f"it has rows of the shapes {shapes[0]} and {shapes[1]} in one cache")
    batch, _, held, _ = shapes[0]
    if foreign and batch != 1:
        raise CacheFileError(
            f"it holds {batch} sequences in a cache that kvmlx does not manage: such a cache passes from one library "
            "to another one sequence at a time"
        )
    if seen is not None and window is not None:
        whole = type(seen) is type(window) is int and 1 < window < 2**31 and 0 <= seen < 2**31
        if not whole or held != min(seen, window - 1):
            raise CacheFileError(f"it holds {held} rows of {seen!r} tokens in a window of {window!r}")
    return held


# -- files of mlx-lm's own saver ------------------------------------------------------------------------------


def _load_stock(adapter: Adapter, contents: files.Contents) -> Loaded:
    """Do what mlx-lm's loader does, without trusting the names and the numbers in the keys."""
    metadata, classes, scalars, *_ = _unflatten(contents.header)
    values: dict[str, Any] = {key: _scalar(contents.arrays.pop(key), kind) for key, kind in scalars[1:]}
    # In the file's order: mlx's lists are numbered, and `_unflatten` sorts them.
    values |= _take_arrays(adapter, contents.arrays)
    states = _unflatten(values)
    caches = [
        _from_state(adapter, str(i), kind, state) for i, (kind, state) in enumerate(zip(classes, states, strict=True))
    ]
    layers = layers_of(adapter, caches)
    session = layers[0].session if layers else None
    return Loaded(contents.header, caches, session, metadata, _writer(contents), False)


def _scalar(stored: files.Stored, kind: str) -> Any:
    if kind == "none":
        return None
    held = np.frombuffer(stored.data, stored.dtype).reshape(stored.shape)
    if kind == "scalar":
        return held.item()
    if kind == "string":
        return "".join(chr(code) for code in held.tolist())
    raise CacheFileError(f"it has a scalar of the unknown kind {kind!r:.80}")


def _from_state(adapter: Adapter, prefix: str, kind: Any, state: Any) -> Any:
    if kind == COMPRESSED:
        layer, batched = from_state(adapter.backend(prefix), state)
        return adapter.compressed(layer, {"batched": batched})
    if kind == SEVERAL:
        return adapter.several([_from_state(adapter, prefix, k, s) for s, k in state])
    return adapter.stock(_text(kind), state)


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


# -- the model ------------------------------------------------------------------------------------------------


def check_model(adapter: Adapter, path: str | os.PathLike[str], loaded: Loaded, expected: Sequence[Any]) -> None:
    """Raise unless the caches have the shapes of a model's; a stock file only tells how many there are.

    Args:
        adapter: of both.
        path: of the file, for the message.
        loaded: what it holds.
        expected: the caches of strategy ``full`` that kvmlx makes for the model.
    """
    name, caches = os.fspath(path), loaded.caches
    own = layers_of(adapter, expected)[0].session.model
    if len(caches) != len(expected):
        raise CacheFileError(
            f"{name} was made with another model: it has {len(caches)} caches, the model given "
            f"({own.model_type}) needs {len(expected)}"
        )
    if loaded.session is None:
        return
    made_with = loaded.session.model
    if reason := _difference(made_with, own, same_writer=loaded.writer == adapter.name):
        raise CacheFileError(
            f"{name} was made with another model: {summary(made_with)}; the model given is {summary(own)} ({reason})"
        )
    theirs, ours = ([bool(layers_of(adapter, [c])) for c in side] for side in (caches, expected))
    if theirs != ours:
        raise CacheFileError(f"{name} compresses other layers than kvmlx compresses in the model given")


def summary(model: ModelInfo) -> str:
    """Return a model's type and shapes in words."""
    layer = model.layers[0]
    heads = f"{layer.n_heads} query and {layer.n_kv_heads} KV heads of {layer.key_dim}"
    return f"{model.model_type}, {model.n_layers} layers of {heads}"


def _difference(a: ModelInfo, b: ModelInfo, *, same_writer: bool) -> str:
    """Return what differs between two models, or an empty text; what is not known of one matches any.

    Numbers that are not known are 0. A rotary embedding is None where there is none, and where the library's is not
    plain: of two libraries one may know what the other cannot tell.
    """
    if a.model_type.removesuffix(_TEXT_MODEL) != b.model_type.removesuffix(_TEXT_MODEL):
        return "the type differs"
    if a.n_layers != b.n_layers:
        return "the number of layers differs"
    for x, y in zip(a.layers, b.layers, strict=True):
        for field in ("n_heads", "n_kv_heads", "key_dim", "value_dim"):
            if 0 not in (got := (getattr(x, field), getattr(y, field))) and got[0] != got[1]:
                return f"{field} of layer {x.index} differs"
        unknown = not same_writer and None in (x.rotary, y.rotary)
        if not unknown and not _same_rotary(x, y):
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
