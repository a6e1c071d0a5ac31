"""`kvmlx cache info`: what a file holds is told right, in 80 columns or as JSON, without loading a framework."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvmlx import __version__, files
from kvmlx.backends.numpy import BACKEND
from kvmlx.cli.app import app
from kvmlx.cli.cache import ROLES
from kvmlx.files import BLOCK_BYTES
from kvmlx.session import LayerCache, Session, report
from kvmlx.state import layer_to_json, session_to_json
from kvmlx.strategy import PRESETS, STAGES, Strategy
from kvmlx.types import LayerInfo, ModelInfo, Rotary
from tests.bits import DATA, FILES_OF_BEFORE

Run = Callable[..., Any]
MAX_PEAK_BYTES = 2 * BLOCK_BYTES + (2 << 20)
"""What a look at a file may take: the blocks that it hashes, and header, tables and the command line."""

TEXTS = {
    "full": "full",
    "eviction": "snapkv(budget=0.25, sinks=2, recent=16, window=16)",
    "codes": "small",
    "ragged": "h2o(budget=0.25, sinks=2, recent=8) | adakv",
    "merged": "snapkv(budget=0.25, sinks=2, recent=32, window=16) | keepkv",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `kvmlx cache info` in-process, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")

    def invoke(*args: str | Path, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["cache", "info", *map(str, args)], prog_name="kvmlx")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke


def filled(text: str, batch: int = 1, n_layers: int = 2, *, settled: bool = True) -> list[LayerCache]:
    """Return layers of NumPy arrays that have seen 150 tokens of 4 heads of 64."""
    rng = np.random.default_rng(0)
    half = tuple(range(32))
    rotary = Rotary(half, tuple(i + 32 for i in half), tuple(10.0 ** -(i / 8) for i in half))
    infos = tuple(LayerInfo(i, 8, 4, 64, 64, rotary) for i in range(n_layers))
    session = Session(Strategy.parse(text), ModelInfo("tiny", infos), n_layers)
    layers = [LayerCache(BACKEND, session, i) for i in range(n_layers)]
    for layer in layers:
        for n in (149, 1):
            q, k, v = (rng.standard_normal((batch, h, n, 64)).astype(np.float16) for h in (8, 4, 4))
            layer.update(k, v)
            layer.attend(q, scale=0.125)
        if settled:
            layer.settle(prompt_end=True)
    return layers


def write(path: Path, layers: list[LayerCache], **user: str) -> Path:
    """Write a file as docs/format.md says, by hand."""
    arrays = {f"{i}.{name}": x for i, layer in enumerate(layers) for name, x in layer.arrays().items()}
    stored = {
        name: files.Stored(str(x.dtype), x.shape, np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        for name, x in arrays.items()
    }
    entries = [{"class": "KVMLXCache", "batched": False, "cache": layer_to_json(layer)} for layer in layers]
    model = session_to_json(layers[0].session)
    header = {"backend": "torch", "strategy": model.pop("strategy"), "model": json.dumps(model)}
    header |= {"caches": json.dumps(entries)} | {f"user.{k}": v for k, v in user.items()}
    files.write(path, stored, header)
    return path


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_the_figures_are_those_of_the_caches(run: Run, tmp_path: Path, text: str, batch: int) -> None:
    layers = filled(text, batch)
    path = write(tmp_path / "c", layers, title="a book")
    found, said = json.loads(run(path, "--json").stdout), report(layers)
    assert found["written_by"] == "kvmlx" and found["backend"] == "torch" and found["kvmlx_version"] == __version__
    assert found["format_version"] == files.FORMAT_VERSION and found["checksum"] == "verified"
    assert found["file_nbytes"] == path.stat().st_size and found["metadata"] == {"title": "a book"}
    assert found["strategy"] == said.strategy
    assert found["model"] == {
        "type": "tiny",
        "layers": 2,
        "n_heads": 8,
        "n_kv_heads": 4,
        "key_dim": 64,
        "value_dim": 64,
        "dtype": "float16",
    }
    held = found["held"]
    for name in ("nbytes", "full_nbytes", "ratio", "kept_tokens", "tokens"):
        assert held[name] == getattr(said, name), name
    assert sum(held["by_array"].values()) == held["nbytes"] == sum(layer["nbytes"] for layer in found["layers"])
    assert [s["tokens"] for s in found["sequences"]] == [150] * batch
    assert math.isclose(sum(s["kept_tokens"] for s in found["sequences"]), said.kept_tokens)
    assert not any(s["prompt_open"] for s in found["sequences"])
    used = sum(rows_bytes(layer) for layer in layers)
    observed = sum(held["by_array"].get(name, 0) for name in ("queries", "moments.sum", "moments.outer"))
    assert held["headroom_nbytes"] == pytest.approx(held["nbytes"] - observed - used, abs=1)


def rows_bytes(layer: LayerCache) -> float:
    """Return the bytes of the rows that a layer holds, head-room left out."""
    store = layer.store
    total = 0.0
    for name, array in store.arrays().items():
        if name.startswith("tail."):
            total += int(store.tail_lengths.sum()) * math.prod(array.shape[3:]) * array.itemsize
        else:
            total += int(store.length.sum()) / store._periods()[name] * array.shape[1] * array.itemsize
    return total


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_it_fits_a_terminal(run: Run, tmp_path: Path, text: str) -> None:
    output = run(write(tmp_path / "c", filled(text), title="x" * 300)).stdout
    lines = output.splitlines()[1:]  # the path is the user's, and is not broken
    assert all(len(line) <= 80 for line in lines)
    assert "checksum verified" in output and "150 seen" in output and "backend torch" in output
    assert f"{'x' * 30}" in output and "300 characters" in output


def test_long_paths_and_batches_fit_too(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / ("c" * 100), filled(TEXTS["ragged"], batch=11))
    lines = run(path).stdout.splitlines()
    assert lines[0] == str(path)
    assert all(len(line) <= 80 for line in lines[1:])
    assert "and 3 more" in "\n".join(lines)


def test_many_layers_of_two_kinds_fit_too(run: Run, tmp_path: Path) -> None:
    layers = filled(TEXTS["ragged"], n_layers=5)
    path = write(tmp_path / "c", layers)
    contents = files.read(path)
    entries = json.loads(contents.header["caches"])
    slides = {"class": "DynamicSlidingWindowLayer", "state": [None, None, 0, 512]}
    mixed = [entries.pop(0) if i % 6 == 5 else slides for i in range(32)]
    own = {name: text for name, text in contents.header.items() if name in ("backend", "strategy", "model")}
    arrays = {f"{6 * int(key.split('.')[0]) + 5}{key[1:]}": array for key, array in contents.arrays.items()}
    files.write(path, arrays, own | {"caches": json.dumps(mixed)})
    lines = run(path).stdout.splitlines()[1:]
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "DynamicSlidingWindowLayer" in text and "37 (35-39)" in text and "5, 11," in text


def test_a_prompt_that_is_not_over_is_told(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "c", filled(TEXTS["eviction"], settled=False))
    assert "not complete" in run(path).stdout
    assert all(s["prompt_open"] for s in json.loads(run(path, "--json").stdout)["sequences"])


def test_an_empty_cache(run: Run, tmp_path: Path) -> None:
    session = Session(Strategy.parse("int4"), ModelInfo("tiny", (LayerInfo(0),)), 1)
    path = write(tmp_path / "c", [LayerCache(BACKEND, session, 0)])
    assert "none yet" in run(path).stdout
    found = json.loads(run(path, "--json").stdout)
    assert found["held"]["nbytes"] == 0 and found["sequences"] == []


def test_every_array_has_a_role() -> None:
    texts = [*PRESETS, *(f"{name}(bits=4)" for name, cls in STAGES.items() if cls.kind == "encode")]
    texts += ["int(k=3)", "snapkv(budget=0.5) | adakv", "snapkv(budget=0.5) | keepkv", "h2o(budget=0.5)"]
    texts += ["snapkv(budget=0.5)", "tova(budget=0.5)", "expected_attention(budget=0.5)"]
    for text in texts:
        for layer in filled(text, n_layers=1) + filled(text, n_layers=1, settled=False):
            assert set(layer.arrays()) <= set(ROLES), text
    for name in ("tail.position", "column.position", "tail.bias", "column.sums", "moments.sum", "queries"):
        assert name in ROLES


@pytest.mark.parametrize("name", FILES_OF_BEFORE)
def test_files_of_before_and_of_mlx_lm(run: Run, name: str) -> None:
    path = DATA / f"{name}.safetensors"
    found = json.loads(run(path, "--json").stdout)
    own, torch = name != "format1-mlx-lm", name == "format1-torch"
    assert found["written_by"] == ("kvmlx" if own else "mlx-lm") and found["backend"] == ("torch" if torch else "mlx")
    assert (found["format_version"], found["checksum"]) == ((1, "verified") if own else (None, None))
    assert found["metadata"] == {"model": "tiny"}
    assert [s["tokens"] for s in found["sequences"]] == [40] and found["held"]["kept_tokens"] == 20
    assert [layer["index"] for layer in found["layers"]] == [0, 2]
    kind, nbytes = ("DynamicSlidingWindowLayer", 352) if torch else ("RotatingKVCache", 384)
    assert found["stock"] == [{"index": 1, "class": kind, "nbytes": nbytes, "tokens": 40}]
    output = run(path).stdout
    assert ("checksum verified" in output) == own and ("no checksum" in output) == (not own)
    assert "0, 2 " in output and kind in output
    assert all(len(line) <= 80 for line in output.splitlines()[1:])


def test_nothing_is_loaded_but_numpy() -> None:
    code = (
        "import sys; from kvmlx.cli import main\n"
        f"sys.argv = ['kvmlx', 'cache', 'info', {str(DATA / 'format1-mlx.safetensors')!r}]\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'mlx', 'mlx_lm', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- what is refused ------------------------------------------------------------------------------------------


def test_a_large_file_is_verified_without_being_held(run: Run, tmp_path: Path) -> None:
    layers = filled("full", n_layers=1)
    store = layers[0].store
    room = np.zeros((1, 4, 2**18, 64), np.float16)  # 128 MiB a side, nearly all of it head-room
    for side in ("keys", "values"):
        held = room.copy()
        held[:, :, : store.end] = getattr(store, side)[:, :, : store.end]
        setattr(store, side, held)
    path = write(tmp_path / "large", layers)
    held_nbytes = layers[0].nbytes
    del layers, store, room, held
    run(path)  # what is imported or cached by the first call is not counted
    tracemalloc.start()
    try:
        found = json.loads(run("--json", path).stdout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["held"]["nbytes"] == held_nbytes == 2**28
    assert peak < MAX_PEAK_BYTES
    with open(path, "r+b") as file:
        file.seek(-(2**27) - 12345, 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert "its bytes do not match its checksum" in " ".join(run(path, code=2).stderr.split())
    os.truncate(path, path.stat().st_size - 1)
    assert "is truncated" in " ".join(run(path, code=2).stderr.split())


def damaged(raw: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "flipped": (raw[:-1] + bytes([raw[-1] ^ 1]), "do not match its checksum"),
        "truncated": (raw[:-100], "is truncated"),
        "empty": (b"", "is empty"),
        "foreign": (b"GGUF" + bytes(100), "a GGUF file"),
        "newer": (raw.replace(b'"format_version":"1"', b'"format_version":"9"'), "made by a newer kvmlx"),
    }


@pytest.mark.parametrize("kind", damaged(b"x"))
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_damaged_file_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, kind: str, flags: list[str]) -> None:
    raw, message = damaged((DATA / "format1-mlx.safetensors").read_bytes())[kind]
    path = tmp_path / "c"
    path.write_bytes(raw)
    result = run(path, *flags, code=2)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"kvmlx: {path}") and message in result.stderr


def test_contents_that_do_not_fit_together_are_refused(run: Run, tmp_path: Path) -> None:
    contents = files.read(DATA / "format1-mlx.safetensors")
    own = ("sha256", "format", "format_version", "kvmlx_version")
    header = {key: value for key, value in contents.header.items() if key not in own}
    entries = json.loads(header["caches"])
    entries[0]["cache"]["store"]["length"] = [[10**6]]
    for change in ({"caches": json.dumps(entries)}, {"strategy": "newmethod(budget=0.1)"}, {"model": "{}"}):
        files.write(tmp_path / "c", contents.arrays, header | change)
        assert "cannot be loaded" in run(tmp_path / "c", code=2).stderr


def test_text_of_a_stranger_does_not_reach_the_terminal_as_it_is(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "c", filled("full"), **{"a\x1b[2J": "[bold]b[/]\x07\n[red]"})
    output = run(path).stdout
    assert "\x1b" not in output and "\x07" not in output
    assert "a\\x1b[2J: [bold]b[/]\\x07\\n[red]" in output
