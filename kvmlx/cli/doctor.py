"""`kvmlx doctor`: what this machine has, what runs on it, and what would help."""

from __future__ import annotations

import glob
import importlib
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.markup import escape
from rich.table import Table

from kvmlx import __version__
from kvmlx.cli.output import print_json, size, stdout

PACKAGES = ("numpy", "mlx", "mlx-lm", "torch", "triton", "transformers")
OPENBLAS = "/usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0"
SLOW_GFLOPS = 30.0
"""MLX's Linux wheel links a reference BLAS of about 6 GFLOP/s; with OpenBLAS two cores give over 150."""


def show_doctor(*, as_json: bool) -> None:
    """Print the findings."""
    findings = examine()
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
    for hint in findings["hints"]:
        console.print(f"[yellow]hint[/] {escape(hint)}", soft_wrap=True)


def examine() -> dict[str, Any]:
    """Return what there is, as plain data."""
    hints: list[str] = []
    mlx = _mlx(hints)
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": {"kvmlx": __version__, **{name: _version(name) for name in PACKAGES}},
        "backends": {
            "numpy": {"available": True, "device": "cpu", "kernels": "plain"},
            "mlx": mlx,
            "torch": _torch(),
        },
        "demo_model": _demo_model(),
        "hints": hints,
    }


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
    device = mx.default_device()
    gflops = _gflops(mx)
    metal = mx.metal.is_available()
    found: dict[str, Any] = {
        "available": _version("mlx-lm") is not None,
        "device": "cpu" if device == mx.cpu else "gpu",
        "metal": metal,
        "kernels": _kernels("kvmlx.backends.mlx"),
        "float32_gflops": round(gflops, 1),
    }
    if not metal:
        found["why_no_metal"] = "this is not macOS" if sys.platform != "darwin" else "MLX sees no Metal device"
    if sys.platform == "linux" and device == mx.cpu and gflops < SLOW_GFLOPS:
        hints.append(_openblas_hint(gflops))
    return found


def _kernels(module: str) -> str:
    """Return which path the backend's primitives take; backends that have kernels name them."""
    try:
        return getattr(importlib.import_module(module), "KERNELS", "plain")
    except ImportError as error:
        return f"not importable: {error}"


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
    cuda = torch.cuda.is_available()
    return {
        "available": True,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": cuda,
        "triton": _version("triton") is not None,
        "kernels": _kernels("kvmlx.backends.torch"),
    }


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
        return f"[red]no[/]  {escape(backend.get('why', 'mlx-lm is not installed'))}"
    parts = [f"device {backend['device']}", f"kernels: {backend['kernels']}"]
    if "metal" in backend:
        parts.insert(1, "Metal" if backend["metal"] else f"no Metal ({backend['why_no_metal']})")
        parts.append(f"{backend['float32_gflops']} GFLOP/s in float32")
    if "cuda" in backend:
        parts.insert(1, "CUDA" if backend["cuda"] else "no CUDA")
        parts.append("Triton" if backend["triton"] else "no Triton")
    return f"[green]yes[/] {escape(', '.join(parts))}"
