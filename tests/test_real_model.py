"""A real model answers from a compressed cache: SmolLM2-135M-Instruct, when bootstrap could fetch it."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlx.bench.tasks.haystack import prose
from kvmlx.demo_model import demo_model_path, is_intact

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def measure() -> Any:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    if not is_intact(demo_model_path()):
        pytest.skip("the demo model is not there: run scripts/bootstrap, or `python -m kvmlx.demo_model`")
    from scripts import measure

    return measure


@pytest.fixture(scope="module")
def model(measure: Any) -> tuple[Any, Any]:
    return measure.demo_model()


def test_needles_are_found_where_rows_are_chosen_and_lost_where_they_are_not(
    measure: Any, model: tuple[Any, Any]
) -> None:
    texts = ["full", "snapkv(budget=0.25) | small", "streaming(budget=0.25)"]
    cases = [(1, 0.3, 11), (1, 0.7, 13), (4, 0.5, 42), (4, 0.7, 43)]
    right = measure.ask_needles(*model, texts, cases, 2048)
    score = {text: sum(map(sum, by.values())) for text, by in right.items()}
    assert score["full"] >= 3, f"the model itself must find most needles, or this says nothing: {right}"
    assert score["snapkv(budget=0.25) | small"] >= score["full"], right
    assert score["streaming(budget=0.25)"] < score["full"], right


def test_presets_keep_the_distribution(measure: Any, model: tuple[Any, Any]) -> None:
    """One text, 512 + 64 tokens: looser than docs/results/quality.json, and far tighter than plain int4's 0.17."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache as stock_cache

    import kvmlx

    net, tokenizer = model
    ids = np.array(tokenizer.encode(prose())[4000 : 4000 + 576])
    full = list(measure.logprobs(net, stock_cache(net), ids, 512))
    limits = {"balanced": 0.002, "small": 0.008, "smaller": 0.04, "tiny": 0.15}
    means = {}
    for preset, limit in limits.items():
        caches = kvmlx.make_prompt_cache(net, preset)
        other = list(measure.logprobs(net, caches, ids, 512))
        kl = np.mean([np.sum(np.exp(p) * (p - q)) for p, q in zip(full, other, strict=True)])
        means[preset] = float(kl)
        assert 1e-7 < kl < limit, means
        assert kvmlx.report(caches).nbytes < 0.6 * sum(c.nbytes for c in _stock_like(net, ids))
    assert list(means.values()) == sorted(means.values()), f"fewer bits, more drift: {means}"
    mx.clear_cache()


def _stock_like(net: Any, ids: Any) -> list[Any]:
    """Return stock caches as large as a full run of ``ids`` would leave them."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    args = net.args
    dim = args.hidden_size // args.num_attention_heads
    rows = mx.zeros((1, args.num_key_value_heads, len(ids), dim))
    caches = [KVCache() for _ in net.layers]
    for cache in caches:
        cache.update_and_fetch(rows, rows)
    return caches
