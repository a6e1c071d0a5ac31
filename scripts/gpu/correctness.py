"""Are the kernels right on this device: kvmlx's selftest, the stores of the tests, pytest, compute-sanitizer.

Compiling takes most of the time, so the checks are dealt out to processes that share Triton's cache.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvmlx import selftest
from kvmlx.backends.torch.triton.backend import on
from scripts.gpu.run import Run, short

ROOT = Path(__file__).resolve().parents[2]
MOST_WORKERS = 12
DRY_CHECKS = ("int4-B1-H1-G8-L1-D128-body192-bfloat16", "gather: int4-float32", "packing: bits3")
"""What a dry run checks, by the start of a name: an interpreter is slow."""
SANITIZED = ("int4-B2-H2-G4-L1-D128", "int4-B2-H2-G2-L40-D128", "kivi(bits=2)-B2-H2-G2-L3-D128", "gather: kivi")
"""What runs under compute-sanitizer."""
TOOLS = ("memcheck", "racecheck")
FOUND = 9
"""Exit code by which a tool says that it found something."""
SELFTEST_SHARE, PYTEST_SHARE = 0.5, 0.3
"""Of the time that is left."""
GRACE_SECONDS = 60.0
"""A check that has begun, and its compiler, may take so much longer."""
MARK = "kvmlx-worker:"
"""Before a worker's one line of results."""

Check = tuple[str, Callable[[Any], float]]
"""A name, and what raises where the backend is wrong and returns the worst error over its limit."""


# In a worker


def checks(backend: Any) -> Iterator[Check]:
    """Yield every check of the backend."""
    for check in selftest.checks_for(backend):
        yield f"{check.primitive}: {check.case}", check.run
    try:
        from tests import stores
    except ImportError:
        return
    for shape in stores.SHAPES:
        yield f"tests/stores: {shape.name}", partial(_check_store, stores, shape)


def _check_store(stores: Any, shape: Any, backend: Any) -> float:
    problem = stores.make(shape, backend=backend)
    stores.check(backend.attend, problem)
    return 0.0


def work(run: Run, index: int, of: int, only: list[str]) -> dict[str, Any]:
    """Run every ``of``-th check from ``index`` on, in a mixed order; return counts, the worst ratio, what failed.

    What the time did not suffice for is counted as ``left``: because of the order it is a bit of everything.
    """
    backend = on(str(run.device))
    found: dict[str, Any] = {"checks": 0, "left": 0, "worst": 0.0, "failed": [], "kernel_calls": 0, "calls": 0}
    wanted = [c for c in checks(backend) if not only or any(part in c[0] for part in only)]
    random.Random(0).shuffle(wanted)
    for name, check in wanted[index::of]:
        if run.left <= 0:
            found["left"] += 1
            continue
        recorder = selftest.Recorder(backend)
        problem = None
        try:
            found["worst"] = max(found["worst"], float(check(recorder)))
        # Whatever a compiler or the framework raises: the other checks still say something.
        except Exception as error:
            problem = short(error)
        found["checks"] += 1
        found["calls"] += len(recorder.calls)
        found["kernel_calls"] += sum(why is None for why in recorder.calls)
        if problem:
            found["failed"].append(f"{name}: {problem}")
    return found


def worker(run: Run, kind: str, share: str, only: list[str]) -> int:
    """Do a worker's share, ``"2/12"``, and print what came of it."""
    part, _, of = share.partition("/")
    index, n = int(part), int(of)
    if kind == "warm":
        from scripts.gpu import sweep

        found = sweep.warm(run, index, n)
    else:
        found = work(run, index, n, only)
    print(MARK + json.dumps(found), flush=True)
    return bool(found.get("failed"))


# In the run


def _command(run: Run, seconds: float, kind: str, share: str, only: list[str]) -> list[str]:
    dry = ["--dry-run"] if run.dry else []
    command = [sys.executable, "-m", "scripts.gpu_check", *dry, "--seconds", f"{seconds:.0f}"]
    return [*command, "--worker", kind, share, *only]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def in_processes(
    run: Run, kind: str, seconds: float, only: list[str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Deal a kind of work out to processes; return what each found, and which of them did not end well.

    They stop by themselves after ``seconds``, and are stopped if they do not.
    """
    n = 1 if run.dry else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
    # Interpreted, one configuration says that it runs.
    shares = ["1/100"] if run.dry and kind == "warm" else [f"{i}/{n}" for i in range(n)]
    started = [
        subprocess.Popen(
            _command(run, seconds, kind, share, only or []),
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for share in shares
    ]
    found, broken = [], []
    deadline = time.monotonic() + seconds + GRACE_SECONDS
    for share, process in zip(shares, started, strict=True):
        try:
            said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0]
            broken.append(f"worker {share} did not end in time")
        lines = [line for line in said.splitlines() if line.startswith(MARK)]
        if lines:
            found.append(json.loads(lines[-1].removeprefix(MARK)))
        elif not broken or share not in broken[-1]:
            broken.append(f"worker {share} ended without a result: {said[-600:]}")
    return found, broken


def on_device(run: Run, found: dict[str, Any]) -> None:
    """Run the selftest and the stores of the tests in several processes."""
    begin = time.monotonic()
    parts, broken = in_processes(run, "checks", SELFTEST_SHARE * run.left, list(DRY_CHECKS) if run.dry else [])
    if find_spec("hypothesis") is None:
        found["skipped"] = "the stores of tests/stores.py: they need hypothesis"
    for name in ("checks", "left", "calls", "kernel_calls"):
        found[name] = sum(part[name] for part in parts)
    found["worst"] = max((part["worst"] for part in parts), default=0.0)
    found["failed"] = [text for part in parts for text in part["failed"]] + broken
    found["seconds"] = time.monotonic() - begin
    left = f" ({found['left']} left out for want of time)" if found["left"] else ""
    run.say(
        f"{found['checks']} checks{left}, {found['kernel_calls']} of {found['calls']} calls by kernels, worst error "
        f"{found['worst']:.2f} of its limit, {len(found['failed'])} failed"
    )
    for line in found["failed"][:20]:
        run.say(f"  FAILED {line}")


def tests(run: Run, found: dict[str, Any]) -> None:
    """Run the kernels' tests under pytest, where it is installed."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        found["skipped"] = f"{' and '.join(missing)} missing: the checks above are what there is"
        run.say(found["skipped"])
        return
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_triton_*.py"))
    files = [f for f in files if "compile" not in f] + ["tests/test_vectors.py"]
    if run.dry:
        files = files[-1:]
    limit = max(20.0, PYTEST_SHARE * run.left)
    parallel = ["-n", str(min(MOST_WORKERS, (os.cpu_count() or 2) - 2))] if find_spec("xdist") and not run.dry else []
    chosen = ["-k", "torch and bits3-D64"] if run.dry else []
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *parallel, *chosen, *files],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        found["skipped"] = f"pytest was stopped after {limit:.0f} s"
        run.say(found["skipped"])
        return
    said = done.stdout.strip().splitlines()
    found |= {"files": files, "summary": said[-1] if said else "", "code": done.returncode, "failed": []}
    if done.returncode not in (0, 5):
        found["failed"] = [line for line in said if line.startswith(("FAILED", "ERROR"))] or said[-5:]
        found["output"] = "\n".join(said[-60:])
    run.say(f"pytest: {found['summary']}")
    for line in found["failed"][:20]:
        run.say(f"  {line}")


def sanitizer_path() -> str | None:
    """Return where compute-sanitizer is: on the PATH, in a CUDA toolkit, or in one of NVIDIA's Python packages."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return on_path
    places = [Path("/usr/local"), Path("/opt/nvidia"), Path("/opt/cuda")]
    spec = find_spec("nvidia")
    places += [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for place in places:
        with suppress(OSError):
            for path in place.rglob("compute-sanitizer"):
                if path.is_file() and os.access(path, os.X_OK):
                    return str(path)
    return None


def sanitizer(run: Run, found: dict[str, Any]) -> None:
    """Run a few checks under compute-sanitizer: accesses out of bounds, and races."""
    tool = sanitizer_path()
    if tool is None or not run.cuda:
        found["skipped"] = "compute-sanitizer was not found" if run.cuda else "no GPU"
        run.say(found["skipped"])
        return
    found |= {"path": tool, "failed": []}
    for name in TOOLS:
        run.need(30, name)
        # Without torch's cache of blocks every array has an end that the tool sees.
        environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = min(120.0, run.left)
        check = _command(run, limit - 20, "checks", "0/1", list(SANITIZED))
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), *check]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            found[name] = f"stopped after {limit:.0f} s"
            run.say(f"{name}: {found[name]}")
            continue
        said = done.stdout + done.stderr
        summary = [line for line in said.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        ran = any(line.startswith(MARK) for line in said.splitlines())
        found[name] = summary[-1].strip("= ") if summary else f"exit code {done.returncode}: {said[-300:]}"
        if not ran:
            found[name] = f"could not run: {found[name]}"
        elif done.returncode:
            found["failed"].append(f"{name}: {said[-2000:]}")
        run.say(f"{name}: {found[name]}")
