"""Results as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from kvmlx.bench.records import Results
from kvmlx.bench.report import tables, words
from kvmlx.bench.report.about import facts, notes, started, title
from kvmlx.bench.report.findings import best, findings
from kvmlx.bench.report.tables import Table
from kvmlx.bench.statistics import Estimate
from kvmlx.bench.summary import Name, Quality, Summary, summarize

MEASURES = {
    "bytes_of_full": ("ratio", "bytes kept of a context / bytes of the full 16-bit cache"),
    "score": ("0 to 1", "mean of informative tasks; low, high: 95% interval; n: contexts"),
    "score_difference": ("0 to 1", "score - score of the full cache on the same questions, paired"),
    "score_of_full": ("ratio", "score / score of the full cache on the same questions"),
    "task_score": ("0 to 1", "mean score on a task; n: contexts"),
    "task_informative": ("0 or 1", "whether the full cache scores enough on the task for it to be averaged in"),
    "kl_mean": ("nats", "mean KL(full || compressed) of the next token's distribution; n: tokens"),
    "kl_p99": ("nats", "99th percentile of the same"),
    "kl_max": ("nats", "its largest value"),
    "kl_quarter": ("nats", "its mean in one quarter of the scored tokens; task: which"),
    "flips": ("ratio", "share of tokens whose likeliest next token is another one"),
    "perplexity_difference": ("perplexity", "perplexity - perplexity of the full cache on the text's own tokens"),
    "nbytes": ("bytes", "what the caches say they hold"),
    "held_bytes": ("bytes", "what the allocator says they hold"),
    "peak_bytes": ("bytes", "the most held during prefill beyond the weights"),
    "ttft": ("s", "time to the first token, median; low, high: quartiles"),
    "ttft_of_full": ("ratio", "median / median of the full cache"),
    "tokens_per_s": ("1/s", "decoding, all sequences together, median; low, high: quartiles"),
    "speed_of_full": ("ratio", "median / median of the full cache"),
}
"""The measures of the CSV: unit and meaning."""

COLUMNS = (
    "family", "target", "method", "mode", "length", "batch", "task",
    "measure", "unit", "value", "low", "high", "n", "verdict",
)  # fmt: skip
"""Of the CSV, which has one number a line. What does not apply is empty; length is empty where all are pooled."""


def to_json(results: Results) -> str:
    """Return everything that a report says as one JSON document; units as in `MEASURES`."""
    summary = summarize(results)
    document = {
        "title": title(results),
        "runs": results.runs,
        "findings": findings(summary),
        **plain(summary),
    }
    return json.dumps(document, indent=1, ensure_ascii=False, default=list)


def plain(value: Any) -> Any:
    """Return dataclasses as dictionaries, their properties included."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value)]
        names += [n for n, p in vars(type(value)).items() if isinstance(p, property)]
        return {n: plain(getattr(value, n)) for n in names}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def to_csv(results: Results) -> str:
    """Return one number a line, with the columns `COLUMNS` and the measures `MEASURES`."""
    out = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in _numbers(summarize(results)):
        writer.writerow(cells(row))
    return out.getvalue()


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a CSV: nothing for None, ten digits of a number."""
    return {k: "" if v is None else f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()}


def _numbers(summary: Summary) -> Iterator[dict[str, Any]]:
    for row in (*summary.rows, *summary.pooled):
        yield from _quality_numbers(row)
    for d in summary.drifts:
        place = _place(d.name, d.methods) | {"length": d.length}
        yield place | _number("bytes_of_full", d.ratio)
        yield place | _estimate("kl_mean", d.kl) | {"n": d.tokens}
        values = {"kl_p99": d.kl_p99, "kl_max": d.kl_max, "flips": d.flips}
        values["perplexity_difference"] = d.perplexity - d.full_perplexity
        yield from (place | _number(k, v) | {"n": d.tokens} for k, v in values.items())
        yield from (place | _number("kl_quarter", q) | {"task": f"quarter {i}"} for i, q in enumerate(d.quarters, 1))
    for c in summary.costs:
        place = _place(c.name, c.methods) | {"length": c.length, "batch": c.batch}
        sizes = {"nbytes": c.nbytes, "held_bytes": c.held_bytes, "peak_bytes": c.peak_bytes}
        ratios = {"bytes_of_full": c.ratio, "ttft_of_full": c.ttft_of_full, "speed_of_full": c.speed_of_full}
        yield from (place | _number(k, v) for k, v in (sizes | ratios).items() if v is not None)
        for measure, times in (("ttft", c.ttft_s), ("tokens_per_s", c.tokens_per_s)):
            if times is not None:
                yield place | _number(measure, times[1]) | {"low": times[0], "high": times[2]}


def _quality_numbers(row: Quality) -> Iterator[dict[str, Any]]:
    place = _place(row.name, row.methods) | {"mode": row.mode, "length": row.length}
    yield place | _number("bytes_of_full", row.ratio)
    if row.score is not None:
        yield place | _estimate("score", row.score)
        yield place | _number("score_of_full", row.share)
    if row.difference is not None:
        yield place | _estimate("score_difference", row.difference) | {"verdict": row.verdict}
    if row.length is not None:
        for t in row.tasks:
            yield place | _number("task_score", t.mean) | {"task": t.task, "n": t.samples}
            yield place | _number("task_informative", int(t.informative)) | {"task": t.task}


def _place(name: Name, methods: Sequence[str]) -> dict[str, Any]:
    return {"family": name.family, "target": name.target, "method": " / ".join(methods)}


def _number(measure: str, value: float | None) -> dict[str, Any]:
    return {"measure": measure, "unit": MEASURES[measure][0], "value": value}


def _estimate(measure: str, value: Estimate) -> dict[str, Any]:
    return _number(measure, value.value) | {"low": value.low, "high": value.high, "n": value.samples}


def to_md(results: Results) -> str:
    """Return the report as GitHub's Markdown."""
    summary = summarize(results)
    machine, settings, commands = facts(results)
    parts = [f"# {_escape(title(results))}", _escape(started(results))]
    parts += [f"**Error: {_escape(e)}**" for e in summary.errors]
    said = findings(summary)
    parts += ["## What to read first", "\n".join(f"- {_sentence(s)}" for s in said)] if said else []
    for mode in dict.fromkeys(r.mode for r in summary.pooled):
        heading = f"## {_escape(words.mode(mode)).capitalize()}: share of the full cache's score"
        parts += _part(heading, tables.overview(summary, mode))
    parts += _part("## The highest score at each compression", best(results, summary))
    parts += _part("## Quality", tables.quality(summary))
    parts += _part("## Tasks", tables.tasks(summary))
    parts += _part("## Fidelity", tables.drifts(summary))
    parts += _part("## Costs", tables.costs(summary))
    parts += _part("## Not run", tables.skips(summary))
    parts += ["## How to reproduce", *map(_fenced, commands)]
    parts += ["## Machine and settings", "\n".join(f"- {_escape(k)}: {_escape(v)}" for k, v in (*machine, *settings))]
    parts += ["## How it was measured", *notes()]
    return "\n\n".join(parts) + "\n"


def _part(heading: str, table: Table) -> list[str]:
    if not table.rows:
        return []
    legend = "; ".join(f"{c.title}: {c.help}" for c in table.columns if c.help and c is not tables.METHOD)
    same = len({c.help for c in table.columns[1:]}) == 1
    return [heading, table_md(table), *([] if same else [_escape(legend) + "."])]


def table_md(table: Table) -> str:
    """Return a table; names are code, which keeps them as they are."""
    lines = [_line(_escape(c.title) for c in table.columns)]
    lines.append(_line("---:" if c.numeric else "---" for c in table.columns))
    for row in table.rows:
        cells = zip(row.cells, table.columns, strict=True)
        lines.append(_line(_escape(c.text) if col.numeric or not _is_name(col) else _code(c.text) for c, col in cells))
    return "\n".join(lines)


def _is_name(column: tables.Column) -> bool:
    return column in (tables.METHOD, tables.AS_RUN)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"


def _fenced(text: str) -> str:
    """Return a code block; its fence is longer than any run of backticks within."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _escape(text: str) -> str:
    """Return text that Markdown takes as it is."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    for mark in "\\`*_|[]":
        text = text.replace(mark, "\\" + mark)
    return text


def _sentence(text: str) -> str:
    """Escape a sentence but for what is in backticks."""
    parts = text.split("`")
    return "`".join(p if i % 2 else _escape_between(p) for i, p in enumerate(parts))


def _escape_between(text: str) -> str:
    start, end = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return start + _escape(text) + end if text.strip() else text
