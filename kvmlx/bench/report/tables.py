"""The tables of a report, whatever they are written as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmlx.bench.records import Skip
from kvmlx.bench.report import words
from kvmlx.bench.summary import Cost, Drift, Name, Quality, Summary, TaskScore

AGREE = 0.1
"""How far bytes held may be from `nbytes` before it is marked: allocators round small arrays up."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One number or word."""

    text: str
    """A number comes first, since numeric columns are sorted by it; `words.NONE` comes last."""
    mark: str = ""
    """``better``, ``same``, ``worse``, ``bad`` or ``dim``."""
    heat: float | None = None
    """0 to 1: how full its colour is."""
    note: str = ""
    """More about it, shown when it is pointed at."""


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    help: str = ""
    """What it is, with its unit."""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    cells: tuple[Cell, ...]
    name: Name
    target: str = ""
    """What its button says; empty, as the two below, for a row that is of all."""
    mode: str = ""
    length: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Every row has a cell for each column."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


METHOD = Column("Method", "what was listed; its budget is tuned to the target", numeric=False)
TARGET = Column("Target", "full bytes / bytes, as asked for")
MODE = Column("Mode", "query-agnostic: compressed before the question is known; query-aware: with it", numeric=False)
LENGTH = Column("Length", "tokens of the prompt")
BYTES = Column("Bytes", "bytes kept of this context, % of the full 16-bit cache")
AS_RUN = Column("As it ran", "with the budget that it was given", numeric=False)


def overview(summary: Summary, mode: str) -> Table:
    """Return one mode's share of the full cache's score, all lengths pooled; the best methods first."""
    rows = [r for r in summary.pooled if r.mode == mode and r.score and not r.name.full]
    best: dict[float | None, float] = {}
    shares: dict[str, list[float]] = {}
    for r in rows:
        if r.complete and r.score:
            best[r.name.target] = max(best.get(r.name.target, 0.0), r.score.value)
        shares.setdefault(r.name.family, []).append(r.share or 0.0)
    rows.sort(key=lambda r: -sum(shares[r.name.family]) / len(shares[r.name.family]))
    cells = {r.name: _share(r, best.get(r.name.target)) for r in rows}
    return _pivot(f"overview-{mode}", cells, "share of the full cache's score", mode)


def drift_overview(summary: Summary, length: int) -> Table:
    """Return mean KL at one length."""
    rows = [d for d in summary.drifts if d.length == length and not d.name.full]
    return _pivot("overview-kl", {d.name: _kl(d) for d in rows}, "mean KL to the full cache, nats")


def speed_overview(summary: Summary, length: int, batch: int) -> Table:
    """Return the speed of decoding at one length and batch size."""
    rows = [c for c in summary.costs if (c.length, c.batch) == (length, batch) and not c.name.full]
    return _pivot("overview-speed", {c.name: _speed(c) for c in rows}, "tokens/s, times the full cache")


def _pivot(name: str, cells: dict[Name, Cell], help: str, mode: str = "") -> Table:
    """Return a row a family, a column a target."""
    targets = sorted({n.target for n in cells}, key=lambda t: (t is None, t or 0.0))
    missing = Cell(words.NONE, mark="dim")
    return Table(
        name=name,
        columns=(METHOD, *(Column(words.target(t), help) for t in targets)),
        rows=tuple(
            Row((Cell(f), *(cells.get(Name(f, t), missing) for t in targets)), Name(f, None), mode=mode)
            for f in dict.fromkeys(n.family for n in cells)
        ),
    )


def _share(row: Quality, best: float | None) -> Cell:
    assert row.score is not None
    mark = words.MARKS[row.verdict]
    star = "" if row.complete else "*"
    if row.name.target is None:
        star += f" at {words.percent(row.ratio)}"
    lead = row.name.target is not None and row.complete and row.score.value == best
    note = f"score {words.estimate(row.score)}, {row.score.samples} contexts; {words.verdict(row.verdict)}"
    text = f"{words.percent(row.share)}{star} {mark}".rstrip()
    return Cell(text, mark=f"{row.verdict or ''}{' best' if lead else ''}".strip(), note=note)


def quality(summary: Summary) -> Table:
    """Return scores, a row a method, mode and length, with the fidelity and speed of the same length beside."""
    drifts = {(d.name, d.length): d for d in summary.drifts}
    speeds = {(c.name, c.length): c for c in sorted(summary.costs, key=lambda c: -c.batch)}
    return Table(
        name="quality",
        columns=(
            METHOD,
            TARGET,
            MODE,
            LENGTH,
            BYTES,
            Column("Score", "mean of informative tasks, 0 to 1, with its 95% interval; ● on the Pareto front"),
            Column("Of full", "score / score of the full cache on the same questions"),
            Column("Verdict", "paired difference to the full cache", numeric=False),
            Column("n", "contexts, each with one question or more"),
            Column("KL mean", "nats, at this length"),
            Column("Speed", "tokens/s of decoding / tokens/s of the full cache, smallest batch"),
            AS_RUN,
        ),
        rows=tuple(
            _row(
                r,
                Cell(r.mode),
                _length(r.length),
                _bytes(r.ratio),
                _score(r),
                Cell(words.percent(r.share)),
                verdict_cell(r),
                _n(r),
                _kl(drifts.get((r.name, r.length or 0))),
                _speed(speeds.get((r.name, r.length or 0))),
                Cell(" / ".join(r.methods)),
            )
            for r in summary.rows
        ),
    )


def tasks(summary: Summary) -> Table:
    """Return the heat map: the score on each task, a row a method, mode and length."""
    names = task_names(summary)
    return Table(
        name="tasks",
        columns=(METHOD, TARGET, MODE, LENGTH, *(Column(t, "mean score, 0 to 1") for t in names)),
        rows=tuple(
            _row(
                r,
                Cell(r.mode),
                _length(r.length),
                *(_heat({t.task: t for t in r.tasks}.get(name)) for name in names),
            )
            for r in summary.rows
        ),
    )


def task_names(summary: Summary) -> list[str]:
    return list(dict.fromkeys(t.task for r in summary.rows for t in r.tasks))


def drifts(summary: Summary) -> Table:
    """Return fidelity, a row a method and length."""
    quarters = max((len(d.quarters) for d in summary.drifts), default=0)
    return Table(
        name="fidelity",
        columns=(
            METHOD,
            TARGET,
            LENGTH,
            BYTES,
            Column("KL mean", "KL(full || compressed) of the next token's distribution, nats, with its 95% interval"),
            Column("KL p99", "nats"),
            Column("KL max", "nats"),
            Column("Flips", "tokens whose likeliest next token is another one"),
            Column("Perplexity", "difference to the full cache's, on the text's own tokens"),
            *(Column(f"KL q{i}", f"mean KL in quarter {i} of the scored tokens") for i in range(1, quarters + 1)),
            Column("n", "scored tokens"),
            AS_RUN,
        ),
        rows=tuple(
            _row(
                d,
                _length(d.length),
                _bytes(d.ratio),
                _kl(d, interval=True),
                Cell(words.small(d.kl_p99)),
                Cell(words.small(d.kl_max)),
                Cell(words.percent(d.flips)),
                _perplexity(d),
                *(Cell(words.small(q)) for q in d.quarters),
                Cell(f"{d.tokens:,}"),
                Cell(" / ".join(d.methods)),
            )
            for d in summary.drifts
        ),
    )


def costs(summary: Summary) -> Table:
    """Return bytes and times, a row a method, length and batch size."""
    return Table(
        name="costs",
        columns=(
            METHOD,
            TARGET,
            LENGTH,
            Column("Batch", "sequences at once"),
            Column("MB", "what the caches say they hold (nbytes), 10^6 bytes"),
            Column("Of full", "nbytes / a full 16-bit cache of the same tokens"),
            Column("Held", "what the allocator says / nbytes"),
            Column("Peak MB", "most held during prefill beyond the weights, 10^6 bytes"),
            Column("TTFT s", "time to the first token: prefill, compression, one step; median [quartiles]"),
            Column("TTFT", "median / median of the full cache"),
            Column("Tokens/s", "decoding, all sequences together; median [quartiles]"),
            Column("Speed", "median / median of the full cache"),
            AS_RUN,
        ),
        rows=tuple(
            _row(
                c,
                _length(c.length),
                Cell(str(c.batch)),
                Cell(words.megabytes(c.nbytes)),
                _bytes(c.ratio),
                _held(c),
                Cell(words.megabytes(c.peak_bytes)),
                _quartiles(c.ttft_s, 3),
                Cell(words.times(c.ttft_of_full)),
                _quartiles(c.tokens_per_s, 1),
                _speed(c),
                Cell(" / ".join(c.methods)),
            )
            for c in summary.costs
        ),
    )


def skips(summary: Summary) -> Table:
    """Return what was not run, and why; one reason at several targets and lengths is one row."""
    groups: dict[tuple[str, str, str], list[Skip]] = {}
    for s in summary.skips:
        groups.setdefault((s.subject.family, s.what, s.reason), []).append(s)
    return Table(
        name="skips",
        columns=(
            METHOD,
            Column("Target", "full bytes / bytes, as asked for", numeric=False),
            Column("What", "which measurement", numeric=False),
            Column("Length", "tokens of the prompt", numeric=False),
            Column("Why", numeric=False),
        ),
        rows=tuple(
            Row(
                (Cell(family), _targets(group), Cell(what), _lengths(group), Cell(reason)),
                Name(family, None),
            )
            for (family, what, reason), group in groups.items()
        ),
    )


def all_tables(summary: Summary) -> list[Table]:
    """Return every table that has rows, in the order of a report."""
    modes = dict.fromkeys(r.mode for r in summary.rows)
    tables = [*(overview(summary, m) for m in modes), quality(summary), tasks(summary), drifts(summary), costs(summary)]
    return [t for t in (*tables, skips(summary)) if t.rows]


# -- cells ----------------------------------------------------------------------------------------------------


def _row(row: Quality | Drift | Cost, *cells: Cell) -> Row:
    """Return a row that begins with the method's names."""
    target = "" if row.name.full else words.target(row.name.target)
    mode = row.mode if isinstance(row, Quality) else ""
    return Row((Cell(row.name.family), _target(row.name), *cells), row.name, target, mode, str(row.length))


def _target(name: Name) -> Cell:
    return Cell(words.target(1) if name.full else words.NONE if name.target is None else words.target(name.target))


def _length(length: int | None) -> Cell:
    return Cell(f"{length:,}" if length else "all")


def _targets(group: Iterable[Skip]) -> Cell:
    targets = sorted({s.subject.target for s in group if s.subject.target is not None})
    return Cell(", ".join(words.target(t) for t in targets) or words.NONE)


def _lengths(group: Iterable[Skip]) -> Cell:
    lengths = sorted({s.length for s in group if s.length is not None})
    return Cell(", ".join(f"{n:,}" for n in lengths) or "all")


def _bytes(ratio: float) -> Cell:
    return Cell(words.percent(ratio))


def _score(row: Quality) -> Cell:
    if row.score is None:
        return Cell(words.NONE, mark="dim", note="the full cache fails on every task here")
    front = " ●" if row.front else ""
    return Cell(words.estimate(row.score) + front)


def verdict_cell(row: Quality) -> Cell:
    if row.name.full:
        return Cell("full", mark="dim")
    if row.verdict is None:
        return Cell(words.NONE, mark="dim", note=words.verdict(None))
    note = f"difference to full {row.difference.value:+.3f}{words.interval(row.difference)}" if row.difference else ""
    return Cell(f"{words.MARKS[row.verdict]} {row.verdict}", mark=row.verdict, note=note)


def _n(row: Quality) -> Cell:
    if row.score is None:
        return Cell(words.NONE)
    star = "" if row.complete else "*"
    note = f"{row.score.questions} questions" + ("; not complete, so not comparable with other rows" if star else "")
    return Cell(f"{row.score.samples}{star}", note=note)


def _kl(drift: Drift | None, *, interval: bool = False) -> Cell:
    if drift is None:
        return Cell(words.NONE)
    if drift.unused:
        return Cell("0 – not used", mark="bad", note="a lossy method without any drift: its cache was not used")
    text = words.small(drift.kl.value)
    if interval and drift.kl.low is not None:
        text += f" [{words.small(drift.kl.low)}, {words.small(drift.kl.high)}]"
    return Cell(text)


def _perplexity(drift: Drift) -> Cell:
    value = drift.perplexity - drift.full_perplexity
    return Cell(f"{value:+.3f}")


def _heat(task: TaskScore | None) -> Cell:
    if task is None:
        return Cell(words.NONE, mark="dim")
    if not task.informative:
        return Cell(f"({task.mean:.2f})", mark="dim")
    return Cell(f"{task.mean:.2f}", heat=min(1.0, max(0.0, task.mean)))


def _held(cost: Cost) -> Cell:
    value = cost.held_of_nbytes
    if value is None:
        return Cell(words.NONE, note="the allocator does not tell")
    return Cell(words.percent(value), mark="bad" if abs(value - 1) > AGREE else "")


def _quartiles(value: tuple[float, float, float] | None, digits: int) -> Cell:
    if value is None:
        return Cell(words.NONE)
    low, middle, high = value
    return Cell(f"{middle:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]")


def _speed(cost: Cost | None) -> Cell:
    return Cell(words.times(cost.speed_of_full if cost else None))
