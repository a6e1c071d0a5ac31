"""Equal bytes: budgets are tuned to what is really held."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvmlx import KVMLXError, Strategy, StrategyError
from kvmlx.backends.numpy import BACKEND
from kvmlx.bench import baselines
from kvmlx.bench.matching import family_of, has_budget, match, ratio_of, with_budget
from kvmlx.demo_model import demo_model_path
from kvmlx.explain import explain
from kvmlx.session import LayerCache, Session
from kvmlx.types import LayerInfo, ModelInfo

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "head_dim": 64,
}
"""The demo model's shape."""
FAMILIES = [
    "snapkv",
    "h2o",
    "expected_attention(sinks=0)",
    "snapkv | pyramidkv",
    "snapkv | keepkv",
    "snapkv | adakv",
    "snapkv | int4",
    "snapkv | small",
    "snapkv(window=16) | adakv | small",
    "streaming | kivi(bits=2)",
]


# -- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family", "tuned"),
    [
        ("snapkv", "snapkv", "snapkv(budget=300)"),
        ("snapkv(budget=0.25) | small", "snapkv | small", "snapkv(budget=300) | small"),
        ("snapkv( budget = 80 , window=16)|int4", "snapkv(window=16) | int4", "snapkv(budget=300, window=16) | int4"),
        ("h2o(recent=8, budget=0.5)", "h2o(recent=8)", "h2o(budget=300, recent=8)"),
        ("tova(budget=1e-1, sinks=2) | bounded", "tova(sinks=2) | bounded", "tova(budget=300, sinks=2) | bounded"),
        ("mlx-lm: rotating(size=512, keep=8)", "mlx-lm: rotating(keep=8)", "mlx-lm: rotating(size=300, keep=8)"),
        ("mlx-lm: rotating", "mlx-lm: rotating", "mlx-lm: rotating(size=300)"),
    ],
)
def test_a_budget_is_left_open_and_filled_in(method: str, family: str, tuned: str) -> None:
    assert family_of(method) == family
    assert with_budget(method, 300) == with_budget(family, 300) == tuned
    assert family_of(tuned) == family
    assert baselines.parse(tuned) is not None or budget_of(tuned) == 300


@pytest.mark.parametrize("method", ["full", "int4", "small", "mlx-lm: affine(bits=4)", "kivi(k=4) | turboquant(v=4)"])
def test_methods_without_a_budget(method: str) -> None:
    assert not has_budget(method) and family_of(method) == method
    with pytest.raises(KVMLXError, match="has no budget"):
        with_budget(method, 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlx-lm: rotatin(size=5)", "Did you mean 'rotating'"),
        ("mlx-lm: quantized", "mlx-lm has no cache 'quantized'"),
        ("mlx-lm: affine(bits=7)", "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ("mlx-lm: affine(size=7)", "no parameter 'size'"),
        ("mlx-lm: rotating(size=4)", "size=4 must be more than keep=4"),
        ("mlx-lm: rotating(size=0.5)", "size must be a number of tokens"),
        ("mlx-lm: rotating | int4", "cannot be combined"),
        ("transformers: quantized(bits=8)", "backend=quanto has bits=2, 4, got bits=8"),
    ],
)
def test_baselines_that_are_none(text: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        baselines.parse(text)


def test_baselines_print_as_they_parse() -> None:
    for text in ("mlx-lm: affine", "mlx-lm: rotating(size=300, keep=0)", "transformers: quantized(bits=2)"):
        assert str(baselines.parse(text)) == text
    assert baselines.parse("snapkv(budget=0.25)") is None
    assert baselines.parse("kvpress: snapkv(ratio=0.75)") is None


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [100, 1000, 1024, 3001])
@pytest.mark.parametrize("method", ["snapkv(budget=90) | keepkv", "h2o(budget=0.5) | pyramidkv", "small", "int8"])
def test_the_ratio_is_that_of_explain(method: str, tokens: int) -> None:
    assert ratio_of(method, tokens, SMOLLM2) == explain(method, SMOLLM2, tokens, dtype="float16").ratio
    assert ratio_of("full", tokens, SMOLLM2) == 1.0


@pytest.mark.parametrize("target", [2.0, 4.0])
@pytest.mark.parametrize("family", [f for f in FAMILIES if "adakv" not in f])
def test_a_matched_budget_is_the_largest_that_fits(family: str, target: float) -> None:
    tokens = 1600
    method, ratio = match(family, target, tokens, SMOLLM2)
    assert family_of(method) == family and isinstance(budget_of(method), int)
    assert ratio == ratio_of(method, tokens, SMOLLM2) <= 1 / target
    others = [ratio_of(with_budget(family, n), tokens, SMOLLM2) for n in range(70, tokens + 1)]
    assert budget_of(method) == max(n for n, r in enumerate(others, 70) if r <= 1 / target)


def test_more_rows_in_whole_blocks_go_before_fewer_exact_ones() -> None:
    """A search by bisection alone stopped at 83 rows, all exact, where 224 fit."""
    family = "leverage(recent=16) | turboquant(bits=4, center=64, recent=16)"
    method, ratio = match(family, 16.0, 2048, SMOLLM2)
    assert budget_of(method) == 224 and ratio <= 1 / 16


@pytest.mark.parametrize("target", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("family", [f for f in FAMILIES if "adakv" in f])
def test_unequal_heads_are_matched_on_the_safe_side(family: str, target: float) -> None:
    method, ratio = match(family, target, 4096, SMOLLM2)
    assert ratio <= 1 / target
    assert ratio > 0.98 / target or budget_of(method) == 4096


def budget_of(method: str) -> Any:
    select = Strategy.parse(method).select
    assert select is not None
    return select.budget


def test_a_matched_budget_replaces_the_one_given() -> None:
    assert match("snapkv(budget=0.9)", 4.0, 4096, SMOLLM2) == match("snapkv", 4.0, 4096, SMOLLM2)


def test_methods_without_a_budget_are_taken_if_they_are_small_enough() -> None:
    assert match("small", 2.0, 4096, SMOLLM2) == ("small", ratio_of("small", 4096, SMOLLM2))
    with pytest.raises(
        KVMLXError, match=r"'small' holds at least 0.3\d* of fp16 at 4096 tokens \(3.\dx\), 4x asks for"
    ):
        match("small", 4.0, 4096, SMOLLM2)


def test_what_cannot_be_so_small_says_what_it_holds_at_least() -> None:
    with pytest.raises(KVMLXError, match=r"'snapkv' holds at least .* at 512 tokens .*64x asks for 0.0156"):
        match("snapkv", 64.0, 512, SMOLLM2)
    with pytest.raises(KVMLXError, match="keeps at least 69 tokens"):
        match("snapkv", 2.0, 60, SMOLLM2)
    with pytest.raises(KVMLXError, match=r"at least 1x, got 0\.5"):
        match("snapkv", 0.5, 4096, SMOLLM2)


def test_baselines_are_matched_too() -> None:
    assert match("mlx-lm: rotating", 8.0, 1000, SMOLLM2) == ("mlx-lm: rotating(size=125)", 0.125)
    assert ratio_of("mlx-lm: affine(bits=4)", 1024, SMOLLM2) == 4.5 / 16
    assert ratio_of("mlx-lm: affine(bits=8, group_size=32)", 1024, SMOLLM2) == 9 / 16
    assert ratio_of("transformers: quantized(bits=2)", 1024, SMOLLM2) == 2.5 / 16
    with pytest.raises(KVMLXError, match=r"holds at least 0\.281"):
        match("mlx-lm: affine(bits=4)", 4.0, 1024, SMOLLM2)


def test_the_demo_model_has_the_shape_that_is_tested() -> None:
    path = demo_model_path() / "config.json"
    if not path.is_file():
        pytest.skip("the demo model is not there: run scripts/bootstrap, or `python -m kvmlx.demo_model`")
    config = json.loads(path.read_text())
    for family in ("snapkv", "snapkv | adakv", "small"):
        assert match(family, 2.0, 2048, config) == match(family, 2.0, 2048, SMOLLM2)


# -- what is really held --------------------------------------------------------------------------------------------


def held_ratio(method: str, tokens: int, layers: int, seed: int) -> float:
    """Return bytes held / bytes of fp16 after a prompt of random rows in layers of the demo model's shape."""
    model = ModelInfo("llama", tuple(LayerInfo(i, 9, 3, 64, 64) for i in range(layers)))
    session = Session(Strategy.parse(method), model, layers)
    rng = np.random.default_rng(seed)
    nbytes = 0
    for i in range(layers):
        cache = LayerCache(BACKEND, session, i)
        # Keys of some heads point the same way: the heads' scores, and so their shares, are unequal.
        keys = rng.standard_normal((1, 3, tokens, 64)) + rng.uniform(0.0, 2.0, (1, 3, 1, 1))
        cache.update(keys.astype(np.float16), rng.standard_normal((1, 3, tokens, 64)).astype(np.float16))
        if session.strategy.needs:
            cache.attend(rng.standard_normal((1, 9, tokens, 64)).astype(np.float16), scale=0.125)
        cache.settle(prompt_end=True)
        nbytes += cache.nbytes
    return nbytes / (layers * tokens * 3 * 128 * 2)


@pytest.mark.parametrize("target", [1.8, 3.0])
@pytest.mark.parametrize("family", ["h2o", "snapkv | keepkv", "keydiff | pyramidkv", "keydiff | small"])
def test_what_is_held_is_what_was_matched(family: str, target: float) -> None:
    config = SMOLLM2 | {"num_hidden_layers": 2}
    method, ratio = match(family, target, 900, config)
    assert held_ratio(method, 900, 2, seed=1) == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize("target", [2.0, 4.0])
@pytest.mark.parametrize("family", ["keydiff | adakv", "knorm | adakv | int8", "keydiff | adakv | small"])
def test_unequal_heads_hold_what_was_matched_or_a_little_less(family: str, target: float) -> None:
    layers = 12
    method, expected = match(family, target, 1500, SMOLLM2 | {"num_hidden_layers": layers})
    held = [held_ratio(method, 1500, layers, seed) for seed in range(2)]
    assert max(held) <= 1 / target, (method, expected, held)
    assert min(held) > 0.96 * expected, (method, expected, held)


@pytest.mark.parametrize(
    "method",
    [
        "snapkv(budget=100)",
        "h2o(budget=100) | keepkv",
        "expected_attention(budget=150)",
        "snapkv(budget=100) | int4(group_size=32)",
        "int8(group_size=32)",
        "mlx-lm: affine(bits=4, group_size=32)",
        "mlx-lm: affine(bits=8)",
    ],
)
def test_a_16_bit_model_holds_the_ratio(method: str) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from tiny_model import llama_config, tiny_llama

    from kvmlx.backends.mlx.bench import MLXBench

    engine = MLXBench(tiny_llama(dtype="float16", head_dim=64), None, "cpu", "float16", chunk=128)
    tokens = np.random.default_rng(0).integers(0, 256, 300).tolist()
    nbytes, full_nbytes = engine.sizes(engine.prefill(tokens, method))
    assert nbytes / full_nbytes == pytest.approx(ratio_of(method, 300, llama_config(head_dim=64)), abs=1e-9)
