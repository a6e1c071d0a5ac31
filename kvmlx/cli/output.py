"""What all commands share in talking to a person or to a program: consoles, units, errors, progress."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvmlx.types import KVMLXError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EXTRAS = {
    "mlx": "mlx",
    "mlx_lm": "mlx",
    "transformers": "mlx",
    "huggingface_hub": "mlx",
    "torch": "torch",
    "triton": "torch",
    "gguf": "demo",
    "matplotlib": "bench",
    "datasets": "hub",
}
"""Which extra of kvmlx brings a package."""

LONG_PROMPT_TOKENS = 512
"""A shorter prompt is prefilled before a bar could be read."""


class UsageError(KVMLXError):
    """A command line that cannot be served; the message says what would work."""


def stdout() -> Console:
    """Return a console for results; made at each call, since tests and pipes exchange `sys.stdout`."""
    return Console(highlight=False)


def stderr() -> Console:
    """Return a console for everything that is not a result."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def error_line(error: Exception) -> str | None:
    """Return the one line for an error that the user can mend, None for one that is a bug."""
    from kvmlx.demo_model import DemoModelError

    if isinstance(error, KVMLXError | DemoModelError):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if extra := EXTRAS.get(package):
            return f"this needs the package {package}: pip install 'kvmlx[{extra}]'"
    return None


def print_error(line: str) -> None:
    """Write an error as one line to stderr; a terminal wraps it, a pipe does not."""
    stderr().print(f"[bold red]kvmlx:[/] {_plain(line)}", soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def size(nbytes: float) -> str:
    """Return bytes as a person reads them, in powers of 1000 as mlx-lm counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5 or unit == "GB":
            break
        nbytes /= 1000
    digits = 0 if unit == "B" or abs(nbytes) >= 99.95 else 1 if abs(nbytes) >= 9.995 else 2
    return f"{nbytes:,.{digits}f} {unit}"


def ratio(value: float) -> str:
    """Return bytes held / bytes of the full fp16 cache, and its inverse."""
    if value <= 0:
        return "empty"
    return f"{value:.3f} of fp16 ({1 / value:.1f}x)" if value < 1 else f"{value:.2f} of fp16"


class PrefillBar:
    """A progress bar for a long prefill; shown only on a terminal, gone before the first token is printed."""

    def __init__(self, label: str = "prefill", *, enabled: bool | None = None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._label = label
        self._bar: tuple[Progress, TaskID] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` tokens; the signature of mlx-lm's `prompt_progress_callback`."""
        if not self._enabled or total < LONG_PROMPT_TOKENS:
            return
        if self._bar is None:
            self._bar = self._start(total)
        progress, task = self._bar
        progress.update(task, completed=done)

    def close(self) -> None:
        """Remove the bar."""
        self._enabled = False
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _start(self, total: int) -> tuple[Progress, TaskID]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn(self._label),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("tokens"),
        )
        # mlx-lm prints the answer itself: the bar must not take its stdout.
        progress = Progress(
            *columns,
            TimeElapsedColumn(),
            console=stderr(),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        progress.start()
        return progress, progress.add_task(self._label, total=total)
