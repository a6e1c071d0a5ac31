"""Is what kvmlx computes on this machine right: the shared vectors, and attention over stores of every format.

The vectors hold primitives. Beside them the backend encodes rows, and attends over body and tail, in each of the
model's dtypes; the float64 oracle reads the bytes that are stored and says what must come out. `kvmlx doctor
--selftest` runs this on the user's own machine, through the kernels that its caches take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from kvmlx import checks
from kvmlx import reference as ref
from kvmlx.stages.encode.codecs import Affine, CodeBook, Exact
from kvmlx.store import LayerStore
from kvmlx.strategy import PRESETS, Strategy
from kvmlx.tolerance import Mismatch, assert_close, assert_same
from kvmlx.types import Array, Codec

EXACT = "exact rows"
"""A store whose rows are never encoded."""
EXACT_BODY = "exact body"
"""A body of exact rows, as unequal budgets per head make it."""
FORMATS = (
    EXACT,
    EXACT_BODY,
    *(f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    "int4(rotate=hadamard)",
    "int4(group_size=32)",
    "int(k=8, v=4)",
    "int(v=4)",
    "kivi(bits=2)",
    "kivi(bits=4)",
    "turboquant(bits=1)",
    "turboquant(bits=4)",
    "turboquant(bits=4, scale=norm)",
    "turboquant(bits=6)",
    *PRESETS.values(),
)
DTYPES = ("float32", "float16", "bfloat16")


# The kernels that run


class Recorder:
    """A backend that notes, of each call of a primitive, whether the backend's own kernel took it."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.calls: list[str | None] = []
        """Why plain operations ran, None where a kernel did."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def attend(self, store: LayerStore, queries: Array, **options: Any) -> Array:
        self.calls.append(why_plain(self.backend, "attend", store, queries))
        return self.backend.attend(store, queries, **options)

    def encode(self, codec: Codec, x: Array) -> dict[str, Array]:
        self.calls.append(why_plain(self.backend, "encode", codec, x))
        return self.backend.encode(codec, x)

    def column_sums(self, queries: Array, keys: Array, **options: Any) -> Array:
        self.calls.append(why_plain(self.backend, "column_sums", queries, keys))
        return self.backend.column_sums(queries, keys, **options)


def why_plain(backend: Any, primitive: str, *arguments: Any) -> str | None:
    """Return why ``backend.primitive(*arguments)`` runs in plain operations, None where a kernel takes it.

    A backend with kernels has a method ``why_plain_<primitive>``, by which it chooses itself.
    """
    if backend.path == "plain":
        return f"the backend {backend.name} runs plain operations"
    return getattr(backend, f"why_plain_{primitive}")(*arguments)


# What runs


@dataclass(frozen=True)
class Check:
    """One case: ``run(backend)`` returns the worst error over its limit, or raises."""

    primitive: str
    case: str
    run: Callable[[Any], float]


@dataclass(frozen=True)
class Outcome:
    """What became of a check."""

    check: Check
    ratio: float
    """Worst error over its limit."""
    seconds: float
    kernel_calls: int
    calls: int
    problem: str | None = None
    """What is wrong, None where nothing is."""


def checks_for(backend: Any, *, quick: bool = False) -> list[Check]:
    """Return the checks for a backend; ``quick`` leaves out dtypes and shapes of stores, and no vector."""
    out = [
        Check(name, case, partial(_vector, check=name, case=case))
        for name in checks.CHECKS
        for case in checks.cases_of(name)
    ]
    for shape, dtype in shapes(quick):
        out.append(Check("store", f"{shape.name}-{dtype}", partial(check_store, shape=shape, dtype=dtype)))
    for sums, dtype in product(SUMS, DTYPES):
        out.append(Check("column_sums", f"{sums.name}-{dtype}", partial(check_sums, shape=sums, dtype=dtype)))
    for name in FORMATS[1:]:
        out.append(Check("gather", f"{name}-float32", partial(check_gather, format=name)))
    missing = missing_dtypes(backend)
    return [check for check in out if not check.case.endswith(missing)]


def missing_dtypes(backend: Any) -> tuple[str, ...]:
    """Return the dtypes of models that the backend's framework has not."""
    return tuple(name for name in DTYPES if not hasattr(backend.xp, name))


def run(backend: Any, what: list[Check]) -> Iterator[Outcome]:
    """Run the checks in order, and yield what became of each; an exception is a failure like any other."""
    for check in what:
        recorder, problem = Recorder(backend), None
        begin = time.perf_counter()
        try:
            ratio = check.run(recorder)
        except Mismatch as error:
            ratio, problem = error.ratio, str(error)
        # Whatever a kernel's compiler or the framework raises: the other cases still say something.
        except Exception as error:
            ratio, problem = float("inf"), f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - begin
        calls = recorder.calls
        yield Outcome(check, ratio, seconds, sum(why is None for why in calls), len(calls), problem)


def _vector(backend: Any, check: str, case: str) -> float:
    return checks.CHECKS[check].run(backend, checks.cases_of(check)[case])


# Stores


@dataclass(frozen=True)
class Shape:
    """A store of one format, and the attention over it."""

    format: str
    n_queries: int
    n_batch: int = 2
    n_kv_heads: int = 2
    group: int = 2
    dim: int = 128
    value_dim: int = 0
    """0: the keys'."""
    body: int = 192
    ragged: bool = False
    """Lanes have bodies of unequal lengths, one has none."""
    biased: bool = False
    sinks: bool = False
    """Attention sinks, as logits."""
    mask: str = ""
    """``bool``, ``float`` (additive), ``window`` (the newest WINDOW tokens), or none."""

    @property
    def name(self) -> str:
        d = f"D{self.dim}" + (f"-Dv{self.value_dim}" if self.value_dim else "")
        parts = [self.format, f"B{self.n_batch}-H{self.n_kv_heads}-G{self.group}-L{self.n_queries}", d]
        options = {"ragged": self.ragged, "bias": self.biased, "sinks": self.sinks, self.mask: self.mask}
        return "-".join([*parts, f"body{self.body}", *(name for name, on in options.items() if on)])


def shapes(quick: bool) -> list[tuple[Shape, str]]:
    """Return the stores that are checked, and the model's dtype of each."""
    out = []
    for name in FORMATS:
        variants = [
            Shape(name, 1, group=4),
            Shape(name, 3, ragged=True, biased=True),
            Shape(name, 40, sinks=True, mask="bool"),
            Shape(name, 1, ragged=True, biased=True, sinks=True),
            Shape(name, 3, mask="float"),
            Shape(name, 40, ragged=True, biased=True),
        ]
        if quick:
            out += zip(variants, DTYPES, strict=False)
        else:
            out += product(variants, DTYPES)
    # A long body is read in several splits.
    some = (EXACT, EXACT_BODY, "int3", "int4", "kivi(bits=4)", PRESETS["small"])
    more = [Shape(name, n, n_batch=1, n_kv_heads=1, body=2112) for name in some for n in (1, 40)]
    more += [Shape(name, n, dim=d) for name in ("int4", PRESETS["small"]) for n in (1, 40) for d in (64, 80, 96, 256)]
    more += [Shape("kivi(bits=4)", n, dim=d) for n in (1, 40) for d in (64, 96)]
    more += [Shape(name, n, dim=192, value_dim=128) for name in ("int4", EXACT_BODY) for n in (1, 40)]
    more += [Shape(name, n, mask="window") for name in ("int4", EXACT) for n in (1, 3, 40)]
    more += [Shape("int4", n, n_batch=1, n_kv_heads=1, group=8) for n in (1, 8)]
    return out + [(shape, "float32") for shape in more[::3]] if quick else out + list(product(more, DTYPES))


WINDOW = 100
SINKS = 4
TAIL = 70
"""Rows of a tail before the queries' own: not a multiple of anything."""


def check_store(backend: Any, shape: Shape, dtype: str) -> float:
    """Fill a store as a cache does, and compare the codes and the attention over it with the oracle's."""
    rng = np.random.default_rng([len(shape.name), *shape.name.encode()])
    b, h, d, dv, n = shape.n_batch, shape.n_kv_heads, shape.dim, shape.value_dim or shape.dim, shape.n_queries
    codecs = None
    if shape.format != EXACT:
        codecs = (None, None) if shape.format == EXACT_BODY else Strategy.parse(shape.format).codecs()
    store = LayerStore(backend, codecs, sinks=SINKS if codecs else 0, columns=("bias",) if shape.biased else ())
    lengths = _lengths(shape, codecs)
    before = int(lengths.max()) + TAIL
    # As keys are: a few loud channels, and a mean.
    loud = np.where(rng.random(d) < 0.05, 6.0, 1.0)
    keys = rounded(rng.standard_normal((b, h, before + n, d)) * loud + rng.standard_normal(d), dtype)
    values = rounded(rng.standard_normal((b, h, before + n, dv)), dtype)
    queries = rounded(rng.standard_normal((b, h * shape.group, n, d)) * 1.5, dtype)
    given = partial(_given, backend, dtype)

    store.append(given(keys[:, :, :before]), given(values[:, :, :before]))
    bias = None
    if shape.biased:
        bias = np.abs(rng.standard_normal((b, h, before + n))).astype(np.float32)
        _set_bias(store, bias[:, :, :before])
    if codecs:
        # In two steps: what is encoded later joins what lies there.
        half = lengths // 2 // store.unit * store.unit
        store.encode_oldest(half)
        store.encode_oldest(lengths - half)
    elif shape.ragged:
        store.begin = store.begin + lengths
    store.append(given(keys[:, :, before:]), given(values[:, :, before:]))
    if bias is not None:
        _set_bias(store, bias)
    ratio = max(_check_planes(store, side, x) for side, x in (("keys", keys), ("values", values)))

    mask = _mask(rng, shape, before + n, dtype)
    options: dict[str, Any] = {}
    if mask is not None:
        options["mask"] = given(mask) if shape.mask == "float" else backend.from_numpy(mask)
    if shape.mask == "window":
        options["window"] = WINDOW
    sinks = rounded(rng.standard_normal(h * shape.group), dtype) if shape.sinks else None
    if sinks is not None:
        options["sinks"] = given(sinks)
    scale = float(np.float32(d**-0.5))
    out = store.backend.attend(store, given(queries), scale=scale, **options)
    name = str(out.dtype).rpartition(".")[2]
    if name != dtype:
        raise Mismatch(f"attention returned {name}, expected the queries' {dtype}")
    rows = _Held(store, backend, keys, values, bias)
    added = mask if mask is None or mask.dtype != bool else np.where(mask, 0.0, -np.inf)
    want = rows.attend(queries, scale, sinks, added)
    if dtype == "float32":
        plain = np.stack([rows.attend(queries, scale, sinks, added, "float32", seed) for seed in range(checks.ORDERS)])
    else:
        plain = rows.attend(queries, scale, sinks, added, dtype)
    return max(ratio, assert_close(_read(backend, out), want, plain, dtype=dtype, name="attention"))


def _mask(rng: np.random.Generator, shape: Shape, held: int, dtype: str) -> np.ndarray | None:
    """Return a mask ``[1 or B, 1 or Hq, L, T]`` of its kind, or None."""
    b, hq, n = shape.n_batch, shape.n_kv_heads * shape.group, shape.n_queries
    if shape.mask == "bool":
        return rng.random((b, 1, n, held)) < 0.7
    if shape.mask == "float":
        return rounded(rng.standard_normal((1, hq, n, held)), dtype)
    if shape.mask == "window":
        ahead = np.arange(n)[:, None] + held - n - np.arange(held)
        return ((ahead >= 0) & (ahead < WINDOW))[None, None]
    return None


def _lengths(shape: Shape, codecs: tuple[Codec | None, Codec | None] | None) -> np.ndarray:
    """Return the rows of each lane's body, ``[B, H]``."""
    n_lanes = shape.n_batch * shape.n_kv_heads
    unit = max([c.block for c in codecs or () if c is not None], default=1)
    whole = shape.body // unit * unit
    lengths = np.full(n_lanes, whole)
    if shape.ragged:
        # The last lane's body is the longest; 65 rows are one more than a span's step.
        lengths = np.resize(np.array([65 if unit == 1 else unit, 0, 1 if unit == 1 else 2 * unit, whole]), n_lanes)
    return lengths.reshape(shape.n_batch, shape.n_kv_heads).astype(np.int64)


def _set_bias(store: LayerStore, bias: np.ndarray) -> None:
    """Give the tail's rows their bias: ``bias [B, H, n]`` by position."""
    b, h, capacity = store.columns["bias"].shape
    out = np.zeros((b, h, capacity), np.float32)
    for i in range(b):
        for j in range(h):
            rows = _positions(store, i, j)
            n_body = int(store.length[i, j])
            sinks = store.sinks if n_body else 0
            tail = np.concatenate([rows[:sinks], rows[sinks + n_body :]])
            tail = tail[tail < bias.shape[2]]
            at = int(store.begin[i, j])
            out[i, j, at : at + len(tail)] = bias[i, j, tail]
    store.columns["bias"], store.biased = store.backend.from_numpy(out), True


def _positions(store: LayerStore, i: int, j: int) -> np.ndarray:
    """Return the token of each row of a lane, in logical order: a lane without body may lack its first."""
    n = int(store.lengths[i, j])
    return np.arange(n) + (int(store.begin[i, j]) if not store.given_codecs else 0)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return ``x`` rounded to the numbers of ``dtype``, as float32."""
    if dtype == "float32":
        return x.astype(np.float32)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _given(backend: Any, dtype: str, x: np.ndarray) -> Array:
    return backend.xp.astype(backend.from_numpy(x), getattr(backend.xp, dtype))


def _read(backend: Any, x: Array) -> np.ndarray:
    return backend.to_numpy(backend.xp.astype(x, backend.xp.float32))


def check_gather(backend: Any, format: str) -> float:
    """Evict rows from a body, unequally by lane, and compare what stays bit by bit."""
    rng = np.random.default_rng(0)
    b, h, d, n = 2, 2, 64, 512
    codecs = (None, None) if format == EXACT_BODY else Strategy.parse(format).codecs()
    store = LayerStore(backend, codecs, columns=("sums",))
    store.append(*(_given(backend, "float32", rng.standard_normal((b, h, n, d)).astype(np.float32)) for _ in "kv"))
    store.columns["sums"] = backend.from_numpy(rng.random((b, h, store.keys.shape[2])).astype(np.float32))
    store.encode_oldest(np.full((b, h), n))
    before = {name: backend.to_numpy(plane) for name, plane in store.planes.items()}
    start, unit, rows = store.start.ravel(), store.unit, dict(store._periods())
    units = n // unit
    kept = [np.sort(rng.permutation(units)[:count]) for count in (units, units // 2, 1, 0)]
    store.retain_body(kept)
    for name, plane in store.planes.items():
        after, per = backend.to_numpy(plane), unit // rows[name]
        for lane, (old, new) in enumerate(zip(start, store.start.ravel(), strict=True)):
            index = (kept[lane][:, None] * per + np.arange(per)).ravel()
            got = after[new // rows[name] : new // rows[name] + len(index)]
            assert_same(got, before[name][old // rows[name] + index], name=f"{name} of lane {lane}")
    return 0.0


# What a store holds, by docs/format.md


class _Held:
    """The rows of a store as the oracle reads them: lane by lane, decoded from the bytes."""

    def __init__(
        self, store: LayerStore, backend: Any, keys: np.ndarray, values: np.ndarray, bias: np.ndarray | None
    ) -> None:
        self.store, self.bias = store, bias
        self.exact: dict[str, np.ndarray] = {"keys": keys, "values": values}
        self.codecs: dict[str, Codec | None] = dict(zip(("keys", "values"), store.codecs or (None, None), strict=True))
        self.planes = {name: backend.to_numpy(plane) for name, plane in store.planes.items()}
        self.body = {(side, d): self._decode(side, d) for side in self.exact for d in (np.float64, np.float32)}

    def _decode(self, side: str, dtype: type) -> np.ndarray:
        """Return all entries of the body, in the codec's basis."""
        codec, dim = self.codecs[side], self.exact[side].shape[-1]
        if codec is None or not self.planes:
            return np.zeros((0, dim), dtype)
        planes = {p.name: self.planes[f"{side}.{p.name}"] for p in codec.planes(dim)}
        return decode(codec, planes, dim, dtype)

    def attend(
        self,
        queries: np.ndarray,
        scale: float,
        sinks: np.ndarray | None,
        added: np.ndarray | None,
        dtype: str = "float64",
        seed: int | None = None,
    ) -> np.ndarray:
        """Return ``[B, Hq, L, Dv]``: in float64, or plainly in a lower precision with sums in the order of ``seed``.

        A precision below float32 rounds rows, logits, weights and result, and sums in float32.
        """
        b, hq, n, _ = queries.shape
        h = self.exact["keys"].shape[1]
        out = np.zeros((b, hq, n, self.exact["values"].shape[-1]))
        for i, j in np.ndindex(b, h):
            heads = slice(j * hq // h, (j + 1) * hq // h)
            mask = None
            if added is not None:
                wide = np.broadcast_to(added, (b, hq, *added.shape[2:]))
                mask = wide[i, heads]
            sink = None if sinks is None else sinks[heads]
            out[i, heads] = _attend(self._lane(i, j, dtype), queries[i, heads], scale, sink, mask, dtype, seed)
        return out

    def _lane(self, i: int, j: int, dtype: str) -> _Lane:
        store, t = self.store, np.float64 if dtype == "float64" else np.float32
        positions = _positions(store, i, j)
        n_body = int(store.length[i, j])
        cut = slice(store.sinks, store.sinks + n_body) if n_body else slice(0, 0)
        at = int(store.start[i, j])
        body = {side: self.body[side, t][at : at + n_body] for side in self.exact}
        tail = np.delete(positions, np.arange(len(positions))[cut])
        exact = {side: x[i, j, tail].astype(t) for side, x in self.exact.items()}
        order = np.concatenate([np.arange(len(positions))[cut], np.delete(np.arange(len(positions)), cut)])
        bias = None if self.bias is None else self.bias[i, j, positions[order]].astype(t)
        return _Lane(body, exact, bias, order, {s: rotated(c) for s, c in self.codecs.items()})


@dataclass(frozen=True)
class _Lane:
    """One head's rows: those of the body in their codec's basis, then the exact ones."""

    body: dict[str, np.ndarray]
    tail: dict[str, np.ndarray]
    bias: np.ndarray | None
    order: np.ndarray
    """Place in the logical order of each row here."""
    rotated: dict[str, bool]


def rotated(codec: Codec | None) -> bool:
    return getattr(codec, "rotation", "none") != "none"


IN_ORDER = 2
"""Orders of the plain float32 implementation in which a logit is summed channel by channel, as a BLAS does not."""


def _in_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``x [G, L, D]`` times ``y [D, T]``, one channel after another."""
    out = np.zeros((*x.shape[:-1], y.shape[1]), x.dtype)
    for c in range(len(y)):
        out += x[..., c, None] * y[c]
    return out


@cache
def _rotation(dim: int, dtype: type) -> np.ndarray:
    return ref.rotate(np.eye(dim), ref.SIGN_SEED, dtype)


def _attend(
    lane: _Lane,
    queries: np.ndarray,
    scale: float,
    sinks: np.ndarray | None,
    mask: np.ndarray | None,
    dtype: str,
    seed: int | None,
) -> np.ndarray:
    """Return ``[G, L, Dv]`` of ``queries [G, L, D]`` over a lane; ``sinks [G]``, ``mask [G, L, T]`` is added."""
    t: Any = np.float64 if dtype == "float64" else np.float32
    low = (lambda x: rounded(x, dtype)) if dtype in ("float16", "bfloat16") else (lambda x: x)
    n, dim, held = *queries.shape[1:], len(lane.order)
    n_body, value_dim = lane.body["values"].shape
    channels, outputs, rows = np.arange(dim), np.arange(value_dim), np.arange(held)
    if seed is not None:
        rng = np.random.default_rng(seed)
        channels, outputs, rows = (rng.permutation(x) for x in (channels, outputs, rows))

    # Some scale the queries, some the logits: both are plain.
    first, then = (t(scale), t(1)) if seed is not None and seed % 2 else (t(1), t(scale))
    q = queries.astype(t)[..., channels] * first
    turned = q
    if n_body and lane.rotated["keys"]:
        turned = (q @ _rotation(dim, t)[channels])[..., channels]
    parts = [(turned, lane.body["keys"]), (q, lane.tail["keys"])]
    product_of = _in_order if seed is not None and seed < IN_ORDER else np.matmul
    s = low(np.concatenate([product_of(low(x), low(k[:, channels]).T) for x, k in parts], axis=-1) * then)
    if lane.bias is not None:
        s = s + lane.bias
    s = np.where(lane.order <= np.arange(n)[:, None] + held - n, s, t(-np.inf))
    if mask is not None:
        s = s + mask[..., lane.order].astype(t)
    peak = s.max(axis=-1, keepdims=True)
    sink = t(-np.inf) if sinks is None else sinks.astype(t)[:, None, None]
    peak = np.maximum(peak, sink)
    peak = np.where(np.isfinite(peak), peak, t(0))
    weights = np.exp(s - peak)[..., rows]
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - peak)
    weights = low(weights / np.where(total > 0, total, t(1)))
    inside = rows < n_body
    out = weights[..., inside] @ low(lane.body["values"])[rows[inside]]
    if n_body and lane.rotated["values"]:
        out = out[..., outputs] @ _rotation(value_dim, t).T[outputs]
    return low(out + weights[..., ~inside] @ low(lane.tail["values"])[rows[~inside] - n_body])


def decode(codec: Codec, planes: dict[str, np.ndarray], dim: int, dtype: type) -> np.ndarray:
    """Return the rows ``[n, dim]`` of planes, in the codec's basis, by the oracle."""
    if isinstance(codec, Exact):
        rows = planes["rows"]
        if codec.dtype == "bfloat16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(dtype)
    codes = _codes(planes, codec.bits, dim)
    if isinstance(codec, CodeBook):
        return ref.codebook_decode(codes, planes["scales"], planes.get("means"), codec.bits, dtype)
    function = ref.affine_decode if isinstance(codec, Affine) else ref.channel_decode
    return function(codes, planes["scales"], planes["zeros"], dtype)


def _codes(planes: dict[str, np.ndarray], bits: int, dim: int) -> np.ndarray:
    return ref.unpack([planes[name] for name in sorted(planes) if name.startswith("codes")], bits, dim)


NEAR = {"affine": 1e-3, "threshold": 2e-5}
"""Distance from a border, in steps of a code and in units of the code book, below which a code may fall either way."""

MOST_BETWEEN = 0.01
"""Share of float16 roundings that may fall either way: float32 tells about one in a thousand not apart."""


def _check_planes(store: LayerStore, side: str, x: np.ndarray) -> float:
    """Compare what was encoded with the oracle's codes of the same rows; return 0.

    These rows were not drawn with margins, as the vectors' were: where a number stands at a border the backend may
    decide either way. Everywhere else codes are equal; metadata are equal but for a few neighbours.
    """
    if not store.has_body:
        return 0.0
    codec, dim = store.codecs[0 if side == "keys" else 1] if store.codecs else None, x.shape[-1]
    assert codec is not None
    for i, j in np.ndindex(*store.length.shape):
        n, at = int(store.length[i, j]), int(store.start[i, j])
        if not n:
            continue
        rows = x[i, j, store.sinks : store.sinks + n]
        planes = {}
        for spec in codec.planes(dim):
            held = store.backend.to_numpy(store.planes[f"{side}.{spec.name}"])
            planes[spec.name] = held[at // spec.rows : (at + n) // spec.rows]
        name = f"{side} of lane {i}, {j}"
        if isinstance(codec, Exact):
            assert_same(decode(codec, planes, dim, np.float32), rows, name=name)
        else:
            _check_codes(codec, planes, rows, name)
    return 0.0


def _check_codes(codec: Any, planes: dict[str, np.ndarray], rows: np.ndarray, name: str) -> None:
    dim, bits = rows.shape[-1], codec.bits
    y = ref.rotate(rows, ref.SIGN_SEED) if rotated(codec) else rows.astype(np.float64)
    every = np.ones(rows.shape, bool)
    if isinstance(codec, CodeBook):
        unit, codes, scales, means = ref.codebook_parts(y, bits, scale=codec.scale, center=codec.center)
        near = (np.abs(unit[..., None] - np.array(ref.lloyd_max(bits)[1])) < NEAR["threshold"]).any(axis=-1)
        comparable = every
        if means is not None:
            _check_halves(planes["means"], means, f"means of {name}")
            same = (planes["means"] == means).all(axis=-1, keepdims=True)
            comparable = every & np.repeat(same, codec.center, axis=0)
        # The scale is made from the codes: of a row with one at a border it is either's.
        decided = comparable[:, :1] & ~near.any(axis=-1, keepdims=True)
        _check_halves(planes["scales"], ref.to_half(scales), f"scales of {name}", decided)
    else:
        group = codec.group(dim) if isinstance(codec, Affine) else codec.group_size
        encode = ref.affine_real_codes if isinstance(codec, Affine) else ref.channel_real_codes
        real, scales, zeros = encode(y, bits, group)
        _check_halves(planes["scales"], scales, f"scales of {name}")
        _check_halves(planes["zeros"], zeros, f"zeros of {name}")
        real = np.clip(real, 0, 2**bits - 1)
        codes = np.rint(real).astype(np.uint8)
        near = np.abs(real - np.floor(real) - 0.5) < NEAR["affine"]
        same = (planes["scales"] == scales) & (planes["zeros"] == zeros)
        comparable = every & np.repeat(same, group, axis=-1 if isinstance(codec, Affine) else 0)
    got = _codes(planes, bits, dim)
    wrong = comparable & ~near & (got != codes)
    if wrong.any():
        first = tuple(int(k) for k in np.argwhere(wrong)[0])
        raise Mismatch(
            f"codes of {name}: {int(wrong.sum())} of {wrong.size} differ, first at {first}: "
            f"{got[first]}, expected {codes[first]}"
        )


def _check_halves(got: np.ndarray, want: np.ndarray, name: str, where: np.ndarray | None = None) -> None:
    """Require float16 numbers to be equal, but for a few that are neighbours: they stood between the two."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise Mismatch(f"{name}: {got.dtype} {got.shape}, expected {want.dtype} {want.shape}")
    differ = got != want if where is None else (got != want) & where
    spacing = np.spacing(np.maximum(np.abs(got), np.abs(want))).astype(np.float64)
    far = differ & ~(np.abs(got.astype(np.float64) - want) <= spacing)
    if far.any() or differ.sum() > MOST_BETWEEN * differ.size + 2:
        first = tuple(int(k) for k in np.argwhere(far if far.any() else differ)[0])
        raise Mismatch(
            f"{name}: {int(differ.sum())} of {differ.size} differ, such as at {first}: "
            f"{got[first]!r}, expected {want[first]!r}"
        )


# Column sums in the model's dtypes


@dataclass(frozen=True)
class Sums:
    """Queries over keys that each receive attention."""

    n_queries: int
    n_keys: int
    group: int = 4
    dim: int = 128
    biased: bool = False
    counted: bool = False
    n_batch: int = 2
    n_kv_heads: int = 2

    @property
    def name(self) -> str:
        options = "".join(f"-{name}" for name in ("biased", "counted") if getattr(self, name))
        return f"G{self.group}-L{self.n_queries}-T{self.n_keys}-D{self.dim}{options}"


SUMS = (
    Sums(32, 600),
    Sums(1, 600, biased=True),
    Sums(200, 200, group=2, dim=64),
    Sums(33, 1100, group=8, counted=True),
    Sums(17, 65, group=3, dim=96, biased=True, counted=True),
)


def check_sums(backend: Any, shape: Sums, dtype: str) -> float:
    """Compare the attention that keys of the model's dtype receive with the oracle's."""
    rng = np.random.default_rng([len(shape.name), *shape.name.encode()])
    b, h, d = shape.n_batch, shape.n_kv_heads, shape.dim
    queries = rounded(rng.standard_normal((b, h * shape.group, shape.n_queries, d)) * 1.5, dtype)
    keys = rounded(rng.standard_normal((b, h, shape.n_keys, d)), dtype)
    options: dict[str, Any] = {}
    if shape.biased:
        bias = rng.standard_normal((b, h, shape.n_keys)).astype(np.float32)
        bias[:, :, :: shape.n_keys // 9] = -np.inf
        bias[:, :, shape.n_keys - shape.n_queries :] = 0
        options["bias"] = bias
    if shape.counted:
        options["n_queries"] = np.array([shape.n_queries, shape.n_queries // 2], np.int32)
    scale = float(np.float32(d**-0.5))
    given = {name: backend.from_numpy(x) for name, x in options.items()}
    out = backend.column_sums(_given(backend, dtype, queries), _given(backend, dtype, keys), scale=scale, **given)
    want = ref.column_sums(queries, keys, scale=scale, **options)
    plain = []
    for seed in range(checks.ORDERS):
        channels = np.random.default_rng(seed).permutation(d)
        first, then = (np.float32(scale), 1.0) if seed % 2 else (np.float32(1), scale)
        turned = (queries[..., channels] * first, keys[..., channels])
        plain.append(ref.column_sums(*turned, scale=then, **options, dtype=np.float32))
    return assert_close(_read(backend, out), want, np.stack(plain), name="sums")
