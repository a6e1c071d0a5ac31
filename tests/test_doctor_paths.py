"""`kvmlx doctor` says which path each kind of cache takes, as the backend itself chooses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from kvmlx.cli import doctor
from kvmlx.cli.app import app
from kvmlx.cli.doctor import FRAMEWORK, KERNEL, PLAIN
from kvmlx.strategy import PRESETS, Strategy

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from kvmlx.backends.mlx import choose
from kvmlx.backends.mlx.metal.backend import MetalBackend

Paths = Callable[..., dict[str, Any]]
COLUMNS = ("decode", "prefill", "encode", "selection")


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Return what the command says of the paths, by the name of the cache."""
    monkeypatch.setattr(doctor, "_gflops", lambda mx: 100.0)

    def ask(*args: str) -> dict[str, Any]:
        command = ["doctor", "--json", "--backend", "mlx", *args]
        result = CliRunner().invoke(app, command, prog_name="kvmlx", catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["paths"]

    return ask


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the path of each primitive of one cache, by column."""
    row = next(row for row in found["formats"] if row["name"] == name)
    return {column: row[column] and row[column]["path"] for column in COLUMNS}


def without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "why_no_metal", lambda: "this is not macOS")
    monkeypatch.delenv(choose.VARIABLE, raising=False)


def with_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a Mac. Only questions are asked: no kernel is launched."""
    monkeypatch.setattr(choose, "why_no_metal", lambda: None)
    monkeypatch.delenv(choose.VARIABLE, raising=False)


def test_every_kind_of_cache_is_listed(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    without_metal(monkeypatch)
    found = paths()
    names = [row["name"] for row in found["formats"]]
    assert len(names) == len(set(names)) and set(names) >= {*PRESETS, "full", "int4", "kivi(bits=4)"}
    assert found["head_dim"] == 128
    for row in found["formats"]:
        strategy = Strategy.parse(row["strategy"])
        assert (row["encode"] is None) == (not strategy.encodes and not strategy.ragged)
        assert (row["selection"] is None) == (strategy.select is None)


def test_without_metal_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    without_metal(monkeypatch)
    found = paths()
    assert found["kernels"] == "plain"
    for row in found["formats"]:
        for column in COLUMNS:
            assert row[column] is None or row[column]["why"] == "no Metal: this is not macOS"
            assert row[column] is None or KERNEL not in row[column]["path"]
    assert of(found, "int4") == {"decode": PLAIN, "prefill": PLAIN, "encode": PLAIN, "selection": None}
    assert of(found, "full") == {"decode": FRAMEWORK, "prefill": FRAMEWORK, "encode": None, "selection": None}
    snapkv = of(found, "snapkv(budget=0.25)")
    assert snapkv == {"decode": FRAMEWORK, "prefill": FRAMEWORK, "encode": None, "selection": PLAIN}
    ragged = of(found, "snapkv(budget=0.25) | adakv")
    assert ragged == {"decode": PLAIN, "prefill": PLAIN, "encode": PLAIN, "selection": PLAIN}
    biased = of(found, "snapkv(budget=0.25) | keepkv")
    # One query takes a bias as its mask, eight would need a mask as large as their scores.
    assert biased["decode"] == f"{FRAMEWORK} or {PLAIN}" and biased["prefill"] == PLAIN


def test_on_a_mac_kernels_run(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    with_metal(monkeypatch)
    found = paths()
    assert found["kernels"] == "metal" and found["why_plain"] is None
    for name in (*PRESETS, "int2", "int4(rotate=hadamard)", "kivi(bits=4)", "turboquant(bits=4)"):
        assert of(found, name) == {"decode": KERNEL, "prefill": KERNEL, "encode": KERNEL, "selection": None}, name
    assert of(found, "snapkv(budget=0.25) | adakv | int4") == dict.fromkeys(COLUMNS, KERNEL)
    assert of(found, "snapkv(budget=0.25) | keepkv")["decode"] == KERNEL
    row = next(row for row in found["formats"] if row["name"] == "snapkv(budget=0.25)")
    assert row["decode"]["path"] == FRAMEWORK and "MLX's own attention" in row["decode"]["why"]
    assert row["selection"] == {"path": KERNEL, "why": None}


def test_a_head_dim_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    with_metal(monkeypatch)
    found = paths("--head-dim", "320")
    row = next(row for row in found["formats"] if row["name"] == "int4")
    assert row["decode"]["path"] == PLAIN and "320" in row["decode"]["why"]
    refused = next(row for row in paths("--head-dim", "100")["formats"] if row["name"] == "int4")
    assert "multiple of 8, got 100" in refused["refused"] and "decode" not in refused


def test_metal_kernels_answer_as_they_choose() -> None:
    """The questions are methods beside the choice: `kvmlx doctor` and the selftest ask them."""
    for primitive in ("attend", "encode", "column_sums"):
        assert callable(getattr(MetalBackend, f"why_plain_{primitive}", None)), primitive


def test_plain_by_the_variable(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> None:
    with_metal(monkeypatch)
    monkeypatch.setenv(choose.VARIABLE, "plain")
    found = paths()
    assert found["kernels"] == "plain"
    assert {row["decode"]["why"] for row in found["formats"]} == {"KVMLX_KERNELS=plain"}


@pytest.mark.parametrize("asked", ["metal", "fast"])
def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    without_metal(monkeypatch)
    monkeypatch.setenv(choose.VARIABLE, asked)
    for args in (["doctor", "--backend", "mlx"], ["doctor", "--selftest", "--backend", "mlx"]):
        result = CliRunner().invoke(app, args, prog_name="kvmlx")
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("kvmlx: KVMLX_KERNELS=") and "plain" in result.stderr


def test_it_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    without_metal(monkeypatch)
    monkeypatch.setattr(doctor, "_gflops", lambda mx: 100.0)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    output = CliRunner().invoke(app, ["doctor", "--backend", "mlx"], prog_name="kvmlx").stdout
    assert "(1) no Metal: this is not macOS" in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_quick_needs_the_selftest() -> None:
    result = CliRunner().invoke(app, ["doctor", "--quick"], prog_name="kvmlx")
    assert result.exit_code == 2 and "--quick goes with --selftest" in result.stderr


def test_a_backend_that_is_not_known() -> None:
    result = CliRunner().invoke(app, ["doctor", "--selftest", "--backend", "cuda"], prog_name="kvmlx")
    assert result.exit_code == 2 and "one of mlx, torch, numpy" in result.stderr
