"""The Triton kernels compile for GPUs that are not here, and those of a decode step do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from scripts import machine_code
from scripts.compile_triton import DECODE, NVIDIA, TARGETS, compact_json, main_loop
from scripts.machine_code import CHIPS, occupancy

ROOT = Path(__file__).resolve().parents[1]


def outside(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter, which this process may have chosen."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--check` finds; its exit code is part of it."""
    out = tmp_path_factory.mktemp("compiled") / "triton.json"
    done = outside("-m", "scripts.compile_triton", "--check", "--out", str(out))
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text()) | {"code": done.returncode, "said": done.stdout}


def rows_of(report: dict[str, Any], *targets: str) -> list[dict[str, Any]]:
    """Return the kernels of decode steps for some targets."""
    found = [r for r in report["kernels"] if r["primitive"] == "decode" and r["kernel"].startswith(DECODE)]
    rows = [r for r in found if r["target"] in targets]
    assert {r["target"] for r in rows} == set(targets) and len({r["format"] for r in rows}) >= 4
    assert not [r["error"] for r in rows if "error" in r]
    return rows


@pytest.mark.slow
def test_no_rule_is_broken(report: dict[str, Any]) -> None:
    assert report["wrong"] == [] and report["code"] == 0
    assert not any("error" in row for row in report["kernels"])
    # Head dims and new tokens beyond the common ones, where registers are scarce.
    assert {row["target"] for row in report["kernels"] if row["dim"] == 256} == set(NVIDIA)
    kernels = {row["kernel"] for row in report["kernels"]}
    assert {row["primitive"] for row in report["kernels"]} == {"decode", "prefill", "encode", "column_sums", "compact"}
    assert kernels >= {"attend_decode_kernel", "attend_merge_kernel", "attend_prefill_kernel", "compact_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_decode_kernels_use_no_local_memory(report: dict[str, Any], target: str) -> None:
    for row in rows_of(report, target):
        spilled = ("spills", "stack_bytes", "spill_store_bytes", "spill_load_bytes")
        assert [row[name] for name in spilled] == [0, 0, 0, 0], row
        assert row["loop"] is None or "local" not in row["loop"]["mix"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_decode_multiplies_on_the_matrix_units(report: dict[str, Any], target: str) -> None:
    rows = [row for row in rows_of(report, target) if row["kernel"] == "attend_decode_kernel"]
    for row in rows:
        assert row["products"] > 0 and row["tensor"] > 0, row
        assert row["loop"]["mix"]["tensor"] > 0, "within the loop over the rows"


@pytest.mark.slow
def test_programs_fit_on_a_processor(report: dict[str, Any]) -> None:
    for row in report["kernels"]:
        assert row["programs"] >= 1 and 0 < row["occupancy"] <= 1, row


def test_nothing_length_like_is_compiled_in() -> None:
    """Neither as a constant nor as a value that Triton would specialize on."""
    done = outside(
        "-c",
        "from scripts.compile_triton import fixed_lengths; from scripts.triton_calls import FULL;"
        "calls = [c for c in FULL if c.primitive in ('decode', 'prefill')];"
        "assert len(calls) > 20;"
        "print(*{line for c in calls for line in fixed_lengths(c)}, sep='\\n')",
    )
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr[-2000:]


# What the report would find


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("planted")
    code = f"from tests.planted_triton import compiled; compiled({str(cache)!r}, 'sm_90', 'gfx942')"
    done = outside("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_planted_spill_is_found(planted: dict[str, Any], target: str) -> None:
    code, wrong = planted["found"][f"spilling_kernel {target}"].values()
    assert len(wrong) == 1 and wrong[0].startswith("local memory")
    assert code["stack_bytes"] > 100 and code["spill_store_bytes"] > 100 and code["spill_load_bytes"] > 100
    assert max(loop["mix"].get("local", 0) for loop in code["loops"]) > 10


def test_products_without_matrix_units_are_found(planted: dict[str, Any]) -> None:
    found = planted["found"]["scalar_kernel sm_90"]
    assert found["code"]["tensor"] == 0 and found["code"]["spills"] == 0
    # Products of float32 are meant to be made so; those of 16 bits are not.
    assert found["code"]["products"] == 0 and found["wrong"] == []


def test_a_good_kernel_breaks_no_rule(planted: dict[str, Any]) -> None:
    for target in ("sm_90", "gfx942"):
        code, wrong = planted["found"][f"good_kernel {target}"].values()
        assert wrong == [] and code["spills"] == 0 and code["products"] == 1 and code["tensor"] > 0
        loop = main_loop(code)
        assert loop is not None and loop["mix"]["tensor"] > 0 and loop["mix"]["load"] > 0


def test_a_kernel_that_does_not_compile_is_reported(planted: dict[str, Any]) -> None:
    found = planted["found"]["failing_kernel sm_90"]
    assert "error" in found["code"] and "no_such_name" in found["code"]["error"]


def test_too_much_shared_memory_is_found(planted: dict[str, Any]) -> None:
    wrong = planted["found"]["greedy_kernel gfx942"]["wrong"]
    assert wrong and "shared memory: no processor has as many" in wrong[0]


def test_a_specialized_length_is_found(planted: dict[str, Any]) -> None:
    assert planted["specialized"] == {name: [] for name in planted["specialized"]} | {"specializing_kernel": ["n"]}


# Reading machine code


SASS = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R52, R56.reuse, R28, RZ ;
        /*0040*/              @P1  STL.64 [R1+0x8], R6 ;
        /*0050*/                   LOP3.LUT R9, R0, 0x7f, RZ, 0xc0, !PT ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_loops_of_sass() -> None:
    ops, loops = machine_code.loops(SASS, machine_code.SASS)
    assert len(ops) == 9 and len(loops) == 1, "the padding behind the end is no loop"
    loop = machine_code.loop_of(loops[0], machine_code.SASS)
    assert loop.size == 5
    assert loop.mix == {"load": 1, "tensor": 1, "local": 1, "bits": 1, "control": 1}
    assert loop.detail == {"HMMA.16816.F32.BF16": 1, "LDG.128": 1, "LOP3": 1, "STL.64": 1}


@pytest.mark.parametrize(
    "chip, registers, shared, warps, programs",
    [
        ("sm_90", 112, 28672, 4, 4),
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 32, 0, 1, 32),
        ("sm_90", 32, 114 * 1024, 4, 1),
        ("sm_90", 32, 228 * 1024, 4, 0),
        ("sm_80", 64, 40 * 1024, 8, 4),
        ("gfx942", 172, 16384, 4, 2),
        ("gfx942", 512, 0, 1, 4),
        ("gfx942", 128, 65536, 4, 1),
    ],
)
def test_programs_that_a_processor_holds(chip: str, registers: int, shared: int, warps: int, programs: int) -> None:
    held, share = occupancy(CHIPS[chip], registers, shared, warps)
    assert held == programs and share == pytest.approx(held * warps / CHIPS[chip].warps)


def test_json_with_a_line_for_each_row() -> None:
    document = {"a": {"b": [1, 2]}, "rows": [{"x": 1}, {"x": [2, 3]}], "none": []}
    text = compact_json(document)
    assert json.loads(text) == document and text.count("\n") == 10


# Counting bytes


counted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="accesses are seen in the interpreter")


@counted
def test_bytes_of_encode_are_those_of_its_rows_and_planes() -> None:
    from scripts.count_triton import count
    from scripts.triton_calls import Call

    row = count(Call("encode", rows=64, n_kv_heads=1))
    planes = 64 * (128 // 2 + 2 * 2 * 2)
    assert row["read"] == row["loaded"] == 2 * 64 * 128 * 2 and row["written"] == 2 * planes
    assert row["ideal"] == row["read"] + row["written"]


@counted
def test_decode_reads_every_byte_once() -> None:
    from scripts.count_triton import count
    from scripts.triton_calls import TAIL, Call

    row = count(Call("decode", rows=256, n_kv_heads=1))
    launch = row["launches"][0]
    # Codes of 256 rows; exact rows and the new token's own, keys and values alike.
    for side in ("keys", "values"):
        assert launch["loaded"][f"{side}_codes0"] == 256 * 64
        assert launch["loaded"][f"tail_{side}"] == (TAIL + 1) * 128 * 2
    assert row["launches"][1]["written"] == {"out": 4 * 128 * 2}
    assert row["ideal"] < row["read"] + row["written"] < 1.5 * row["ideal"]


@counted
def test_an_access_outside_of_every_argument_is_found() -> None:
    import torch

    from kvmlx.backends.torch.triton.launch import TritonKernel
    from scripts.count_triton import OutOfBounds, counting
    from tests.planted_triton import specializing_kernel

    x, out = torch.zeros(4096), torch.zeros(4096)
    kernel = TritonKernel(specializing_kernel)
    with counting() as launches:
        kernel((1,), {"x": x[:100], "out": out[:128], "n": 100}, {"D": 128}, num_warps=4)
        assert launches[0].read == {"x": 400} and launches[0].written == {"out": 512}
        with pytest.raises(Exception, match="touches 1 elements outside") as caught:
            kernel((1,), {"x": x[:100], "out": out[:128], "n": 101}, {"D": 128}, num_warps=4)
    assert isinstance(caught.value.__cause__, OutOfBounds)
