"""Instrument LLVM IR: a call of the runtime before each access, threadgroup arrays laid out, blocks counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

ARENA_ALIGN = 16
REDZONE_BYTES = 64
_SPACES = {1: "device", 2: "constant", 3: "threadgroup", 4: "generic"}
_MEMORY = re.compile(
    r"^\s+(?:(?P<value>%\S+) = load|store)(?: volatile)? (?P<type>.*), "
    r"ptr(?: addrspace\((?P<space>\d+)\))? (?P<pointer>.+?), align (?P<align>\d+)(?:, .*)?$"
)
_INTRINSIC = re.compile(r"\bcall void @llvm\.(memcpy|memmove|memset)(?:\.inline)?\.[\w.]+\((.*?)\)(?:, !| #|$)")
_ARRAY = re.compile(
    r"^\s+(%\S+) = .*@__kvm_threadgroup_array\(i32 noundef (\d+), i64 noundef (\d+), i64 noundef (\d+)\)"
)
_TOUCHES = re.compile(r"^\s+(?:%\S+ = )?(?:load|store|atomicrmw|cmpxchg|va_arg) |@llvm\.(?:mem|masked|vp)")
_ALLOCA = re.compile(r"^\s+(%\S+) = alloca (.*)$")
_OFFSET = re.compile(r"^\s+(%\S+) = getelementptr (?:inbounds |nuw |nusw )*.*?, ptr (%[^,\s]+), (.*)$")
_CONSTANT = re.compile(r"^(@\S+) = (?!external).*?addrspace\(2\) .*?\bconstant (.*)$")
_LABEL = re.compile(r'^([\w.$-]+|"[^"]*"):')
_NAME = r'%(?:[\w.$-]+|"[^"]*")'
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}

_FLOAT = {"fadd", "fsub", "fmul", "fneg"}
_INTEGER = {"add", "sub", "mul", "and", "or", "xor", "shl", "lshr", "ashr"}
_DIVIDE = {"sdiv", "udiv", "srem", "urem"}
_CONVERT = {"fptrunc", "sitofp", "uitofp", "fptosi", "fptoui"}
_EXTEND = {"zext", "sext", "trunc"}
_CHOOSE = {"icmp", "fcmp", "select"}
_TRANSCENDENTAL = {
    *("exp", "exp2", "exp10", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
    *("sinh", "cosh", "tanh", "pow", "sqrt", "asinhf", "acoshf", "atanhf", "fmodf", "expf"),
}
_FLOAT_CALLS = {"fma", "fmuladd", "minnum", "maxnum", "fabs", "copysign", "floor", "ceil", "rint", "round", "roundeven"}
_FLOAT_CALLS |= {"trunc", "ldexp"}
_INTEGER_CALLS = {"ctpop", "ctlz", "cttz", "bitreverse", "bswap", "fshl", "fshr"}
_CHOOSE_CALLS = {"smin", "smax", "umin", "umax", "abs"}


@dataclass
class Array:
    """A threadgroup array: its name in the source, offset and size in bytes within the arena, element size."""

    name: str
    offset: int
    size_bytes: int
    element_bytes: int


@dataclass(frozen=True)
class Site:
    """A place in the source: file and line, and the lines of the calls that it was inlined through, innermost first."""

    file: str = ""
    line: int = 0
    callers: tuple[tuple[str, int], ...] = ()


@dataclass
class Instrumented:
    """IR with calls of the runtime, and what their numbers mean.

    Attributes:
        arrays: threadgroup arrays in their order in the arena of `arena_bytes`.
        sites: places in the source by number.
        constants: names of the arrays in constant memory that the module defines.
        blocks: operations by category in each basic block; empty without counting.
    """

    text: str = ""
    arrays: list[Array] = field(default_factory=list)
    arena_bytes: int = 0
    sites: list[Site] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    blocks: list[Counter[str]] = field(default_factory=list)


def _split(text: str) -> list[str]:
    """The parts between commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _leading_type(text: str) -> str:
    """The type at the start of `TYPE VALUE`."""
    if text[0] in "<[{":
        depth = 0
        for i, c in enumerate(text):
            depth += (c in "<[{") - (c in ">]}")
            if depth == 0:
                return text[: i + 1]
    pointer = re.match(r"ptr(?: addrspace\(\d+\))?", text)
    if pointer:
        return pointer[0]
    named = re.match(_NAME, text)
    return named[0] if named else re.split(r"[ ,]", text, maxsplit=1)[0]


class _Types:
    """Sizes of LLVM types, with those that the module names."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.named = {m[1]: m[2] for line in lines if (m := re.match(rf"^({_NAME}) = type (.*)$", line))}

    def layout(self, kind: str) -> tuple[int, int]:
        """Bytes that a load or store of the type touches, and its alignment."""
        kind = kind.strip()
        if kind in self.named:
            return self.layout(self.named[kind])
        if kind in _BITS or re.fullmatch(r"i\d+", kind) or kind.startswith("ptr"):
            bits = _BITS.get(kind, 64) if not re.fullmatch(r"i\d+", kind) else int(kind[1:])
            size = (bits + 7) // 8
            return size, min(16, 1 << (size - 1).bit_length())
        if kind.startswith("<{"):
            return sum(self.layout(k)[0] for k in _split(kind[2:-2])), 1
        if kind.startswith("{"):
            at, largest = 0, 1
            for inner in _split(kind[1:-1]):
                size, align = self.layout(inner)
                at = (at + align - 1) // align * align + size
                largest = max(largest, align)
            return (at + largest - 1) // largest * largest, largest
        many = re.fullmatch(r"([<\[])(\d+) x (.+)[>\]]", kind)
        if many is None:
            raise ValueError(f"the harness does not read the LLVM type {kind!r}")
        size, align = self.layout(many[3])
        if many[1] == "[":
            return int(many[2]) * size, align
        bits = int(many[3][1:]) if re.fullmatch(r"i\d+", many[3]) else _BITS.get(many[3], 64)
        size = (int(many[2]) * bits + 7) // 8
        return size, 1 << (size - 1).bit_length()

    def size(self, kind: str) -> int:
        return self.layout(kind)[0]


class _Places:
    """Source places by the names of DILocation nodes, numbered as they are asked for."""

    def __init__(self, lines: Iterable[str], sites: list[Site]) -> None:
        self.nodes = {m[1]: m[2] for line in lines if (m := re.match(r"^(!\d+) = (?:distinct )?!(DI\w+\(.*\))$", line))}
        self.sites = sites
        self.numbers: dict[str, int] = {}

    def _attribute(self, node: str, name: str) -> str:
        match = re.search(rf"\b{name}: (\"[^\"]*\"|[^,)]+)", self.nodes.get(node, ""))
        return match[1].strip('"') if match else ""

    def _at(self, location: str) -> tuple[str, int]:
        file = self._attribute(self._attribute(location, "scope"), "file")
        return self._attribute(file, "filename"), int(self._attribute(location, "line") or 0)

    def number(self, line: str) -> int:
        """The number of an instruction's place."""
        match = re.search(r"!dbg (!\d+)", line)
        key = match[1] if match else ""
        if key not in self.numbers:
            callers, outer = [], self._attribute(key, "inlinedAt")
            while outer:
                callers.append(self._at(outer))
                outer = self._attribute(outer, "inlinedAt")
            self.numbers[key] = len(self.sites)
            self.sites.append(Site(*self._at(key), tuple(callers)))
        return self.numbers[key]


def _operand(text: str) -> str:
    """`ptr addrspace(1) %x` of a memory intrinsic's operand `ptr addrspace(1) noundef align 4 %x`."""
    match = re.match(r"(ptr(?: addrspace\(\d+\))?)", text)
    value = re.search(rf"({_NAME}|@\S+|null|(?:getelementptr|addrspacecast|inttoptr) .*)$", text)
    if match is None or value is None:
        raise ValueError(f"the harness does not read the operand {text!r}")
    return f"{match[1]} {value[1]}"


def _lanes(kind: str) -> int:
    match = re.match(r"<(\d+) x ", kind)
    return int(match[1]) if match else 1


def _category(line: str) -> tuple[str, int]:
    """The category of an instruction ('' if it is not counted), and how many elements it works on."""
    text = re.sub(rf"^\s+(?:{_NAME} = )?(?:tail |musttail |notail )?", "", line)
    word = text.split(" ")[0]
    rest = re.sub(
        r"^\w+ (?:(?:nuw|nsw|exact|disjoint|nneg|samesign|fast|nnan|ninf|nsz|arcp|contract|reassoc|afn) )*", "", text
    )
    if word in ("icmp", "fcmp"):
        rest = rest.split(" ", 1)[1]
    lanes = _lanes(rest)
    if word in _FLOAT:
        return "float", lanes
    if word == "fdiv":
        return "float_divide", lanes
    if word in _INTEGER:
        return "integer", lanes
    if word in _DIVIDE:
        return "integer_divide", lanes
    if word in _CONVERT:
        return "convert", lanes
    if word == "fpext":
        return "widen", lanes
    if word in _EXTEND:
        return "extend", lanes
    if word in _CHOOSE:
        return "compare_select", lanes
    if word == "getelementptr":
        return "address", 1
    if word == "switch" or (word == "br" and text.startswith("br i1")):
        return "branch", 1
    if word in ("load", "store"):
        space = re.search(r", ptr addrspace\((\d+)\)", text)
        return f"{word}_{_SPACES.get(int(space[1]), 'thread') if space else 'thread'}", 1
    if word == "call":
        name = re.search(r"@(?:llvm\.)?(\w+)", rest)
        lanes = _lanes(re.sub(r"^.*?(?=<|\w+ @)", "", rest.split("@")[0] + "@") or "")
        if name and name[1] in _TRANSCENDENTAL:
            return "transcendental", lanes
        if name and name[1] in _FLOAT_CALLS:
            return "float", lanes
        if name and name[1] in _INTEGER_CALLS:
            return "integer", lanes
        if name and name[1] in _CHOOSE_CALLS:
            return "compare_select", lanes
    return "", 0


def _costs(body: list[str]) -> list[tuple[str, int]]:
    """Category and elements of each line of a function.

    Integer arithmetic whose result only leads to addresses is address arithmetic; a product that only feeds a sum is
    one operation with it.
    """
    costs = [_category(line) for line in body]
    defined: dict[str, int] = {}
    users: dict[str, list[tuple[int, str]]] = {}
    for i, line in enumerate(body):
        match = re.match(rf"^\s+({_NAME}) = (.*)$", line)
        text = match[2] if match else line
        if match:
            defined[match[1]] = i
        for name in set(re.findall(_NAME, text)):
            users.setdefault(name, []).append((i, text))
    pure = {
        name
        for name, i in defined.items()
        if costs[i][0] in ("integer", "extend") or " = phi i" in body[i] or costs[i][0] == "address"
    }
    names = {i: name for name, i in defined.items()}
    changed = True
    while changed:
        changed = False
        for name in list(pure):
            if costs[defined[name]][0] == "address":
                continue
            for i, _ in users.get(name, []):
                if names.get(i) not in pure:
                    pure.discard(name)
                    changed = True
                    break
    for name in pure:
        if costs[defined[name]][0] in ("integer", "extend"):
            costs[defined[name]] = ("address", costs[defined[name]][1])
    for name, i in defined.items():
        used = users.get(name, [])
        shift = re.match(rf"^\s+{_NAME} = and i\d+ .*, (?:7|15|31|63)(?:,|$)", body[i])
        if (
            shift
            and used
            and all(re.match(rf"(?:shl|lshr|ashr) .*, {re.escape(name)}(?:,|$)", text) for _, text in used)
        ):
            costs[i] = ("", 0)  # OpenCL's shifts take their count modulo the width, as hardware does by itself
        if re.match(rf"^\s+{_NAME} = fmul ", body[i]) and len(used) == 1 and re.match(r"f(add|sub) ", used[0][1]):
            costs[i] = ("", 0)
    return costs


class _Function:
    """Rewrites the lines of one function."""

    def __init__(self, types: _Types, places: _Places, layout: dict[int, Array]) -> None:
        self.types, self.places, self.layout = types, places, layout
        self.fresh = 0
        self.allocas: dict[str, int] = {}
        self.derived: dict[str, tuple[str, bool]] = {}  # pointer into an alloca; whether its offset is a constant

    def _integer(self, pointer: str) -> tuple[str, str]:
        """A line that makes a 64-bit integer of a pointer, and its name."""
        self.fresh += 1
        name = f"%__kvm{self.fresh}"
        return f"  {name} = ptrtoint {pointer} to i64", name

    def before(self, line: str) -> list[str]:
        """The calls that go before an instruction."""
        access = _MEMORY.match(line)
        if access:
            return self._access(access, line)
        intrinsic = _INTRINSIC.search(line)
        if intrinsic:
            operands = _split(intrinsic[2])
            number = self.places.number(line)
            length = operands[2].split(" ", 1)[1]
            ends = operands[:1] if intrinsic[1] == "memset" else operands[:2]
            out = []
            for write, operand in zip((1, 0), ends, strict=False):
                pointer = _operand(operand)
                space = re.match(r"ptr addrspace\((\d+)\)", pointer)
                made, address = self._integer(pointer)
                info = 1 << 16 | write << 24 | number << 32
                out += [
                    made,
                    f"  call void @__kvm_span(i64 {address}, i64 {length}, i64 {info}, i32 {space[1] if space else 0})",
                ]
            return out
        if _TOUCHES.search(line):
            raise ValueError(f"the harness does not read the instruction {line.strip()!r}")
        alloca = _ALLOCA.match(line)
        if alloca:
            self.allocas[alloca[1]] = self.types.size(_leading_type(alloca[2]))
            self.derived[alloca[1]] = (alloca[1], True)
        offset = _OFFSET.match(line)
        if offset and offset[2] in self.derived:
            base, fixed = self.derived[offset[2]]
            self.derived[offset[1]] = (base, fixed and "%" not in offset[3])
        return []

    def _access(self, access: re.Match[str], line: str) -> list[str]:
        space, pointer = int(access["space"] or 0), access["pointer"]
        store = access["value"] is None
        size = self.types.size(_leading_type(access["type"]))
        if space == 2 and pointer.startswith(("@", "getelementptr")):
            return []
        base, fixed = self.derived.get(pointer, ("", False))
        if space == 0 and fixed:
            return []
        info = size | min(int(access["align"]), 128) << 16 | int(store) << 24 | self.places.number(line) << 32
        qualifier = f" addrspace({space})" if space else ""
        made, address = self._integer(f"ptr{qualifier} {pointer}")
        if base:
            made_base, start = self._integer(f"ptr {base}")
            check = f"  call void @__kvm_private(i64 {start}, i64 {self.allocas[base]}, i64 {address}, i64 {info})"
            return [made, made_base, check]
        return [made, f"  call void @__kvm_{_SPACES.get(space, 'generic')}(i64 {address}, i64 {info})"]

    def replace(self, line: str) -> str:
        """The instruction itself; the address of a threadgroup array where it asks for one."""
        match = _ARRAY.match(line)
        if match is None:
            return line
        arena = "ptr addrspace(3) addrspacecast (ptr @__kvm_arena to ptr addrspace(3))"
        return f"  {match[1]} = getelementptr i8, {arena}, i64 {self.layout[int(match[2])].offset}"


def _lay_out(lines: Iterable[str], names: dict[int, str]) -> tuple[dict[int, Array], int]:
    """Offsets of the threadgroup arrays that a module uses, with room between them, and the size of the whole."""
    found = {
        int(m[2]): Array(names.get(int(m[2]), "?"), 0, int(m[3]), int(m[4])) for x in lines if (m := _ARRAY.match(x))
    }
    offset = REDZONE_BYTES
    for _, array in sorted(found.items()):
        array.offset = offset
        offset += (array.size_bytes + ARENA_ALIGN - 1) // ARENA_ALIGN * ARENA_ALIGN + REDZONE_BYTES
    return dict(sorted(found.items())), offset


def instrument(ir: str, names: dict[int, str], count: bool = False) -> Instrumented:
    """Put a call of the runtime before each access, save those to thread memory at a place that is known to be right.

    Args:
        ir: from toolchain.to_ir.
        names: the threadgroup arrays' names by number.
        count: also count how often each basic block runs, in @__kvm_blocks.
    """
    lines = ir.split("\n")
    result = Instrumented()
    types, places = _Types(lines), _Places(lines, result.sites)
    layout, result.arena_bytes = _lay_out(lines, names)
    result.arrays = list(layout.values())
    out: list[str] = []
    constants: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("define "):
            end = lines.index("}", at)
            out.append(line)
            out += _rewrite(lines[at + 1 : end], _Function(types, places, layout), result, count)
            at = end
            continue
        if line.startswith("attributes #"):
            # What these promise of a function no longer holds once it calls the runtime.
            line = re.sub(r"\bmemory\([^)]*\) ?|\b(?:willreturn|nosync|nofree|speculatable|norecurse) ", "", line)
        constant = _CONSTANT.match(line)
        if constant:
            size = types.size(_leading_type(constant[2]))
            result.constants.append(_plain(constant[1]))
            constants += [f"i64 ptrtoint (ptr addrspace(2) {constant[1]} to i64)", f"i64 {size}"]
        out.append(line)
        at += 1
    pointers = {"device": 2, "constant": 2, "threadgroup": 2, "generic": 2, "private": 4}
    out += [f"declare void @__kvm_{name}({', '.join(['i64'] * n)})" for name, n in pointers.items()]
    out.append("declare void @__kvm_span(i64, i64, i64, i32)")
    table = f"[{', '.join(constants)}]" if constants else "zeroinitializer"
    out += [
        f"@__kvm_arena = global [{result.arena_bytes} x i8] zeroinitializer, align 128",
        f"@__kvm_constants = global [{max(1, len(constants))} x i64] {table}",
        f"@__kvm_blocks = global [{max(1, len(result.blocks))} x i64] zeroinitializer",
    ]
    result.text = "\n".join(out) + "\n"
    return result


def _plain(symbol: str) -> str:
    """The name in the source of a global variable."""
    name = symbol.strip('@"')
    parts = re.findall(r"(\d+)", name) if name.startswith("_Z") else []
    for number in reversed(parts):
        at = name.rindex(number) + len(number)
        if len(name[at : at + int(number)]) == int(number):
            return name[at : at + int(number)]
    return name


def _rewrite(body: list[str], function: _Function, result: Instrumented, count: bool) -> list[str]:
    """The lines of a function with what goes before them."""
    costs = _costs(body) if count else []
    out: list[str] = []
    pending = count  # a block has begun whose counter is not incremented yet
    if count:
        result.blocks.append(Counter())
    for i, line in enumerate(body):
        if _LABEL.match(line):
            out.append(line)
            if count and i:
                result.blocks.append(Counter())
            pending = count
            continue
        if pending and line.strip() and " = phi " not in line:
            number = len(result.blocks) - 1
            place = f"getelementptr (i64, ptr @__kvm_blocks, i64 {number})"
            out += [
                f"  %__kvmc{number} = load i64, ptr {place}",
                f"  %__kvmi{number} = add i64 %__kvmc{number}, 1",
                f"  store i64 %__kvmi{number}, ptr {place}",
            ]
            pending = False
        if count and costs[i][0]:
            result.blocks[-1][costs[i][0]] += costs[i][1]
        out += function.before(line)
        out.append(function.replace(line))
    return out
