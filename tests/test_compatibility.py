"""mlx-lm's architectures: a few from scripts/compatibility.py, its results, refusals, rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.models.llama import Attention, ModelArgs  # noqa: E402
from mlx_lm.models.rope_utils import initialize_rope  # noqa: E402

from kvmlx import ops  # noqa: E402
from kvmlx.backends.mlx import layers_of, make_prompt_cache, report, unwrap_model, wrap_model  # noqa: E402
from kvmlx.backends.mlx.models import REFUSED, rotary_of  # noqa: E402
from kvmlx.backends.mlx.ops import BACKEND  # noqa: E402
from kvmlx.types import UnsupportedModelError  # noqa: E402
from scripts import compatibility as script  # noqa: E402
from scripts.compatibility_checks import INT8, TOKENS, batch_change, digest, examine, prompt  # noqa: E402
from scripts.compatibility_mlx import SIDE  # noqa: E402

ARCHITECTURES = {
    "llama": ("works", {}),
    "qwen3": ("works", {}),
    "gemma3_text": ("partly", {"RotatingKVCache": [0, 2]}),
    "gpt_oss": ("partly", {"RotatingKVCache": [0, 2]}),
    "lfm2": ("partly", {"ArraysCache": [0, 2]}),
    "falcon_h1": ("partly", {"ArraysCache": [0, 1, 2]}),
    "afm7": ("works", {}),
    "llama4": ("partly", {"ChunkedKVCache": [0, 1, 2]}),
    "deepseek_v3": ("refused", {}),
    "gemma2": ("refused", {}),
    "mamba2": ("refused", {}),
}
"""Verdict and caches left alone: plain, sliding windows, attention sinks, hybrids, nested caches, shared
rows, a `make_cache` of its own, latent attention, attention by hand, nothing to compress."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    result = examine(SIDE, name)
    assert not result.failures
    assert (result.verdict, result.left_alone) == ARCHITECTURES[name]
    assert bool(result.reason) == (result.verdict == "refused")


def test_results_are_of_this_table() -> None:
    known = script.read("mlx")
    assert known["table"] == digest(SIDE), "run python -m scripts.compatibility --side mlx"
    assert [r.name for r in known["results"]] == list(SIDE.architectures)
    assert known["not_run"] == SIDE.not_run
    assert not [r.name for r in known["results"] if r.verdict == "failed"]


def test_table_names_every_architecture_of_mlx_lm() -> None:
    folder = Path(stock.__file__).parent
    models = {p.stem for p in folder.glob("*.py") if "class Model(" in p.read_text(encoding="utf-8")}
    alias = {p.stem for p in folder.glob("*.py") if "import Model\n" in p.read_text(encoding="utf-8")}
    known = {*SIDE.architectures, *SIDE.not_run}
    assert len(SIDE.architectures) >= 40
    assert models - alias <= known
    assert set(REFUSED) <= known


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma2", "plamo", "plamo2"])
def test_an_unknown_model_that_computes_with_its_cache_fails_loudly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SIDE.build(name)
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be served with 'int8': .*'full' works"):
        make_prompt_cache(model, "int8")
    monkeypatch.delitem(REFUSED, name)
    cache = make_prompt_cache(model, "int8")
    with pytest.raises((UnsupportedModelError, TypeError), match=f"{name} computes|CompressedRows"):
        model(mx.array([[1, 2, 3]]), cache=cache)


def test_strategy_that_needs_a_rotary_embedding_is_refused_before_it_runs() -> None:
    model = SIDE.build("smollm3")
    with pytest.raises(UnsupportedModelError, match=r"smollm3 .*'expected_attention.*layers 1, 3 .*snapkv"):
        make_prompt_cache(model, "expected_attention(budget=0.5)")


def test_rows_that_layers_share_are_observed_once() -> None:
    model = SIDE.build("afm7")
    cache = make_prompt_cache(model, "h2o(budget=100, sinks=2, recent=8)")
    tokens = prompt(40, 1)
    model(mx.array([tokens]), cache=cache)
    for layer in layers_of(cache):
        store = layer.store
        sums = np.array(store.columns["sums"])[:, :, : store.end].sum(axis=-1)
        assert sums == pytest.approx(np.full(sums.shape, 40.0), rel=1e-4)


def test_shared_rows_refuse_a_batch_of_unequal_lengths() -> None:
    model = SIDE.build("afm7")
    with pytest.raises(UnsupportedModelError, match="batch of unequal lengths"):
        batch_change(SIDE, model, (40, 30), "int8")


@pytest.mark.parametrize("name", ["qwen3", "falcon_h1"])
def test_wrapped_model_makes_fresh_caches(name: str) -> None:
    model = SIDE.build(name)
    own = [type(c) for c in stock.make_prompt_cache(model)]
    wrap_model(model, INT8)
    first, second = stock.make_prompt_cache(model), stock.make_prompt_cache(model)
    tokens = prompt(70, 1)
    a, b = (SIDE.decode(model, cache, tokens) for cache in (first, second))
    assert np.array_equal(a, b)
    assert report(first).tokens == 70 + TOKENS - 1
    unwrap_model(model)
    assert [type(c) for c in stock.make_prompt_cache(model)] == own


# -- rotary embeddings ---------------------------------------------------------------------------------------

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"original_max_position_embeddings": 1024, "short_factor": [1.0] * 16, "long_factor": [2.0, 3.0] * 8}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, **LLAMA3},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "longrope": LONG,
    "proportional": {"partial_rotary_factor": 0.25},
}


class Rotated(nn.Module):
    """Holds a rotary embedding as an attention layer does."""

    def __init__(self, rope: nn.Module, **attributes: int) -> None:
        super().__init__()
        self.rope = rope
        for name, value in attributes.items():
            setattr(self, name, value)


def check_rotary(attention: nn.Module, dim: int, rotate: Any) -> None:
    rotary = rotary_of(attention, dim)
    assert rotary is not None
    x = mx.random.normal((1, 2, 1, dim), key=mx.random.key(1))
    for position in (0, 1, 77, 5000):
        got = ops.rotate(BACKEND, x, np.array([[position]]), rotary)
        assert np.array(got) == pytest.approx(np.array(rotate(x, position)), abs=1e-3)


@pytest.mark.parametrize("traditional", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary(kind: str, traditional: bool) -> None:
    scaling = {"rope_type": kind, **SCALINGS[kind]}
    rope = initialize_rope(32, 10000.0, traditional, scaling, max_position_embeddings=4096)
    check_rotary(Rotated(rope), 32, lambda x, p: rope(x, offset=p))


def test_rotary_of_part_of_the_channels() -> None:
    rope = nn.RoPE(16)
    check_rotary(Rotated(rope), 40, lambda x, p: rope(x, offset=p))


def test_rotary_of_the_last_channels() -> None:
    rope = nn.RoPE(8, traditional=True)
    attention = Rotated(rope, qk_rope_head_dim=8)
    check_rotary(attention, 24, lambda x, p: mx.concatenate([x[..., :16], rope(x[..., 16:], offset=p)], axis=-1))


def test_rotary_that_is_not_linear_in_the_position_is_none() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    rope = initialize_rope(32, 10000.0, False, scaling, max_position_embeddings=2048)
    assert rotary_of(Rotated(rope), 32) is None


def test_no_rotary_is_none() -> None:
    assert rotary_of(Rotated(nn.Identity()), 32) is None
    assert rotary_of(nn.Linear(4, 4), 32) is None


def test_rotary_of_a_model() -> None:
    config = SIDE.common | {"model_type": "llama", "num_hidden_layers": 1}
    attention = Attention(ModelArgs.from_dict(config))
    check_rotary(attention, 16, lambda x, p: attention.rope(x, offset=p))
