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


def _name(dtype: DType | None) -> str | None:
    return dtype.value if dtype else None
