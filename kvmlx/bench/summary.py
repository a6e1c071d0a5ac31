"""What the records of a benchmark say: rows of quality, fidelity and costs, each beside the full cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from kvmlx.bench.records import FULL, Costs, Fidelity, Results, Score, Skip, Subject
from kvmlx.bench.statistics import Estimate, Verdict, estimate, quartiles, verdict

INFORMATIVE = 0.5
"""Mean score that the full cache must reach on a task at a length for the task to be averaged in."""
QUARTERS = 4
"""Parts of the scored tokens, in order, for which fidelity is told apart."""

Quartiles = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Name:
    """What a row is about."""

    family: str
    target: float | None
    """Compression that the budget was tuned to; None: as it was written."""

    @property
    def full(self) -> bool:
        return self.family == FULL


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One method on one task at one length."""

    task: str
    length: int
    mean: float
    full: float | None
    """The full cache's mean on the same questions."""
    informative: bool
    samples: int
    questions: int


@dataclass(frozen=True, slots=True)
class Quality:
    """One method at one length in one mode; pooled over lengths where ``length`` is None.

    `score`, `difference`, `share` and `verdict` are over the questions of informative tasks that the full cache
    answered too.
    """

    name: Name
    methods: tuple[str, ...]
    """As it ran; one, unless its budget was tuned to each length."""
    mode: str
    length: int | None
    ratio: float
    """Bytes kept / bytes of the full 16-bit cache."""
    tasks: tuple[TaskScore, ...]
    score: Estimate | None
    full: float | None
    difference: Estimate | None
    """Paired, method - full."""
    verdict: Verdict | None
    complete: bool
    """Whether it answered every question of informative tasks that the full cache answered."""
    front: bool = False

    @property
    def share(self) -> float | None:
        """Score / score of the full cache on the same questions."""
        return self.score.value / self.full if self.score and self.full else None


@dataclass(frozen=True, slots=True)
class Drift:
    """Fidelity of one method at one length."""

    name: Name
    methods: tuple[str, ...]
    length: int
    ratio: float
    kl: Estimate
    """Mean over scored tokens, nats; the interval is over texts."""
    kl_p99: float
    kl_max: float
    flips: float
    """Share of tokens whose likeliest next token is another one."""
    perplexity: float
    full_perplexity: float
    quarters: tuple[float, ...]
    """Mean KL of the first quarter of each text's scored tokens, of the second, and so on."""

    @property
    def unused(self) -> bool:
        """Whether a method that changes the cache changed nothing: the cache was not used."""
        return not self.name.full and self.ratio < 1 and self.kl_max == 0

    @property
    def tokens(self) -> int:
        return self.kl.questions


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes and times of one method at one length and batch size; speeds of decoding."""

    name: Name
    methods: tuple[str, ...]
    length: int
    batch: int
    nbytes: int
    held_bytes: int | None
    full_nbytes: int
    peak_bytes: int | None
    full_peak_bytes: int | None
    ttft_s: Quartiles | None
    """First quartile, median, third quartile."""
    tokens_per_s: Quartiles | None
    """Of all sequences of the batch together."""
    ttft_of_full: float | None
    """Median / median of the full cache."""
    speed_of_full: float | None
    front: bool = False

    @property
    def ratio(self) -> float:
        return self.nbytes / self.full_nbytes

    @property
    def held_of_nbytes(self) -> float | None:
        return None if self.held_bytes is None else self.held_bytes / self.nbytes


@dataclass(frozen=True, slots=True)
class Summary:
    """A results file, summed up."""

    rows: tuple[Quality, ...]
    pooled: tuple[Quality, ...]
    """The same over all lengths."""
    drifts: tuple[Drift, ...]
    costs: tuple[Cost, ...]
    skips: tuple[Skip, ...]
    errors: tuple[str, ...]
    """What makes results worthless, in words."""

    @property
    def families(self) -> tuple[str, ...]:
        """Every family, the full cache first, the others as they come."""
        names = [r.name.family for r in (*self.rows, *self.drifts, *self.costs)]
        names += [s.subject.family for s in self.skips]
        return tuple(dict.fromkeys([n for n in names if n == FULL] + names))


def summarize(results: Results) -> Summary:
    """Return what a results file says."""
    scores = results.of(Score)
    rows = _qualities(scores, pooled=False)
    drifts = tuple(_drift(name, length, group) for (name, length), group in _groups(results.of(Fidelity), _by_length))
    errors = [
        f"{label(d.name)} at {d.length} tokens: the drift is exactly zero although it keeps {d.ratio:.0%} of the "
        "bytes. Its cache was not used; its other numbers are worth nothing."
        for d in drifts
        if d.unused
    ]
    if scores and not any(r.name.full and r.score for r in rows):
        has = any(r.name.full for r in rows)
        why = f"reaches {INFORMATIVE} on no task" if has else "has not been run"
        errors.append(f"The full cache {why}: no score can be averaged or compared.")
    return Summary(
        rows=rows,
        pooled=_qualities(scores, pooled=True),
        drifts=drifts,
        costs=_costs(results.of(Costs)),
        skips=tuple(results.of(Skip)),
        errors=tuple(errors),
    )


def label(name: Name) -> str:
    """Return a row's name as text: ``snapkv at 4x``."""
    return name.family if name.target is None else f"{name.family} at {name.target:g}x"


def pareto(points: Sequence[tuple[float, float]]) -> frozenset[int]:
    """Return which (bytes, quality) no other point beats: none has fewer bytes and more quality, or as much of one."""
    return frozenset(
        i for i, (b, q) in enumerate(points) if not any(b2 <= b and q2 >= q and (b2 < b or q2 > q) for b2, q2 in points)
    )


def difference(a: Iterable[Score], b: Iterable[Score]) -> Estimate | None:
    """Return the paired difference a - b on the questions that both answered, tasks of each length being strata."""
    theirs = {s.place: s.score for s in b}
    return estimate(strata_of((s, s.score - theirs[s.place]) for s in a if s.place in theirs))


def strata_of(values: Iterable[tuple[Score, float]]) -> list[list[list[float]]]:
    """Return numbers of questions by (length, task) and context."""
    strata: dict[Any, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for s, value in values:
        strata[s.length, s.task][s.sample].append(value)
    return [list(contexts.values()) for _, contexts in sorted(strata.items())]


def informative_tasks(scores: Iterable[Score]) -> frozenset[tuple[str, int, str]]:
    """Return the (mode, length, task) on which the full cache reaches `INFORMATIVE`."""
    means: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for s in scores:
        if s.subject.family == FULL:
            means[s.mode, s.length, s.task].append(s.score)
    return frozenset(key for key, values in means.items() if np.mean(values) >= INFORMATIVE)


def name_of(subject: Subject) -> Name:
    return Name(subject.family, subject.target)


def _by_length(record: Any) -> tuple[Name, int]:
    return name_of(record.subject), record.length


def _groups(records: Iterable[T], key: Callable[[T], tuple[Any, ...]]) -> list[tuple[Any, list[T]]]:
    """Group records: the full cache first, then families as they first come, then targets and the rest in order."""
    groups: dict[tuple[Any, ...], list[T]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    place = {family: i for i, family in enumerate(dict.fromkeys(name.family for name, *_ in groups))}

    def order(item: tuple[Any, Any]) -> tuple[Any, ...]:
        name, *rest = item[0]
        return (not name.full, place[name.family], name.target or 0, *rest)

    return sorted(groups.items(), key=order)


def _methods(records: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.subject.method for r in records))


def _ratio(records: Iterable[Any]) -> float:
    return float(np.mean([r.subject.ratio for r in records]))


def _qualities(scores: list[Score], *, pooled: bool) -> tuple[Quality, ...]:
    full = {s.place: s for s in scores if s.subject.family == FULL}
    informative = informative_tasks(scores)

    def key(s: Score) -> tuple[Any, ...]:
        return (name_of(s.subject), s.mode) if pooled else (name_of(s.subject), s.mode, s.length)

    rows = [
        _quality(name, mode, rest[0] if rest else None, group, full, informative)
        for (name, mode, *rest), group in _groups(scores, key)
    ]
    return tuple(_with_front(rows, lambda r: (r.mode, r.length), lambda r: r.score and r.score.value))


def _quality(
    name: Name,
    mode: str,
    length: int | None,
    group: list[Score],
    full: dict[tuple[Any, ...], Score],
    informative: frozenset[tuple[str, int, str]],
) -> Quality:
    asked = {
        place
        for place, s in full.items()
        if s.mode == mode and length in (None, s.length) and (mode, s.length, s.task) in informative
    }
    paired = [s for s in group if s.place in full and (s.mode, s.length, s.task) in informative]
    reference = estimate(strata_of((s, full[s.place].score) for s in paired))
    change = None if name.full else estimate(strata_of((s, s.score - full[s.place].score) for s in paired))
    return Quality(
        name=name,
        methods=_methods(group),
        mode=mode,
        length=length,
        ratio=_ratio(group),
        tasks=tuple(_task(task, n, g, full, informative) for (n, task), g in _by_task(group)),
        score=estimate(strata_of((s, s.score) for s in paired)),
        full=reference and reference.value,
        difference=change,
        verdict=verdict(change),
        complete=asked <= {s.place for s in group},
    )


def _by_task(group: Iterable[Score]) -> list[tuple[tuple[int, str], list[Score]]]:
    tasks: dict[tuple[int, str], list[Score]] = defaultdict(list)
    for s in group:
        tasks[s.length, s.task].append(s)
    return list(tasks.items())


def _task(
    task: str,
    length: int,
    group: list[Score],
    full: dict[tuple[Any, ...], Score],
    informative: frozenset[tuple[str, int, str]],
) -> TaskScore:
    theirs = [full[s.place].score for s in group if s.place in full]
    return TaskScore(
        task=task,
        length=length,
        mean=float(np.mean([s.score for s in group])),
        full=float(np.mean(theirs)) if theirs else None,
        informative=(group[0].mode, length, task) in informative,
        samples=len({s.sample for s in group}),
        questions=len(group),
    )


def _with_front(rows: list[Any], facet: Callable[[Any], Any], quality: Callable[[Any], float | None]) -> list[Any]:
    """Mark the rows on the Pareto front of their facet."""
    from dataclasses import replace

    facets: dict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if quality(row) is not None and getattr(row, "complete", True):
            facets[facet(row)].append(i)
    for indices in facets.values():
        for j in pareto([(rows[i].ratio, quality(rows[i]) or 0.0) for i in indices]):
            rows[indices[j]] = replace(rows[indices[j]], front=True)
    return rows


def _drift(name: Name, length: int, group: list[Fidelity]) -> Drift:
    kl = np.concatenate([f.kl for f in group])
    mean = estimate([[f.kl for f in group]])
    assert mean is not None
    quarters = [np.array_split(np.array(f.kl), QUARTERS) for f in group]
    return Drift(
        name=name,
        methods=_methods(group),
        length=length,
        ratio=_ratio(group),
        kl=mean,
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        flips=float(np.mean(np.concatenate([f.flips for f in group]))),
        perplexity=float(np.exp(np.mean(np.concatenate([f.nll for f in group])))),
        full_perplexity=float(np.exp(np.mean(np.concatenate([f.full_nll for f in group])))),
        quarters=tuple(float(np.mean(np.concatenate(q))) for q in zip(*quarters, strict=True)),
    )


def _costs(records: list[Costs]) -> tuple[Cost, ...]:
    def key(r: Costs) -> tuple[Any, ...]:
        return name_of(r.subject), r.length, r.batch

    full = {r.place: r for r in records if r.subject.family == FULL}
    # A second session may measure again; the last word counts.
    rows = [_cost(group[-1], full.get(group[-1].place)) for _, group in _groups(records, key)]
    return tuple(_with_front(rows, lambda r: (r.length, r.batch), lambda r: r.speed_of_full))


def _cost(record: Costs, full: Costs | None) -> Cost:
    ttft, speed = _ttft(record), _speed(record)
    full_ttft, full_speed = (_ttft(full), _speed(full)) if full else (None, None)
    return Cost(
        name=name_of(record.subject),
        methods=(record.subject.method,),
        length=record.length,
        batch=record.batch,
        nbytes=record.nbytes,
        held_bytes=record.held_bytes,
        full_nbytes=record.full_nbytes,
        peak_bytes=record.peak_bytes,
        full_peak_bytes=full and full.peak_bytes,
        ttft_s=ttft,
        tokens_per_s=speed,
        ttft_of_full=ttft[1] / full_ttft[1] if ttft and full_ttft else None,
        speed_of_full=speed[1] / full_speed[1] if speed and full_speed else None,
    )


def _ttft(record: Costs) -> Quartiles | None:
    return quartiles(record.ttft_s) if record.ttft_s else None


def _speed(record: Costs) -> Quartiles | None:
    return quartiles(record.batch / s for s in record.step_s) if record.step_s else None
