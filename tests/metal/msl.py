"""From Metal source to what clang's C++ for OpenCL accepts: attributes, kernels' arguments, threadgroup arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PRELUDE = """#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant
"""

# Attribute of a kernel argument: number that runtime.cpp's __kvm_builtin knows it by.
POSITIONS = {
    "thread_position_in_grid": 0,
    "threadgroup_position_in_grid": 1,
    "thread_position_in_threadgroup": 2,
    "thread_index_in_threadgroup": 3,
    "threads_per_threadgroup": 4,
    "dispatch_threads_per_threadgroup": 5,
    "threadgroups_per_grid": 6,
    "threads_per_grid": 7,
    "thread_index_in_simdgroup": 8,
    "simdgroup_index_in_threadgroup": 9,
    "simdgroups_per_threadgroup": 10,
    "dispatch_simdgroups_per_threadgroup": 15,
    "threads_per_simdgroup": 11,
    "thread_execution_width": 11,
    "thread_index_in_quadgroup": 12,
    "quadgroup_index_in_threadgroup": 13,
    "quadgroups_per_threadgroup": 14,
    "dispatch_quadgroups_per_threadgroup": 16,
    "grid_size": 7,
    "grid_origin": 17,
}

_PLACE = "#pragma _kvm_shim\n"
_VECTOR = r"(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]"
_KERNEL = r"\[\[\s*kernel\b[^\[\]]*\]\]"
_SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")
_SCALAR = r"(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float|size_t|u?int(?:8|16|32|64)_t|b?float16_t)"
_POINTER = re.compile(
    rf"(?<=[(;{{}},<])(\s*(?:(?:const|volatile|{_SPACE.pattern})\s+)*){_SCALAR}[234]?\s*(?:const\s*)?[*&](?![&=])"
)
_ATTRIBUTE = re.compile(r"\[\[(?:[^\[\]]|\[[^\[\]]*\])*\]\]")
# Names that mean something to OpenCL and nothing, or something else, to Metal.
_RESERVED = re.compile(
    r"\b(atomic_(?:int|uint|bool|float|ulong)|local|global|generic|pipe|read_only|write_only|read_write|uniform"
    r"|queue_t|event_t)\b"
)

_DECLARES = re.compile(r"(?:^|,)\s*(?:const\s+)?(?:device|thread|threadgroup|constant|[\w:]+)\s+[\w&*]+\s*(?:,|$)")


class SourceError(Exception):
    """The source is not what Metal accepts, or not what this harness reads."""


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: its type as written, its name, and where its value comes from."""

    type: str
    name: str
    buffer: int | None
    position: str | None
    constant: str | None  # the function constant on which it depends

    @property
    def pointer(self) -> str:
        """The type of a pointer to what is bound."""
        return re.sub(r"[&*]\s*$", "*", self.type)


@dataclass
class Kernel:
    """A kernel of a source: its template head ('' if none), arguments, and the most threads it lets a threadgroup have.

    The last is None where the source says nothing, or says it with more than a number.
    """

    name: str
    template: str
    arguments: list[Argument]
    most_threads: int | None


@dataclass
class Prepared:
    """A source that clang reads: the text, its kernels, names of threadgroup arrays by number, host names."""

    text: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    arrays: dict[int, str] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    constants: dict[str, tuple[int, str]] = field(default_factory=dict)


def _blank(text: str) -> str:
    """As many lines as ``text``, and nothing on them."""
    return " " + "\n" * text.count("\n")


def _closing(text: str, at: int, pair: str) -> int:
    """Index of the bracket that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(text)):
        if text[i] == pair[0]:
            depth += 1
        elif text[i] == pair[1]:
            depth -= 1
            if depth == 0:
                return i
    raise SourceError(f"no {pair[1]} closes the {pair[0]} in {text[at : at + 60]!r}")


def _split(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{<":
            depth += 1
        elif c in ")]}>" and not (c == ">" and i and text[i - 1] == "-"):
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p for p in parts if p.strip()]


def _argument(text: str) -> Argument:
    buffer = position = constant = None
    for attribute in _ATTRIBUTE.findall(text):
        for item in _split(attribute[2:-2]):
            name, _, inside = item.strip().partition("(")
            inside = inside.rstrip(") ")
            if name == "buffer":
                buffer = int(inside)
            elif name == "function_constant":
                constant = inside
            elif name in POSITIONS:
                position = name
            else:
                raise SourceError(f"kernel argument {text.strip()!r}: attribute {name!r} is not supported")
    bare = " ".join(_ATTRIBUTE.sub(" ", text).split())
    found = re.fullmatch(r"(.*?)(\w+)", bare)
    if found is None:
        raise SourceError(f"kernel argument {text.strip()!r} has no name")
    return Argument(_RESERVED.sub(r"_kvm_\1", found[1].strip()), found[2], buffer, position, constant)


def _kernels(text: str) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for match in re.finditer(rf"(?:{_KERNEL}|\bkernel\b)([^;{{}}()]*?\bvoid\s+(\w+)\s*)\(", text):
        end = _closing(text, match.end() - 1, "()")
        before = text[: match.start()].rstrip()
        while before.endswith("]]"):
            before = before[: before.rindex("[[")].rstrip()
        template = ""
        if before.endswith(">"):
            depth, i = 0, len(before) - 1
            while i >= 0:
                depth += (before[i] == ">") - (before[i] == "<")
                if depth == 0:
                    break
                i -= 1
            if before[:i].rstrip().endswith("template"):
                template = before[i + 1 : -1]
        arguments = [_argument(a) for a in _split(text[match.end() : end])]
        taken = {a.buffer for a in arguments}
        for i, a in enumerate(arguments):
            if a.buffer is None and a.position is None:
                free = next(n for n in range(99) if n not in taken)
                taken.add(free)
                arguments[i] = Argument(a.type, a.name, free, None, a.constant)
        most = re.search(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)\s*\)", text[len(before) : match.end()])
        found[match[2]] = Kernel(match[2], template, arguments, int(most[1]) if most else None)
    return found


def _bodies(text: str, kernels: Iterable[str]) -> list[tuple[int, int]]:
    """Start and end of the kernels' bodies."""
    found = []
    for name in kernels:
        for match in re.finditer(rf"\bvoid\s+{name}\s*\(", text):
            start = text.find("{", _closing(text, match.end() - 1, "()"))
            found.append((start, _closing(text, start, "{}")))
    return found


def _threadgroup_arrays(text: str, arrays: dict[int, str], kernels: Iterable[str]) -> str:
    """Turn `threadgroup T x[N];` into a reference to memory that ir.py lays out, of number len(arrays)."""
    out, at, bodies = [], 0, _bodies(text, kernels)
    for match in re.finditer(
        r"(?<=[;{}])(\s*(?:#[^\n]*\n\s*)*)((?:alignas\s*\([^()]*\)\s*|static\s+)*)threadgroup\b", text
    ):
        if match.start() < at:
            continue
        end = text.find(";", match.end())
        body = text[match.end() : end]
        head = _split(body)[0] if body.strip() else ""
        plain = re.sub(r"<[^;]*>|\[[^\]]*\]", "", head)
        if "(" in plain or "*" in plain or "&" in plain or "{" in plain:
            continue
        if not any(start < match.start() < stop for start, stop in bodies):
            raise SourceError(f"a threadgroup variable outside of a kernel: {' '.join(body.split())!r}")
        if "=" in plain:
            raise SourceError(f"a threadgroup variable has no initialiser: {' '.join(body.split())!r}")
        declarators = _split(body)
        first = re.fullmatch(r"(\s*.*?)\b(\w+)\s*((?:\[.*\])*)\s*", declarators[0], re.S)
        if first is None:
            raise SourceError(f"threadgroup declaration not understood: {' '.join(body.split())!r}")
        kind = " ".join(re.sub(r"\balignas\s*\([^()]*\)", "", first[1]).split())
        pieces = []
        for declarator in [first[2] + first[3], *declarators[1:]]:
            parts = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])*)\s*", declarator, re.S)
            if parts is None:
                raise SourceError(f"threadgroup declaration not understood: {' '.join(body.split())!r}")
            number = len(arrays)
            arrays[number] = parts[1]
            alias = f"_kvm_array{number}"
            size = " ".join(parts[2].split())
            pieces.append(
                f"typedef {kind} {alias} {size}; threadgroup {alias}& {parts[1]} = *(threadgroup {alias}*)"
                f"__kvm_threadgroup_array({number}, sizeof({alias}), sizeof(metal::_scalar<{kind}>))"
            )
        out.append(text[at : match.end(1)] + "; ".join(pieces) + _blank(body).rstrip(" "))
        at = end
    out.append(text[at:])
    return "".join(out)


def _require_spaces(text: str) -> None:
    """Metal wants an address space in each pointer and reference type; clang would take any."""
    for match in _POINTER.finditer(text):
        if not _SPACE.search(match[1]):
            start = text.rfind("\n", 0, match.end()) + 1
            line = text[start : text.find("\n", match.end())].strip()
            raise SourceError(f"a pointer or reference without an address space in `{line[:200]}`")


def _constructors(text: str) -> str:
    """Drop `thread` after constructors: with it they could not make a temporary."""
    classes = set(re.findall(r"\b(?:struct|class)\s+(\w+)", text))
    out, at = [], 0
    for match in re.finditer(r"\)(\s*)thread(?=\s*(?:[{:;=]|noexcept\b))", text):
        depth, i = 0, match.start()
        while i >= 0:
            depth += (text[i] == ")") - (text[i] == "(")
            if depth == 0:
                break
            i -= 1
        name = re.search(r"(\w+)\s*$", text[max(0, i - 80) : i])
        if name and name[1] in classes:
            out.append(text[at : match.end(1)])
            at = match.end()
    out.append(text[at:])
    return "".join(out)


def _vectors(text: str) -> str:
    """Give vector constructors of several arguments a function, which C++ for OpenCL has no syntax for."""
    text = re.sub(
        rf"\b({_VECTOR})(\s+)((?!__)\w+)\s*\(([^;{{}}]*)\)(?=\s*;)",
        lambda m: m[0] if _DECLARES.search(m[4]) or not m[4].strip() else f"{m[1]}{m[2]}{m[3]} = {m[1]}({m[4]})",
        text,
    )
    text = re.sub(
        rf"(\boperator\s+|::\s*|\b)({_VECTOR})(?=\s*\()",
        lambda m: m[0] if m[1].startswith("operator") else f"{m[1]}_make<{m[2]}>" if m[1] else f"metal::_make<{m[2]}>",
        text,
    )
    out, at = [], 0
    for match in re.finditer(r"(?:\bmetal\s*::\s*)?\bvec\s*<", text):
        if match.start() < at or re.search(r"operator\s*$", text[: match.start()][-12:]):
            continue
        depth, i = 0, match.end() - 1
        while i < len(text) and text[i] not in ";{":
            depth += (text[i] == "<") - (text[i] == ">")
            if depth == 0:
                break
            i += 1
        if depth or not re.match(r"\s*\(", text[i + 1 : i + 20]):
            continue
        out.append(text[at : match.start()] + f"metal::_make<{text[match.start() : i + 1]}>")
        at = i + 1
    out.append(text[at:])
    return "".join(out)


def _set_aside(text: str) -> tuple[str, str]:
    """The text without the shim, which is written in what clang reads, and the shim."""
    marker = text.find('/metal_stdlib" 1 3')
    if marker < 0:
        return text, ""
    start = text.index("\n", marker) + 1
    end = text.find("\n# ", text.rindex("_kvm_shim_ends", start)) + 1
    return text[:start] + _PLACE + text[end:], text[start:end]


def prepare(preprocessed: str, function_constants: Mapping[str | int, object]) -> Prepared:
    """Rewrite a preprocessed source.

    Args:
        preprocessed: what clang -E made of it; the shim's own text is in it.
        function_constants: value by name or by number; one that is not given has no value, and using it fails to link.
    """
    text, shim = _set_aside(preprocessed)
    text = re.sub(r"(?m)^(\s*#\s*pragma\s+)METAL(\s+fp\s+contract\b)", r"\1clang\2", text)
    result = Prepared("")
    result.kernels = _kernels(text)

    def host(match: re.Match[str]) -> str:
        result.hosts[match[1]] = " ".join(match[2].split())
        return _blank(match[0])

    text = re.sub(
        r"\btemplate\s*\[\[\s*host_name\s*\(\s*\"([^\"]*)\"\s*\)\s*\]\]\s*"
        r"(?:\[\[\s*kernel\s*\]\]|kernel\b)\s*decltype\s*\(.*?\)\s*([^;()]+);",
        host,
        text,
        flags=re.S,
    )

    def function_constant(match: re.Match[str]) -> str:
        kind, name, number = match[1].strip(), match[2], int(match[3])
        result.constants[name] = (number, kind)
        for key in (name, number):
            if key in function_constants:
                value = function_constants[key]
                literal = str(value).lower() if isinstance(value, bool) else repr(value)
                return f"static constant constexpr {kind} {name} = {literal};" + _blank(match[0])
        return f"extern constant {kind} {name};" + _blank(match[0])

    text = re.sub(
        r"\bconstant\s+([^;{}=()]*?)\b(\w+)\s*\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]\s*;",
        function_constant,
        text,
    )
    text = re.sub(
        r"\bis_function_constant_defined\s*\(\s*(\w+)\s*\)",
        lambda m: str(_given(m[1], result, function_constants)).lower(),
        text,
    )
    text = _ATTRIBUTE.sub(lambda m: _blank(m[0]), text)
    text = re.sub(r"(?<![\w\"])kernel(?=\s+(?:inline\s+|static\s+)*void\b)", " ", text)
    _require_spaces(text)
    text = _constructors(text)
    text = "\n".join(line if line.startswith("#") else _RESERVED.sub(r"_kvm_\1", line) for line in text.split("\n"))
    text = _threadgroup_arrays(text, result.arrays, result.kernels)
    result.text = _vectors(text).replace(_PLACE, shim)
    return result


def _given(name: str, result: Prepared, values: Mapping[str | int, object]) -> bool:
    return name in values or (name in result.constants and result.constants[name][0] in values)


def thunk(kernel: Kernel, instance: str, absent: set[str]) -> str:
    """The function without arguments that calls ``instance`` (such as `f<float, 64>`) with what the runtime binds.

    Args:
        absent: names of arguments whose function constant is false: they are bound to nothing.
    """
    values = []
    for a in kernel.arguments:
        if a.position is not None:
            lanes = re.search(r"([234])$", a.type)
            axes = range(int(lanes[1]) if lanes else 1)
            got = ", ".join(f"__kvm_builtin({POSITIONS[a.position]}, {axis})" for axis in axes)
            values.append(f"metal::_make<{a.type}>({got})" if lanes else f"{a.type}({got})")
        elif not a.type.endswith(("*", "&")):
            raise SourceError(f"kernel argument {a.name!r} of type {a.type!r} has neither a buffer nor a position")
        else:
            address = "0ul" if a.name in absent else f"__kvm_buffer({a.buffer})"
            values.append(f"{'*' if a.type.endswith('&') else ''}({a.pointer})({address})")
    call = f"({', '.join(values)});"
    arguments = re.search(r"<.*>\s*$", instance, re.S)
    if kernel.template and arguments:
        head = f"template <{kernel.template}>"
        names = ", ".join(_parameter_name(p) for p in _split(kernel.template))
        body = f"{head} inline void _kvm_thunk() {{ {kernel.name}<{names}>{call} }}\n"
        return body + f'extern "C" void __kvm_entry() {{ _kvm_thunk{arguments[0]}(); }}\n'
    return f'extern "C" void __kvm_entry() {{ {instance}{call} }}\n'


def _parameter_name(parameter: str) -> str:
    bare = parameter.split("=")[0].strip()
    name = re.search(r"(\w+)$", bare)
    if name is None:
        raise SourceError(f"template parameter {parameter.strip()!r} has no name")
    return name[1] + ("..." if "..." in bare else "")
