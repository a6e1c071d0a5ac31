"""The kernel benchmark runs everywhere, checks results before it times them, and writes what it says it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
import mlx.core as mx

from kvmlx.backends.mlx import choose
from kvmlx.backends.mlx.ops import MLXBackend
from scripts import bench_kernels as bench
from scripts import count_metal

Bench = Callable[..., tuple[int, dict[str, Any]]]
CONTENDERS = [bench.BASELINE, "mlx-lm 4 bits", "mlx-lm 8 bits", "int4", "small", bench.EVICTING]


@pytest.fixture
def run(tmp_path: Path) -> Bench:
    """Run the benchmark, return its exit code and what it wrote."""

    def measure(*args: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "bench.json"
        code = bench.main(["--quick", "--out", str(out), *args])
        return code, json.loads(out.read_text())

    return measure


def test_quick(run: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run("--tokens", "256")
    assert code == 0 and found["skipped"] == []
    assert found["settings"] | {"heads": 8, "kv_heads": 2, "head_dim": 64, "batch": 1} == found["settings"]
    assert found["machine"].keys() >= {"system", "device", "memory_gib", "python", "mlx", "mlx-lm", "kvmlx"}
    assert found["copy_bytes_per_s"] > 0
    assert [row["contender"] for row in found["rows"]] == CONTENDERS * 2
    assert [row["part"] for row in found["rows"]] == ["decode"] * 6 + ["prefill"] * 6
    for row in found["rows"]:
        assert row["wrong"] is None and row["error"] < bench.WRONG[found["settings"]["dtype"]]
        assert 0 < row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
        assert len(row["samples_ms"]) == 2 and min(row["samples_ms"]) > 0
        assert row["bytes_per_s"] == pytest.approx(row["read_bytes"] / row["ms"] * 1e3)
        assert row["of_copy"] == pytest.approx(row["bytes_per_s"] / found["copy_bytes_per_s"])
        # Enough distinct layers that a pass does not fit a cache.
        assert row["layers"] >= 2 and row["layers"] * row["read_bytes"] >= found["settings"]["cache_mib"] * 2**20
        base = next(r for r in found["rows"] if r["part"] == row["part"])
        assert row["speed_up"] == pytest.approx(base["ms"] / row["ms"])
    output = capsys.readouterr().out
    assert "256 rows" in output and "speed-up" in output


def test_contenders_agree_within_quantization(run: Bench) -> None:
    _, found = run("--tokens", "256", "--parts", "decode", "--formats", "int8", "int4", "int2")
    off = {row["contender"]: row["from_dense"] for row in found["rows"]}
    assert off[bench.BASELINE] < bench.WRONG[found["settings"]["dtype"]]
    assert 0 < off["int8"] < 0.05 < off["int4"] < 0.4 and off["int4"] < off["int2"] < 1.5
    assert off["mlx-lm 8 bits"] < 0.05 < off["mlx-lm 4 bits"] < 0.6


def test_bytes_that_must_be_read(run: Bench) -> None:
    _, found = run("--tokens", "256", "--parts", "decode", "--formats", "int4", bench.EVICTING)
    size = 4 if found["settings"]["dtype"] == "float32" else 2
    read = {row["contender"]: row["read_bytes"] for row in found["rows"]}
    h, d, rows = 2, 64, 256
    assert read[bench.BASELINE] == 2 * h * rows * d * size
    assert read["mlx-lm 8 bits"] == 2 * h * rows * (d + 2 * size)
    # 4 sinks, 64 recent rows and the new one are exact; a row of 64 channels has one group's scale and zero.
    tail = 4 + 64 + 1
    assert read["int4"] == 2 * h * (tail * d * size + (rows - tail) * (d // 2 + 4))
    kept = int(0.25 * 255)
    assert kept < 4 + 64, "the budget is raised to what is always kept"
    assert read[bench.EVICTING] == 2 * h * tail * d * size


def test_a_store_that_was_compressed_and_evicted(run: Bench) -> None:
    code, found = run("--tokens", "1024", "--parts", "decode", "--formats", bench.EVICTING)
    row = found["rows"][-1]
    assert code == 0 and row["evicts"] and row["wrong"] is None and row["from_dense"] > 0.05
    size = 4 if found["settings"]["dtype"] == "float32" else 2
    kept, exact = int(0.25 * 1023), 4 + 64
    assert row["read_bytes"] == 2 * 2 * ((exact + 1) * 64 * size + (kept - exact) * (64 // 2 + 4))


def test_what_path_ran(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.VARIABLE, "plain")
    _, found = run("--tokens", "64", "--parts", "decode")
    assert found["kernels"] == "plain" and found["claim"].endswith("no claim")
    assert {row["path"].split(",")[0] for row in found["rows"]} == {"MLX", "plain operations"}


@pytest.mark.parametrize("fault", ["a little off", "NaN", "another's rows"])
def test_a_wrong_result_gets_no_time(
    run: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    right = MLXBackend.attend

    def wrong(self: Any, store: Any, queries: Any, **options: Any) -> Any:
        out = right(self, store, queries, **options)
        if fault == "a little off":
            return out * 1.1
        return out * float("nan") if fault == "NaN" else mx.roll(out, 1, 1)

    monkeypatch.setenv(choose.VARIABLE, "plain")
    monkeypatch.setattr(MLXBackend, "attend", wrong)
    code, found = run("--tokens", "256", "--parts", "decode", "--formats", "int4")
    assert code == 1
    row = found["rows"][-1]
    assert row["contender"] == "int4" and row["wrong"]
    assert row["ms"] is row["speed_up"] is row["bytes_per_s"] is row["samples_ms"] is None
    assert all(other["ms"] > 0 for other in found["rows"][:-1])
    assert "wrong" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped(run: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run("--tokens", "64", "1000000", "--parts", "decode", "--memory-gib", "0.5")
    assert code == 0
    assert {row["tokens"] for row in found["rows"]} == {64}
    assert len(found["skipped"]) == 1 and "decode at 1,000,000 tokens: needs about" in found["skipped"][0]
    assert "skipped decode at 1,000,000 tokens" in capsys.readouterr().err


def test_a_copied_layer_has_memory_of_its_own() -> None:
    x = mx.arange(8).astype(mx.uint8)
    y = bench.copied((x, x))[0]
    x[0] = 9
    assert np.array(y).tolist() == list(range(8))


@pytest.mark.parametrize("args", [["--heads", "6", "--kv-heads", "4"], ["--tokens", "1"]])
def test_shapes_that_cannot_be(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--quick", *args])
    assert "error:" in capsys.readouterr().err


def test_quartiles_of_two_samples_lie_between_them() -> None:
    """Not beyond them, where a time could be negative."""
    low, high = bench.quartiles([1.0, 9.0])
    assert (low, high) == (3.0, 7.0) and bench.quartiles([2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("main", [bench.main, count_metal.main])
def test_help_is_printed(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--quick" in capsys.readouterr().out
