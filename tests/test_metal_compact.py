"""The kernel of compact.metal, executed off-Mac."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlx.backends.mlx.metal import loader
from kvmlx.backends.mlx.metal.compact import compact
from kvmlx.backends.mlx.ops import BACKEND
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.tolerance import assert_same
from tests.metal import device as harness
from tests.metal.device import Device, Launch


@pytest.fixture(params=[0, 1], ids=["ascending", "shuffled"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Run kernels off-Mac, lanes in one order or another; return what each launch did."""
    runs: list[Launch] = []

    def launch(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        names = {"input_names": kernel.inputs, "output_names": kernel.outputs}
        runs.append(Device(seed=request.param).launch(kernel.function, **names, **arguments))
        return runs[-1].outputs

    monkeypatch.setattr(loader, "launch", launch)
    return runs


def bytes_of(x: mx.array) -> np.ndarray:
    """Return ``[entries, bytes]``: bfloat16 too, and what compares as different though it is the same, such as NaN."""
    return np.array(x.view(mx.uint8)) if x.dtype != mx.bool_ else np.array(x).view(np.uint8)


def noise(rng: np.random.Generator, entries: int, width: int, dtype: mx.Dtype) -> mx.array:
    """Return random bytes as an array, without a zero byte: head-room must come out as zeros."""
    if dtype == mx.bool_:
        return mx.ones((entries, width), mx.bool_)
    raw = mx.array(rng.integers(1, 256, (entries, width * dtype.size)).astype(np.uint8))
    return raw.view(dtype)


def gathered(
    source: np.ndarray, starts: np.ndarray, units: list[np.ndarray], spans: np.ndarray, per: int
) -> np.ndarray:
    """Return what should come out, entry by entry."""
    out = np.zeros((int(spans.sum()) * per, source.shape[1]), np.uint8)
    at = 0
    for start, kept, span in zip(starts, units, spans, strict=True):
        for i, unit in enumerate(kept):
            for j in range(per):
                out[(at + i) * per + j] = source[(start + unit) * per + j]
        at += span
    return out


def check(
    device: list[Launch],
    plane: mx.array,
    starts: np.ndarray,
    units: list[np.ndarray],
    spans: np.ndarray,
    per: int,
    fresh: mx.array | None = None,
) -> None:
    device.clear()
    more = None if fresh is None else {"plane": fresh}
    got = compact({"plane": plane}, starts, units, spans, per={"plane": per}, fresh=more)["plane"]
    assert got.dtype == plane.dtype and got.shape == (spans.sum() * per, plane.shape[1])
    source = bytes_of(plane) if fresh is None else np.concatenate([bytes_of(plane), bytes_of(fresh)])
    assert_same(bytes_of(got), gathered(source, starts, units, spans, per))
    (run,) = device
    kept = sum(map(len, units)) * per * source.shape[1]
    assert run.read["plane"] + run.read["fresh"] == kept
    assert run.written["out"] == run.unique_written["out"] == got.nbytes


# Width and dtype of an entry, entries of a unit: words of 1, 2, 4, 8 and 16 bytes.
ENTRIES = [
    (1, mx.uint8, 1),
    (3, mx.uint8, 5),
    (1, mx.bool_, 2),
    (1, mx.float16, 1),
    (1, mx.float16, 3),
    (5, mx.bfloat16, 1),
    (1, mx.float32, 1),
    (1, mx.float32, 32),
    (3, mx.float16, 4),
    (20, mx.uint8, 1),
    (24, mx.uint8, 1),
    (40, mx.uint8, 32),
    (64, mx.uint8, 1),
    (128, mx.float16, 1),
    (80, mx.uint16, 2),
]


@pytest.mark.parametrize(("width", "dtype", "per"), ENTRIES, ids=str)
@pytest.mark.parametrize("extended", [False, True], ids=["", "fresh"])
def test_entries(device: list[Launch], width: int, dtype: mx.Dtype, per: int, extended: bool) -> None:
    rng = np.random.default_rng(width)
    plane = noise(rng, 40 * per, width, dtype)
    fresh = noise(rng, 6 * per, width, dtype) if extended else None
    starts = np.array([0, 7, 7, 30])
    units = [np.array([0, 2, 3]), np.arange(20), np.zeros(0, np.int64), np.array([1, 9])]
    if extended:
        units[0] = np.append(units[0], [40, 41])
        units[3] = np.append(units[3], [14, 15])
    spans = np.array([8, 20, 3, 4])
    check(device, plane, starts, units, spans, per, fresh)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), entry=st.sampled_from(ENTRIES[3:]))
def test_any_lanes(device: list[Launch], data: st.DataObject, entry: tuple[int, mx.Dtype, int]) -> None:
    width, dtype, per = entry
    lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    starts = np.cumsum(lengths) - lengths
    units = [np.flatnonzero(rng.random(n) < rng.random()) for n in lengths]
    spans = np.array([len(u) + int(rng.integers(0, 9)) for u in units])
    spans[0] += not spans.any()
    check(device, noise(rng, max(1, sum(lengths)) * per, width, dtype), starts, units, spans, per)


def test_planes_share_what_describes_the_move(device: list[Launch]) -> None:
    rng = np.random.default_rng(0)
    planes = {"codes0": noise(rng, 128, 32, mx.uint8), "scales": noise(rng, 2, 64, mx.float16)}
    per = {"codes0": 64, "scales": 1}
    starts, units, spans = np.array([1, 0]), [np.array([0]), np.array([0])], np.array([1, 2])
    got = compact(planes, starts, units, spans, per=per)
    for name, plane in planes.items():
        assert_same(bytes_of(got[name]), gathered(bytes_of(plane), starts, units, spans, per[name]), name=name)
    assert len(device) == 2


def test_nothing_kept(device: list[Launch]) -> None:
    plane = mx.ones((8, 4), mx.float16)
    none = np.zeros(0, np.int64)
    got = compact({"x": plane}, np.array([0, 4]), [none, none], np.array([0, 0]), per={"x": 1})["x"]
    assert got.shape == (0, 4) and got.dtype == mx.float16 and not device
    got = compact({"x": plane}, np.array([0, 4]), [none, none], np.array([2, 1]), per={"x": 2})["x"]
    assert_same(np.array(got), np.zeros((6, 4), np.float16))


def test_refusals(device: list[Launch]) -> None:
    plane = {"x": mx.ones((9, 4))}
    with pytest.raises(ValueError, match="lane 1 keeps 3 units, but its span has 2"):
        compact(plane, np.array([0, 4]), [np.arange(2), np.arange(3)], np.array([2, 2]), per={"x": 1})
    with pytest.raises(ValueError, match="x has 9 entries, not a multiple of the 2 of a unit"):
        compact(plane, np.array([0]), [np.arange(2)], np.array([2]), per={"x": 2})
    with pytest.raises(ValueError, match="unit 9 is to be kept, but x has 9"):
        compact(plane, np.array([0, 4]), [np.arange(2), np.array([1, 5])], np.array([2, 2]), per={"x": 1})
    assert not device


def test_lengths_compile_nothing_anew(device: list[Launch]) -> None:
    plane = noise(np.random.default_rng(0), 64, 16, mx.uint8)
    check(device, plane, np.array([0]), [np.arange(3)], np.array([4]), 1)
    known = len(harness._COMPILED)
    check(device, plane[:50], np.array([0, 3, 30]), [np.arange(9)] * 3, np.array([9, 10, 40]), 1)
    assert len(harness._COMPILED) == known


def store_of(stage: str, n_batch: int, n_kv_heads: int, n: int, dim: int = 64) -> LayerStore:
    """Return a store that has encoded nearly all of its rows."""
    store = LayerStore(BACKEND, Strategy.parse(stage).codecs(), columns=("bias",))
    rng = np.random.default_rng(n)
    keys, values = (mx.array(rng.standard_normal((n_batch, n_kv_heads, n, dim)).astype(np.float16)) for _ in range(2))
    store.append(keys, values)
    store.columns["bias"] = mx.array(rng.standard_normal(store.columns["bias"].shape).astype(np.float32))
    counts = np.full((n_batch, n_kv_heads), n // store.unit * store.unit)
    store.encode_oldest(counts)
    return store


STAGES = ["int4", "int3", "kivi(bits=2)", "turboquant(bits=3, center=64)", "turboquant(k=4)", "int(k=8, v=16)"]


@pytest.mark.parametrize("stage", STAGES)
def test_retained_bodies(device: list[Launch], stage: str) -> None:
    """What LayerStore.retain_body keeps: the same rows in every plane, and twice, from ragged to ragged."""
    store = store_of(stage, 2, 2, 256)
    rng = np.random.default_rng(1)
    for share in (0.7, 0.5):
        unit, starts, planes = store.unit, store.start.ravel(), dict(store.planes)
        units = [np.flatnonzero(rng.random(n // unit) < share) for n in store.length.ravel()]
        units[1] = units[1][:1]
        per = {name: unit // period for name, period in store._periods().items()}
        store.retain_body(units)
        got = compact(planes, starts // unit, units, store.span.ravel() // unit, per=per)
        compare(store, got)


@pytest.mark.parametrize("stage", STAGES)
def test_extended_bodies(device: list[Launch], stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What LayerStore appends to some lanes of a ragged body, without joining old and new first."""
    store = store_of(stage, 1, 4, 256)
    unit = store.unit
    store.retain_body([np.arange(n) for n in (3, 1, 2, 1)])
    n, lanes = 2 * unit, np.array([0, 2])
    keys, values = (mx.array(np.random.default_rng(i).standard_normal((1, 4, n, 64))) for i in range(2))
    store.append(keys.astype(mx.float16), values.astype(mx.float16))
    new: dict[str, mx.array] = {}
    encode_rows = LayerStore._encode_rows

    def seen(*args: Any) -> dict[str, mx.array]:
        new.update(encode_rows(*args))
        return dict(new)

    monkeypatch.setattr(LayerStore, "_encode_rows", seen)
    planes, starts, held = dict(store.planes), store.start.ravel() // unit, store.length.ravel() // unit
    base = int(store.span.sum()) // unit
    store.encode_oldest(np.where(np.isin(np.arange(4), lanes), n, 0).reshape(1, 4))
    fresh = {name: plane.reshape(-1, plane.shape[-1]) for name, plane in new.items()}
    units = [np.arange(length) for length in held]
    for i, lane in enumerate(lanes):
        units[lane] = np.append(units[lane], base + 2 * i + np.arange(2) - starts[lane])
    per = {name: unit // period for name, period in store._periods().items()}
    compare(store, compact(planes, starts, units, store.span.ravel() // unit, per=per, fresh=fresh))


def compare(store: LayerStore, got: dict[str, mx.array]) -> None:
    assert set(got) == set(store.planes)
    for name, period in store._periods().items():
        assert got[name].shape == store.planes[name].shape
        have, want = bytes_of(got[name]), bytes_of(store.planes[name])
        for at, length in zip(store.start.flat, store.length.flat, strict=True):
            rows = slice(int(at) // period, int(at + length) // period)
            assert_same(have[rows], want[rows], name=name)
