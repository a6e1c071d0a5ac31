"""The plots, drawn by matplotlib: for the page as SVG that follows its colours, and as PNG and SVG files."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmlx.bench.records import FULL
from kvmlx.bench.report.figures import Chart, Point
from kvmlx.bench.summary import Quality
from kvmlx.types import KVMLXError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c0609a", "#b8860b", "#3a9bdc", "#6a3fa0", "#5f6b76")
"""Of families, after Okabe and Ito, whose colours the colour-blind tell apart; darker where white is behind."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""As many as make each of 72 families unlike the others, with the colours."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
"""Of the lines of the first eight families, of the next eight, and so on."""
INK, FAINT = "#1b1f24", "#d4d8dd"
SIZE = (4.9, 3.5)
LETTER = 0.085
"""Inches of a letter, on average."""
NAME_WIDTH, NAME_LETTERS = 3.2, 36
"""Inches of a legend's column, and letters that fit into it."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvmlx",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    # A name with dollars is a name.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def check_matplotlib() -> None:
    """Raise unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise KVMLXError(
            "the page and the plots need matplotlib: pip install 'kvmlx[bench]', or take --format md, csv or json"
        ) from error


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # A letter that the font lacks is a box in the PNG; the SVG takes the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


@dataclass(frozen=True, slots=True)
class Look:
    """How a family is drawn everywhere."""

    colour: str
    marker: str
    dash: Any


def look(families: Sequence[str], family: str) -> Look:
    """Return a family's look; the full cache, which nothing else may look like, is a star in the ink's colour."""
    if family == FULL:
        return Look(INK, "*", "-")
    i = [f for f in families if f != FULL].index(family)
    return Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])


def chart_svg(chart: Chart, families: Sequence[str]) -> tuple[str, dict[str, Point | str]]:
    """Return a chart as SVG and what its elements are, by id: points, and the families of lines."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(left=0.15, right=0.985, bottom=0.14, top=0.975)
        marks = _draw(figure.add_subplot(), chart, families)
        return _svg(figure), marks


def marker_svg(families: Sequence[str], family: str) -> str:
    """Return a family's marker alone, for a legend."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(0.2, 0.2))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.axis("off")
        own = look(families, family)
        axes.plot([0], [0], marker=own.marker, color=own.colour, markersize=8.5, markeredgewidth=0, clip_on=False)
        return _svg(figure)


def save_charts(charts: Sequence[Chart], families: Sequence[str], title: str, path: Path) -> list[Path]:
    """Write charts side by side, with one legend, as ``path.svg`` and ``path.png``."""
    with _style():
        from matplotlib.figure import Figure

        columns = min(2, len(charts))
        rows = -(-len(charts) // columns)
        shown = [f for f in families if any(p.family == f for c in charts for p in c.points)]
        beside = len(charts) == 1
        names = 1 if beside else int(SIZE[0] * columns / NAME_WIDTH)
        lines = sum(_wrapped(family).count("\n") + 1 for family in shown)
        legend = 0.24 * -(-lines // names) + 0.6
        wide, high = SIZE[0] * columns, SIZE[1] * rows
        size = (wide + NAME_WIDTH, max(high, legend)) if beside else (wide, high + legend)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        for index, chart in enumerate(charts):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(axes, chart, families)
            axes.set_title(chart.title, fontsize=10.5, loc="left")
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        _legend(figure, families, shown, names, "outside right upper" if beside else "outside lower left")
        return _save(figure, path)


def save_heat_map(rows: Sequence[Quality], tasks: Sequence[str], title: str, path: Path) -> list[Path]:
    """Write scores by method and task as ``path.svg`` and ``path.png``."""
    import numpy as np

    from kvmlx.bench.report import words

    with _style():
        from matplotlib.figure import Figure

        names = [words.name(row.name) for row in rows]
        longest = max((len(name) for name in names), default=0)
        size = (max(3.2, LETTER * longest) + 0.75 * len(tasks), 1.9 + 0.24 * len(rows))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        scores = [{t.task: t for t in row.tasks} for row in rows]
        values = np.array([[s[t].mean if t in s else np.nan for t in tasks] for s in scores])
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                known = scores[i][tasks[j]].informative
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, alpha=1 if known else 0.45)
        marked = [t if any(t in s and s[t].informative for s in scores) else f"({t})" for t in tasks]
        axes.set_xticks(range(len(tasks)), marked, rotation=35, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        figure.supxlabel("In brackets: tasks on which the full cache fails.", fontsize=9, x=0.01, ha="left")
        return _save(figure, path)


def _draw(axes: Axes, chart: Chart, families: Sequence[str]) -> dict[str, Point | str]:
    """Draw a chart; each point, and all lines of a family, are artists with an id."""
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    if chart.full is not None:
        axes.axhline(chart.full, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    marks: dict[str, Point | str] = {}
    for index, family in enumerate(dict.fromkeys(p.family for p in chart.points)):
        own = sorted((p for p in chart.points if p.family == family), key=lambda p: p.x)
        for kind, lines in (("line", _joined(own)), ("bars", _bars(own))):
            if lines[0]:
                marks[f"{kind}{index}"] = family
                style = look(families, family)
                dash, alpha = (style.dash, 0.5) if kind == "line" else ("-", 0.3)
                gid = f"{kind}{index}"
                axes.plot(*lines, color=style.colour, linestyle=dash, linewidth=0.9, alpha=alpha, zorder=2, gid=gid)
    for index, point in enumerate(chart.points):
        style = look(families, point.family)
        (line,) = axes.plot(point.x, point.y, style.marker, color=style.colour, zorder=3, clip_on=False)
        line.set(gid=f"p{index}", markersize=9 if point.family == FULL else 6.5, markeredgewidth=0)
        marks[f"p{index}"] = point
    _front(axes, chart.points)
    _scales(axes, chart)
    return marks


def _joined(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return ([p.x for p in points], [p.y for p in points]) if len(points) > 1 else ([], [])


def _bars(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return the intervals as one line with gaps."""
    x: list[float] = []
    y: list[float] = []
    for p in points:
        if p.low is not None and p.high is not None and p.high > p.low:
            x += [p.x, p.x, p.x]
            y += [p.low, p.high, math.nan]
    return x, y


def _front(axes: Axes, points: Sequence[Point]) -> None:
    """Ring the points of the Pareto front, and join them."""
    front = sorted((p.x, p.y) for p in points if p.front)
    if front:
        x, y = zip(*front, strict=True)
        axes.plot(x, y, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=2.5)
        axes.plot(
            x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1, clip_on=False
        )


def _scales(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.y_range is not None:
        axes.set_ylim(chart.y_range)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if chart.x_kind == "quarter":
        axes.set_xticks(sorted({int(p.x) for p in chart.points}))
        axes.margins(x=0.08)
        return
    axes.set_xscale("log", base=2)
    lowest, highest = min(p.x for p in chart.points), max(p.x for p in chart.points)
    ticks = [2.0**-i for i in range(8, -2, -1) if lowest / 1.3 <= 2.0**-i <= highest * 1.3]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_xlim(lowest / 1.25, highest * 1.25)


def _legend(figure: Figure, families: Sequence[str], shown: Sequence[str], columns: int, place: Any) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for family in shown:
        own = look(families, family)
        line = Line2D([], [], color=own.colour, marker=own.marker, linestyle=own.dash, linewidth=0.9, markeredgewidth=0)
        handles.append(line)
    figure.legend(handles, [_wrapped(family) for family in shown], loc=place, ncols=columns, frameon=False, fontsize=9)


def _wrapped(family: str) -> str:
    return textwrap.fill(family, NAME_LETTERS, subsequent_indent="  ")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return text.getvalue()


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.svg"), path.with_name(f"{path.name}.png")]
    figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
    figure.savefig(paths[1], dpi=160)
    return paths
