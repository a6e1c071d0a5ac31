"""How numbers and names are written, in every format alike."""

from __future__ import annotations

from kvmlx.bench.statistics import Estimate, Verdict
from kvmlx.bench.summary import Name

NONE = "–"
MODES = {"agnostic": "query-agnostic", "aware": "query-aware"}
MARKS: dict[Verdict | None, str] = {"better": "▲", "same": "=", "worse": "▼", None: ""}


def name(value: Name) -> str:
    return value.family if value.target is None else f"{value.family}, {target(value.target)}"


def target(value: float | None) -> str:
    """Return ``4x``, or what is said of a method that ran as it was written."""
    return "as written" if value is None else f"{value:g}x"


def mode(value: str) -> str:
    return MODES.get(value, value)


def tokens(value: int | None) -> str:
    return "all lengths" if value is None else f"{value:,} tokens"


def score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def estimate(value: Estimate | None) -> str:
    """Return ``0.912 [0.870, 0.950]``."""
    if value is None:
        return NONE
    return score(value.value) + interval(value)


def interval(value: Estimate | None) -> str:
    """Return ``" [0.870, 0.950]"``, or nothing where there is no interval."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f" [{value.low:.3f}, {value.high:.3f}]"


def percent(value: float | None) -> str:
    """Return a share as a percentage, with a decimal below 99.95%."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}%"


def small(value: float | None) -> str:
    """Return a number over several orders of magnitude, to three digits."""
    if value is None:
        return NONE
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x"


def megabytes(value: float | None) -> str:
    return NONE if value is None else f"{value / 1e6:,.2f}"


def verdict(value: Verdict | None, *, full: bool = False) -> str:
    """Return a verdict as a word."""
    return "the reference" if full else value or "too few contexts to say"
