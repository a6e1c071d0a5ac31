"""`kvmlx bench`: run a comparison, show it, turn it into a page, compare two."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvmlx.bench.config import QUICK, Config, read_config
from kvmlx.bench.records import ResultsFile, read
from kvmlx.cli.backends import choose
from kvmlx.cli.models import config_of
from kvmlx.cli.output import UsageError, stderr, stdout
from kvmlx.machine import cpu, software
from kvmlx.types import check_budget


def run_bench(config_file: str | None, flags: Mapping[str, Any], *, quick: bool, out: str | None) -> None:
    """Run what a file and flags say, writing results as they come, and show a summary.

    Args:
        config_file: a TOML file, or None for the defaults.
        flags: fields of the config that flags changed.
        quick: a comparison of a few minutes; what a file or a flag says goes before it.
        out: the results file; None: named after the model, in the current folder.
    """
    config = _config(config_file, flags, quick)
    path = Path(out or f"bench-{Path(config.model).name}.jsonl")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.parent} does not exist")
    config = config.but({"backend": choose(config.backend)})
    engine = load_engine(config)
    config = config.but({"dtype": engine.dtype})
    run = {
        "settings": config.settings,
        "config": _plain(config),
        "machine": _machine(engine),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["kvmlx", *sys.argv[1:]]),
    }
    file = ResultsFile(path, run)
    begin = time.monotonic()
    try:
        _run(config, engine, file)
    except KeyboardInterrupt:
        stderr().print(f"interrupted: everything so far is in {path}; the same command goes on from there")
        raise
    results = read(path)
    from kvmlx.bench.report import print_summary

    print_summary(results, stdout())
    minutes = (time.monotonic() - begin) / 60
    stderr().print(f"{minutes:.1f} minutes; results in {path}; the page: kvmlx bench report {shlex.quote(str(path))}")


def _config(config_file: str | None, flags: Mapping[str, Any], quick: bool) -> Config:
    config = Config().but(QUICK if quick else {})
    if config_file:
        config = read_config(config_file, config)
    return config.but(flags)


def _plain(config: Config) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def load_engine(config: Config) -> Any:
    """Load the model of a config into the engine of its backend."""
    from kvmlx.cli.engines import load

    loaded = load(config.model, str(config.backend), config.dtype)
    if config.backend == "mlx":
        from kvmlx.backends.mlx.bench import MLXBench as Bench
    else:
        from kvmlx.backends.torch.bench import TorchBench as Bench
    return Bench(loaded.model, loaded.tokenizer, loaded.device, loaded.dtype, chunk=config.chunk)


def _run(config: Config, engine: Any, file: ResultsFile) -> None:
    from kvmlx.bench.kvpress import Kvpress
    from kvmlx.bench.runner import Runner

    with _progress() as on_step:
        if config.kvpress is None:
            Runner(config, engine, config_of(config.model), file, on_step=on_step).run()
            return
        from kvmlx.cli.models import resolve_model

        with Kvpress(
            config.kvpress, resolve_model(config.model), dtype=engine.dtype, device=_device(engine)
        ) as presses:
            Runner(config, engine, config_of(config.model), file, presses, on_step).run()


def _device(engine: Any) -> str:
    """Return where kvpress runs: on the GPU if the engine's PyTorch does."""
    return "cuda" if engine.name == "torch" and engine.device != "cpu" else "cpu"


@contextmanager
def _progress() -> Iterator[Any]:
    """Show a bar with an estimate on a terminal; elsewhere a line now and then."""
    console = stderr()
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        shown = [0.0]

        def on_step(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=what)
            if bar.disable and time.monotonic() - shown[0] > 30:
                shown[0] = time.monotonic()
                console.print(f"{done} of {total}: {what}", soft_wrap=True)

        yield on_step


def _machine(engine: Any) -> dict[str, Any]:
    packages = ("mlx", "mlx-lm") if engine.name == "mlx" else ("torch", "triton", "transformers")
    return {"cpu": cpu(), "backend": engine.name, "device": engine.device, **software(*packages, "numpy")}


def compression(text: str) -> float:
    """Return 4.0 for ``4x`` or ``4``."""
    try:
        return float(text.removesuffix("x"))
    except ValueError as error:
        raise UsageError(f"--match-bytes must be a compression such as 4x, got {text!r}") from error


def budget_of(text: str) -> int | float:
    """Return a budget as strategies have it: ``0.25`` a fraction, ``512`` tokens."""
    try:
        value = float(text) if "." in text else int(text)
        check_budget(value, name="--budget")
    except ValueError as error:
        raise UsageError(
            f"--budget must be a fraction kept, such as 0.25, or a number of tokens, got {text!r}"
        ) from error
    return value


def make_report(file: str, out: str | None, plots: str | None, families: Sequence[str]) -> None:
    """Write the page of a results file, and its pictures if a folder is given."""
    from kvmlx.bench.report import report_html, report_plots

    results = read(file).only(families)
    page = Path(out) if out else Path(file).with_suffix(".html")
    report_html(results, page)
    paths = [page, *(report_plots(results, Path(plots)) if plots else ())]
    for path in paths:
        stdout().print(f"wrote {path}", soft_wrap=True)


def show(file: str, kind: str | None, families: Sequence[str]) -> None:
    """Print a results file as a table for people, or in a format for programs."""
    from kvmlx.bench import report

    results = read(file).only(families)
    if kind is None:
        report.print_summary(results, stdout())
    else:
        print({"json": report.to_json, "csv": report.to_csv, "md": report.to_md}[kind](results))


def show_comparison(a: str, b: str, kind: str | None) -> None:
    """Print what changed from one results file to another."""
    from kvmlx.bench import report

    changes = report.compare(read(a), read(b))
    if kind is None:
        report.print_comparison(changes, stdout())
    else:
        formats = {"json": report.comparison_json, "csv": report.comparison_csv, "md": report.comparison_md}
        print(formats[kind](changes))


def show_tasks(name: str | None, length: int) -> None:
    """List the tasks, or print a sample of one."""
    from kvmlx.bench.tasks import TASKS, tasks_of

    console = stdout()
    if name is None:
        table = Table(box=SIMPLE_HEAD)
        table.add_column("task", no_wrap=True)
        table.add_column("what it asks")
        for task in TASKS.values():
            table.add_row(task.name, task.description)
        console.print(table)
        return
    from kvmlx.cli.models import tokenizer_of

    (task,) = tasks_of([name])
    sample = task.make(0, length, 0, tokenizer_of("demo"))
    console.print(sample.context, markup=False, soft_wrap=True)
    for question in sample.questions:
        console.print(
            f"\n[bold]{escape(question.text)}[/]\n{escape(question.prefix)} ... {escape(', '.join(question.answers))}"
        )
