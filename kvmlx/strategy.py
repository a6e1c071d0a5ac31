"""A strategy is a value: a pipeline of stages that prints as text and parses from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from kvmlx.stages.allocate.adakv import AdaKV
from kvmlx.stages.allocate.pyramidkv import PyramidKV
from kvmlx.stages.allocate.uniform import Uniform
from kvmlx.stages.base import Allocate, Encode, Merge, Schedule, Select, Stage
from kvmlx.stages.encode.int import ALIASES as INT_ALIASES
from kvmlx.stages.encode.int import Int
from kvmlx.stages.encode.kivi import KIVI
from kvmlx.stages.encode.turboquant import TurboQuant
from kvmlx.stages.merge.keepkv import KeepKV
from kvmlx.stages.schedule.at_end import AtEnd
from kvmlx.stages.schedule.bounded import Bounded
from kvmlx.stages.schedule.every import Every
from kvmlx.stages.select.expected_attention import ExpectedAttention
from kvmlx.stages.select.full import Full
from kvmlx.stages.select.h2o import H2O
from kvmlx.stages.select.keydiff import KeyDiff
from kvmlx.stages.select.knorm import Knorm
from kvmlx.stages.select.leverage import Leverage
from kvmlx.stages.select.random import Random
from kvmlx.stages.select.snapkv import SnapKV
from kvmlx.stages.select.streaming import Streaming
from kvmlx.stages.select.tova import TOVA
from kvmlx.types import Codec, Need, StrategyError, suggest

STAGES: dict[str, type[Stage]] = {
    "full": Full,
    "random": Random,
    "streaming": Streaming,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "leverage": Leverage,
    "expected_attention": ExpectedAttention,
    "uniform": Uniform,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "keepkv": KeepKV,
    "int": Int,
    "kivi": KIVI,
    "turboquant": TurboQuant,
    "at_end": AtEnd,
    "bounded": Bounded,
    "every": Every,
}

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {name: ("int", args) for name, args in INT_ALIASES.items()}

PRESETS: dict[str, str] = {
    "balanced": "turboquant(k=5, v=4, center=64)",
    "small": "turboquant(bits=4, center=64)",
    "smaller": "turboquant(k=3, v=2, center=64)",
    "tiny": "turboquant(bits=2, center=64)",
}
"""Names for the pipelines that measured best on a real model; docs/methods.md has each one's cost."""

_ORDER = ("select", "allocate", "merge", "encode", "schedule")


@dataclass(frozen=True)
class Strategy:
    """A pipeline: at most one select, allocate and merge stage, encode stages for disjoint sides, schedules.

    Raises:
        StrategyError: the stages do not go together.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        _check_composition(self)

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Build a strategy from text such as ``"snapkv(budget=0.25) | int4"``.

        Raises:
            StrategyError: the text is not a strategy; the message says where, and what would be.
        """
        return cls(tuple(_stages(text)))

    @classmethod
    def of(cls, value: str | Stage | Strategy) -> Strategy:
        """Return ``value`` as a strategy: text is parsed, a stage is a pipeline of one."""
        if isinstance(value, Strategy):
            return value
        if isinstance(value, Stage):
            return cls((value,))
        if isinstance(value, str):
            return cls.parse(value)
        raise TypeError(f"a strategy is text, a stage or a Strategy, got {type(value).__name__}")

    def __or__(self, other: Stage | Strategy) -> Strategy:
        if not isinstance(other, Stage | Strategy):
            return NotImplemented
        return Strategy(self.stages + Strategy.of(other).stages)

    def __str__(self) -> str:
        return " | ".join(s.text() for s in self.stages) or "full"

    def _one(self, kind: type) -> Any:
        return next((s for s in self.stages if isinstance(s, kind)), None)

    @cached_property
    def select(self) -> Select | None:
        """The selector, or None where every row is kept."""
        stage = self._one(Select)
        return None if stage is None or isinstance(stage, Full) else stage

    @cached_property
    def allocate(self) -> Allocate:
        return self._one(Allocate) or Uniform()

    @cached_property
    def merge(self) -> Merge | None:
        return self._one(Merge)

    @cached_property
    def encoders(self) -> tuple[Encode, ...]:
        return tuple(s for s in self.stages if isinstance(s, Encode))

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """Return the codecs of keys and values; None for a side that stays exact."""
        return self._codecs

    @cached_property
    def _codecs(self) -> tuple[Codec | None, Codec | None]:
        keys = next((c for e in self.encoders if (c := e.key_codec()) is not None), None)
        values = next((c for e in self.encoders if (c := e.value_codec()) is not None), None)
        return keys, values

    @cached_property
    def encodes(self) -> bool:
        return any(c is not None for c in self.codecs())

    @cached_property
    def bounded(self) -> bool:
        """Whether rows are selected and encoded after each prefill chunk, not only at the end of the prompt."""
        if self._one(Bounded) or self._one(AtEnd):
            return self._one(Bounded) is not None
        return self.select is None

    @cached_property
    def every(self) -> int | None:
        """Decoded tokens between selections, or None where decoding selects nothing."""
        stage = self._one(Every)
        return stage.tokens if stage else None

    @cached_property
    def sinks(self) -> int:
        """First tokens that are kept, and kept exact."""
        return max([s.sinks for s in (self.select, *self.encoders) if s is not None], default=0)

    @cached_property
    def recent(self) -> int:
        """Newest tokens that are kept, and kept exact."""
        return max([s.recent for s in (self.select, *self.encoders) if s is not None], default=0)

    @cached_property
    def window(self) -> int:
        """Newest queries that the stages read."""
        windows = [getattr(s, "window", 0) for s in self.stages if isinstance(s, Select | Merge)]
        return max(windows, default=0)

    @cached_property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(s.needs for s in self.stages))

    @cached_property
    def ragged(self) -> bool:
        """Whether heads may keep different numbers of rows."""
        return isinstance(self.allocate, AdaKV) and self.select is not None

    @cached_property
    def identity(self) -> bool:
        """Whether the strategy can change nothing: every row kept, every row exact."""
        full = self.select is None or (isinstance(self.select.budget, float) and self.select.budget == 1.0)
        return full and not self.encodes


def _check_composition(strategy: Strategy) -> None:
    stages = strategy.stages
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"a strategy is made of stages, got {stage!r}")
    ranks = [_ORDER.index(s.kind) for s in stages]
    if ranks != sorted(ranks):
        right = " | ".join(s.text() for s in sorted(stages, key=lambda s: _ORDER.index(s.kind)))
        raise StrategyError(f"stages run as {', '.join(_ORDER)}: write {right!r}")
    for kind in (Select, Allocate, Merge):
        twice = [s for s in stages if isinstance(s, kind)]
        if len(twice) > 1:
            raise StrategyError(f"{twice[0].name} and {twice[1].name} are both {twice[0].kind} stages: keep one")
    for side, codec in (("keys", "key_codec"), ("values", "value_codec")):
        both = [s for s in strategy.encoders if getattr(s, codec)() is not None]
        if len(both) > 1:
            raise StrategyError(
                f"{both[0].text()} and {both[1].text()} both encode the {side}: keep one, or give each a side, "
                "as in 'kivi(k=4) | turboquant(v=4)'"
            )
    selects = strategy._one(Select) is not None
    for kind in (Allocate, Merge, Every):
        stage = strategy._one(kind)
        if stage is not None and not selects:
            raise StrategyError(
                f"{stage.name} needs a select stage before it, e.g. 'snapkv(budget=0.25) | {stage.name}'"
            )
    if strategy.merge is not None and strategy.ragged:
        raise StrategyError(
            f"{strategy.merge.name} folds rows within equal budgets per head and cannot follow adakv: "
            "use uniform or pyramidkv"
        )
    if strategy.ragged and isinstance(strategy.select, TOVA):
        raise StrategyError(
            "tova keeps the same rows in every head and cannot follow adakv's budgets: use h2o or snapkv"
        )
    schedules = [s for s in stages if isinstance(s, Schedule)]
    if len({type(s) for s in schedules}) < len(schedules):
        raise StrategyError(f"{schedules[0].name} is given twice")
    if strategy._one(AtEnd) and strategy._one(Bounded):
        raise StrategyError("at_end and bounded exclude each other: keep one")
    if strategy.recent < strategy.window:
        raise StrategyError(
            f"recent={strategy.recent} is less than the window={strategy.window} of observed queries: "
            f"set recent >= {strategy.window}"
        )
    _check_room(strategy)


def _check_room(strategy: Strategy) -> None:
    select = strategy.select
    if select is not None and isinstance(select.budget, int):
        least = strategy.sinks + strategy.recent + 1
        if select.budget < least:
            raise StrategyError(
                f"budget={select.budget} leaves no room beside {strategy.sinks} sinks and {strategy.recent} recent "
                f"tokens of the pipeline: it must be >= {least}, or lower sinks and recent"
            )


_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)(?![\w.])"
    r"|(?P<word>[A-Za-z_][\w-]*)|(?P<string>'[^']*'|\"[^\"]*\")|(?P<mark>[|(),=]))"
)


class _Parser:
    """Recursive descent over ``name(key=value, ...) | ...``; nothing is ever evaluated."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._split())
        self.at = 0

    def _split(self) -> Iterator[tuple[str, str, int]]:
        at, end = 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise self._error(f"unexpected {self.text[at:].lstrip()[:1]!r}", at)
            kind = match.lastgroup or ""
            yield kind, match.group(kind), match.start(kind)
            at = match.end()

    def _error(self, what: str, at: int | None = None) -> StrategyError:
        at = at if at is not None else self._peek()[2]
        return StrategyError(
            f"{what} at character {at + 1} of {self.text!r}; a strategy looks like 'snapkv(budget=0.25) | int4'"
        )

    def _peek(self) -> tuple[str, str, int]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end", len(self.text))

    def _next(self) -> tuple[str, str, int]:
        token = self._peek()
        self.at += 1
        return token

    def _accept(self, mark: str) -> bool:
        kind, value, _ = self._peek()
        if kind == "mark" and value == mark:
            self.at += 1
            return True
        return False

    def calls(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield self._call()
        while self._accept("|"):
            yield self._call()
        if self._peek()[0] != "end":
            raise self._error(f"expected '|' or the end, got {self._peek()[1]!r}")

    def _call(self) -> tuple[str, dict[str, Any]]:
        kind, name, at = self._next()
        if kind != "word":
            raise self._error(f"expected the name of a stage, got {name!r}", at)
        return name, self._arguments() if self._accept("(") else {}

    def _arguments(self) -> dict[str, Any]:
        args: dict[str, Any] = {}
        while not self._accept(")"):
            kind, key, at = self._next()
            if kind != "word" or not self._accept("="):
                raise self._error(f"expected key=value, got {key!r}", at)
            if key in args:
                raise self._error(f"{key!r} is given twice", at)
            args[key] = self._value()
            if not self._accept(","):
                if not self._accept(")"):
                    raise self._error(f"expected ',' or ')', got {self._peek()[1]!r}")
                break
        return args

    def _value(self) -> Any:
        kind, value, at = self._next()
        if kind == "number":
            return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
        if kind == "string":
            return value[1:-1]
        if kind == "word":
            return {"true": True, "false": False, "none": None}.get(value, value)
        raise self._error(f"expected a value, got {value!r}", at)


def parse_calls(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and parameters of each part of ``name(key=value, ...) | ...``; names are not looked up.

    Raises:
        StrategyError: the text is not of this form; the message names the character.
    """
    return _Parser(text).calls()


def _stages(text: str) -> Iterator[Stage]:
    for name, args in parse_calls(text):
        if name not in PRESETS:
            yield make_stage(name, args)
        elif args:
            raise StrategyError(f"the preset {name!r} takes no parameters; it is {PRESETS[name]!r}: write that out")
        else:
            yield from _stages(PRESETS[name])


def make_stage(name: str, args: dict[str, Any]) -> Stage:
    """Build the stage ``name`` with ``args``, or say what is misspelt and what would work."""
    target, preset = ALIASES.get(name, (name, {}))
    if target not in STAGES:
        known = [*STAGES, *ALIASES, *PRESETS]
        raise StrategyError(f"unknown stage {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    cls = STAGES[target]
    allowed = [f.name for f in fields(cls) if f.name not in preset]
    for key in args:
        if key not in allowed:
            raise StrategyError(
                f"{name} has no parameter {key!r}.{suggest(key, allowed)} It takes: {', '.join(allowed) or 'none'}"
            )
    return cls(**preset, **args)
