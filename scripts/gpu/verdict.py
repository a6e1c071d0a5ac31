"""What the results say: what is wrong, which of the figures to reach were reached, and the short table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.gpu.run import Run

DECODE = {
    "4 bits": (("int4",), (2.2, 2.5, 3.0)),
    "2 bits (or 3)": (("int2", "int3"), (3.0, 3.5, 4.5)),
    "a quarter of the tokens, 4 bits": (("int4, a quarter of the tokens",), (6.0, 7.0, 10.0)),
}
"""Formats of which the fastest counts, and the speed-ups over the best bf16 baseline to reach, by shape."""
OF_COPY = 0.75
ENCODE_SHARE = 0.05
MODEL_SPEED_UP = 1.3
KV_RATIO = 0.30


@dataclass(frozen=True)
class Line:
    """One figure to reach."""

    what: str
    wanted: float
    got: float | None
    """None: not measured."""
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.wanted if self.at_most else self.got >= self.wanted

    def as_dict(self) -> dict[str, Any]:
        said = {"what": self.what, "wanted": self.wanted, "got": self.got, "at_most": self.at_most}
        return said | {"reached": self.reached, "note": self.note}

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        note = f" ({self.note})" if self.note else ""
        if self.got is None:
            return f"{'not measured':<15}{self.what} {sign} {self.wanted:g}"
        missed = abs(self.got / self.wanted - 1)
        word = "reached" if self.reached else f"MISSED by {missed:.0%}"
        return f"{word:<15}{self.what}: {self.got:.3g} {sign} {self.wanted:g}{note}"


def judge(run: Run) -> list[dict[str, Any]]:
    return [line.as_dict() for line in figures(run)]


def figures(run: Run) -> Iterator[Line]:
    parts = run.document["parts"]
    shapes = {(s["tokens"], s["batch"]): s for s in parts.get("decode", {}).get("shapes", [])}
    for what, (formats, wanted) in DECODE.items():
        for (tokens, batch), least in zip(run.sizes.shapes, wanted, strict=False):
            rows = [r for r in shapes.get((tokens, batch), {}).get("ours", []) if r["name"] in formats and r["ms"]]
            best = max(rows, key=lambda r: r["speed_up"], default=None)
            name = f"decode, {what}, {thousands(tokens)}, B={batch}, x of best bf16"
            yield Line(name, least, best["speed_up"] if best else None, note=best["name"] if best else "")
    last = shapes.get(run.sizes.shapes[-1], {}).get("ours", [])
    share = next((r["of_copy"] for r in last if r["name"] == "int4" and r["ms"]), None)
    yield Line("int4 at the longest history, of the copy bandwidth", OF_COPY, share)
    for chunk in parts.get("encode", {}).get("chunks", []) or [None]:
        rows = [] if chunk is None else [r for r in chunk["formats"] if r["format"] == "int4"]
        name = "encode to int4, of a layer's prefill" + (f" of {chunk['new']}" if chunk else "")
        yield Line(name, ENCODE_SHARE, rows[0]["of_layer"] if rows else None, at_most=True)
    yield from _model(parts.get("model", {}))


def _model(found: dict[str, Any]) -> Iterator[Line]:
    """The whole model: each batch against the better of transformers' own caches."""
    batches = found.get("batches", [])
    if not batches:
        yield Line("whole model, decode tokens/s, x of bf16", MODEL_SPEED_UP, None)
        yield Line("whole model, KV memory of bf16", KV_RATIO, None, at_most=True)
        yield Line("whole model, peak of prefill of bf16", 1.0, None, at_most=True)
    for row in batches:
        at = f"B={row['batch']}"
        for how in ("eager", "graph"):
            got = row.get(f"speed_up_{how}")
            if got is not None or how == "eager":
                yield Line(f"whole model, {at}, decode tokens/s ({how}), x of bf16", MODEL_SPEED_UP, got)
        yield Line(f"whole model, {at}, KV memory of bf16", KV_RATIO, row.get("kv_ratio"), at_most=True)
        yield Line(f"whole model, {at}, peak of prefill of bf16", 1.0, row.get("peak_ratio"), at_most=True)


def wrong(run: Run) -> list[str]:
    """Return what is incorrect or could not run; a figure that was missed is neither."""
    parts = run.document["parts"]
    out = [f"{name}: {text}" for name, text in run.document["problems"].items() if not text.startswith("left out")]
    for name in ("selftest", "pytest", "sanitizer"):
        out += [f"{name}: {text}" for text in parts.get(name, {}).get("failed", [])]
    rows = [r for key, group in (("decode", "shapes"), ("prefill", "chunks")) for r in _rows(parts.get(key, {}), group)]
    rows += [r for key in ("column_sums", "compact", "graph", "sweep") for r in parts.get(key, {}).get("rows", [])]
    rows += parts.get("model", {}).get("batches", [])
    out += [f"{r.get('name') or r.get('format') or r}: {r['wrong']}" for r in rows if r.get("wrong")]
    return out


def _rows(found: dict[str, Any], group: str) -> Iterator[dict[str, Any]]:
    for part in found.get(group, []):
        yield from part.get("ours", [])


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines of columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    out = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        out.append("  ".join(cells).rstrip())
    return out


def lines(run: Run) -> Iterator[str]:
    """Yield the end of the output: what a reader far away sees."""
    document = run.document
    yield "\n== result"
    said = document["environment"]
    yield f"{said['device']}; torch {said['torch']}, triton {said['triton']}, kvmlx {said['kvmlx']}"
    if run.dry:
        yield "DRY RUN: interpreted on the CPU; every time below is meaningless"
    shapes = document["parts"].get("decode", {}).get("shapes", [])
    if shapes:
        yield from _decode_table(shapes)
    for name, reason in document["problems"].items():
        if reason.startswith("left out"):
            yield f"{name} {reason}"
    for line in figures(run):
        yield str(line)
    checks = document["parts"].get("selftest", {})
    if "checks" in checks:
        failed, worst = len(checks["failed"]), checks["worst"]
        yield f"selftest: {checks['checks']} checks, {failed} failed; worst error {worst:.2f} of its limit"
    for name in ("pytest", "sanitizer"):
        part = document["parts"].get(name, {})
        if part:
            tools = [f"{k}: {part[k]}" for k in ("memcheck", "racecheck") if part.get(k)]
            yield f"{name}: {'; '.join([*tools, *(part[k] for k in ('summary', 'skipped') if part.get(k))])}"
    faults = wrong(run)
    for fault in faults[:12]:
        yield f"WRONG {fault[:300]}"
    ran = "selftest" in document["parts"]
    yield f"correctness: {'FAILED' if faults else 'passed' if ran else 'only what was timed was checked'}"


def _decode_table(shapes: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(r["name"] for shape in shapes for r in shape.get("ours", [])))
    header = ["decode attention, us and x of best", *(f"{thousands(s['tokens'])} B={s['batch']}" for s in shapes)]
    best = [f"{s['best']} {s['best_ms'] * 1e3:.0f}" if "best" in s else "-" for s in shapes]
    rows = [["best bf16 baseline", *best]]
    for name in names:
        cells = []
        for shape in shapes:
            row = next((r for r in shape.get("ours", []) if r["name"] == name), None)
            if row is None:
                cells.append("-")
            elif row["ms"] is None:
                cells.append("WRONG")
            else:
                share = f" {row['of_copy']:.0%}" if row["of_copy"] else ""
                cells.append(f"{row['ms'] * 1e3:.1f} {row['speed_up']:.2f}x{share}")
        rows.append([name, *cells])
    yield from table(header, rows)
