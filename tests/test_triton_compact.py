"""The Triton kernel of compact. Interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.tolerance import assert_same

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvmlx.backends.torch.ops import on  # noqa: E402
from kvmlx.backends.torch.triton.compact import DTYPES, compact, config_of, configurations  # noqa: E402
from kvmlx.backends.torch.triton.launch import recording  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND: Any = on(DEVICE)


def bytes_of(x: Any) -> np.ndarray:
    """Return ``[entries, bytes]``: of bfloat16 too, and of what compares as different though it is the same (NaN)."""
    return x.contiguous().view(torch.uint8).cpu().numpy()


def noise(rng: np.random.Generator, entries: int, width: int, dtype: Any) -> Any:
    """Return random bytes as an array, without a zero byte: head-room must come out as zeros."""
    if dtype == torch.bool:
        return torch.ones((entries, width), dtype=torch.bool, device=DEVICE)
    raw = rng.integers(1, 256, (entries, width * dtype.itemsize)).astype(np.uint8)
    return torch.from_numpy(raw).to(DEVICE).view(dtype)


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
    plane: Any,
    starts: np.ndarray,
    units: list[np.ndarray],
    spans: np.ndarray,
    per: int,
    fresh: Any = None,
    **options: Any,
) -> None:
    more = None if fresh is None else {"plane": fresh}
    got = compact({"plane": plane}, starts, units, spans, per={"plane": per}, fresh=more, **options)["plane"]
    assert got.dtype == plane.dtype and got.shape == (spans.sum() * per, plane.shape[1])
    source = bytes_of(plane) if fresh is None else np.concatenate([bytes_of(plane), bytes_of(fresh)])
    assert_same(bytes_of(got), gathered(source, starts, units, spans, per))


# Width and dtype of an entry, entries of a unit: words of 1, 2 and 4 bytes, and 1, 2 and 4 of these in one access.
ENTRIES = [
    (1, torch.uint8, 1),
    (3, torch.uint8, 5),
    (1, torch.bool, 2),
    (1, torch.float16, 1),
    (1, torch.float16, 3),
    (5, torch.bfloat16, 1),
    (1, torch.float32, 1),
    (1, torch.float32, 32),
    (3, torch.float16, 4),
    (20, torch.uint8, 1),
    (24, torch.uint8, 1),
    (40, torch.uint8, 32),
    (64, torch.uint8, 1),
    (128, torch.float16, 1),
    (80, torch.uint16, 2),
]


@pytest.mark.parametrize(("width", "dtype", "per"), ENTRIES, ids=str)
@pytest.mark.parametrize("extended", [False, True], ids=["", "fresh"])
def test_entries(width: int, dtype: Any, per: int, extended: bool) -> None:
    rng = np.random.default_rng(width)
    plane = noise(rng, 40 * per, width, dtype)
    fresh = noise(rng, 6 * per, width, dtype) if extended else None
    starts = np.array([0, 7, 7, 30])
    units = [np.array([0, 2, 3]), np.arange(20), np.zeros(0, np.int64), np.array([1, 9])]
    if extended:
        units[0] = np.append(units[0], [40, 41])
        units[3] = np.append(units[3], [14, 15])
    spans = np.array([8, 20, 3, 4])
    check(plane, starts, units, spans, per, fresh)


@pytest.mark.parametrize("seed", range(40))
def test_any_lanes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, dtype, per = ENTRIES[3 + seed % (len(ENTRIES) - 3)]
    lengths = rng.integers(0, 91, rng.integers(1, 7))
    starts = np.cumsum(lengths) - lengths
    units = [np.flatnonzero(rng.random(n) < rng.random()) for n in lengths]
    spans = np.array([len(u) + int(rng.integers(0, 9)) for u in units])
    spans[0] += not spans.any()
    check(noise(rng, max(1, int(lengths.sum())) * per, width, dtype), starts, units, spans, per)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_planes_and_fresh_rows_cut_from_others(offset: int) -> None:
    """Where they start decides how wide the words are."""
    rng = np.random.default_rng(offset)
    plane = noise(rng, 48, 16, torch.uint8).reshape(-1)[offset : offset + 40 * 16].reshape(40, 16)
    fresh = noise(rng, 16, 16, torch.uint8)[offset : offset + 6]
    units = [np.array([0, 3, 41]), np.arange(2, 30)]
    check(plane, np.array([0, 10]), units, np.array([4, 30]), 1, fresh)
    tokens_first = noise(rng, 16, 40, torch.uint8).T
    check(tokens_first, np.array([0, 10]), [units[0][:2], units[1]], np.array([4, 30]), 1)


@pytest.mark.parametrize(("width", "dtype", "per"), [ENTRIES[0], ENTRIES[11]], ids=str)
def test_configurations_give_the_same(width: int, dtype: Any, per: int) -> None:
    """What a sweep may choose among."""
    words = width * per // next(n for n in DTYPES if width * per % n == 0)
    found = configurations(words)
    assert found[0] == config_of(words) and len(found) == len(set(found)) > 3
    plane = noise(np.random.default_rng(0), 64 * per, width, dtype)
    for config in {c.words: c for c in found}.values():
        check(plane, np.array([0, 5]), [np.arange(0, 60, 7), np.arange(3)], np.array([64, 9]), per, config=config)


def test_planes_share_what_describes_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    planes = {"codes0": noise(rng, 128, 32, torch.uint8), "scales": noise(rng, 2, 64, torch.float16)}
    per = {"codes0": 64, "scales": 1}
    starts, units, spans = np.array([1, 0]), [np.array([0]), np.array([0])], np.array([1, 2])
    got = compact(planes, starts, units, spans, per=per)
    for name, plane in planes.items():
        assert_same(bytes_of(got[name]), gathered(bytes_of(plane), starts, units, spans, per[name]), name=name)
    sent: list[Any] = []
    upload = "kvmlx.backends.torch.triton.compact.upload"
    monkeypatch.setattr(upload, lambda x, device: sent.append(x) or x.to(device))
    with recording() as launches:
        compact(planes, starts, units, spans, per=per)
    assert len(launches) == 2 and len(sent) == 1


def test_nothing_kept() -> None:
    plane = torch.ones((8, 4), dtype=torch.float16, device=DEVICE)
    none = np.zeros(0, np.int64)
    with recording() as launches:
        got = compact({"x": plane}, np.array([0, 4]), [none, none], np.array([0, 0]), per={"x": 1})["x"]
    assert got.shape == (0, 4) and got.dtype == torch.float16 and not launches
    got = compact({"x": plane}, np.array([0, 4]), [none, none], np.array([2, 1]), per={"x": 2})["x"]
    assert_same(got.cpu().numpy(), np.zeros((6, 4), np.float16))


def test_refusals() -> None:
    plane = {"x": torch.ones((9, 4), device=DEVICE)}
    with recording() as launches:
        with pytest.raises(ValueError, match="lane 1 keeps 3 units, but its span has 2"):
            compact(plane, np.array([0, 4]), [np.arange(2), np.arange(3)], np.array([2, 2]), per={"x": 1})
        with pytest.raises(ValueError, match="x has 9 entries, not a multiple of the 2 of a unit"):
            compact(plane, np.array([0]), [np.arange(2)], np.array([2]), per={"x": 2})
        with pytest.raises(ValueError, match="unit 9 is to be kept, but x has 9"):
            compact(plane, np.array([0, 4]), [np.arange(2), np.array([1, 5])], np.array([2, 2]), per={"x": 1})
    assert not launches


def test_lengths_compile_nothing_anew() -> None:
    plane = noise(np.random.default_rng(0), 6400, 16, torch.uint8)
    with recording() as launches:
        compact({"x": plane[:64]}, np.array([0]), [np.arange(3)], np.array([4]), per={"x": 1})
        units, spans = [np.arange(2800), *[np.arange(9)] * 2], np.array([2900, 10, 40])
        compact({"x": plane}, np.array([0, 3, 30]), units, spans, per={"x": 1})
    a, b = launches
    assert (a.fn, a.signature, a.constants, a.num_warps) == (b.fn, b.signature, b.constants, b.num_warps)
    assert a.grid != b.grid


@pytest.mark.skipif(DEVICE == "cuda", reason="accesses are counted by the interpreter")
@pytest.mark.parametrize(("width", "dtype", "per"), [ENTRIES[0], ENTRIES[11], ENTRIES[12]], ids=str)
def test_each_byte_once(width: int, dtype: Any, per: int) -> None:
    from scripts.count_triton import counting

    plane = noise(np.random.default_rng(0), 64 * per, width, dtype)
    units, spans = [np.arange(0, 60, 7), np.arange(3)], np.array([64, 9])
    with counting() as launches:
        got = compact({"x": plane}, np.array([0, 5]), units, spans, per={"x": per})["x"]
    (run,) = launches
    assert run.loaded["plane"] == run.read["plane"] == sum(map(len, units)) * per * width * dtype.itemsize
    assert run.written["out"] == got.nbytes


def store_of(stage: str, n_batch: int, n_kv_heads: int, n: int, dim: int = 64) -> LayerStore:
    """Return a store that has encoded nearly all of its rows."""
    store = LayerStore(BACKEND, Strategy.parse(stage).codecs(), columns=("bias",))
    rng = np.random.default_rng(n)
    keys, values = (
        torch.from_numpy(rng.standard_normal((n_batch, n_kv_heads, n, dim)).astype(np.float16)).to(DEVICE)
        for _ in range(2)
    )
    store.append(keys, values)
    bias = rng.standard_normal(tuple(store.columns["bias"].shape)).astype(np.float32)
    store.columns["bias"] = torch.from_numpy(bias).to(DEVICE)
    store.encode_oldest(np.full((n_batch, n_kv_heads), n // store.unit * store.unit))
    return store


STAGES = ["int4", "int3", "kivi(bits=2)", "turboquant(bits=3, center=64)", "turboquant(k=4)", "int(k=8, v=16)"]


@pytest.mark.parametrize("stage", STAGES)
def test_retained_bodies(stage: str) -> None:
    """What LayerStore.retain_body keeps: the same rows in every plane, and twice, from ragged to ragged."""
    store = store_of(stage, 2, 2, 256)
    rng = np.random.default_rng(1)
    for share in (0.7, 0.5):
        unit, starts, planes = store.unit, store.start.ravel(), dict(store.planes)
        units = [np.flatnonzero(rng.random(n // unit) < share) for n in store.length.ravel()]
        units[1] = units[1][:1]
        per = {name: unit // period for name, period in store._periods().items()}
        store.retain_body(units)
        compare(store, compact(planes, starts // unit, units, store.span.ravel() // unit, per=per))


@pytest.mark.parametrize("stage", STAGES)
def test_extended_bodies(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What LayerStore appends to some lanes of a ragged body, without joining old and new first."""
    store = store_of(stage, 1, 4, 256)
    unit = store.unit
    store.retain_body([np.arange(n) for n in (3, 1, 2, 1)])
    n, lanes = 2 * unit, np.array([0, 2])
    keys, values = (np.random.default_rng(i).standard_normal((1, 4, n, 64)).astype(np.float16) for i in range(2))
    store.append(torch.from_numpy(keys).to(DEVICE), torch.from_numpy(values).to(DEVICE))
    new: dict[str, Any] = {}
    encode_rows = LayerStore._encode_rows

    def seen(*args: Any) -> dict[str, Any]:
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


def compare(store: LayerStore, got: dict[str, Any]) -> None:
    assert set(got) == set(store.planes)
    for name, period in store._periods().items():
        assert got[name].shape == store.planes[name].shape
        have, want = bytes_of(got[name]), bytes_of(store.planes[name])
        for at, length in zip(store.start.flat, store.length.flat, strict=True):
            rows = slice(int(at) // period, int(at + length) // period)
            assert_same(have[rows], want[rows], name=name)
