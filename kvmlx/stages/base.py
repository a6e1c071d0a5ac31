"""What every stage is: a frozen dataclass whose fields are its whole configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kvmlx.types import Array, Budget, Codec, Need, Rows, StrategyError, check_budget

if TYPE_CHECKING:
    from kvmlx.strategy import Strategy

Kind = Literal["select", "allocate", "merge", "encode", "schedule"]


@dataclass(frozen=True)
class Stage:
    """One step of a strategy. Prints as text that parses back to an equal stage."""

    kind: ClassVar[Kind]
    name: ClassVar[str]
    paper: ClassVar[str] = ""
    """arXiv number, or empty."""
    summary: ClassVar[str] = ""
    """What it does, one line, for `kvmlx strategies`."""
    saves: ClassVar[str] = ""
    """What it saves: "tokens", "bits", "nothing (baseline)", ..."""
    needs: ClassVar[frozenset[Need]] = frozenset()

    def text(self) -> str:
        """Return the stage as a user writes it; fields at their defaults are left out."""
        given = [f"{f.name}={_text(v)}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def __str__(self) -> str:
        return self.text()

    def __or__(self, other: Stage | Strategy) -> Strategy:
        from kvmlx.strategy import Strategy

        return Strategy((self,)) | other


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def require(ok: bool, message: str) -> None:
    """Raise StrategyError with ``message`` unless ``ok``."""
    if not ok:
        raise StrategyError(message)


def require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer in ``[low, high]``."""
    bound = f">= {low}" if high is None else f"in [{low}, {high}]"
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    require(ok, f"{name} must be an integer {bound}, got {value!r}")


@dataclass(frozen=True)
class Select(Stage):
    """Score rows; the framework keeps the best within the budget, and the sinks and recent rows always."""

    kind: ClassVar[Kind] = "select"
    saves: ClassVar[str] = "tokens"

    budget: Budget = 1.0
    """Tokens kept per head, sinks and recent included, or the fraction kept."""
    sinks: int = 4
    """First tokens always kept."""
    recent: int = 64
    """Newest tokens always kept."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        require_int("sinks", self.sinks, 0)
        require_int("recent", self.recent, 0)
        if isinstance(self.budget, int):
            least = self.sinks + self.recent + 1
            require(
                self.budget >= least,
                f"budget={self.budget} leaves no room beside sinks={self.sinks} and recent={self.recent}: "
                f"it must be >= {least}, or lower sinks and recent",
            )

    @property
    def window(self) -> int:
        """Newest queries that ``score`` reads (W); 0 where it reads none."""
        return 0

    def score(self, rows: Rows) -> Array:
        """Return float32 ``[1, H, T]``, larger is kept. Called only where something must go."""
        raise NotImplementedError


@dataclass(frozen=True)
class Allocate(Stage):
    """Share a budget among layers and heads; the shares sum to exactly what was given."""

    kind: ClassVar[Kind] = "allocate"

    def layer_budgets(self, tokens: int, limit: int, n_layers: int, protected: int) -> list[int]:
        """Return the rows per head that each layer keeps; they sum to ``n_layers * tokens`` exactly.

        ``tokens`` is the mean per head, ``limit`` the rows that exist, ``protected`` those kept in any case
        (sinks and recent): every share lies in ``[min(protected, limit), limit]``.
        """
        return [tokens] * n_layers

    def head_budgets(self, scores: np.ndarray, tokens: int, protected: int) -> np.ndarray | None:
        """Return integer rows per head ``[H]`` that sum to ``H * tokens``, or None for equal shares.

        ``scores [H, T]`` float32 of the rows that compete, without the protected ones; ``tokens`` is the mean
        number of them that is kept per head. ``protected`` is for information: it is added by the caller.
        """
        return None


@dataclass(frozen=True)
class Merge(Stage):
    """Fold the rows that leave into rows that stay."""

    kind: ClassVar[Kind] = "merge"
    makes_bias: ClassVar[bool] = False
    """Whether ``fold`` returns a per-row bias that attention must add."""

    def fold(self, rows: Rows, kept: Array, dropped: Array) -> tuple[Array, Array, Array | None]:
        """Return keys ``[1, H, C, D]``, values ``[1, H, C, Dv]`` and bias ``[1, H, C]`` (or None) of the kept rows.

        ``kept [1, H, C]`` and ``dropped [1, H, T - C]`` are sorted row indices (int32).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Encode(Stage):
    """Store rows in fewer bits. A stage may cover keys, values, or both."""

    kind: ClassVar[Kind] = "encode"
    saves: ClassVar[str] = "bits"

    @property
    def sinks(self) -> int:
        """First tokens kept exact."""
        raise NotImplementedError

    @property
    def recent(self) -> int:
        """Newest tokens kept exact."""
        raise NotImplementedError

    def key_codec(self) -> Codec | None:
        """Return the codec of the keys, or None where this stage leaves them exact."""
        raise NotImplementedError

    def value_codec(self) -> Codec | None:
        """Return the codec of the values, or None where this stage leaves them exact."""
        raise NotImplementedError


@dataclass(frozen=True)
class Schedule(Stage):
    """Say when rows are selected and encoded."""

    kind: ClassVar[Kind] = "schedule"
    saves: ClassVar[str] = "peak"
