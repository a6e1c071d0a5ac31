"""Stores of every format and shape, what attention over them must give, and kernels compared with that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvmlx import reference as ref
from kvmlx.checks import Case
from kvmlx.selftest import decode, rotated
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.tolerance import assert_close
from kvmlx.types import Array

Kernel = Callable[..., Array]
"""attend_decode or attend_prefill."""
ORDERS = 4
"""Orders of sums in which the plain float32 attention is taken."""


@dataclass(frozen=True)
class Shape:
    """A store and a chunk of queries over it."""

    stage: str = "int4"
    dtype: str = "float32"
    dim: int = 64
    value_dim: int = 0
    """0: the keys'."""
    n_batch: int = 1
    n_kv_heads: int = 2
    group: int = 2
    n_queries: int = 5
    body: int | tuple[int, ...] = 64
    """Rows of each lane's body; one number for all."""
    tail: int = 3
    """Rows of the tail besides the chunk's own, sinks included."""
    sinks: int = 2
    begin: tuple[int, ...] = ()
    """Padding on the left of each sequence."""
    biased: bool = False
    attention_sinks: bool = False
    mask: str = ""
    """``bool`` or a dtype, then the axes that it has: ``bool BHL``."""
    outliers: bool = False
    window: int = 0

    @property
    def name(self) -> str:
        own, common = self.__dict__, Shape().__dict__
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in own.items() if v != common[k]) or "plain"


@dataclass
class Problem:
    store: LayerStore
    queries: Array
    scale: float
    sinks: Array | None
    mask: Array | None
    window: int = 0

    @property
    def backend(self) -> Any:
        return self.store.backend

    @property
    def dtype(self) -> str:
        """The name of the model's dtype."""
        return name_of(self.queries.dtype)

    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "sinks": self.sinks, "mask": self.mask, "window": self.window}


def name_of(dtype: Any) -> str:
    """Return NumPy's name of a framework's dtype, or ``bfloat16``."""
    return str(dtype).rpartition(".")[2]


def make(shape: Shape, seed: int = 0, backend: Any = None) -> Problem:
    """Fill a store by appending, encoding and appending the chunk, as a cache does; of MLX's arrays by default."""
    backend = backend or import_module("kvmlx.backends.mlx.ops").BACKEND
    xp = backend.xp
    rng = np.random.default_rng(seed)
    dtype = getattr(xp, shape.dtype)
    b, h, d, dv = shape.n_batch, shape.n_kv_heads, shape.dim, shape.value_dim or shape.dim
    n = shape.n_queries

    def rounded(x: np.ndarray, to: Any = dtype) -> Array:
        return xp.astype(backend.from_numpy(x.astype(np.float32)), to)

    def normal(*size: int) -> Array:
        return rounded(rng.standard_normal(size))

    body = np.broadcast_to(np.resize(np.array(shape.body), b * h).reshape(b, h), (b, h)).astype(np.int64)
    begin = np.repeat(np.array(shape.begin or (0,) * b, np.int64)[:, None], h, axis=1)
    before = int((body + begin).max()) + shape.tail
    codecs = None
    if body.any():
        codecs = Strategy.parse(shape.stage).codecs() if shape.stage != "exact" else (None, None)
    store = LayerStore(backend, codecs, sinks=shape.sinks if codecs else 0, columns=("bias",) if shape.biased else ())
    keys, values = normal(b, h, before + n, d), normal(b, h, before + n, dv)
    if shape.outliers:
        keys = keys * rounded(np.where(np.arange(d) % 13 == 3, 6.0, 1.0))
    first = before if codecs else before + n
    store.append(keys[:, :, :first], values[:, :, :first])
    store.begin = begin.copy()
    if shape.biased:
        store.columns["bias"] = rounded(rng.standard_normal(store.columns["bias"].shape), xp.float32)
        store.biased = True
    if codecs:
        store.encode_oldest(body)
        store.append(keys[:, :, before:], values[:, :, before:])
    mask = None
    if shape.mask:
        kind, _, axes = shape.mask.partition(" ")
        t = int(store.end - store.begin.min()) + int(store.length.max(initial=0))
        size = [k if axis in axes else 1 for axis, k in zip("BHL", (b, h * shape.group, n), strict=True)]
        if kind == "bool":
            mask = backend.from_numpy(rng.random((*size, t)) < 0.7)
        else:
            added = np.where(rng.random((*size, t)) < 0.3, -np.inf, rng.standard_normal((*size, t)))
            mask = rounded(added, getattr(xp, kind))
    sinks = normal(h * shape.group) if shape.attention_sinks else None
    queries = normal(b, h * shape.group, n, d) * 1.5
    return Problem(store, xp.astype(queries, dtype), d**-0.5, sinks, mask, shape.window)


PLACES = [("tail", "begin"), ("tail", "bias"), ("body", "bias"), ("both", "begin")]
"""Where the rows of a vector lie, and how rows that do not exist are told."""


def vector_problem(case: Case, backend: Any, place: str, absent: str) -> Problem:
    """Return an attention vector's rows in the exact tail, in an exact body, or in both; see `PLACES`.

    What is not causal lies in the body.
    """
    params, t = case
    n, held = t["queries"].shape[2], t["keys"].shape[2]
    body = {"tail": 0, "body": held - n, "both": (held - n) // 2}[place] if params["causal"] else held
    x = {k: backend.from_numpy(t[k].astype(np.float32)) for k in ("queries", "keys", "values", "sinks") if k in t}
    store = LayerStore(backend, (None, None), columns=("bias",))
    store.append(x["keys"], x["values"])
    bias = t.get("bias", np.zeros(t["keys"].shape[:3])).astype(np.float32)
    begin = np.zeros(t["keys"].shape[:2], np.int64)
    if "valid" in t:
        missing = t["valid"][:, None, :] == 0
        begin[:] = missing.sum(axis=2)
        if absent == "bias":
            bias, begin = np.where(missing, -np.inf, bias).astype(np.float32), np.zeros_like(begin)
    store.biased = bool(bias.any())
    if held:
        column = store.columns["bias"][..., None]
        store.columns["bias"] = backend.put(column, backend.from_numpy(bias)[..., None], 0)[..., 0]
    store.begin = begin
    store.encode_oldest(np.maximum(np.full_like(begin, body) - begin, 0))
    return Problem(store, x["queries"], params["scale"], x.get("sinks"), None)


def poison(store: LayerStore) -> None:
    """Put NaN wherever a lane has no row: into head-room, padding, and between lanes."""
    backend: Any = store.backend

    def spoil(x: Array, inside: np.ndarray) -> Array:
        wrong = {"uint8": 0xA5, "uint16": 0x7FFF}.get(name_of(x.dtype), float("nan"))
        held, integer = backend.from_numpy(inside), name_of(x.dtype) == "uint16"
        word = backend.xp.astype(x, backend.xp.int32) if integer else x  # torch has no where of uint16
        out = backend.xp.where(held, word, backend.xp.full((1,), wrong, dtype=word.dtype))
        return backend.xp.astype(out, x.dtype)

    rows = np.arange(store.keys.shape[2])
    inside = (rows >= store.begin[..., None]) & (rows < store.end)
    store.keys, store.values = (spoil(x, inside[..., None]) for x in (store.keys, store.values))
    store.columns = {k: spoil(c, inside) for k, c in store.columns.items()}
    if not store.has_body:
        return
    for name, period in store._periods().items():
        plane = store.planes[name]
        held = np.zeros(plane.shape[0], bool)
        for at, n in zip(store.start.flat, store.length.flat, strict=True):
            held[at // period : (at + n) // period] = True
        store.planes[name] = spoil(plane, held[:, None])


def to_numpy(x: Array) -> np.ndarray:
    """Return an array of MLX's or torch's as float32."""
    framework = type(x).__module__.partition(".")[0]
    return import_module(f"kvmlx.backends.{framework}.ops").BACKEND.to_numpy(x).astype(np.float32)


def body_rows(store: LayerStore, i: int, j: int, side: int, dtype: Any) -> np.ndarray:
    """Return what one lane's body holds of keys (0) or values (1), ``[n, dim]``."""
    name, dim = ("keys", "values")[side], store.shape[2 + side]
    n, at = int(store.length[i, j]), int(store.start[i, j])
    if not n:
        return np.zeros((0, dim), dtype)
    assert store.codecs is not None
    codec = store.codecs[side]
    planes = {}
    for spec in codec.planes(dim):
        plane = store.backend.to_numpy(store.planes[f"{name}.{spec.name}"])
        planes[spec.name] = plane[at // spec.rows : (at + n) // spec.rows]
    return decode(codec, planes, dim, dtype)


def oracle(p: Problem, dtype: Any = np.float64, order: np.random.Generator | None = None) -> np.ndarray:
    """Return ``[B, Hq, L, Dv]`` by the definition, in ``dtype``, its sums in an order drawn from ``order``."""
    store = p.store
    b, h, d, dv = store.shape
    hq, n = p.queries.shape[1], p.queries.shape[2]
    queries = to_numpy(p.queries).astype(dtype).reshape(b, h, hq // h, n, d)
    mask = None if p.mask is None else np.broadcast_to(to_numpy(p.mask), (b, hq, n, p.mask.shape[3]))
    out = np.zeros((b, hq, n, dv), dtype)
    keys_turn, values_turn = map(rotated, store.codecs if store.has_body and store.codecs else (None, None))
    longest = int(store.length.max(initial=0))
    common = int(store.begin.min())
    for i, j in np.ndindex(b, h):
        body, begin = int(store.length[i, j]), int(store.begin[i, j])
        q = queries[i, j]
        kb, vb = (body_rows(store, i, j, side, dtype) for side in (0, 1))
        kt, vt = (to_numpy(x[i, j, begin : store.end]).astype(dtype) for x in (store.keys, store.values))
        rows = np.arange(begin, store.end)
        logical = [*range(store.sinks), *range(store.sinks + longest, store.end - common + longest)]
        columns = np.array([*range(store.sinks, store.sinks + body), *np.array(logical, int)[rows - common]], int)
        turned = ref.rotate(q, ref.SIGN_SEED, dtype) if keys_turn else q
        s = np.concatenate([_product(turned, kb, p.scale, order), _product(q, kt, p.scale, order)], axis=-1)
        if store.biased:
            tail_bias = to_numpy(store.columns["bias"])[i, j, begin : store.end]
            at = int(store.start[i, j])
            body_bias = to_numpy(store.planes["column.bias"])[at : at + body, 0] if body else tail_bias[:0]
            s = s + np.concatenate([body_bias, tail_bias]).astype(dtype)
        seen = np.ones((n, body + len(rows)), bool)
        seen[:, body:] = rows[None, :] <= store.end - n + np.arange(n)[:, None]
        if p.window:
            newest = store.end - common + longest - n + np.arange(n)
            seen &= columns[None, :] > newest[:, None] - p.window
        s = np.where(seen, s, dtype(-np.inf))
        heads = slice(j * (hq // h), (j + 1) * (hq // h))
        if mask is not None and p.mask is not None:
            part = mask[i, heads][:, :, columns]
            is_bool = "bool" in str(p.mask.dtype)
            s = np.where(part != 0, s, dtype(-np.inf)) if is_bool else s + part.astype(dtype)
        if p.sinks is not None:
            sink = np.broadcast_to(to_numpy(p.sinks).astype(dtype)[heads][:, None, None], (*s.shape[:2], 1))
            s = np.concatenate([s, sink], axis=-1)
        weights = ref.softmax(s)
        gathered = _ordered(weights[..., :body], vb, order)
        if values_turn:
            gathered = ref.unrotate(gathered, ref.SIGN_SEED, dtype)
        out[i, heads] = gathered + _ordered(weights[..., body : body + len(rows)], vt, order)
    return out


def _product(q: np.ndarray, k: np.ndarray, scale: float, order: np.random.Generator | None) -> np.ndarray:
    channels = np.arange(q.shape[-1]) if order is None else order.permutation(q.shape[-1])
    return (q * q.dtype.type(scale))[..., channels] @ k[:, channels].T


def _ordered(w: np.ndarray, v: np.ndarray, order: np.random.Generator | None) -> np.ndarray:
    rows = np.arange(len(v)) if order is None else order.permutation(len(v))
    return w[..., rows] @ v[rows]


def sliding(p: Problem) -> Array:
    """Return the window as the mask ``[1, 1, L, T]`` that a model makes of it."""
    store, n = p.store, p.queries.shape[2]
    t = int(store.end - store.begin.min() + store.length.max(initial=0))
    own = np.arange(t - n, t)[:, None]
    return p.backend.from_numpy((np.arange(t) <= own) & (np.arange(t) > own - p.window))[None, None]


def plain(p: Problem) -> np.ndarray:
    """Return plain float32 attention rounded to the queries' dtype, its sums in several orders, stacked."""
    in_float32 = [p.backend.from_numpy(oracle(p, np.float32, np.random.default_rng(i))) for i in range(ORDERS)]
    return np.stack([to_numpy(p.backend.xp.astype(x, p.queries.dtype)) for x in in_float32])


def check(kernel: Kernel, p: Problem) -> Array:
    """Compare a kernel with the oracle; every row that no lane holds is NaN."""
    want, low = oracle(p), plain(p)
    poison(p.store)
    out = kernel(p.store, p.queries, **p.arguments())
    assert out.dtype == p.queries.dtype
    assert_close(to_numpy(out), want, low, dtype=p.dtype)
    return out


# Every format with every dtype and head dim, pairwise; lengths around a tile and a block; one option or another on.
SHAPES = [
    Shape("int4", "float16", 128, group=4, n_queries=17, body=65),
    Shape("int2", "bfloat16", 128, group=8, n_kv_heads=1, n_queries=9, body=33, biased=True),
    Shape("int8(group_size=32)", "float32", 64, n_batch=2, body=(31, 1, 0, 63), mask="bool BHL"),
    Shape("int3", "float16", 80, group=3, n_queries=23, body=31, begin=(4,), attention_sinks=True),
    Shape("int5(group_size=8)", "float32", 96, 64, group=1, n_queries=67, body=63),
    Shape("int6", "bfloat16", 192, 128, group=4, n_queries=9, body=17, mask="bfloat16 L"),
    Shape("int4(rotate=hadamard)", "float16", 256, group=1, n_queries=35, body=33, biased=True),
    Shape("int2(rotate=hadamard, group_size=16)", "float32", 80, n_batch=2, begin=(0, 9), body=(65, 40)),
    Shape("kivi(bits=2)", "float16", 128, group=4, n_queries=16, body=96, outliers=True),
    Shape("kivi(bits=4, group_size=64)", "bfloat16", 64, n_batch=2, body=(64, 128, 0, 64), mask="bool B"),
    Shape("kivi(bits=3, group_size=8)", "float32", 96, 128, group=3, body=(8, 40), biased=True, outliers=True),
    Shape("kivi(bits=8, group_size=128)", "float32", 128, n_queries=2, n_kv_heads=1, body=128, attention_sinks=True),
    Shape("kivi(bits=5, group_size=16)", "float16", 192, n_kv_heads=1, body=48, tail=0, sinks=0),
    Shape("kivi(bits=6, group_size=256)", "bfloat16", 256, n_kv_heads=1, group=1, body=256, mask="float32 HL"),
    Shape("turboquant(bits=4)", "float16", 128, group=4, n_queries=18, body=63, begin=(3,)),
    Shape("turboquant(bits=1)", "float32", 64, n_queries=3, body=(65, 7)),
    Shape("turboquant(k=3, v=2, center=32)", "bfloat16", 128, n_batch=2, body=(64, 32), biased=True),
    Shape("turboquant(bits=2, center=16)", "float32", 80, 96, n_queries=130, group=1, n_kv_heads=1, body=16),
    Shape("turboquant(bits=5, center=64)", "float16", 96, group=8, n_kv_heads=1, body=64, mask="bool L"),
    Shape("turboquant(bits=6, scale=norm, center=128)", "float32", 256, 192, n_kv_heads=1, body=128),
    Shape("exact", "float16", 128, n_queries=33, body=33, attention_sinks=True, mask="float16 BHL"),
    Shape("exact", "bfloat16", 80, n_queries=64, group=1, body=(1, 65), biased=True),
    Shape("exact", "float32", 192, n_kv_heads=1, n_batch=2, body=(20, 5), begin=(7, 0)),
    Shape("int(k=4)", "float16", 64, 256, body=35),
    Shape("int(v=2)", "bfloat16", 96, group=3, body=35, attention_sinks=True),
    Shape("kivi(k=2) | turboquant(v=3)", "float32", 128, group=1, body=(32, 64), biased=True, mask="bool HL"),
    Shape("turboquant(k=4) | int(v=8, rotate=hadamard)", "float16", 16, n_queries=50, group=4, body=40),
    Shape("int4(rotate=hadamard)", "float32", 32, 24, group=3, body=33, begin=(6,)),
    Shape("turboquant(bits=4, center=16)", "bfloat16", 200, 136, n_kv_heads=1, body=32, biased=True),
    Shape("int4", "float32", 8, 8, n_queries=40, body=21),
    # Sliding windows: within the tail, into the body, and past the sinks.
    Shape("int4", "float16", 64, n_queries=50, body=100, tail=20, window=7),
    Shape("kivi(bits=2)", "float32", 64, n_queries=33, group=1, body=160, tail=6, window=70),
    Shape("int8", "bfloat16", 256, 128, n_kv_heads=1, group=3, n_queries=30, body=60, sinks=4, tail=9, window=40),
    Shape("turboquant(bits=4)", "float32", 32, n_queries=40, body=40, tail=6, window=46),
    # Without body: a bias, ragged lanes or a mask bring exact rows here.
    Shape("int4", "float16", 128, group=4, n_queries=40, body=0, tail=33, biased=True),
    Shape("exact", "bfloat16", 64, n_batch=2, n_queries=70, group=1, body=0, tail=2, begin=(0, 35)),
    Shape("exact", "float32", 256, n_queries=3, body=0, tail=30, mask="float32 BHL", attention_sinks=True),
]


# What lengths, padding and options are is data: these formats are compiled once.
COMPILED = [
    Shape("int4", "float32", 64),
    Shape("kivi(bits=2, group_size=8)", "float32", 64, biased=True),
    Shape("turboquant(k=3, v=4, center=16)", "float32", 32, 64, attention_sinks=True, mask="bool BHL"),
]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    base = draw(st.sampled_from(COMPILED))
    unit = {"int4": 1, "kivi": 8, "turb": 16}[base.stage[:4]]
    n_batch, n_kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    rows = st.integers(0, 70 // unit).map(lambda n: n * unit)
    return replace(
        base,
        n_batch=n_batch,
        n_kv_heads=n_kv_heads,
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        n_queries=draw(st.integers(1, 40)),
        body=tuple(draw(st.lists(rows, min_size=n_batch * n_kv_heads, max_size=n_batch * n_kv_heads))),
        tail=draw(st.integers(4, 40)),
        sinks=draw(st.integers(0, 4)),
        begin=tuple(draw(st.lists(st.integers(0, 12), min_size=n_batch, max_size=n_batch))),
    )
