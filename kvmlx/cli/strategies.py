"""`kvmlx strategies`: what a strategy can be made of."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmlx.cli.output import UsageError, print_json, stdout
from kvmlx.stages.base import Stage
from kvmlx.strategy import ALIASES, PRESETS, STAGES
from kvmlx.types import suggest

HEADINGS = {
    "select": "which tokens stay",
    "allocate": "how many, per layer and head",
    "merge": "what becomes of the others",
    "encode": "how what stays is stored",
    "schedule": "when it happens",
}


def show_strategies(name: str | None, *, as_json: bool) -> None:
    """Print all stages and presets, or the one called ``name``."""
    stages = {key: cls for key, cls in STAGES.items() if name in (None, key)}
    presets = {key: text for key, text in PRESETS.items() if name in (None, key)}
    if name in ALIASES:
        stages = {ALIASES[name][0]: STAGES[ALIASES[name][0]]}
    if not stages and not presets:
        known = [*STAGES, *ALIASES, *PRESETS]
        raise UsageError(f"unknown stage {name!r}.{suggest(name or '', known)} Known: {', '.join(known)}")
    if as_json:
        print_json({"stages": [_record(*item) for item in stages.items()], "presets": presets})
        return
    console = stdout()
    console.print(_table(stages, presets))
    if name is None:
        console.print("\nA strategy is a pipeline of stages: [bold]snapkv(budget=0.25) | int4[/]")


def parameters(cls: type[Stage]) -> dict[str, Any]:
    """Return a stage's parameters with their defaults."""
    return {field.name: field.default for field in fields(cls)}


def _record(name: str, cls: type[Stage]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": cls.kind,
        "summary": cls.summary,
        "paper": cls.paper or None,
        "parameters": parameters(cls),
        "saves": cls.saves or None,
        "aliases": _aliases(name),
    }


def _aliases(name: str) -> list[str]:
    return [alias for alias, (target, _) in ALIASES.items() if target == name]


def _table(stages: dict[str, type[Stage]], presets: dict[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("what it does, [dim]parameters[/]", ratio=1)
    table.add_column("saves", max_width=10)
    table.add_column("arXiv", no_wrap=True)
    for kind, heading in HEADINGS.items():
        rows = [(name, cls) for name, cls in stages.items() if cls.kind == kind]
        if rows:
            table.add_section()
            table.add_row(f"[bold default]{kind}[/]", f"[bold]{heading}[/]")
        for name, cls in rows:
            table.add_row(name, _what(name, cls), cls.saves, cls.paper)
    if presets:
        table.add_section()
        table.add_row("[bold default]preset[/]", "[bold]short for[/]")
    for name, text in presets.items():
        table.add_row(name, escape(text))
    return table


def _what(name: str, cls: type[Stage]) -> str:
    lines = [escape(cls.summary)]
    if shown := ", ".join(f"{key}={_value(value)}" for key, value in parameters(cls).items()):
        lines.append(f"[dim]{escape(shown)}[/]")
    if aliases := _aliases(name):
        lines.append(f"[dim]short: {', '.join(aliases)}[/]")
    return "\n".join(lines)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
