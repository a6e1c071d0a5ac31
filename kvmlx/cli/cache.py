"""`kvmlx cache info`: what a cache file holds, told from its header. No framework is loaded and no array is made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmlx import files
from kvmlx.cli.output import print_json, ratio, size, stdout
from kvmlx.session import LayerCache, report

SHOWN_SEQUENCES = 8
SHOWN_CHARACTERS = 40
"""Of a value of the caller's metadata; all of it is in the JSON."""

ROLES: dict[str, tuple[str, str]] = {
    "tail.keys": ("exact rows, tail", "keys"),
    "tail.values": ("exact rows, tail", "values"),
    **{
        f"{side}.{plane}": (role, side)
        for side in ("keys", "values")
        for plane, role in (
            ("rows", "exact rows, body"),
            ("codes0", "codes"),
            ("codes1", "codes"),
            ("scales", "scales"),
            ("zeros", "zeros"),
            ("means", "means"),
        )
    },
    **{
        f"{place}.{column}": (f"{column} of rows", "")
        for place in ("tail", "column")
        for column in ("bias", "sums", "position")
    },
    "queries": ("observed queries", ""),
    "moments.sum": ("observed queries", ""),
    "moments.outer": ("observed queries", ""),
}
"""What an array of a compressed layer is for, and of which side; by its name in docs/format.md."""


def show_info(path: str, *, as_json: bool) -> None:
    """Print what the file holds.

    Raises:
        CacheFileError: it is missing, truncated, damaged, foreign or newer, or its contents do not fit together.
    """
    found = examine(path)
    if as_json:
        print_json(found)
    else:
        _show(found)


@dataclass(frozen=True)
class _Described:
    """An array of a file, without its data."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class _Stock:
    """A cache that the model's library made."""

    kind: str
    state: Any

    @property
    def nbytes(self) -> int:
        return _nbytes(self.state)


@dataclass(frozen=True)
class _Several:
    """Caches of one layer."""

    parts: Sequence[Any]


class _Reader:
    """The adapter of no framework: arrays are described, caches are what the file calls them."""

    name = None

    def backend(self, entry: str) -> Any:
        return None

    def is_array(self, x: Any) -> bool:
        return isinstance(x, _Described)

    def to_stored(self, arrays: Mapping[str, Any]) -> dict[str, files.Stored]:
        raise TypeError("what is described has no data to be written")

    def from_stored(self, stored: files.Stored, name: str) -> _Described:
        return _Described(stored.dtype, stored.shape, stored.nbytes)

    def layer_of(self, cache: Any) -> LayerCache | None:
        return cache if isinstance(cache, LayerCache) else None

    def numbers_of(self, cache: Any) -> dict[str, Any]:
        return {}

    def compressed(self, layer: LayerCache, numbers: Mapping[str, Any]) -> LayerCache:
        return layer

    def parts_of(self, cache: Any) -> Sequence[Any] | None:
        return cache.parts if isinstance(cache, _Several) else None

    def several(self, parts: Sequence[Any]) -> _Several:
        return _Several(parts)

    def state_of(self, cache: Any) -> Any:
        return cache.state

    def tokens_of(self, cache: Any) -> int:
        raise TypeError("what is described is not converted")

    def stock(self, kind: str, state: Any) -> _Stock:
        return _Stock(kind, state)


def examine(path: str) -> dict[str, Any]:
    """Return what the file holds, as plain data; the checksum and all shapes are verified."""
    from kvmlx.backends import files as common

    loaded = common.load(_Reader(), path, data=False)
    header = loaded.header if loaded.is_kvmlx else {}
    parts = [(i, part) for i, cache in enumerate(loaded.caches) for part in _parts(cache)]
    layers = [(i, part) for i, part in parts if isinstance(part, LayerCache)]
    stocks = [_stock_record(i, part) for i, part in parts if isinstance(part, _Stock)]
    found: dict[str, Any] = {
        "path": path,
        "file_nbytes": os.path.getsize(path),
        "written_by": "kvmlx" if loaded.is_kvmlx else "mlx-lm",
        "kvmlx_version": header.get("kvmlx_version"),
        "backend": loaded.writer,
        "format_version": int(header["format_version"]) if loaded.is_kvmlx else None,
        "checksum": "verified" if loaded.is_kvmlx else None,
        "metadata": loaded.metadata or {},
        "strategy": None,
        "model": None,
        "sequences": [],
        "held": None,
        "layers": [],
        "stock": stocks,
        "stock_nbytes": sum(stock["nbytes"] for stock in stocks),
    }
    if loaded.session is not None:
        found |= _compressed(layers)
    return found


def _parts(cache: Any) -> list[Any]:
    return [inner for part in cache.parts for inner in _parts(part)] if isinstance(cache, _Several) else [cache]


def _stock_record(index: int, stock: _Stock) -> dict[str, Any]:
    return {"index": index, "class": stock.kind, "nbytes": stock.nbytes, "tokens": _stock_tokens(stock)}


def _stock_tokens(stock: _Stock) -> int | None:
    """Return the tokens that a cache has seen, where its class says it plainly."""
    state = stock.state
    if stock.kind in ("KVCache", "RotatingKVCache", "DynamicSlidingWindowLayer", "QuantizedKVCache"):
        return state[2] if isinstance(state, list) and len(state) > 2 and type(state[2]) is int else None
    if stock.kind == "DynamicLayer" and isinstance(state, list) and state and isinstance(state[0], _Described):
        return state[0].shape[-2] if state[0].ndim == 4 else None
    return None


def _nbytes(state: Any) -> int:
    if isinstance(state, _Described):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_nbytes(part) for part in parts)


def _compressed(placed: Sequence[tuple[int, LayerCache]]) -> dict[str, Any]:
    """Return what is known of the compressed layers, which all have one session, by their places in the model."""
    layers = [layer for _, layer in placed]
    session, whole = layers[0].session, report(layers)
    filled = [layer for layer in layers if not layer.empty]
    by_array: dict[str, int] = {}
    for layer in filled:
        for name, array in layer.arrays().items():
            by_array[name] = by_array.get(name, 0) + array.nbytes
    model, first = session.model, session.model.layers[0]
    shape = filled[0].store.shape if filled else (0, first.n_kv_heads, first.key_dim, first.value_dim)
    return {
        "strategy": str(session.strategy),
        "model": {
            "type": model.model_type,
            "layers": model.n_layers,
            "n_heads": first.n_heads,
            "n_kv_heads": shape[1],
            "key_dim": shape[2],
            "value_dim": shape[3],
            "dtype": str(filled[0].store.keys.dtype) if filled else None,
        },
        "sequences": [_sequence(filled, b) for b in range(layers[0].batch)],
        "held": {
            "nbytes": whole.nbytes,
            "full_nbytes": whole.full_nbytes,
            "ratio": whole.ratio,
            "kept_tokens": whole.kept_tokens,
            "tokens": whole.tokens,
            "headroom_nbytes": sum(_headroom(layer) for layer in filled),
            "by_array": by_array,
        },
        "layers": [_layer_record(index, layer) for index, layer in placed],
    }


def _sequence(layers: Sequence[LayerCache], b: int) -> dict[str, Any]:
    if not layers:
        return {"tokens": 0, "kept_tokens": 0.0, "prompt_open": True}
    kept = [float(layer.store.lengths[b].mean()) - int(layer.padding[b]) for layer in layers]
    return {
        "tokens": int(layers[0].offsets[b]),
        "kept_tokens": sum(kept) / len(kept),
        "prompt_open": bool(layers[0].prefilling[b]) and not layers[0].strategy.identity,
    }


def _layer_record(index: int, layer: LayerCache) -> dict[str, Any]:
    kept, full = layer.report_rows()
    store = layer.store
    tail = float(store.tail_lengths.mean(axis=1).sum()) if not layer.empty else 0.0
    most = int(store.lengths.max()) if not layer.empty else 0
    least = int(store.lengths.min()) if not layer.empty else 0
    return {
        "index": index,
        "kept_tokens": kept,
        "tail_tokens": tail,
        "least_in_a_head": least,
        "most_in_a_head": most,
        "nbytes": layer.nbytes,
        "full_nbytes": full,
    }


def _headroom(layer: LayerCache) -> int:
    """Return the bytes that are allocated for rows to come."""
    store = layer.store
    capacity, rows = math.prod(store.keys.shape[:3]), int(store.span.sum())
    free_tail = capacity - int(store.tail_lengths.sum())
    free_body = rows - int(store.length.sum())
    total = 0.0
    for name, array in store.arrays().items():
        tail = name.startswith("tail.")
        total += array.nbytes * (free_tail / max(1, capacity) if tail else free_body / max(1, rows))
    return round(total)


# -- for people -----------------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    console = stdout()
    console.print(f"[bold]{_safe(found['path'])}[/]", soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(found):
        table.add_row(name, text)
    console.print(table)
    if found["held"] and found["held"]["by_array"]:
        console.print(_bytes_table(found["held"]))
    if found["layers"] or found["stock"]:
        console.print(_caches_table(found))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    own = found["written_by"] == "kvmlx"
    if own:
        said = f"format {found['format_version']}, [green]checksum verified[/]"
        by = f"kvmlx {_safe(found['kvmlx_version'] or '?')}, backend {_safe(found['backend'])}"
    else:
        said = "[yellow]no checksum: damage within its arrays cannot be noticed[/]"
        by = "mlx-lm's own save_prompt_cache"
    rows = [("file", f"{size(found['file_nbytes'])}, {said}"), ("written by", by)]
    if (model := found["model"]) is not None:
        rows += [("model", _model(model)), ("strategy", _safe(found["strategy"])), *_token_rows(found)]
    elif found["stock"]:
        rows.append(("strategy", "none: the caches are the library's own, nothing is compressed"))
    for name, value in found["metadata"].items():
        text = value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}... ({len(value):,} characters)"
        rows.append(("metadata", f"{_safe(name)}: {_safe(text)}"))
    return rows


def _model(model: dict[str, Any]) -> str:
    heads = f"{model['n_heads']} query and " if model["n_heads"] else ""
    dims = f"{model['key_dim']}"
    if model["value_dim"] != model["key_dim"]:
        dims += f" (values {model['value_dim']})"
    dtype = f", {model['dtype']}" if model["dtype"] else ""
    text = f"{model['layers']} compressed layers, {heads}{model['n_kv_heads']} KV heads of {dims}{dtype}"
    return f"{_safe(model['type'])}: {text}"


def _token_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    held, sequences = found["held"], found["sequences"]
    if not held["tokens"]:
        return [("tokens", "none yet")]
    rows = [("tokens", _kept(held["kept_tokens"], held["tokens"]))]
    if len(sequences) > 1:
        rows[0] = ("tokens", f"{rows[0][1]}, in {len(sequences)} sequences")
        shown = sequences[:SHOWN_SEQUENCES]
        rows += [("", f"{i}: {_kept(s['kept_tokens'], s['tokens'])}") for i, s in enumerate(shown)]
        if rest := len(sequences) - len(shown):
            rows.append(("", f"and {rest} more"))
    if any(s["prompt_open"] for s in sequences):
        rows.append(("prompt", "not complete: the strategy has still to act at its end"))
    room = held["headroom_nbytes"] / held["nbytes"]
    rows.append(("held", f"{size(held['nbytes'])}, {ratio(held['ratio'])}; {room:.0%} of it is head-room"))
    return rows


def _kept(kept: float, seen: int) -> str:
    return f"{kept:,.0f} kept of {seen:,} seen"


def _bytes_table(held: dict[str, Any]) -> Table:
    by_role: dict[str, dict[str, int]] = {}
    for name, nbytes in held["by_array"].items():
        role, side = ROLES[name]
        row = by_role.setdefault(role, {})
        row[side] = row.get(side, 0) + nbytes
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("bytes", no_wrap=True)
    for name in ("keys", "values", "together", "share"):
        table.add_column(name, justify="right")
    for role in dict.fromkeys(role for role, _ in ROLES.values()):
        if (row := by_role.get(role)) is not None:
            cells = [size(row[side]) if side in row else "-" for side in ("keys", "values")]
            total = sum(row.values())
            table.add_row(role, *cells, size(total), f"{total / held['nbytes']:.1%}")
    return table


def _caches_table(found: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", max_width=16)
    table.add_column("cache", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    for name in ("in tail", "bytes each", "of fp16"):
        table.add_column(name, justify="right")
    one_sequence = len(found["sequences"]) == 1
    for alike in _alike(found["layers"], ("kept_tokens", "tail_tokens", "nbytes", "full_nbytes")):
        first = alike[0]
        kept = f"{first['kept_tokens']:,.0f}"
        if one_sequence and first["least_in_a_head"] != first["most_in_a_head"]:
            kept += f" ({first['least_in_a_head']:,}-{first['most_in_a_head']:,})"
        share = f"{first['nbytes'] / first['full_nbytes']:.3f}" if first["full_nbytes"] else "-"
        tail = f"{first['tail_tokens']:,.0f}"
        table.add_row(_places(alike), "compressed", kept, tail, size(first["nbytes"]), share)
    for alike in _alike(found["stock"], ("class", "nbytes", "tokens")):
        first = alike[0]
        seen = "-" if first["tokens"] is None else f"{first['tokens']:,} seen"
        table.add_row(_places(alike), _safe(first["class"]), seen, "-", size(first["nbytes"]), "-")
    return table


def _alike(records: Sequence[dict[str, Any]], fields: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """Group what holds the same, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in fields), []).append(record)
    return list(groups.values())


def _places(records: Sequence[dict[str, Any]]) -> str:
    """Return places in the model, such as ``0-4, 6``."""
    numbers = sorted({record["index"] for record in records})
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def _safe(text: str) -> str:
    """Return text of a file as it may be printed: no markup of ours, nothing that a terminal would obey."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
