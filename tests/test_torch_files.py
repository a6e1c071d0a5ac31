"""Cache files of transformers models: what is saved comes back exactly; whatever else a file holds is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import CacheFileError, files
from tests import damage
from tests.bits import DATA, FILES_OF_BEFORE, assert_same_bits, digest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.cache_utils import (  # noqa: E402
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from kvmlx.backends import files as common  # noqa: E402
from kvmlx.backends.torch.adapter import KVMLXCache, KVMLXLayer, make_prompt_cache, report, settle  # noqa: E402
from kvmlx.backends.torch.files import _Transformers, load_prompt_cache, save_prompt_cache  # noqa: E402

STRATEGIES = {
    "full": "full",
    "int4": "int4(sinks=2, recent=8)",
    "snapkv-int4": "snapkv(budget=0.25, sinks=2, recent=16, window=16) | int4(sinks=2, recent=8)",
    "h2o-adakv": "h2o(budget=0.25, sinks=2, recent=8) | adakv",
    "snapkv-keepkv": "snapkv(budget=0.25, sinks=2, recent=32, window=16) | keepkv",
    "expected_attention": "expected_attention(budget=0.25, sinks=2, recent=8)",
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
PROMPT = 150


def tiny_model(n_layers: int = 2, dtype: str = "float32", **changed: Any) -> Any:
    args: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": n_layers,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(args | changed)))
    return model.to(getattr(torch, dtype)).eval()


def sliding_model(window: int = 32) -> Any:
    """Return a gemma 3 of three layers, of which the first two slide."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        sliding_window=window,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sharing work of this size among threads takes longer than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def tokens(n: int, seed: int = 0, batch: int = 1) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 97, (batch, n)))


@torch.no_grad()
def prefill(model: Any, cache: Any, n: int = PROMPT, batch: int = 1) -> Any:
    prompt = tokens(n, batch=batch)
    for part in prompt.split([64, n - 64], dim=1):
        model(part, past_key_values=cache)
    return cache


def compressed(model: Any, strategy: str, n: int = PROMPT, *, batch: int = 1, settled: bool = True) -> Any:
    cache = prefill(model, make_prompt_cache(model, strategy), n, batch)
    if settled:
        settle(cache)
    return cache


@torch.no_grad()
def generate(model: Any, cache: Any, batch: int = 1, steps: int = 40, mask: Any = None) -> np.ndarray:
    """Return the logits of decoding fixed tokens: equal logits are equal tokens, whatever the sampler."""
    out = []
    for i, token in enumerate(tokens(steps, 7, batch).T):
        extra: dict[str, Any] = {}
        if mask is not None:
            seen = torch.cat([mask, torch.ones(batch, i + 1, dtype=mask.dtype)], dim=1)
            extra = {"attention_mask": seen, "position_ids": seen.sum(dim=1, keepdim=True) - 1}
        out.append(model(token[:, None], past_key_values=cache, **extra).logits[:, -1])
    return torch.stack(out).float().numpy()


def same_layers(a: Any, b: Any) -> None:
    assert len(a.managed) == len(b.managed) > 0
    for x, y in zip(a.managed, b.managed, strict=True):
        assert_same_bits(x.layer.arrays(), y.layer.arrays())
        assert (x.columns, x.padded_until, x.early) == (y.columns, y.padded_until, y.early)


# -- what is saved comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "mid-prompt"])
@every_strategy
def test_generation_goes_on_as_from_the_original(model: Any, strategy: str, settled: bool, tmp_path: Path) -> None:
    cache = compressed(model, strategy, settled=settled)
    path = tmp_path / "cache.safetensors"
    save_prompt_cache(path, cache, {"model": "tiny", "ключ": "å\n"})
    loaded, metadata = load_prompt_cache(path, model=model, return_metadata=True)
    assert metadata == {"model": "tiny", "ключ": "å\n"} and type(loaded) is KVMLXCache
    same_layers(cache, loaded)
    assert report(loaded) == report(cache)
    if settled and strategy != "full":
        assert report(loaded).kept_tokens < PROMPT or "int4" in strategy
    bare = load_prompt_cache(path)
    assert all(x.data_ptr() % 32 == 0 for layer in loaded.managed for x in layer.layer.arrays().values())
    expected = generate(model, cache)
    for other in (loaded, bare):
        assert np.array_equal(generate(model, other), expected)


@every_strategy
def test_a_batch_with_padding_comes_back(model: Any, strategy: str, tmp_path: Path) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :49] = 0
    cache: Any = make_prompt_cache(model, strategy)
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        model(tokens(PROMPT, batch=2), past_key_values=cache, attention_mask=mask, position_ids=positions)
    settle(cache)
    path = tmp_path / "batch"
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path, model=model)
    same_layers(cache, loaded)
    first = loaded.managed[0]
    assert first.layer.offsets.tolist() == [PROMPT, 101]
    assert (first.columns, first.padded_until) == (PROMPT, PROMPT)
    entry = json.loads(files.read(path).header["caches"])[0]
    assert entry["batched"] is True
    assert np.array_equal(generate(model, loaded, 2, mask=mask), generate(model, cache, 2, mask=mask))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_models_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    cache = compressed(model, STRATEGIES["h2o-adakv"])
    assert cache.managed[0].layer.store.has_body
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c", model=model)
    same_layers(cache, loaded)
    assert str(loaded.managed[0].layer.store.keys.dtype) == f"torch.{dtype}"
    assert np.array_equal(generate(model, loaded), generate(model, cache))


def test_an_empty_cache_comes_back(model: Any, tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", make_prompt_cache(model, "int4"))
    loaded = load_prompt_cache(tmp_path / "c", model=model)
    assert loaded.get_seq_length() == 0 and not loaded.is_initialized
    fresh = make_prompt_cache(model, "int4")
    assert np.array_equal(generate(model, loaded), generate(model, fresh))


@pytest.mark.parametrize("n", [70, 20], ids=["beyond the window", "within"])
def test_sliding_layers_come_back(n: int, tmp_path: Path) -> None:
    model = sliding_model()
    cache: Any = make_prompt_cache(model, STRATEGIES["snapkv-int4"])
    with torch.no_grad():
        model(tokens(n), past_key_values=cache)
    settle(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2 + [KVMLXLayer]
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c", model=model)
    for mine, theirs in zip(cache.layers[:2], loaded.layers[:2], strict=True):
        assert theirs.keys.shape[2] == min(n, 31) and theirs.cumulative_length == n
        assert_same_bits({"k": mine.keys, "v": mine.values}, {"k": theirs.keys, "v": theirs.values})
    assert report(loaded) == report(cache)
    assert np.array_equal(generate(model, loaded), generate(model, cache))


def test_a_window_that_may_be_cropped_is_saved_as_the_model_sees_it(tmp_path: Path) -> None:
    model = sliding_model()
    cache: Any = make_prompt_cache(model, "int4")
    for layer in cache.layers[:2]:
        layer.activate_past_recording()
    with torch.no_grad():
        model(tokens(70), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 70
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c", model=model)
    assert loaded.layers[0].keys.shape[2] == 31
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys[:, :, -31:])


def test_states_of_linear_attention_come_back(tmp_path: Path) -> None:
    if not isinstance(LinearAttentionLayer().conv_states, dict):
        pytest.skip(f"transformers {transformers.__version__} has one state in a layer")
    torch.manual_seed(0)
    layer, blank = LinearAttentionLayer(number_of_states=2), LinearAttentionLayer()
    layer.update_conv_state(torch.randn(1, 8, 4), 0)
    layer.update_conv_state(torch.randn(1, 8, 3).bfloat16(), 1)
    layer.update_recurrent_state(torch.randn(1, 2, 8, 8), 1)
    cache: Any = DynamicCache()
    cache.layers = [layer, blank]
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c")
    assert type(loaded) is DynamicCache
    twin: Any
    other: Any
    twin, other = loaded.layers
    for i in range(2):
        assert torch.equal(twin.conv_states[i], layer.conv_states[i]) and twin.has_previous_state[i]
    assert twin.recurrent_states[0] is None and torch.equal(twin.recurrent_states[1], layer.recurrent_states[1])
    assert other.conv_states == {0: None} and not other.has_previous_state[0]
    new = torch.randn(1, 8, 1)
    assert torch.equal(twin.update_conv_state(new, 0), layer.update_conv_state(new, 0))


def test_states_that_may_be_cropped_are_saved_as_the_model_needs_them(tmp_path: Path) -> None:
    if not isinstance(LinearAttentionLayer().conv_states, dict):
        pytest.skip(f"transformers {transformers.__version__} takes no token back from a state")
    torch.manual_seed(0)
    cache: Any = DynamicCache()
    for n in (9, 2):  # more columns than the convolution spans, and fewer
        layer = LinearAttentionLayer()
        layer.activate_past_recording()
        layer.update_conv_state(torch.randn(1, 8, n), conv_kernel_size=4)
        cache.layers.append(layer)
    save_prompt_cache(tmp_path / "c", cache)
    long, short = load_prompt_cache(tmp_path / "c").layers
    assert long.conv_kernel_size[0] == short.conv_kernel_size[0] == 4
    assert torch.equal(long.conv_states[0], cache.layers[0].conv_states[0][..., -4:])
    assert torch.equal(short.conv_states[0][..., 2:], cache.layers[1].conv_states[0])
    assert not short.conv_states[0][..., :2].any()


def test_a_state_that_was_reset_comes_back_as_new(tmp_path: Path) -> None:
    layer = LinearAttentionLayer()
    layer.update_conv_state(torch.ones(1, 8, 4))
    layer.update_recurrent_state(torch.ones(1, 2, 8, 8))
    layer.reset()
    cache: Any = DynamicCache()
    cache.layers = [layer]
    save_prompt_cache(tmp_path / "c", cache)
    new = load_prompt_cache(tmp_path / "c").layers[0]
    assert vars(new) == vars(LinearAttentionLayer())


@pytest.fixture(scope="module", params=["falcon_h1", "zamba2"])
def hybrid(request: Any) -> Any:
    """Return a model with attention and a state in each layer, or with both in every second one."""
    from scripts.compatibility_torch import SIDE

    return SIDE.build(request.param)


@torch.no_grad()
def seen_by(model: Any, cache: Any, batch: int = 1) -> Any:
    model(tokens(100, batch=batch), past_key_values=cache, use_cache=True)
    return cache


def classes(path: Path) -> list[Any]:
    entries = json.loads(files.read(path).header["caches"])
    return [[part["class"] for part in e["caches"]] if e["class"] == "CacheList" else e["class"] for e in entries]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("strategy", ["full", STRATEGIES["snapkv-int4"], None], ids=["full", "snapkv-int4", "stock"])
def test_rows_and_states_of_one_layer_come_back(hybrid: Any, strategy: str | None, batch: int, tmp_path: Path) -> None:
    fresh = DynamicCache(config=hybrid.config) if strategy is None else make_prompt_cache(hybrid, strategy)
    cache: Any = seen_by(hybrid, fresh, batch)
    settle(cache)
    path = tmp_path / "c"
    save_prompt_cache(path, cache)
    rows = "DynamicLayer" if strategy is None else "KVMLXCache"
    assert ["LinearAttentionLayer", rows] in classes(path)
    loaded, bare = load_prompt_cache(path, model=hybrid), load_prompt_cache(path)
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    if strategy is not None:
        same_layers(cache, loaded)
        assert report(loaded) == report(cache)
    expected = generate(hybrid, cache, batch, steps=8)
    for other in (loaded, bare):
        assert np.array_equal(generate(hybrid, other, batch, steps=8), expected)


def test_a_sliding_layer_with_a_state_comes_back(tmp_path: Path) -> None:
    from scripts.compatibility_torch import SIDE

    if "inkling_text" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no layer that slides beside a state")
    model = SIDE.build("inkling_text")
    cache = seen_by(model, make_prompt_cache(model, "full"))
    save_prompt_cache(tmp_path / "c", cache)
    assert classes(tmp_path / "c")[0] == ["LinearAttentionLayer", "DynamicSlidingWindowLayer"]
    loaded = load_prompt_cache(tmp_path / "c", model=model)
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    assert np.array_equal(generate(model, loaded), generate(model, cache))


def test_an_empty_layer_with_a_state_comes_back(hybrid: Any, tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", make_prompt_cache(hybrid, "int4"))
    loaded = load_prompt_cache(tmp_path / "c", model=hybrid)
    assert np.array_equal(
        generate(hybrid, loaded, steps=8), generate(hybrid, make_prompt_cache(hybrid, "int4"), steps=8)
    )


def test_a_loaded_layer_with_a_state_takes_batches_and_resets(hybrid: Any, tmp_path: Path) -> None:
    cache = seen_by(hybrid, make_prompt_cache(hybrid, "int8"), 2)
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c", model=hybrid)
    for each in (cache, loaded):
        each.reorder_cache(torch.tensor([1, 0, 1]))
    assert np.array_equal(generate(hybrid, loaded, 3, steps=8), generate(hybrid, cache, 3, steps=8))
    for each in (cache, loaded):
        each.reset()
    assert np.array_equal(generate(hybrid, loaded, 3, steps=8), generate(hybrid, cache, 3, steps=8))


def test_rows_and_states_that_do_not_belong_together_are_refused(hybrid: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_prompt_cache(path, seen_by(hybrid, make_prompt_cache(hybrid, STRATEGIES["snapkv-int4"])))
    contents = files.read(path)
    at = next(i for i, kinds in enumerate(classes(path)) if isinstance(kinds, list))
    entries = json.loads(contents.header["caches"])
    states, rows = entries[at]["caches"]

    def refused(message: str, *parts: Any, arrays: Any = contents.arrays) -> None:
        changed = json.dumps([*entries[:at], {"class": "CacheList", "caches": parts}, *entries[at + 1 :]])
        files.write(path, arrays, damage.header_of(contents) | {"caches": changed})
        with pytest.raises(CacheFileError, match=message):
            load_prompt_cache(path)

    refused(r"several caches \(LinearAttentionLayer\): transformers' have", states)
    refused("it has states of .* sequences beside rows of 1", states, rows, arrays=_with_two(contents, at))
    refused("it has 0 and 1 states", states | {"state": [[], states["state"][1]]}, rows)
    refused("do not fit together", states | {"state": 5}, rows)
    name = f"{at}.0.0.0"
    refused("do not fit together", states, rows, arrays={k: x for k, x in contents.arrays.items() if k != name})
    extra = contents.arrays | {f"{at}.1.more": contents.arrays[name]}
    refused("does not own the array 'more'", states, rows, arrays=extra)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheFileError, match="checksum"):
        load_prompt_cache(path)


def _with_two(contents: files.Contents, at: int) -> dict[str, files.Stored]:
    """Return the arrays with another sequence in the first state of a layer."""
    name = f"{at}.0.0.0"
    one = contents.arrays[name]
    two = files.Stored(one.dtype, (2, *one.shape[1:]), 2 * bytes(one.data))
    return contents.arrays | {name: two}


def test_another_model_than_that_of_rows_and_states_is_refused(hybrid: Any, model: Any, tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", seen_by(hybrid, make_prompt_cache(hybrid, "int8")))
    with pytest.raises(CacheFileError, match="another model"):
        load_prompt_cache(tmp_path / "c", model=model)


def test_rows_and_states_pass_to_no_other_library(hybrid: Any, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    from kvmlx.backends.mlx import files as mlx_files

    save_prompt_cache(tmp_path / "c", seen_by(hybrid, make_prompt_cache(hybrid, "int8")))
    with pytest.raises(CacheFileError, match=r"kvmlx's torch backend, cannot be loaded: .*'LinearAttentionLayer'"):
        mlx_files.load_prompt_cache(tmp_path / "c")


def test_a_cache_of_transformers_own_comes_back(model: Any, tmp_path: Path) -> None:
    cache: Any = prefill(model, DynamicCache(config=model.config))
    save_prompt_cache(tmp_path / "c", cache, {"a": "b"})
    assert "strategy" not in files.read(tmp_path / "c").header
    for given in (model, None):
        loaded = load_prompt_cache(tmp_path / "c", model=given)
        assert type(loaded) is DynamicCache and [type(layer) for layer in loaded.layers] == [DynamicLayer] * 2
        twin = load_prompt_cache(tmp_path / "c")
        assert np.array_equal(generate(model, loaded), generate(model, twin))


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    """A layer may show a part of a larger array, or one in another order of strides."""
    base = torch.arange(2 * 3 * 40 * 8, dtype=torch.float32).reshape(1, 40, 6, 8)
    layer = DynamicLayer()
    keys, values = base.transpose(1, 2)[:, :, 3:33], base.transpose(1, 2)[:, :, 10:].flip(2)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    cache: Any = DynamicCache()
    cache.layers = [layer]
    save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(tmp_path / "c").layers[0]
    assert torch.equal(loaded.keys, keys) and torch.equal(loaded.values, values)
    assert (tmp_path / "c").stat().st_size < 2 * keys.numel() * 4 + 2048


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@every_strategy
def test_a_cache_goes_to_a_gpu_and_back(model: Any, strategy: str, tmp_path: Path) -> None:
    cache = compressed(model, strategy)
    save_prompt_cache(tmp_path / "cpu", cache)
    twin = tiny_model().to("cuda")
    there = load_prompt_cache(tmp_path / "cpu", model=twin)
    assert all(x.is_cuda for layer in there.managed for x in layer.layer.arrays().values())
    same_layers(cache, there)
    save_prompt_cache(tmp_path / "cuda", there)
    assert files.read(tmp_path / "cpu").arrays == files.read(tmp_path / "cuda").arrays
    best = []
    for m, c in ((model, cache), (twin, there)):
        with torch.no_grad():
            best.append(m(torch.tensor([[5]], device=m.device), past_key_values=c).logits.argmax().item())
    assert best[0] == best[1]


def test_every_layer_is_loaded_where_its_weights_are(model: Any, tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", compressed(model, STRATEGIES["h2o-adakv"]))
    adapter = _Transformers([torch.device("cpu"), torch.device("meta")])
    loaded = common.load(adapter, tmp_path / "c")
    for layer, device in zip(loaded.caches, ("cpu", "meta"), strict=True):
        assert {x.device.type for x in layer.layer.arrays().values()} == {device}
        assert layer.layer.backend.device.type == device
    # A file of a model of more layers is read before it is refused.
    few = common.load(_Transformers([torch.device("meta")]), tmp_path / "c")
    assert {x.device.type for layer in few.caches for x in layer.layer.arrays().values()} == {"meta"}


def test_inference_mode_leaves_no_mark(model: Any, tmp_path: Path) -> None:
    """What is saved or loaded within it can be written to outside of it."""
    cache, twin = (compressed(model, STRATEGIES["int4"], settled=False) for _ in range(2))
    with torch.inference_mode():
        save_prompt_cache(tmp_path / "c", cache)
        loaded = load_prompt_cache(tmp_path / "c", model=model)
    save_prompt_cache(tmp_path / "d", twin)
    expected = generate(model, twin)
    for other in (cache, loaded):
        assert not any(x.is_inference() for layer in other.managed for x in layer.layer.arrays().values())
        assert np.array_equal(generate(model, other), expected)


def test_the_file_is_plain_safetensors(model: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "c.safetensors"
    cache = compressed(model, STRATEGIES["int4"])
    save_prompt_cache(path, cache)
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
        assert header["format"] == "kvmlx" and header["backend"] == "torch"
        assert torch.equal(opened.get_tensor("1.tail.keys"), cache.managed[1].layer.store.keys)


@pytest.mark.parametrize("name", FILES_OF_BEFORE)
def test_files_of_before_still_load(name: str) -> None:
    cache, metadata = load_prompt_cache(DATA / f"{name}.safetensors", return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [type(layer) for layer in cache.layers] == [KVMLXLayer, DynamicSlidingWindowLayer, KVMLXLayer]
    said = report(cache)
    assert (said.tokens, said.kept_tokens, said.nbytes) == (40, 20.0, 7040)
    assert said.strategy == "snapkv(budget=0.5, sinks=1, recent=6, window=4) | int(k=3, sinks=1, recent=4)"
    assert said.unmanaged == ("layer 1: DynamicSlidingWindowLayer",)
    for layer in cache.managed:
        store = layer.layer.store
        assert store.length.tolist() == [[13]] and store.planes["values.rows"].dtype == torch.uint16
    slides = cache.layers[1]
    assert (slides.cumulative_length, slides.sliding_window) == (40, 12)
    arrays = {f"{i}.{key}": x for i, layer in enumerate(cache.managed) for key, x in layer.layer.arrays().items()}
    assert digest(arrays | {"keys": slides.keys, "values": slides.values}) == FILES_OF_BEFORE[name]


# -- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_layers": 3}, "3"),
        ({"num_key_value_heads": 4}, "n_kv_heads"),
        ({"head_dim": 32}, "key_dim"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "rotary"),
    ],
    ids=["layers", "heads", "dim", "rope"],
)
def test_another_model_is_refused_by_name(model: Any, changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", compressed(model, "int4"))
    with pytest.raises(CacheFileError, match=f"another model.*llama.*{reason}"):
        load_prompt_cache(tmp_path / "c", model=tiny_model(**changed))


def test_another_window_is_refused(tmp_path: Path) -> None:
    save_prompt_cache(tmp_path / "c", compressed(sliding_model(), "int4"))
    with pytest.raises(CacheFileError, match=r"Layer of 32 tokens where the model given has .* of 48 tokens"):
        load_prompt_cache(tmp_path / "c", model=sliding_model(48))


def test_a_model_that_cannot_be_served_is_refused(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from kvmlx import UnsupportedModelError
    from kvmlx.backends.torch import models

    save_prompt_cache(tmp_path / "c", compressed(model, "int4"))
    monkeypatch.setitem(models.REFUSED, "llama", "it is refused here")
    with pytest.raises(UnsupportedModelError, match="it is refused here; 'full' works"):
        load_prompt_cache(tmp_path / "c", model=model)


def test_caches_that_cannot_be_saved(model: Any, tmp_path: Path) -> None:
    cache = compressed(model, "int4")
    cache.layers[0] = StaticLayer(max_cache_len=16)
    with pytest.raises(CacheFileError, match=r"written: StaticLayer is neither.*DynamicSlidingWindowLayer"):
        save_prompt_cache(tmp_path / "c", cache)
    mixed = compressed(model, "int4")
    mixed.layers[1] = compressed(model, "full").layers[1]
    with pytest.raises(CacheFileError, match="different models or strategies"):
        save_prompt_cache(tmp_path / "c", mixed)
    with pytest.raises(TypeError, match="metadata"):
        save_prompt_cache(tmp_path / "c", DynamicCache(), {"a": 1})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_read_or_written(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match="no such file"):
        load_prompt_cache(tmp_path / "none")
    with pytest.raises(CacheFileError, match="there is no folder"):
        save_prompt_cache(tmp_path / "no" / "c", compressed(model, "int4"))


@pytest.fixture(scope="module")
def one_layer() -> Any:
    return tiny_model(1)


@torch.no_grad()
def refused_or_sound(path: Path, model: Any) -> bool:
    """Load the file: it is refused, or what it gives can be used without harm. Return whether it loaded."""
    began = time.perf_counter()
    try:
        cache = load_prompt_cache(path)
    except CacheFileError as error:
        assert str(path) in str(error)
        return False
    finally:
        assert time.perf_counter() - began < 5
    for n in (1, 5, 34, 1):
        out = model(tokens(n), past_key_values=cache).logits
        assert out.shape == (1, n, 97)
    settle(cache)
    return True


@pytest.mark.parametrize("name", ["snapkv-int4", "h2o-adakv", "expected_attention"])
def test_numbers_that_do_not_fit_are_refused(name: str, one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_prompt_cache(path, compressed(one_layer, STRATEGIES[name]))
    contents = files.read(path)
    outcomes = []
    for header in damage.numbers(contents):
        files.write(path, contents.arrays, header)
        outcomes.append(refused_or_sound(path, one_layer))
    assert outcomes.count(False) > len(outcomes) // 2


@every_strategy
def test_arrays_that_do_not_fit_are_refused(strategy: str, one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_prompt_cache(path, compressed(one_layer, strategy))
    contents = files.read(path)
    for what, arrays in damage.arrays(contents):
        files.write(path, arrays, damage.header_of(contents))
        assert not refused_or_sound(path, one_layer), what


@pytest.mark.parametrize("change", damage.NAMES, ids=lambda c: next(iter(c.items()))[1][:40])
def test_names_are_parsed_and_looked_up_never_run(change: dict[str, str], one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_prompt_cache(path, compressed(one_layer, STRATEGIES["int4"]))
    contents = files.read(path)
    files.write(path, contents.arrays, damage.header_of(contents) | change)
    with pytest.raises(CacheFileError, match="cannot be loaded"):
        load_prompt_cache(path)


def stock_cases() -> dict[str, Any]:
    """Return states of caches that kvmlx does not manage, as files have them."""
    rows = {"array": "0.0"}, {"array": "0.1"}
    return {
        "DynamicLayer": [*rows],
        "DynamicSlidingWindowLayer": [*rows, 40, 21],
        "LinearAttentionLayer": [[rows[0]], [rows[1]]],
        "KVCache": [*rows, 18],
        "RotatingKVCache": [*rows, 40, 0, 20, 7],
    }


@pytest.mark.parametrize("kind", stock_cases())
def test_states_of_stock_caches_are_not_trusted_either(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    stored = {
        f"0.{i}": files.Stored("float32", (1, 2, 20, 16), np.ones((1, 2, 20, 16), np.float32).tobytes())
        for i in range(2)
    }
    writer = "mlx" if kind.endswith("KVCache") else "torch"

    def loads(state: Any, arrays: dict[str, files.Stored]) -> bool:
        entries = json.dumps([{"class": kind, "state": state}])
        files.write(path, arrays, {"backend": writer, "caches": entries})
        try:
            layer = load_prompt_cache(path).layers[0]
        except CacheFileError as error:
            assert str(path) in str(error)
            return False
        if isinstance(layer, LinearAttentionLayer):
            return True
        new = torch.ones(1, 2, 1, 16)
        keys, values = layer.update(new, new)
        assert keys.shape[:3] == values.shape[:3] and keys.shape[2] == min(
            layer.get_seq_length(), getattr(layer, "sliding_window", math.inf)
        )
        return True

    state = stock_cases()[kind]
    assert loads(state, stored)
    outcomes = [loads(damage.replaced(state, at, v), stored) for at in damage.places(state) for v in damage.VALUES]
    assert outcomes.count(False) > len(outcomes) // 2
    changed = [("scalar", ()), ("flat", (640,)), ("batch", (2, 1, 20, 16)), ("turned", (16, 20, 2, 1))]
    for name, shape in changed:
        size = math.prod(shape) * 4
        other = {"0.0": files.Stored("float32", shape, bytes(size))}
        assert not loads(state, stored | other) or kind == "LinearAttentionLayer", name


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        ("RotatingKVCache", [None, None, 0, 4, 20, 0], "keeps the first 4 tokens: no layer of transformers does"),
        ("ArraysCache", [[None], None, None], "of class 'ArraysCache': of transformers' own"),
        ("ChunkedKVCache", [None, None, 0, 16], "KVCache and RotatingKVCache can be converted"),
        ("CacheList", None, "several caches"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x else "",
)
def test_what_mlx_lm_has_alone_is_refused_by_name(kind: str, state: Any, message: str, tmp_path: Path) -> None:
    entry = {"class": kind, "caches": []} if state is None else {"class": kind, "state": state}
    files.write(tmp_path / "c", {}, {"backend": "mlx", "caches": json.dumps([entry])})
    with pytest.raises(CacheFileError, match=f"written by kvmlx's mlx backend, cannot be loaded: .*{message}"):
        load_prompt_cache(tmp_path / "c")
