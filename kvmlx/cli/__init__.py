"""The command line: `kvmlx`. Imports nothing heavy, so that `kvmlx --help` is quick."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from kvmlx.cli.app import app

    app(prog_name="kvmlx")
