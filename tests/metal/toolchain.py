"""Clang for the kernels: where it is, how it is called, and what it made, kept in a folder by hash."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"

# C++ for OpenCL is what Metal's own compiler grew from: its address spaces are part of the type system. Literals
# are float, double does not exist, and address spaces reach the IR by number: 1 device, 2 constant, 3 threadgroup.
LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", "-cl-single-precision-constant"),
    *("-Xclang", "-ffake-address-space-map"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"),
]
# What the kernel's own arithmetic is compiled with: no contraction, no reassociation, no vectors that it did not write.
CODE = [
    *("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fPIC", "-gline-tables-only", "-fno-discard-value-names", "-fstack-clash-protection"),
]
# Errors: what has no defined result although it compiles.
WARNINGS = ["-Wno-everything", "-Wimplicit-float-conversion"]
WARNINGS += [f"-Werror={name}" for name in ("uninitialized", "array-bounds", "return-type")]
MIN_CLANG = 18
_TO_BFLOAT = re.compile(
    r"implicit conversion.* loses floating-point precision: .* to '(?:__bf16|[^']*' \(aka '__bf16)'"
)


class CompileError(Exception):
    """What clang said."""


def _machine() -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


@cache
def _tools() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Commands of the kernel compiler, the runtime's C++ compiler and the linker.

    Ziglang first: its clang has one known version on every machine, and starts without its own libraries.
    """
    spec = importlib.util.find_spec("ziglang")
    if spec is not None and spec.origin is not None:
        zig = str(Path(spec.origin).parent / ("zig.exe" if os.name == "nt" else "zig"))
        return (zig, "clang"), (zig, "c++"), (zig, "ld.lld")
    for name in ("clang++", *(f"clang++-{v}" for v in range(30, MIN_CLANG - 1, -1))):
        found = shutil.which(name)
        if found is None:
            continue
        version = subprocess.run([found, "-dumpversion"], capture_output=True, text=True).stdout
        if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= MIN_CLANG:
            return (found,), (found,), (found,)
    raise CompileError(
        f"no compiler for the Metal harness: neither the ziglang package nor a clang++ of version {MIN_CLANG} or newer "
        "is installed; `pip install ziglang` brings one"
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept: $KVMLX_METAL_CACHE, else this user's folder below the temporary one."""
    chosen = os.environ.get("KVMLX_METAL_CACHE")
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"kvmlx-metal-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise CompileError(f"{folder} belongs to another user: choose a folder with KVMLX_METAL_CACHE")
    return folder


def digest(*parts: str) -> str:
    """A name for what these texts determine, compiler included."""
    determined_by = (*map(str, _tools()), _stamp(), *CODE, *parts)
    return hashlib.sha256("\0".join(determined_by).encode()).hexdigest()[:32]


@cache
def _stamp() -> str:
    """The harness's own sources and the compiler's version: a change of either makes everything anew."""
    version = subprocess.run([*_tools()[0], "--version"], capture_output=True, text=True).stdout
    return version + "".join(
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [
            *(HERE / f"{name}.py" for name in ("device", "ir", "msl", "toolchain")),
            *sorted(INCLUDE.iterdir()),
        ]
    )


def call(tool: tuple[str, ...], arguments: list[str], text: str | None = None) -> str:
    """Run a compiler; its standard output, or CompileError with its messages."""
    done = subprocess.run([*tool, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr.strip() or f"{' '.join(tool)} ended with status {done.returncode}")
    return done.stdout


def target() -> list[str]:
    """The triple that kernels are compiled for, and the instructions of this machine that half and fma want."""
    machine = _machine()
    system = "apple-macosx13" if platform.system() == "Darwin" else "linux-gnu"
    return [f"--target={machine}-{system}", *_features()]


@cache
def _features() -> list[str]:
    if _machine() != "x86_64":
        return ["-mcpu=apple-m1"] if platform.system() == "Darwin" else []
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return ["-mf16c", "-mfma", "-mavx2", "-mbmi", "-mpopcnt"] if {"f16c", "fma", "avx2", "bmi1"} <= words else []


def include_folders() -> list[str]:
    """`-I` of the shim and of the installed mlx package, whose headers kernels include."""
    spec = importlib.util.find_spec("mlx")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    return [f"-isystem{INCLUDE}", *(f"-I{Path(root) / 'include'}" for root in roots)]


def preprocess(source: str) -> str:
    """Expand includes and macros; line markers stay."""
    return call(_tools()[0], [*LANGUAGE, *target(), *include_folders(), "-E", "-o", "-", "-"], source)


def to_ir(source: str, contract: bool = False) -> str:
    """LLVM IR, optimised, of a preprocessed and rewritten kernel; with ``contract``, sums of products are fused.

    Metal converts nothing to bfloat unless it is told to; clang does, and says so where digits are lost.
    """
    fused = ["-ffp-contract=fast"] if contract else []
    arguments = [*LANGUAGE, *target(), *CODE, *fused, *WARNINGS, "-S", "-emit-llvm"]
    done = subprocess.run([*_tools()[0], *arguments, "-o", "-", "-"], input=source, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr.strip())
    narrowed = [line for line in done.stderr.split("\n") if _TO_BFLOAT.search(line)]
    if narrowed:
        said = narrowed[0].replace("warning: implicit conversion", "error: implicit conversion to bfloat")
        raise CompileError(f"{said}\nMetal has no implicit conversion to bfloat: write static_cast<T>(...)")
    return done.stdout


def to_library(ir: str, path: Path) -> None:
    """Compile IR as it is and link it to a library, written in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unit, made = Path(scratch) / "unit.o", Path(scratch) / "unit.so"
        passes = ["-O2", "-Xclang", "-disable-llvm-passes", "-fPIC", "-Wno-everything"]
        call(_tools()[0], ["-x", "ir", *target(), *passes, "-c", "-o", str(unit), "-"], ir)
        _link(unit, made)
        os.replace(made, path)


def _link(unit: Path, made: Path) -> None:
    """Make a dynamic library whose missing symbols are found when it is loaded, without any library of the compiler."""
    compiler, linker = _tools()[1:]
    if platform.system() == "Darwin":
        driver = ("clang",) if shutil.which("clang") else compiler
        call(driver, ["-dynamiclib", "-undefined", "dynamic_lookup", "-o", str(made), str(unit)])
    elif linker[-1] == "ld.lld":
        call(linker, ["-shared", "-o", str(made), str(unit)])
    else:
        call(linker, ["-shared", "-nostdlib", "-o", str(made), str(unit)])


@cache
def runtime() -> ctypes.CDLL:
    """The compiled runtime, made once per machine; its symbols and libm's serve the kernels."""
    source = HERE / "runtime.cpp"
    path = cache_folder() / f"runtime-{digest(source.read_text())}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            unit, made = Path(scratch) / "runtime.o", Path(scratch) / "runtime.so"
            flags = ["-O2", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-nostdinc++", "-fPIC", "-ffp-contract=off"]
            call(_tools()[1], [*flags, *_features(), "-fvisibility=hidden", "-c", "-o", str(unit), str(source)])
            _link(unit, made)
            os.replace(made, path)
    libm = ctypes.util.find_library("m")
    if libm is not None:
        ctypes.CDLL(libm, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
