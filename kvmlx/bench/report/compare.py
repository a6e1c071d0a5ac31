"""Two results files beside each other: what changed, on the same questions where there are any."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmlx.bench.records import Fidelity, Results, Score
from kvmlx.bench.report import words
from kvmlx.bench.report.about import facts
from kvmlx.bench.report.tables import LENGTH, METHOD, MODE, TARGET, Cell, Column, Row, Table
from kvmlx.bench.report.text import MEASURES, cells, table_md
from kvmlx.bench.statistics import Estimate, Verdict, estimate, verdict
from kvmlx.bench.summary import Cost, Name, informative_tasks, name_of, strata_of, summarize

COLUMNS = (
    "family", "target", "mode", "length", "batch",
    "measure", "unit", "a", "b", "difference", "low", "high", "n", "verdict",
)  # fmt: skip
"""Of the CSV, one change a line; difference is b - a."""


@dataclass(frozen=True, slots=True)
class Change:
    """One measure of one method, in both files."""

    name: Name
    mode: str
    length: int
    batch: int | None
    measure: str
    """One of `text.MEASURES`."""
    a: float
    b: float
    difference: Estimate | None
    """b - a, paired; None where nothing is paired."""
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two results files have in common, and what not."""

    settings: tuple[tuple[str, str, str], ...]
    """What differs of the settings and the machine: name, in a, in b."""
    changes: tuple[Change, ...]
    only_a: tuple[Name, ...]
    only_b: tuple[Name, ...]


def compare(a: Results, b: Results) -> Comparison:
    """Compare two results files.

    Scores are compared on the questions that both asked, known by their place and answers, of tasks that are
    informative in either file. Fidelity is compared on the texts on which the full cache had the same numbers of
    tokens. Costs are compared as they are.
    """
    names_a, names_b = _names(a), _names(b)
    return Comparison(
        settings=tuple(_settings(a, b)),
        changes=(*_scores(a, b), *_drifts(a, b), *_costs(a, b)),
        only_a=tuple(n for n in names_a if n not in names_b),
        only_b=tuple(n for n in names_b if n not in names_a),
    )


def _names(results: Results) -> list[Name]:
    return list(dict.fromkeys(name_of(r.subject) for r in results.records))


def _settings(a: Results, b: Results) -> Iterable[tuple[str, str, str]]:
    for ours, theirs in zip(facts(a)[:2][::-1], facts(b)[:2][::-1], strict=True):
        left, right = dict(ours), dict(theirs)
        for name in dict.fromkeys((*left, *right)):
            if left.get(name) != right.get(name):
                yield name, left.get(name, words.NONE), right.get(name, words.NONE)


def _scores(a: Results, b: Results) -> Iterable[Change]:
    known = informative_tasks(a.of(Score)) | informative_tasks(b.of(Score))
    theirs = {(name_of(s.subject), s.place, s.answers): s.score for s in b.of(Score)}
    groups: dict[tuple[Name, str, int], list[tuple[Score, float]]] = defaultdict(list)
    for s in a.of(Score):
        other = theirs.get((name_of(s.subject), s.place, s.answers))
        if other is not None and (s.mode, s.length, s.task) in known:
            groups[name_of(s.subject), s.mode, s.length].append((s, other))
    for (name, mode, length), pairs in groups.items():
        before, after = estimate(strata_of((s, s.score) for s, _ in pairs)), estimate(strata_of(pairs))
        change = estimate(strata_of((s, other - s.score) for s, other in pairs))
        assert before is not None and after is not None
        yield Change(name, mode, length, None, "score", before.value, after.value, change, verdict(change))


def _drifts(a: Results, b: Results) -> Iterable[Change]:
    def key(f: Fidelity) -> tuple[Any, ...]:
        return name_of(f.subject), f.place, len(f.kl)

    theirs = {key(f): f for f in b.of(Fidelity)}
    groups: dict[tuple[Name, int], list[tuple[Fidelity, Fidelity]]] = defaultdict(list)
    for f in a.of(Fidelity):
        if key(f) in theirs:
            groups[name_of(f.subject), f.length].append((f, theirs[key(f)]))
    for (name, length), pairs in groups.items():
        for measure, of in (("kl_mean", lambda f: f.kl), ("flips", lambda f: f.flips)):
            before, after = (estimate([[of(pair[i]) for pair in pairs]]) for i in (0, 1))
            change = estimate([[[y - x for x, y in zip(of(p), of(q), strict=True)] for p, q in pairs]])
            assert before is not None and after is not None
            yield Change(name, "", length, None, measure, before.value, after.value, change, _less_is_better(change))


def _less_is_better(change: Estimate | None) -> Verdict | None:
    turned: dict[Verdict | None, Verdict | None] = {"better": "worse", "worse": "better"}
    said = verdict(change)
    return turned.get(said, said)


def _costs(a: Results, b: Results) -> Iterable[Change]:
    theirs = {(c.name, c.length, c.batch): c for c in summarize(Results(b.runs, b.records)).costs}
    for c in summarize(a).costs:
        other = theirs.get((c.name, c.length, c.batch))
        if other is None:
            continue
        for measure, before in _cost_numbers(c).items():
            after = _cost_numbers(other)[measure]
            if before is not None and after is not None:
                yield Change(c.name, "", c.length, c.batch, measure, before, after, None, None)


def _cost_numbers(c: Cost) -> dict[str, float | None]:
    return {
        "nbytes": c.nbytes,
        "peak_bytes": c.peak_bytes,
        "ttft": c.ttft_s and c.ttft_s[1],
        "tokens_per_s": c.tokens_per_s and c.tokens_per_s[1],
    }


# -- formats --------------------------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return what differs in the settings first, then what changed, then what only one file has."""
    both = [("a", comparison.only_a), ("b", comparison.only_b)]
    tables = [
        Table(
            "settings",
            (Column("Setting", numeric=False), Column("a", numeric=False), Column("b", numeric=False)),
            tuple(Row(tuple(map(Cell, s)), Name(s[0], None)) for s in comparison.settings),
        ),
        _change_table("score", [c for c in comparison.changes if c.measure == "score"]),
        _change_table("fidelity", [c for c in comparison.changes if c.measure in ("kl_mean", "flips")]),
        _change_table("costs", [c for c in comparison.changes if c.batch is not None]),
        Table(
            "only in one",
            (METHOD, TARGET, Column("only in", numeric=False)),
            tuple(
                Row((Cell(n.family), Cell(words.target(n.target)), Cell(side)), n)
                for side, names in both
                for n in names
            ),
        ),
    ]
    return [t for t in tables if t.rows]


def _change_table(name: str, changes: Sequence[Change]) -> Table:
    measure = Column("Measure", numeric=False)
    gap = Column("b - a", "with its 95% interval")
    end = (Column("a"), Column("b"), gap, Column("b / a"), Column("n", "contexts"), Column("Verdict", numeric=False))
    return Table(name, (METHOD, TARGET, MODE, LENGTH, Column("Batch"), measure, *end), tuple(map(_change_row, changes)))


def _change_row(c: Change) -> Row:
    gap = f"{_gap(c):+.4g}" + words.interval(c.difference)
    said = f"{words.MARKS[c.verdict]} {c.verdict}" if c.verdict else words.NONE
    return Row(
        (
            Cell(c.name.family),
            Cell(words.NONE if c.name.full else words.target(c.name.target)),
            Cell(c.mode or words.NONE),
            Cell(f"{c.length:,}"),
            Cell(str(c.batch or words.NONE)),
            Cell(f"{c.measure}, {MEASURES[c.measure][0]}"),
            Cell(f"{c.a:,.4g}"),
            Cell(f"{c.b:,.4g}"),
            Cell(gap),
            Cell(f"{c.b / c.a:.3f}" if c.a else words.NONE),
            Cell(str(c.difference.samples) if c.difference else words.NONE),
            Cell(said, mark=c.verdict or "dim"),
        ),
        c.name,
    )


def _gap(c: Change) -> float:
    return c.difference.value if c.difference else c.b - c.a


def comparison_md(comparison: Comparison) -> str:
    """Return a comparison as GitHub's Markdown."""
    parts = ["# kvmlx bench: b against a"]
    if not comparison.settings:
        parts.append("Settings, machine and versions are the same.")
    for table in comparison_tables(comparison):
        parts += [f"## {table.name.capitalize()}", table_md(table)]
    return "\n\n".join(parts) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """Return one change a line, with the columns `COLUMNS`."""
    out = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in _lines(comparison):
        writer.writerow(cells(line))
    return out.getvalue()


def comparison_json(comparison: Comparison) -> str:
    """Return a comparison as one JSON document."""
    document = {
        "settings": [{"name": n, "a": a, "b": b} for n, a, b in comparison.settings],
        "changes": list(_lines(comparison)),
        "only_a": [{"family": n.family, "target": n.target} for n in comparison.only_a],
        "only_b": [{"family": n.family, "target": n.target} for n in comparison.only_b],
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def _lines(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for c in comparison.changes:
        d = c.difference
        yield {
            "family": c.name.family,
            "target": c.name.target,
            "mode": c.mode or None,
            "length": c.length,
            "batch": c.batch,
            "measure": c.measure,
            "unit": MEASURES[c.measure][0],
            "a": c.a,
            "b": c.b,
            "difference": _gap(c),
            "low": d and d.low,
            "high": d and d.high,
            "n": d and d.samples,
            "verdict": c.verdict,
        }
