"""What the runtime records of a launch, and its faults in words."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Mapping
from pathlib import Path

from tests.metal import ir

MAX_BUFFERS = 31
MARK = '# 1 "kernel"\n'  # goes before a kernel's own source: its lines are counted from there
_ARENA, _STACK = 100, 101


class MetalFault(Exception):
    """A kernel that Metal would not accept or would not define: what, and where."""


class Fault(enum.IntEnum):
    """FaultKind of runtime.cpp."""

    NONE = 0
    OUT_OF_BOUNDS = 1
    READ_ONLY = 2
    MISALIGNED = 3
    RACE = 4
    UNWRITTEN_READ = 5
    DIVERGENT = 6
    BARRIER_MISSED = 7
    SEGMENT = 8
    PARTIAL_SIMDGROUP = 9
    WILD = 10
    TIMEOUT = 11
    REFINE = 12


_WAITS_AT = {
    1: "a threadgroup_barrier",
    2: "a simdgroup_barrier",
    3: "a simd shuffle",
    4: "a simd shuffle up or down",
    5: "a simd reduction",
    6: "a simdgroup matrix product",
}


class BufferRecord(ctypes.Structure):
    """Buffer of runtime.cpp."""

    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("granule_shift", ctypes.c_uint32),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("unique_read", ctypes.c_uint64),
        ("unique_written", ctypes.c_uint64),
        ("initialised", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("cells", ctypes.c_void_p),
        ("read_stamps", ctypes.c_void_p),
        ("write_stamps", ctypes.c_void_p),
    )


class LaunchRecord(ctypes.Structure):
    """Launch of runtime.cpp: what the runtime is told, and what it found."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("buffers", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("limit_ms", ctypes.c_uint64),
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_uint32),
        ("arena_granule_shift", ctypes.c_uint32),
        ("arena_owner", ctypes.c_char_p),
        ("constants", ctypes.c_void_p),
        ("constant_count", ctypes.c_uint32),
        ("fault", ctypes.c_uint32),
        ("fault_info", ctypes.c_uint64),
        ("fault_offset", ctypes.c_int64),
        ("fault_buffer", ctypes.c_uint32),
        ("fault_other", ctypes.c_uint32),
        ("fault_other_kind", ctypes.c_uint32),
        ("fault_thread", ctypes.c_uint32),
        ("fault_live", ctypes.c_uint32),
        ("fault_waiting", ctypes.c_uint32),
        ("barriers", ctypes.c_uint64),
        ("simd_barriers", ctypes.c_uint64),
        ("simd_ops", ctypes.c_uint64),
        ("threads_run", ctypes.c_uint64),
        ("buffer", BufferRecord * MAX_BUFFERS),
    )


class Reporter:
    """Says what fault a launch ended with.

    Args:
        source: the kernel's source, with MARK before its own part.
        buffers: names by index.
        elements: bytes of an element, by index.
    """

    def __init__(
        self,
        record: LaunchRecord,
        made: ir.Instrumented,
        source: str,
        buffers: Mapping[int, str],
        elements: Mapping[int, int],
    ) -> None:
        self.record, self.made, self.source, self.buffers, self.elements = record, made, source, buffers, elements

    def describe(self) -> str:
        """The fault: what, where in memory, which thread, and where in the source."""
        r = self.record
        fault, info = Fault(r.fault), r.fault_info
        size, verb = info & 0xFFFF, "write" if info >> 24 & 1 else "read"
        what, by = self._memory(), f"by {self._thread(r.fault_thread)}{self._line(info >> 32)}"
        first, second = self._thread(r.fault_thread), self._thread(r.fault_other)
        match fault:
            case Fault.OUT_OF_BOUNDS:
                return f"out of bounds: {verb} of {size} bytes, {what}, {by}"
            case Fault.READ_ONLY:
                return f"write to input: {what}, {by}"
            case Fault.MISALIGNED:
                return f"misaligned: {verb} of {size} bytes that needs a multiple of {info >> 16 & 0xFF}, {what}, {by}"
            case Fault.RACE:
                other = "written" if r.fault_other_kind else "read"
                return f"race: {verb} of {what}, {by}, {other} before by {second} with no barrier between"
            case Fault.UNWRITTEN_READ:
                return f"read of unwritten memory: {what}, {by}"
            case Fault.DIVERGENT:
                here, there = _WAITS_AT[r.fault_buffer >> 8], _WAITS_AT[r.fault_buffer & 255]
                return (
                    f"divergent barrier: {first} waits at {here} and {second} at {there} elsewhere: "
                    "threads of one group took different ways"
                )
            case Fault.BARRIER_MISSED:
                return (
                    f"divergent barrier: {first} waits at a threadgroup_barrier and {second} returned; "
                    f"{r.fault_live} of {r.fault_waiting} threads wait"
                )
            case Fault.SEGMENT:
                return f"crash of {first}: {what}"
            case Fault.PARTIAL_SIMDGROUP:
                return f"simdgroup matrix function with fewer than 32 active lanes, {first}"
            case Fault.TIMEOUT:
                return f"no end: {first} was still running when the launch reached its limit of processor time"
            case _:
                outside = "out of bounds" if "array" in what else "wild pointer"
                return f"{outside}: {verb} of {size} bytes, {what}, {by}"

    def _thread(self, number: int) -> str:
        per_group = self.record.group[0] * self.record.group[1] * self.record.group[2]
        return f"thread {number % per_group} of threadgroup {number // per_group}"

    def _line(self, site: int) -> str:
        """The line of the kernel, or of a header where no line of the kernel led there."""
        found = self.made.sites[site] if site < len(self.made.sites) else ir.Site()
        for file, line in ((found.file, found.line), *found.callers):
            if file == "kernel":
                lines = self.source[self.source.rindex(MARK) + len(MARK) :].split("\n")
                return f" (line {line}: `{lines[line - 1].strip() if 0 < line <= len(lines) else ''}`)"
        return f" ({Path(found.file).name}, line {found.line})" if found.line else ""

    def _memory(self) -> str:
        """The place of the access, by the buffer or array that is nearest."""
        index, offset = self.record.fault_buffer, self.record.fault_offset
        if index == _ARENA:
            if not self.made.arrays:
                return f"threadgroup memory at byte {offset}: the kernel declares none"
            near = min(
                self.made.arrays, key=lambda a: max(a.offset - offset, offset - (a.offset + a.size_bytes) + 1, 0)
            )
            at = offset - near.offset
            return (
                f"threadgroup array {near.name!r} at byte {at} (element {at // near.element_bytes}) "
                f"of {near.size_bytes} bytes"
            )
        if index == _STACK:
            return f"a thread's own array at byte {offset}"
        if index in self.buffers:
            total = self.record.buffer[index].bytes
            element = offset // self.elements[index]
            return f"buffer {self.buffers[index]!r} at byte {offset} (element {element}) of {total} bytes"
        return self._constant(offset)

    def _constant(self, address: int) -> str:
        table = ctypes.cast(self.record.constants or 0, ctypes.POINTER(ctypes.c_uint64))
        best, what = 4096, f"address {address:#x}"
        for number, name in enumerate(self.made.constants):
            start, size = table[2 * number], table[2 * number + 1]
            distance = max(start - address, address - start - size, 0)
            if distance < best:
                best, what = distance, f"constant array {name!r} at byte {address - start} of {size} bytes"
        return what
