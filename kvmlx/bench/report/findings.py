"""What the numbers say, in plain sentences: only what the intervals allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from kvmlx.bench.records import Results, Score
from kvmlx.bench.report import words
from kvmlx.bench.report.tables import MODE, TARGET, Cell, Column, Row, Table, verdict_cell
from kvmlx.bench.summary import Name, Quality, Summary, difference, informative_tasks, label, name_of

NAMED = 3
"""Methods that a sentence names before it counts the others."""


def findings(summary: Summary) -> list[str]:
    """Return sentences, the most important first; names are in backticks."""
    out = []
    for mode in dict.fromkeys(r.mode for r in summary.pooled):
        out += _without_loss(mode, [r for r in summary.pooled if r.mode == mode and _ranked(r)])
    return out + _drift(summary) + _speed(summary) + _small(summary)


def best(results: Results, summary: Summary) -> Table:
    """Return who scores highest at each target, all lengths pooled, and who cannot be told from it."""
    scores = results.of(Score)
    known = informative_tasks(scores)
    own: dict[tuple[str, Name], list[Score]] = defaultdict(list)
    for s in scores:
        if (s.mode, s.length, s.task) in known:
            own[s.mode, name_of(s.subject)].append(s)
    groups: dict[tuple[str, float], list[Quality]] = defaultdict(list)
    for r in summary.pooled:
        if r.name.target is not None and _ranked(r):
            groups[r.mode, r.name.target].append(r)
    return Table(
        name="best",
        columns=(
            MODE,
            TARGET,
            Column("Highest score", "all lengths pooled", numeric=False),
            Column("Of full", "score / score of the full cache on the same questions"),
            Column("Verdict", "paired difference to the full cache", numeric=False),
            Column("Level with it", "the interval of the paired difference to it includes 0", numeric=False),
            Column("Below it", "methods that are worse than it"),
        ),
        rows=tuple(_best(mode, target, group, own) for (mode, target), group in _in_order(groups)),
    )


def _in_order(groups: dict[tuple[str, float], list[Quality]]) -> list[tuple[tuple[str, float], list[Quality]]]:
    modes = list(dict.fromkeys(mode for mode, _ in groups))
    return sorted(groups.items(), key=lambda item: (modes.index(item[0][0]), item[0][1]))


def _ranked(row: Quality) -> bool:
    return row.score is not None and row.complete and not row.name.full


def _best(mode: str, target: float, rows: list[Quality], scores: dict[tuple[str, Name], list[Score]]) -> Row:
    rows = sorted(rows, key=lambda r: -(r.score.value if r.score else 0.0))
    highest, others = rows[0], rows[1:]
    gaps = [(r, difference(scores[mode, r.name], scores[mode, highest.name])) for r in others]
    level = [r for r, gap in gaps if gap is not None and (gap.high is None or gap.high >= 0)]
    families = ", ".join(r.name.family for r in level) or words.NONE
    below = len(others) - len(level)
    return Row(
        (
            Cell(mode),
            Cell(words.target(target)),
            Cell(highest.name.family),
            Cell(words.percent(highest.share)),
            verdict_cell(highest),
            Cell(families),
            Cell(str(below)),
        ),
        highest.name,
        words.target(target),
        mode,
    )


def _without_loss(mode: str, rows: Sequence[Quality]) -> list[str]:
    """Say how far the cache can be compressed before every method is worse."""
    judged = [r for r in rows if r.verdict is not None]
    if not judged:
        return []
    level = sorted((r for r in judged if r.verdict != "worse"), key=lambda r: r.ratio)
    if not level:
        return [f"{_mode(mode)}: every method is worse than the full cache."]
    least = level[0]
    near = [r for r in level if r.ratio <= least.ratio * 1.1]
    worse = [r for r in judged if r.verdict == "worse" and r.ratio >= least.ratio / 1.1]
    also = f" (so {'does' if len(near) == 2 else 'do'} {_names(near[1:])})" if len(near) > 1 else ""
    text = (
        f"{_mode(mode)}: {_code(least)} keeps {words.percent(least.ratio)} of the bytes, the fewest with which the "
        f"score cannot be told from the full cache's{also}."
    )
    others = (
        "1 other with as many bytes or more is"
        if len(worse) == 1
        else f"{len(worse)} others with as many bytes or more are"
    )
    return [text + (f" {others} worse." if worse else "")]


def _drift(summary: Summary) -> list[str]:
    out = []
    targets = sorted({d.name.target for d in summary.drifts if d.name.target is not None})
    for target in targets:
        means: dict[str, list[float]] = defaultdict(list)
        for d in summary.drifts:
            if d.name.target == target and not d.unused:
                means[d.name.family].append(d.kl.value)
        lengths = max((len(v) for v in means.values()), default=0)
        means = {f: v for f, v in means.items() if len(v) == lengths}
        if means:
            family = min(means, key=lambda f: sum(means[f]))
            value = sum(means[family]) / lengths
            out.append(f"{_quoted(family)} {words.small(value)} at {words.target(target)}")
    return [f"Least drift of the next token's distribution (mean KL, nats): {', '.join(out)}."] if out else []


def _speed(summary: Summary) -> list[str]:
    """Say who decodes fastest at the greatest length, for each batch size."""
    timed = [c for c in summary.costs if c.speed_of_full is not None and not c.name.full]
    if not timed:
        return []
    length = max(c.length for c in timed)
    out = []
    for batch in sorted({c.batch for c in timed if c.length == length}):
        rows = [c for c in timed if (c.length, c.batch) == (length, batch)]
        best = max(rows, key=lambda c: c.speed_of_full or 0.0)
        faster = sum((c.speed_of_full or 0.0) > 1 for c in rows)
        said = f"{_quoted(label(best.name))} ({words.times(best.speed_of_full)})"
        out.append(
            f"{said}, {faster} of {len(rows)} are faster" if faster else f"none is faster, the nearest is {said}"
        )
        out[-1] = f"batch {batch}: {out[-1]}"
    return [f"Fastest decoding at {words.tokens(length)}, against the full cache: {'; '.join(out)}."]


def _small(summary: Summary) -> list[str]:
    """Say so where nothing can be said."""
    few = [r for r in summary.pooled if r.score and not r.name.full]
    if few and all(r.verdict is None for r in few):
        return ["Too few contexts for verdicts: run again with more --samples."]
    return []


def _mode(mode: str) -> str:
    return words.mode(mode).capitalize()


def _code(row: Quality) -> str:
    return _quoted(label(row.name))


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "'") + "`"


def _names(rows: Sequence[Quality]) -> str:
    names = [_code(r) for r in rows[:NAMED]]
    if len(rows) > NAMED:
        names.append(f"{len(rows) - NAMED} more")
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
