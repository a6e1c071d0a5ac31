"""A layer's cache as plain data and back: the same for copies, mlx-lm's own files and kvmlx's files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from kvmlx.session import LayerCache, Session
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.types import CacheFileError, LayerInfo, ModelInfo, Rotary

STATE_VERSION = 1

_LIMIT = 2**31
"""Offsets and row numbers become int32 on the device."""
_LAYER_NUMBERS = ("index", "n_heads", "n_kv_heads", "key_dim", "value_dim")
_FLOATS = ("float16", "bfloat16", "float32")

State = tuple[Any, ...]


def session_to_json(session: Session) -> dict[str, Any]:
    """Return a session as JSON data. A rotary embedding is there once: layers share it, and it is long."""
    model = session.model
    rotaries = list(dict.fromkeys(layer.rotary for layer in model.layers if layer.rotary is not None))
    numbers = {rotary: number for number, rotary in enumerate(rotaries)}
    return {
        "strategy": str(session.strategy),
        "model_type": model.model_type,
        "rotaries": [asdict(rotary) for rotary in rotaries],
        "layers": [
            {name: getattr(layer, name) for name in _LAYER_NUMBERS}
            | {"rotary": None if layer.rotary is None else numbers[layer.rotary]}
            for layer in model.layers
        ],
        "n_managed": session.n_managed,
        "unmanaged": list(session.unmanaged),
        "inspect": session.inspect,
    }


def session_from_json(data: dict[str, Any]) -> Session:
    """Build a session from what `session_to_json` returned; the strategy is parsed, nothing is run."""
    rotaries = [_rotary(rotary) for rotary in data["rotaries"]]
    layers = []
    for layer in data["layers"]:
        numbers = {name: layer[name] for name in _LAYER_NUMBERS}
        _need(all(type(n) is int and 0 <= n < _LIMIT for n in numbers.values()), "a layer's description")
        which = layer["rotary"]
        _need(which is None or (type(which) is int and which >= 0), "a layer's rotary embedding")
        layers.append(LayerInfo(**numbers, rotary=None if which is None else rotaries[which]))
    return Session(
        Strategy.parse(data["strategy"]),
        ModelInfo(data["model_type"], tuple(layers)),
        int(data["n_managed"]),
        tuple(data["unmanaged"]),
        bool(data["inspect"]),
    )


def _rotary(data: dict[str, Any]) -> Rotary:
    first, second, frequency = (tuple(data[name]) for name in ("first", "second", "frequency"))
    _need(all(type(i) is int and i >= 0 for i in first + second), "a rotary embedding's channels")
    _need(len(first) == len(second) == len(frequency), "a rotary embedding's pairs")
    _need(len({*first, *second}) == 2 * len(first), "a rotary embedding's pairs")
    _need(all(math.isfinite(f) for f in (*frequency, data["factor"])), "a rotary embedding's angles")
    _need(data["factor"] > 0, "a rotary embedding's factor")
    return Rotary(first, second, frequency, data["factor"])


def layer_to_json(cache: LayerCache) -> dict[str, Any]:
    """Return what a layer's cache knows beside its arrays and its session."""
    out: dict[str, Any] = {
        "layer": cache.layer,
        "offsets": cache.offsets.tolist(),
        "prefilling": cache.prefilling.tolist(),
        "since_selection": cache.since_selection.tolist(),
        "padding": cache.padding.tolist(),
        "n_queries": cache.n_queries.tolist(),
        "remaining": None if cache.remaining is None else cache.remaining.tolist(),
        "due": cache.due,
        "scale": cache.scale,
        "moment_counts": None if cache.moments is None else cache.moments[2].tolist(),
        "store": None,
    }
    store = cache.store
    if not store.empty:
        out["store"] = {
            "dtype": str(store.keys.dtype).rpartition(".")[2],
            "begin": store.begin.tolist(),
            "end": store.end,
            "biased": store.biased,
            "start": store.start.tolist(),
            "length": store.length.tolist(),
            "span": store.span.tolist(),
        }
    return out


def layer_from_json(backend: Any, session: Session, data: dict[str, Any], arrays: dict[str, Any]) -> LayerCache:
    """Build a layer's cache from its JSON data and its arrays.

    Raises:
        CacheFileError: the two do not go together.
    """
    _need(type(data["layer"]) is int and 0 <= data["layer"] < session.model.n_layers, "a layer's number")
    cache = LayerCache(backend, session, data["layer"])
    where = f"layer {cache.layer}: "
    batch = (len(data["offsets"]),)
    for name in ("offsets", "since_selection", "padding", "n_queries"):
        setattr(cache, name, _counts(data[name], batch, where + name))
    cache.prefilling = np.array(data["prefilling"], bool)
    _need(cache.prefilling.shape == batch, where + "prefilling")
    if data["remaining"] is not None:
        cache.remaining = _counts(data["remaining"], batch, where + "remaining")
    cache.due, cache.scale = int(_counts(data["due"], (), where + "due")), float(data["scale"])
    _need(math.isfinite(cache.scale), where + "scale")
    cache.queries = arrays.get("queries")
    if data["moment_counts"] is not None:
        counts = _counts(data["moment_counts"], batch, where + "moments")
        cache.moments = (arrays["moments.sum"], arrays["moments.outer"], counts)
    if data["store"] is not None:
        cache.store = _store(backend, session, data["store"], arrays, where)
        _check_store(cache)
        _check_observed(cache)
    else:
        _need(cache.queries is None and cache.moments is None, where + "observations without rows")
    return cache


def _need(ok: Any, what: str) -> None:
    if not ok:
        raise CacheFileError(f"it is inconsistent ({what})")


def _counts(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return JSON data as whole numbers that index arrays: of this shape, not negative, not absurd."""
    array = np.array(value)
    _need(array.shape == shape and (array.dtype.kind == "i" or not array.size), what)
    _need(((array >= 0) & (array < _LIMIT)).all(), what)
    return array.astype(np.int64)


def _dtype(array: Any) -> str:
    return str(array.dtype).rpartition(".")[2]


def _store(backend: Any, session: Session, data: dict[str, Any], arrays: dict[str, Any], where: str) -> LayerStore:
    keys, values = arrays["tail.keys"], arrays["tail.values"]
    _need(keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3], where + "keys and values")
    _need(_dtype(keys) == data["dtype"] in _FLOATS and _dtype(values) in _FLOATS, where + "dtype")
    store = LayerCache(backend, session, 0).store
    store.adopt(keys.dtype)
    for codec, x in zip(store.codecs or (), (keys, values), strict=False):
        codec.check(x.shape[3])
    store.keys, store.values = keys, values
    store.columns = {name: arrays[f"tail.{name}"] for name in store.column_names}
    for name in ("begin", "start", "length", "span"):
        setattr(store, name, _counts(data[name], tuple(keys.shape[:2]), where + name))
    store.end = int(_counts(data["end"], (), where + "end"))
    store.biased = bool(data["biased"])
    _need(not store.biased or "bias" in store.columns, where + "a bias, which this strategy never makes")
    if store.span.any():
        _need(store.codecs is not None, where + "a body, which this strategy never makes")
        store.planes = {name: arrays[name] for name in store._periods()}
    return store


def _check_store(cache: LayerCache) -> None:
    """Raise unless lengths, spans and array shapes agree: a loaded cache can never read out of bounds."""
    store, info = cache.store, cache.info
    b, h, d, dv = store.shape
    capacity = store.keys.shape[2]

    def need(ok: Any, what: str) -> None:
        _need(ok, f"layer {cache.layer}: {what}")

    need(cache.batch == b and h and d and dv, "batch size, heads or head dims")
    known = zip((info.n_kv_heads, info.key_dim, info.value_dim), (h, d, dv), strict=True)
    need(all(said in (0, found) for said, found in known), "rows of another shape than the model's")
    if info.rotary is not None:
        need(all(i < d for i in info.rotary.first + info.rotary.second), "rotated channels")
    need(store.end <= capacity and (store.begin <= store.end).all(), "tail bounds")
    need((store.length <= store.span).all(), "body lengths")
    need((store.length % store.unit == 0).all() and (store.span % store.unit == 0).all(), "body units")
    need(all(tuple(c.shape) == (b, h, capacity) for c in store.columns.values()), "columns")
    need(all(_dtype(c) == "float32" for c in store.columns.values()), "columns")
    need((store.lengths <= cache.offsets[:, None] + cache.padding[:, None]).all(), "more rows than tokens")
    need((cache.padding[:, None] <= store.tail_lengths).all(), "more padding than rows")
    rows = int(store.span.sum())
    need((store.start.ravel() == np.cumsum(store.span.ravel()) - store.span.ravel()).all(), "spans overlap")
    if not store.planes:
        return
    specs = {
        f"{side}.{plane.name}": (plane.width, plane.dtype)
        for side in ("keys", "values")
        for codec, dim in [store._side(side)]
        for plane in codec.planes(dim)
    }
    for name, period in store._periods().items():
        width, dtype = specs.get(name, (1, "float32"))
        plane = store.planes[name]
        fits = tuple(plane.shape) == (rows // period, width) and _dtype(plane) == dtype
        need(fits, f"plane {name} is not {dtype} of {rows // period} x {width}")


def _check_observed(cache: LayerCache) -> None:
    """Raise unless what was noted of the queries has the shape that the stages read."""
    b, h, d, _ = cache.store.shape
    found = [] if cache.queries is None else [(cache.queries, (cache.strategy.window, d))]
    if cache.moments is not None:
        found += [(cache.moments[0], (d,)), (cache.moments[1], (d, d))]
    for array, rest in found:
        shape = tuple(array.shape)
        heads = shape[1] if len(shape) > 1 else 0
        fits = heads and heads % h == 0 and cache.info.n_heads in (0, heads)
        _need(fits and shape == (b, heads, *rest), f"layer {cache.layer}: observed queries")


def to_state(cache: LayerCache, *, batched: bool) -> State:
    """Return ``(json, array, array, ...)``: strings and arrays are what mlx-lm's files take."""
    arrays = cache.arrays()
    data = {
        "version": STATE_VERSION,
        "batched": batched,
        "session": session_to_json(cache.session),
        "cache": layer_to_json(cache),
        "arrays": list(arrays),
    }
    return (json.dumps(data, separators=(",", ":")), *arrays.values())


def from_state(backend: Any, state: State) -> tuple[LayerCache, bool]:
    """Undo `to_state`."""
    data = json.loads(state[0])
    if data["version"] != STATE_VERSION:
        raise CacheFileError(f"this cache has state version {data['version']}, this kvmlx reads {STATE_VERSION}")
    arrays = dict(zip(data["arrays"], state[1:], strict=True))
    session = session_from_json(data["session"])
    return layer_from_json(backend, session, data["cache"], arrays), bool(data["batched"])
