"""mlx-lm over compressed caches: every generator, batching, prefix re-use, memory. Models are tiny and random."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tiny_model import llama_config, llama_weights, tiny_llama, write_tokenizer

import kvmlx
from kvmlx import KVMLXError, Strategy, UnsupportedModelError

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx_lm  # noqa: E402
from mlx_lm.generate import (  # noqa: E402
    BatchGenerator,
    batch_generate,
    generate_step,
    speculative_generate_step,
    stream_generate,
)
from mlx_lm.models import base  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.utils import load_tokenizer  # noqa: E402

from kvmlx.backends.mlx import KVMLXCache, install, unwrap_model, wrap_model  # noqa: E402
from kvmlx.backends.mlx.adapter import CompressedRows, attention, layers_of  # noqa: E402

SMALL = "sinks=2, recent=8"
SNAPKV = f"snapkv(budget=0.4, window=8, {SMALL})"
STRATEGIES = {
    "full": "full",
    "int8": f"int8({SMALL})",
    "turboquant": f"turboquant(k=5, v=4, center=16, {SMALL})",
    "kivi": f"kivi(bits=4, group_size=16, {SMALL})",
    "snapkv-int4": f"{SNAPKV} | int4({SMALL})",
    "h2o": f"h2o(budget=0.4, {SMALL})",
    "snapkv-adakv": f"{SNAPKV} | adakv",
    "snapkv-keepkv": f"{SNAPKV} | keepkv(window=8)",
    "expected_attention": f"expected_attention(budget=0.4, {SMALL})",
    "streaming-bounded-every": f"streaming(budget=30, {SMALL}) | bounded | every(tokens=4)",
    "tova-bounded": f"tova(budget=30, {SMALL}) | bounded",
}
IDENTITY = {
    "full": "full",
    "int16": "int16",
    "snapkv-all": f"snapkv(budget=1.0, window=8, {SMALL})",
    "streaming-large": f"streaming(budget=500, {SMALL}) | bounded | every(tokens=4)",
    "h2o-large-at_end": f"h2o(budget=500, {SMALL})",
    "keepkv-large": f"snapkv(budget=500, window=8, {SMALL}) | keepkv(window=8)",
}
TRIMMABLE = ("full", "int8", "turboquant", "kivi")
AT_END = {name: text for name, text in STRATEGIES.items() if name not in TRIMMABLE and "bounded" not in name}


def each(strategies: dict[str, str]) -> Any:
    return pytest.mark.parametrize("strategy", strategies.values(), ids=strategies.keys())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return load_tokenizer(folder)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def decode(
    model: Any, prompt: list[int], caches: list[Any] | None, steps: int = 48, step_size: int = 64
) -> tuple[list[int], np.ndarray]:
    """Return the greedy tokens and their log-probabilities ``[steps, vocab]``."""
    found = list(
        generate_step(mx.array(prompt), model, max_tokens=steps, prompt_cache=caches, prefill_step_size=step_size)
    )
    return [int(np.array(t)) for t, _ in found], np.stack([np.array(p) for _, p in found])


def greedy(model: Any, prompt: list[int], strategy: str | None, steps: int = 48, step_size: int = 64) -> list[int]:
    """Return the greedy tokens of a run alone; the same question is computed once."""
    key = (id(model), tuple(prompt), strategy, steps, step_size)
    if key not in _SAID:
        caches = None if strategy is None else kvmlx.make_prompt_cache(model, strategy)
        _SAID[key] = model, decode(model, prompt, caches, steps, step_size)[0]
    return _SAID[key][1]


_SAID: dict[Any, tuple[Any, list[int]]] = {}
"""What `greedy` found, with the model, so that no other one gets its id."""


# -- generate_step -------------------------------------------------------------------------------------------


def test_the_model_is_worth_testing_with(model: Any) -> None:
    plain = greedy(model, prompt_of(140), None)
    assert len(set(plain)) > 12, "it does not repeat itself"
    for name, strategy in STRATEGIES.items():
        if name != "full":
            assert greedy(model, prompt_of(140), strategy) != plain, f"{name} shows"


@pytest.mark.parametrize(
    ("length", "step_size"),
    [(1, 16), (2, 16), (16, 16), (17, 16), (33, 16), (34, 16), (129, 64), (130, 64), (140, 2048), (37, 1)],
)
@each(IDENTITY)
def test_identity_is_the_stock_cache_bit_by_bit(model: Any, strategy: str, length: int, step_size: int) -> None:
    tokens, logprobs = decode(model, prompt_of(length), None, 24, step_size)
    mine, my_logprobs = decode(model, prompt_of(length), kvmlx.make_prompt_cache(model, strategy), 24, step_size)
    assert mine == tokens
    np.testing.assert_array_equal(my_logprobs, logprobs)


@each(AT_END)
@pytest.mark.parametrize("length", [1, 2, 33, 34, 140])
def test_chunk_size_is_irrelevant_at_the_end_of_the_prompt(model: Any, strategy: str, length: int) -> None:
    runs = [greedy(model, prompt_of(length), strategy, 40, n) for n in (2048, 16, 11)]
    assert all(run == runs[0] for run in runs)


@each(STRATEGIES)
def test_generate_and_stream_generate_take_the_cache(model: Any, strategy: str, tokenizer: Any) -> None:
    prompt = prompt_of(120)
    expected = greedy(model, prompt, strategy, 30, 2048)
    said = [
        r.token
        for r in stream_generate(
            model, tokenizer, prompt, max_tokens=30, prompt_cache=kvmlx.make_prompt_cache(model, strategy)
        )
    ]
    assert said == expected
    text = mlx_lm.generate(
        model, tokenizer, prompt, max_tokens=30, prompt_cache=kvmlx.make_prompt_cache(model, strategy)
    )
    assert text == tokenizer.decode(expected)


def test_an_empty_prompt_is_refused_by_mlx_lm(model: Any) -> None:
    with pytest.raises(ValueError, match="must be provided"):
        decode(model, [], kvmlx.make_prompt_cache(model, "int8"))
    with pytest.raises(ValueError, match="empty prompt"):
        BatchGenerator(model).insert([[]])


@each(STRATEGIES)
def test_a_prompt_beyond_the_context_works_as_with_the_stock_cache(strategy: str) -> None:
    """mlx-lm does not stop at max_position_embeddings; compression keeps the positions logical there too."""
    short = tiny_llama(max_position_embeddings=64)
    caches = kvmlx.make_prompt_cache(short, strategy)
    tokens, _ = decode(short, prompt_of(140), caches, 10)
    assert all(c.offset == 150 for c in caches)
    if strategy == "full":
        assert tokens == greedy(short, prompt_of(140), None, 10)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("snapkv(budget=8)", "must be >= 69"),
        ("streaming(budget=0)", "must be >= 1"),
        ("snapkv(budget=1.5)", r"must be in \(0, 1\]"),
        ("turboquant(bits=4, center=16, k=3)", "bits|k"),
        ("int4(group_size=64)", "64"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_token(model: Any, strategy: str, message: str) -> None:
    with pytest.raises(KVMLXError, match=message):
        kvmlx.make_prompt_cache(model, strategy)


# -- batches -------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 37, 140)


@dataclass
class Batch:
    """Drive a BatchGenerator and keep what it says, by sequence."""

    model: Any
    strategy: str
    step_size: int = 64
    said: dict[int, list[int]] = field(default_factory=dict)
    caches: dict[int, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = BatchGenerator(self.model, prefill_step_size=self.step_size)

    def insert(self, prompts: list[list[int]], max_tokens: list[int], caches: Any = None) -> list[int]:
        if caches is None:
            caches = [kvmlx.make_prompt_cache(self.model, self.strategy) for _ in prompts]
        uids = self.generator.insert(prompts, max_tokens, caches=caches)
        self.said |= {uid: [] for uid in uids}
        return uids

    def run(self, rounds: int = 1000) -> None:
        """Go on for some rounds, or until nothing is left."""
        for _ in range(rounds):
            prompts, responses = self.generator.next()
            for r in responses:
                self.said[r.uid].append(r.token)
                if r.finish_reason is not None:
                    self.caches[r.uid] = r.prompt_cache or []
            if not prompts and not responses:
                break


@each(STRATEGIES)
def test_a_batch_of_very_different_lengths_is_the_single_runs(model: Any, strategy: str) -> None:
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    batch = Batch(model, strategy)
    uids = batch.insert(prompts, [50, 45, 40, 48])
    batch.run()
    for uid, prompt, n in zip(uids, prompts, (50, 45, 40, 48), strict=True):
        assert batch.said[uid] == greedy(model, prompt, strategy, n), f"prompt of {len(prompt)}"


@each(STRATEGIES)
def test_continuous_batching_is_the_single_runs(model: Any, strategy: str) -> None:
    """Sequences join while others read their prompt or decode, end at different times, one is removed midway."""
    prompts = [prompt_of(n, seed=n + 7) for n in (140, 37, 2, 100, 1, 65)]
    wanted = [60, 9, 44, 30, 25, 50]
    batch = Batch(model, strategy, step_size=32)
    first = batch.insert(prompts[:2], wanted[:2])
    batch.run(8)
    second = batch.insert(prompts[2:4], wanted[2:4])
    batch.run(2)
    third = batch.insert(prompts[4:], wanted[4:])
    batch.run(12)
    (gone,) = second[1:]
    taken = batch.generator.remove([gone], return_prompt_caches=True)[gone]
    batch.run()
    single = [greedy(model, p, strategy, n, 32) for p, n in zip(prompts, wanted, strict=True)]
    for uid, expected in zip([*first, *second, *third], single, strict=True):
        said = batch.said[uid]
        if uid == gone:
            assert 0 < len(said) < len(expected), "it was decoding"
            assert said == expected[: len(said)]
        else:
            assert said == expected
    caches, seen = taken
    assert all(c.offset == len(seen) for c in caches)
    done = len(seen) - len(prompts[3])
    assert seen[len(prompts[3]) :] == single[3][:done]
    assert decode(model, [single[3][done]], caches, len(single[3]) - done - 1)[0] == single[3][done + 1 :]


@each(STRATEGIES)
def test_an_extracted_cache_goes_on_alone(model: Any, strategy: str) -> None:
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    batch = Batch(model, strategy)
    uids = batch.insert(prompts, [20, 30, 10, 25])
    batch.run()
    for uid, prompt in zip(uids, prompts, strict=True):
        caches, said = batch.caches[uid], batch.said[uid]
        expected = greedy(model, prompt, strategy, 60)
        assert all(c.offset == len(prompt) + len(said) for c in caches)
        # The last token said was already read: the next one follows from the expected token.
        at = len(said)
        assert decode(model, [expected[at]], caches, 59 - at)[0] == expected[at + 1 :]


@each(STRATEGIES)
def test_caches_with_a_history_join_a_batch(model: Any, strategy: str) -> None:
    """What the server does with a prompt cache that it found: the rest of the prompt, batched."""
    heads, rests = [prompt_of(n, seed=n) for n in (50, 1, 90)], [prompt_of(n, seed=n + 1) for n in (20, 40, 1)]
    caches, expected = [], []
    for head, rest in zip(heads, rests, strict=True):
        alone = kvmlx.make_prompt_cache(model, strategy)
        decode(model, head, alone, 3)
        caches.append(copy.deepcopy(alone))
        expected.append(decode(model, rest, alone, 40)[0])
    batch = Batch(model, strategy)
    uids = batch.insert(rests, [40] * 3, caches)
    batch.run()
    assert [batch.said[uid] for uid in uids] == expected


def test_batch_generate_takes_caches_and_returns_them(model: Any, tokenizer: Any) -> None:
    strategy = STRATEGIES["snapkv-int4"]
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    given = [kvmlx.make_prompt_cache(model, strategy) for _ in prompts]
    answer = batch_generate(
        model,
        tokenizer,
        prompts,
        given,
        max_tokens=20,
        return_prompt_caches=True,
        return_token_ids=True,
        prefill_step_size=64,
    )
    assert answer.token_ids == [greedy(model, p, strategy, 20) for p in prompts]
    assert answer.caches is not None
    for caches, prompt in zip(answer.caches, prompts, strict=True):
        assert all(type(c) is KVMLXCache and c.offset == len(prompt) + 20 for c in caches)


# -- speculative decoding ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafts() -> dict[str, Any]:
    """Return draft models of which all, some and hardly any proposals are taken."""
    some, config = tiny_llama(), llama_config()
    noise = llama_weights(config, seed=5)
    some.load_weights([(n, mx.array(w) + 0.05 * mx.array(noise[n])) for n, w in llama_weights(config).items()])
    return {"the-model-itself": tiny_llama(), "a-similar-one": some, "a-stranger": tiny_llama(seed=9)}


@pytest.mark.parametrize("proposals", [1, 4])
@pytest.mark.parametrize("draft", ["the-model-itself", "a-similar-one", "a-stranger"])
@pytest.mark.parametrize("name", TRIMMABLE)
def test_speculative_decoding_says_what_greedy_decoding_says(
    model: Any, drafts: dict[str, Any], name: str, draft: str, proposals: int
) -> None:
    """The same tokens; of coarse rows, which a verified run of tokens encodes a little earlier, the same ties.

    Greedy decoding encodes 32 rows together, verification all rows behind the recent ones: with 4 bits that
    moves a logit now and then, so there every token must be within 0.25 nats of greedy decoding's own best.
    """
    prompt, other = prompt_of(100), drafts[draft]
    caches = kvmlx.make_prompt_cache(model, STRATEGIES[name])
    steps = speculative_generate_step(
        mx.array(prompt),
        model,
        other,
        num_draft_tokens=proposals,
        max_tokens=48,
        prompt_cache=caches + stock.make_prompt_cache(other),
        prefill_step_size=64,
    )
    said, taken = [], 0
    for token, _, from_draft in steps:
        said.append(token)
        taken += from_draft
    assert len(said) == 48
    assert all(147 <= c.offset <= 148 for c in caches)
    assert all((c.layer.store.lengths == c.offset).all() for c in caches)
    if draft == "the-model-itself":
        assert taken > 10, "most proposals are taken"
    if draft == "a-stranger":
        assert taken < 10, "most proposals are rejected"
    if name in ("full", "int8"):
        assert said == greedy(model, prompt, STRATEGIES[name])
    assert regret(model, prompt, said, STRATEGIES[name]) < 0.25


def regret(model: Any, prompt: list[int], said: list[int], strategy: str) -> float:
    """Return by how much, at most, a token said was less likely than the best one, in nats, decoding one by one."""
    caches = kvmlx.make_prompt_cache(model, strategy)
    feed(model, caches, prompt[:-1], 64)
    most = 0.0
    for last, token in zip([prompt[-1], *said], said, strict=False):
        logits = model(mx.array([[last]]), cache=caches)[0, -1]
        most = max(most, (logits.max() - logits[token]).item())
    return most


def feed(model: Any, caches: list[Any], tokens: list[int], step_size: int) -> list[Any]:
    """Read tokens as mlx-lm's generators read a prompt, in chunks."""
    for at in range(0, len(tokens), step_size):
        model(mx.array(tokens[at : at + step_size])[None], cache=caches)
        mx.eval([c.state for c in caches])
    return caches


@pytest.mark.parametrize("text", ["int4(sinks=0, recent=0)", "kivi(bits=2, group_size=16, sinks=0, recent=0)"])
def test_rejected_tokens_leave_no_trace(model: Any, text: str) -> None:
    """Not even where no row is protected from being encoded together with them."""
    tokens = prompt_of(70)
    plain, tried = (feed(model, kvmlx.make_prompt_cache(model, text), tokens[:62], 64) for _ in range(2))
    mx.eval(model(mx.array(tokens[62:64])[None], cache=plain))
    mx.eval(model(mx.array(tokens[62:70])[None], cache=tried))
    assert stock.trim_prompt_cache(tried, 6) == 6
    outs = [np.array(model(mx.array([[5]]), cache=caches)) for caches in (plain, tried)]
    np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in TRIMMABLE])
def test_speculative_decoding_over_evicted_rows_is_refused(model: Any, name: str) -> None:
    caches = kvmlx.make_prompt_cache(model, STRATEGIES[name]) + stock.make_prompt_cache(model)
    with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
        next(speculative_generate_step(mx.array(prompt_of(40)), model, model, prompt_cache=caches))
    decode(model, prompt_of(40), caches[:3], 4)
    with pytest.raises(UnsupportedModelError, match="selects or encodes at the prompt's end"):
        caches[0].trim(1)


# -- prefixes ------------------------------------------------------------------------------------------------


def same_arrays(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(layers_of(a), layers_of(b), strict=True):
        mine, theirs = x.arrays(), y.arrays()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert bool(mx.array_equal(mine[name], theirs[name], equal_nan=True)), name


@each(STRATEGIES)
@pytest.mark.parametrize("state", ["fresh", "mid-prompt", "decoding"])
def test_a_copy_is_independent(model: Any, strategy: str, state: str) -> None:
    caches = kvmlx.make_prompt_cache(model, strategy)
    if state != "fresh":
        feed(model, caches, prompt_of(64), 32)
    if state == "decoding":
        decode(model, prompt_of(20), caches, 10)
    reference, other = copy.deepcopy(caches), copy.deepcopy(caches)
    decode(model, prompt_of(30, seed=3), other, 40)
    same_arrays(caches, reference)
    expected = decode(model, prompt_of(30, seed=4), caches, 40)
    answer = decode(model, prompt_of(30, seed=4), reference, 40)
    assert answer[0] == expected[0]
    np.testing.assert_array_equal(answer[1], expected[1])


@each(STRATEGIES)
def test_a_prefix_is_used_again(model: Any, strategy: str) -> None:
    prompt, lru = prompt_of(140), stock.LRUPromptCache()
    lru.insert_cache("m", prompt[:64], feed(model, kvmlx.make_prompt_cache(model, strategy), prompt[:64], 32))
    expected = greedy(model, prompt, strategy, step_size=32)
    for _ in range(2):
        caches, rest = lru.fetch_nearest_cache("m", prompt)
        assert rest == prompt[64:]
        assert decode(model, rest, caches, step_size=32)[0] == expected
        caches, rest = lru.fetch_nearest_cache("m", prompt[:64])
        assert rest == []
        assert decode(model, prompt[64:], caches, step_size=32)[0] == expected
    assert lru.fetch_nearest_cache("m", prompt_of(50, seed=8))[0] is None
    assert lru.nbytes == sum(c.nbytes for c in lru.fetch_nearest_cache("m", prompt[:64])[0] or [])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_longer_prompt_is_cut_back_or_left_alone(model: Any, name: str) -> None:
    strategy, lru = STRATEGIES[name], stock.LRUPromptCache()
    longer, prompt = prompt_of(150), prompt_of(80) + prompt_of(40, seed=2)
    assert longer[:80] == prompt[:80]
    caches = kvmlx.make_prompt_cache(model, strategy)
    answer, _ = decode(model, longer, caches, 1)
    lru.insert_cache("m", longer + answer, caches)
    caches, rest = lru.fetch_nearest_cache("m", prompt)
    if name not in TRIMMABLE:
        assert caches is None
        assert rest == prompt
        return
    assert caches and all(c.offset == 80 for c in caches)
    assert rest == prompt[80:]
    said = decode(model, rest, caches)[0]
    if name in ("full", "int8"):
        assert said == greedy(model, prompt, strategy)
    assert regret(model, prompt, said[:1], strategy) < 0.5


# -- chat ----------------------------------------------------------------------------------------------------

TURNS = (40, 3, 60, 1, 25)
ANSWER = 12


def chat(model: Any, caches: list[Any], step_size: int) -> Iterator[tuple[int, list[int]]]:
    """Talk as mlx_lm.chat does, feeding only what is new; yield tokens seen at each prompt's end and the answer."""
    seen = 0
    for turn, length in enumerate(TURNS):
        seen += length
        yield seen, decode(model, prompt_of(length, seed=turn), caches, ANSWER, step_size)[0]
        seen += ANSWER


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_chat_of_five_turns(model: Any, name: str) -> None:
    caches = kvmlx.make_prompt_cache(model, STRATEGIES[name])
    strategy = Strategy.parse(STRATEGIES[name])
    nbytes, kept = 0, 0.0
    for (seen, _), length in zip(chat(model, caches, 32), TURNS, strict=True):
        report = kvmlx.report(caches)
        assert report.tokens == seen + ANSWER
        assert all(c.offset == seen + ANSWER for c in caches)
        assert report.nbytes == sum(c.nbytes for c in caches)
        if strategy.select is None:
            assert report.kept_tokens == report.tokens
            assert report.nbytes >= nbytes
        elif strategy.every is not None:
            assert report.kept_tokens <= 30 + strategy.every
        else:
            budget = strategy.select.budget
            rows = max(int(budget * seen + 1e-9), 10) if isinstance(budget, float) else budget
            # A turn of one token looks like one more decoded token: its prompt has no end of its own.
            expected = min(kept + length, rows) if length > 1 else kept + 1
            assert report.kept_tokens == pytest.approx(expected + ANSWER)
        nbytes, kept = report.nbytes, report.kept_tokens


def test_a_chat_over_the_identity_is_the_stock_chat(model: Any) -> None:
    expected = list(chat(model, stock.make_prompt_cache(model), 32))
    for strategy in IDENTITY.values():
        assert list(chat(model, kvmlx.make_prompt_cache(model, strategy), 32)) == expected


@each(AT_END)
def test_chunk_size_is_irrelevant_in_a_chat(model: Any, strategy: str) -> None:
    runs = [list(chat(model, kvmlx.make_prompt_cache(model, strategy), n)) for n in (2048, 16)]
    assert runs[0] == runs[1]


# -- the hook ------------------------------------------------------------------------------------------------


@each(STRATEGIES)
def test_stock_caches_run_beside_ours(model: Any, strategy: str) -> None:
    expected = [greedy(model, prompt_of(90), s, 30) for s in (None, strategy)]
    pair = [
        generate_step(mx.array(prompt_of(90)), model, max_tokens=30, prompt_cache=caches, prefill_step_size=64)
        for caches in (None, kvmlx.make_prompt_cache(model, strategy))
    ]
    both = [[token for token, _ in step] for step in zip(*pair, strict=True)]
    assert [list(run) for run in zip(*both, strict=True)] == expected


def test_install_is_idempotent() -> None:
    from mlx_lm.models import llama

    install()
    before = stock.__dict__.copy(), base.__dict__.copy(), llama.__dict__.copy()
    install()
    assert (stock.__dict__, base.__dict__, llama.__dict__) == before
    # By name: a module of mlx-lm imported again by another test holds another function of the same name.
    assert vars(llama)["scaled_dot_product_attention"].__name__ == attention.__name__
    assert stock.KVMLXCache is KVMLXCache  # type: ignore[attr-defined]


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "an-attribute": lambda rows: rows.transpose(0, 1, 3, 2),
    "a-slice": lambda rows: rows[:, :, :1],
    "a-product": lambda rows: rows @ mx.zeros((16, 16)),
    "a-product-from-the-left": lambda rows: 2.0 * rows,
    "a-sum": lambda rows: rows + 1.0,
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_a_model_that_touches_its_cached_rows_is_named(
    touch: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    update = KVMLXCache.update_and_fetch

    def meddle(self: Any, keys: Any, values: Any) -> Any:
        keys, values = update(self, keys, values)
        assert isinstance(keys, CompressedRows)
        return touch(keys), values

    monkeypatch.setattr(KVMLXCache, "update_and_fetch", meddle)
    with pytest.raises(UnsupportedModelError, match=r"llama computes with its cached keys .* 'full' works"):
        model(mx.array([prompt_of(5)]), cache=kvmlx.make_prompt_cache(model, STRATEGIES["int8"]))


# -- other layers --------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
        },
    ),
    "llama-sliding": (
        "llama",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.fixture(scope="module", params=OTHER)
def other(request: pytest.FixtureRequest) -> Any:
    """A model whose second and fourth layers attend fully, the others in a window of 24; gpt_oss has sinks."""
    import importlib

    name, changed = OTHER[request.param]
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(llama_config(**{**changed, "model_type": name})))
    model.apply(lambda w: w * 2 if w.ndim > 1 else w)
    if name == "gpt_oss":
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal((4,)) + 1.0
    mx.eval(model.parameters())
    return model


@each(IDENTITY)
def test_other_layers_are_left_alone(other: Any, strategy: str) -> None:
    caches = kvmlx.make_prompt_cache(other, strategy)
    assert [type(c) for c in caches] == [stock.RotatingKVCache, KVMLXCache] * 2
    tokens, logprobs = decode(other, prompt_of(100), None, 30)
    mine, my_logprobs = decode(other, prompt_of(100), caches, 30)
    assert mine == tokens
    np.testing.assert_array_equal(my_logprobs, logprobs)
    report = kvmlx.report(caches)
    assert report.layers == 2
    assert report.unmanaged == ("layer 0: RotatingKVCache", "layer 2: RotatingKVCache")
    assert report.unmanaged_nbytes == caches[0].nbytes + caches[2].nbytes


@each({n: STRATEGIES[n] for n in ("full", "int8", "snapkv-int4", "snapkv-adakv", "streaming-bounded-every")})
def test_other_layers_in_a_batch(other: Any, strategy: str) -> None:
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    batch = Batch(other, strategy)
    uids = batch.insert(prompts, [20, 30, 25, 20])
    batch.run()
    for uid, prompt, n in zip(uids, prompts, (20, 30, 25, 20), strict=True):
        assert batch.said[uid] == greedy(other, prompt, strategy, n)


def test_attention_sinks_count_over_encoded_rows(other: Any) -> None:
    """Eight bits and a full cache differ by little; without the sinks they would differ by much."""
    _, exact = decode(other, prompt_of(100), None, 1)
    _, coarse = decode(other, prompt_of(100), kvmlx.make_prompt_cache(other, STRATEGIES["int8"]), 1)
    assert np.abs(coarse - exact).max() < 0.05 * np.abs(exact - exact.mean()).max()


def test_custom_make_cache_is_respected() -> None:
    model = tiny_llama()
    own = lambda: [stock.RotatingKVCache(max_size=32), stock.KVCache(), stock.KVCache()]  # noqa: E731
    model.make_cache = own
    first, second = (kvmlx.make_prompt_cache(model, STRATEGIES["int8"]) for _ in range(2))
    assert [type(c) for c in first] == [stock.RotatingKVCache, KVMLXCache, KVMLXCache]
    decode(model, prompt_of(50), first, 4)
    assert all(c.offset == 0 for c in second), "nothing is shared"
    wrap_model(model, STRATEGIES["int8"])
    assert [type(c) for c in stock.make_prompt_cache(model)] == [type(c) for c in first]
    unwrap_model(model)
    assert model.make_cache is own
    model.make_cache = lambda: [stock.RotatingKVCache(max_size=32) for _ in range(3)]
    with pytest.raises(UnsupportedModelError, match=r"no full-attention layer .*RotatingKVCache"):
        kvmlx.make_prompt_cache(model, STRATEGIES["int8"])


def test_a_wrapped_model_serves_every_generator(tokenizer: Any) -> None:
    model, prompt = tiny_llama(), prompt_of(100)
    plain = decode(model, prompt, None, 20)[0]
    for name in ("snapkv-int4", "int8"):
        strategy = STRATEGIES[name]
        assert wrap_model(model, strategy) is model
        expected = decode(model, prompt, kvmlx.make_prompt_cache(model, strategy), 20)[0]
        assert decode(model, prompt, None, 20)[0] == expected
        assert decode(model, prompt, None, 20)[0] == expected, "the second run starts afresh"
        assert batch_generate(model, tokenizer, [prompt], max_tokens=20, return_token_ids=True).token_ids == [expected]
    assert all(type(c) is KVMLXCache for c in stock.make_prompt_cache(model))
    unwrap_model(unwrap_model(model))
    assert all(type(c) is stock.KVCache for c in stock.make_prompt_cache(model))
    assert decode(model, prompt, None, 20)[0] == plain


def test_wrapping_with_what_cannot_be_changes_nothing() -> None:
    model = tiny_llama()
    before = dict(model.__dict__)
    for strategy in ("int4(group_size=64)", "snap"):
        with pytest.raises(KVMLXError):
            wrap_model(model, strategy)
    assert model.__dict__ == before


# -- memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_memory() -> Iterator[None]:
    """Let the allocator keep nothing back: a buffer used again may be larger than what it holds."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


def active() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        f"streaming(budget=64, {SMALL}) | every(tokens=8)",
        f"snapkv(budget=64, window=8, {SMALL}) | int4({SMALL}) | every(tokens=16)",
    ],
    ids=["streaming", "snapkv-int4"],
)
def test_two_thousand_steps_cost_what_the_first_ones_cost(model: Any, strategy: str, exact_memory: None) -> None:
    import psutil

    caches = kvmlx.make_prompt_cache(model, strategy)
    times, held, resident, rows = [], {}, {}, {}
    steps = generate_step(mx.array(prompt_of(100)), model, max_tokens=2001, prompt_cache=caches)
    start = time.perf_counter()
    for step, _ in enumerate(steps):
        times.append(time.perf_counter() - start)
        # The distance is a multiple of both schedules and of the 32 rows that are encoded together.
        if step in (496, 2000):
            held[step], rows[step] = active(), kvmlx.report(caches).kept_tokens
            resident[step] = psutil.Process().memory_info().rss
        start = time.perf_counter()
    first, last = statistics.median(times[50:350]), statistics.median(times[-300:])
    print(f"a step takes {first * 1e3:.2f} ms at first, {last * 1e3:.2f} ms at last; held {held}, rows {rows}")
    assert rows[2000] == rows[496] <= 64 + 16
    assert abs(held[2000] - held[496]) <= 1 << 14
    assert resident[2000] - resident[496] < 16 << 20, "the graph does not grow"
    assert last < 1.5 * first


LARGE = "sinks=4, recent=32"
LARGE_SNAPKV = f"snapkv(budget=0.25, window=32, {LARGE})"
LARGE_STRATEGIES = {
    "full": "full",
    "int8": f"int8({LARGE})",
    "turboquant": f"turboquant(k=5, v=4, center=16, {LARGE})",
    "kivi": f"kivi(bits=4, group_size=32, {LARGE})",
    "snapkv-int4": f"{LARGE_SNAPKV} | int4({LARGE})",
    "h2o": f"h2o(budget=0.25, {LARGE})",
    "snapkv-adakv": f"{LARGE_SNAPKV} | adakv",
    "snapkv-keepkv": f"{LARGE_SNAPKV} | keepkv(window=32)",
    "expected_attention": f"expected_attention(budget=0.25, {LARGE})",
    "snapkv-int4-every": f"{LARGE_SNAPKV} | int4({LARGE}) | every(tokens=8)",
    "h2o-every": f"h2o(budget=0.25, {LARGE}) | every(tokens=8)",
    "streaming-bounded-every": f"streaming(budget=300, {LARGE}) | bounded | every(tokens=4)",
    "tova-bounded": f"tova(budget=300, {LARGE}) | bounded",
    "snapkv-bounded": f"{LARGE_SNAPKV} | bounded",
}


def large_llama(dtype: str) -> Any:
    return tiny_llama(
        dtype=dtype,
        num_hidden_layers=2,
        hidden_size=256,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
    )


@pytest.fixture(scope="module")
def large_half() -> Any:
    return large_llama("float16")


@pytest.fixture(scope="module")
def large_single() -> Any:
    return large_llama("float32")


@pytest.mark.slow
@each(LARGE_STRATEGIES)
def test_what_is_reported_is_held(large_half: Any, strategy: str, exact_memory: None) -> None:
    """In the middle of the prompt, and while decoding, where nothing but the logits is ever evaluated."""
    prompt = prompt_of(1500)
    before = active()
    caches = kvmlx.make_prompt_cache(large_half, strategy)

    def compare(*_: Any) -> None:
        reported, held = kvmlx.report(caches).nbytes, active() - before
        assert reported <= held, "nothing is counted that is not there"
        assert held - reported <= 0.02 * reported, f"{held} bytes are held, {reported} reported"

    feed(large_half, caches, prompt[:1024], 512)
    compare()
    steps = generate_step(mx.array(prompt[1024:]), large_half, max_tokens=40, prompt_cache=caches)
    for _ in steps:
        pass
    compare()


@dataclass
class Prefill:
    """What a prompt of 3,000 tokens took, beyond the model: peak, and bytes held after each chunk, at most."""

    peak: int
    held: int


def prefill(model: Any, make: Callable[[], list[Any]]) -> Prefill:
    """Run a prompt twice, to the first tokens after it; the smaller peak is the one that is needed.

    MLX's CPU backend allocates a few operations ahead of those that run: how far, differs from run to run.
    """
    prompt, runs = mx.array(prompt_of(3000)), []
    for _ in range(2):
        before, held = active(), []
        mx.reset_peak_memory()

        def note(*_: Any, before: int = before, held: list[int] = held) -> None:
            held.append(mx.get_active_memory() - before)

        for _ in generate_step(
            prompt,
            model,
            max_tokens=3,
            prompt_cache=make(),
            prefill_step_size=512,
            prompt_progress_callback=note,
        ):
            pass
        runs.append(Prefill(mx.get_peak_memory() - before, max(held)))
    return Prefill(min(r.peak for r in runs), min(r.held for r in runs))


@pytest.fixture(scope="module")
def full_prefill(large_single: Any) -> Prefill:
    return prefill(large_single, lambda: stock.make_prompt_cache(large_single))


SCRATCH = {"snapkv-keepkv": 40 << 20, "h2o": 8 << 20, "h2o-every": 8 << 20}
"""Bytes that a stage's blocks of 4 MiB may take beyond the stock cache's peak: a constant, whatever the length.

On a model this small they show; MLX's CPU backend has up to ten of them in flight.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_STRATEGIES)
def test_the_peak_of_a_prefill_is_not_above_the_stock_caches(
    large_single: Any, full_prefill: Prefill, name: str, exact_memory: None
) -> None:
    mine = prefill(large_single, lambda: kvmlx.make_prompt_cache(large_single, LARGE_STRATEGIES[name]))
    print(f"{name}: peak {mine.peak / full_prefill.peak:.3f}, held {mine.held / full_prefill.held:.3f}")
    assert mine.peak <= 1.05 * full_prefill.peak + SCRATCH.get(name, 0)
    assert mine.held <= 1.02 * full_prefill.held


@pytest.mark.slow
def test_a_bounded_cache_stays_small_while_it_reads(
    large_single: Any, full_prefill: Prefill, exact_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the rows, and one chunk: after each chunk by the allocator, within it by the rows it holds."""
    made: list[list[Any]] = []
    most = [0]
    update = KVMLXCache.update_and_fetch

    def watch(self: Any, keys: Any, values: Any) -> Any:
        rows = update(self, keys, values)
        most[0] = max(most[0], sum(c.nbytes for c in made[-1]))
        return rows

    def make() -> list[Any]:
        made.append(kvmlx.make_prompt_cache(large_single, LARGE_STRATEGIES["snapkv-bounded"]))
        return made[-1]

    monkeypatch.setattr(KVMLXCache, "update_and_fetch", watch)
    mine = prefill(large_single, make)
    print(f"held {mine.held / full_prefill.held:.3f} after chunks, {most[0] / full_prefill.held:.3f} within")
    assert mine.held <= 0.45 * full_prefill.held
    assert most[0] <= 0.45 * full_prefill.held
