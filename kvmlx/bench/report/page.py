"""One self-contained HTML page: no network, no library, everything from the results escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from kvmlx.bench.records import FULL, Results
from kvmlx.bench.report import figures, plots, tables, words
from kvmlx.bench.report.about import Fact, facts, notes, started, title
from kvmlx.bench.report.figures import Chart, Point
from kvmlx.bench.report.findings import best, findings
from kvmlx.bench.report.svg import inline
from kvmlx.bench.report.tables import Cell, Column, Row, Table
from kvmlx.bench.summary import Summary, summarize

LONG = 30
"""Letters from which a cell is written in several lines."""
HERE = Path(__file__).parent


def page(results: Results) -> str:
    """Return the page."""
    plots.check_matplotlib()
    summary = summarize(results)
    sections = _sections(results, summary)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    code = "\n" + script + "\n"
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title(results)),
        subtitle=escape(started(results)),
        nav="".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections if heading),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        main="\n".join(body for _, _, body in sections),
    )


def _sections(results: Results, summary: Summary) -> list[tuple[str, str, str]]:
    """Return (id, heading, HTML) of every part that has something to show."""
    parts = [
        ("first", "What to read first", _first(results, summary)),
        ("", "", _controls(summary)),
        ("quality", "Quality against bytes", _quality(summary)),
        ("tasks", "Tasks", _section_table(tables.tasks(summary), TASKS)),
        ("fidelity", "Fidelity", _fidelity(summary)),
        ("costs", "Costs", _costs(summary)),
        ("skips", "Not run", _section_table(tables.skips(summary), "What could not be run, and why.")),
        ("about", "Machine and method", _about(results)),
    ]
    return [(name, heading, _section(name, heading, body) if name else body) for name, heading, body in parts if body]


def _section(name: str, heading: str, body: str) -> str:
    kind = ' class="first"' if name == "first" else ""
    return f'<section id="{name}"{kind}><h2>{escape(heading)}</h2>{body}</section>'


TASKS = (
    "Mean score of each method on each task, 0 to 1. In brackets: tasks on which the full cache itself stays below "
    "0.5 at this length, which say nothing about a method and are not averaged in."
)
MARKS = (
    "▲ better, = same, ▼ worse than the full cache: only where the 95% interval of the paired difference excludes 0 is "
    "it better or worse. Underlined: the highest of its column. * not complete: not every question was answered."
)


def _first(results: Results, summary: Summary) -> str:
    said = [f"<li>{_sentence(s)}</li>" for s in findings(summary)]
    errors = "".join(f"<li>{escape(e)}</li>" for e in summary.errors)
    alarm = f'<div class="errors" role="alert"><h2>Error</h2><ul>{errors}</ul></div>' if errors else ""
    overviews = [
        f'<div class="overview" data-mode="{escape(mode)}"><h3>{escape(words.mode(mode).capitalize())}: '
        f"share of the full cache's score</h3>{_table(table)}</div>"
        for mode in dict.fromkeys(r.mode for r in summary.pooled)
        if (table := tables.overview(summary, mode)).rows
    ]
    legend = f'<p class="note">{MARKS}</p>' if overviews else ""
    highest = best(results, summary)
    ranked = f"<h3>The highest score at each compression</h3>{_table(highest)}" if highest.rows else ""
    return f'{alarm}<ul>{"".join(said)}</ul><div class="side">{"".join(overviews)}</div>{legend}{ranked}'


def _sentence(text: str) -> str:
    """Escape a sentence; what is in backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _controls(summary: Summary) -> str:
    """Return the buttons and the search box that every table and plot obeys."""
    rows = [*summary.rows, *summary.drifts, *summary.costs]
    modes = dict.fromkeys(r.mode for r in summary.rows)
    targets = sorted({r.name.target for r in rows if not r.name.full}, key=lambda t: (t is None, t or 0.0))
    lengths = sorted({r.length for r in rows if r.length is not None})
    kinds = [
        ("mode", "Mode", [(m, words.mode(m)) for m in modes]),
        ("target", "Target", [(words.target(t), words.target(t)) for t in targets]),
        ("length", "Length", [(str(n), f"{n:,}") for n in lengths]),
    ]
    sets = "".join(_choice(*kind) for kind in kinds if len(kind[2]) > 1)
    return (
        '<div class="controls" role="search" aria-label="Filter of tables and plots">'
        '<label class="unseen" for="search">Method contains</label>'
        '<input id="search" type="search" placeholder="Filter methods" autocomplete="off">'
        f'{sets}<span id="count" class="note"></span></div>'
    )


def _choice(kind: str, legend: str, choices: Iterable[tuple[str, str]]) -> str:
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" data-choice="{escape(choice)}" aria-pressed="{pressed}">'
        f"{escape(text)}</button>"
        for choice, text, pressed in [("", "all", "true"), *((c, t, "false") for c, t in choices)]
    )
    return f"<fieldset><legend>{legend}</legend>{buttons}</fieldset>"


def _quality(summary: Summary) -> str:
    charts = figures.quality_charts(summary)
    table = tables.quality(summary)
    if not table.rows:
        return ""
    text = (
        "Further left is smaller, higher is better. Dotted: the full cache. Dashed, with ringed points: the Pareto "
        "front, methods that no other beats in both. Bars: 95% intervals. Methods of one target are set side by side; "
        "the table has their exact bytes."
    )
    intro = f'<p class="note">{text}</p>' if charts else ""
    return intro + _legend(charts, summary.families) + _charts(charts, summary.families) + _table(table)


def _fidelity(summary: Summary) -> str:
    if not summary.drifts:
        return ""
    text = (
        "The same text is fed token by token through the full and the compressed cache of its beginning. "
        "KL is that of the next token's distribution under the full cache to that under the compressed one. Bars: 95% "
        "intervals over texts."
    )
    places = figures.position_charts(summary)
    plotted = _charts(places, summary.families)
    more = f"<details><summary>Drift by position: does it grow?</summary>{plotted}</details>" if places else ""
    charts = figures.drift_charts(summary)
    top = _legend(charts, summary.families) + _charts(charts, summary.families)
    return f'<p class="note">{text}</p>{top}{more}{_table(tables.drifts(summary))}'


def _costs(summary: Summary) -> str:
    if not summary.costs:
        return ""
    text = (
        "Speed of decoding, times that of the full cache in the same run: further left is smaller, higher is faster. "
        "Dotted: the full cache. Dashed, with ringed points: the Pareto front. Bars: quartiles of single steps."
    )
    charts = figures.speed_charts(summary)
    top = _legend(charts, summary.families) + _charts(charts, summary.families)
    return f'<p class="note">{text}</p>{top}{_table(tables.costs(summary))}'


def _section_table(table: Table, text: str) -> str:
    return f'<p class="note">{escape(text)}</p>{_table(table)}' if table.rows else ""


def _about(results: Results) -> str:
    machine, settings, commands = facts(results)
    listed = "".join(f"<p>{_sentence(text)}</p>" for text in notes())
    shown = "".join(f"<pre>{escape(c)}</pre>" for c in commands)
    return (
        f'<h3>How to reproduce</h3>{shown}<div class="side facts">'
        f"<div><h3>Machine and versions</h3>{_facts(machine)}</div>"
        f"<div><h3>Settings</h3>{_facts(settings)}</div></div><h3>How it was measured</h3>{listed}"
    )


def _facts(rows: Sequence[Fact]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    return f"<table><tbody>{body}</tbody></table>"


# -- plots ----------------------------------------------------------------------------------------------------


def _charts(charts: Sequence[Chart], families: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(_figure(c, families) for c in charts)}</div>' if charts else ""


def _figure(chart: Chart, families: Sequence[str]) -> str:
    text, found = plots.chart_svg(chart, families)
    marks = {gid: _mark(what, families) for gid, what in found.items()}
    what = f"{chart.y_label} against {chart.x_label}, {chart.title}"
    label = f"{what}: {len(chart.points)} points, arrow keys go through them"
    drawn = inline(text, f"{chart.name}.", label, marks)
    facet = "".join(f' data-{kind}="{escape(value)}"' for kind, value in chart.facet.items())
    return f"<figure{facet}><figcaption>{escape(chart.title)}</figcaption>{drawn}</figure>"


def _mark(what: Point | str, families: Sequence[str]) -> dict[str, str]:
    """Return the attributes of a point, or of a family's line."""
    if isinstance(what, str):
        return {"data-family": str(families.index(what))}
    target = {} if what.family == FULL else {"data-target": words.target(what.target)}
    return {"data-tip": what.tip, "data-family": str(families.index(what.family)), **target}


def _legend(charts: Sequence[Chart], families: Sequence[str]) -> str:
    """Return buttons that light up one family."""
    shown = {p.family for c in charts for p in c.points}
    items = []
    for index, family in enumerate(families):
        if family in shown:
            drawn = inline(plots.marker_svg(families, family), f"{charts[0].name}.{index}.", "", {})
            items.append(
                f'<li><button type="button" data-choice="{index}" aria-pressed="false">{drawn}'
                f"<span>{escape(family)}</span></button></li>"
            )
    return f'<ul class="legend" aria-label="Methods: press to show one alone">{"".join(items)}</ul>' if items else ""


# -- tables ---------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    head = "".join(_header(c) for c in table.columns)
    body = "".join(_row(r, table.columns) for r in table.rows)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(table.name)}">'
        f'<table id="table-{escape(table.name)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _header(column: Column) -> str:
    kind = ' class="num"' if column.numeric else ""
    return (
        f'<th scope="col" aria-sort="none"{kind}><button type="button" title="{escape(column.help)}">'
        f"{escape(column.title)}</button></th>"
    )


def _row(row: Row, columns: Sequence[Column]) -> str:
    data = {"mode": row.mode, "length": row.length, "target": row.target}
    cells = "".join(_cell(c, column, index) for index, (c, column) in enumerate(zip(row.cells, columns, strict=True)))
    kind = ' class="full"' if row.name.full else ""
    return f"<tr{kind}{''.join(f' data-{k}={chr(34)}{escape(v)}{chr(34)}' for k, v in data.items() if v)}>{cells}</tr>"


def _cell(cell: Cell, column: Column, index: int) -> str:
    kinds = [cell.mark, "text" if index and not column.numeric else "", "heat" if cell.heat is not None else ""]
    kinds.append("many" if not column.numeric and len(cell.text) > LONG else "")
    kind = " ".join(k for k in kinds if k)
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' style="--v:{cell.heat:.2f}"' if cell.heat is not None else ""
    attributes += f' title="{escape(cell.note)}"' if cell.note else ""
    tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
    return f"<{tag}{scope}{attributes}>{escape(cell.text)}</{tag}>"
