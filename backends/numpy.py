"""NumPy as a backend: slow, everywhere, and what the others are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmlx import ops
from kvmlx.backends.base import PlainBackend
from kvmlx.types import Array


class NumPyBackend(PlainBackend):
    name = "numpy"
    xp: Any = np

    def hadamard(self, x: Array, block: int) -> Array:
        """Multiply consecutive blocks of ``block`` channels by the orthonormal Hadamard matrix (butterflies)."""
        shape = x.shape
        y = np.asarray(x, np.float32).reshape(-1, block)
        width = 1
        while width < block:
            y = y.reshape(-1, block // (2 * width), 2, width)
            y = np.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], axis=2)
            width *= 2
        return (y.reshape(shape) * np.float32(block**-0.5)).astype(np.float32)

    def put(self, buffer: Array, rows: Array, start: int) -> Array:
        out = buffer.copy()
        out[..., start : start + rows.shape[-2], :] = rows
        return out

    def from_numpy(self, x: np.ndarray) -> Array:
        return x

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def sdpa(
        self, queries: Array, keys: Array, values: Array, *, scale: float, causal: bool, mask: Any, sinks: Any
    ) -> Array:
        scores = ops.logits(np, queries, keys, scale)
        if causal:
            scores = np.where(ops.causal_mask(np, queries.shape[2], keys.shape[2]), scores, ops.NEG_INF)
        if mask is not None:
            scores = scores + mask
        if sinks is not None:
            extra = np.broadcast_to(np.asarray(sinks, np.float32)[None, :, None, None], (*scores.shape[:3], 1))
            weights = ops.softmax(np, np.concatenate([scores, extra], axis=-1))[..., :-1]
        else:
            weights = ops.softmax(np, scores)
        return ops.weighted_values(np, weights, values).astype(queries.dtype)


BACKEND = NumPyBackend()
