"""What a run says of itself: title, machine, settings, commands, and how everything was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmlx.bench.records import Results
from kvmlx.bench.statistics import CONFIDENCE, MIN_SAMPLES, RESAMPLES
from kvmlx.bench.summary import INFORMATIVE

Fact = tuple[str, str]


def model(results: Results) -> str:
    """Return the model's name; of a path its last part."""
    named = str(_first(results, "settings").get("model") or "unnamed model")
    return named.rstrip("/").rpartition("/")[2] if named.startswith(("/", ".", "~")) else named


def title(results: Results) -> str:
    return f"kvmlx bench: {model(results)}"


def started(results: Results) -> str:
    """Return device, backend, numbers and day in a line."""
    settings, machine = _first(results, "settings"), _first(results, "machine")
    parts = [str(settings[k]) for k in ("backend", "dtype") if settings.get(k)]
    parts += [str(machine[k]) for k in ("cpu", "device") if machine.get(k)]
    begun = [str(run["started"]) for run in results.runs if run.get("started")]
    if begun:
        parts.append(begun[0][:10] if begun[0][:10] == begun[-1][:10] else f"{begun[0][:10]} to {begun[-1][:10]}")
    return " · ".join(parts)


def facts(results: Results) -> tuple[list[Fact], list[Fact], list[str]]:
    """Return the machine, the settings, and the commands; what changed between sessions is listed for each."""
    machine: dict[str, dict[str, None]] = {}
    for run in results.runs:
        for name, value in _mapping(run.get("machine")).items():
            machine.setdefault(name, {})[_word(value)] = None
    settings = [(str(k), _word(v)) for k, v in {**_first(results, "settings"), **_first(results, "config")}.items()]
    commands = dict.fromkeys(str(run["command"]) for run in results.runs if run.get("command"))
    return [(str(k), "; ".join(v)) for k, v in machine.items()], settings, list(commands)


def notes() -> list[str]:
    """Return how the numbers came about, in paragraphs."""
    return [
        "Equal bytes. A method listed with its budget open is tuned for each target so that what it keeps, metadata, "
        "sinks and recent tokens included, is that fraction of a full 16-bit cache; no nominal ratio is meant.",
        "Query-agnostic: the context is compressed before the question is known. Query-aware: with the question at its "
        "end. The two are never averaged.",
        "Scores are RULER's string matches, the mean of task means. A task counts at a length only where the full "
        f"cache reaches {INFORMATIVE}; the same questions are asked of every method.",
        f"Intervals are {CONFIDENCE:.0%} bootstrap intervals ({RESAMPLES:,} resamples, seeded). Contexts are "
        "resampled, not questions, each task for itself; with n contexts n - 1 are drawn, and the percentiles are "
        "widened as Student's t is against the normal. Differences are paired with the full cache question by "
        f"question. There is none with fewer than {MIN_SAMPLES} contexts. Each verdict stands alone: of 100 methods "
        "equal to the full cache about 5 will be called otherwise.",
        "`same` means that these samples do not tell a difference, not that there is none: the interval says how "
        "large it could be.",
        "Times are of this machine in this run, median with quartiles, beside the full cache at the same length and "
        "batch. Held bytes are the allocator's; peak is the most held during prefill beyond the weights.",
    ]


def _first(results: Results, key: str) -> Mapping[str, Any]:
    return _mapping(results.runs[0].get(key)) if results.runs else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(_word(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_word(v)}" for k, v in value.items())
    return str(value)
