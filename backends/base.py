"""What the plain backends share: primitives written once in kvmlx.ops and kvmlx.attention on the array namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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

    def from_numpy(self, x: np.ndarray) -> Array:
        raise NotImplementedError

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

    def gather_units(
        self,
        planes: Mapping[str, Array],
        starts: np.ndarray,
        units: Sequence[np.ndarray],
        spans: np.ndarray,
        *,
        per: Mapping[str, int],
        fresh: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Gather the rows that lanes keep into new spans, ``[sum(spans) * per, width]`` for each plane.

        Args:
            planes: flat planes ``[entries, width]``.
            starts: unit of the planes at which each lane begins.
            units: the units that each lane keeps, relative to its start, in order.
            spans: units of room of each lane. What lies in the room behind the rows is undefined.
            per: entries of each plane that a unit has.
            fresh: planes that units behind the last one of ``planes`` come from.
        """
        out = {}
        for name, plane in planes.items():
            n = per[name]
            source = plane if fresh is None else self.xp.concat([plane, fresh[name]], axis=0)
            pieces = []
            for start, kept, room in zip(starts, units, spans, strict=True):
                rows = ((start + kept)[:, None] * n + np.arange(n)).ravel()
                pieces.append(np.pad(rows, (0, int(room) * n - len(rows))))
            index = self.from_numpy(np.concatenate(pieces).astype(np.int32))
            out[name] = self.xp.take(source, index, axis=0)
        return out

    def attend(
        self,
        store: LayerStore,
        queries: Array,
        *,
        scale: float,
        sinks: Array | None = None,
        mask: Array | None = None,
        window: int | None = None,
    ) -> Array:
        return attention.attend(
            self,  # type: ignore[arg-type]
            store,
            queries,
            scale=scale,
            sinks=sinks,
            mask=mask,
            window=window,
        )
