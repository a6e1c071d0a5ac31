"""The tables of docs/cuda.md, of what scripts/compile_triton.py has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

GPUS = {"sm_80": ("A100", 2039.0, 108, 1.41), "sm_90": ("H100", 3350.0, 132, 1.98)}
"""Bandwidth in GB/s, processors and clock in GHz of the 80 GB modules, as NVIDIA published them (the clock is what its
FP32 figure implies)."""
ISSUED = 4
"""Instructions of a warp that a processor issues in a cycle."""
WHOLE_NUMBERS = 2
"""Of these, those of whole numbers and of bits: a processor has half as many lanes for them."""
TARGETS = ("sm_80", "sm_90", "gfx942")
SHOWN = ("int4", "int2", "small", "tiny", "kivi(bits=2)")

NOTES = """\
Compiled without a GPU, by Triton {triton}; `G` is the query heads of a KV head, D = 128, bfloat16 unless said. Three
figures are those of sm_80 (A100), sm_90 (H100) and gfx942 (MI300X). Spilled are bytes of local memory of a thread and
of the instructions that go there; held is the share of the warps that a processor can hold."""
LOOP_NOTES = """\
Instructions of a thread in the loop over the body's rows, for each number that a program unpacks (one channel of one
key or value, whatever the query heads). `busy` is **a prediction, not a measurement**: the time in which a processor
issues that loop, over the time in which its share of the memory bandwidth brings the bytes; above 1, arithmetic
decides."""
BYTES_NOTES = """\
Bytes of device memory, counted in Triton's interpreter, 84 exact rows in the tail. Needed is what the call is given and
returns, each byte once. Read are the distinct bytes of each program, summed; loaded are all that its threads ask for.
`at best` is **a prediction**: the bytes of attention over exact rows over those that are read and written."""


def render(results: Row) -> str:
    """Return the tables, in Markdown."""
    found = [row for row in results["kernels"] if "error" not in row]
    parts = [
        NOTES.format(**results["versions"]),
        _table(_decode(found)),
        "The other kernels:",
        _table(_others(found)),
        LOOP_NOTES,
        _table(_loops(found)),
        BYTES_NOTES,
        _table(_bytes(results["bytes"])),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _three(rows: list[Row], value: Any) -> str:
    """Return a figure of each target; one where they agree."""
    by = {row["target"]: row for row in rows}
    said = [str(value(by[target])) for target in TARGETS if target in by]
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def _cells(rows: list[Row]) -> list[str]:
    return [
        _three(rows, lambda r: r["registers"]),
        _three(rows, lambda r: r["spills"]),
        _three(rows, lambda r: f"{r['shared_bytes'] / 1024:.0f}"),
        _three(rows, lambda r: f"{r['occupancy']:.0%}"),
        _three(rows, lambda r: r["tensor"]),
    ]


HEADINGS = ["registers", "spilled", "shared, KB", "held", "matrix instructions"]


def _grouped(found: list[Row], keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    out: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        out.setdefault(tuple(row[k] for k in keys), []).append(row)
    return out


def _label(row: Row) -> str:
    """Return a format with what is not common about it."""
    said = [f"`{row['format']}`"]
    if row["dtype"] != "bfloat16":
        said.append(row["dtype"])
    if row["dim"] != 128:
        said.append(f"D={row['dim']}")
    if row["primitive"] == "decode" and row["n_queries"] > 1:
        said.append(f"{row['n_queries']} tokens")
    return ", ".join(said)


CALL = ("primitive", "format", "dtype", "dim", "group", "n_queries", "kernel")


def _decode(found: list[Row]) -> list[list[str]]:
    out = [["`attend_decode_kernel`", "G", *HEADINGS]]
    rows = [r for r in found if r["primitive"] == "decode" and r["kernel"] == "attend_decode_kernel"]
    for group in _grouped(rows, CALL).values():
        out.append([_label(group[0]), str(group[0]["group"]), *_cells(group)])
    return out


def _others(found: list[Row]) -> list[list[str]]:
    out = [["kernel", "format", *HEADINGS]]
    said = set()
    for group in _grouped([r for r in found if r["kernel"] != "attend_decode_kernel"], CALL).values():
        row = group[0]
        # Formats of which a kernel knows little are not worth a line each.
        key = (row["kernel"], row["dim"], row["format"] if row["primitive"] in ("prefill", "encode") else "")
        if key not in said and (row["dtype"] == "bfloat16" or row["primitive"] == "prefill"):
            said.add(key)
            out.append([f"`{row['kernel']}`", _label(row), *_cells(group)])
    return out


def _loops(found: list[Row]) -> list[list[str]]:
    kinds = ("load", "shared", "bits", "integer", "convert", "half", "float", "shuffle", "tensor")
    out = [["decode", "target", "G", "instructions", *kinds, "busy"]]
    for row in found:
        fits = row["kernel"] == "attend_decode_kernel" and row["target"] in GPUS and row["format"] in SHOWN
        if not fits or (row["dim"], row["dtype"], row["n_queries"]) != (128, "bfloat16", 1):
            continue
        mix = row["loop"]["mix"]
        each = row["num_warps"] * 32 / (row["tile"] * 2 * row["dim"])
        cells = [f"{mix.get(kind, 0) * each:.2f}" for kind in kinds]
        start = [f"`{row['format']}`", row["target"], str(row["group"]), f"{row['loop']['size'] * each:.2f}"]
        out.append([*start, *cells, f"{busy(row):.2f}"])
    return out


def busy(row: Row) -> float:
    """Return the predicted time of a processor's instructions over that of its bytes, in the loop over the body."""
    _, bandwidth, processors, clock = GPUS[row["target"]]
    mix = row["loop"]["mix"]
    whole = mix.get("bits", 0) + mix.get("integer", 0)
    cycles = row["num_warps"] * max(row["loop"]["size"] / ISSUED, whole / WHOLE_NUMBERS)
    return cycles / clock / (row["tile"] * row["row_bytes"] / (bandwidth / processors))


def _bytes(rows: list[Row]) -> list[list[str]]:
    out = [["call", "G", "rows", "needed, MB", "read / needed", "loaded / needed", "written / needed", "at best"]]
    for row in rows:
        needed = row["ideal"]
        best = f"{row['dense'] / (row['read'] + row['written']):.2f}x" if "dense" in row else ""
        group = str(row["group"]) if row["primitive"] in ("decode", "prefill", "column_sums") else ""
        name = row["primitive"] if row["primitive"] == "column_sums" else f"{row['primitive']} {_label(row)}"
        parts = [f"{row[kind] / needed:.3f}" for kind in ("read", "loaded", "written")]
        out.append([name, group, f"{row['rows']:,}", f"{needed / 1e6:.2f}", *parts, best])
    return out


# What was measured on GPUs

OPEN = """\
**No GPU has run this yet.** Every figure to reach is open: speed against the best bfloat16 attention, share of the copy
bandwidth, the cost of encoding, and the whole model.
"""


def measured(results: Sequence[Row]) -> str:
    """Return what runs of scripts/gpu_check.py found, in Markdown; that there is none, where there is none."""
    return "\n".join(map(_run, results)) or OPEN


def _run(document: Row) -> str:
    said = document["environment"]
    named = ("driver", "torch", "triton", "transformers", "python", "kvmlx")
    versions = ", ".join(f"{name} {said[name]}" for name in named if said.get(name))
    out = [f"### {said['device']}", "", f"{versions}. Medians of one layer's call.", ""]
    shapes = document["parts"].get("decode", {}).get("shapes", [])
    if shapes:
        out += [_table(_decoded(shapes)), ""]
    rows = [["figure to reach", "wanted", "measured", ""]]
    for line in document["verdict"]:
        sign = "<=" if line["at_most"] else ">="
        got = "" if line["got"] is None else f"{line['got']:.3g}"
        word = "open" if line["reached"] is None else "reached" if line["reached"] else "missed"
        rows.append([line["what"], f"{sign} {line['wanted']:g}", got, word])
    return "\n".join([*out, _table(rows), ""])


def _decoded(shapes: list[Row]) -> list[list[str]]:
    out = [["decode attention", *(f"{shape['tokens']:,} tokens, B={shape['batch']}" for shape in shapes)]]
    best = [f"{shape['best_ms'] * 1e3:.0f} us ({shape['best']})" if "best" in shape else "" for shape in shapes]
    out.append(["best bfloat16 baseline", *best])
    for name in dict.fromkeys(row["name"] for shape in shapes for row in shape.get("ours", [])):
        cells = []
        for shape in shapes:
            row = next((r for r in shape.get("ours", []) if r["name"] == name), None)
            if row is None or row["ms"] is None:
                cells.append("" if row is None else "wrong")
                continue
            share = f", {row['of_copy']:.0%} of copy" if row["of_copy"] else ""
            cells.append(f"{row['ms'] * 1e3:.0f} us, {row['speed_up']:.2f}x{share}")
        out.append([f"`{name}`", *cells])
    return out
