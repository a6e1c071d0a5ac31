"""A context prefilled once: uncompressed layers that note what methods need to act on it later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvmlx.session import LayerCache, Session
from kvmlx.stages.base import Select
from kvmlx.strategy import Strategy
from kvmlx.types import Array, Need, Rotary


@dataclass(frozen=True)
class Record(Select):
    """Keep every row and note what others will need of the queries. Not for users: it has no name to be parsed by."""

    name: ClassVar[str] = "record"

    budget: int = 2**31 - 1
    noted: frozenset[Need] = frozenset()
    newest: int = 0
    """Newest queries that are kept."""

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.noted

    @property
    def window(self) -> int:
        return self.newest


def recording(strategies: Sequence[Strategy], sinks: int) -> Strategy:
    """Return a strategy that changes nothing and notes all that these need; ``sinks`` are left out of moments."""
    noted = frozenset[Need]().union(*(s.needs for s in strategies))
    window = max((s.window for s in strategies), default=0)
    return Strategy((Record(noted=noted, newest=window, recent=window, sinks=sinks),))


class Recorder(LayerCache):
    """An uncompressed layer that notes what several strategies need.

    Moments of queries leave out a strategy's sinks: they are summed once for each number of them.
    """

    def __init__(self, cache: LayerCache, sinks: Sequence[int]) -> None:
        super().__init__(cache.backend, cache.session, cache.layer)
        self.by_sinks: dict[int, LayerCache] = {}
        for n in sinks:
            session = Session(recording([], n), self.session.model, self.session.n_managed)
            self.by_sinks[n] = LayerCache(self.backend, session, self.layer)

    def _add_moments(self, queries: Array, rotary: Rotary) -> list[Array]:
        out = []
        for counter in self.by_sinks.values():
            counter.offsets, counter.padding, counter.prefilling = self.offsets, self.padding, self.prefilling
            out += counter._add_moments(queries, rotary)
        return out

    def arrays(self) -> dict[str, Array]:
        out = super().arrays()
        for n, counter in self.by_sinks.items():
            out |= {f"{name} {n}": x for name, x in counter.arrays().items()}
        return out

    def refill(self, other: LayerCache) -> None:
        """Make of an empty cache what it would be, had it seen the same forwards; its strategy acts at the end only."""
        if self.store.empty:
            return  # the model has no attention in this layer
        strategy = other.strategy
        keys, values, _, _ = self.store.tail()
        other.start(self.batch)
        other.store.append(keys, values)
        for name in other.store.column_names:
            if name in self.store.columns:
                noted = self.store.columns[name][:, :, : self.store.end]
                column = other.store.columns[name][..., None]
                other.store.columns[name] = self.backend.put(column, noted[..., None], 0)[..., 0]
        other.offsets, other.scale = self.offsets.copy(), self.scale
        if "queries" in strategy.needs:
            newest = np.arange(self.strategy.window - strategy.window, self.strategy.window, dtype=np.int32)
            other.queries = self.backend.xp.take(self.queries, self.backend.from_numpy(newest), axis=2)
            other.n_queries = np.minimum(self.n_queries, strategy.window)
        if "query_moments" in strategy.needs:
            moments = self.by_sinks[strategy.sinks].moments
            if moments is not None:
                other.moments = (moments[0], moments[1], moments[2].copy())
