"""Expected Attention: rows that future queries are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvmlx.ops import NEG_INF, after, group_mean, softmax
from kvmlx.stages.base import Select, require, require_int
from kvmlx.stages.common import norm, spans
from kvmlx.types import Array, Need, Rotary, Rows, UnsupportedModelError


@dataclass(frozen=True)
class ExpectedAttention(Select):
    """Score a row by the attention of Gaussian queries at the next ``n_future`` positions.

    With the mean m and covariance S of the queries, rotated by the mean rotation of those positions,
    ``z = scale k.m + scale^2 k'Sk / 2`` and ``score = (softmax(z) + epsilon) |v|``, softmax over non-sinks.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "2510.00636"
    summary: ClassVar[str] = "attention expected from future queries, times the value's norm"
    needs: ClassVar[frozenset[Need]] = frozenset({"query_moments"})

    n_future: int = 512
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0
    """Added to the attention, so that a row of a long value is never worth nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("n_future", self.n_future, 1)
        require(
            isinstance(self.epsilon, int | float) and 0.0 <= self.epsilon < float("inf"),
            f"epsilon must be a number >= 0, got {self.epsilon!r}",
        )

    def score(self, rows: Rows) -> Array:
        """Return the expected attention, mean over the group ``[1, H, T]``; sinks score as the best row."""
        xp = rows.xp
        h, t = rows.keys.shape[1:3]
        z = self._logits(rows)
        if rows.bias is not None:
            z = z + xp.repeat(rows.bias, z.shape[1] // h, axis=1)
        sink = xp.arange(t) < self.sinks
        score = group_mean(xp, softmax(xp, xp.where(sink, NEG_INF, z)), h)
        if self.use_vnorm:
            score = (score + self.epsilon) * norm(xp, rows.values)
        return xp.where(sink, xp.max(score, axis=-1, keepdims=True), score)

    def _logits(self, rows: Rows) -> Array:
        """Return the log of the expected exponentiated logit ``[1, Hq, T]``."""
        if rows.rotary is None:
            raise UnsupportedModelError(
                f"expected_attention needs a plain rotary position embedding, layer {rows.layer} has none; "
                "use snapkv, h2o or keydiff"
            )
        assert rows.query_mean is not None and rows.query_cov is not None
        xp = rows.xp
        _, h, t, d = rows.keys.shape
        hq = rows.query_mean.shape[1]
        rotation = mean_rotation(rows.rotary, d, rows.length, self.n_future)
        r = rows.backend.from_numpy(rotation.astype(np.float32))
        mean = xp.reshape(xp.matmul(rows.query_mean, xp.permute_dims(r, (1, 0))), (1, h, hq // h, d))
        cov = xp.matmul(xp.matmul(r, rows.query_cov), xp.permute_dims(r, (1, 0)))
        cov = xp.reshape(cov, (1, h, hq // h, d, d))
        out = []
        for span in spans(t, hq * d):
            keys = xp.astype(rows.keys[:, :, span], xp.float32) * rows.scale
            z = xp.matmul(mean, xp.permute_dims(keys, (0, 1, 3, 2)))
            if self.use_covariance:
                keys = keys[:, :, None]
                z = z + 0.5 * xp.sum(xp.matmul(keys, after(xp, cov, out)) * keys, axis=-1)
            out.append(z)
        return xp.reshape(xp.concat(out, axis=-1), (1, hq, t))


def mean_rotation(rotary: Rotary, dim: int, start: int, count: int) -> np.ndarray:
    """Return the mean of the rotations at positions ``start, ..., start + count - 1``, ``[dim, dim]``."""
    angles = np.arange(start, start + count)[:, None] * np.asarray(rotary.frequency, dtype=np.float64)
    cos = np.cos(angles).mean(axis=0) * rotary.factor
    sin = np.sin(angles).mean(axis=0) * rotary.factor
    first, second = list(rotary.first), list(rotary.second)
    rotation = np.eye(dim)
    rotation[first, first] = cos
    rotation[second, second] = cos
    rotation[first, second] = -sin
    rotation[second, first] = sin
    return rotation
