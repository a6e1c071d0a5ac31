"""`kvmlx bench` on the command line, over a tiny random model: a run, a second one, and all that is made of results."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from kvmlx.bench.records import Costs, Fidelity, Score, Skip, read
from tests.command_line import Run

SMALL = ("--kv", "snapkv | small", "--kv", "knorm", "--task", "niah_single_1", "--length", "512", "--samples", "2")
CONFIG = "fidelity_tokens = 4\nsteps = 2\nrepeats = 1\nmax_tokens = 4\neverything = true\n"


@pytest.fixture(params=["mlx", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("mlx_lm" if request.param == "mlx" else "transformers")
    return request.param


@pytest.fixture
def command(tiny_model: str, tmp_path: Path, backend: str) -> tuple[str, ...]:
    config = tmp_path / "bench.toml"
    config.write_text(CONFIG)
    out = str(tmp_path / "r.jsonl")
    return ("bench", "--config", str(config), "--model", tiny_model, "--backend", backend, "--out", out, *SMALL)


def test_a_run_its_repetition_and_what_is_made_of_it(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    shown = run(*command)
    path = tmp_path / "r.jsonl"
    results = read(path)
    families = {"full", "random", "streaming", "int8", "int4", "snapkv | small", "knorm"}
    assert {s.subject.family for s in results.of(Score)} == families
    assert len(results.of(Score)) == 2 * 7 and len(results.of(Fidelity)) == 6 and len(results.of(Costs)) == 7
    assert not results.of(Skip)
    # A model of random weights says nothing of note, but every method changes what it would have said.
    assert all(max(f.kl) > 0 for f in results.of(Fidelity))
    matched = [c for c in results.of(Costs) if c.subject.target == 4.0]
    assert {c.subject.family for c in matched} == {"random", "streaming", "snapkv | small", "knorm"}
    assert all(0.2 < c.subject.ratio <= 0.25 for c in matched)
    (run_line,) = results.runs
    assert run_line["machine"]["cpu"] and run_line["settings"]["dtype"] == "float32"
    assert run_line["command"].startswith("kvmlx") and "kvmlx bench report" in shown.output
    assert "snapkv | small" in shown.output

    run(*command)
    again = read(path)
    assert again.records == results.records and len(again.runs) == 2

    rows = list(csv.DictReader(io.StringIO(run("bench", "show", str(path), "--format", "csv").output)))
    assert len(rows) >= 7
    assert json.loads(run("bench", "show", str(path), "--format", "json").output)
    assert "| method" in run("bench", "show", str(path), "--format", "md").output.lower()
    assert "knorm" in run("bench", "show", str(path)).output
    alone = list(
        csv.DictReader(io.StringIO(run("bench", "show", str(path), "--kv", "knorm", "--format", "csv").output))
    )
    assert {r["family"] for r in alone} == {"full", "knorm"}
    failed = run("bench", "show", str(path), "--kv", "knrm", code=2)
    assert "Did you mean 'knorm'?" in failed.output


def test_the_page_and_a_comparison(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.jsonl"
    run(*command, "--measure", "scores", "--measure", "costs")
    out = run("bench", "report", str(path), "--plots", str(tmp_path / "plots")).output
    page = (tmp_path / "r.html").read_text()
    assert "snapkv | small" in page and "</html>" in page and "r.html" in out
    assert {p.suffix for p in (tmp_path / "plots").iterdir()} == {".png", ".svg"}
    other = tmp_path / "other.jsonl"
    run(*command[: command.index("--out")], "--out", str(other), *SMALL, "--measure", "costs", "--seed", "1")
    compared = run("bench", "compare", str(path), str(other)).output
    assert "seed" in compared and "knorm" in compared
    for kind in ("json", "csv", "md"):
        assert run("bench", "compare", str(path), str(other), "--format", kind).output.strip()


def test_tasks_are_listed(run: Run) -> None:
    output = run("bench", "tasks").output
    assert "niah_multikey_1" in output and "several_questions" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--task", "niah"], ["no task 'niah'", "niah_single_1"]),
        (["--kv", "snapvk"], ["snapvk", "snapkv"]),
        (["--match-bytes", "much"], ["--match-bytes", "4x", "'much'"]),
        (["--match-bytes", "0.5"], ["above 1"]),
        (["--budget", "2.5"], ["--budget", "0.25"]),
        (["--config", "none.toml"], ["none.toml", "cannot be read"]),
        (["--out", "no/such/folder/r.jsonl"], ["no/such/folder", "does not exist"]),
        (["--press", "kvpress: snapkv"], ["need kvpress"]),
        (["--text", "a.txt"], ["needs questions"]),
        (["--questions", "none.jsonl"], ["none.jsonl"]),
        (["--kvpress", "/no/python", "--press", "kvpress: snapkv"], ["/no/python", "cannot be run"]),
    ],
)
def test_mistakes_are_one_line(
    run: Run, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    pytest.importorskip("mlx_lm")
    monkeypatch.chdir(tmp_path)
    result = run("bench", "--model", tiny_model, "--backend", "mlx", "--length", "512", *arguments, code=2)
    line = " ".join(result.stderr.split())
    assert line.startswith("kvmlx:") and all(word in line for word in words), line


def test_results_of_another_model_are_not_mixed(run: Run, tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"kind": "run", "format": 1, "settings": {"model": "other"}}) + "\n")
    before = path.read_bytes()
    result = run("bench", "--model", tiny_model, "--backend", "mlx", "--out", str(path), code=2)
    assert "other settings" in " ".join(result.stderr.split()) and path.read_bytes() == before


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_file_that_is_no_results_file(run: Run, tmp_path: Path, command: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("hello\n")
    assert "not JSON" in " ".join(run("bench", command, str(path), code=2).stderr.split())
    assert "no such file" in " ".join(run("bench", command, str(tmp_path / "x.jsonl"), code=2).stderr.split())
