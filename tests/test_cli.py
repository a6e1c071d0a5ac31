"""The command line, as a user or a program meets it. Models are tiny, random and made here: no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmlx import __version__
from kvmlx.cli.output import size
from kvmlx.stages.select.snapkv import SnapKV
from kvmlx.strategy import ALIASES, PRESETS, STAGES, Strategy
from tests.command_line import N_LAYERS, Run, write_json

KV = "snapkv(budget=0.25, window=8, recent=8) | int4"


@pytest.fixture
def tiny_model(tiny_model: str) -> str:
    """The commands of mlx-lm run it; those of torch are in test_cli_torch.py."""
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    return tiny_model


# Without a model


def test_help_lists_every_command(run: Run) -> None:
    output = run("--help").output
    for command in ("generate", "chat", "server", "cache_prompt", "demo", "strategies", "explain", "cache", "doctor"):
        assert command in output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvmlx.cli import main; sys.argv = ['kvmlx', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"kvmlx {__version__}\n"


def test_strategies_lists_every_stage(run: Run) -> None:
    output = run("strategies").stdout
    for name, cls in STAGES.items():
        assert name in output
        assert cls.paper in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_strategies_as_json(run: Run) -> None:
    document = json.loads(run("strategies", "--json").stdout)
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert stages.keys() == STAGES.keys()
    assert stages["snapkv"]["parameters"]["window"] == SnapKV().window
    assert stages["snapkv"]["paper"] == "2404.14469"
    assert document["presets"] == PRESETS


@pytest.mark.parametrize("name", ["snapkv", *list(ALIASES)[:1], *list(PRESETS)[:1]])
def test_strategies_of_one_name(run: Run, name: str) -> None:
    assert name in run("strategies", name).stdout


def test_strategies_of_an_unknown_name(run: Run) -> None:
    assert "Did you mean 'snapkv'?" in run("strategies", "snapk", code=2).stderr


QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    """A folder with nothing but a config.json."""
    write_json(tmp_path / "config.json", QWEN3_8B)
    return str(tmp_path)


@pytest.mark.parametrize("strategy", ["snapkv(budget=0.25) | int4", "balanced", "snapkv(budget=0.25) | pyramidkv"])
def test_explain_fits_a_terminal(run: Run, qwen: str, strategy: str) -> None:
    output = run("explain", strategy, "--model", qwen, "--context", "32768").stdout
    assert "4.83 GB" in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_explain_as_json(run: Run, qwen: str) -> None:
    document = json.loads(run("explain", "int4", "--model", qwen, "--context", "1000", "--json").stdout)
    assert len(document["layers"]) == 36
    assert document["nbytes"] == sum(layer["nbytes"] for layer in document["layers"])
    assert document["full_nbytes"] == 1000 * 36 * 8 * 256 * 2
    assert document["ratio"] == document["nbytes"] / document["full_nbytes"]


def test_doctor(run: Run) -> None:
    output = run("doctor").stdout
    assert __version__ in output
    assert "demo model" in output


def test_doctor_as_json(run: Run) -> None:
    document = json.loads(run("doctor", "--json").stdout)
    assert document["packages"]["kvmlx"] == __version__
    assert document["backends"].keys() == {"numpy", "mlx", "torch"}
    assert document["demo_model"]["ready"] is False
    for backend in document["backends"].values():
        assert backend["available"] or backend["why"]


def test_doctor_says_which_extra_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    document = json.loads(run("doctor", "--json").stdout)
    assert document["backends"]["torch"] == {
        "available": False,
        "why": "not installed: pip install 'kvmlx[torch]'",
    }


ERRORS = [
    (["explain", "int4", "--model", "/no/such/model"], "no model at /no/such/model: it does not exist"),
    (["explain", "itn4", "--model", "."], "Did you mean 'int4'?"),
    (["generate", "--kv", "snap"], "unknown stage 'snap'"),
    (["generate", "--kv", "int4", "--kv-bits", "4"], "--kv-bits does not go with --kv"),
    (["server", "--kv", "int4", "--kv-b=4"], "--kv-bits does not go with --kv"),
    (["chat", "--kv", "int4", "--max-kv-size", "100"], "--max-kv-size does not go with --kv"),
    (["demo", "--kv", "int99"], "unknown stage 'int99'"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[" ".join(args) for args, _ in ERRORS])
def test_an_error_is_one_line(run: Run, args: list[str], message: str) -> None:
    result = run(*args, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("kvmlx: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_missing_package_names_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlx_lm.server", raising=False)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    error = run("server", "--kv", "int4", code=2).stderr
    assert error == "kvmlx: this needs the package mlx_lm: pip install 'kvmlx[mlx]'\n"


def test_the_demo_model_cannot_be_had(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmlx import demo_model

    def refuse() -> Path:
        raise demo_model.DemoModelError("there is no network")

    monkeypatch.setattr(demo_model, "ensure_demo_model", refuse)
    assert run("explain", "int4", code=2).stderr == "kvmlx: there is no network\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (123_456_789, "123 MB"),
        (5e12, "5,000 GB"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


# The stock commands


@pytest.mark.parametrize("command", ["generate", "chat", "server", "cache_prompt"])
def test_help_shows_the_stock_flags_too(run: Run, command: str) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    output = run(command, "--help").stdout
    assert "--kv" in output
    assert f"Flags of mlx_lm.{command}" in output
    assert "--trust-remote-code" in output
    assert "--kv-bits" in output or command == "chat"


def test_generate_says_what_it_held(run: Run, tiny_model: str) -> None:
    result = run("generate", "--model", tiny_model, "--kv", KV, "--prompt", "a" * 600, "-m", "5")
    assert "Generation: 5 tokens" in result.stdout
    line = result.stderr.splitlines()[-1]
    for part in ("kept ", " of fp16", "peak ", " tok/s"):
        assert part in line


def test_generate_as_json(run: Run, tiny_model: str) -> None:
    args = ("--model", tiny_model, "--prompt", "a" * 600, "-m", "5", "--json")
    document = json.loads(run("generate", *args, "--kv", KV).stdout)
    assert document["generation_tokens"] == 5
    assert document["finish_reason"] == "length"
    cache = document["cache"]
    assert cache["strategy"] == str(Strategy.parse(KV))
    assert cache["tokens"] == document["prompt_tokens"] + 4 or cache["tokens"] == document["prompt_tokens"] + 5
    assert cache["kept_tokens"] < 0.3 * cache["tokens"]
    assert cache["ratio"] == cache["nbytes"] / cache["full_nbytes"]

    plain = json.loads(run("generate", *args).stdout)
    assert plain["cache"]["strategy"] is None
    assert plain["cache"]["kept_tokens"] == plain["cache"]["tokens"]
    assert plain["cache"]["nbytes"] > 3 * cache["nbytes"]


def test_identity_answers_as_the_full_cache_does(run: Run, tiny_model: str) -> None:
    args = ("generate", "--model", tiny_model, "--prompt", "what is it?" * 30, "-m", "12", "--json")
    texts = [json.loads(run(*args, *extra).stdout)["text"] for extra in ([], ["--kv", "full"], ["--kv", "int16"])]
    assert texts[0] == texts[1] == texts[2]


def test_generate_brings_the_model_to_a_type(run: Run, tiny_model: str) -> None:
    args = ("generate", "--model", tiny_model, "--prompt", "hello" * 50, "-m", "2", "--json", "--kv", "full")
    half, single = (
        json.loads(run(*args, "--dtype", dtype).stdout)["cache"]["nbytes"] for dtype in ("float16", "float32")
    )
    assert single == 2 * half


def test_the_word_demo_is_a_model(run: Run, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmlx.demo_model.ensure_demo_model", lambda: Path(tiny_model))
    document = json.loads(run("generate", "--model", "demo", "--kv", "int4", "-m", "2", "--json").stdout)
    assert document["generation_tokens"] == 2


def test_a_prompt_cache_is_saved_and_continued(run: Run, tiny_model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "prompt.safetensors")
    made = run("cache_prompt", "--model", tiny_model, "--prompt", "b" * 600, "--prompt-cache-file", file, "--kv", KV)
    assert "kept " in made.stderr
    args = ("generate", "--prompt-cache-file", file, "--prompt", "and?", "-m", "4")
    cache = json.loads(run(*args, "--json").stdout)["cache"]
    assert cache["tokens"] > 600
    assert cache["kept_tokens"] < 0.35 * cache["tokens"]

    other = run(*args, "--kv", "int8", code=2).stderr
    assert "was saved with" in other
    assert len(other.splitlines()) == 1


def test_a_stock_prompt_cache_is_taken(run: Run, tiny_model: str, tmp_path: Path) -> None:
    file = str(tmp_path / "stock.safetensors")
    run("cache_prompt", "--model", tiny_model, "--prompt", "b" * 100, "--prompt-cache-file", file)
    args = ("generate", "--prompt-cache-file", file, "--prompt", "and?", "-m", "4")
    assert json.loads(run(*args, "--json").stdout)["cache"]["strategy"] is None
    assert "a full cache" in run(*args, "--kv", "int8", code=2).stderr


def test_a_prompt_cache_that_is_not_there(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    missing = str(tmp_path / "nothing.safetensors")
    assert "no prompt cache at" in run("generate", "--prompt-cache-file", missing, code=2).stderr


def test_speculative_decoding_with_a_draft_model(run: Run, tiny_model: str) -> None:
    args = (
        "generate",
        "--model",
        tiny_model,
        "--draft-model",
        tiny_model,
        "--prompt",
        "c" * 300,
        "-m",
        "6",
        "--json",
    )
    document = json.loads(run(*args, "--kv", "int8").stdout)
    assert document["cache"]["layers"] == N_LAYERS
    plain = json.loads(run(*args).stdout)
    assert len(document["text"]) > 0
    assert plain["generation_tokens"] == document["generation_tokens"]


def test_chat_shows_the_cache_growing(run: Run, tiny_model: str) -> None:
    output = run("chat", "--model", tiny_model, "--kv", "int4", "-m", "3", text="hello\nagain\nr\nonce more\n").stdout
    status = [line for line in output.splitlines() if " of fp16" in line]
    assert len(status) == 3
    assert all("kept " in line and "(+" in line for line in status)
    seen = [int(line.split(" of ")[1].split(" ")[0].replace(",", "")) for line in status]
    assert seen[0] < seen[1]
    assert seen[2] < seen[1]
    assert "bye" in output


@pytest.mark.parametrize(("extra", "says"), [([], "batched"), (["--draft-model", "MODEL"], "one at a time")])
def test_server_says_how_it_will_serve(
    run: Run,
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    extra: list[str],
    says: str,
) -> None:
    import mlx_lm.server as stock

    # Everything but the endless loop: the model is loaded as it would be, then the server ends.
    monkeypatch.setattr(stock, "run", lambda host, port, provider: provider.load_default())
    caplog.set_level("INFO")
    flags = [tiny_model if flag == "MODEL" else flag for flag in extra]
    run("server", "--model", tiny_model, "--kv", "int4", *flags)
    assert "KV cache: int" in caplog.text
    assert says in caplog.text


def test_stock_modules_are_left_as_they_were(run: Run, tiny_model: str) -> None:
    import importlib

    module = importlib.import_module("mlx_lm.generate")
    before = dict(vars(module))
    run("generate", "--model", tiny_model, "--kv", "int4", "-m", "2")
    changed = {name for name, value in vars(module).items() if before.get(name) is not value}
    assert changed <= {"scaled_dot_product_attention"}


def test_a_model_that_cannot_be_loaded(run: Run, tiny_model: str, tmp_path: Path) -> None:
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"model_type": "unheard_of"})
    error = run("generate", "--model", str(tmp_path), code=2).stderr
    assert len(error.splitlines()) == 1
    assert "cannot load" in error


# The demo


def test_demo_table(run: Run, tiny_model: str) -> None:
    # A random model finds nothing, with the full cache neither: that is no failure of compression.
    output = run("demo", "--model", tiny_model, "--tokens", "300", "--kv", "balanced", "--kv", KV).stdout
    for part in ("balanced", "full", "wrong", "does not find the number"):
        assert part in output
    assert all(len(line) <= 80 or line.startswith("question") for line in output.splitlines())


def test_demo_as_json(run: Run, tiny_model: str) -> None:
    document = json.loads(run("demo", "--model", tiny_model, "--tokens", "300", "--kv", KV, "--json").stdout)
    full, compressed = document["runs"]
    assert full["strategy"] is None
    assert compressed["nbytes"] < full["nbytes"]
    assert compressed["kept_tokens"] < full["kept_tokens"]
    assert document["expected"].isdigit()


@pytest.mark.parametrize(
    ("right", "code"), [((True, True), 0), ((True, False), 1), ((False, False), 0), ((False, True), 0)]
)
def test_demo_exit_code(
    run: Run, tiny_model: str, monkeypatch: pytest.MonkeyPatch, right: tuple[bool, bool], code: int
) -> None:
    from kvmlx.cli import demo

    def answer(engine: Any, needle: Any, name: str, strategy: Any) -> Any:
        found = right[strategy is not None]
        return demo.Outcome(name, str(strategy), needle.answer, found, 300, 300, 1000, 0.5, 2000, 0.1, 10.0)

    monkeypatch.setattr(demo, "_ask", answer)
    run("demo", "--model", tiny_model, "--tokens", "300", "--kv", "int4", code=code)


@pytest.mark.parametrize("tokens", [300, 1000])
def test_needle_is_in_the_middle_of_a_text_of_the_right_length(tiny_model: str, tokens: int) -> None:
    from mlx_lm import load

    from kvmlx.cli.demo import make_needle

    tokenizer: Any = load(tiny_model)[1]
    needle = make_needle(tokenizer, tokens)
    text = tokenizer.decode(needle.tokens)
    assert text.count(needle.answer) == 1
    # The introduction and the question alone are longer than 300 of this tokenizer's one-byte tokens.
    assert len(needle.tokens) == pytest.approx(tokens, abs=16) or tokens == 300
