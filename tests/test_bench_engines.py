"""The engines of kvmlx bench: a recorded context gives what a prefill gives, to the bit; asking disturbs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvmlx import KVMLXError, StrategyError, UnsupportedModelError
from kvmlx.bench.engine import BenchEngine, Filled, chunks
from kvmlx.session import LayerCache

KEPT = "budget=60, sinks=2, recent=16"
AT_END = {
    "full": "full",
    "random": f"random({KEPT})",
    "streaming": f"streaming({KEPT})",
    "h2o": f"h2o({KEPT})",
    "tova": f"tova({KEPT})",
    "snapkv": f"snapkv({KEPT}, window=16)",
    "snapkv-other-window": "snapkv(budget=0.3, sinks=2, recent=24, window=24)",
    "keydiff": f"keydiff({KEPT})",
    "knorm": f"knorm({KEPT})",
    "expected_attention": f"expected_attention({KEPT})",
    "expected_attention-other-sinks": "expected_attention(budget=60, sinks=0, recent=16)",
    "adakv": f"snapkv({KEPT}, window=16) | adakv",
    "pyramidkv": f"snapkv({KEPT}, window=16) | pyramidkv",
    "keepkv": f"h2o({KEPT}) | keepkv(window=16)",
    "at_end-int4": "int4(group_size=16, sinks=2, recent=16) | at_end",
    "kivi": f"snapkv({KEPT}, window=16) | kivi(bits=4, group_size=16, recent=16)",
    "adakv-turboquant": f"h2o({KEPT}) | adakv | turboquant(bits=4, center=16, recent=16)",
    "every": f"expected_attention({KEPT}) | every(tokens=12)",
    "all-kept": "h2o(budget=1000, sinks=2, recent=16) | keepkv(window=16)",
}
EARLY = {
    "encoded": "int4(group_size=16, sinks=2, recent=16)",
    "bounded": f"snapkv({KEPT}, window=16) | bounded",
    "bounded-int4": f"tova({KEPT}) | int4(group_size=16, sinks=2, recent=16) | bounded",
}
METHODS = [*AT_END.values(), *EARLY.values()]


@dataclass
class Ends:
    """Of a tokenizer, what an engine reads."""

    eos_token_ids: frozenset[int] = frozenset()
    eos_token_id: int | None = None


def make_engine(framework: str, **changed: Any) -> BenchEngine:
    if framework == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        from tiny_model import tiny_llama

        from kvmlx.backends.mlx.bench import MLXBench as Bench
    else:
        pytest.importorskip("transformers", reason="transformers is not installed")
        from tiny_hf import tiny_llama

        from kvmlx.backends.torch.bench import TorchBench as Bench
    return Bench(tiny_llama(**changed), Ends(), "cpu", "float32", chunk=64, inspect=True)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def engine(request: pytest.FixtureRequest) -> BenchEngine:
    return make_engine(request.param)


@pytest.fixture(scope="module")
def mlx_engine() -> BenchEngine:
    return make_engine("mlx")


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


CONTEXT = tokens(193)
"""Three chunks of 64, the last one with a token more."""
QUESTION = tokens(9, seed=1)


def stock_arrays(engine: BenchEngine, state: Filled) -> list[dict[str, Any]]:
    caches = state.caches if engine.name == "mlx" else state.caches.layers
    return [{"keys": c.keys, "values": c.values} for c in caches]


def arrays(engine: BenchEngine, state: Filled) -> list[dict[str, np.ndarray]]:
    """Return every array of every layer, on the host."""
    layers = engine._layers(state.caches)
    held = [layer.arrays() for layer in layers] or stock_arrays(engine, state)
    return [{name: np.asarray(x) for name, x in layer.items()} for layer in held]


def numbers(layer: LayerCache) -> dict[str, Any]:
    names = ("offsets", "prefilling", "since_selection", "padding", "due", "scale", "n_queries")
    found = {name: np.array(getattr(layer, name)) for name in names}
    found |= {
        name: np.array(getattr(layer.store, name)) for name in ("begin", "end", "start", "length", "span", "biased")
    }
    return found | ({} if layer.moments is None else {"moments": layer.moments[2]})


def assert_equal_states(engine: BenchEngine, one: Filled, other: Filled) -> None:
    for i, (a, b) in enumerate(zip(arrays(engine, one), arrays(engine, other), strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"layer {i}: {name}")
    for a, b in zip(engine._layers(one.caches), engine._layers(other.caches), strict=True):
        assert str(a.strategy) == str(b.strategy)
        found = numbers(b)
        for name, value in numbers(a).items():
            np.testing.assert_array_equal(value, found[name], err_msg=name)


# -- a context prefilled once ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(engine: BenchEngine) -> Filled:
    return engine.record(CONTEXT, list(AT_END.values()))


@pytest.mark.parametrize("method", AT_END.values(), ids=AT_END.keys())
def test_a_recorded_context_gives_what_a_prefill_gives_to_the_bit(
    engine: BenchEngine, recorded: Filled, method: str
) -> None:
    assert engine.acts_at_end(method)
    own = engine.prefill(CONTEXT, method)
    assert_equal_states(engine, engine.compress(recorded, method), own)
    made = engine.compress(recorded, method)  # a second time: the first left the record as it was
    assert engine.answer(made, QUESTION, 8) == engine.answer(own, QUESTION, 8)


@pytest.mark.parametrize("length", [2, 20, 65, 128])
def test_contexts_of_odd_lengths(engine: BenchEngine, length: int) -> None:
    methods = [AT_END[name] for name in ("full", "h2o", "snapkv", "expected_attention", "adakv", "kivi")]
    recorded = engine.record(CONTEXT[:length], methods)
    for method in methods:
        assert_equal_states(engine, engine.compress(recorded, method), engine.prefill(CONTEXT[:length], method))


@pytest.mark.parametrize("method", EARLY.values(), ids=EARLY.keys())
def test_what_acts_during_prefill_cannot_be_made_of_a_record(
    engine: BenchEngine, recorded: Filled, method: str
) -> None:
    assert not engine.acts_at_end(method)
    with pytest.raises(KVMLXError, match="before a context is complete"):
        engine.record(CONTEXT[:8], [method])
    with pytest.raises(KVMLXError, match="not among the methods"):
        engine.compress(recorded, method)


def engine_of(kind: str) -> BenchEngine:
    """Return an engine of a model some of whose layers kvmlx leaves alone."""
    if kind == "mlx-sliding":
        window = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
        return make_engine("mlx", num_hidden_layers=4, **window)
    if kind == "mlx-bare":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        from kvmlx.backends.mlx.bench import MLXBench
        from scripts.compatibility_mlx import SIDE

        # Its second layer has no attention, and yet a cache.
        return MLXBench(SIDE.build("nemotron-nas"), Ends(), "cpu", "float32", chunk=64, inspect=True)
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_hf import tiny

    from kvmlx.backends.torch.bench import TorchBench

    return TorchBench(tiny(kind), Ends(), "cpu", "float32", chunk=64, inspect=True)


@pytest.mark.parametrize("kind", ["mlx-sliding", "mlx-bare", "gemma3_text", "qwen3_next"])
def test_layers_that_kvmlx_leaves_alone_are_recorded_too(kind: str) -> None:
    engine = engine_of(kind)
    context, question = ([t % 64 for t in given] for given in (CONTEXT, QUESTION))
    methods = ["full", AT_END["snapkv"], AT_END["kivi"]]
    recorded = engine.record(context, methods)
    for method in methods:
        made, own = engine.compress(recorded, method), engine.prefill(context, method)
        assert engine.sizes(made) == engine.sizes(own)
        copied = engine.copy(made)
        said = engine.answer(own, question, 6)
        assert engine.answer(made, question, 6) == said == engine.answer(copied, question, 6)


def test_chunks_never_leave_one_token_for_last() -> None:
    for count in range(1, 40):
        parts = list(chunks(count, 8))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert all(part.stop - part.start > 1 for part in parts) or count == 1
        assert max(part.stop - part.start for part in parts) <= 9


# -- a question -----------------------------------------------------------------------------------------------------


def context_rows(engine: BenchEngine, state: Filled) -> list[list[int]]:
    """Return the positions below the context's length that each lane holds."""
    lanes = [lane for layer in engine._layers(state.caches) for sequence in layer.positions() for lane in sequence]
    return [[p for p in lane.tolist() if p < len(CONTEXT)] for lane in lanes]


@pytest.mark.parametrize("asked", [1, 9, 100])
@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "keepkv", "kivi", "encoded", "bounded", "bounded-int4"])
def test_asking_selects_nothing(engine: BenchEngine, recorded: Filled, name: str, asked: int) -> None:
    method = (AT_END | EARLY)[name]
    at_end = engine.acts_at_end(method)
    state = engine.compress(recorded, method) if at_end else engine.prefill(CONTEXT, method)
    before = context_rows(engine, state)
    engine.answer(state, tokens(asked, seed=2), 4)
    assert context_rows(engine, state) == before
    seen = {int(layer.offsets[0]) for layer in engine._layers(state.caches)}
    assert seen == {len(CONTEXT) + asked + 3}  # the last token said is not fed


def test_a_question_counts_for_what_acts_while_decoding(engine: BenchEngine, recorded: Filled) -> None:
    state = engine.compress(recorded, AT_END["every"])
    engine.answer(state, tokens(20, seed=2), 1)
    layer = engine._layers(state.caches)[0]
    assert int(layer.since_selection[0]) == 20
    assert int(layer.store.lengths.max()) == 80
    engine.answer(state, tokens(1, seed=3), 1)
    assert int(layer.store.lengths.max()) == 61, "12 tokens after the last selection there is another"


def test_an_answer_is_greedy_and_stops_before_the_end(engine: BenchEngine) -> None:
    fed, said = [*CONTEXT, *QUESTION], []
    for _ in range(6):  # from nothing each time
        state = engine.prefill(fed[:-1], "full")
        said.append(int(np.concatenate(list(engine.forced(state, fed[-1:]))).argmax()))
        fed.append(said[-1])
    assert len(set(said)) > 2, "greedy decoding of the model wanders, or this tests nothing"
    assert engine.answer(engine.prefill(CONTEXT, "full"), QUESTION, 6) == said
    end = said[3]
    ends = Ends(frozenset({end}), end)
    engine.tokenizer, before = ends, engine.tokenizer
    try:
        assert engine.answer(engine.prefill(CONTEXT, "full"), QUESTION, 6) == said[: said.index(end)]
    finally:
        engine.tokenizer = before
    with pytest.raises(KVMLXError, match="at least one token"):
        engine.answer(engine.prefill(CONTEXT, "full"), [], 6)


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o", "adakv", "keepkv", "kivi", "every", "encoded", "bounded"])
def test_questions_that_are_answered_together_are_answered_as_alone(engine: BenchEngine, name: str) -> None:
    method = (AT_END | EARLY)[name]
    state = engine.prefill(CONTEXT, method)
    questions, most = [tokens(n, seed=n) for n in (3, 1, 40, 9)], [9, 2, 20, 1]
    alone = [engine.answer(engine.copy(state), q, n) for q, n in zip(questions, most, strict=True)]
    assert [len(said) for said in alone] == most
    assert list(engine.answers(engine.copy(state), questions, most)) == alone
    end = alone[2][7]
    ends = Ends(frozenset({end}), end)
    engine.tokenizer, before = ends, engine.tokenizer
    try:
        cut = [said[: said.index(end)] if end in said else said for said in alone]
        assert list(engine.answers(state, questions, most)) == cut
    finally:
        engine.tokenizer = before


def test_answers_are_decoded_together_as_far_as_memory_goes(
    mlx_engine: BenchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = mlx_engine.prefill(CONTEXT, "full")
    nbytes = mlx_engine.sizes(state)[0]
    fed: list[tuple[int, ...]] = []
    feed = mlx_engine._feed
    monkeypatch.setattr(mlx_engine, "_feed", lambda caches, x: (fed.append(np.array(x).shape), feed(caches, x))[1])
    questions = [QUESTION] * 5
    whole = list(mlx_engine.answers(mlx_engine.copy(state), questions, [3] * 5))
    assert fed == [(1, 9)] * 5 + [(5, 1)] * 2
    fed.clear()
    monkeypatch.setattr("kvmlx.bench.engine.TOGETHER_BYTES", 2 * nbytes + 1)
    assert list(mlx_engine.answers(state, questions, [3] * 5)) == whole
    assert fed == 2 * ([(1, 9)] * 2 + [(2, 1)] * 2) + [(1, 9)] + [(1, 1)] * 2


@pytest.mark.parametrize("name", ["full", "snapkv", "encoded"])
def test_forced_gives_distributions_as_the_cache_gives_them(engine: BenchEngine, name: str) -> None:
    method = (AT_END | EARLY)[name]
    rows = list(engine.forced(engine.prefill(CONTEXT, method), QUESTION))
    assert len(rows) == len(QUESTION)
    assert all(row.dtype == np.float32 and row.shape == (256,) for row in rows)
    np.testing.assert_allclose([np.exp(row.astype(np.float64)).sum() for row in rows], 1.0, rtol=1e-5)
    said = engine.answer(engine.prefill(CONTEXT, method), QUESTION[:1], 1)
    assert said == [int(rows[0].argmax())]


@pytest.mark.parametrize("name", ["full", "snapkv", "adakv", "kivi", "h2o", "encoded"])
def test_a_copy_is_independent(engine: BenchEngine, name: str) -> None:
    method = (AT_END | EARLY)[name]
    state = engine.prefill(CONTEXT, method)
    before = arrays(engine, state)
    copied = engine.copy(state)
    assert_equal_states(engine, copied, state)
    said = engine.answer(copied, tokens(50, seed=4), 8)
    for a, b in zip(before, arrays(engine, state), strict=True):
        for x in a:
            np.testing.assert_array_equal(a[x], b[x])
    assert engine.answer(state, tokens(50, seed=4), 8) == said


# -- methods --------------------------------------------------------------------------------------------------------


OWN: dict[str, tuple[str, ...]] = {
    "mlx": ("mlx-lm: affine(bits=4, group_size=32)", "mlx-lm: rotating(size=100)"),
    "torch": ("transformers: quantized(bits=8, backend=fp8)",),
}


@pytest.mark.parametrize("framework", ["mlx", "torch"])
def test_baselines_run_and_change_something(framework: str) -> None:
    engine = make_engine(framework, head_dim=32)
    full = list(engine.forced(engine.prefill(CONTEXT, "full"), QUESTION))
    for method in OWN[framework]:
        engine.check(method)
        assert not engine.acts_at_end(method)
        state = engine.prefill(CONTEXT, method)
        copied = engine.copy(state)
        nbytes, full_nbytes = engine.sizes(state)
        assert 0 < nbytes < 2 * full_nbytes, "exact rows are float32 here"
        other = list(engine.forced(engine.copy(state), QUESTION))
        drift = max(float(np.abs(a - b).max()) for a, b in zip(full, other, strict=True))
        assert drift > 1e-3
        said = engine.answer(engine.copy(state), QUESTION, 5)
        together, _ = engine.answers(state, [QUESTION, QUESTION[:4]], [5, 2])
        assert engine.answer(copied, QUESTION, 5) == said == together


def test_methods_that_cannot_run_are_refused_by_name(engine: BenchEngine) -> None:
    foreign = OWN["torch" if engine.name == "mlx" else "mlx"][0]
    with pytest.raises(StrategyError, match="this engine runs"):
        engine.check(foreign)
    with pytest.raises(StrategyError, match="unknown stage 'snapvk'"):
        engine.check("snapvk(budget=60)")
    with pytest.raises(StrategyError, match="group_size=64 does not divide"):
        engine.check("int4(group_size=64)")
    for method in METHODS:
        engine.check(method)


def test_mlx_refuses_groups_that_do_not_fit(mlx_engine: BenchEngine) -> None:
    with pytest.raises(StrategyError, match="head dim that its groups divide, got 16"):
        mlx_engine.check("mlx-lm: affine(bits=4)")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("torch")
    from kvmlx.backends.torch import bench

    monkeypatch.setitem(bench.INSTALLED, "quanto", lambda: False)
    with pytest.raises(StrategyError, match="pip install optimum optimum-quanto"):
        engine.check("transformers: quantized(bits=4)")


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("mlx-sliding", "mlx-lm: affine(bits=4)", "cannot quantize RotatingKVCache"),
        ("gemma3_text", OWN["torch"][0], "cannot quantize DynamicSlidingWindowLayer"),
    ],
)
def test_sliding_layers_are_quantized_by_neither_framework(kind: str, method: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        engine_of(kind).check(method)


# -- bytes and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snapkv", "adakv", "kivi", "encoded"])
def test_sizes_are_what_the_report_says(engine: BenchEngine, name: str) -> None:
    import kvmlx

    state = engine.prefill(CONTEXT, (AT_END | EARLY)[name])
    report = kvmlx.report(state.caches)
    assert engine.sizes(state) == (report.nbytes, report.full_nbytes)
    assert engine.sizes(engine.copy(state)) == engine.sizes(state)
    assert report.full_nbytes == len(CONTEXT) * 3 * 2 * (16 + 16) * 2


@pytest.fixture
def exact_allocator() -> Iterator[None]:
    """Let MLX re-use no freed buffer: it takes them for arrays up to two pages shorter, which is much for tiny ones."""
    import mlx.core as mx

    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


@pytest.mark.usefixtures("exact_allocator")
def test_costs_on_mlx_agree_with_the_allocator(mlx_engine: BenchEngine) -> None:
    for method in (AT_END["adakv-turboquant"], EARLY["encoded"]):
        cost = mlx_engine.cost(CONTEXT, method, batch=3, steps=4, repeats=1)
        assert cost.full_nbytes == 3 * len(CONTEXT) * 3 * 2 * (16 + 16) * 2
        assert cost.held_bytes is not None and cost.peak_bytes is not None
        assert abs(cost.held_bytes - cost.nbytes) <= 0.02 * cost.nbytes, method
        assert cost.peak_bytes >= cost.held_bytes
        assert len(cost.ttft_s) == 1 and len(cost.step_s) == 4 and min(cost.step_s) > 0


def test_costs_on_torch_without_a_gpu_guess_nothing() -> None:
    engine = make_engine("torch")
    cost = engine.cost(CONTEXT, AT_END["snapkv"], batch=2, steps=2, repeats=2)
    assert cost.held_bytes is None and cost.peak_bytes is None and engine.allocated_bytes() is None
    assert cost.nbytes > 0 and len(cost.ttft_s) == 2 and len(cost.step_s) == 4
    with pytest.raises(KVMLXError, match="at least 3 tokens"):
        engine.cost([1, 2], "full", batch=1, steps=1, repeats=1)


def test_ten_methods_leave_nothing_behind(mlx_engine: BenchEngine) -> None:
    methods = [m for m in METHODS if m != "full"][:10]
    mlx_engine.prefill(CONTEXT, "full")
    start = mlx_engine.allocated_bytes()

    def run() -> None:
        recorded = mlx_engine.record(CONTEXT, [m for m in methods if mlx_engine.acts_at_end(m)])
        for method in methods:
            state = mlx_engine.compress(recorded, method)
            mlx_engine.answer(mlx_engine.copy(state), QUESTION, 4)
            list(mlx_engine.forced(state, QUESTION))

    run()
    first = mlx_engine.allocated_bytes()
    run()
    assert start is not None and first is not None
    assert mlx_engine.allocated_bytes() == first
    assert first - start < 64 * 1024, "constants such as rotations may stay, rows may not"


def test_the_harness_takes_little_beside_the_model(mlx_engine: BenchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even beside a model of 3 tiny layers, whose step takes milliseconds less than a real one's."""
    inside = [0.0]

    def timed(name: str) -> None:
        own = getattr(mlx_engine, name)

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            out = own(*args)
            inside[0] += time.perf_counter() - begin
            return out

        monkeypatch.setattr(mlx_engine, name, call)

    state = mlx_engine.prefill(CONTEXT, "full")
    for name in ("_feed", "_greedy", "_host"):
        timed(name)
    shares = []
    for _ in range(5):
        copied = mlx_engine.copy(state)
        inside[0], begin = 0.0, time.perf_counter()
        mlx_engine.answer(copied, QUESTION, 24)
        shares.append((time.perf_counter() - begin) / inside[0] - 1)
    assert min(shares) < 0.1, shares


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_says_what_mlx_lm_says() -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from kvmlx.backends.mlx.bench import MLXBench
    from kvmlx.cli.engines import MLXEngine
    from kvmlx.demo_model import demo_model_path, is_intact

    if not is_intact(demo_model_path()):
        pytest.skip("the demo model is not there: run scripts/bootstrap, or `python -m kvmlx.demo_model`")
    loaded = MLXEngine(str(demo_model_path()), None)
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 24
    needle = "The special magic number for Lima is: 48213. "
    user = f"{text}{needle}{text}\nWhat is the special magic number for Lima mentioned in the provided text?"
    prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True)
    expected = mlx_lm.generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24)
    assert "48213" in expected
    engine = MLXBench(loaded.model, loaded.tokenizer, loaded.device, loaded.dtype)
    recorded = engine.record(prompt[:-20], ["full"])
    said = engine.answer(engine.compress(recorded, "full"), prompt[-20:], 24)
    assert engine.tokenizer.decode(said) == expected
