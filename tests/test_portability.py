"""A cache made by one backend goes on in the other: the same bits, the same rows, the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import CacheFileError, files
from kvmlx.bench.tasks.haystack import prose
from kvmlx.demo_model import demo_model_path, is_intact
from tests.bits import assert_same_bits
from tests.tiny_model import llama_config, llama_weights, tiny_llama

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.models import gemma3_text  # noqa: E402
from transformers.cache_utils import DynamicSlidingWindowLayer  # noqa: E402

import kvmlx.backends.mlx as ours  # noqa: E402
from kvmlx.backends.torch import adapter as theirs  # noqa: E402
from kvmlx.backends.torch import files as their_files  # noqa: E402

STEPS = 64
EXACT_STEPS = 30
"""Rows are encoded 32 at a time: for so long the sides differ by the rounding of float32 only. Beyond, a number within
that of a border of codes, or of float16 scales, may fall to its other side, and the logits of random weights differ by
some 1e-2: the tokens say something only if the likeliest are far apart, as those of a real model are."""
FACTOR = 4
"""The likeliest token leads the second by at least so many times what the logits of the sides differ by: else the same
tokens would be luck. A cache that lost something on its way differs by more."""

STRATEGIES = {
    "full": "full",
    "int4": "int4(sinks=2, recent=8)",
    "snapkv-int4": "snapkv(budget=0.5, sinks=2, recent=16, window=16) | int4(sinks=2, recent=8)",
    "h2o-adakv": "h2o(budget=0.5, sinks=2, recent=8) | adakv",
    "snapkv-keepkv": "snapkv(budget=0.5, sinks=2, recent=32, window=16) | keepkv",
    "expected_attention-small": "expected_attention(budget=0.5, sinks=2, recent=8) | turboquant(bits=4, center=16)",
    "kivi": "kivi(bits=4, group_size=16, sinks=2, recent=16)",
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())


class Side:
    """A model in one framework, and what is done with it, alike for both."""

    name: str

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefilled(self, strategy: str, prompt: np.ndarray, *, settled: bool = True) -> Any:
        """Return the cache of a prompt ``[B, n]``, ready to decode."""
        raise NotImplementedError

    def feed(self, cache: Any, tokens: np.ndarray) -> np.ndarray:
        """Return the last logits ``[B, vocabulary]`` after ``tokens [B, n]``."""
        raise NotImplementedError

    def greedy(self, cache: Any, first: int, steps: int = EXACT_STEPS) -> tuple[list[int], np.ndarray]:
        """Return the likeliest tokens, one after another, and the logits ``[steps, vocabulary]`` that said so."""
        said, logits = [first], []
        for _ in range(steps):
            logits.append(self.feed(cache, np.array([[said[-1]]]))[0])
            said.append(int(logits[-1].argmax()))
        return said[1:], np.stack(logits)


class MLX(Side):
    name = "mlx"

    def prefilled(self, strategy: str, prompt: np.ndarray, *, settled: bool = True) -> Any:
        caches = ours.make_prompt_cache(self.model, strategy, inspect=True)
        for part in (prompt[:, :-1], prompt[:, -1:]) if settled else (prompt,):
            self.feed(caches, part)
            _ = [cache.state for cache in caches]
        if settled:
            self.settle(caches)
        return caches

    def feed(self, cache: Any, tokens: np.ndarray) -> np.ndarray:
        return np.array(self.model(mx.array(tokens), cache=cache)[:, -1].astype(mx.float32))

    def settle(self, cache: Any) -> None:
        ours.settle(cache)

    def save(self, path: Path, cache: Any) -> None:
        ours.save_prompt_cache(path, cache)

    def load(self, path: Path) -> Any:
        return ours.load_prompt_cache(path, model=self.model)

    def layers(self, cache: Any) -> list[Any]:
        return ours.layers_of(cache)

    def report(self, cache: Any) -> Any:
        return ours.report(cache)


class Torch(Side):
    name = "torch"

    def prefilled(self, strategy: str, prompt: np.ndarray, *, settled: bool = True) -> Any:
        cache = theirs.make_prompt_cache(self.model, strategy, inspect=True)
        self.feed(cache, prompt)
        if settled:
            self.settle(cache)
        return cache

    def feed(self, cache: Any, tokens: np.ndarray, **extra: Any) -> np.ndarray:
        with torch.no_grad():
            out = self.model(torch.from_numpy(tokens), past_key_values=cache, logits_to_keep=1, **extra)
        return out.logits[:, -1].float().numpy()

    def settle(self, cache: Any) -> None:
        theirs.settle(cache)

    def save(self, path: Path, cache: Any) -> None:
        their_files.save_prompt_cache(path, cache)

    def load(self, path: Path) -> Any:
        return their_files.load_prompt_cache(path, model=self.model)

    def layers(self, cache: Any) -> list[Any]:
        return theirs.layers_of(cache)

    def report(self, cache: Any) -> Any:
        return theirs.report(cache)


Pair = tuple[MLX, Torch]


def margin_of(logits: np.ndarray) -> float:
    """Return by how much the likeliest token leads the second, where it leads least."""
    ranked = np.sort(logits, axis=-1)
    return float((ranked[..., -1] - ranked[..., -2]).min())


def same_words(
    one: Any, cache: Any, other: Any, moved: Any, *, first: int = 5, steps: int = EXACT_STEPS
) -> tuple[list[int], float, float]:
    """Let both sides go on greedily from a token; return what they say alike, their margin and their difference."""
    (said, logits), (again, others) = one.greedy(cache, first, steps), other.greedy(moved, first, steps)
    margin, apart = margin_of(logits), float(np.abs(logits - others).max())
    assert said == again, f"the least margin was {margin}, the logits differ by up to {apart}"
    assert FACTOR * apart < margin, f"logits differ by {apart}, the least margin is {margin}: wrong, or another seed"
    return said, margin, apart


directions = pytest.mark.parametrize("there", [0, 1], ids=["mlx-to-torch", "torch-to-mlx"])


def turned(pair: Pair, there: int) -> tuple[Any, Any]:
    """Return the side that writes and the side that reads."""
    return (pair[1], pair[0]) if there else pair


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sharing work of this size among threads takes longer than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama_pair(**changed: Any) -> Pair:
    config = llama_config(**changed)
    dtype = changed.pop("dtype", "float32")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = llama_weights(llama_config(**changed))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return MLX(tiny_llama(dtype=dtype, **changed)), Torch(model.to(getattr(torch, dtype)).eval())


@pytest.fixture(scope="module")
def llamas() -> Pair:
    return llama_pair()


def prompt_of(n: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 97, (batch, n))


# -- tiny models ----------------------------------------------------------------------------------------------


@directions
@every_strategy
def test_the_same_bits_the_same_rows_the_same_tokens(llamas: Pair, strategy: str, there: int, tmp_path: Path) -> None:
    one, other = turned(llamas, there)
    cache = one.prefilled(strategy, prompt_of(150))
    one.save(tmp_path / "c", cache)
    moved = other.load(tmp_path / "c")
    assert json.loads(files.read(tmp_path / "c").header["caches"])[0]["class"] == "KVMLXCache"
    assert files.read(tmp_path / "c").header["backend"] == one.name
    for a, b in zip(one.layers(cache), other.layers(moved), strict=True):
        assert_same_bits(a.arrays(), b.arrays())
        for x, y in zip(a.positions()[0], b.positions()[0], strict=True):
            assert np.array_equal(x, y)
    assert other.report(moved) == one.report(cache)
    if strategy != "full":
        assert other.report(moved).kept_tokens < 150 or any(layer.store.has_body for layer in other.layers(moved))
    said, _, _ = same_words(one, cache, other, moved)
    # What was decoded since, encoded on the way, goes back as well.
    other.save(tmp_path / "d", moved)
    back = one.load(tmp_path / "d")
    for a, b in zip(other.layers(moved), one.layers(back), strict=True):
        assert_same_bits(a.arrays(), b.arrays())
    same_words(one, back, other, moved, first=said[-1])


@directions
@every_strategy
def test_a_file_that_passed_through_the_other_backend_is_the_same(
    llamas: Pair, strategy: str, there: int, tmp_path: Path
) -> None:
    one, other = turned(llamas, there)
    one.save(tmp_path / "c", one.prefilled(strategy, prompt_of(150)))
    other.save(tmp_path / "d", other.load(tmp_path / "c"))
    mine, again = (files.read(tmp_path / name) for name in ("c", "d"))
    assert {k: (a.dtype, a.shape, bytes(a.data)) for k, a in mine.arrays.items()} == {
        k: (a.dtype, a.shape, bytes(a.data)) for k, a in again.arrays.items()
    }
    for field in ("strategy", "model"):
        assert mine.header[field] == again.header[field]
    entries = ([entry["cache"] for entry in json.loads(f.header["caches"])] for f in (mine, again))
    assert next(entries) == next(entries)


@directions
@pytest.mark.parametrize("name", ["snapkv-int4", "h2o-adakv", "expected_attention-small"])
def test_a_prompt_goes_on_in_the_other_backend(llamas: Pair, name: str, there: int, tmp_path: Path) -> None:
    """What the strategy noted of the first part's queries is in the file: the same rows are chosen at the end."""
    one, other = turned(llamas, there)
    first, second = np.split(prompt_of(150), [140], axis=1)  # fewer than the window of queries
    cache = one.prefilled(STRATEGIES[name], first, settled=False)
    one.save(tmp_path / "c", cache)
    moved = other.load(tmp_path / "c")
    for side, held in ((one, cache), (other, moved)):
        side.feed(held, second)
        side.settle(held)
    kept = [[layer.positions() for layer in side.layers(held)] for side, held in ((one, cache), (other, moved))]
    for a, b in zip(*kept, strict=True):
        for x, y in zip(a[0], b[0], strict=True):
            assert np.array_equal(x, y)
    assert other.report(moved).kept_tokens == 75 or name != "snapkv-int4"


@directions
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_in_half_precision(dtype: str, there: int, tmp_path: Path) -> None:
    """Rows of the tail are of the model's dtype; exact rows of a body in bfloat16 are stored as its bits."""
    one, other = turned(llama_pair(dtype=dtype), there)
    cache = one.prefilled(STRATEGIES["h2o-adakv"], prompt_of(150))
    one.save(tmp_path / "c", cache)
    moved = other.load(tmp_path / "c")
    stored = files.read(tmp_path / "c").arrays
    assert stored["0.tail.keys"].dtype == dtype
    assert stored["0.keys.rows"].dtype == ("uint16" if dtype == "bfloat16" else dtype)
    for a, b in zip(one.layers(cache), other.layers(moved), strict=True):
        assert_same_bits(a.arrays(), b.arrays())
    near, far = one.feed(cache, np.array([[5]]))[0], other.feed(moved, np.array([[5]]))[0]
    assert near.argmax() == far.argmax()


# -- batches --------------------------------------------------------------------------------------------------


def masked(n: int, lengths: list[int], new: int = 0) -> dict[str, Any]:
    """Return mask and positions of transformers for a batch padded on the left, or for the last of ``new`` tokens."""
    mask = np.arange(n) >= n - np.array(lengths)[:, None]
    mask = torch.from_numpy(np.concatenate([mask, np.ones((len(lengths), new), bool)], axis=1).astype(np.int64))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -1:] if new else positions}


@pytest.mark.parametrize("name", ["full", "int4", "snapkv-int4", "h2o-adakv"])
@directions
def test_a_batch_of_unequal_prompts(llamas: Pair, name: str, there: int, tmp_path: Path) -> None:
    mlx, hf = llamas
    lengths = [150, 101]
    prompt = prompt_of(150, batch=2)
    if there:
        cache = theirs.make_prompt_cache(hf.model, STRATEGIES[name])
        hf.feed(cache, prompt, **masked(150, lengths))
        hf.settle(cache)
        hf.save(tmp_path / "c", cache)
        caches = mlx.load(tmp_path / "c")
        assert all(c.batched for c in caches)
    else:
        singles = [mlx.prefilled(STRATEGIES[name], prompt[i : i + 1, 150 - n :]) for i, n in enumerate(lengths)]
        caches = [ours.KVMLXCache.merge(list(pair)) for pair in zip(*singles, strict=True)]
        mlx.save(tmp_path / "c", caches)
        cache = hf.load(tmp_path / "c")
    for a, b in zip(mlx.layers(caches), hf.layers(cache), strict=True):
        assert a.offsets.tolist() == b.offsets.tolist() == lengths
        assert_same_bits(a.arrays(), b.arrays())
    tokens = np.array([[5], [6]])
    for step in range(1, EXACT_STEPS + 1):
        near, far = mlx.feed(caches, tokens), hf.feed(cache, tokens, **masked(150, lengths, step))
        assert near.argmax(axis=1).tolist() == far.argmax(axis=1).tolist(), step
        assert FACTOR * np.abs(near - far).max() < margin_of(near), "wrong, or another seed"
        tokens = near.argmax(axis=1)[:, None]


# -- layers that slide ----------------------------------------------------------------------------------------


def gemma_pair(window: int = 24) -> Pair:
    """Return a gemma 3 of six layers, every third of which attends to everything."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
        "sliding_window": window,
        "query_pre_attn_scalar": 16,
    }
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(6)]
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape, layer_types=kinds)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                weight.copy_(torch.randn_like(weight) * scale * weight.shape[1] ** -0.5)
    twin = gemma3_text.Model(gemma3_text.ModelArgs("gemma3_text", **shape, sliding_window_pattern=3))
    state = {name: mx.array(w.numpy()) for name, w in model.state_dict().items()}
    twin.load_weights(list(twin.sanitize(state).items()), strict=False)
    mx.eval(twin.parameters())
    return MLX(twin), Torch(model)


@pytest.fixture(scope="module")
def gemmas() -> Pair:
    return gemma_pair()


@directions
@pytest.mark.parametrize("n", [10, 23, 24, 25, 150])
def test_sliding_layers_are_converted(gemmas: Pair, n: int, there: int, tmp_path: Path) -> None:
    """Below the window, at it, one beyond and far beyond; decoding then passes the window in either library."""
    one, other = turned(gemmas, there)
    # Without codes: those of the turn's rows, made on either side, may differ.
    cache = one.prefilled("h2o(budget=0.5, sinks=2, recent=8)", prompt_of(n, seed=1))
    for token in range(3):
        one.feed(cache, np.array([[token]]))  # the ring has begun to turn
    one.save(tmp_path / "c", cache)
    moved = other.load(tmp_path / "c")
    slides: list[Any] = [layer for i, layer in enumerate(getattr(moved, "layers", moved)) if i % 3 != 2]
    for layer in slides:
        assert isinstance(layer, stock.RotatingKVCache if there else DynamicSlidingWindowLayer)
    if there:
        assert {(layer.max_size, layer.offset) for layer in slides} == {(24, n + 3)}
    else:
        assert {(layer.sliding_window, layer.get_seq_length()) for layer in slides} == {(24, n + 3)}
        assert {layer.keys.shape[2] for layer in slides} == {min(n + 3, 23)}
    kind = "RotatingKVCache" if there else "DynamicSlidingWindowLayer"
    assert other.report(moved).unmanaged == tuple(f"layer {i}: {kind}" for i in (0, 1, 3, 4))
    # A turn of several tokens, then one by one. The libraries tell a prompt's end differently: it is said.
    turn = prompt_of(7, seed=2)
    assert one.feed(cache, turn).argmax() == other.feed(moved, turn).argmax()
    one.settle(cache)
    other.settle(moved)
    same_words(one, cache, other, moved)


@directions
def test_sliding_layers_go_there_and_back(gemmas: Pair, there: int, tmp_path: Path) -> None:
    one, other = turned(gemmas, there)
    cache = one.prefilled(STRATEGIES["snapkv-int4"], prompt_of(60))
    one.save(tmp_path / "c", cache)
    moved = other.load(tmp_path / "c")
    other.greedy(moved, 5, steps=9)
    other.save(tmp_path / "d", moved)
    back = one.load(tmp_path / "d")
    one.greedy(cache, 5, steps=9)
    assert one.report(back).unmanaged == one.report(cache).unmanaged
    same_words(one, cache, one, back, first=6)


def test_an_empty_cache_of_sliding_layers(gemmas: Pair, tmp_path: Path) -> None:
    for one, other in (gemmas, gemmas[::-1]):
        prompt = prompt_of(40)
        path = tmp_path / one.name
        adapter = ours if one.name == "mlx" else theirs
        one.save(path, adapter.make_prompt_cache(one.model, "int4"))
        moved = other.load(path)
        near, far = (side.feed(cache, prompt) for side, cache in ((one, one.load(path)), (other, moved)))
        assert near.argmax() == far.argmax()


def test_padding_in_sliding_layers_does_not_pass(gemmas: Pair, tmp_path: Path) -> None:
    mlx, hf = gemmas
    cache = theirs.make_prompt_cache(hf.model, "int4")
    hf.feed(cache, prompt_of(40), **masked(40, [30]))
    hf.save(tmp_path / "c", cache)
    assert their_files.load_prompt_cache(tmp_path / "c", model=hf.model).get_seq_length() == 40
    with pytest.raises(CacheFileError, match=r"torch backend, .* has seen 40 tokens, the others \[30\]: with padding"):
        mlx.load(tmp_path / "c")


@directions
def test_several_sequences_in_sliding_layers_do_not_pass(gemmas: Pair, there: int, tmp_path: Path) -> None:
    one, other = turned(gemmas, there)
    cache = one.prefilled("int4", prompt_of(40, batch=2))
    one.save(tmp_path / "c", cache)
    with pytest.raises(CacheFileError, match=f"{one.name} backend, .*2 sequences .*one sequence at a time"):
        other.load(tmp_path / "c")


# -- what is refused ------------------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"num_key_value_heads": 4}, "n_kv_heads"), ({"rope_theta": 500000.0}, "rotary"), ({"head_dim": 32}, "key_dim")],
    ids=["heads", "rope", "dim"],
)
def test_another_model_is_refused(
    llamas: Pair, changed: dict[str, Any], reason: str, there: int, tmp_path: Path
) -> None:
    one = turned(llamas, there)[0]
    one.save(tmp_path / "c", one.prefilled("int4", prompt_of(20)))
    with pytest.raises(CacheFileError, match=f"another model.*{reason}"):
        turned(llama_pair(**changed), there)[1].load(tmp_path / "c")


def test_what_transformers_has_alone_is_refused_by_name(tmp_path: Path) -> None:
    cache = transformers.DynamicCache()
    cache.layers = [transformers.cache_utils.LinearAttentionLayer()]
    their_files.save_prompt_cache(tmp_path / "c", cache)
    with pytest.raises(CacheFileError, match=r"torch backend, .*'LinearAttentionLayer', this mlx-lm knows"):
        ours.load_prompt_cache(tmp_path / "c")


# -- the real model -------------------------------------------------------------------------------------------

REAL = {
    "eviction": "snapkv(budget=0.5)",
    "quantization": "small",
    "combined": "snapkv(budget=0.5) | int4",
}
PROMPT_TOKENS = 320


@pytest.fixture(scope="module")
def smollms() -> tuple[Pair, np.ndarray]:
    """The demo model in float32 on both sides, and a prompt of plain prose."""
    folder = demo_model_path()
    if not is_intact(folder):
        pytest.skip("the demo model is not there: run scripts/bootstrap, or `python -m kvmlx.demo_model`")
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    model.set_dtype(mx.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer.encode(prose()[:20_000])[4000 : 4000 + PROMPT_TOKENS]
    return (MLX(model), Torch(twin)), np.array([tokens])


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("strategy", REAL.values(), ids=REAL.keys())
def test_a_real_model_says_the_same_64_tokens_on_either_side(
    smollms: tuple[Pair, np.ndarray], strategy: str, tmp_path: Path
) -> None:
    """Greedy decoding in float32 from caches of both sides, each continued on both: four times the same tokens."""
    pair, prompt = smollms
    said: list[list[int]] = []
    for one, other in (pair, pair[::-1]):
        cache = one.prefilled(strategy, prompt)
        path = tmp_path / one.name
        one.save(path, cache)
        moved = other.load(path)
        for a, b in zip(one.layers(cache), other.layers(moved), strict=True):
            assert_same_bits(a.arrays(), b.arrays())
        report = other.report(moved)
        assert report.kept_tokens == (PROMPT_TOKENS // 2 if "snapkv" in strategy else PROMPT_TOKENS)
        assert any(layer.store.has_body for layer in other.layers(moved)) == (strategy != REAL["eviction"])
        words, margin, apart = same_words(one, cache, other, moved, first=int(prompt[0, 0]), steps=STEPS)
        said.append(words)
        print(f"{strategy}, from {one.name}: least margin {margin:.4f}, logits differ by {apart:.4f}")
    assert said[0] == said[1]
    assert len(set(said[0])) > 16, "the text goes round in circles: take another prompt"
