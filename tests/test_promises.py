"""The promises of the design, as properties of one layer's cache driven with random rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layer import SCALE, Sequence_, expected, feed, make_layer, prefill

from kvmlx import attention, reference
from kvmlx.backends.numpy import BACKEND as NUMPY
from kvmlx.store import RING_STEP

SMALL = "sinks=2, recent=8"
SELECT = {
    "random": "random(budget={}, " + SMALL + ")",
    "streaming": "streaming(budget={}, " + SMALL + ")",
    "h2o": "h2o(budget={}, " + SMALL + ")",
    "tova": "tova(budget={}, " + SMALL + ")",
    "snapkv": "snapkv(budget={}, window=8, " + SMALL + ")",
    "keydiff": "keydiff(budget={}, " + SMALL + ")",
    "knorm": "knorm(budget={}, " + SMALL + ")",
    "leverage": "leverage(budget={}, " + SMALL + ")",
    "expected_attention": "expected_attention(budget={}, " + SMALL + ")",
}
ALLOCATE = ["", " | pyramidkv", " | adakv"]
ENCODE = [
    "",
    f" | int4({SMALL})",
    f" | int(k=8, v=3, {SMALL})",
    f" | int6(rotate=hadamard, {SMALL})",
    f" | turboquant(bits=3, {SMALL})",
    f" | turboquant(k=4, v=2, center=16, {SMALL})",
    f" | kivi(k=4, group_size=16, {SMALL}) | turboquant(v=4, {SMALL})",
    f" | int(k=5, {SMALL})",
]
SCHEDULE = ["", " | bounded", " | every(tokens=7)", " | bounded | every(tokens=5)"]


@st.composite
def pipelines(draw: Any) -> str:
    """Draw the text of a legal pipeline."""
    select = draw(st.sampled_from(["", *SELECT]))
    encode = draw(st.sampled_from(ENCODE))
    if not select:
        return (encode.removeprefix(" | ") or "full") + draw(st.sampled_from(["", " | bounded", " | at_end"]))
    budget = draw(st.sampled_from([0.2, 0.5, 0.9, 1.0, 16, 40]))
    allocate = draw(st.sampled_from(ALLOCATE if select != "tova" else ALLOCATE[:2]))
    return SELECT[select].format(budget) + allocate + encode + draw(st.sampled_from(SCHEDULE))


sequences = st.builds(
    Sequence_,
    seed=st.integers(0, 1000),
    tokens=st.just(140),
    n_kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
)
relaxed = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def assert_attends_to_what_it_holds(cache: Any, sequence: Sequence_, b: int, position: int, out: np.ndarray) -> None:
    want = expected(cache, sequence, b, position)
    np.testing.assert_allclose(out, want, rtol=0, atol=4e-5 * max(1.0, np.abs(want).max()))


def decode(cache: Any, sequence: Sequence_, start: int, steps: int, *, check: bool = True) -> list[np.ndarray]:
    outs = []
    for position in range(start, start + steps):
        out = feed(cache, [sequence], [position], 1)[0, :, 0]
        if check:
            assert_attends_to_what_it_holds(cache, sequence, 0, position, out)
        outs.append(out)
    return outs


@given(text=pipelines(), sequence=sequences, length=st.integers(1, 80), chunk=st.sampled_from([1, 7, 16, 33, 100]))
@relaxed
def test_attention_reads_exactly_the_rows_it_holds(text: str, sequence: Sequence_, length: int, chunk: int) -> None:
    cache = make_layer(NUMPY, text)
    prefill(cache, [sequence], [length], chunk)
    decode(cache, sequence, length - 1, 40)
    strategy = cache.strategy
    seen = length + 39
    assert cache.offsets[0] == seen
    for rows in cache.positions()[0]:
        assert (np.diff(rows) > 0).all(), "kept rows stay sorted"
        assert set(range(min(strategy.sinks, seen))) <= set(rows), "sinks are kept"
        assert set(range(max(0, seen - strategy.recent), seen)) <= set(rows), "recent rows are kept"
        if strategy.select is None:
            assert len(rows) == seen


@given(text=pipelines(), sequence=sequences, length=st.integers(30, 80))
@relaxed
def test_budget_is_met_exactly_at_the_end_of_the_prompt(text: str, sequence: Sequence_, length: int) -> None:
    caches = [make_layer(NUMPY, text, layer=i) for i in range(2)]
    for cache in caches:
        prefill(cache, [sequence], [length], 16)
        feed(cache, [sequence], [length - 1], 1)
        cache.settle(prompt_end=True)
    select = caches[0].strategy.select
    if select is None:
        return
    tokens = int(select.budget * length + 1e-9) if isinstance(select.budget, float) else min(select.budget, length)
    tokens = max(1, tokens, min(length, caches[0].strategy.sinks + caches[0].strategy.recent))
    kept = sum(int(c.store.lengths.sum()) for c in caches)
    if caches[0].strategy.bounded and caches[0].strategy.encodes:
        assert kept <= 2 * sequence.n_kv_heads * tokens
    else:
        assert kept == 2 * sequence.n_kv_heads * tokens


@given(text=pipelines(), sequence=sequences, length=st.integers(2, 80), chunks=st.tuples(*[st.integers(1, 90)] * 2))
@relaxed
def test_chunk_size_is_irrelevant_at_the_end_of_the_prompt(
    text: str, sequence: Sequence_, length: int, chunks: tuple[int, int]
) -> None:
    caches = [make_layer(NUMPY, text) for _ in chunks]
    if caches[0].strategy.bounded and not caches[0].strategy.identity:
        return
    outs = []
    for cache, chunk in zip(caches, chunks, strict=True):
        prefill(cache, [sequence], [length], chunk)
        outs.append(decode(cache, sequence, length - 1, 12, check=False))
    np.testing.assert_allclose(outs[0], outs[1], rtol=0, atol=2e-5)
    for a, b in zip(*(c.positions()[0] for c in caches), strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    text=pipelines(),
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=3, unique=True),
    lengths=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    chunk=st.sampled_from([5, 16, 64]),
)
@relaxed
def test_batch_mates_and_padding_are_irrelevant(text: str, seeds: list[int], lengths: list[int], chunk: int) -> None:
    batch = [Sequence_(seed, 140, 2, 2) for seed in seeds]
    lengths = lengths[: len(batch)]
    together = make_layer(NUMPY, text)
    prefill(together, batch, lengths, chunk)
    alone = []
    for sequence, length in zip(batch, lengths, strict=True):
        cache = make_layer(NUMPY, text)
        prefill(cache, [sequence], [length], chunk)
        alone.append(cache)
    for step in range(15):
        at = [n - 1 + step for n in lengths]
        out = feed(together, batch, at, 1)
        for b, cache in enumerate(alone):
            np.testing.assert_allclose(out[b], feed(cache, [batch[b]], [at[b]], 1)[0], rtol=0, atol=2e-5)
            for mine, its in zip(together.positions()[b], cache.positions()[0], strict=True):
                np.testing.assert_array_equal(mine, its)


@given(text=pipelines(), lengths=st.lists(st.integers(1, 60), min_size=3, max_size=3))
@relaxed
def test_merging_filtering_and_extracting_change_nothing(text: str, lengths: list[int]) -> None:
    batch = [Sequence_(seed, 140, 2, 2) for seed in range(3)]
    alone = []
    for sequence, length in zip(batch, lengths, strict=True):
        cache = make_layer(NUMPY, text)
        prefill(cache, [sequence], [length], 16)
        feed(cache, [sequence], [length - 1], 1)
        alone.append(cache)
    merged = alone[0].take([(alone[0], 0), (alone[1], 0)])
    merged = merged.take([(merged, 1), (alone[2], 0), (merged, 0)])
    order = [1, 2, 0]
    for step in range(10):
        at = [lengths[i] + step for i in order]
        out = feed(merged, [batch[i] for i in order], at, 1)
        for b, i in enumerate(order):
            np.testing.assert_allclose(out[b], feed(alone[i], [batch[i]], [at[b]], 1)[0], rtol=0, atol=2e-5)
    merged = merged.take([(merged, 1)])
    out = feed(merged, [batch[2]], [lengths[2] + 10], 1)
    np.testing.assert_allclose(out, feed(alone[2], [batch[2]], [lengths[2] + 10], 1), rtol=0, atol=2e-5)


@given(text=pipelines(), sequence=sequences, turns=st.lists(st.integers(1, 30), min_size=2, max_size=4))
@example(
    text=f"random(budget=0.2, {SMALL}) | adakv | turboquant(k=4, v=2, center=16, {SMALL})",
    sequence=Sequence_(0, 140, 2, 1),
    turns=[25, 27],
)
@relaxed
def test_a_chat_of_several_turns(text: str, sequence: Sequence_, turns: list[int]) -> None:
    cache = make_layer(NUMPY, text)
    at = 0
    for turn in turns:
        if turn > 1:
            feed(cache, [sequence], [at], turn - 1)
            cache.settle(chunk_end=True)
        decode(cache, sequence, at + turn - 1, 4)
        at += turn + 3
    assert cache.offsets[0] == at


@pytest.mark.parametrize(
    "text", ["full", "snapkv(budget=1.0)", "streaming(budget=500)", "int16", "h2o(budget=1.0) | adakv"]
)
def test_a_budget_that_holds_everything_is_the_identity(text: str) -> None:
    sequence = Sequence_(1, 140, 2, 3)
    cache = make_layer(NUMPY, text)
    prefill(cache, [sequence], [100], 32)
    for position in range(99, 120):
        out = feed(cache, [sequence], [position], 1)
        keys, values = (x[None, :, : position + 1] for x in (sequence.keys, sequence.values))
        want = NUMPY.sdpa(
            sequence.queries[None, :, position : position + 1],
            keys,
            values,
            scale=SCALE,
            causal=False,
            mask=None,
            sinks=None,
        )
        np.testing.assert_array_equal(out, want)


@given(
    encode=st.sampled_from([e.removeprefix(" | ") for e in ENCODE[1:]] + ["full"]),
    length=st.integers(2, 80),
    steps=st.integers(0, 20),
    back=st.integers(0, 110),
)
@relaxed
def test_trimming_gives_back_the_prefix(encode: str, length: int, steps: int, back: int) -> None:
    sequence = Sequence_(3, 140, 2, 2)
    cache = make_layer(NUMPY, encode)
    prefill(cache, [sequence], [length], 16)
    decode(cache, sequence, length - 1, steps, check=False)
    seen = int(cache.offsets[0])
    trimmed = cache.trim(back)
    assert trimmed == min(back, seen)
    left = seen - trimmed
    if left:
        for rows in cache.positions()[0]:
            np.testing.assert_array_equal(rows, np.arange(left))
    for position in range(left, left + 5):
        out = feed(cache, [sequence], [position], 1)[0, :, 0]
        full, _ = reference.attention(
            sequence.queries[None, :, position : position + 1],
            sequence.keys[None, :, : position + 1],
            sequence.values[None, :, : position + 1],
            scale=SCALE,
        )
        assert np.abs(out - full[0, :, 0]).max() < 0.8
    assert cache.offsets[0] == left + 5


@given(text=pipelines(), sequence=sequences, length=st.integers(1, 80))
@relaxed
def test_nbytes_is_the_sum_of_what_is_held_and_of_the_format(text: str, sequence: Sequence_, length: int) -> None:
    cache = make_layer(NUMPY, text, inspect=False)
    prefill(cache, [sequence], [length], 16)
    decode(cache, sequence, length - 1, 20, check=False)
    store = cache.store
    assert cache.nbytes == sum(a.nbytes for a in cache.arrays().values())
    row = 2 * sequence.dim * 4 + 4 * len(store.column_names)
    capacity = store.keys.shape[2]
    tail = store.begin.size * capacity * row
    body = 0.0
    if store.codecs is not None and store.span.any():
        planes = [p for c in store.codecs for p in c.planes(sequence.dim)]
        body = int(store.span.sum()) * (sum(p.row_bytes for p in planes) + 4 * len(store.column_names))
    held = sum(a.nbytes for a in store.arrays().values())
    assert held == tail + body
    assert capacity - store.end <= 2 * RING_STEP + store.end // 8, "head-room is an eighth at most, or a few rows"
    assert (store.span - store.length).max() < max(64, store.unit) * 2


@pytest.mark.parametrize("text", ["snapkv(budget=0.5, window=8, recent=8)", f"int4({SMALL})", "h2o(budget=0.5)"])
def test_scratch_limits_do_not_change_attention(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, outs = Sequence_(4, 300, 2, 2), []
    for elements in (attention.SCORE_ELEMENTS, 1 << 8):
        monkeypatch.setattr(attention, "SCORE_ELEMENTS", elements)
        monkeypatch.setattr(attention, "MIN_TILE_ROWS", 16)
        monkeypatch.setattr(attention, "MIN_QUERY_BLOCK", 8)
        cache = make_layer(NUMPY, text)
        outs.append(np.concatenate([feed(cache, [sequence], [at], 100) for at in (0, 100, 200)], axis=2))
    np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=2e-6)


PARITY = [
    "full",
    f"int4({SMALL})",
    f"int(k=6, v=3, rotate=hadamard, {SMALL})",
    f"turboquant(k=5, v=4, center=16, {SMALL})",
    f"kivi(k=4, group_size=16, {SMALL}) | turboquant(v=2, {SMALL})",
    SELECT["snapkv"].format(0.5) + f" | int4({SMALL})",
    SELECT["h2o"].format(0.5) + f" | adakv | int8({SMALL}) | every(tokens=7)",
    SELECT["snapkv"].format(0.3) + " | adakv | every(tokens=5)",
    SELECT["snapkv"].format(0.3) + " | keepkv(window=8)",
    SELECT["expected_attention"].format(0.5) + " | pyramidkv | bounded",
    SELECT["keydiff"].format(0.5) + f" | turboquant(k=4, v=2, center=16, {SMALL}) | bounded | every(tokens=5)",
    SELECT["tova"].format(20) + " | bounded | every(tokens=1)",
    SELECT["knorm"].format(0.6) + " | adakv | bounded",
    SELECT["random"].format(0.6),
    SELECT["streaming"].format(30) + " | every(tokens=3)",
]


@pytest.mark.parametrize("name", ["mlx", "torch"])
@pytest.mark.parametrize("text", PARITY)
def test_backends_keep_the_same_rows_and_agree(text: str, name: str) -> None:
    other = pytest.importorskip(f"kvmlx.backends.{name}.ops", reason=f"{name} is not installed").BACKEND
    batch, lengths = [Sequence_(5, 140, 2, 2), Sequence_(6, 140, 2, 2)], [70, 41]
    caches = [make_layer(backend, text) for backend in (NUMPY, other)]
    for cache in caches:
        prefill(cache, batch, lengths, 32)
    for step in range(24):
        outs = [feed(c, batch, [n - 1 + step for n in lengths], 1) for c in caches]
        np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=5e-5)
    for cache in caches:
        cache.settle()
    for mine, its in zip(*(c.positions() for c in caches), strict=True):
        for a, b in zip(mine, its, strict=True):
            np.testing.assert_array_equal(a, b)
    mine, its = (c.store.arrays() for c in caches)
    assert set(mine) == set(its)
    for name in mine:
        if ".codes" in name:
            same = mine[name] == caches[1].backend.to_numpy(its[name])
            assert same.mean() > 0.999, name
