"""SnapKV: rows that the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvmlx.ops import NEG_INF, group_mean
from kvmlx.stages.base import Select, require, require_int
from kvmlx.types import Array, Need, Rows


@dataclass(frozen=True)
class SnapKV(Select):
    """Score a row by the attention of the newest ``window`` queries, pooled over ``kernel`` neighbours.

    The window's own rows count in the softmax, but neither compete nor enter the pooling.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"
    summary: ClassVar[str] = "attention of the newest queries, pooled over neighbours"
    needs: ClassVar[frozenset[Need]] = frozenset({"queries"})

    window: int = 32
    """Newest queries that vote."""
    kernel: int = 21
    """Rows pooled together, an odd number; 1 pools nothing.

    The paper uses 5. Of nine needles of five tokens that the full cache finds (2k tokens, budget 0.25) 21 found all
    and 13 eight; 7 found two of the five it was tried on. The question attends to an answer's first token, and
    pooling keeps the rest of it.
    """
    pool: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("window", self.window, 1)
        require_int("kernel", self.kernel, 1)
        require(self.kernel % 2 == 1, f"kernel must be odd, got {self.kernel!r}")
        require(self.pool in ("avg", "max"), f"pool must be avg or max, got {self.pool!r}")
        require(
            self.recent >= self.window,
            f"recent={self.recent} must be >= window={self.window}: the voting queries' rows always stay",
        )

    def score(self, rows: Rows) -> Array:
        """Return the pooled attention sums, mean over the group ``[1, H, T]``; the window's rows win."""
        assert rows.queries is not None
        xp = rows.xp
        queries = rows.queries[:, :, -self.window :]
        h, t = rows.keys.shape[1:3]
        w = min(t, queries.shape[2])
        sums = rows.backend.column_sums(queries, rows.keys, scale=rows.scale, bias=rows.bias)
        voted = group_mean(xp, _pool(xp, sums[..., : t - w], self.kernel, self.pool), h)
        # A column sums to at most one per query.
        own = xp.full((1, h, w), float(w + 1), dtype=xp.float32)
        return xp.concat([voted, own], axis=-1)


def _pool(xp: Any, x: Array, kernel: int, pool: str) -> Array:
    """Pool ``x [..., T]`` with stride 1. As in the paper's code the average counts the padding, as zeros."""
    t, pad = x.shape[-1], kernel // 2
    edge = xp.full((*x.shape[:-1], pad), 0.0 if pool == "avg" else NEG_INF, dtype=xp.float32)
    padded = xp.concat([edge, x, edge], axis=-1)
    out = padded[..., :t]
    for shift in range(1, kernel):
        neighbour = padded[..., shift : shift + t]
        out = out + neighbour if pool == "avg" else xp.maximum(out, neighbour)
    return out / kernel if pool == "avg" else out
