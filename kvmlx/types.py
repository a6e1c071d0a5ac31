"""Shapes, letters and the protocols that the rooms of kvmlx share.

Letters, used alike in docstrings, kernels and docs/format.md:
B batch; Hq query heads; H KV heads; G = Hq / H; L queries of one call; T tokens; W observed queries;
D head dim (Dv for values where it differs); R rows (kept tokens of one head). Arrays are ``[B, H, T, D]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Array = Any
"""An array of the backend's framework."""

Side = Literal["keys", "values"]
Need = Literal["queries", "sums", "query_moments", "prompt_queries"]
Budget = int | float


class KVMLXError(ValueError):
    """Base of the errors that a user can mend: the message names the value, the rule and what works."""


class StrategyError(KVMLXError):
    """A strategy that cannot be built: an unknown name, an impossible parameter, a wrong composition."""


class UnsupportedModelError(KVMLXError):
    """A model, or a use of it, that the strategy cannot serve."""


class CacheFileError(KVMLXError):
    """A cache file that is truncated, foreign, damaged or newer than this version."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_budget(budget: Budget, *, name: str = "budget") -> None:
    """Raise unless ``budget`` is a fraction kept, 0 < f <= 1, or a positive number of tokens."""
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise StrategyError(f"{name} must be a fraction kept in (0, 1] or a number of tokens, got {budget!r}")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise StrategyError(
            f"{name} as a fraction must be in (0, 1], got {budget!r}; for a number of tokens write it "
            "without a decimal point"
        )
    if isinstance(budget, int) and budget < 1:
        raise StrategyError(f"{name} in tokens must be >= 1, got {budget!r}; it is what is KEPT, e.g. 0.25 or 1024")


def resolve_budget(budget: Budget, tokens: int) -> int:
    """Return the tokens kept per head out of ``tokens``; a fraction is rounded down, never below 1."""
    if isinstance(budget, float):
        return min(tokens, max(1, int(budget * tokens + 1e-9)))
    return min(tokens, budget)


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary position embedding as data: ``angle = position * frequency`` for each pair of channels.

    ``first[i]`` and ``second[i]`` are the two channels of pair i; channels in no pair are not rotated.
    ``factor`` multiplies the rotated channels (YaRN's attention factor), 1.0 otherwise.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequency: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What is known of one attention layer before it runs; 0 where it is only known once it ran."""

    index: int
    n_heads: int = 0
    n_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    rotary: Rotary | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The layers that a strategy manages, in the order in which the model runs them."""

    model_type: str
    layers: tuple[LayerInfo, ...]

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One array of an encoded body: ``width`` elements of ``dtype`` for every ``rows`` consecutive rows."""

    name: str
    dtype: str
    width: int
    rows: int = 1

    @property
    def row_bytes(self) -> float:
        """Bytes per row."""
        return self.width * np.dtype(self.dtype).itemsize / self.rows


class Codec(Protocol):
    """How rows of keys, or of values, become planes. Written on ``backend.xp``, equal on every backend.

    ``decode(encode(x))`` lies in the codec's own basis: queries go through ``rotate`` before they meet decoded
    keys, an output over decoded values goes through ``unrotate`` once.
    """

    @property
    def bits(self) -> int:
        """Bits of one code, without metadata."""
        ...

    @property
    def block(self) -> int:
        """Rows that are encoded together; rows leave the exact tail in multiples of it."""
        ...

    def check(self, dim: int) -> None:
        """Raise StrategyError where vectors of ``dim`` channels cannot be encoded."""
        ...

    def planes(self, dim: int) -> tuple[PlaneSpec, ...]:
        """Return the planes that rows of ``dim`` channels become."""
        ...

    def encode(self, backend: Backend, x: Array) -> dict[str, Array]:
        """Encode ``x [..., n, dim]``, n a multiple of ``block``, to planes ``[..., n / rows, width]``."""
        ...

    def decode(self, backend: Backend, planes: Mapping[str, Array], dim: int) -> Array:
        """Return float32 ``[..., n, dim]`` in the codec's basis."""
        ...

    def rotate(self, backend: Backend, x: Array) -> Array:
        """Bring ``x [..., dim]`` into the codec's basis (an orthogonal map, or ``x`` itself)."""
        ...

    def unrotate(self, backend: Backend, x: Array) -> Array:
        """Undo ``rotate``."""
        ...


class Backend(Protocol):
    """What a framework gives to kvmlx. Primitives that a kernel may replace are methods, the rest is ``xp``."""

    name: str
    xp: Any
    """Array namespace with the names of the Python array API standard (NumPy 2 has them natively)."""

    def hadamard(self, x: Array, block: int) -> Array:
        """Multiply consecutive blocks of ``block`` channels (a power of two) by the orthonormal Hadamard matrix."""
        ...

    def put(self, buffer: Array, rows: Array, start: int) -> Array:
        """Write ``rows [..., n, D]`` at ``buffer[..., start : start + n, :]`` and return the buffer.

        The buffer given is spent: in place where the framework can.
        """
        ...

    def sdpa(
        self, queries: Array, keys: Array, values: Array, *, scale: float, causal: bool, mask: Any, sinks: Any
    ) -> Array:
        """Attend over dense keys and values through the framework's own attention."""
        ...

    def after(self, x: Array, dependencies: list[Array]) -> Array:
        """Return ``x``, evaluated only together with ``dependencies`` where the framework is lazy."""
        ...

    def evaluate(self, arrays: list[Array]) -> None:
        """Compute ``arrays`` now, where the framework is lazy."""
        ...

    def from_numpy(self, x: np.ndarray) -> Array: ...

    def to_numpy(self, x: Array) -> np.ndarray: ...

    def encode(self, codec: Codec, x: Array) -> dict[str, Array]: ...

    def decode(self, codec: Codec, planes: Mapping[str, Array], dim: int) -> Array: ...

    def column_sums(
        self, queries: Array, keys: Array, *, scale: float, n_queries: Any = None, bias: Array | None = None
    ) -> Array:
        """Return ``[B, Hq, T]`` float32: for each key the attention it receives, summed over the L queries.

        The last L keys are the queries' own tokens (causal, lower-right aligned). Exact, in two passes, without
        an ``[L, T]`` matrix beyond a bounded block of queries.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of ONE sequence in ONE layer as a stage sees them: no padding, sorted by position.

    keys ``[1, H, T, D]``; values ``[1, H, T, Dv]``, any float dtype; encoded rows arrive decoded, float32.
    queries ``[1, Hq, W, D]`` the newest W queries, post-RoPE: query i belongs to row ``T - W + i``.
    sums ``[1, H, T]`` float32: attention received so far, summed over queries, mean over the group.
    query_mean ``[1, Hq, D]``, query_cov ``[1, Hq, D, D]`` float32: moments of the PRE-RoPE queries.
    bias ``[1, H, T]`` float32 or None: what attention adds to the row's logit.
    """

    backend: Backend
    keys: Array
    values: Array
    scale: float
    length: int
    """Tokens seen so far: the position of the next one. More than T once rows were evicted."""
    layer: int
    n_layers: int
    queries: Array | None = None
    sums: Array | None = None
    query_mean: Array | None = None
    query_cov: Array | None = None
    rotary: Rotary | None = None
    bias: Array | None = None

    @property
    def xp(self) -> Any:
        return self.backend.xp
