"""What is made of a results file: a page, plots, tables, and a comparison of two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmlx.bench.records import Results
from kvmlx.bench.report import about, figures, plots, tables, words
from kvmlx.bench.report.compare import compare, comparison_csv, comparison_json, comparison_md
from kvmlx.bench.report.page import page
from kvmlx.bench.report.terminal import print_comparison, print_summary
from kvmlx.bench.report.text import to_csv, to_json, to_md
from kvmlx.bench.summary import summarize
from kvmlx.types import KVMLXError

__all__ = [
    "compare",
    "comparison_csv",
    "comparison_json",
    "comparison_md",
    "print_comparison",
    "print_summary",
    "report_html",
    "report_plots",
    "to_csv",
    "to_json",
    "to_md",
]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KVMLXError(f"{path} cannot be written: {error.strerror or error}; give another place") from error


def report_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the page.

    Raises:
        KVMLXError: matplotlib is missing, or the file cannot be written.
    """
    path, text = Path(path), page(results)
    with _writing(path):
        path.write_text(text, encoding="utf-8")
    return path


def report_plots(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the plots as SVG and PNG files and return their paths.

    Raises:
        KVMLXError: matplotlib is missing, or the folder cannot be written.
    """
    plots.check_matplotlib()
    folder = Path(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _plots(results, folder)


def _plots(results: Results, folder: Path) -> list[Path]:
    summary, model = summarize(results), about.model(results)
    written = []
    for name, title, charts in (
        ("quality", "quality against bytes", figures.quality_charts(summary)),
        ("speed", "speed of decoding against bytes", figures.speed_charts(summary)),
        ("fidelity", "drift against bytes", figures.drift_charts(summary)),
        ("position", "drift by position", figures.position_charts(summary)),
    ):
        if charts:
            written += plots.save_charts(charts, summary.families, f"{model}: {title}", folder / name)
    for mode, length in dict.fromkeys((r.mode, r.length) for r in summary.rows):
        rows = [r for r in summary.rows if (r.mode, r.length) == (mode, length)]
        title = f"{model}: score by task, {words.mode(mode)}, {words.tokens(length)}"
        written += plots.save_heat_map(rows, tables.task_names(summary), title, folder / f"tasks-{mode}-{length}")
    return written
