"""The commands and their flags. What they do is in the modules beside this one, imported when needed."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup


class Commands(TyperGroup):
    """All commands; an error that the user can mend becomes one line and exit code 2."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            from kvmlx.cli.output import error_line, print_error

            line = error_line(error)
            if line is None:
                raise
            print_error(line)
            raise typer.Exit(2) from error


class StockCommand(TyperCommand):
    """A command of mlx-lm with flags of ours in front; its help shows both."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from kvmlx.cli.hf import COMMANDS, help_text
        from kvmlx.cli.stock import stock_help

        command = ctx.info_name or ""
        print(stock_help(command), end="")
        if command in COMMANDS:
            print(help_text(command), end="")


class Backend(StrEnum):
    mlx = "mlx"
    torch = "torch"


class DType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
STOCK: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}

Kv = Annotated[
    str | None,
    typer.Option("--kv", metavar="STRATEGY", help="How the cache is compressed, e.g. 'snapkv(budget=0.25) | int4'."),
]
Dtype = Annotated[DType | None, typer.Option(help="Run the model in this type; float32 is the fast one on a CPU.")]
On = Annotated[
    Backend | None,
    typer.Option("--backend", help="mlx-lm's models or transformers'; else the best that this machine has."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
Model = Annotated[
    str,
    typer.Option(metavar="PATH|REPO|demo", help="Any model of mlx-lm: a folder, a Hub repository, or `demo`."),
]


def _version(value: bool) -> None:
    if value:
        from kvmlx import __version__

        print(f"kvmlx {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress the KV cache of language models.

    `generate`, `chat`, `server` and `cache_prompt` are mlx-lm's commands, with all their flags, and `--kv`.
    With `--backend torch` the first two and the last run models of transformers.
    """


@app.command(cls=StockCommand, context_settings=STOCK)
def generate(ctx: typer.Context, kv: Kv = None, backend: On = None, dtype: Dtype = None, as_json: Json = False) -> None:
    """Answer a prompt, then say in one line what the cache held.

    Takes every flag of `mlx_lm.generate`; `--model demo` is the demo model.
    """
    _run("generate", ctx.args, kv, backend, dtype, as_json)


@app.command(cls=StockCommand, context_settings=STOCK)
def chat(ctx: typer.Context, kv: Kv = None, backend: On = None, dtype: Dtype = None) -> None:
    """Chat, and see the cache grow.

    Takes every flag of `mlx_lm.chat`; `--model demo` is the demo model.
    """
    _run("chat", ctx.args, kv, backend, dtype)


@app.command(cls=StockCommand, context_settings=STOCK)
def server(ctx: typer.Context, kv: Kv = None, dtype: Dtype = None) -> None:
    """Serve the OpenAI HTTP API.

    Takes every flag of `mlx_lm.server`; `--model demo` is the demo model.
    """
    from kvmlx.cli.stock import Stock

    Stock("server", ctx.args, kv=kv, dtype=_name(dtype)).run()


@app.command("cache_prompt", cls=StockCommand, context_settings=STOCK)
def cache_prompt(
    ctx: typer.Context, kv: Kv = None, backend: On = None, dtype: Dtype = None, as_json: Json = False
) -> None:
    """Save the compressed cache of a prompt, for `kvmlx generate --prompt-cache-file`.

    Takes every flag of `mlx_lm.cache_prompt`; `--model demo` is the demo model.
    """
    _run("cache_prompt", ctx.args, kv, backend, dtype, as_json)


@app.command()
def demo(
    model: Model = "demo",
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", metavar="STRATEGY", help="A strategy to show beside the full cache; give it repeatedly."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Length of the text in tokens.")] = 2048,
    backend: On = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask a real model about a long text: the answer, the bytes held, the speed.

    Exits with 1 if the full cache gives the right answer and a compressed one does not.
    """
    from kvmlx.cli.demo import run_demo

    code = run_demo(
        model, kv or [], tokens=tokens, dtype=_name(dtype), backend=backend.value if backend else None, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def strategies(
    name: Annotated[str | None, typer.Argument(help="Show one stage or preset only.")] = None,
    as_json: Json = False,
) -> None:
    """List the stages that a strategy is made of."""
    from kvmlx.cli.strategies import show_strategies

    show_strategies(name, as_json=as_json)


@app.command()
def explain(
    strategy: Annotated[str, typer.Argument(help="A strategy, e.g. 'snapkv(budget=0.25) | int4'.")],
    model: Model = "demo",
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 8192,
    dtype: Annotated[DType | None, typer.Option(help="Type of the exact rows; else what the config says.")] = None,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Prompt tokens processed at a time.")] = 2048,
    as_json: Json = False,
) -> None:
    """Say what a strategy will hold, layer by layer, before any weights are loaded."""
    from kvmlx.cli.explain import show_explanation

    show_explanation(strategy, model, context, dtype=_name(dtype), step=prefill_step_size, as_json=as_json)


@app.command()
def doctor(
    head_dim: Annotated[
        int, typer.Option(min=1, metavar="N", help="Head dim of the model whose paths are listed.")
    ] = 128,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Check what this machine computes against the reference instead.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(metavar="mlx|torch|numpy", help="Whose paths, or what --selftest checks; else the best here."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A --selftest with fewer stores.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has: versions, backends, speed, and which path each kind of cache takes.

    With `--selftest` compute the shared test vectors and attention over every kind of cache; exits with 1 if a result
    is wrong.
    """
    from kvmlx.cli.doctor import show_doctor, show_selftest
    from kvmlx.cli.output import UsageError

    if selftest:
        raise typer.Exit(show_selftest(backend, quick=quick, as_json=as_json))
    if quick:
        raise UsageError("--quick goes with --selftest")
    show_doctor(head_dim=head_dim, backend=backend, as_json=as_json)


def _run(
    command: str, args: list[str], kv: str | None, backend: Backend | None, dtype: DType | None, as_json: bool = False
) -> None:
    """Run a command that both backends have."""
    from kvmlx.cli.backends import choose

    if choose(backend.value if backend else None) == "torch":
        from kvmlx.cli import hf

        hf.run(command, args, kv=kv, dtype=_name(dtype), as_json=as_json)
    else:
        from kvmlx.cli.stock import Stock

        Stock(command, args, kv=kv, dtype=_name(dtype), as_json=as_json).run()


cache = typer.Typer(no_args_is_help=True, help="Look into files of caches.")
app.add_typer(cache, name="cache")


@cache.command()
def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of save_prompt_cache, kvmlx's or mlx-lm's own.")],
    as_json: Json = False,
) -> None:
    """Say what a cache file holds: strategy, model, tokens, bytes; its checksum is verified.

    Loads no framework, so that it works wherever the file is.
    """
    from kvmlx.cli.cache import show_info

    show_info(file, as_json=as_json)


bench = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    epilog="A list is made by giving a flag repeatedly.",
)
app.add_typer(bench, name="bench")


class Format(StrEnum):
    json = "json"
    csv = "csv"
    md = "md"


class Mode(StrEnum):
    agnostic = "agnostic"
    aware = "aware"


class Measure(StrEnum):
    scores = "scores"
    fidelity = "fidelity"
    costs = "costs"


File = Annotated[str, typer.Argument(metavar="RESULTS", help="A file that `kvmlx bench` wrote.")]
Families = Annotated[
    list[str] | None, typer.Option(metavar="STRATEGY", help="Only this method, budget left out, and the full cache.")
]


@bench.callback(invoke_without_command=True)
def run_bench(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="A TOML file; flags go before it.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Results, appended to; a second run goes on.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few methods and tasks, in a few minutes.")] = False,
    model: Annotated[str | None, typer.Option(metavar="PATH|REPO|demo", help="The model; else the demo model.")] = None,
    backend: On = None,
    dtype: Dtype = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            "--kv",
            metavar="STRATEGY",
            help="A strategy; with its budget left out, one is found for each --match-bytes.",
        ),
    ] = None,
    match_bytes: Annotated[
        list[str] | None,
        typer.Option(metavar="4x", help="Compressions at which strategies are compared, in bytes held."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(metavar="N|F", help="Also run every family with this budget as it is.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME", help="See `kvmlx bench tasks`.")] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Your own text, with --questions.")] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSONL: a question and its answers a line.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(metavar="N", help="Tokens of a prompt.")] = None,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Compress before the question is known, or with the question at the end.")
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Contexts of each task and length.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Batch sizes at which costs are measured.")
    ] = None,
    measure: Annotated[list[Measure] | None, typer.Option(help="Only this.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the samples.")] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Run all methods on tasks on which the full cache fails, too.")
    ] = False,
    kvpress: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="The interpreter of an environment with kvpress.")
    ] = None,
    press: Annotated[
        list[str] | None, typer.Option(metavar="PRESS", help="A press of kvpress, such as `kvpress: snapkv`.")
    ] = None,
) -> None:
    """Compare strategies at equal bytes on one model: quality, memory and speed, from one run.

    Every method sees the same contexts. The full cache and the baselines random, streaming, int8 and int4 always take
    part. Results are appended to a file as they come; the same command goes on after an interruption.
    """
    if ctx.invoked_subcommand is not None:
        return
    from kvmlx.cli import bench as command

    lists = {
        "strategies": kv,
        "match_bytes": match_bytes and [command.compression(x) for x in match_bytes],
        "budgets": budget and [command.budget_of(x) for x in budget],
        "tasks": task,
        "lengths": length,
        "modes": mode and [m.value for m in mode],
        "batches": batch,
        "measures": measure and [m.value for m in measure],
        "presses": press,
    }
    single = {
        "model": model,
        "backend": backend.value if backend else None,
        "dtype": _name(dtype),
        "text": text,
        "questions": questions,
        "samples": samples,
        "seed": seed,
        "everything": everything or None,
        "kvpress": kvpress,
    }
    flags = {k: v for k, v in (lists | single).items() if v is not None and v != []}
    command.run_bench(config, flags, quick=quick, out=out)


@bench.command("report")
def bench_report(
    file: File,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The page; else beside the results.")] = None,
    plots: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Also write the plots as PNG and SVG there.")
    ] = None,
    kv: Families = None,
) -> None:
    """Write one self-contained HTML page: table, plots, machine, versions, and how to reproduce it."""
    from kvmlx.cli.bench import make_report

    make_report(file, out, plots, kv or [])


@bench.command("show")
def bench_show(
    file: File,
    kind: Annotated[Format | None, typer.Option("--format", help="For programs; else a table for people.")] = None,
    kv: Families = None,
) -> None:
    """Print results."""
    from kvmlx.cli.bench import show

    show(file, kind.value if kind else None, kv or [])


@bench.command("compare")
def bench_compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A results file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    kind: Annotated[Format | None, typer.Option("--format", help="For programs; else a table for people.")] = None,
) -> None:
    """Say what changed from A to B: paired where both asked the same questions."""
    from kvmlx.cli.bench import show_comparison

    show_comparison(a, b, kind.value if kind else None)


@bench.command("tasks")
def bench_tasks(
    name: Annotated[str | None, typer.Argument(help="Show a sample of one task.")] = None,
    length: Annotated[int, typer.Option(min=128, help="Tokens of the sample.")] = 512,
) -> None:
    """List the tasks, or show what one looks like."""
    from kvmlx.cli.bench import show_tasks

    show_tasks(name, length)


def _name(dtype: DType | None) -> str | None:
    return dtype.value if dtype else None
