"""The end of a run in a terminal: what matters, within 100 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmlx.bench.records import Results
from kvmlx.bench.report import tables, words
from kvmlx.bench.report.compare import Comparison, comparison_tables
from kvmlx.bench.report.findings import findings
from kvmlx.bench.report.tables import Table
from kvmlx.bench.summary import summarize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

WIDTH = 100
NAME_WIDTH = 44
STYLES = {"better": "green", "worse": "yellow", "bad": "bold red", "dim": "dim", "best": "bold", "same": ""}
LEGEND = "▲ better, = same, ▼ worse than the full cache (95% interval of the paired difference); bold: the highest."


def print_summary(results: Results, console: Console) -> None:
    """Print the overview tables, the findings and what went wrong."""
    from rich.text import Text

    summary = summarize(results)
    for mode in dict.fromkeys(r.mode for r in summary.pooled):
        _print(
            tables.overview(summary, mode), f"{words.mode(mode).capitalize()}: share of the full cache's score", console
        )
    if summary.pooled:
        console.print(Text(LEGEND, style="dim"), width=WIDTH)
    if summary.drifts:
        length = max(d.length for d in summary.drifts)
        title = f"Mean KL to the full cache, nats, {words.tokens(length)}"
        _print(tables.drift_overview(summary, length), title, console)
    if summary.costs:
        length = max(c.length for c in summary.costs)
        batch = min(c.batch for c in summary.costs if c.length == length)
        title = f"Tokens/s, times the full cache, {words.tokens(length)}, batch {batch}"
        _print(tables.speed_overview(summary, length, batch), title, console)
    console.print()
    for sentence in findings(summary):
        console.print(Text("- " + sentence.replace("`", "")), width=WIDTH)
    if skipped := tables.skips(summary):
        _print(skipped, "Not run", console)
    for error in summary.errors:
        console.print(Text(f"error: {error}", style="bold red"), width=WIDTH)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what changed from one results file to another."""
    if not comparison.settings:
        console.print("Settings, machine and versions are the same.")
    for table in comparison_tables(comparison):
        _print(table, table.name.capitalize(), console, width=None)


def _print(table: Table, title: str, console: Console, width: int | None = WIDTH) -> None:
    from rich.text import Text

    if table.rows:
        console.print()
        console.print(Text(title, style="bold"), width=width)
        console.print(_rich(table), width=width)


def _rich(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    out = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(table.columns):
        justify = "right" if column.numeric else "left"
        out.add_column(column.title, justify=justify, overflow="fold", max_width=None if index else NAME_WIDTH)
    for row in table.rows:
        styles = [" ".join(STYLES[m] for m in c.mark.split()).strip() for c in row.cells]
        out.add_row(*(Text(c.text, style=s) for c, s in zip(row.cells, styles, strict=True)))
    return out
