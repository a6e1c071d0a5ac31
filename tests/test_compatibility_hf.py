"""transformers' architectures: a few from scripts/compatibility.py, its results, refusals."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

from torch import Tensor, nn  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from kvmlx.backends.torch import layers_of, make_prompt_cache, report  # noqa: E402
from kvmlx.backends.torch.cache import Origin  # noqa: E402
from kvmlx.backends.torch.models import REFUSED, attention_of, rotary_of  # noqa: E402
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
    "falcon_h1": ("partly", {"LinearAttentionLayer": [0, 1, 2, 3]}),
    "zamba2": ("partly", {"LinearAttentionLayer": [0, 1, 2, 3]}),
    "beam": ("partly", {"DynamicSlidingWindowLayer": [0, 2]}),
    "hrm_text": ("works", {}),
    "deepseek_v3": ("refused", {}),
    "gemma2": ("refused", {}),
    "falcon": ("refused", {}),
    "minimax": ("refused", {}),
    "mamba2": ("refused", {}),
}
"""Verdict and caches left alone: plain, learned positions, experts, a language model among towers, attention sinks,
linear attention, layers without attention, shared rows, states beside attention in one layer, and one attention for
several layers, no rotary embedding in full layers, layers that run again; latent attention, capped logits, attention
by hand, a cache of its own, nothing to compress."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    result = examine(SIDE, name)
    assert not result.failures
    verdict, left_alone = ARCHITECTURES[name]
    if "DummyLayer" in left_alone and not hasattr(transformers.cache_utils, "DummyLayer"):
        left_alone = result.left_alone  # other versions have no class for what has no cache
    assert (result.verdict, result.left_alone) == (verdict, left_alone)
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


@pytest.mark.parametrize("strategy", ["full", "int8"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba2", r"no full-attention layer .* \(it has LinearAttentionLayer\)"),
        ("minimax", "no cache but one of its own kind"),
    ],
)
def test_what_cannot_be_served_at_all_is_not_told_that_full_works(name: str, message: str, strategy: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as error:
        make_prompt_cache(SIDE.build(name), strategy)
    assert "'full' works" not in str(error.value)


# -- attention beside a state in one layer ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return SIDE.build("falcon_h1")


def forward(model: Any, cache: Any, tokens: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(tokens), past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("strategy", [None, "full", "streaming(budget=500)"])
def test_beams_carry_their_states_with_them(hybrid: Any, strategy: str | None) -> None:
    tokens = torch.tensor([prompt(40, 1), prompt(40, 2)])
    told = {"attention_mask": torch.ones_like(tokens), "num_beams": 3, "do_sample": False, "max_new_tokens": 12}
    wanted = hybrid.generate(tokens, **told)
    cache = None if strategy is None else make_prompt_cache(hybrid, strategy)
    assert torch.equal(hybrid.generate(tokens, past_key_values=cache, **told), wanted)


def test_batches_are_repeated_and_picked_with_their_states(hybrid: Any) -> None:
    cache = make_prompt_cache(hybrid, "int8")
    forward(hybrid, cache, [prompt(40, 1), prompt(40, 2)])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    got = forward(hybrid, cache, [[7], [9]])
    for row, seed, token in zip(got, (2, 1), (7, 9), strict=True):
        alone = make_prompt_cache(hybrid, "int8")
        forward(hybrid, alone, [prompt(40, seed)])
        assert row.numpy() == pytest.approx(forward(hybrid, alone, [[token]])[0].numpy(), abs=1e-4)


def test_states_are_held_but_not_managed(hybrid: Any) -> None:
    cache = make_prompt_cache(hybrid, "int8(sinks=2, recent=8)")
    empty = report(cache)
    assert (empty.nbytes, empty.unmanaged_nbytes) == (0, 0)
    forward(hybrid, cache, [prompt(40, 1)])
    held = report(cache)
    layers: list[Any] = cache.layers
    states = [x for layer in layers for x in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    assert held.unmanaged_nbytes == sum(x.nbytes for x in states) > 0
    assert held.nbytes == sum(layer.nbytes for layer in layers_of(cache))


def test_a_state_cannot_take_tokens_back(hybrid: Any) -> None:
    cache = make_prompt_cache(hybrid, "full")
    assert not cache.is_croppable
    first = forward(hybrid, cache, [prompt(40, 1)])
    with pytest.raises(UnsupportedModelError, match="recurrent state cannot take tokens back"):
        cache.crop(-1)
    cache.reset()
    assert torch.equal(forward(hybrid, cache, [prompt(40, 1)]), first)


# -- what other versions of transformers do --------------------------------------------------------------------


def test_a_mask_is_known_by_a_layer_without_rows_too() -> None:
    """Some versions ask for the first layer that does not slide, whether or not it has rows."""
    cache = make_prompt_cache(SIDE.build("lfm2"), "int8")
    assert [type(cache.get_mask_sizes(5, layer)[1]) for layer in (0, 1)] == [Origin, Origin]


class TimeHeightWidth(nn.Module):
    """A rotary embedding that takes three positions a token, as some versions of Qwen's have it."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rope(x, position_ids[:, :, :].select(0, 0))


def test_rotary_embeddings_of_three_positions_are_those_of_a_text() -> None:
    model = SIDE.build("llama")
    attention, rope = attention_of(model)[0], model.model.rotary_emb
    wanted = rotary_of(rope, attention, 16, None)
    assert wanted is not None
    assert rotary_of(TimeHeightWidth(rope), attention, 16, None) == wanted
