"""transformers' architectures: a few from scripts/compatibility.py, its results, refusals."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from kvmlx.backends.torch import make_prompt_cache  # noqa: E402
from kvmlx.backends.torch.models import REFUSED  # noqa: E402
from kvmlx.types import UnsupportedModelError  # noqa: E402
from scripts import compatibility as script  # noqa: E402
from scripts.compatibility_checks import digest, examine, prompt  # noqa: E402
from scripts.compatibility_torch import SIDE  # noqa: E402

ARCHITECTURES = {
    "llama": ("works", {}),
    "gpt2": ("works", {}),
    "qwen3_moe": ("works", {}),
    "gemma3": ("partly", {"DynamicSlidingWindowLayer": [0, 2]}),
    "gpt_oss": ("partly", {"DynamicSlidingWindowLayer": [0, 2]}),
    "qwen3_next": ("partly", {"LinearAttentionLayer": [0, 2]}),
    "nemotron_h": ("partly", {"LinearAttentionLayer": [0, 4], "DummyLayer": [1, 3]}),
    "gemma3n_text": ("partly", {"DynamicSlidingWindowLayer": [0, 2], "DummyLayer": [4, 5]}),
    "beam": ("partly", {"DynamicSlidingWindowLayer": [0, 2]}),
    "hrm_text": ("works", {}),
    "deepseek_v3": ("refused", {}),
    "gemma2": ("refused", {}),
    "falcon": ("refused", {}),
    "minimax": ("refused", {}),
    "mamba2": ("refused", {}),
}
"""Verdict and caches left alone: plain, learned positions, experts, a language model among towers, attention sinks,
linear attention, layers without attention, shared rows, no rotary embedding in full layers, layers that run again;
latent attention, capped logits, attention by hand, a cache of its own, nothing to compress."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    result = examine(SIDE, name)
    assert not result.failures
    assert (result.verdict, result.left_alone) == ARCHITECTURES[name]
    assert bool(result.reason) == (result.verdict == "refused")


def test_results_are_of_this_table() -> None:
    known = script.read("torch")
    assert known["table"] == digest(SIDE), "run python -m scripts.compatibility --side torch"
    assert [r.name for r in known["results"]] == list(SIDE.architectures)
    assert known["not_run"] == SIDE.not_run
    assert not [r.name for r in known["results"] if r.verdict == "failed"]


def test_table_names_every_causal_language_model_of_transformers() -> None:
    known = {*SIDE.architectures, *SIDE.not_run}
    assert len(SIDE.architectures) >= 40
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known
    assert set(REFUSED) <= known


@pytest.mark.parametrize("name", ["diffllama", "doge", "jetmoe"])
def test_an_unknown_model_that_computes_with_its_cache_fails_loudly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SIDE.build(name)
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be served with 'int8': .*'full' works"):
        make_prompt_cache(model, "int8")
    monkeypatch.delitem(REFUSED, name)
    cache = make_prompt_cache(model, "int8")
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=f"{name} computes with its cached"):
        model(torch.tensor([prompt(5, 1)]), past_key_values=cache)


@pytest.mark.parametrize("name", ["smollm3", "gpt2", "bloom"])
def test_model_without_plain_rotary_embeddings_is_refused_what_needs_them(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be served with 'expected_attention"):
        make_prompt_cache(SIDE.build(name), "expected_attention(budget=0.5)")
