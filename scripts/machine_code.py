"""Read compiled kernels: registers, spills and shared memory, and which instructions their loops are made of.

NVIDIA's code is disassembled by `nvdisasm` and `cuobjdump`, which are in Triton's wheel; AMD's compiler leaves its
assembly and a table of resources. A loop is a jump back to a label; the innermost ones are counted instruction by
instruction.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Instruction = tuple[str, str]
"""Operation with its modifiers, and operands."""


@dataclass(frozen=True)
class Assembly:
    """How one vendor writes machine code down."""

    instruction: re.Pattern[str]
    """A line with one: its operation, its operands."""
    jump: re.Pattern[str]
    """A line that jumps: the label."""
    category: Callable[[str], str]
    short: Callable[[str], str]
    """An operation without the modifiers that say nothing here."""
    width: Callable[[str], int]
    """Bytes that a thread moves by an operation."""
    stores: str
    """How operations begin that store to local memory."""
    loads: str


@dataclass(frozen=True)
class Chip:
    """What bounds how many programs a processor holds at once, and how fast it issues."""

    name: str
    warp: int
    registers: int
    """32-bit registers of a processor."""
    register_step: int
    """Registers that a thread takes are rounded up to a multiple of this."""
    warps: int
    programs: int
    shared_bytes: int
    reserved_bytes: int
    """Shared memory that the system takes of every program's."""


# From the tuning guides of the vendors. gfx942: 4 SIMDs of 512 registers a lane, 8 waves each.
CHIPS = {
    "sm_80": Chip("A100", 32, 65536, 8, 64, 32, 164 * 1024, 1024),
    "sm_90": Chip("H100", 32, 65536, 8, 64, 32, 228 * 1024, 1024),
    "gfx942": Chip("MI300X", 64, 4 * 512 * 64, 8, 32, 32, 64 * 1024, 0),
}


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions by category, and those that tell most by name."""

    size: int
    """Instructions in it."""
    mix: dict[str, int]
    """Instructions by category."""
    detail: dict[str, int]
    """Loads, stores, conversions and products by operation."""


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    registers: int
    """Of a thread; on AMD vector registers, accumulators included."""
    scalar_spills: int
    """Scalar registers that AMD's compiler keeps in vector registers; 0 on NVIDIA."""
    stack_bytes: int
    """Local memory (scratch) of a thread."""
    spill_store_bytes: int
    """Bytes that the instructions of a thread write to local memory, each counted once."""
    spill_load_bytes: int
    shared_bytes: int
    instructions: int
    tensor: int
    """Instructions for the matrix units."""
    loops: list[Loop]
    programs: int
    """Programs that a processor can hold at once."""
    occupancy: float
    """Their share of the warps that a processor can hold."""

    @property
    def spills(self) -> int:
        return self.stack_bytes + self.spill_store_bytes + self.spill_load_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def occupancy(chip: Chip, registers: int, shared_bytes: int, num_warps: int) -> tuple[int, float]:
    """Return the programs that a processor holds at once (0: not one), and the share of its warps."""
    step = chip.register_step
    by_registers = chip.registers // (max(step, -(-registers // step) * step) * chip.warp) // num_warps
    by_shared = chip.shared_bytes // (shared_bytes + chip.reserved_bytes) if shared_bytes else chip.programs
    programs = min(by_registers, by_shared, chip.programs, chip.warps // num_warps)
    return programs, programs * num_warps / chip.warps


# NVIDIA

_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_SHAPES = {*_WIDTHS, "M88", "MT88", "4", "2"}
_SASS_CATEGORIES = (
    ("tensor", "HMMA HGMMA IMMA IGMMA QGMMA BMMA DMMA"),
    ("load", "LDG LDGSTS UBLKCP UTMALDG LD"),
    ("store", "STG ST UTMASTG RED REDG ATOM ATOMG"),
    ("local", "LDL STL"),
    ("shared", "LDS STS LDSM STSM ATOMS"),
    ("convert", "I2F I2FP F2F F2FP F2I FRND I2I I2IP"),
    ("bits", "LOP3 LOP PRMT SHF SHL SHR SGXT BFE BFI BMSK POPC FLO ULOP3 USHF UPRMT"),
    ("half", "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2"),
    ("float", "FFMA FADD FMUL FMNMX FSEL FSET FSETP FCHK FSWZADD"),
    ("special", "MUFU"),
    ("shuffle", "SHFL VOTE VOTEU MATCH REDUX"),
    ("wait", "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP SYNCS ERRBAR MEMBAR CCTL FENCE NOP"),
    ("control", "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK YIELD WARPGROUPSET"),
    ("move", "MOV UMOV CS2R S2R S2UR R2UR P2R R2P LDC ULDC PLOP3 UPLOP3"),
)
_SASS_CATEGORY = {name: category for category, names in _SASS_CATEGORIES for name in names.split()}


def _sass_category(op: str) -> str:
    if op.startswith(("IMAD.MOV", "IMAD.U32.MOV")):
        return "move"
    return _SASS_CATEGORY.get(op.partition(".")[0], "integer")


def _sass_short(op: str) -> str:
    name, *parts = op.split(".")
    kept = {"load": _WIDTHS, "store": _WIDTHS, "local": _WIDTHS, "shared": _SHAPES, "bits": (), "half": ()}
    category = _sass_category(op)
    return ".".join([name, *(p for p in parts if p in kept[category])]) if category in kept else op


def _sass_width(op: str) -> int:
    return next((_WIDTHS[part] for part in op.split(".")[1:] if part in _WIDTHS), 4)


SASS = Assembly(
    instruction=re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"),
    jump=re.compile(r"\bBRA\b.*`\((\.L_\w+)\)"),
    category=_sass_category,
    short=_sass_short,
    width=_sass_width,
    stores="STL",
    loads="LDL",
)


def read_cubin(cubin: bytes, name: str, chip: Chip, shared_bytes: int, num_warps: int) -> Code:
    """Return what a cubin's kernel needs and is made of."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(rf"Function {re.escape(name)}:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of a kernel {name!r}:\n{usage}")
    registers, stack, local = map(int, found.groups())
    code = sass[sass.index(f"\n.text.{name}:") :]
    return _code(code, SASS, chip, registers, 0, stack + local, shared_bytes, num_warps)


def _run(*command: str | Path) -> str:
    return subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout


# AMD

_GCN_CATEGORIES: Mapping[str, str] = {
    "tensor": r"v_mfma|v_smfmac",
    "local": r"scratch_",
    "load": r"(global|buffer|flat)_load|s_load|s_buffer_load",
    "store": r"(global|buffer|flat)_(store|atomic)",
    "shared": r"ds_(read|write|load|store|add|max|or)",
    "shuffle": r"ds_(bpermute|permute|swizzle)|v_readlane|v_readfirstlane|v_writelane|v_mov_b32_dpp|v_permlane",
    "convert": r"v_cvt",
    "half": r"v_pk_|v_\w+_(f16|bf16)\b",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "bits": r"v_(and|or|xor|not|lshl|lshr|ashr|bfe|bfi|perm|alignb|or3|and_or|lshl_or|lshl_add|xad)\w*",
    "float": r"v_\w+_(f32|f64|legacy)\b",
    "wait": r"s_(barrier|waitcnt|nop|sleep|sched)",
    "control": r"s_(branch|cbranch|endpgm|setprio)|s_\w*saveexec",
    "move": r"v_(mov|accvgpr|swap)|s_mov",
}
_GCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


def _gcn_category(op: str) -> str:
    return next((name for name, pattern in _GCN_CATEGORIES.items() if re.match(pattern, op)), "integer")


def _gcn_width(op: str) -> int:
    return next((width for name, width in _GCN_WIDTHS.items() if name in op), 4)


GCN = Assembly(
    instruction=re.compile(r"^\t([a-z][a-z0-9_]+)\b\s*([^;]*)"),
    jump=re.compile(r"s_c?branch\w*\s+(\.LBB\w+)"),
    category=_gcn_category,
    short=str,
    width=_gcn_width,
    stores="scratch_store",
    loads="scratch_load",
)


def read_amdgcn(assembly: str, chip: Chip, shared_bytes: int, num_warps: int) -> Code:
    """Return what the assembly's only kernel needs and is made of."""

    def field(name: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(found.group(1))

    code = assembly.partition(".rodata")[0]
    stack, spilled = field("private_segment_fixed_size"), field("sgpr_spill_count")
    return _code(code, GCN, chip, field("vgpr_count"), spilled, stack, shared_bytes, num_warps)


# Both

_LABEL = re.compile(r"^(\.L_\w+|\.LBB\w+):")
_PLAIN = {"integer", "float", "move", "control"}
"""Categories whose operations are not listed one by one."""


def _code(
    text: str,
    assembly: Assembly,
    chip: Chip,
    registers: int,
    scalar_spills: int,
    stack_bytes: int,
    shared_bytes: int,
    num_warps: int,
) -> Code:
    ops, inner = loops(text, assembly)
    programs, share = occupancy(chip, registers, shared_bytes, num_warps)
    return Code(
        registers=registers,
        scalar_spills=scalar_spills,
        stack_bytes=stack_bytes,
        spill_store_bytes=sum(assembly.width(op) for op, _ in ops if op.startswith(assembly.stores)),
        spill_load_bytes=sum(assembly.width(op) for op, _ in ops if op.startswith(assembly.loads)),
        shared_bytes=shared_bytes,
        instructions=len(ops),
        tensor=sum(assembly.category(op) == "tensor" for op, _ in ops),
        loops=[loop_of(loop, assembly) for loop in inner],
        programs=programs,
        occupancy=share,
    )


def loops(text: str, assembly: Assembly) -> tuple[list[Instruction], list[list[Instruction]]]:
    """Return all instructions, and those of each innermost loop, in order."""
    ops: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(ops)
            continue
        found = assembly.instruction.search(line)
        if found is None:
            continue
        target = assembly.jump.search(line)
        if target:
            jumps.append((len(ops), target.group(1)))
        ops.append((found.group(1), found.group(2).strip()))
    # A jump to itself is the padding behind a kernel's end.
    spans = sorted({(labels[to], at) for at, to in jumps if labels.get(to, at) < at})
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return ops, [ops[first : last + 1] for first, last in inner]


def loop_of(ops: Sequence[Instruction], assembly: Assembly) -> Loop:
    """Count the instructions of a loop."""
    mix = Counter(assembly.category(op) for op, _ in ops)
    detail = Counter(assembly.short(op) for op, _ in ops if assembly.category(op) not in _PLAIN)
    return Loop(len(ops), dict(mix.most_common()), dict(sorted(detail.items())))
