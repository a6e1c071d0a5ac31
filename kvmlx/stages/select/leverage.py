"""Leverage scores: rows that the other rows do not explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from kvmlx.ops import after
from kvmlx.stages.base import Select, require
from kvmlx.stages.common import spans
from kvmlx.types import Array, Backend, Rows

SIDES = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}


@dataclass(frozen=True)
class Leverage(Select):
    """Score a row by its statistical leverage among the centered values (or keys) of its head.

    ``x'(X'X + ridge T S)^-1 x`` with X the T centered rows and S the diagonal of their variances: 1 for a direction
    that no other row has, near D / T for a row among many alike. Reads no attention.
    """

    name: ClassVar[str] = "leverage"
    paper: ClassVar[str] = "2507.08143"
    summary: ClassVar[str] = "values that the other values do not explain"

    of: Literal["keys", "values", "both"] = "values"
    """What is compared; the paper's are keys."""
    ridge: float = 0.01
    """Share of each channel's variance that is taken for noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.of in SIDES, f"of must be keys, values or both, got {self.of!r}")
        require(
            isinstance(self.ridge, int | float) and 0.0 < self.ridge < float("inf"),
            f"ridge must be a number > 0, got {self.ridge!r}",
        )

    def score(self, rows: Rows) -> Array:
        """Return the leverage of each row ``[1, H, T]``, in [0, 1]; of both sides the sum."""
        return sum(self._leverage(rows.backend, getattr(rows, side)) for side in SIDES[self.of])

    def _leverage(self, backend: Backend, x: Array) -> Array:
        xp = backend.xp
        _, h, t, d = x.shape
        parts = list(spans(t, h * d))

        def floats(part: slice) -> Array:
            return xp.astype(x[:, :, part], xp.float32)

        mean = sum(xp.sum(floats(part), axis=2, keepdims=True) for part in parts) / t
        gram = xp.zeros((1, h, d, d), dtype=xp.float32)
        for part in parts:
            centred = floats(part) - after(xp, mean, [gram])
            gram = gram + xp.matmul(xp.permute_dims(centred, (0, 1, 3, 2)), centred)
        # D x D per head: factored in float64, for which a GPU has no use.
        whiten = backend.from_numpy(_whitening(backend.to_numpy(gram).astype(np.float64) / t, self.ridge))
        out = []
        for part in parts:
            white = xp.matmul(floats(part) - after(xp, mean, out), whiten)
            out.append(xp.sum(white * white, axis=-1) / t)
        return xp.concat(out, axis=-1)


def _whitening(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """Return W ``[..., D, D]`` float32 with ``W W' = (covariance + ridge diag(covariance))^-1``."""
    d = covariance.shape[-1]
    deviation = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    # A channel that never changes says nothing; divided by 1 it stays 0.
    deviation = np.where(deviation > 0, deviation, 1.0)
    correlation = covariance / (deviation[..., :, None] * deviation[..., None, :])
    lower = np.linalg.cholesky(correlation + ridge * np.eye(d))
    inverse = np.linalg.inv(lower) / deviation[..., None, :]
    return np.swapaxes(inverse, -1, -2).astype(np.float32)
