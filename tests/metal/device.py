"""Run Metal kernels on the CPU, thread by thread, and say what they touched.

    dev = Device(seed=1)
    run = dev.launch(kernel, inputs=[x], input_names=["x"], output_names=["y"], output_shapes=[x.shape],
                     output_dtypes=[x.dtype], grid=(64, 1, 1), threadgroup=(32, 1, 1), template=[("T", x.dtype)])
    run.outputs[0], run.read["x"], run.barriers

The source is what MLX generates, the types and functions are Metal's (tests/metal/include), the semantics those of the
Metal specification where it is strict: what it leaves undefined is a MetalFault. Not modelled: time, caches, textures,
the flushing of subnormal floats, fast math (`fast::exp` is `exp`), values of thread memory that was not written, and
progress between threadgroups or simdgroups that wait for each other through atomics. Metal accepts, and this does not:
vectors of bool, a struct copied as a whole out of constant memory, an explicit cast from half to bfloat, a vector's
typedef called with several arguments, and a simdgroup function that some lanes of a simdgroup skip without returning.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.metal import ir, msl, toolchain
from tests.metal.report import MARK, MAX_BUFFERS, Fault, LaunchRecord, MetalFault, Reporter

MAX_THREADS = 1024
MAX_THREADGROUP_BYTES = 32768
MAX_BUFFER_BYTES = 1 << 29
_RACES, _COUNTERS = 1, 2
_LOCK = threading.RLock()
_MLX_PREAMBLE = f'#include "mlx/backend/metal/kernels/utils.h"\n{MARK}'
_SCALARS = {
    "bool": np.bool_, "char": np.int8, "int8_t": np.int8, "uchar": np.uint8, "uint8_t": np.uint8,
    "short": np.int16, "int16_t": np.int16, "ushort": np.uint16, "uint16_t": np.uint16,
    "int": np.int32, "int32_t": np.int32, "uint": np.uint32, "uint32_t": np.uint32,
    "long": np.int64, "int64_t": np.int64, "ulong": np.uint64, "uint64_t": np.uint64, "size_t": np.uint64,
    "float": np.float32, "half": np.float16, "float16_t": np.float16,
}  # fmt: skip


@dataclass
class _Compiled:
    """A kernel ready to run: its code, arguments, and what ir.py made of it."""

    code: ctypes.CDLL
    arguments: list[msl.Argument]
    most_threads: int | None
    made: ir.Instrumented
    source: str
    fine: bool = False  # an access smaller than an element was seen: the race detector works by bytes


@dataclass
class Launch:
    """What a launch did.

    Attributes:
        outputs: the output arrays, with the dtypes asked for.
        read, written: bytes requested by name of buffer, summed over threads.
        unique_read, unique_written: distinct bytes, each counted once per threadgroup that touched it.
        barriers: threadgroup_barrier calls, summed over threadgroups.
        simdgroup_barriers: simdgroup_barrier calls, summed over simdgroups.
        simd_ops: simdgroup functions called, summed over lanes; a vector's elements (and each 8 bytes) count singly.
        threadgroup_bytes: threadgroup memory that the kernel declares.
        instructions: executed operations by category, over all threads (Device(count_instructions=True)).
        threads: threads that ran.
    """

    outputs: list[mx.array]
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    unique_read: dict[str, int] = field(default_factory=dict)
    unique_written: dict[str, int] = field(default_factory=dict)
    barriers: int = 0
    simdgroup_barriers: int = 0
    simd_ops: int = 0
    threadgroup_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    threads: int = 0


@contextmanager
def _stdout_to(path: Path) -> Iterator[None]:
    """Send what C++ writes to file descriptor 1 to a file."""
    saved = os.dup(1)
    with open(path, "wb") as sink:
        os.dup2(sink.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


_TRACED: dict[tuple, tuple[object, str]] = {}
_COMPILED: dict[str, _Compiled] = {}


def trace(
    kernel: Any,
    inputs: Sequence[mx.array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]] = (),
) -> str:
    """The Metal source that MLX makes of an `mx.fast.metal_kernel` for such inputs, without MLX's preamble."""
    shapes = tuple((x.dtype, x.ndim, min(x.size, 8)) for x in inputs)
    key = (id(kernel), shapes, tuple(output_dtypes), tuple((n, str(v), type(v)) for n, v in template))
    if key not in _TRACED:
        extra: dict[str, Any] = {"template": list(template)} if template else {}

        def call(*arrays: mx.array) -> Any:
            return kernel(
                inputs=list(arrays),
                output_shapes=[tuple(s) for s in output_shapes],
                output_dtypes=list(output_dtypes),
                grid=(32, 1, 1),
                threadgroup=(32, 1, 1),
                verbose=True,
                **extra,
            )

        zeros = [mx.zeros(x.shape, x.dtype) for x in inputs]
        with _LOCK, tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "stdout"
            with _stdout_to(said):
                mx.export_function(str(Path(folder) / "traced"), call, *zeros)
            text = said.read_text()
        found = re.search(r"```\n(.*)```", text, re.S)
        if found is None:
            raise MetalFault(f"MLX printed no source for this kernel; it said {text[:200]!r}")
        _TRACED[key] = (kernel, found[1])
    return _TRACED[key][1]


def _message(error: str) -> str:
    """Clang's first errors, without its notes on the shim's overloads."""
    kept: list[str] = []
    errors, skip = 0, False
    for line in error.split("\n"):
        if re.search(r"(?:error|warning|note): |^In file included", line):
            errors += "error: " in line
            skip = errors > 3 or "note: candidate" in line or line.startswith("In file included")
        if not skip and line.strip():
            kept.append(line[:300])
    text = "\n".join(kept[:40])
    if "__constant" in error and "no matching constructor" in error:
        text += "\n(the harness cannot copy a struct out of constant memory as a whole: use its members)"
    if "excess elements in" in error:
        text += "\n(the harness needs `float4 v = float4(...)` where Metal accepts a vector's typedef with arguments)"
    return text


@cache
def _runtime() -> ctypes.CDLL:
    """The runtime with the types of its functions."""
    runtime = toolchain.runtime()
    record = ctypes.POINTER(LaunchRecord)
    runtime.kvm_slots.restype = ctypes.c_void_p
    runtime.kvm_sizeof_launch.restype = ctypes.c_uint64
    runtime.kvm_map.restype, runtime.kvm_map.argtypes = ctypes.c_void_p, (ctypes.c_uint32, ctypes.c_uint64)
    runtime.kvm_unmap.restype, runtime.kvm_unmap.argtypes = None, (ctypes.c_uint32, ctypes.c_uint64)
    runtime.kvm_run.argtypes = (record,)
    runtime.kvm_release.restype, runtime.kvm_release.argtypes = None, (record,)
    runtime.kvm_unwritten.restype = ctypes.c_int64
    runtime.kvm_unwritten.argtypes = (record, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint64))
    if runtime.kvm_sizeof_launch() != ctypes.sizeof(LaunchRecord):
        raise RuntimeError("LaunchRecord is not what runtime.cpp's Launch is")
    if runtime.kvm_slots() is None:
        raise MemoryError("no address space for the buffers of a launch")
    return runtime


def _compile(
    source: str,
    entry: str | None,
    function_constants: Mapping[str | int, object],
    count: bool = False,
    contract: bool = False,
) -> _Compiled:
    constants = repr(sorted(function_constants.items(), key=str))
    key = toolchain.digest(source, str(entry), constants, str(count), str(contract))
    if key in _COMPILED:
        return _COMPILED[key]
    try:
        _runtime()
        folder = toolchain.cache_folder()
        library, notes = folder / f"{key}.so", folder / f"{key}.json"
        if not (library.exists() and notes.exists()):
            _build(source, entry, function_constants, count, contract, library, notes)
        kept = json.loads(notes.read_text())
        made = ir.Instrumented(
            arrays=[ir.Array(**a) for a in kept["arrays"]],
            arena_bytes=kept["arena_bytes"],
            sites=[ir.Site(file, line, tuple(map(tuple, callers))) for file, line, callers in kept["sites"]],
            constants=kept["constants"],
            blocks=[Counter(b) for b in kept["blocks"]],
        )
        arguments = [msl.Argument(**a) for a in kept["arguments"]]
        _COMPILED[key] = _Compiled(ctypes.CDLL(str(library)), arguments, kept["most_threads"], made, source)
    except toolchain.CompileError as error:
        raise MetalFault(f"does not compile:\n{_message(str(error))}") from None
    except msl.SourceError as error:
        raise MetalFault(f"does not compile: {error}") from None
    except OSError as error:
        raise MetalFault(f"does not link: {error}") from None
    return _COMPILED[key]


def _build(
    source: str,
    entry: str | None,
    function_constants: Mapping[str | int, object],
    count: bool,
    contract: bool,
    library: Path,
    notes: Path,
) -> None:
    """Compile a source to a library, and write what is to be known of it beside it."""
    prepared = msl.prepare(toolchain.preprocess(source), function_constants)
    kernel, instance = _entry(prepared, entry)
    absent = {
        a.name
        for a in kernel.arguments
        if a.constant is not None and not _truth(a.constant, prepared, function_constants)
    }
    thunk = msl.thunk(kernel, instance, absent)
    text = f'{msl.PRELUDE}{prepared.text}\n# 1 "arguments"\n{thunk}'
    made = ir.instrument(toolchain.to_ir(text, contract), prepared.arrays, count)
    toolchain.to_library(made.text, library)
    kept = json.dumps(
        {
            "most_threads": kernel.most_threads,
            "arguments": [asdict(a) for a in kernel.arguments if a.name not in absent],
            "arrays": [asdict(a) for a in made.arrays],
            "arena_bytes": made.arena_bytes,
            "sites": [(s.file, s.line, s.callers) for s in made.sites],
            "constants": made.constants,
            "blocks": made.blocks,
        }
    )
    with tempfile.NamedTemporaryFile("w", dir=notes.parent, delete=False) as scratch:
        scratch.write(kept)
    os.replace(scratch.name, notes)


def _truth(name: str, prepared: msl.Prepared, values: Mapping[str | int, object]) -> bool:
    for key in (name, prepared.constants.get(name, (None, ""))[0]):
        if key is not None and key in values:
            return bool(values[key])
    return False


def _entry(prepared: msl.Prepared, entry: str | None) -> tuple[msl.Kernel, str]:
    """The kernel, and the expression that names its instance."""
    if entry is None:
        names = list(prepared.hosts.values()) or list(prepared.kernels)
        if len(names) != 1:
            raise MetalFault(f"the source has {len(names)} kernels, name one: {', '.join(names) or 'none'}")
        entry = names[0]
    instance = prepared.hosts.get(entry, entry)
    name = instance.split("<")[0].strip()
    if name not in prepared.kernels:
        raise MetalFault(f"no kernel {name!r} in the source; it has {', '.join(prepared.kernels) or 'none'}")
    return prepared.kernels[name], instance


def _bytes_of(array: mx.array) -> np.ndarray:
    """The contents of an array in row-major order, as bytes."""
    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bool_:
        return np.array(flat).view(np.uint8)
    return np.array(flat.view(mx.uint8)) if flat.size else np.zeros(0, np.uint8)


def _array_of(data: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if not data.size:
        return mx.zeros(tuple(shape), dtype)
    if dtype == mx.bool_:
        return mx.array(data != 0).reshape(tuple(shape))
    return mx.array(data).view(dtype).reshape(tuple(shape))


def _raw(array: np.ndarray | np.generic) -> tuple[np.ndarray, int]:
    """The bytes of an array, and those of an element."""
    return np.frombuffer(array.tobytes(), np.uint8), array.itemsize


def _scalar_bytes(value: object, argument: msl.Argument) -> tuple[np.ndarray, int]:
    """The bytes of a scalar for an argument such as `const constant int& n`, and those of an element."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8), 1
    if isinstance(value, np.ndarray | np.generic):
        return _raw(value)
    kind = re.sub(r"\b(?:const|constant|device|volatile)\b|[&*]", " ", argument.type).split()
    dtype = _SCALARS.get(kind[-1]) if kind else None
    if dtype is None:
        raise MetalFault(f"argument {argument.name!r}: no bytes for a {type(value).__name__} as {argument.type!r}")
    return _raw(np.array(value, dtype))


class _Refine(Exception):
    """The launch touched parts of elements: it must run again with a race detector that works by bytes."""


@dataclass
class _Output:
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def start(self, init_value: float | None) -> tuple[np.ndarray, int]:
        """Its bytes before the launch, poisoned unless there is an initial value, and those of an element."""
        count = int(np.prod(self.shape))
        if init_value is None:
            return np.full(count * self.dtype.size, 0xFF, np.uint8), self.dtype.size
        return _bytes_of(mx.full((count,), init_value, self.dtype)), self.dtype.size


class Device:
    """A GPU of one core that runs kernels in an order drawn from a seed.

    Args:
        seed: 0 runs threadgroups, simdgroups and lanes in ascending order; any other seed shuffles them, and the lanes
            and simdgroups again at every wait.
        races: check that accesses of different threads to one byte are ordered by barriers.
        counters: count distinct bytes per threadgroup (bytes requested are always counted).
        count_instructions: fill Launch.instructions, from the LLVM IR that clang makes of the kernel at -O2 without
            vectorisers, each basic block weighted with how often it ran. A vector counts by its elements. Categories:
            `float` (a sum, product, fma, rounding, minimum; a product that only feeds a sum is one with it),
            `float_divide`, `transcendental` (exp, log, sqrt, ...), `integer` (arithmetic, logic, shifts),
            `integer_divide`, `convert` (to and from floats, and to shorter ones), `widen` (half to float, which GPUs do
            while they read an operand), `extend` (between integer widths),
            `compare_select` (integer minimum and maximum too), `address` (pointer arithmetic, and integer arithmetic
            that leads to nothing else), `branch` (conditional), `load_*` and `store_*` by address space, one for each
            instruction whatever its width. Not counted: moves, vector element access, barriers and simdgroup functions
            (Launch.simd_ops). It is a proxy of what a GPU's own compiler would issue: it has neither Apple's
            instruction set nor its scheduling, uniform registers or free modifiers.
        contract: fuse a product with the sum that it feeds wherever the source does not forbid it, as Metal's compiler
            may; a result that depends on it is not the same on every device.
        limit_s: seconds of processor time after which a launch is stopped; 0 for no limit.
    """

    def __init__(
        self,
        seed: int = 0,
        races: bool = True,
        counters: bool = True,
        count_instructions: bool = False,
        contract: bool = False,
        limit_s: float = 300,
    ) -> None:
        self.seed = seed
        self.races = races
        self.counters = counters
        self.count_instructions = count_instructions
        self.contract = contract
        self.limit_s = limit_s

    def launch(
        self,
        kernel: Any,
        *,
        inputs: Sequence[mx.array],
        input_names: Sequence[str],
        output_names: Sequence[str],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] = (),
        init_value: float | None = None,
        allow_unwritten: bool = False,
    ) -> Launch:
        """Run an `mx.fast.metal_kernel` as MLX would: same arguments, plus the names given when it was made.

        Args:
            grid: threads in x, y, z.
            init_value: what the outputs are filled with; without it they must be written, byte by byte.
            allow_unwritten: accept outputs that are not.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        if len(arrays) != len(input_names):
            raise MetalFault(f"{len(arrays)} inputs for {len(input_names)} names")
        source = trace(kernel, arrays, output_shapes, output_dtypes, template)
        compiled = _compile(_MLX_PREAMBLE + source, None, {}, self.count_instructions, self.contract)
        values: dict[str, tuple[np.ndarray, int]] = {}
        for name, x in zip(input_names, arrays, strict=True):
            strides = [int(np.prod(x.shape[i + 1 :])) for i in range(x.ndim)]
            values[name] = _bytes_of(x), x.itemsize
            values[f"{name}_shape"] = _raw(np.array(x.shape, np.int32))
            values[f"{name}_strides"] = _raw(np.array(strides, np.int64))
            values[f"{name}_ndim"] = _raw(np.array(x.ndim, np.int32))
        outputs = self._outputs(output_names, output_shapes, output_dtypes)
        if int(np.prod(threadgroup)) <= MAX_THREADS and len(grid) == len(threadgroup):
            threadgroup = [min(t, g) for t, g in zip(threadgroup, grid, strict=True)]
        return self._run(compiled, values, outputs, grid, threadgroup, init_value, allow_unwritten)

    def launch_source(
        self,
        source: str,
        entry: str | None = None,
        *,
        buffers: Sequence[tuple[str, Any]] = (),
        output_names: Sequence[str] = (),
        output_shapes: Sequence[Sequence[int]] = (),
        output_dtypes: Sequence[mx.Dtype] = (),
        threadgroup: Sequence[int],
        grid: Sequence[int] | None = None,
        threadgroups: Sequence[int] | None = None,
        function_constants: Mapping[str | int, object] | None = None,
        init_value: float | None = None,
        allow_unwritten: bool = False,
    ) -> Launch:
        """Run a kernel of hand-made Metal source; it may include MLX's headers.

        Args:
            entry: name of the kernel, its host_name, or an instance such as `copy<float, 4>`.
            buffers: inputs by argument name: an array, or for a scalar argument a number, or raw bytes.
            grid: threads in x, y, z; or `threadgroups`, the number of threadgroups.
            function_constants: by name or number.
        """
        if (grid is None) == (threadgroups is None):
            raise MetalFault("give either grid (threads) or threadgroups")
        if grid is None:
            assert threadgroups is not None
            grid = [n * t for n, t in zip(threadgroups, threadgroup, strict=True)]
        compiled = _compile(MARK + source, entry, function_constants or {}, self.count_instructions, self.contract)
        arguments = {a.name: a for a in compiled.arguments}
        values: dict[str, tuple[np.ndarray, int]] = {}
        for name, value in buffers:
            if isinstance(value, mx.array):
                values[name] = _bytes_of(value), value.itemsize
            elif name in arguments:
                values[name] = _scalar_bytes(value, arguments[name])
        outputs = self._outputs(output_names, output_shapes, output_dtypes)
        return self._run(compiled, values, outputs, grid, threadgroup, init_value, allow_unwritten)

    @staticmethod
    def _outputs(
        names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
    ) -> dict[str, _Output]:
        if not len(names) == len(shapes) == len(dtypes):
            raise MetalFault(f"{len(names)} output names, {len(shapes)} shapes, {len(dtypes)} dtypes")
        return {n: _Output(tuple(s), d) for n, s, d in zip(names, shapes, dtypes, strict=True)}

    def _check_limits(self, compiled: _Compiled, grid: Sequence[int], threadgroup: Sequence[int]) -> int:
        """Metal's limits; the bytes of threadgroup memory that the kernel declares."""
        if len(grid) != 3 or len(threadgroup) != 3:
            raise MetalFault(f"grid {tuple(grid)} and threadgroup {tuple(threadgroup)} have three sizes each")
        if min(grid) < 1 or min(threadgroup) < 1:
            raise MetalFault(f"grid {tuple(grid)} and threadgroup {tuple(threadgroup)} must be positive")
        threads = int(np.prod(threadgroup))
        if threads > MAX_THREADS:
            raise MetalFault(f"{threads} threads per threadgroup: Metal allows {MAX_THREADS}")
        if compiled.most_threads is not None and threads > compiled.most_threads:
            raise MetalFault(f"{threads} threads per threadgroup: the kernel allows {compiled.most_threads}")
        total = sum(a.size_bytes for a in compiled.made.arrays)
        if total > MAX_THREADGROUP_BYTES:
            what = ", ".join(f"{a.name} {a.size_bytes}" for a in compiled.made.arrays)
            raise MetalFault(f"{total} bytes of threadgroup memory ({what}): Metal allows {MAX_THREADGROUP_BYTES}")
        numbers = [a.buffer for a in compiled.arguments if a.buffer is not None]
        if len(numbers) > MAX_BUFFERS or max(numbers, default=0) >= MAX_BUFFERS:
            raise MetalFault(f"{max(len(numbers), max(numbers) + 1)} buffers: Metal allows {MAX_BUFFERS}")
        return total

    def _run(
        self,
        compiled: _Compiled,
        values: dict[str, tuple[np.ndarray, int]],
        outputs: dict[str, _Output],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        init_value: float | None,
        allow_unwritten: bool,
    ) -> Launch:
        total = self._check_limits(compiled, grid, threadgroup)
        bound = [a for a in compiled.arguments if a.buffer is not None]
        missing = [a.name for a in bound if a.name not in values and a.name not in outputs]
        if missing:
            raise MetalFault(f"nothing is bound to {', '.join(missing)}")
        unknown = [n for n in outputs if n not in {a.name for a in bound}]
        if unknown:
            raise MetalFault(f"the kernel has no argument {', '.join(unknown)}")
        with _LOCK:
            try:
                result = self._attempt(compiled, values, outputs, grid, threadgroup, init_value, allow_unwritten)
            except _Refine:
                compiled.fine = True
                result = self._attempt(compiled, values, outputs, grid, threadgroup, init_value, allow_unwritten)
        result.threadgroup_bytes = total
        return result

    def _attempt(
        self,
        compiled: _Compiled,
        values: dict[str, tuple[np.ndarray, int]],
        outputs: dict[str, _Output],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        init_value: float | None,
        allow_unwritten: bool,
    ) -> Launch:
        runtime = _runtime()
        record = LaunchRecord()
        record.grid[:], record.group[:] = list(grid), list(threadgroup)
        record.flags = (_RACES if self.races else 0) | (_COUNTERS if self.counters else 0)
        record.seed = self.seed
        record.limit_ms = int(1000 * self.limit_s)
        blocks = _prepare_library(record, compiled)
        buffers = {a.buffer: a.name for a in compiled.arguments if a.buffer is not None}
        elements: dict[int, int] = {}
        try:
            for index, name in buffers.items():
                if name in outputs:
                    data, elements[index] = outputs[name].start(init_value)
                else:
                    data, elements[index] = values[name]
                b = record.buffer[index]
                b.bytes, b.writable, b.initialised = data.size, name in outputs, init_value is not None
                b.granule_shift = 0 if compiled.fine else elements[index].bit_length() - 1
                record.buffers = max(record.buffers, index + 1)
                if data.size > MAX_BUFFER_BYTES:
                    raise MetalFault(f"buffer {name!r} of {data.size} bytes: the harness has {MAX_BUFFER_BYTES}")
                address = runtime.kvm_map(index, data.size)
                if address is None:
                    raise MemoryError(f"buffer {name!r} of {data.size} bytes")
                ctypes.memmove(address, data.ctypes.data, data.size)
            try:
                fault = runtime.kvm_run(record)
                if fault < 0:
                    raise MemoryError("the record of what a launch touches")
                if fault == Fault.REFINE:
                    raise _Refine
                if fault:
                    raise MetalFault(Reporter(record, compiled.made, compiled.source, buffers, elements).describe())
                if init_value is None and not allow_unwritten:
                    _check_written(record, {i: n for i, n in buffers.items() if n in outputs}, elements)
            finally:
                runtime.kvm_release(record)
            got = {}
            for index, name in buffers.items():
                if name in outputs:
                    data = np.empty(record.buffer[index].bytes, np.uint8)
                    ctypes.memmove(data.ctypes.data, runtime.kvm_map(index, data.size), data.size)
                    got[name] = _array_of(data, outputs[name].shape, outputs[name].dtype)
        finally:
            for index in elements:
                runtime.kvm_unmap(index, record.buffer[index].bytes)
        instructions: Counter[str] = Counter()
        for runs, costs in zip(blocks, compiled.made.blocks, strict=False):
            instructions.update({category: runs * operations for category, operations in costs.items()})
        return Launch(
            outputs=[got[name] for name in outputs],
            read={name: record.buffer[i].read for i, name in buffers.items()},
            written={name: record.buffer[i].written for i, name in buffers.items()},
            unique_read={name: record.buffer[i].unique_read for i, name in buffers.items()},
            unique_written={name: record.buffer[i].unique_written for i, name in buffers.items()},
            barriers=record.barriers,
            simdgroup_barriers=record.simd_barriers,
            simd_ops=record.simd_ops,
            instructions={category: n for category, n in instructions.items() if n},
            threads=record.threads_run,
        )


def _prepare_library(record: LaunchRecord, compiled: _Compiled) -> ctypes.Array:
    """Tell the runtime of a library's entry, arrays and constants; its counters of blocks, at zero."""
    made, code = compiled.made, compiled.code
    record.entry = ctypes.cast(code["__kvm_entry"], ctypes.c_void_p).value
    owner = bytearray(made.arena_bytes)
    for number, array in enumerate(made.arrays, 1):
        owner[array.offset : array.offset + array.size_bytes] = bytes([number]) * array.size_bytes
    record.arena = ctypes.addressof(ctypes.c_char.in_dll(code, "__kvm_arena"))
    record.arena_bytes, record.arena_owner = made.arena_bytes, bytes(owner)
    granule = 1 if compiled.fine else min((a.element_bytes for a in made.arrays), default=8)
    record.arena_granule_shift = granule.bit_length() - 1
    record.constants = ctypes.addressof(ctypes.c_char.in_dll(code, "__kvm_constants"))
    record.constant_count = len(made.constants)
    blocks = (ctypes.c_uint64 * max(1, len(made.blocks))).in_dll(code, "__kvm_blocks")
    ctypes.memset(blocks, 0, ctypes.sizeof(blocks))
    return blocks


def _check_written(record: LaunchRecord, outputs: dict[int, str], elements: dict[int, int]) -> None:
    for index, name in outputs.items():
        missing = ctypes.c_uint64()
        first = _runtime().kvm_unwritten(record, index, ctypes.byref(missing))
        if first >= 0:
            raise MetalFault(
                f"output {name!r} is not written: {missing.value} of {record.buffer[index].bytes} bytes, "
                f"the first at byte {first} (element {first // elements[index]}); give init_value or write it all"
            )
