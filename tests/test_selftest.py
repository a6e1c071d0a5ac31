"""The selftest of `kvmlx doctor`: it passes where results are right, and fails where one is a little wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvmlx import checks, selftest
from kvmlx.backends.numpy import NumPyBackend
from kvmlx.cli import doctor
from kvmlx.cli.app import app
from kvmlx.selftest import FORMATS, Shape, Sums
from kvmlx.tolerance import ERROR_FACTOR, FLOOR_ULPS, Mismatch, assert_close, assert_same
from kvmlx.types import Backend
from tests.test_vectors import BACKENDS

# Kernels have tests of their own over all formats; here a few cases of theirs, below.
PLAIN = [row for row in BACKENDS if row[0] not in ("metal", "triton")]


@pytest.fixture(scope="module", params=PLAIN, ids=[row[0] for row in PLAIN])
def backend(request: pytest.FixtureRequest) -> Backend:
    _, framework, module = request.param
    pytest.importorskip(framework)
    return import_module(module).BACKEND


# The policy


def test_the_limit_of_an_error() -> None:
    want, plain = np.array([1.0, -2.0]), np.array([1.0, -2.0 + 1e-5])
    limit = ERROR_FACTOR * 1e-5 + FLOOR_ULPS * 2.0**-23 * 2
    assert assert_close(want + np.array([0.9 * limit, 0]), want, plain) == pytest.approx(0.9)
    with pytest.raises(Mismatch) as refused:
        assert_close(want + np.array([1.5 * limit, 0]), want, plain)
    assert refused.value.ratio == pytest.approx(1.5)


@pytest.mark.parametrize("got", [[np.nan, 1.0], [np.inf, 1.0], [1.0, 1.0, 1.0]], ids=["nan", "inf", "shape"])
def test_what_is_not_a_number_is_never_near(got: list[float]) -> None:
    want = np.array([1.0, 1.0])
    with pytest.raises(Mismatch):
        assert_close(got, want, want)


def test_a_plain_implementation_that_is_not_a_number_excuses_nothing() -> None:
    want = np.ones(2)
    with pytest.raises(Mismatch):
        assert_close(want + 1, want, np.array([np.nan, 1.0]))


def test_infinities_are_met_exactly() -> None:
    want = np.array([-np.inf, 1.0])
    assert assert_close(want, want, want) == 0
    with pytest.raises(Mismatch):
        assert_close([-1e30, 1.0], want, want)


def test_codes_are_equal_with_their_dtype() -> None:
    codes = np.arange(4, dtype=np.uint8)
    assert assert_same(codes, codes.copy()) == 0
    for other in (codes[::-1], codes.astype(np.int64), codes[:3]):
        with pytest.raises(Mismatch) as refused:
            assert_same(other, codes)
        assert refused.value.ratio == np.inf


def test_the_policy_holds_without_assert_statements() -> None:
    code = (
        "import numpy as np\n"
        "from kvmlx.tolerance import Mismatch, assert_close, assert_same\n"
        "for f in (lambda: assert_close([np.nan], [1.0], [1.0]), lambda: assert_same([1], [2])):\n"
        "    try: f()\n"
        "    except Mismatch: continue\n"
        "    raise SystemExit('let pass')\n"
    )
    subprocess.run([sys.executable, "-O", "-c", code], check=True)


# What is checked


def test_every_vector_every_format_and_every_dtype_is_checked() -> None:
    for quick in (True, False):
        found = selftest.checks_for(_with_bfloat16(), quick=quick)
        assert len({(check.primitive, check.case) for check in found}) == len(found)
        for name in checks.CHECKS:
            assert {c.case for c in found if c.primitive == name} >= set(checks.cases_of(name))
        stores = [check.case for check in found if check.primitive == "store"]
        for format in FORMATS:
            own = [case for case in stores if case.startswith(f"{format}-B")]
            assert {case.rsplit("-", 1)[1] for case in own} == {"float32", "float16", "bfloat16"}
            for option in ("L1-", "L3-", "L40-", "ragged", "bias", "sinks", "bool"):
                assert any(option in case for case in own), f"{format} without {option}"


def _with_bfloat16() -> Any:
    class Namespace:
        float32 = float16 = bfloat16 = None

    class Any_(NumPyBackend):
        xp = Namespace

    return Any_()


def test_a_dtype_that_the_framework_has_not_is_named() -> None:
    assert selftest.missing_dtypes(NumPyBackend()) == ("bfloat16",)
    assert not any(check.case.endswith("bfloat16") for check in selftest.checks_for(NumPyBackend()))


@pytest.mark.parametrize("format", FORMATS)
def test_stores_are_right(backend: Backend, format: str) -> None:
    """One store of each format in each dtype, with all that a store may have; the command runs the others."""
    shapes = [
        Shape(format, 1, group=3, dim=64, body=128),
        Shape(format, 3, dim=64, body=192, ragged=True, biased=True, sinks=True),
        Shape(format, 40, dim=64, body=64, mask="bool"),
    ]
    for shape, dtype in zip(shapes, ("float32", "float16", "bfloat16"), strict=True):
        if dtype not in selftest.missing_dtypes(backend):
            assert 0 < selftest.check_store(backend, shape, dtype) <= 1


@pytest.mark.parametrize("mask", ["bool", "float", "window"])
@pytest.mark.parametrize("format", [selftest.EXACT, "int4"])
def test_stores_under_a_mask_are_right(backend: Backend, format: str, mask: str) -> None:
    for n in (1, 3):
        assert 0 < selftest.check_store(backend, Shape(format, n, dim=64, body=128, mask=mask), "float32") <= 1


@pytest.mark.parametrize("format", [selftest.EXACT_BODY, "int3", "kivi(bits=2)", "turboquant(bits=2, center=64)"])
def test_rows_that_stay_are_right(backend: Backend, format: str) -> None:
    assert selftest.check_gather(backend, format) == 0


def test_column_sums_are_right(backend: Backend) -> None:
    for dtype in ("float32", "float16"):
        shape = Sums(9, 70, group=2, dim=64, biased=True, counted=True)
        assert 0 < selftest.check_sums(backend, shape, dtype) <= 1


# It must be able to fail


class Wrong(NumPyBackend):
    """NumPy's backend with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def attend(self, store: Any, queries: Any, **options: Any) -> Any:
        if self.fault == "scores are 1e-2 off":
            queries = queries * np.asarray(1.01, queries.dtype)
        if self.fault == "sinks are not there":
            options.pop("sinks", None)
        if self.fault == "the mask is not read":
            options.pop("mask", None)
        if self.fault == "no bias":
            store = store.copy()
            store.biased = False
        out = np.array(super().attend(store, queries, **options))
        if self.fault == "a NaN":
            out[-1, -1, -1, -1] = np.nan
        if self.fault == "one query is another's":
            out[:, :, -1] = out[:, :, 0]
        if self.fault == "another dtype":
            out = out.astype(np.float64)
        if self.fault == "it raises":
            raise RuntimeError("program_source:12: error: use of undeclared identifier")
        return out

    def encode(self, codec: Any, x: Any) -> Any:
        planes = dict(super().encode(codec, x))
        if self.fault == "one code is flipped" and "codes0" in planes and planes["codes0"].size:
            planes["codes0"] = planes["codes0"].copy()
            planes["codes0"].reshape(-1)[-1] ^= 1
        if self.fault == "a scale is 1% off" and "scales" in planes:
            planes["scales"] = (planes["scales"] * np.float16(1.01)).astype(np.float16)
        if self.fault == "a plane is missing" and "zeros" in planes:
            planes.pop("zeros")
        return planes

    def column_sums(self, queries: Any, keys: Any, **options: Any) -> Any:
        if self.fault == "padding is counted":
            options.pop("n_queries", None)
        return super().column_sums(queries, keys, **options)

    def gather_units(self, *arguments: Any, **options: Any) -> Any:
        planes = super().gather_units(*arguments, **options)
        if self.fault == "a neighbour is kept":
            planes = {name: np.roll(plane, 1, axis=0) for name, plane in planes.items()}
        return planes


FEW = [
    *(
        (check, case)
        for check, case in [("affine", "bits4-T65-D96-g32"), ("attend", "B2-H1-G8-L3-T65-D64-sinks-valid")]
    ),
    ("column_sums", "B2-H1-G3-L17-T65-D96-counted"),
    ("gather", "int4-float32"),
    ("store", "int4-B2-H2-G2-L40-D128-body192-sinks-bool-float32"),
    ("store", "int4-B2-H2-G2-L3-D128-body192-ragged-bias-float32"),
    ("store", "int4-B2-H2-G2-L3-D128-body192-ragged-bias-float16"),
]
"""Enough of the selftest to find every fault below."""
FAULTS = {
    "scores are 1e-2 off": {"attend", "store"},
    "a NaN": {"attend", "store"},
    "one query is another's": {"attend", "store"},
    "sinks are not there": {"attend", "store"},
    "the mask is not read": {"store"},
    "no bias": {"store"},
    "another dtype": {"store"},
    "it raises": {"attend", "store"},
    "one code is flipped": {"affine", "store"},
    "a scale is 1% off": {"affine", "store"},
    "a plane is missing": {"affine", "gather", "store"},
    "padding is counted": {"column_sums"},
    "a neighbour is kept": {"gather", "store"},
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    every = selftest.checks_for

    def chosen(backend: Any, *, quick: bool = False) -> list[selftest.Check]:
        found = [check for check in every(backend) if (check.primitive, check.case) in FEW]
        assert len(found) == len(FEW)
        return found

    monkeypatch.setattr(selftest, "checks_for", chosen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    yield


def run(*args: str) -> Any:
    result = CliRunner().invoke(app, ["doctor", "--selftest", *args], prog_name="kvmlx")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(doctor, "_choice", lambda name: (None, Wrong(fault), None))
    result = run("--backend", "numpy", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["passed"]
    assert {failure["primitive"] for failure in document["failures"]} == FAULTS[fault]
    failed = {(failure["primitive"], failure["case"]) for failure in document["failures"]}
    assert failed <= set(FEW)
    for row in document["checks"]:
        assert row["cases"] - row["passed"] == sum(primitive == row["primitive"] for primitive, _ in failed)
        assert row["worst"] is None or (row["worst"] > 1) == (row["passed"] < row["cases"])


@pytest.mark.usefixtures("few")
def test_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_choice", lambda name: (None, Wrong("one code is flipped"), None))
    result = run("--backend", "numpy")
    assert result.exit_code == 1
    assert "failed affine, bits4-T65-D96-g32: codes0 of float32 rows: 1 of " in result.stdout
    assert f"of {len(FEW)} cases failed." in result.stdout


@pytest.mark.usefixtures("few")
def test_without_a_fault_it_passes() -> None:
    result = run("--backend", "numpy")
    assert result.exit_code == 0, result.stdout
    assert f"All {len(FEW)} cases passed." in result.stdout
    assert "plain operations" in result.stdout and "not run: bfloat16: numpy has none" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.usefixtures("few")
def test_as_json() -> None:
    document = json.loads(run("--backend", "numpy", "--json").stdout)
    assert document["passed"] and document["failures"] == []
    assert document["backend"] == "numpy" and document["path"] == "plain"
    rows = {row["primitive"]: row for row in document["checks"]}
    assert {name: row["cases"] for name, row in rows.items()} == {
        "affine": 1,
        "attend": 1,
        "column_sums": 1,
        "gather": 1,
        "store": 3,
    }
    for row in rows.values():
        assert row["passed"] == row["cases"] and 0 <= row["worst"] <= 1 and row["seconds"] > 0
        assert row["calls"] > 0 and row["kernel_calls"] == 0
    assert rows["store"]["worst"] > 0 and rows["store"]["worst_case"].startswith("int4-")


class Kernels(NumPyBackend):
    """Stands for a backend with kernels: says so, and names its reason where it takes none."""

    path = "metal"

    def __init__(self, why: str | None) -> None:
        self.why = why

    def why_plain_attend(self, store: Any, queries: Any) -> str | None:
        return self.why

    def why_plain_encode(self, codec: Any, x: Any) -> str | None:
        return "no kernel for float32" if x.dtype == np.float32 else self.why

    def why_plain_column_sums(self, queries: Any, keys: Any) -> str | None:
        return self.why


@pytest.mark.usefixtures("few")
def test_calls_that_a_kernel_took_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_choice", lambda name: (None, Kernels(None), None))
    document = json.loads(run("--json", "--backend", "numpy").stdout)
    rows = {row["primitive"]: row for row in document["checks"]}
    assert document["passed"] and document["path"] == "metal"
    assert rows["attend"]["kernel_calls"] == rows["attend"]["calls"] == 1
    assert rows["affine"]["calls"] == 2 and rows["affine"]["kernel_calls"] == 1
    assert 0 < rows["store"]["kernel_calls"] < rows["store"]["calls"]


@pytest.mark.usefixtures("few")
def test_kernels_that_nothing_reached_were_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_choice", lambda name: (None, Kernels("no kernel today"), None))
    result = run("--json", "--backend", "numpy")
    assert result.exit_code == 1
    assert [f["problem"] for f in json.loads(result.stdout)["failures"]] == [
        "no case reached a kernel: nothing of them is known"
    ]


OFF_MAC = [
    ("attend", "B1-H1-G3-L64-T65-D96-bias"),
    ("column_sums", "B2-H1-G3-L17-T65-D96-counted"),
    ("affine", "bits4-T65-D96-g32"),
    ("gather", "int4-float32"),
    ("store", "int4-B2-H2-G4-L1-D128-body192-float32"),
    ("store", "int4-B2-H2-G2-L3-D128-body192-ragged-bias-float16"),
    ("store", "int4-B2-H2-G2-L40-D128-body192-sinks-bool-bfloat16"),
]


def test_metal_kernels_pass_it_off_mac() -> None:
    """What a Mac's user runs, over the same kernels, executed on a CPU; nearly all calls are the kernels'."""
    pytest.importorskip("mlx_lm")
    from kvmlx.backends.mlx.metal.backend import MetalBackend
    from tests.metal.device import Device
    from tests.metal.off_mac import off_mac

    metal = MetalBackend()
    what = [c for c in selftest.checks_for(metal, quick=True) if (c.primitive, c.case) in OFF_MAC]
    assert len(what) == len(OFF_MAC)
    with off_mac(Device()) as ran:
        outcomes = list(selftest.run(metal, what))
    assert [outcome.problem for outcome in outcomes] == [None] * len(outcomes)
    assert all(0 < outcome.kernel_calls == outcome.calls for outcome in outcomes)
    assert {name for name, _ in ran} >= {"attend_decode", "attend_merge", "attend_prefill", "column_sums"}
