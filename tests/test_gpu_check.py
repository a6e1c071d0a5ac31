"""The script for the GPU runs everywhere, writes what it says it does, and finds what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
import torch

from scripts import gpu_check
from scripts.gpu import attention, correctness, verdict
from scripts.gpu.run import DRY, OutOfTime, Run, Sizes
from scripts.timing import quartiles, spread

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "scripts/gpu_check.py"]

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """A dry run sets the environment and the threads of its process."""
    before = dict(os.environ)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def dry(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Make a dry run of some parts in this process; return its exit code and what it wrote."""

    def run(*args: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "gpu.json"
        code = gpu_check.main(["--dry-run", "--out", str(out), *args])
        return code, json.loads(out.read_text())

    return run


def test_dry_run(tmp_path: Path) -> None:
    """One call does it all, from the shell, as on a GPU machine."""
    out = tmp_path / "gpu.json"
    done = subprocess.run([*COMMAND, "--dry-run", "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert list(found["parts"]) == list(gpu_check.PARTS) and found["problems"] == {}
    assert found["environment"].keys() >= {"device", "cpu", "python", "torch", "triton", "numpy", "kvmlx"}
    parts = found["parts"]
    assert parts["selftest"]["failed"] == [] and parts["selftest"]["checks"] >= 5
    assert parts["selftest"]["kernel_calls"] == parts["selftest"]["calls"] > 0
    assert parts["pytest"]["code"] == 0 and "passed" in parts["pytest"]["summary"]
    assert parts["sanitizer"]["skipped"]
    assert parts["copy"]["copy"]["bytes_per_s"] > 0
    assert [(s["tokens"], s["batch"]) for s in parts["decode"]["shapes"]] == list(DRY.shapes)
    for shape in parts["decode"]["shapes"]:
        assert {row["name"] for row in shape["baselines"]} >= {"sdpa flash, gqa", "sdpa math, gqa", "flex"}
        assert shape["best_ms"] == min(row["ms"] for row in shape["baselines"])
        assert [row["name"] for row in shape["ours"]] == list(DRY.formats)
        for row in shape["ours"]:
            assert row["wrong"] is None and 0 <= row["error"] < attention.WRONG
            assert row["speed_up"] == pytest.approx(shape["best_ms"] / row["ms"])
            assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["ms"] * 1e3)
            assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
    for name in ("graph", "sweep", "column_sums", "compact"):
        assert parts[name]["rows"] and not any(row["wrong"] for row in parts[name]["rows"]), name
    assert [len(row["configurations"]) for row in parts["sweep"]["rows"]] == [2, 2] and not parts["sweep"]["broken"]
    assert all(row["near"] == (row["default_ms"] <= 1.05 * row["best_ms"]) for row in parts["sweep"]["rows"])
    assert parts["encode"]["chunks"][0]["formats"][0]["of_layer"] > 0
    assert parts["prefill"]["chunks"][0]["ours"][0]["wrong"] is None
    whole = parts["model"]["batches"][0]
    assert whole["caches"].keys() == {"dynamic", "int4", "full", "static"} and whole["wrong"] is None
    assert not [name for name, cache in whole["caches"].items() if "refused" in cache], whole
    assert whole["kv_ratio"] < 0.8 and whole["caches"]["full"]["finite"]
    what = [line["what"] for line in found["verdict"]]
    assert sum(text.startswith("decode") for text in what) == 3 * len(DRY.shapes)
    # The end of the output is what a reader far away sees.
    last = done.stdout.split("== result")[1]
    assert "every time below is meaningless" in last and last.rstrip().endswith("correctness: passed")
    assert "sdpa" in last and "int4, a quarter of the tokens" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.NO_GPU
    assert "no CUDA device" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("fault", ["a little off", "NaN", "another's rows"])
def test_a_wrong_result_gets_no_time(dry: Any, monkeypatch: pytest.MonkeyPatch, fault: str, capsys: Any) -> None:
    right = attention.attend

    def wrong(*args: Any) -> Any:
        out = right(*args)
        if fault == "a little off":
            return out * 1.05
        return out * float("nan") if fault == "NaN" else out.roll(1, 1)

    monkeypatch.setattr(attention, "attend", wrong)
    code, found = dry("--only", "decode")
    assert code == 1
    rows = [row for shape in found["parts"]["decode"]["shapes"] for row in shape["ours"]]
    assert rows and all(row["ms"] is None and row["wrong"] for row in rows)
    output = capsys.readouterr().out
    assert "WRONG int4" in output and output.rstrip().endswith("correctness: FAILED")


def test_a_part_that_fails_is_reported_and_the_next_goes_on(
    dry: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.gpu import work

    def broken(run: Run, found: dict[str, Any]) -> None:
        found["half"] = 1
        raise RuntimeError("out of luck")

    monkeypatch.setattr(work, "encode", broken)
    code, found = dry("--only", "encode,copy")
    assert code == 1 and found["problems"] == {"encode": "RuntimeError: out of luck"}
    assert found["parts"]["encode"]["half"] == 1 and found["parts"]["copy"]["copy"]["ms"] > 0
    code, found = dry("--only", "copy,encode")
    assert list(found["parts"]) == ["copy", "encode"], "the order is that of the parts"
    assert "WRONG encode: RuntimeError: out of luck" in capsys.readouterr().out


def test_what_the_budget_does_not_hold_is_left_out(dry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = dry("--seconds", "0", "--only", "copy,decode")
    assert code == 0 and found["problems"].keys() == {"copy", "decode"}
    assert all(reason.startswith("left out") for reason in found["problems"].values())
    assert all(line["reached"] is None for line in found["verdict"])
    assert "not measured" in capsys.readouterr().out


def test_a_run_that_is_stopped_leaves_its_results(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [*COMMAND, "--dry-run", "--only", "copy,prefill,decode,sweep,model", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    found = json.loads(out.read_text())
    assert found["parts"]["copy"]["copy"]["ms"] > 0 and found["verdict"]
    assert "== result" in said and "model" not in found["parts"]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "decode,encoding"])
    assert "no part encoding; there are selftest" in capsys.readouterr().err


@interpreted
def test_failed_checks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker notes what a check raises, whatever it is, and goes on."""

    def raises(error: Exception) -> Callable[[Any], float]:
        def run(backend: Any) -> float:
            raise error

        return run

    made = [("good", lambda backend: 0.5), ("wrong", raises(AssertionError("off"))), ("broken", raises(KeyError("x")))]
    monkeypatch.setattr(correctness, "checks", lambda backend: iter(made))
    run = Run(torch.device("cpu"), DRY, True, time.monotonic() + 60)
    found = correctness.work(run, 0, 1, [])
    assert found["checks"] == 3 and found["worst"] == 0.5 and found["left"] == 0
    assert sorted(found["failed"]) == ["broken: KeyError: 'x'", "wrong: AssertionError: off"]
    halves = [correctness.work(run, i, 2, ["wrong", "broken"]) for i in range(2)]
    assert sorted(halves[0]["failed"] + halves[1]["failed"]) == sorted(found["failed"])
    run.deadline = 0.0
    assert correctness.work(run, 0, 1, []) | {"left": 3, "checks": 0, "failed": []} == correctness.work(run, 0, 1, [])


def test_figures_are_those_of_the_issue() -> None:
    run = Run(torch.device("cpu"), Sizes(), False, 0.0)
    row = {"name": "int4", "ms": 1.0, "speed_up": 2.4, "of_copy": 0.8, "wrong": None}
    faster = {"name": "int3", "ms": 0.5, "speed_up": 3.6, "of_copy": 0.7, "wrong": None}
    shapes = [{"tokens": t, "batch": b, "ours": [row, faster]} for t, b in Sizes().shapes]
    run.document |= {"parts": {"decode": {"shapes": shapes}}, "problems": {}}
    lines = list(verdict.figures(run))
    said = {line.what: (line.wanted, line.got, line.reached) for line in lines}
    assert said["decode, 4 bits, 8k, B=8, x of best bf16"] == (2.2, 2.4, True)
    assert said["decode, 4 bits, 128k, B=1, x of best bf16"] == (3.0, 2.4, False)
    assert said["decode, 2 bits (or 3), 32k, B=1, x of best bf16"] == (3.5, 3.6, True)
    assert said["decode, a quarter of the tokens, 4 bits, 128k, B=1, x of best bf16"] == (10.0, None, None)
    assert said["int4 at the longest history, of the copy bandwidth"] == (0.75, 0.8, True)
    assert said["whole model, KV memory of bf16"] == (0.3, None, None)
    assert str(lines[2]) == "MISSED by 20%  decode, 4 bits, 128k, B=1, x of best bf16: 2.4 >= 3 (int4)"


class Cuda:
    """What the measurements use of torch.cuda, on a clock of its own: each launch takes a millisecond."""

    def __init__(self, *, capturable: bool) -> None:
        self.now, self.captured, self.capturing, self.capturable = 0.0, 0, False, capturable

    def launch(self) -> None:
        if self.capturing:
            self.captured += 1
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
        else:
            self.now += 1.0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def __init__(self, device: Any = None) -> None: ...

            def wait_stream(self, other: Any) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Any) -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                cuda.now += 0.5 * cuda.captured

        @contextmanager
        def graph(made: Graph, stream: Any) -> Iterator[None]:
            cuda.capturing, cuda.captured = True, 0
            try:
                yield
            finally:
                cuda.capturing = False

        fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph}
        fakes |= {"stream": lambda stream: nullcontext(), "current_stream": lambda device: Stream()}
        fakes |= {"synchronize": lambda device: None, "empty_cache": lambda: None}
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("capturable", [True, False])
def test_on_a_gpu_graphs_are_timed_by_events(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    cuda = Cuda(capturable=capturable)
    cuda.install(monkeypatch)
    run = Run(torch.device("cuda:0"), Sizes(), False, time.monotonic() + 60)
    row = run.measure([cuda.launch, cuda.launch, cuda.launch])
    assert row["sets"] == 3 and row["samples"] == Sizes().samples
    assert row["ms"] == pytest.approx(0.5 if capturable else 1.0)
    how = "graph" if capturable else "launched, not captured: RuntimeError: operation not permitted"
    assert row["how"].startswith(how)
    assert run.measure([cuda.launch], graph=False, samples=3) == {
        "ms": 1.0,
        "quartiles_ms": [1.0, 1.0],
        "samples": 3,
        "how": "launched",
        "sets": 1,
    }


def test_budget() -> None:
    run = Run(torch.device("cpu"), DRY, True, time.monotonic() + 10)
    run.need(1, "little")
    with pytest.raises(OutOfTime, match="much needs about 100 s"):
        run.need(100, "much")


def test_input_sets_exceed_a_cache() -> None:
    run = Run(torch.device("cpu"), Sizes(), False, 0.0)
    assert run.sets(1 << 20) == 256 and run.sets(10 << 30) == 2
    assert run.sets(3 << 20) * (3 << 20) >= Sizes().set_bytes


def test_spread_of_samples() -> None:
    assert quartiles([1.0, 9.0]) == (3.0, 7.0) and quartiles([2.0]) == (2.0, 2.0)
    assert spread([0.001, 0.002, 0.004]) == {"ms": 2.0, "quartiles_ms": [1.5, 3.0], "samples": 3}
