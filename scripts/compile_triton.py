"""Compile the Triton kernels exactly as they would be launched, for GPUs that are not here, and report what they need.

    python -m scripts.compile_triton            every call of scripts/triton_calls.py; writes docs/results/triton.json
    python -m scripts.compile_triton --check    a few of them, within two minutes; exit code 1 where a rule is broken

Registers, spills and instructions are those of the machine code. Bytes are counted: the calls run in Triton's
interpreter (scripts/count_triton.py). Nothing here is a time, and no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmlx.machine import software

if TYPE_CHECKING:
    from scripts.triton_calls import Call

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
NVIDIA = ("sm_80", "sm_90")
PROCESSES = 2
ALIGNED = 16
"""Bytes by which tensors' addresses are divisible: an allocator gives 256 and more, and kernels get whole tensors."""
DECODE = ("attend_decode", "attend_merge")
"""Kernels of a decode step, by the start of their names: they must not spill."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile, as plain data."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: bytes
    options: tuple[tuple[str, Any], ...]
    target: str


def job_of(launch: Any, target: str) -> Job:
    """Return what to compile for a `kvmlx.backends.torch.triton.launch.Launch`."""
    fn = launch.fn
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": launch.fp_fusion}
    constants = pickle.dumps(sorted(launch.constants.items()))
    return Job(fn.__module__, fn.__name__, tuple(launch.signature.items()), constants, tuple(options.items()), target)


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one kernel and read its machine code; runs in a process of its own, without Triton's interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from scripts import machine_code

    fn = getattr(import_module(job.module), job.name)
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError(f"{job.name} is {type(fn).__name__}: TRITON_INTERPRET must not be set")
    signature, options = dict(job.signature), dict(job.options)
    aligned = {
        (p.num,): [["tt.divisibility", ALIGNED]]
        for p in fn.params
        if signature[p.name].startswith("*") and not (p.do_not_specialize or p.do_not_specialize_on_alignment)
    }
    source = ASTSource(fn, signature, dict(pickle.loads(job.constants)), attrs=aligned)  # type: ignore[arg-type]
    begin = time.perf_counter()
    try:
        made: Any = triton.compile(source, target=GPUTarget(*TARGETS[job.target]), options=options)
    # Whatever the compiler refuses: it is a finding like any other, and the next kernel still says something.
    except Exception as error:
        # The innermost cause says what is wrong, the others where.
        while error.__cause__ is not None:
            error = error.__cause__
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - begin
    shared, warps, chip = made.metadata.shared, options["num_warps"], machine_code.CHIPS[job.target]
    if "cubin" in made.asm:
        code = machine_code.read_cubin(made.asm["cubin"], job.name, chip, shared, warps)
    else:
        code = machine_code.read_amdgcn(made.asm["amdgcn"], chip, shared, warps)
    found = code.as_dict() | {"num_warps": warps, "num_stages": options["num_stages"], "seconds": round(seconds, 2)}
    return found | {"spills": code.spills, "products": products(made.asm["ttir"])}


def products(ttir: str) -> int:
    """Return how many `tl.dot` of 16-bit numbers a kernel has."""
    dots = [line for line in ttir.splitlines() if "tt.dot " in line]
    return sum("f32> *" not in line.partition(" : ")[2] for line in dots)


def compile_all(jobs: Iterable[Job], cache: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Compile jobs in processes of their own, each once, and yield each with what was made of it, in order."""
    jobs = list(dict.fromkeys(jobs))
    wanted = {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": None}
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            yield from zip(jobs, pool.map(compile_job, jobs), strict=True)
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# The rules


def specialized(fn: Any, signature: dict[str, str]) -> list[str]:
    """Return the integer arguments on whose values Triton would compile variants (1, multiples of 16)."""
    integers = {name for name, kind in signature.items() if kind[0] in "iu" and kind[1:].isdigit()}
    return [p.name for p in fn.params if p.name in integers and not p.do_not_specialize]


def fixed_lengths(call: Call, target: str = "sm_90") -> list[str]:
    """Return what is compiled differently for other lengths and batches of a call."""
    other = replace(call, rows=3 * call.rows + 128, n_batch=call.n_batch + 2)
    out = []
    for one, two in zip(call.launches(target), other.launches(target), strict=True):
        differ = [name for name, value in one.constants.items() if two.constants[name] != value]
        differ += [name for name, kind in one.signature.items() if two.signature[name] != kind]
        differ += [name for name in ("num_warps", "num_stages") if getattr(one, name) != getattr(two, name)]
        out += [f"{one.name} is compiled anew for other lengths: {name}" for name in differ]
        out += [f"{one.name} is specialized on the value of {name}" for name in specialized(one.fn, one.signature)]
    return out


def unusable(code: dict[str, Any]) -> list[str]:
    """Return why a kernel cannot be launched at all."""
    many = f"{code['shared_bytes']:,} bytes of shared memory: no processor has as many"
    return [] if code["programs"] else [many]


def faults(code: dict[str, Any]) -> list[str]:
    """Return the rules for a decode step's kernels that a compiled kernel breaks."""
    out = unusable(code)
    if code["spills"]:
        out.append(
            f"local memory: {code['stack_bytes']} bytes a thread, {code['spill_store_bytes']} bytes of stores, "
            f"{code['spill_load_bytes']} of loads"
        )
    if code["products"] and not code["tensor"]:
        out.append("products without an instruction of the matrix units")
    return out


def judged(call: Call, kernel: str) -> bool:
    return call.primitive == "decode" and kernel.startswith(DECODE)


# The report


def main_loop(code: dict[str, Any]) -> dict[str, Any] | None:
    """Return the loop that the kernel spends its time in: with products if there are any, reading memory, the largest.

    A compiler that peels the last steps of a pipeline may place them so that a jump back looks like a loop around them.
    """

    def key(loop: dict[str, Any]) -> tuple[bool, bool, int]:
        return "tensor" in loop["mix"], "load" in loop["mix"], loop["size"]

    return max(code["loops"], key=key, default=None)


def kernels(plan: Sequence[tuple[Call, Sequence[str]]], cache: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Compile what calls launch, each for some targets; return a row per kernel, and the rules that are broken."""
    wanted = [
        (call, launch, job_of(launch, target))
        for target in TARGETS
        for call, targets in plan
        if target in targets
        for launch in call.launches(target)
    ]
    made, wrong, rows = {}, [], []
    for i, (job, code) in enumerate(compile_all([job for _, _, job in wanted], cache), 1):
        made[job] = code
        print(f"\r{i} kernels compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for call, launch, job in wanted:
        code = made[job]
        row = asdict(call) | {"kernel": launch.name, "target": job.target, "grid": list(launch.grid)}
        if "error" in code:
            rows.append(row | code)
            # The compiler quotes the source; what is wrong with it stands last.
            wrong.append(f"{call.name}, {launch.name}, {job.target} does not compile: {code['error'].splitlines()[-1]}")
            continue
        loop = main_loop(code)
        row |= {k: v for k, v in code.items() if k != "loops"} | {"loop": loop, "loops": len(code["loops"])}
        row |= {"tile": launch.constants.get("TILE"), "row_bytes": call.row_bytes}
        rows.append(row)
        broken = faults(code) if judged(call, launch.name) else unusable(code)
        wrong += [f"{call.name}, {launch.name}, {job.target}: {fault}" for fault in broken]
    return rows, list(dict.fromkeys(wrong))


def counted_bytes(*, quick: bool) -> list[dict[str, Any]]:
    """Return what scripts/count_triton.py counts, in a process with Triton's interpreter."""
    command = [sys.executable, "-m", "scripts.count_triton", *(["--quick"] if quick else [])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def compact_json(document: dict[str, Any]) -> str:
    """Return JSON with one line for each row of a list."""
    parts = []
    for name, value in document.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="a few calls; exit code 1 where a rule is broken")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here instead of docs/results/triton.json")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled kernels here for the next time")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    from scripts.triton_calls import FULL, QUICK, QUICK_NVIDIA

    # A run that is stopped takes its processes with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    every = [(call, tuple(TARGETS)) for call in (QUICK if args.check else FULL)]
    nvidia = [(call, NVIDIA) for call in (QUICK_NVIDIA if args.check else [])]
    with tempfile.TemporaryDirectory(prefix="kvmlx-triton-") as scratch:
        rows, wrong = kernels([*every, *nvidia], args.cache or Path(scratch))
    for call, _ in (*every, *nvidia):
        wrong += [f"{call.name}: {fault}" for fault in fixed_lengths(call)]
    document: dict[str, Any] = {
        "machine": "compiled without a GPU, bytes counted in the interpreter",
        "versions": software("triton", "torch", "numpy"),
        "wrong": wrong,
        "kernels": rows,
    }
    if not args.check:
        document["bytes"] = counted_bytes(quick=False)
    path = args.out or (None if args.check else RESULTS / "triton.json")
    if path:
        path.write_text(compact_json(document), encoding="utf-8")
        print(f"wrote {path}; python -m tests.test_docs puts it into docs/cuda.md", file=sys.stderr)
    for line in dict.fromkeys(map(line_of, rows)) if args.check else []:
        print(line)
    for fault in wrong:
        print(f"WRONG {fault}")
    return bool(wrong)


def line_of(row: dict[str, Any]) -> str:
    """Return one compiled kernel in a line."""
    name = f"{row['primitive']} {row['format']} {row['dtype']} D{row['dim']} G{row['group']}"
    start = f"{row['target']:7} {row['kernel']:22} {name:40}"
    if "error" in row:
        return f"{start} does not compile"
    memory = f"{row['spills']} spilled, {row['shared_bytes'] / 1024:.1f} KB shared"
    size = f"{row['instructions']} instructions"
    return f"{start} {row['registers']:3} registers, {memory}, occupancy {row['occupancy']:.0%}, {size}"


if __name__ == "__main__":
    sys.exit(main())
