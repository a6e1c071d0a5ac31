"""What one benchmark runs: a value, read from a TOML file and from flags."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from kvmlx.bench.types import Mode
from kvmlx.types import KVMLXError, suggest

ALWAYS = ("random", "streaming", "int8", "int4")
"""Baselines that no comparison goes without, beside the full cache."""
MEASURES = ("scores", "fidelity", "costs")
MODES: tuple[str, ...] = get_args(Mode)

DEFAULT_STRATEGIES = (
    "snapkv",
    "keydiff",
    "expected_attention",
    "leverage",
    "snapkv | small",
    "leverage | small",
    "balanced",
    "small",
    "smaller",
    "tiny",
)
DEFAULT_TASKS = ("niah_single_2", "niah_multikey_1", "several_questions")


@dataclass(frozen=True, slots=True)
class Config:
    """Strategies x budgets x tasks x lengths x batch sizes on one model.

    Every field is a key of the TOML file and a flag of the same name.
    """

    model: str = "demo"
    backend: str | None = None
    dtype: str | None = None
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES
    """Families (``snapkv | small``), strategies with a budget of their own, or baselines of the frameworks."""
    match_bytes: tuple[float, ...] = (4.0,)
    """Compressions that each family's budget is tuned to; families only."""
    budgets: tuple[float | int, ...] = ()
    """Budgets that each family is also run with as they are, fractions or tokens."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    text: str | None = None
    """The user's own text file, or None."""
    questions: str | None = None
    """JSONL of questions about it, or with contexts of their own."""
    lengths: tuple[int, ...] = (1024,)
    modes: tuple[str, ...] = ("agnostic",)
    samples: int = 4
    """Contexts of each task and length."""
    measures: tuple[str, ...] = MEASURES
    fidelity_texts: int = 1
    fidelity_tokens: int = 64
    batches: tuple[int, ...] = (1,)
    steps: int = 16
    repeats: int = 3
    chunk: int = 512
    """Prompt tokens processed at a time."""
    seed: int = 0
    max_tokens: int = 32
    """Most tokens of an answer, where its task allows as many; with 128 all have RULER's own limits."""
    everything: bool = False
    """Run every method on tasks on which the full cache fails too."""
    kvpress: str | None = None
    """The Python interpreter of an environment with kvpress, whose presses then run as methods."""
    presses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "strategies",
            "match_bytes",
            "budgets",
            "tasks",
            "lengths",
            "modes",
            "measures",
            "batches",
            "presses",
        ):
            _check_items(name, getattr(self, name))
        _check_known("modes", self.modes, MODES)
        _check_known("measures", self.measures, MEASURES)
        for name in ("samples", "fidelity_texts", "fidelity_tokens", "steps", "repeats", "chunk", "max_tokens"):
            _check_least(name, getattr(self, name), 1)
        for length in self.lengths:
            _check_least("lengths", length, 128)
        for batch in self.batches:
            _check_least("batches", batch, 1)
        for target in self.match_bytes:
            if not target > 1:
                raise KVMLXError(f"match_bytes must be compressions above 1, such as 4 for a quarter, got {target!r}")
        if self.questions is None and self.text is not None:
            raise KVMLXError(f"text = {self.text!r} needs questions, a JSONL file with what is asked about it")
        if self.presses and self.kvpress is None:
            raise KVMLXError("presses need kvpress, the Python interpreter of an environment in which it is installed")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers: two runs of one results file must agree in it."""
        free = {"strategies", "match_bytes", "budgets", "tasks", "lengths", "modes", "measures", "presses", "kvpress"}
        free |= {"samples", "batches", "fidelity_texts", "everything"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}

    def but(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with these fields changed; the same checks as for a file."""
        return dataclasses.replace(self, **{k: _value(k, v) for k, v in changes.items()})


QUICK: dict[str, Any] = {
    "strategies": ("snapkv", "leverage", "leverage | small", "small"),
    "tasks": ("niah_single_2", "niah_multikey_1"),
    "lengths": (512,),
    "samples": 2,
    "fidelity_tokens": 16,
    "steps": 8,
    "repeats": 1,
    "max_tokens": 16,
}
"""What `--quick` runs."""


def read_config(path: str | Path, base: Config) -> Config:
    """Return ``base`` with the fields of a TOML file changed.

    Raises:
        KVMLXError: it is missing, no TOML, or a key or value in it is wrong; the message names it.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KVMLXError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KVMLXError(f"{path} is no TOML file: {error}") from error
    try:
        return base.but(document)
    except KVMLXError as error:
        raise KVMLXError(f"{path}: {error}") from error


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}


def _value(name: str, value: Any) -> Any:
    """Return a value in the type of its field, or raise."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(Config)}
    if name not in fields:
        raise KVMLXError(f"unknown key {name!r};{suggest(name, fields)} known are {', '.join(fields)}")
    kind = fields[name]
    if kind.startswith("tuple"):
        items = value if isinstance(value, list | tuple) else [value]
        inner = kind[len("tuple[") : kind.index(",")]
        return tuple(_checked(name, item, inner) for item in items)
    return _checked(name, value, kind)


def _checked(name: str, value: Any, kind: str) -> Any:
    kinds = [k.strip() for k in kind.split("|")]
    allowed = tuple(t for k in kinds for t in _TYPES[k])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(("an " if k == "int" else "a ") + k for k in kinds if k != "None")
        raise KVMLXError(f"{name} must be {wanted}, got {value!r}")
    return float(value) if kinds == ["float"] else value


def _check_items(name: str, items: tuple[Any, ...]) -> None:
    if len(set(items)) != len(items):
        twice = next(x for x in items if items.count(x) > 1)
        raise KVMLXError(f"{name} has {twice!r} twice")


def _check_known(name: str, items: tuple[str, ...], known: tuple[str, ...]) -> None:
    for item in items:
        if item not in known:
            raise KVMLXError(f"{name} must be of {', '.join(known)}, got {item!r}.{suggest(item, known)}")


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise KVMLXError(f"{name} must be at least {least}, got {value}")
