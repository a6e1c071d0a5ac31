"""transformers over compressed caches: generate in all its ways, batches with padding, refusals, nothing patched."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_hf import tiny, tiny_llama  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import kvmlx  # noqa: E402
from kvmlx import KVMLXError, StrategyError, UnsupportedModelError  # noqa: E402
from kvmlx.backends.numpy import BACKEND as NUMPY  # noqa: E402
from kvmlx.backends.torch import choose  # noqa: E402
from kvmlx.backends.torch.adapter import KVMLXCache, KVMLXLayer, layers_of  # noqa: E402
from kvmlx.backends.torch.models import describe  # noqa: E402
from kvmlx.session import LayerCache  # noqa: E402
from kvmlx.tolerance import assert_close, assert_same  # noqa: E402
from kvmlx.types import ModelInfo  # noqa: E402
from tests.bits import assert_same_bits  # noqa: E402

transformers.logging.set_verbosity_error()

SMALL = "sinks=2, recent=8"
SNAPKV = f"snapkv(budget=0.4, window=8, {SMALL})"
STRATEGIES = {
    "full": "full",
    "int4": f"int4({SMALL})",
    "turboquant": f"turboquant(k=5, v=4, center=16, {SMALL})",
    "snapkv-int4": f"{SNAPKV} | int4({SMALL})",
    "h2o": f"h2o(budget=0.4, {SMALL})",
    "snapkv-adakv": f"{SNAPKV} | adakv",
    "snapkv-keepkv": f"{SNAPKV} | keepkv(window=8)",
    "expected_attention": f"expected_attention(budget=0.4, {SMALL})",
    "streaming-bounded-every": f"streaming(budget=30, {SMALL}) | bounded | every(tokens=4)",
}
TRIMMABLE = ("full", "int4", "turboquant")
AT_END = {name: s for name, s in STRATEGIES.items() if name not in TRIMMABLE and "bounded" not in name}
LOSSLESS = {
    "full": "full",
    "int16": "int16",
    "streaming-large": f"streaming(budget=500, {SMALL}) | bounded",
    "keepkv-large": f"snapkv(budget=500, window=8, {SMALL}) | keepkv(window=8)",
}
COMPRESSING = STRATEGIES["snapkv-int4"]


def each(strategies: dict[str, str]) -> Any:
    return pytest.mark.parametrize("strategy", strategies.values(), ids=strategies.keys())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=2)


def prompt_of(length: int, seed: int = 1) -> Tensor:
    """Return the tokens ``[length]`` of a prompt; none is the padding token."""
    return torch.from_numpy(np.random.default_rng(seed).integers(2, 256, length))


def say(model: Any, prompt: Tensor, strategy: str | None, steps: int = 16, **options: Any) -> Tensor:
    """Return what is generated greedily after one prompt, by a new cache of the strategy or transformers' own."""
    cache = None if strategy is None else kvmlx.make_prompt_cache(model, strategy)
    out = model.generate(prompt[None], past_key_values=cache, max_new_tokens=steps, do_sample=False, **options)
    return out[0, len(prompt) :]


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, cache: Any, chunks: Sequence[int]) -> np.ndarray:
    """Return float64 logits ``[T, vocab]`` of given tokens: chunks of a prompt, then the others one by one."""
    out, at = [], 0
    for n in [*chunks, *[1] * (len(tokens) - sum(chunks))]:
        out.append(model(tokens[None, at : at + n], past_key_values=cache, use_cache=True).logits[0])
        at += n
    return torch.cat(out).double().numpy()


def stock_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def assert_tokens(got: Tensor, expected: Tensor) -> None:
    assert_same(got.numpy(), expected.numpy(), name="tokens")


# -- generate --------------------------------------------------------------------------------------------------


def test_the_model_is_worth_testing_with(model: Any) -> None:
    plain = say(model, prompt_of(100), None)
    assert len(set(plain.tolist())) > 8, "it does not repeat itself"
    for name, strategy in STRATEGIES.items():
        if name != "full":
            assert (say(model, prompt_of(100), strategy) != plain).any(), f"{name} shows"


@each({name: LOSSLESS[name] for name in ("full", "int16")})
@pytest.mark.parametrize(("length", "chunks"), [(1, [1]), (30, [30]), (300, [299]), (80, [16, 16, 16, 11])])
def test_identity_is_the_stock_cache_bit_by_bit(model: Any, strategy: str, length: int, chunks: list[int]) -> None:
    tokens = torch.cat([prompt_of(length), prompt_of(9, 2)])
    stock = logits_of(model, tokens, stock_cache(model), chunks)
    assert_same(logits_of(model, tokens, kvmlx.make_prompt_cache(model, strategy), chunks), stock, name="logits")


@each(LOSSLESS)
def test_what_changes_nothing_says_the_same(model: Any, strategy: str) -> None:
    plain = say(model, prompt_of(100), None)
    assert_tokens(say(model, prompt_of(100), strategy), plain)
    assert_tokens(say(model, prompt_of(100), strategy, prefill_chunk_size=33), plain)


@each({name: s for name, s in STRATEGIES.items() if name != "full"})
def test_steps_with_nothing_due_are_not_settled_and_say_the_same(
    model: Any, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, each decoded for longer than rows gather before they are encoded."""
    first, second = (torch.cat([prompt_of(n, n), prompt_of(70, n + 1)]) for n in (60, 20))
    said, decodes = {}, LayerCache._decodes
    for short in (True, False):
        early: list[bool] = []
        monkeypatch.setattr(
            LayerCache, "_decodes", lambda x, on=short, noted=early: (noted.append(on and decodes(x)), noted[-1])[1]
        )
        cache: Any = kvmlx.make_prompt_cache(model, strategy)
        logits = [logits_of(model, first, cache, [60]), logits_of(model, second, cache, [20])]
        arrays = {f"{i}.{name}": x for i, layer in enumerate(layers_of(cache)) for name, x in layer.arrays().items()}
        said[short] = np.concatenate(logits), arrays
        most = 0.9 * len(early) if short and "every" not in strategy else 0
        assert sum(early) >= most and any(early) == (most > 0)
    assert_same(said[True][0], said[False][0], name="logits")
    assert_same_bits(said[True][1], said[False][1])


@pytest.mark.parametrize(
    "kind", ["gemma3_text", "gemma3n_text", "gemma4_text", "glm", "gpt2", "gpt_oss", "phi", "qwen3", "qwen3_next"]
)
def test_rows_that_are_all_there_attend_as_ever(kind: str) -> None:
    """Through kvmlx's own attention: sliding, linear and shared layers beside it, sinks, MHA, partial rotation."""
    model = tiny(kind)
    tokens, chunks = prompt_of(70), [40, 20]
    stock = [logits_of(model, tokens, stock_cache(model), c) for c in (chunks, [60], [25, 35])]
    cache = kvmlx.make_prompt_cache(model, LOSSLESS["streaming-large"])
    got = logits_of(model, tokens, cache, chunks)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    oracle = logits_of(exact, tokens, stock_cache(model), chunks)
    assert_close(got, oracle, np.stack(stock), name="logits")
    assert all(layer.layer.offsets.tolist() in ([70], []) for layer in cache.managed)
    kept = kvmlx.make_prompt_cache(model, f"streaming(budget=30, {SMALL})")
    assert (logits_of(model, tokens, kept, chunks)[-5:] != got[-5:]).any(), "eviction shows"


@each(AT_END)
def test_chunk_size_is_irrelevant_at_the_end_of_the_prompt(model: Any, strategy: str) -> None:
    for length in (2, 34, 100):
        runs = [say(model, prompt_of(length), strategy, prefill_chunk_size=n) for n in (None, 16, 31)]
        for run in runs[1:]:
            assert_tokens(run, runs[0])


def test_exactly_the_prompt_is_selected(model: Any) -> None:
    cache = kvmlx.make_prompt_cache(model, SNAPKV, inspect=True)
    out = model.generate(prompt_of(100)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == 104 and cache.get_seq_length() == 103
    for layer in layers_of(cache):
        for rows in layer.positions()[0]:
            assert len(rows) == 40 + 3 and set(range(92, 103)) <= set(rows), "recent ones of the prompt, and three more"


def test_a_last_chunk_of_one_token_counts_as_decoded(model: Any) -> None:
    """transformers does not say where a prompt ends: a single token after several may be either."""
    cache = kvmlx.make_prompt_cache(model, SNAPKV, inspect=True)
    model.generate(prompt_of(101)[None], past_key_values=cache, max_new_tokens=1, prefill_chunk_size=50)
    for layer in layers_of(cache):
        assert all(len(rows) == 40 + 1 and rows[-1] == 100 for rows in layer.positions()[0])


def test_a_prompt_is_over_when_settle_says_so(model: Any) -> None:
    tokens = prompt_of(100)
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    logits_of(model, tokens, cache, [100])
    assert kvmlx.report(cache).kept_tokens == 100
    kvmlx.settle(cache)
    assert kvmlx.report(cache).kept_tokens == 40
    silent = kvmlx.make_prompt_cache(model, COMPRESSING)
    logits_of(model, tokens, silent, [100])
    more = prompt_of(9, 3)
    assert_same(logits_of(model, more, cache, []), logits_of(model, more, silent, []), name="logits")


@each(STRATEGIES)
def test_attention_is_that_of_the_numpy_session(model: Any, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's rows and queries, given to a session of the NumPy backend: same rows kept, same outputs."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    watched: list[LayerCache] = []

    def noting(name: str) -> Callable[..., Any]:
        original = getattr(LayerCache, name)

        def method(self: LayerCache, *args: Any, **kwargs: Any) -> Any:
            ours, inside = self in watched, noting.depth  # type: ignore[attr-defined]
            noting.depth += ours  # type: ignore[attr-defined]
            out = original(self, *args, **kwargs)
            if ours:
                noting.depth -= 1  # type: ignore[attr-defined]
                if not inside:
                    calls.append((name, copy.deepcopy(args), dict(kwargs), copy.deepcopy(out)))
            return out

        return method

    noting.depth = 0  # type: ignore[attr-defined]
    for name in ("update", "attend", "settle"):
        monkeypatch.setattr(LayerCache, name, noting(name))
    cache = kvmlx.make_prompt_cache(model, strategy, inspect=True)
    last = layers_of(cache)[-1]
    watched.append(last)
    # Rows handed out as they are never reach kvmlx's attention.
    cache.managed[-1].identity = False
    logits_of(model, prompt_of(140), cache, [60, 37])
    watched.clear()
    assert sum(name == "attend" for name, *_ in calls) == 2 + 43
    twin = LayerCache(NUMPY, last.session, last.layer)
    for name, args, kwargs, out in calls:
        plain = getattr(twin, name)(*(x.numpy() for x in args), **kwargs)
        if name == "attend":
            assert_close(out.numpy(), _attention(twin, args[0].numpy(), kwargs["scale"]), plain, name="attention")
    for mine, theirs in zip(last.positions()[0], twin.positions()[0], strict=True):
        assert_same(mine, theirs, name="positions")
    assert last.nbytes == twin.nbytes


def _attention(layer: LayerCache, queries: np.ndarray, scale: float) -> np.ndarray:
    """Return attention over what a NumPy session holds, in float64."""
    queries = queries.astype(np.float64)
    _, hq, n, _ = queries.shape
    out = []
    for head in range(layer.store.shape[1]):
        keys, values, columns = layer.store.lane_rows(0, slice(head, head + 1))
        keys, values = (x[0, 0].astype(np.float64) for x in (keys, values))
        group = hq // layer.store.shape[1]
        scores = queries[0, head * group : (head + 1) * group] @ keys.T * scale + columns.get("bias", np.zeros(1))[0]
        held = len(keys)
        scores = np.where(np.arange(n)[:, None] + held - n >= np.arange(held), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ values)
    return np.concatenate(out)[None]


# -- batches ---------------------------------------------------------------------------------------------------

LENGTHS = (1, 5, 37, 90)


def padded(prompts: Sequence[Tensor], *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask ``[B, T]`` of prompts of unequal length."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :][: len(prompt)] = prompt
        if not left:
            row.copy_(row.roll(len(prompt)))
    return ids, (ids != 0).long()


@each(STRATEGIES)
def test_a_batch_with_left_padding_is_the_single_runs(model: Any, strategy: str) -> None:
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    ids, mask = padded(prompts)
    single = [say(model, prompt, strategy) for prompt in prompts]
    for chunk in (None, 32) if strategy in ("full", *AT_END.values()) else (None,):
        cache = kvmlx.make_prompt_cache(model, strategy)
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=16,
            do_sample=False,
            prefill_chunk_size=chunk,
        )
        for got, expected in zip(out[:, ids.shape[1] :], single, strict=True):
            assert_tokens(got, expected)
        assert cache.get_seq_length() == 90 + 15
        for layer in layers_of(cache):
            assert layer.offsets.tolist() == [n + 15 for n in LENGTHS]
            assert (layer.store.lengths <= layer.offsets[:, None]).all(), "no row is padding"


@torch.no_grad()
def run(model: Any, cache: Any, ids: Tensor, mask: Tensor, *, n: int) -> Tensor:
    """Run the newest ``n`` columns; positions count the tokens that the mask shows."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -n:]
    return model(ids[:, -n:], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


@each({"full": "full", "snapkv-int4": COMPRESSING, "turboquant": STRATEGIES["turboquant"]})
def test_padding_may_lie_anywhere(model: Any, strategy: str) -> None:
    """On the right, and between the turns of a batch: each sequence is as it is alone."""
    first, second = ([prompt_of(n, seed=n) for n in lengths] for lengths in ((5, 60, 33), (40, 2, 17)))
    ids, mask = padded(first, left=False)
    more, more_mask = padded(second)
    cache = kvmlx.make_prompt_cache(model, strategy)
    out = run(model, cache, ids, mask, n=60)
    joined, joined_mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    after = run(model, cache, joined, joined_mask, n=40)
    one, one_mask = torch.cat([joined, joined[:, :1]], 1), torch.cat([joined_mask, joined_mask[:, :1]], 1)
    last = run(model, cache, one, one_mask, n=1)
    for b, (a, z) in enumerate(zip(first, second, strict=True)):
        alone = kvmlx.make_prompt_cache(model, strategy)
        parts = [torch.cat(list(x))[None] for x in ([a], [a, z], [a, z, a[:1]])]
        expected = [
            run(model, alone, x, torch.ones_like(x), n=n) for x, n in zip(parts, (len(a), len(z), 1), strict=True)
        ]
        for got, want in zip((out[b, len(a) - 1], after[b, -1], last[b, -1]), expected, strict=True):
            assert got.argmax() == want[0, -1].argmax()
            torch.testing.assert_close(got, want[0, -1], rtol=1e-4, atol=1e-4)
        assert layers_of(alone)[0].offsets[0] == layers_of(cache)[0].offsets[b]


@each({"snapkv": SNAPKV, "int8": f"int8({SMALL})", "full": "full"})
def test_tokens_of_ended_sequences_may_be_hidden_later(model: Any, strategy: str) -> None:
    """`generate` feeds padding to sequences that ended; the next turn's mask hides it."""
    ids, mask = padded([prompt_of(30, 1), prompt_of(50, 2)])
    cache = kvmlx.make_prompt_cache(model, strategy)
    run(model, cache, ids, mask, n=50)
    said = prompt_of(45, 3)
    for i in range(45):
        # The first sequence ends after five tokens.
        ids = torch.cat([ids, torch.tensor([[int(said[i]) if i < 5 else 0], [int(said[i])]])], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        run(model, cache, ids, mask, n=1)
    mask[0, 55:] = 0
    turn = prompt_of(12, 4)
    ids, mask = torch.cat([ids, turn.expand(2, -1)], 1), torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    out = run(model, cache, ids, mask, n=12)
    assert layers_of(cache)[0].offsets.tolist() == [30 + 5 + 12, 50 + 45 + 12]
    alone = kvmlx.make_prompt_cache(model, strategy)
    tokens = torch.cat([prompt_of(30, 1), said[:5], turn])
    want = logits_of(model, tokens[:35], alone, [30])
    want = run(model, alone, tokens[None], torch.ones_like(tokens)[None], n=12)
    assert out[0, -1].argmax() == want[0, -1].argmax()
    if "int8" not in strategy:  # there the last real tokens came back out of the body, decoded
        torch.testing.assert_close(out[0], want[0], rtol=1e-4, atol=1e-4)


def test_other_masks_of_the_past_are_refused(model: Any) -> None:
    ids, mask = padded([prompt_of(30, 1), prompt_of(50, 2)])
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    run(model, cache, ids, mask, n=50)
    changed = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    changed[1, 10] = 0
    with pytest.raises(UnsupportedModelError, match="other tokens of the past"):
        run(model, cache, torch.cat([ids, ids[:, -4:]], 1), changed, n=4)
    with pytest.raises(ValueError, match="has 4 columns: the cache has seen 50 and 4 are new"):
        model(ids[:, -4:], attention_mask=mask[:, -4:], past_key_values=cache)


def test_tokens_one_by_one_may_be_padding(model: Any) -> None:
    ids, mask = padded([prompt_of(4, 1), prompt_of(7, 2)])
    cache = kvmlx.make_prompt_cache(model, "int8")
    for i in range(7):
        out = run(model, cache, ids[:, : i + 1], mask[:, : i + 1], n=1)
    alone = kvmlx.make_prompt_cache(model, "int8")
    want = logits_of(model, prompt_of(4, 1), alone, [])
    assert layers_of(cache)[0].offsets.tolist() == [4, 7]
    assert out[0, -1].argmax() == want[-1].argmax()


@each({"lossless": LOSSLESS["streaming-large"], "full": "full"})
def test_beams_are_those_of_the_stock_cache(model: Any, strategy: str) -> None:
    ids, mask = padded([prompt_of(20, 5), prompt_of(33, 6)])
    options: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **options)
    assert_tokens(model.generate(ids, past_key_values=kvmlx.make_prompt_cache(model, strategy), **options), plain)


def test_beams_over_a_compressed_cache_score_what_they_say(model: Any) -> None:
    prompt = prompt_of(80, 8)
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    out = model.generate(
        prompt[None],
        past_key_values=cache,
        num_beams=3,
        max_new_tokens=10,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    again = logits_of(model, out.sequences[0, :-1], kvmlx.make_prompt_cache(model, COMPRESSING), [80])
    logprobs = torch.from_numpy(again[79:]).log_softmax(-1).gather(1, out.sequences[0, 80:, None])
    torch.testing.assert_close(out.sequences_scores[0].double(), logprobs.mean(), rtol=1e-4, atol=1e-4)
    assert layers_of(cache)[0].batch == 3


def test_sampling_draws_as_from_the_stock_cache(model: Any) -> None:
    drawn = []
    for cache in (None, kvmlx.make_prompt_cache(model, LOSSLESS["streaming-large"])):
        torch.manual_seed(5)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2, "top_k": 20}
        drawn.append(model.generate(prompt_of(40)[None], past_key_values=cache, **options))
    assert_tokens(drawn[1], drawn[0])


@each({"full": "full", "int8": f"int8({SMALL})", "turboquant": STRATEGIES["turboquant"]})
def test_assisted_decoding_takes_tokens_back(model: Any, strategy: str) -> None:
    draft = tiny_llama(seed=9)
    alone = say(model, prompt_of(60), "full", 20)
    cache = kvmlx.make_prompt_cache(model, strategy)
    out = model.generate(
        prompt_of(60)[None], past_key_values=cache, assistant_model=draft, max_new_tokens=20, do_sample=False
    )[0, 60:]
    assert len(out) == 20 and all(layer.is_croppable for layer in cache.managed)
    assert layers_of(cache)[0].offsets[0] == cache.get_seq_length() <= 80
    if strategy == "full":
        assert_tokens(out, alone)


def test_assisted_decoding_is_refused_before_it_begins(model: Any) -> None:
    cache = kvmlx.make_prompt_cache(model, SNAPKV)
    with pytest.raises(UnsupportedModelError, match="cannot take back tokens"):
        model.generate(prompt_of(60)[None], past_key_values=cache, assistant_model=model, max_new_tokens=9)
    assert not any(layer.is_croppable for layer in cache.managed)
    logits_of(model, prompt_of(60), cache, [60])
    with pytest.raises(UnsupportedModelError, match="cannot take back tokens"):
        cache.crop(-3)
    cache.crop(0)


# -- turns and copies ------------------------------------------------------------------------------------------


@each(STRATEGIES)
def test_a_second_turn_goes_on(model: Any, strategy: str) -> None:
    """`generate` is given the whole conversation, or what is new of it."""
    first, second = prompt_of(60, 1), prompt_of(41, 2)
    cache, twin = (kvmlx.make_prompt_cache(model, strategy) for _ in range(2))
    for kept in (cache, twin):
        out = model.generate(first[None], past_key_values=kept, max_new_tokens=10, do_sample=False)
    whole = torch.cat([out[0], second])
    mask = torch.ones_like(whole)[None]
    a = model.generate(whole[None], attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
    a = a[0, len(whole) :]
    logits = logits_of(model, torch.cat([out[0, -1:], second]), twin, [42])
    b = [int(logits[-1].argmax())]
    while len(b) < 12:
        b.append(int(logits_of(model, torch.tensor(b[-1:]), twin, [])[-1].argmax()))
    assert_tokens(a, torch.tensor(b))
    held = kvmlx.report(cache)
    assert held.tokens == 60 + 10 + 41 + 11 and held.tokens == cache.get_seq_length()
    if strategy in AT_END.values():
        assert held.kept_tokens <= 0.4 * 111 + 11, "the second turn's end selects anew"


@each(STRATEGIES)
def test_copies_live_on_their_own(model: Any, strategy: str) -> None:
    cache = kvmlx.make_prompt_cache(model, strategy)
    logits_of(model, prompt_of(70), cache, [70])
    other = copy.deepcopy(cache)
    more = prompt_of(20, 2)
    expected = logits_of(model, more, cache, [])
    assert_same(logits_of(model, more, other, []), expected, name="logits")
    other.reset()
    assert other.get_seq_length() == 0 and layers_of(other)[0].empty
    logits_of(model, prompt_of(70), other, [70])
    assert_same(logits_of(model, more, other, []), expected, name="logits after reset")


@each({"full": "full", "int8": f"int8({SMALL})"})
def test_crop_leaves_no_trace(model: Any, strategy: str) -> None:
    cache, twin = (kvmlx.make_prompt_cache(model, strategy) for _ in range(2))
    for kept in (cache, twin):
        logits_of(model, prompt_of(50), kept, [50])
    logits_of(model, prompt_of(6, 3), cache, [6])
    cache.crop(-6)
    assert cache.get_seq_length() == 50
    logits_of(model, prompt_of(6, 4), cache, [6])
    cache.crop(50)
    more = prompt_of(5, 2)
    assert_same(logits_of(model, more, cache, []), logits_of(model, more, twin, []), name="logits")


def test_batches_are_repeated_and_picked(model: Any) -> None:
    ids, mask = padded([prompt_of(20, 5), prompt_of(33, 6)])
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    run(model, cache, ids, mask, n=33)
    cache.batch_repeat_interleave(2)
    assert layers_of(cache)[0].offsets.tolist() == [20, 20, 33, 33]
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert layers_of(cache)[-1].offsets.tolist() == [33, 20]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([True, False]))
    alone = kvmlx.make_prompt_cache(model, COMPRESSING)
    logits_of(model, prompt_of(20, 5), alone, [20])
    token = torch.tensor([[7]])
    positions = torch.tensor([[20]])
    with torch.no_grad():
        got, want = (model(token, position_ids=positions, past_key_values=c).logits for c in (cache, alone))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_caches_are_asked(model: Any) -> None:
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    assert isinstance(cache, transformers.Cache) and type(cache) is KVMLXCache and len(cache) == 2
    assert cache.get_seq_length() == 0 and not cache.is_compileable and cache.is_sliding == [False] * 2
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.layers[0].get_max_length() == -1
    logits_of(model, prompt_of(30), cache, [30])
    assert cache.get_mask_sizes(5, 0) == (35, 0) and cache.is_initialized is False
    with pytest.raises(UnsupportedModelError, match="not offloaded"):
        cache.layers[0].offload()


# -- memory ----------------------------------------------------------------------------------------------------


def tensors_below(part: Any) -> Iterator[Tensor]:
    """Yield every tensor that is reachable from an object of kvmlx's."""
    seen, left = set(), [part]
    while left:
        x = left.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, dict):
            left += x.values()
        elif isinstance(x, list | tuple):
            left += x
        elif isinstance(x, LayerCache | KVMLXLayer) or type(x).__name__ in ("LayerStore", "Forward"):
            left += vars(x).values()


@each(STRATEGIES)
def test_bytes_held_are_those_of_the_storages(model: Any, strategy: str) -> None:
    ids, mask = padded([prompt_of(150, 1), prompt_of(200, 2)])
    cache = kvmlx.make_prompt_cache(model, strategy)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    kvmlx.settle(cache)
    storages = {s.data_ptr(): s.nbytes() for x in tensors_below(cache.layers) for s in [x.untyped_storage()]}
    held = kvmlx.report(cache).nbytes
    assert held == cache.nbytes and abs(sum(storages.values()) - held) <= 0.02 * held


def test_a_prompt_is_encoded_layer_by_layer(model: Any) -> None:
    """What acts after each chunk does so as soon as a layer has attended: not all layers are exact at once."""
    cache = kvmlx.make_prompt_cache(model, f"int4({SMALL})")
    logits_of(model, prompt_of(256), cache, [256])
    assert all(layer.store.length.min() >= 240 for layer in layers_of(cache))


def test_nothing_outlives_the_cache(model: Any) -> None:
    """Without the garbage collector: on a GPU memory must come back when the cache goes."""
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    say(model, prompt_of(40), COMPRESSING, 3)
    logits_of(model, prompt_of(40), cache, [40])
    gc.collect()
    gc.disable()
    try:
        before = sum(type(x) is LayerCache for x in gc.get_objects())
        del cache
        assert sum(type(x) is LayerCache for x in gc.get_objects()) == before - 2
    finally:
        gc.enable()


# -- the model's attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_other_caches_are_served_as_before(base: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(base)
    ids, mask = padded([prompt_of(20, 5), prompt_of(33, 6)])

    def stock() -> list[Any]:
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
        with torch.no_grad():
            return [static, model(ids, attention_mask=mask).logits, model(ids, past_key_values=DynamicCache()).logits]

    before = stock()
    untouched = {**ALL_ATTENTION_FUNCTIONS}, {**ALL_MASK_ATTENTION_FUNCTIONS}
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    assert model.config._attn_implementation == f"kvmlx_{base}"
    kvmlx.make_prompt_cache(model, COMPRESSING)
    assert model.config._attn_implementation == f"kvmlx_{base}"
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 38)
    for a, b in zip(stock(), before, strict=True):
        assert torch.equal(a, b)
    assert "kvmlx" not in model.config.to_json_string(use_diff=False), "nothing of it is saved with the model"
    for mapping, now in zip(untouched, (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS), strict=True):
        assert all(now[name] is function for name, function in mapping.items())


def test_nothing_in_transformers_is_patched() -> None:
    script = """
import sys, transformers, torch
from tests.tiny_hf import tiny_llama
model, other = tiny_llama(), tiny_llama()
import transformers.masking_utils, transformers.cache_utils, transformers.generation.utils
names = [n for n in sys.modules if n.startswith("transformers.")]
def all_of():
    found = {}
    for n in names:
        for key, x in vars(sys.modules[n]).items():
            if callable(x) and getattr(x, "__module__", "") and str(x.__module__).startswith("transformers"):
                found[n, key] = x
                if isinstance(x, type):
                    found |= {(n, key, k): v for k, v in vars(x).items() if callable(v)}
    return found
before, ids = all_of(), torch.arange(2, 40)[None]
with torch.no_grad():
    stock = other(ids).logits
import kvmlx
cache = kvmlx.make_prompt_cache(model, "snapkv(budget=0.4, window=8, sinks=2, recent=8) | int4")
model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
after = all_of()
assert all(after[key] is x for key, x in before.items())
assert other.config._attn_implementation == "sdpa"
with torch.no_grad():
    assert torch.equal(other(ids).logits, stock)
"""
    python(script)


def python(script: str) -> str:
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{script}"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_works_without_mlx() -> None:
    script = """
sys.modules.update(dict.fromkeys(("mlx", "mlx.core", "mlx_lm"), None))
import kvmlx
assert not {"torch", "transformers"} & sys.modules.keys()
from tests.tiny_hf import tiny_llama
import torch
model = tiny_llama()
cache = kvmlx.make_prompt_cache(model, "snapkv(budget=0.4, window=8, sinks=2, recent=8)")
model.generate(torch.arange(2, 60)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
print(kvmlx.report(cache).tokens)
kvmlx.settle(cache)
try:
    kvmlx.make_prompt_cache(object(), "full", backend="mlx")
except kvmlx.KVMLXError as error:
    print(error)
"""
    tokens, missing = python(script).splitlines()
    assert tokens == "61"
    assert missing.startswith("the mlx backend needs mlx") and missing.endswith(": pip install 'kvmlx[mlx]'")


def test_works_without_torch() -> None:
    script = """
sys.modules.update(dict.fromkeys(("torch", "transformers"), None))
import kvmlx
for backend in ("torch", "metal"):
    try:
        kvmlx.make_prompt_cache(object(), "full", backend=backend)
    except kvmlx.KVMLXError as error:
        print(error)
"""
    missing, unknown = python(script).splitlines()
    assert missing == "the torch backend needs torch: pip install 'kvmlx[torch]'"
    assert unknown == "unknown backend 'metal'; 'mlx' or 'torch' works"


def test_the_backend_is_that_of_the_model(model: Any) -> None:
    with pytest.raises(KVMLXError, match="backend='mlx' cannot serve what belongs to torch"):
        kvmlx.make_prompt_cache(model, "full", backend="mlx")
    assert type(kvmlx.make_prompt_cache(model, "full", backend="torch")) is KVMLXCache


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_and_no_grad_mix(model: Any, mode: Any) -> None:
    tokens, more = prompt_of(60), prompt_of(10, 2)
    expected = logits_of(model, torch.cat([tokens, more]), kvmlx.make_prompt_cache(model, COMPRESSING), [60])
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    with torch.inference_mode():
        model(tokens[None], past_key_values=cache)
    got = []
    for token in more:
        with mode():
            got.append(model(token[None, None], past_key_values=cache).logits[0, -1].double().numpy())
    assert_same(np.stack(got), expected[60:], name="logits")


@pytest.mark.slow
@each({"full": "full", "snapkv-int4": COMPRESSING})
def test_compiled_models_break_their_graph_and_say_the_same(strategy: str) -> None:
    model = tiny_llama()
    tokens = torch.cat([prompt_of(50), prompt_of(4, 2)])
    expected = logits_of(model, tokens, kvmlx.make_prompt_cache(model, strategy), [50])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = logits_of(compiled, tokens, kvmlx.make_prompt_cache(compiled, strategy), [50])
    assert_same(got, expected, name="logits")
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        logits_of(whole, tokens, kvmlx.make_prompt_cache(model, strategy), [50])
    torch._dynamo.reset()


# -- kernels ---------------------------------------------------------------------------------------------------


def test_kernels_are_chosen_by_device_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMLX_KERNELS", raising=False)
    assert choose.backend("cpu").path == "plain"
    monkeypatch.setenv("KVMLX_KERNELS", "plain")
    assert choose.backend("cpu") is choose.backend(torch.device("cpu"))
    monkeypatch.setenv("KVMLX_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KVMLXError, match="Triton kernels, but the device is cpu, not a CUDA or ROCm GPU"):
        choose.backend("cpu")
    for asked, message in (("metal", "torch's are Triton's"), ("cuda", "'cuda' is none of auto, triton, plain")):
        monkeypatch.setenv("KVMLX_KERNELS", asked)
        with pytest.raises(KVMLXError, match=message):
            choose.backend("cpu")


def test_kernels_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, interpreted where there is no GPU: a batch with padding, encoded and ragged."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_llama(num_hidden_layers=1).to(device)
    ids, mask = (x.to(device) for x in padded([prompt_of(20, 5), prompt_of(50, 6)]))
    said = []
    for kernels in ("plain", "triton"):
        monkeypatch.setenv("KVMLX_KERNELS", kernels)
        cache = kvmlx.make_prompt_cache(model, f"snapkv(budget=24, window=8, {SMALL}) | adakv | int4({SMALL})")
        assert layers_of(cache)[0].backend.path == kernels
        said.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False))
    assert_tokens(said[1].cpu(), said[0].cpu())


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma2", "gemma2 cannot be served with .*: it caps the logits of its attention; 'full' works"),
        ("deepseek_v3", "latent"),
        ("t5", "encoder"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(kind: str, message: str) -> None:
    model = tiny(kind)
    with pytest.raises(UnsupportedModelError, match=message):
        kvmlx.make_prompt_cache(model, COMPRESSING)
    assert "kvmlx" not in model.config._attn_implementation


@pytest.mark.parametrize(("kind", "has"), [("mamba", "LinearAttentionLayer"), ("mistral", "DynamicSlidingWindowLayer")])
def test_models_without_full_attention_are_refused(kind: str, has: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"no full-attention layer with a plain KV cache \(it has {has}\)"):
        kvmlx.make_prompt_cache(tiny(kind), "full")


def test_a_refused_model_works_in_full() -> None:
    model = tiny("gemma2")
    plain = say(model, prompt_of(50), None, 8)
    assert_tokens(say(model, prompt_of(50), "full", 8), plain)
    assert "kvmlx" not in model.config._attn_implementation


def test_sliding_layers_are_left_alone() -> None:
    model = tiny("gemma3_text")
    cache = kvmlx.make_prompt_cache(model, f"int4({SMALL})")
    logits_of(model, prompt_of(70), cache, [64])
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "KVMLXLayer"] * 2
    held = kvmlx.report(cache)
    assert held.unmanaged == ("layer 0: DynamicSlidingWindowLayer", "layer 2: DynamicSlidingWindowLayer")
    assert held.layers == 2 and held.tokens == 70 and held.unmanaged_nbytes == 2 * (2 * 2 * 31 * 16 * 4 + 8)


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        ("int4(group_size=64)", StrategyError, "64"),
        ("snapkv(budget=8)", StrategyError, "must be >= 69"),
        (
            "expected_attention(budget=0.4)",
            UnsupportedModelError,
            "rotary position embeddings, which layers 0, 1",
        ),
    ],
)
def test_strategies_that_do_not_fit_are_refused(strategy: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        kvmlx.make_prompt_cache(tiny("gpt2"), strategy)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is no model of transformers"):
        kvmlx.make_prompt_cache(torch.nn.Linear(2, 2), "full")


def test_attention_that_is_not_known_is_refused() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"attends by 'flex_attention'.*set_attn_implementation"):
        kvmlx.make_prompt_cache(model, COMPRESSING)


def test_a_model_whose_attention_was_set_back_is_refused() -> None:
    model = tiny_llama()
    for base in ("sdpa", "eager"):
        cache = kvmlx.make_prompt_cache(model, COMPRESSING)
        model.set_attn_implementation(base)
        with pytest.raises(UnsupportedModelError, match=r"llama computes with its cached keys .*set it back"):
            model.generate(prompt_of(9)[None], past_key_values=cache, max_new_tokens=2)


def test_compressed_rows_are_nothing_to_compute_with(model: Any) -> None:
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    rows, values = cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), 0)
    assert rows.shape == (1, 2, 5, 16) and rows.dtype == torch.float32 and rows.device.type == "cpu"
    assert rows.to(torch.float16) is rows and rows.contiguous() is rows
    for use in (
        lambda: torch.matmul(torch.zeros(1, 2, 5, 16), rows),
        lambda: torch.cat([rows, values], dim=2),
        lambda: torch.zeros(1, 2, 5, 16) * rows,
        lambda: rows @ rows,
        lambda: rows[:, :1],
        lambda: rows.transpose(2, 3),
        lambda: torch.nn.functional.scaled_dot_product_attention(torch.zeros(1, 2, 5, 16), rows, values),
    ):
        with pytest.raises(UnsupportedModelError, match="llama computes with its cached keys or values itself"):
            use()


def test_gradients_are_refused() -> None:
    model = tiny_llama().requires_grad_(True)
    for strategy in ("full", COMPRESSING):
        with pytest.raises(UnsupportedModelError, match=r"inference, no gradient .*torch\.no_grad"):
            model(prompt_of(9)[None], past_key_values=kvmlx.make_prompt_cache(model, strategy))


def test_attention_weights_are_refused(model: Any) -> None:
    cache = kvmlx.make_prompt_cache(model, COMPRESSING)
    with pytest.raises(UnsupportedModelError, match="attention weights"), torch.no_grad():
        model(prompt_of(9)[None], past_key_values=cache, output_attentions=True)


def mask_of(n: int, seen: int, *, causal: bool = True) -> Tensor:
    held = torch.ones(n, seen + n, dtype=torch.bool)
    return (held.tril(seen) if causal else held)[None, None]


@torch.no_grad()
def test_masks_of_ones_own(model: Any) -> None:
    """They hold where every row is there, and may not show the future."""
    cache = kvmlx.make_prompt_cache(model, f"int8({SMALL})")
    banded = mask_of(40, 0) & ~mask_of(40, 0).tril(-12)
    got = model(prompt_of(40)[None], attention_mask=banded, past_key_values=cache).logits
    want = model(prompt_of(40)[None], attention_mask=banded, past_key_values=DynamicCache()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="lets tokens see later ones"):
        model(prompt_of(5)[None], attention_mask=mask_of(5, 40, causal=False), past_key_values=cache)
    evicted = kvmlx.make_prompt_cache(model, SNAPKV)
    logits_of(model, prompt_of(60), evicted, [60])
    kvmlx.settle(evicted)
    with pytest.raises(UnsupportedModelError, match="an attention mask of its own over 65 tokens"):
        model(prompt_of(5)[None], attention_mask=mask_of(5, 60), past_key_values=evicted)


# -- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt_oss", "glm", "phi"])
def test_rotary_embeddings_turn_keys_as_measured(kind: str) -> None:
    """The same token at another position: its key in the first managed layer turns by what `describe` says."""
    everywhere: dict[str, Any] = {"layer_types": ["full_attention"] * 4}
    model = tiny(kind, **(everywhere if kind in ("gemma3_text", "gpt_oss") else {}))
    info = describe(model, [0])
    rotary = info.layers[0].rotary
    assert rotary is not None
    found = []
    for position in (0, 37):
        cache = kvmlx.make_prompt_cache(model, "full")
        with torch.no_grad():
            model(torch.tensor([[5]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
        found.append(layers_of(cache)[0].store.keys[:, :, :1])
    from kvmlx import ops

    layer = info.layers[0]
    assert (layer.n_heads, layer.n_kv_heads, layer.key_dim) == (4, found[0].shape[1], found[0].shape[3])
    turned = ops.rotate(choose.backend("cpu"), found[0] / rotary.factor**2, np.array([[37]]), rotary) * rotary.factor
    torch.testing.assert_close(turned, found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "plain"),
    [
        ({"rope_type": "linear", "factor": 4.0}, True),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, True),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            True,
        ),
        ({"rope_type": "dynamic", "factor": 8.0}, False),
    ],
    ids=["linear", "yarn", "llama3", "dynamic"],
)
def test_scaled_rotary_embeddings_are_measured(scaling: dict[str, Any], plain: bool) -> None:
    model = tiny("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    rope = model.model.rotary_emb
    before = rope.inv_freq.clone()
    rotary = describe(model, [0]).layers[0].rotary
    assert torch.equal(rope.inv_freq, before), "measuring leaves the model alone"
    assert (rotary is not None) == plain
    if rotary is not None:
        np.testing.assert_allclose(rotary.frequency, before.double().numpy(), rtol=1e-6)
        assert rotary.factor == pytest.approx(rope.attention_scaling, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_mlx_lm_describes_the_same_model(kind: str) -> None:
    pytest.importorskip("mlx_lm")
    import mlx_lm.utils

    from kvmlx.backends import files
    from kvmlx.backends.mlx import layers_of as mlx_layers_of
    from kvmlx.backends.mlx import make_prompt_cache as mlx_make_prompt_cache

    pattern = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window_pattern": 2}
    model = tiny(kind, **(pattern if kind == "gemma3_text" else {}))
    data = model.config.to_dict()
    # As the files of released models say it.
    data |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4} if kind == "gemma3_text" else {"rope_theta": 1e4}
    cls, arguments = mlx_lm.utils._get_classes(data)
    theirs = mlx_layers_of(mlx_make_prompt_cache(cls(arguments.from_dict(data)), "full"))[0].session.model
    mine = layers_of(kvmlx.make_prompt_cache(model, "full"))[0].session.model
    assert isinstance(mine, ModelInfo) and mine.model_type == kind and all(layer.rotary for layer in mine.layers)
    assert files._difference(mine, theirs, same_writer=True) == ""
