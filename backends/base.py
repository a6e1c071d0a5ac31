"""What the plain backends share: primitives written once in kvmlx.ops and kvmlx.attention on the array namespace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmlx import attention, ops
from kvmlx.store import LayerStore
from kvmlx.types import Array, Codec


class PlainBackend:
    """Base of a backend: a subclass brings ``xp``, `hadamard`, `put`, `sdpa`, and may override any primitive.

    Backends are singletons without state: copying or pickling a cache keeps the reference.
    """

    name: str
    xp: Any
    path: str = "plain"
    """Which implementation runs: every cache can tell."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainBackend:
        return self

    def after(self, x: Array, dependencies: list[Array]) -> Array:
        """Return ``x``, evaluated only together with ``dependencies`` where the framework is lazy."""
        return x

    def evaluate(self, arrays: list[Array]) -> None:
        """Compute ``arrays`` now, where the framework is lazy."""

    def encode(self, codec: Codec, x: Array) -> dict[str, Array]:
        return codec.encode(self, x)  # type: ignore[arg-type]

    def decode(self, codec: Codec, planes: Mapping[str, Array], dim: int) -> Array:
        return codec.decode(self, planes, dim)  # type: ignore[arg-type]

    def column_sums(
        self, queries: Array, keys: Array, *, scale: float, n_queries: Any = None, bias: Array | None = None
    ) -> Array:
        return ops.column_sums(self.xp, queries, keys, scale=scale, n_queries=n_queries, bias=bias)

    def attend(
        self,
        store: LayerStore,
        queries: Array,
        *,
        scale: float,
        sinks: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        return attention.attend(self, store, queries, scale=scale, sinks=sinks, mask=mask)  # type: ignore[arg-type]
