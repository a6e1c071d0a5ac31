"""The command line over models of transformers, and which backend a command takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmlx.cli import backends
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError
from tests.command_line import N_LAYERS, Run

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("typer", reason="typer is not installed")

KV = "snapkv(budget=0.25, window=8, recent=8) | int4"
TORCH = ("--backend", "torch")


def test_generate_says_what_it_held(run: Run, tiny_model: str) -> None:
    result = run("generate", *TORCH, "--model", tiny_model, "--kv", KV, "--prompt", "a" * 600, "-m", "5")
    line = result.stderr.splitlines()[-1]
    for part in ("kept ", " of fp16", " tok/s"):
        assert part in line


def test_generate_as_json(run: Run, tiny_model: str) -> None:
    args = ("generate", *TORCH, "--model", tiny_model, "--prompt", "a" * 600, "-m", "5", "--json")
    document = json.loads(run(*args, "--kv", KV).stdout)
    assert document["generation_tokens"] == 5
    assert document["finish_reason"] == "length"
    cache = document["cache"]
    assert cache["strategy"] == str(Strategy.parse(KV))
    assert cache["tokens"] == document["prompt_tokens"] + 4
    assert cache["kept_tokens"] < 0.3 * cache["tokens"]
    assert cache["ratio"] == cache["nbytes"] / cache["full_nbytes"]

    plain = json.loads(run(*args).stdout)
    assert plain["cache"]["strategy"] is None
    assert plain["cache"]["kept_tokens"] == plain["cache"]["tokens"] == cache["tokens"]
    assert plain["cache"]["nbytes"] > 3 * cache["nbytes"]


def test_identity_answers_as_the_full_cache_does(run: Run, tiny_model: str) -> None:
    args = ("generate", *TORCH, "--model", tiny_model, "--prompt", "what is it?" * 30, "-m", "12", "--json")
    texts = [json.loads(run(*args, *extra).stdout)["text"] for extra in ([], ["--kv", "full"], ["--kv", "int16"])]
    assert texts[0] == texts[1] == texts[2]


def test_both_backends_say_the_same(run: Run, tiny_model: str) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    args = ("generate", "--model", tiny_model, "--prompt", "what is it?" * 10, "-m", "16", "--kv", "int8", "--json")
    texts = [json.loads(run(*args, "--backend", backend).stdout)["text"] for backend in ("mlx", "torch")]
    assert texts[0] == texts[1]


def test_the_prompt_is_processed_in_steps(run: Run, tiny_model: str) -> None:
    args = ("generate", *TORCH, "--model", tiny_model, "--prompt", "b" * 200, "-m", "6", "--json", "--kv", "int8")
    whole, steps = (json.loads(run(*args, "--prefill-step-size", n).stdout) for n in ("4096", "32"))
    assert whole["text"] == steps["text"]
    assert whole["cache"]["tokens"] == steps["cache"]["tokens"]


def test_sampling_is_repeatable(run: Run, tiny_model: str) -> None:
    args = ("generate", *TORCH, "--model", tiny_model, "-m", "12", "--json", "--temp", "1.5", "--top-k", "50")
    a, b, c = (json.loads(run(*args, "--seed", seed).stdout)["text"] for seed in ("1", "1", "2"))
    assert a == b != c


def test_a_prompt_cache_is_saved_and_continued(run: Run, tiny_model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "prompt.safetensors")
    args = ("--model", tiny_model, "--prompt", "b" * 600, "--prompt-cache-file", file, "--kv", KV)
    assert "kept " in run("cache_prompt", *TORCH, *args).stderr
    args = ("generate", *TORCH, "--prompt-cache-file", file, "--prompt", "and?", "-m", "4")
    cache = json.loads(run(*args, "--json").stdout)["cache"]
    assert cache["tokens"] > 600
    assert cache["kept_tokens"] < 0.35 * cache["tokens"]

    other = run(*args, "--kv", "int8", code=2).stderr
    assert "was saved with" in other
    assert "was made with --model" in run(*args, "--model", "demo", code=2).stderr


@pytest.mark.parametrize(("maker", "user"), [("torch", "mlx"), ("mlx", "torch")])
def test_a_prompt_cache_moves_between_backends(
    run: Run, tiny_model: str, tmp_path: Path, maker: str, user: str
) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    file = str(tmp_path / "prompt.safetensors")
    args = ("--model", tiny_model, "--prompt", "b" * 300, "--prompt-cache-file", file, "--kv", "int8")
    run("cache_prompt", "--backend", maker, *args)
    args = ("generate", "--prompt-cache-file", file, "--prompt", "and?", "-m", "8", "--json")
    own, other = (json.loads(run(*args, "--backend", backend).stdout) for backend in (maker, user))
    assert own["text"] == other["text"]
    assert own["cache"]["tokens"] - other["cache"]["tokens"] in (-1, 0, 1)


def test_chat_goes_on_from_the_cache(run: Run, tiny_model: str) -> None:
    args = ("chat", *TORCH, "--model", tiny_model, "--kv", "int4", "-m", "3")
    output = run(*args, text="hello\nagain\nr\nonce more\n").stdout
    status = [line for line in output.splitlines() if " of fp16" in line]
    assert len(status) == 3
    assert all("kept " in line and "(+" in line for line in status)
    seen = [int(line.split(" of ")[1].split(" ")[0].replace(",", "")) for line in status]
    assert seen[0] < seen[1]
    assert seen[2] < seen[1]
    assert output.endswith("bye\n")


def test_a_chat_is_the_whole_conversation(tiny_model: str) -> None:
    """What goes through the model in turns is what the template writes of all messages at once."""
    from kvmlx.cli import hf
    from kvmlx.cli.engines import TorchEngine

    engine = TorchEngine(tiny_model, "float32")
    seen: list[int] = []
    ids = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    chat = hf._Chat(engine, hf.parser("chat").parse_args(["--model", tiny_model, "-m", "4"]), None)
    for said in ("hello", "and then?"):
        chat.turn(said)
    ids.remove()
    written: Any = engine.tokenizer.apply_chat_template(chat.messages[:3], tokenize=False, add_generation_prompt=True)
    assert engine.tokenizer.decode(seen[: len(seen) - 3]) == written  # and three tokens of the second answer


def test_demo_on_torch(run: Run, tiny_model: str) -> None:
    args = ("demo", *TORCH, "--model", tiny_model, "--tokens", "300", "--kv", KV)
    document = json.loads(run(*args, "--json").stdout)
    assert document["backend"] == "torch" and document["dtype"] == "float32"
    full, compressed = document["runs"]
    assert full["strategy"] is None
    assert compressed["nbytes"] < full["nbytes"]
    assert compressed["kept_tokens"] < full["kept_tokens"]
    output = run(*args).stdout
    assert "torch on cpu" in output and "counts it on a GPU only" in output
    assert all(len(line) <= 80 or line.startswith("question") for line in output.splitlines())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", *TORCH), "--model is missing"),
        (("chat", *TORCH), "--model"),
        (("generate", *TORCH, "--model", "demo", "--draft-model", "demo"), "--backend mlx has more"),
        (("generate", *TORCH, "--model", "/nowhere"), "no model at /nowhere"),
        (("generate", *TORCH, "--prompt-cache-file", "/nowhere"), "no prompt cache at"),
        (("generate", *TORCH, "--model", "demo", "--kv", "int7"), "int7"),
    ],
)
def test_errors_are_one_line(run: Run, args: tuple[str, ...], says: str) -> None:
    error = run(*args, code=2).stderr
    assert says in error and len(error.splitlines()) == 1


def test_help_shows_the_flags_of_torch(run: Run) -> None:
    assert "with --backend torch:" in run("generate", "--help").stdout


# Which backend


@pytest.mark.parametrize(
    ("here", "cuda", "platform", "best"),
    [
        ({"mlx", "mlx_lm", "torch", "transformers"}, True, "linux", "torch"),
        ({"mlx", "mlx_lm", "torch", "transformers"}, False, "linux", "mlx"),
        ({"mlx", "mlx_lm", "torch", "transformers"}, True, "darwin", "mlx"),
        ({"torch", "transformers"}, False, "linux", "torch"),
        ({"mlx", "mlx_lm", "torch"}, True, "linux", "mlx"),
    ],
)
def test_the_best_backend(
    monkeypatch: pytest.MonkeyPatch, here: set[str], cuda: bool, platform: str, best: str
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: name if name in here else None)
    monkeypatch.setattr(backends, "_has_cuda", lambda: cuda)
    monkeypatch.setattr(backends.sys, "platform", platform)
    assert backends.choose() == best


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(KVMLXError, match=r"pip install 'kvmlx\[torch\]'"):
        backends.choose("torch")
    with pytest.raises(KVMLXError, match="no backend is installed"):
        backends.choose()


def test_mlx_is_not_needed(tiny_model: str) -> None:
    """A machine with torch alone runs the commands."""
    code = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx_lm'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name.startswith('mlx') else find(name, *a)\n"
        "from kvmlx.cli import main\n"
        f"sys.argv = ['kvmlx', 'generate', '--model', {tiny_model!r}, '-m', '3', '--kv', 'int4', '--json']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache"]["layers"] == N_LAYERS
