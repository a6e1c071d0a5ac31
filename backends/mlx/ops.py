"""The primitives of kvmlx in MLX operations."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from kvmlx.backends.base import PlainBackend
from kvmlx.types import Array


class MLXBackend(PlainBackend):
    name = "mlx"
    xp: Any = mx

    def hadamard(self, x: Array, block: int) -> Array:
        """Multiply consecutive blocks of ``block`` channels by the orthonormal Hadamard matrix."""
        y = mx.hadamard_transform(x.astype(mx.float32).reshape(-1, block), scale=block**-0.5)
        return y.reshape(x.shape)

    def put(self, buffer: Array, rows: Array, start: int) -> Array:
        buffer[..., start : start + rows.shape[-2], :] = rows
        return buffer

    def from_numpy(self, x: np.ndarray) -> Array:
        return mx.array(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def after(self, x: Array, dependencies: list[Array]) -> Array:
        return mx.depends([x], dependencies)[0] if dependencies else x

    def evaluate(self, arrays: list[Array]) -> None:
        mx.eval(arrays)

    def sdpa(
        self, queries: Array, keys: Array, values: Array, *, scale: float, causal: bool, mask: Any, sinks: Any
    ) -> Array:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask="causal" if causal else mask, sinks=sinks
        )


BACKEND = MLXBackend()
