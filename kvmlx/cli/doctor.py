"""`kvmlx doctor`: what this machine has, what runs on it and whether it is right, and what would help."""

from __future__ import annotations

import glob
import importlib
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvmlx import __version__, selftest
from kvmlx.cli.backends import choose as best
from kvmlx.cli.output import UsageError, print_json, size, stderr, stdout
from kvmlx.session import LayerCache, Session
from kvmlx.strategy import PRESETS, Strategy
from kvmlx.types import Array, Codec, LayerInfo, ModelInfo, StrategyError

OF_BACKEND = {"mlx": ("mlx", "numpy"), "torch": ("torch", "triton", "numpy"), "numpy": ("numpy",)}
PACKAGES = ("numpy", "mlx", "mlx-lm", "torch", "triton", "transformers")
OPENBLAS = "/usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0"
SLOW_GFLOPS = 30.0
"""MLX's Linux wheel links a reference BLAS of about 6 GFLOP/s; with OpenBLAS two cores give over 150."""


def show_doctor(*, head_dim: int, backend: str | None = None, as_json: bool) -> None:
    """Print the findings; the paths are those of ``backend``, or of the best that this machine has."""
    findings = examine(head_dim, backend)
    if as_json:
        print_json(findings)
        return
    console = stdout()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(findings):
        table.add_row(name, text)
    console.print(table)
    if (paths := findings["paths"]) is not None:
        _show_paths(paths)
    for hint in findings["hints"]:
        console.print(f"[yellow]hint[/] {escape(hint)}", soft_wrap=True)


def examine(head_dim: int = 128, backend: str | None = None) -> dict[str, Any]:
    """Return what there is, as plain data."""
    hints: list[str] = []
    name = _backend_of(backend)
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": {"kvmlx": __version__, **{name: _version(name) for name in PACKAGES}},
        "backends": {
            "numpy": {"available": True, "device": "cpu", "kernels": "plain"},
            "mlx": _mlx(hints),
            "torch": _torch(),
        },
        "paths": None if name is None else paths(head_dim, name),
        "demo_model": _demo_model(),
        "hints": hints,
    }


def _backend_of(asked: str | None) -> str | None:
    """Return what was asked for, or the best backend here; None where there is none but NumPy."""
    if asked is not None and asked not in OF_BACKEND:
        raise UsageError(f"--backend {asked} is unknown: one of {', '.join(OF_BACKEND)}")
    return asked if asked == "numpy" else best(asked, or_none=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mlx(hints: list[str]) -> dict[str, Any]:
    try:
        import mlx.core as mx
    # A wheel for another system raises ImportError of some kind, and so does a missing shared library.
    except ImportError as error:
        hints.append("for MLX: pip install 'kvmlx[mlx]'")
        return {"available": False, "why": _why(error, "mlx")}
    if _version("mlx-lm") is None:
        hints.append("mlx is here and mlx-lm is not: pip install 'kvmlx[mlx]'")
        return {"available": False, "why": "mlx-lm is not installed"}
    from kvmlx.backends.mlx import choose

    device = mx.default_device()
    gflops = _gflops(mx)
    found: dict[str, Any] = {
        "available": True,
        "device": "cpu" if device == mx.cpu else "gpu",
        "metal": mx.metal.is_available(),
        "kernels": choose.backend().path,
        "float32_gflops": round(gflops, 1),
    }
    if device != mx.cpu:
        found["device_name"] = str(mx.device_info().get("device_name", ""))
    if why := choose.why_no_metal():
        found["why_no_metal"] = why
    if sys.platform == "linux" and device == mx.cpu and gflops < SLOW_GFLOPS:
        hints.append(_openblas_hint(gflops))
    return found


def _gflops(mx: Any, n: int = 768) -> float:
    """Time a float32 matrix product."""
    x = mx.random.normal((n, n))
    mx.eval(x, x @ x)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        mx.eval(x @ x)
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds) / 1e9


def _openblas_hint(gflops: float) -> str:
    found = sorted(glob.glob(OPENBLAS))
    speed = f"MLX multiplies at {gflops:.0f} GFLOP/s on this CPU, through a reference BLAS"
    if found:
        return f"{speed}; OpenBLAS is here and many times faster: run with LD_PRELOAD={found[0]}"
    return f"{speed}; many times faster: apt install libopenblas0-pthread, then LD_PRELOAD its libopenblas.so.0"


def _torch() -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return {"available": False, "why": _why(error, "torch")}
    if _version("transformers") is None:
        return {"available": False, "why": "transformers is not installed: pip install 'kvmlx[torch]'"}
    from kvmlx.backends.torch import choose

    chosen, cuda = choose.backend(), torch.cuda.is_available()
    found = {
        "available": True,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": cuda,
        "kernels": chosen.path,
    }
    if why := choose.why_no_triton(chosen.device):
        found["why_no_triton"] = why
    return found


def _why(error: ImportError, package: str) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        return f"not installed: pip install 'kvmlx[{package}]'"
    return f"cannot be imported: {error}"


def _demo_model() -> dict[str, Any]:
    from kvmlx.demo_model import demo_model_path, is_intact

    path = demo_model_path()
    there = is_intact(path)
    found: dict[str, Any] = {"path": str(path), "ready": there}
    if there:
        found["nbytes"] = sum(file.stat().st_size for file in path.iterdir())
    return found


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {v}" if v else f"[dim]no {name}[/]" for name, v in found["packages"].items())
    rows = [("system", found["system"]), ("python", found["python"]), ("packages", packages)]
    for name, backend in found["backends"].items():
        rows.append((name, _backend(backend)))
    demo = found["demo_model"]
    state = f"ready, {size(demo['nbytes'])}" if demo["ready"] else "[dim]not made yet: `kvmlx demo` fetches it[/]"
    rows.append(("demo model", f"{state} ({escape(demo['path'])})"))
    return rows


def _backend(backend: dict[str, Any]) -> str:
    if not backend["available"]:
        return f"[red]no[/]  {escape(backend['why'])}"
    parts = [f"device {backend['device']}", f"kernels: {backend['kernels']}"]
    if backend.get("device_name"):
        parts[0] += f" ({backend['device_name']})"
    if "metal" in backend:
        why = backend.get("why_no_metal")
        parts.insert(1, f"no Metal ({why})" if why else "Metal")
        parts.append(f"{backend['float32_gflops']} GFLOP/s in float32")
    if "cuda" in backend:
        why = backend.get("why_no_triton")
        parts.insert(1, "CUDA" if backend["cuda"] else "no CUDA")
        parts.insert(2, f"no Triton ({why})" if why else "Triton")
    return f"[green]yes[/] {escape(', '.join(parts))}"


# Which path each format takes

KERNEL, FRAMEWORK, PLAIN = "kernel", "the framework's attention", "plain operations"
SHORT: dict[str, str] = {KERNEL: "[green]kernel[/]", FRAMEWORK: "own", PLAIN: "plain"}
"""As the table says it; the legend has the words."""
KERNELS = {"metal": "Metal kernels", "triton": "Triton kernels", "plain": PLAIN}
FRAMEWORKS = {"mlx": "MLX", "torch": "torch", "numpy": "NumPy"}
PROMPT_TOKENS, DECODE_TOKENS, PREFILL_TOKENS = 512, (1, 8), 64
FORMATS: dict[str, str] = {
    **PRESETS,
    **{
        text: text
        for text in (
            "full",
            *(f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)),
            "int4(rotate=hadamard)",
            "kivi(bits=4)",
            "turboquant(bits=4)",
            "turboquant(bits=4, center=64)",
            "snapkv(budget=0.25)",
            "snapkv(budget=0.25) | adakv",
            "snapkv(budget=0.25) | adakv | int4",
            "snapkv(budget=0.25) | keepkv",
        )
    },
}
"""What is shown of the paths, by how it is written there."""


@dataclass(frozen=True)
class Path:
    """What runs a primitive, and why it is not a kernel."""

    path: str
    why: str | None = None


class _Probe:
    """Runs plain operations, and notes of each call which path the chosen backend takes for it."""

    def __init__(self, plain: Any, chosen: Any, why_plain: str | None) -> None:
        self._plain, self._chosen, self._why = plain, chosen, why_plain
        self._framework = False
        self.seen: dict[str, list[Path]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def _note(self, primitive: str, *arguments: Any, plain: str = PLAIN) -> None:
        why = self._why or selftest.why_plain(self._chosen, primitive, *arguments)
        self.seen.setdefault(primitive, []).append(Path(plain, why) if why else Path(KERNEL))

    def sdpa(self, *arguments: Any, **options: Any) -> Array:
        self._framework = True
        return self._plain.sdpa(*arguments, **options)

    def attend(self, store: Any, queries: Array, **options: Any) -> Array:
        self._framework = False
        out = type(self._plain).attend(self, store, queries, **options)
        self._note("attend", store, queries, plain=FRAMEWORK if self._framework else PLAIN)
        return out

    def encode(self, codec: Codec, x: Array) -> dict[str, Array]:
        self._note("encode", codec, x)
        return self._plain.encode(codec, x)

    def column_sums(self, queries: Array, keys: Array, **options: Any) -> Array:
        self._note("column_sums", queries, keys)
        return self._plain.column_sums(queries, keys, **options)


def paths(head_dim: int, backend: str) -> dict[str, Any]:
    """Return which path each format takes, as plain data.

    A small cache of each format is filled, and the backend is asked about the very arrays that it would be given.
    """
    plain, chosen, why = _choice(backend)
    rows = []
    for name, text in FORMATS.items():
        try:
            found = _paths_of(text, head_dim, _Probe(plain, chosen, why))
        except StrategyError as error:
            rows.append({"name": name, "strategy": text, "refused": str(error)})
            continue
        cells = {column: None if path is None else asdict(path) for column, path in found.items()}
        rows.append({"name": name, "strategy": text, **cells})
    return {
        "backend": backend,
        "head_dim": head_dim,
        "dtype": "float16",
        "kernels": chosen.path,
        "why_plain": why,
        "formats": rows,
    }


def _choice(backend: str) -> tuple[Any, Any, str | None]:
    """Return a backend's plain operations, what its caches take, and why these are the same if they are."""
    if backend == "numpy":
        from kvmlx.backends.numpy import BACKEND

        return BACKEND, BACKEND, "numpy has no kernels"
    if backend == "mlx":
        from kvmlx.backends.mlx import choose

        chosen, plain = choose.backend(), choose.BACKEND
        none = f"no Metal: {choose.why_no_metal()}"
    else:
        from kvmlx.backends.torch import choose

        chosen = choose.backend()
        plain = choose.on(str(chosen.device))
        none = f"no Triton: {choose.why_no_triton(chosen.device)}"
    why = None
    if chosen.path == "plain":
        why = f"{choose.VARIABLE}=plain" if os.environ.get(choose.VARIABLE) == "plain" else none
    return plain, chosen, why


def _paths_of(text: str, dim: int, probe: _Probe) -> dict[str, Path | None]:
    strategy = Strategy.parse(text)
    for codec in strategy.codecs():
        if codec is not None:
            codec.check(dim)
    cache = LayerCache(probe, Session(strategy, ModelInfo("probe", (LayerInfo(0),)), 1), 0)
    rng = np.random.default_rng(0)

    def feed(n: int) -> list[Path]:
        xp = probe.xp
        q, k, v = (
            xp.astype(probe.from_numpy(rng.standard_normal((1, h, n, dim)).astype(np.float32)), xp.float16)
            for h in (4, 2, 2)
        )
        probe.seen["attend"] = []
        cache.update(k, v)
        cache.attend(q, scale=dim**-0.5)
        return probe.seen["attend"]

    feed(PROMPT_TOKENS)
    cache.settle(prompt_end=True)
    encode, selection = probe.seen.get("encode", []), probe.seen.get("column_sums", [])
    decode = [path for n in DECODE_TOKENS for path in feed(n)]
    columns = {"decode": decode, "prefill": feed(PREFILL_TOKENS), "encode": encode, "selection": selection}
    return {name: _one(found) for name, found in columns.items()}


def _one(found: Iterable[Path]) -> Path | None:
    """Return what all calls have in common: one path, or several with the reasons of all."""
    distinct = list(dict.fromkeys(found))
    if not distinct:
        return None
    whys = list(dict.fromkeys(path.why for path in distinct if path.why))
    return Path(" or ".join(dict.fromkeys(path.path for path in distinct)), "; ".join(whys) or None)


def _show_paths(found: dict[str, Any]) -> None:
    console = stdout()
    columns = ("decode", "prefill", "encode", "selection")
    reasons: dict[str, int] = {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("cache", *columns):
        table.add_column(name, overflow="fold")
    for row in found["formats"]:
        if "refused" in row:
            table.add_row(escape(row["name"]), f"refused{_mark(row['refused'], reasons)}", "", "", "")
        else:
            table.add_row(escape(row["name"]), *(_cell(row[column], reasons) for column in columns))
    console.print(f"\n[bold]paths[/] of {found['backend']} at head dim {found['head_dim']}, {found['dtype']} rows")
    console.print(table)
    for why, number in reasons.items():
        console.print(f" ({number}) {escape(why)}", soft_wrap=True)
    legend = {
        SHORT[KERNEL]: KERNELS[found["kernels"]] if found["kernels"] != "plain" else "one of kvmlx's",
        SHORT[FRAMEWORK]: f"{FRAMEWORKS[found['backend']]}'s attention",
        SHORT[PLAIN]: PLAIN,
    }
    words = "; ".join(f"{short}: {word}" for short, word in legend.items())
    console.print(
        f"[dim] {words}.\n decode: {DECODE_TOKENS[0]} to {DECODE_TOKENS[1]} new tokens. prefill: more, over rows that "
        "are held already.\n selection: the attention that keys receive.[/]\n"
    )


def _cell(path: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    if path is None:
        return "[dim]-[/]"
    words = " or ".join(SHORT[word] for word in path["path"].split(" or "))
    return words + _mark(path["why"], reasons)


def _mark(why: str | None, reasons: dict[str, int]) -> str:
    return f" [dim]({reasons.setdefault(why, len(reasons) + 1)})[/]" if why else ""


# Is it right


def show_selftest(backend_name: str | None, *, quick: bool, as_json: bool) -> int:
    """Run the selftest and print it; return the exit code: 1 where a case failed."""
    name = _backend_of(backend_name) or "numpy"
    backend = _choice(name)[1]
    what = selftest.checks_for(backend, quick=quick)
    outcomes = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        console=stderr(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("selftest", total=len(what))
        for outcome in selftest.run(backend, what):
            progress.update(task, advance=1, description=outcome.check.primitive)
            outcomes.append(outcome)
    found = _summary(name, backend, outcomes, quick)
    if as_json:
        print_json(found)
    else:
        _show_summary(found)
    return 0 if found["passed"] else 1


def _summary(name: str, backend: Any, outcomes: list[selftest.Outcome], quick: bool) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        row = rows.setdefault(
            outcome.check.primitive,
            {"cases": 0, "passed": 0, "calls": 0, "kernel_calls": 0, "worst": 0.0, "worst_case": None, "seconds": 0.0},
        )
        row["cases"] += 1
        row["passed"] += outcome.problem is None
        row["calls"] += outcome.calls
        row["kernel_calls"] += outcome.kernel_calls
        row["seconds"] += outcome.seconds
        if outcome.ratio > row["worst"]:
            row["worst"], row["worst_case"] = outcome.ratio, outcome.check.case
    failures = [
        {"primitive": o.check.primitive, "case": o.check.case, "problem": o.problem}
        for o in outcomes
        if o.problem is not None
    ]
    if backend.path != "plain" and not any(row["kernel_calls"] for row in rows.values()):
        failures.append(
            {"primitive": "-", "case": "-", "problem": "no case reached a kernel: nothing of them is known"}
        )
    for row in rows.values():
        # JSON has no infinity.
        row["worst"] = row["worst"] if np.isfinite(row["worst"]) else None
    return {
        "backend": name,
        "path": backend.path,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "device": _device(name),
        "packages": {"kvmlx": __version__, **{package: _version(package) for package in OF_BACKEND[name]}},
        "quick": quick,
        "not_run": [f"{dtype}: {name} has none" for dtype in selftest.missing_dtypes(backend)],
        "checks": [{"primitive": primitive, **row} for primitive, row in rows.items()],
        "failures": failures,
        "passed": not failures,
    }


def _device(backend: str) -> str:
    if backend == "numpy":
        return "cpu"
    if backend == "torch":
        return _torch()["device"]
    import mlx.core as mx

    device = mx.default_device()
    return "cpu" if device == mx.cpu else str(mx.device_info().get("device_name", device))


def _show_summary(found: dict[str, Any]) -> None:
    console = stdout()
    path = KERNELS[found["path"]]
    packages = ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v)
    console.print(f"[bold]selftest[/] of {found['backend']} on {escape(found['device'])}: {path}")
    console.print(f"[dim]{escape(found['system'])}; {packages}[/]")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("primitive", no_wrap=True)
    for name in ("cases", "passed", "by kernels", "error / limit", "seconds"):
        table.add_column(name, justify="right")
    for row in found["checks"]:
        good = row["passed"] == row["cases"]
        worst = "none" if row["worst"] == 0 else "-" if row["worst"] is None else f"{row['worst']:.2f}"
        table.add_row(
            row["primitive"],
            str(row["cases"]),
            f"[green]{row['passed']}[/]" if good else f"[red]{row['passed']}[/]",
            f"{row['kernel_calls']} of {row['calls']}" if found["path"] != "plain" and row["calls"] else "-",
            worst,
            f"{row['seconds']:.1f}",
        )
    console.print(table)
    for text in found["not_run"]:
        console.print(f"[dim]not run: {escape(text)}[/]")
    for failure in found["failures"]:
        where = f"{failure['primitive']}, {failure['case']}"
        console.print(f"[red]failed[/] {escape(where)}: {escape(failure['problem'])}", soft_wrap=True)
    total = sum(row["cases"] for row in found["checks"])
    if found["passed"]:
        console.print(f"[green]All {total} cases passed.[/]")
    else:
        console.print(f"[red]{len(found['failures'])} of {total} cases failed.[/]")
