"""What the plots show, without how they are drawn: points in facets, each with the words of its tooltip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvmlx.bench.report import words
from kvmlx.bench.summary import Cost, Drift, Quality, Summary

SPREAD = 0.55
"""Powers of 2 over which the methods of one target are set side by side, so that they do not hide each other."""


@dataclass(frozen=True, slots=True)
class Point:
    """One method in one plot."""

    family: str
    target: float | None
    x: float
    y: float
    low: float | None
    high: float | None
    front: bool
    tip: str
    """Lines of its tooltip; the first one is its name."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot: the points of a facet."""

    name: str
    """Of its files, unique."""
    title: str
    x_label: str
    y_label: str
    x_kind: Literal["bytes", "quarter"]
    log_y: bool
    points: tuple[Point, ...]
    full: float | None = None
    """Height of the full cache's line."""
    y_range: tuple[float, float] | None = None
    """The same for all charts that are compared; None: of its own points."""
    facet: dict[str, str] = field(default_factory=dict)
    """What its filter buttons are: mode, length, target."""


BYTES = "bytes kept, % of the full 16-bit cache; equal ones side by side"


def quality_charts(summary: Summary) -> list[Chart]:
    """Return score against bytes for each mode and length."""
    out: list[Chart] = []
    for (mode, length), rows in _facets(summary.rows, lambda r: (r.mode, r.length)):
        rows = [r for r in rows if r.score]
        full = next((r.score.value for r in rows if r.name.full and r.score), None)
        points = [_quality_point(r) for r in rows]
        if points:
            out.append(
                Chart(
                    name=f"quality-{mode}-{length}",
                    title=f"{words.mode(mode).capitalize()}, {words.tokens(length)}",
                    x_label=BYTES,
                    y_label="mean score, informative tasks",
                    x_kind="bytes",
                    log_y=False,
                    points=_side_by_side(points),
                    full=full,
                    facet={"mode": mode, "length": str(length)},
                )
            )
    return _common_range(out)


def speed_charts(summary: Summary) -> list[Chart]:
    """Return decoding speed against bytes for each length and batch size."""
    out = []
    for (length, batch), rows in _facets(summary.costs, lambda r: (r.length, r.batch)):
        points = [_speed_point(r) for r in rows if r.speed_of_full is not None]
        if points:
            out.append(
                Chart(
                    name=f"speed-{length}-batch{batch}",
                    title=f"{words.tokens(length)}, batch {batch}",
                    x_label=BYTES,
                    y_label="tokens/s, times the full cache",
                    x_kind="bytes",
                    log_y=False,
                    points=_side_by_side(points),
                    full=1.0,
                    facet={"length": str(length)},
                )
            )
    return out


def drift_charts(summary: Summary) -> list[Chart]:
    """Return mean KL against bytes for each length."""
    out = []
    for (length,), rows in _facets(summary.drifts, lambda r: (r.length,)):
        points = [_drift_point(r) for r in rows if r.kl.value > 0 and not r.name.full]
        if points:
            out.append(
                Chart(
                    name=f"drift-{length}",
                    title=words.tokens(length),
                    x_label=BYTES,
                    y_label="mean KL to the full cache, nats",
                    x_kind="bytes",
                    log_y=True,
                    points=_side_by_side(points),
                    facet={"length": str(length)},
                )
            )
    return out


def position_charts(summary: Summary) -> list[Chart]:
    """Return mean KL by quarter of the scored tokens, for each length and target."""
    out = []
    for (length, target), rows in _facets(summary.drifts, lambda r: (r.length, r.name.target or 0.0)):
        points = [
            Point(
                r.name.family,
                r.name.target,
                float(quarter),
                kl,
                None,
                None,
                False,
                f"{words.name(r.name)}\nKL {words.small(kl)} in quarter {quarter}",
            )
            for r in rows
            for quarter, kl in enumerate(r.quarters, 1)
            if kl > 0 and not r.name.full
        ]
        if points:
            shown = words.target(target or None)
            out.append(
                Chart(
                    name=f"position-{length}-{shown.replace(' ', '-')}",
                    title=f"{shown}, {words.tokens(length)}",
                    x_label="quarter of the scored tokens",
                    y_label="mean KL, nats",
                    x_kind="quarter",
                    log_y=True,
                    points=tuple(points),
                    facet={"length": str(length), "target": shown},
                )
            )
    return out


def _common_range(charts: list[Chart]) -> list[Chart]:
    """Give linear charts one range of y, with a little air."""
    ends = [y for c in charts for p in c.points for y in (p.y, p.low, p.high) if y is not None]
    if not ends:
        return charts
    air = 0.04 * (max(ends) - min(ends)) or 0.05
    return [replace(c, y_range=(min(ends) - air, max(ends) + air)) for c in charts]


def _facets(rows: Iterable[Any], key: Callable[[Any], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[Any]]]:
    facets: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in rows:
        facets[key(row)].append(row)
    return sorted(facets.items())


def _side_by_side(points: list[Point]) -> tuple[Point, ...]:
    """Move the points of each target apart; families keep their order."""
    families = list(dict.fromkeys(p.family for p in points if p.target is not None))
    middle = (len(families) - 1) / 2
    if middle <= 0:
        return tuple(points)
    return tuple(
        p if p.target is None else replace(p, x=p.x * 2 ** (SPREAD * (families.index(p.family) - middle) / 2 / middle))
        for p in points
    )


def _quality_point(row: Quality) -> Point:
    assert row.score is not None
    score = row.score
    tip = [
        words.name(row.name),
        f"{words.percent(row.ratio)} of the bytes",
        f"score {words.estimate(score)}",
        f"{words.percent(row.share)} of full: {words.verdict(row.verdict, full=row.name.full)}",
        f"{score.samples} contexts, {score.questions} questions",
        *([] if row.complete else ["not complete"]),
        *(["on the Pareto front"] if row.front else []),
    ]
    return Point(
        row.name.family, row.name.target, row.ratio, score.value, score.low, score.high, row.front, "\n".join(tip)
    )


def _speed_point(row: Cost) -> Point:
    assert row.speed_of_full is not None and row.tokens_per_s is not None
    unit = row.speed_of_full / row.tokens_per_s[1]
    low, _, high = (unit * s for s in row.tokens_per_s)
    tip = [
        words.name(row.name),
        f"{words.percent(row.ratio)} of the bytes",
        f"{row.tokens_per_s[1]:.1f} tokens/s, quartiles {row.tokens_per_s[0]:.1f} to {row.tokens_per_s[2]:.1f}",
        f"{row.speed_of_full:.2f} times full",
        *(["on the Pareto front"] if row.front else []),
    ]
    return Point(row.name.family, row.name.target, row.ratio, row.speed_of_full, low, high, row.front, "\n".join(tip))


def _drift_point(row: Drift) -> Point:
    tip = [
        words.name(row.name),
        f"{words.percent(row.ratio)} of the bytes",
        f"KL mean {words.small(row.kl.value)}, p99 {words.small(row.kl_p99)}, max {words.small(row.kl_max)}",
        f"flips {words.percent(row.flips)}",
    ]
    return Point(
        row.name.family, row.name.target, row.ratio, row.kl.value, row.kl.low, row.kl.high, False, "\n".join(tip)
    )
