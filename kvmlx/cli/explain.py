"""`kvmlx explain`: what a strategy will hold of a model's cache."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmlx.cli.models import config_of
from kvmlx.cli.output import print_json, size, stdout
from kvmlx.explain import Explanation, LayerBytes, explain
from kvmlx.strategy import Strategy


def show_explanation(strategy: str, model: str, context: int, *, dtype: str | None, step: int, as_json: bool) -> None:
    """Print bytes per layer and in total."""
    parsed = Strategy.parse(strategy)
    result = explain(parsed, config_of(model), context, dtype=dtype, prefill_step=step)
    if as_json:
        print_json(_document(result, model))
        return
    console = stdout()
    console.print(f"[bold]{escape(str(result.strategy))}[/] at {result.context:,} tokens")
    console.print(_table(result))
    for line in _totals(result):
        console.print(line)


def _document(result: Explanation, model: str) -> dict[str, object]:
    names = LayerBytes.__dataclass_fields__
    return {
        "strategy": str(result.strategy),
        "model": model,
        "context": result.context,
        "dtype": result.dtype,
        "prefill_step": result.prefill_step,
        "nbytes": result.nbytes,
        "full_nbytes": result.full_nbytes,
        "ratio": result.ratio,
        "peak_nbytes": result.peak_nbytes,
        "unmanaged_nbytes": result.unmanaged_nbytes,
        "layers": [{name: getattr(layer, name) for name in names} for layer in result.layers],
    }


def _table(result: Explanation) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    table.add_column("cache")
    for name in ("kept", "of them exact", "bytes each", "in fp16", "ratio"):
        table.add_column(name, justify="right")
    for alike in _runs(result.layers):
        layer = alike[0]
        first, last = layer.index, alike[-1].index
        cells = ["-"] * 5
        if layer.kind != "state":
            cells = [
                f"{layer.kept_tokens:,}",
                f"{layer.exact_tokens:,}",
                size(layer.nbytes),
                size(layer.full_nbytes),
            ]
            cells.append(f"{layer.nbytes / layer.full_nbytes:.3f}" if layer.managed else "-")
        table.add_row(f"{first}" if first == last else f"{first}-{last}", layer.kind, *cells)
    return table


def _runs(layers: tuple[LayerBytes, ...]) -> list[list[LayerBytes]]:
    """Group consecutive layers that hold the same."""
    return [
        list(run)
        for _, run in groupby(layers, key=lambda x: (x.kind, x.managed, x.kept_tokens, x.nbytes, x.full_nbytes))
    ]


def _totals(result: Explanation) -> list[str]:
    when = f"every {result.prefill_step:,} tokens" if result.strategy.bounded else "at the end of the prompt"
    inverse = f" ({1 / result.ratio:.1f}x)" if result.ratio < 1 else ""
    lines = [
        f"[bold]held[/]  {size(result.nbytes)}, head-room included: "
        f"{result.ratio:.3f} of fp16's {size(result.full_nbytes)}{inverse}",
        f"[bold]peak[/]  {size(result.peak_nbytes)} of keys and values in prefill; acts {when}",
    ]
    if result.unmanaged_nbytes:
        lines.append(f"[bold]left[/]  {size(result.unmanaged_nbytes)} in sliding-window layers, as the model made them")
    if result.dtype == "float32":
        lines.append("[dim]Exact rows are float32 here: twice the bytes of fp16.[/]")
    return lines
