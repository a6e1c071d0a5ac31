"""Cache files: what is saved comes back exactly; whatever else a file holds is refused, never believed."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvmlx
from kvmlx import CacheFileError, files

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.models import llama  # noqa: E402

from kvmlx.backends.mlx import KVMLXCache, install  # noqa: E402
from tests import damage  # noqa: E402
from tests.bits import DATA, FILES_OF_BEFORE, digest  # noqa: E402

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


def tiny_model(n_layers: int = 2, **changed: Any) -> Any:
    args = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": n_layers,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 97,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**(args | changed)))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def tokens(n: int, seed: int = 0, batch: int = 1) -> Any:
    return mx.array(np.random.default_rng(seed).integers(0, 97, (batch, n)))


def prefill(model: Any, caches: list[Any], n: int = PROMPT, seed: int = 0) -> list[Any]:
    prompt = tokens(n, seed)
    for start, stop in ((0, 64), (64, n - 1), (n - 1, n)):
        mx.eval(model(prompt[:, start:stop], cache=caches))
    return caches


def compressed(model: Any, strategy: str, n: int = PROMPT, *, settled: bool = True) -> list[Any]:
    caches = prefill(model, kvmlx.make_prompt_cache(model, strategy), n)
    if settled:
        kvmlx.settle(caches)
    return caches


def generate(model: Any, caches: list[Any], batch: int = 1, steps: int = 40) -> np.ndarray:
    """Return the logits of decoding fixed tokens: equal logits are equal tokens, whatever the sampler."""
    out = []
    for token in tokens(steps, 7, batch).T:
        out.append(model(token[:, None], cache=caches)[:, -1])
        mx.eval(out[-1])
    return np.array(mx.stack(out))


def same_arrays(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        mine, theirs = x.layer.arrays(), y.layer.arrays()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert bool(mx.array_equal(mine[name], theirs[name], equal_nan=True)), name


# -- what is saved comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "mid-prompt"])
@every_strategy
def test_generation_goes_on_as_from_the_original(model: Any, strategy: str, settled: bool, tmp_path: Path) -> None:
    caches = compressed(model, strategy, settled=settled)
    own, plain = tmp_path / "cache.safetensors", tmp_path / "stock.safetensors"
    kvmlx.save_prompt_cache(own, caches, {"model": "tiny", "ключ": "å\n"})
    stock.save_prompt_cache(str(plain), caches, {"model": "tiny"})
    loaded, metadata = kvmlx.load_prompt_cache(own, model=model, return_metadata=True)
    assert metadata == {"model": "tiny", "ключ": "å\n"}
    same_arrays(caches, loaded)
    if settled:
        assert kvmlx.report(loaded) == kvmlx.report(caches)
        if strategy != "full":
            assert kvmlx.report(loaded).kept_tokens < PROMPT or "int4" in strategy
    others = [loaded, stock.load_prompt_cache(str(plain)), kvmlx.load_prompt_cache(plain, model=model)]
    expected = generate(model, caches)
    for other in others:
        assert np.array_equal(generate(model, other), expected)


@every_strategy
def test_a_batch_of_unequal_prompts_comes_back(model: Any, strategy: str, tmp_path: Path) -> None:
    singles = [compressed(model, strategy, n) for n in (PROMPT, 101)]
    caches = [KVMLXCache.merge(list(pair)) for pair in zip(*singles, strict=True)]
    path = tmp_path / "batch"
    kvmlx.save_prompt_cache(path, caches)
    loaded = kvmlx.load_prompt_cache(path, model=model)
    same_arrays(caches, loaded)
    assert loaded[0].batched and loaded[0].offset.tolist() == [PROMPT, 101]
    assert np.array_equal(generate(model, loaded, 2), generate(model, caches, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_models_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    model = tiny_model()
    model.set_dtype(getattr(mx, dtype))
    caches = compressed(model, STRATEGIES["h2o-adakv"])
    kvmlx.save_prompt_cache(tmp_path / "c", caches)
    loaded = kvmlx.load_prompt_cache(tmp_path / "c", model=model)
    same_arrays(caches, loaded)
    assert str(loaded[0].layer.store.keys.dtype).endswith(dtype)


def test_an_empty_cache_comes_back(model: Any, tmp_path: Path) -> None:
    kvmlx.save_prompt_cache(tmp_path / "c", kvmlx.make_prompt_cache(model, "int4"))
    loaded = kvmlx.load_prompt_cache(tmp_path / "c", model=model)
    assert all(cache.empty() for cache in loaded)
    fresh = kvmlx.make_prompt_cache(model, "int4")
    assert np.array_equal(generate(model, loaded), generate(model, fresh))


def test_layers_that_stay_stock_come_back(tmp_path: Path) -> None:
    model = tiny_model(3, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=32)
    caches = compressed(model, STRATEGIES["snapkv-int4"])
    assert [type(c).__name__ for c in caches] == ["KVMLXCache", "RotatingKVCache", "KVMLXCache"]
    kvmlx.save_prompt_cache(tmp_path / "c", caches)
    loaded = kvmlx.load_prompt_cache(tmp_path / "c", model=model)
    assert np.array_equal(generate(model, loaded), generate(model, caches))


def filled(cache: Any, batch: int = 1) -> Any:
    rows = mx.random.normal((batch, 2, 20, 64)).astype(mx.bfloat16)
    cache.update_and_fetch(rows, rows)
    return cache


def stock_caches() -> Iterator[Any]:
    mx.random.seed(1)
    arrays = stock.ArraysCache(2, left_padding=[1, 0])
    arrays[0], arrays[1] = mx.random.normal((2, 3)), mx.zeros((2, 0))
    yield filled(stock.KVCache())
    yield stock.KVCache()
    yield filled(stock.RotatingKVCache(max_size=8, keep=2))
    yield filled(stock.QuantizedKVCache(group_size=64, bits=4))
    yield filled(stock.ChunkedKVCache(16))
    yield filled(stock.BatchKVCache([3, 0]), 2)
    yield filled(stock.BatchRotatingKVCache(8, [3, 0]), 2)
    yield arrays
    yield stock.CacheList(filled(stock.KVCache()), stock.CacheList(filled(stock.RotatingKVCache(8)), arrays))


def same_state(a: Any, b: Any) -> None:
    mine: Any
    theirs: Any
    mine, theirs = (tree_flatten(c.state) for c in (a, b))
    assert type(a) is type(b) and [k for k, _ in mine] == [k for k, _ in theirs]
    for (_, x), (_, y) in zip(mine, theirs, strict=True):
        if isinstance(x, mx.array):
            assert x.dtype == y.dtype and bool(mx.array_equal(x, y))
        else:
            assert type(x) is type(y) and x == y


@pytest.mark.parametrize("cache", list(stock_caches()), ids=lambda c: type(c).__name__)
def test_a_stock_cache_comes_back_from_either_file(cache: Any, tmp_path: Path) -> None:
    own, plain = tmp_path / "own", tmp_path / "stock.safetensors"
    kvmlx.save_prompt_cache(own, [cache])
    stock.save_prompt_cache(str(plain), [cache], {"a": "b"})
    same_state(kvmlx.load_prompt_cache(own)[0], cache)
    loaded, metadata = kvmlx.load_prompt_cache(plain, return_metadata=True)
    assert metadata == {"a": "b"}
    same_state(loaded[0], stock.load_prompt_cache(str(plain))[0])


def test_a_stock_file_continues(model: Any, tmp_path: Path) -> None:
    caches = prefill(model, stock.make_prompt_cache(model))
    path = tmp_path / "stock.safetensors"
    stock.save_prompt_cache(str(path), caches)
    loaded = kvmlx.load_prompt_cache(path, model=model)
    assert all(type(c) is stock.KVCache for c in loaded)
    assert np.array_equal(generate(model, loaded), generate(model, caches))


def test_the_file_is_plain_safetensors(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    caches = compressed(model, STRATEGIES["int4"])
    kvmlx.save_prompt_cache(path, caches)
    arrays: Any
    arrays, header = mx.load(str(path), return_metadata=True)
    assert header["format"] == "kvmlx" and header["strategy"] == str(kvmlx.Strategy.parse(STRATEGIES["int4"]))
    assert bool(mx.array_equal(arrays["1.tail.keys"], caches[1].layer.store.keys))


@pytest.mark.parametrize("name", FILES_OF_BEFORE)
def test_files_of_before_still_load(name: str) -> None:
    caches, metadata = kvmlx.load_prompt_cache(DATA / f"{name}.safetensors", backend="mlx", return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert [type(c).__name__ for c in caches] == ["KVMLXCache", "RotatingKVCache", "KVMLXCache"]
    report = kvmlx.report(caches)
    assert (report.tokens, report.kept_tokens, report.nbytes) == (40, 20.0, 7040)
    assert report.strategy == "snapkv(budget=0.5, sinks=1, recent=6, window=4) | int(k=3, sinks=1, recent=4)"
    assert report.unmanaged == ("layer 1: RotatingKVCache",)
    layers = [c.layer for c in (caches[0], caches[2])]
    for layer in layers:
        assert layer.store.length.tolist() == [[13]] and layer.store.planes["values.rows"].dtype == mx.uint16
    ring = caches[1]
    assert (ring.offset, ring.keep, ring.max_size) == (40, 0, 12)
    arrays = {f"{layer.layer}.{key}": array for layer in layers for key, array in layer.arrays().items()}
    newest = {side: ring._temporal_order(getattr(ring, side))[:, :, -11:] for side in ("keys", "values")}
    assert digest(arrays | newest) == FILES_OF_BEFORE[name]


def test_a_file_of_before_goes_on() -> None:
    model = tiny_model(
        3,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=31,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=12,
    )
    caches = kvmlx.load_prompt_cache(DATA / "format1-mlx.safetensors", model=model)
    for token in range(20):
        out = model(mx.array([[token]]), cache=caches)
    assert bool(mx.isfinite(out).all()) and kvmlx.report(caches).tokens == 60


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_layers": 3}, "3"),
        ({"num_key_value_heads": 4}, "n_kv_heads"),
        ({"head_dim": 32}, "key_dim"),
        ({"rope_theta": 500000}, "rotary"),
    ],
    ids=["layers", "heads", "dim", "rope"],
)
def test_another_model_is_refused_by_name(model: Any, changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    kvmlx.save_prompt_cache(tmp_path / "c", compressed(model, "int4"))
    with pytest.raises(CacheFileError, match=f"another model.*llama.*{reason}"):
        kvmlx.load_prompt_cache(tmp_path / "c", model=tiny_model(**changed))


def test_another_model_type_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    other = tiny_model()
    other.model_type = "qwen9"
    kvmlx.save_prompt_cache(tmp_path / "c", compressed(model, "int4"))
    with pytest.raises(CacheFileError, match=r"made with another model: llama, 2 layers.*given is qwen9"):
        kvmlx.load_prompt_cache(tmp_path / "c", model=other)


def test_caches_that_cannot_be_saved(model: Any, tmp_path: Path) -> None:
    class Own(stock.KVCache):
        pass

    with pytest.raises(CacheFileError, match="Own is neither"):
        kvmlx.save_prompt_cache(tmp_path / "c", [Own()])
    mixed = compressed(model, "int4")[:1] + compressed(model, "full")[1:]
    with pytest.raises(CacheFileError, match="different models or strategies"):
        kvmlx.save_prompt_cache(tmp_path / "c", mixed)
    with pytest.raises(TypeError, match="metadata"):
        kvmlx.save_prompt_cache(tmp_path / "c", [], {"a": 1})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


SAMPLE = {
    "b": files.Stored("bfloat16", (2, 3), bytes(range(12))),
    "f": files.Stored("float32", (1, 2), b"\0\0\x80?\0\0\0@"),
    "u": files.Stored("uint8", (5,), b"hello"),
    "none": files.Stored("int32", (0, 4), b""),
    "one": files.Stored("int64", (), b"12345678"),
}


def sample(folder: Path, header: dict[str, str] | None = None) -> tuple[Path, bytes]:
    path = folder / "sample"
    files.write(path, SAMPLE, {"backend": "none"} if header is None else header)
    return path, path.read_bytes()


def test_the_container_returns_what_it_was_given(tmp_path: Path) -> None:
    path, raw = sample(tmp_path)
    found = files.read(path)
    assert found.arrays == SAMPLE and found.header["backend"] == "none" and found.is_kvmlx
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    tree = json.loads(raw[8 : 8 + length])
    sizes = [d["data_offsets"][0] % 8 for n, d in tree.items() if n in ("one", "f")]
    assert sizes == [0, 0]


def test_data_that_is_only_verified_is_not_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "SMALL_BYTES", 2000)
    path = tmp_path / "c"
    arrays = {f"{n}": files.Stored("uint8", (n,), bytes(range(250)) * (n // 250)) for n in (0, 250, 2000, 2250, 5000)}
    files.write(path, arrays, {"a": "b"})
    whole, verified = files.read(path), files.read(path, data=False)
    assert verified.header == whole.header and verified.arrays.keys() == whole.arrays.keys()
    for name, array in verified.arrays.items():
        assert array[:2] == whole.arrays[name][:2] and array.nbytes == len(whole.arrays[name].data) == int(name)
        assert array.data == (whole.arrays[name].data if int(name) <= 2000 else None)
    raw = path.read_bytes()
    for at in range(len(raw) - 9500, len(raw), 333):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        with pytest.raises(CacheFileError, match="do not match its checksum"):
            files.read(path, data=False)


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL_BYTES", 2000)
    path = tmp_path / "c"
    files.write(path, {"x": files.Stored("uint8", (5000,), bytes(5000))}, {})
    size, stat = path.stat().st_size, os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result([*stat(fd)[:6], size, *stat(fd)[7:10]]))
    os.truncate(path, size - 1000)
    for data in (True, False):
        with pytest.raises(CacheFileError, match=f"truncated: {size - 1000} of {size} bytes"):
            files.read(path, data=data)


def refused(path: Path, raw: bytes) -> str:
    """Return the message with which the bytes are refused; they must be."""
    path.write_bytes(raw)
    with pytest.raises(CacheFileError) as caught:
        files.read(path, stock=True)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path, raw = sample(tmp_path)
    for at in range(len(raw)):
        for bit in (at % 8, (at + 5) % 8):
            refused(path, raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path, raw = sample(tmp_path)
    for size in range(len(raw)):
        message = refused(path, raw[:size])
        assert "is empty" in message if size == 0 else f"truncated: {size} of" in message
    assert f"{len(raw) - 1} of {len(raw)} bytes" in refused(path, raw[:-1])
    assert "1 bytes more" in refused(path, raw + b"\0")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x80\x04\x95" + bytes(100), "a pickle"),
        (b"once upon a time, there was a text file", "not a cache file"),
        (bytes(4096), "not a cache file"),
        (b"\xff" * 4096, "not a cache file"),
        ((2**63 - 1).to_bytes(8, "little") + b"{" * 100, "not a cache file"),
    ],
    ids=["gguf", "zip", "pickle", "text", "zeros", "ones", "huge-header"],
)
def test_foreign_files_are_named(raw: bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "x", raw)


def container(tree: Any, data: bytes = b"") -> bytes:
    """Return a file with any header: the parser must not trust it, though its checksum is right."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    head = len(text).to_bytes(8, "little") + text
    return head + data


def signed(tree: dict[str, Any], data: bytes) -> bytes:
    """Return a kvmlx file with a right checksum over any content."""
    tree = {"__metadata__": {"sha256": "0" * 64} | tree["__metadata__"]} | tree
    tree["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(tree, separators=(",", ":")).encode()
    raw = container(text, data)
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)


OWN = {"sha256": "0" * 64, "format": "kvmlx", "format_version": "1", "kvmlx_version": "0"}


def test_safetensors_that_is_no_cache(tmp_path: Path) -> None:
    weights = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    assert "safetensors file, but not a cache" in refused(tmp_path / "x", container(weights, b"1234"))
    plain = tmp_path / "stock.safetensors"
    stock.save_prompt_cache(str(plain), [stock.KVCache()])
    with pytest.raises(CacheFileError, match=r"made by mlx-lm itself: load it with mlx_lm\.models"):
        files.read(plain)


def test_a_newer_file_says_what_to_do(tmp_path: Path) -> None:
    meta = OWN | {"format_version": "2", "kvmlx_version": "9.1"}
    message = refused(tmp_path / "x", signed({"__metadata__": meta, "new": [1]}, b""))
    assert "newer kvmlx (9.1, format 2)" in message and "update kvmlx" in message
    for version in ("", "0", "-1", "1.5", "²", "9" * 5000):
        assert "format version" in refused(
            tmp_path / "x", signed({"__metadata__": OWN | {"format_version": version}}, b"")
        )


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"__metadata__":{"sha256":1}}',
        b'{"__metadata__":[]}',
        b"[]",
        b'{"a":NaN}',
        b"{}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"\xff":1}',
        b'{"__metadata__":{"format":"kvmlx","format":"kvmlx"}}',
    ],
    ids=[
        "deep-list",
        "deep-dict",
        "number",
        "list-metadata",
        "list",
        "nan",
        "none",
        "digits",
        "utf8",
        "twice",
    ],
)
def test_headers_that_are_no_headers(text: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "x", container(text))


BAD_ENTRIES: dict[str, Any] = {
    "overlap": {"shape": [2], "data_offsets": [2, 4]},
    "gap": {"shape": [4], "data_offsets": [8, 12]},
    "beyond": {"shape": [2**40], "data_offsets": [4, 4 + 2**40]},
    "backwards": {"shape": [4], "data_offsets": [8, 4]},
    "negative": {"shape": [-4], "data_offsets": [4, 0]},
    "negative-twice": {"shape": [-2, -2], "data_offsets": [4, 8]},
    "float": {"shape": [4.0], "data_offsets": [4, 8]},
    "bool": {"shape": [True], "data_offsets": [4, 5]},
    "product": {"shape": [2**47, 2**47], "data_offsets": [4, 8]},
    "huge": {"shape": [10**300, 0], "data_offsets": [4, 4]},
    "many-dims": {"shape": [1] * 60, "data_offsets": [4, 5]},
    "three": {"data_offsets": [4, 8, 8]},
    "dtype": {"dtype": "F8_E4M3"},
    "dtype-list": {"dtype": ["U8"]},
    "extra": {"more": 1},
    "shape-none": {"shape": None},
    "none": None,
}


@pytest.mark.parametrize("change", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_entries_that_lie_are_refused_before_data_is_read(change: Any, tmp_path: Path) -> None:
    good = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
    tree = {"__metadata__": OWN, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "good").write_bytes(signed(tree | {"b": good}, b"12345678"))
    assert files.read(tmp_path / "good").arrays["b"].data == b"5678"
    raw = signed(tree | {"b": None if change is None else good | change}, b"12345678")
    tracemalloc.start()
    refused(tmp_path / "x", raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_spliced_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    path, raw = sample(tmp_path)
    _, other = sample(tmp_path, {"backend": "other", "x": "y" * 40})
    at, to = (data.draw(st.integers(0, len(x))) for x in (raw, other))
    piece = data.draw(st.one_of(st.binary(max_size=20), st.just(other[to : to + 64]), st.just(other[to:])))
    skip = data.draw(st.integers(0, 64))
    mutant = raw[:at] + piece + raw[at + skip :]
    if mutant not in (raw, other):
        refused(path, mutant)


# -- contents that do not fit together, though the checksum is right -----------------------------------------


def refused_or_sound(path: Path, model: Any) -> bool:
    """Load the file: it is refused, or what it gives can be used without harm. Return whether it loaded."""
    began = time.perf_counter()
    mx.reset_peak_memory()
    try:
        caches = kvmlx.load_prompt_cache(path)
    except CacheFileError as error:
        assert str(path) in str(error)
        return False
    finally:
        assert time.perf_counter() - began < 5
        assert mx.get_peak_memory() < 64 << 20
    for n in (1, 5, 34, 1):
        mx.eval(model(tokens(n), cache=caches))
    kvmlx.settle(caches)
    return True


@pytest.fixture(scope="module")
def one_layer() -> Any:
    return tiny_model(1)


@pytest.mark.parametrize("name", ["snapkv-int4", "h2o-adakv", "expected_attention"])
def test_numbers_that_do_not_fit_are_refused(name: str, one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    kvmlx.save_prompt_cache(path, compressed(one_layer, STRATEGIES[name]))
    contents = files.read(path)
    outcomes = []
    for header in damage.numbers(contents):
        files.write(path, contents.arrays, header)
        outcomes.append(refused_or_sound(path, one_layer))
    assert outcomes.count(False) > len(outcomes) // 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_that_do_not_fit_are_refused(name: str, one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    kvmlx.save_prompt_cache(path, compressed(one_layer, STRATEGIES[name]))
    contents = files.read(path)
    for what, arrays in damage.arrays(contents):
        files.write(path, arrays, damage.header_of(contents))
        assert not refused_or_sound(path, one_layer), what


@pytest.mark.parametrize("change", damage.NAMES, ids=lambda c: next(iter(c.items()))[1][:40])
def test_names_are_parsed_and_looked_up_never_run(change: dict[str, str], one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    kvmlx.save_prompt_cache(path, compressed(one_layer, STRATEGIES["int4"]))
    contents = files.read(path)
    files.write(path, contents.arrays, damage.header_of(contents) | change)
    with pytest.raises(CacheFileError, match="cannot be loaded"):
        kvmlx.load_prompt_cache(path)


def test_stock_files_are_not_trusted_either(one_layer: Any, tmp_path: Path) -> None:
    path = tmp_path / "stock.safetensors"
    install()
    stock.save_prompt_cache(str(path), [stock.CacheList(filled(stock.KVCache())), *compressed(one_layer, "int4")])
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tree, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    assert len(kvmlx.load_prompt_cache(path)) == 2
    for size in {0, 4, 8, 8 + length // 2, 8 + length, len(raw) - 1}:
        refused(path, raw[:size])
    names = [*tree, *tree["__metadata__"]]
    for name in names:
        for new in (None, "0.99999999999", "1.x", "9", "x", "2.5.5", "." * 5000):
            changed = copy.deepcopy(tree)
            part = changed["__metadata__"] if name in changed["__metadata__"] else changed
            if name == "__metadata__":
                continue
            value = part.pop(name)
            if new is not None and new not in part:
                part[new] = value
            path.write_bytes(container(changed, data))
            refused_or_loaded(path)
    for name in tree["__metadata__"]:
        for new in ("", "os", "KVCache", "KVMLXCache", "CacheList", "none", "string", "9" * 5000):
            changed = copy.deepcopy(tree)
            changed["__metadata__"][name] = new
            path.write_bytes(container(changed, data))
            refused_or_loaded(path)


def refused_or_loaded(path: Path) -> None:
    try:
        assert isinstance(kvmlx.load_prompt_cache(path), list)
    except CacheFileError as error:
        assert str(path) in str(error)
    assert mx.get_peak_memory() < 64 << 20


# -- a failed save -------------------------------------------------------------------------------------------


class FullDisk:
    """A file on which the n-th write fails, after half of it arrived."""

    def __init__(self, file: Any, fail_at: int, error: BaseException) -> None:
        self.file, self.left, self.error = file, fail_at, error

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        if self.left == 0:
            self.file.write(bytes(data)[: len(data) // 2])
            raise self.error
        self.left -= 1
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def fails(path: Path, match: str, kind: type[BaseException] = CacheFileError) -> None:
    """A save must fail, and leave the folder as it was."""
    before = {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}
    with pytest.raises(kind, match=match):
        files.write(path, SAMPLE, {"backend": "new"})
    assert {p: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("fail_at", range(len(SAMPLE) + 1))
def test_a_full_disk_changes_nothing(fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = sample(tmp_path)
    create = files._create
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(files, "_create", lambda p: FullDisk(create(p), fail_at, full))
    fails(path, r"cannot be written: No space left on device.*\d+ bytes")
    fails(tmp_path / "fresh", "No space left")


def test_an_interrupted_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = sample(tmp_path)
    create = files._create
    monkeypatch.setattr(files, "_create", lambda p: FullDisk(create(p), 2, KeyboardInterrupt("stop")))
    fails(path, "stop", KeyboardInterrupt)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_refusal_of_the_system_changes_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = sample(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.os, step, refuse)
    fails(path, "cannot be written: Permission denied")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fails(tmp_path / "folder", "it is a folder")
    with pytest.raises(CacheFileError, match="there is no folder"):
        files.write(tmp_path / "missing" / "c", SAMPLE, {})
    with pytest.raises(CacheFileError, match="no folder"):
        files.write(sample(tmp_path)[0] / "c", SAMPLE, {})
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "not a regular file")


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, match in (("", "a folder"), ("none", "no such file"), ("pipe", "not a regular file")):
        with pytest.raises(CacheFileError, match=match):
            kvmlx.load_prompt_cache(tmp_path / name)


def test_a_link_is_followed_and_modes_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "c")
    files.write(link, SAMPLE, {})
    assert link.is_symlink() and files.read(tmp_path / "deep" / "c").arrays == SAMPLE
    (tmp_path / "plain").touch()
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "deep" / "c").stat().st_mode


def test_concurrent_saves_leave_one_whole_file(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    done: list[str] = []

    def work(number: int) -> None:
        arrays = {"a": files.Stored("uint8", (100_000,), bytes([number]) * 100_000)}
        for _ in range(20):
            files.write(path, arrays, {"number": str(number)})
            found = files.read(path)
            number_found = int(found.header.get("number", number))
            if "a" in found.arrays:
                assert found.arrays["a"].data == bytes([number_found]) * 100_000
        done.append(str(number))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and [p.name for p in tmp_path.iterdir()] == ["sample"]


def test_a_save_that_fails_later_keeps_the_caches_usable(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, twin = (compressed(model, STRATEGIES["snapkv-int4"]) for _ in range(2))
    with pytest.raises(CacheFileError):
        kvmlx.save_prompt_cache(tmp_path / "no" / "c", caches)
    assert np.array_equal(generate(model, caches), generate(model, twin))
