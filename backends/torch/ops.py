"""The primitives of kvmlx in PyTorch operations, on the CPU and on any CUDA device."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kvmlx import ops
from kvmlx.backends.base import PlainBackend
from kvmlx.backends.torch.namespace import Namespace


class TorchBackend(PlainBackend):
    """Plain operations on one device; `on` returns the one instance of each device."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.xp: Any = Namespace(device)

    def __reduce__(self) -> Any:
        return on, (str(self.device),)

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        """Multiply consecutive blocks of ``block`` channels by the orthonormal Hadamard matrix (butterflies)."""
        y = x.float().reshape(-1, block)
        width = 1
        while width < block:
            y = y.reshape(-1, block // (2 * width), 2, width)
            a, b = y[:, :, 0], y[:, :, 1]
            y = torch.stack([a + b, a - b], dim=2)
            width *= 2
        return y.reshape(x.shape) * float(np.float32(block**-0.5))

    def put(self, buffer: Tensor, rows: Tensor, start: int) -> Tensor:
        buffer[..., start : start + rows.shape[-2], :] = rows
        return buffer

    def from_numpy(self, x: np.ndarray) -> Tensor:
        copied = torch.from_numpy(np.array(x, copy=True))
        if self.device.type != "cuda":
            return copied.to(self.device)
        return copied.pin_memory().to(self.device, non_blocking=True)  # from pageable memory torch would wait

    def to_numpy(self, x: Tensor) -> np.ndarray:
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()

    def sdpa(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool, mask: Any, sinks: Any
    ) -> Tensor:
        if sinks is not None:
            return self._with_sinks(queries, keys, values, scale, causal, mask, sinks)
        n, held = queries.shape[2], keys.shape[2]
        bias = causal_lower_right(n, held) if causal else mask
        grouped = queries.shape[1] != keys.shape[1]
        # A subclass of a tensor says what a mask would: torch's fast kernels take it.
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=grouped)

    def _with_sinks(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Any, sinks: Tensor
    ) -> Tensor:
        xp = self.xp
        scores = ops.logits(xp, queries, keys, scale)
        if causal:
            scores = scores.where(ops.causal_mask(xp, queries.shape[2], keys.shape[2]), ops.NEG_INF)
        if mask is not None:
            scores = scores + mask
        extra = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = ops.softmax(xp, torch.cat([scores, extra], dim=-1))[..., :-1]
        return ops.weighted_values(xp, weights, values).to(queries.dtype)


@cache
def on(device: str) -> TorchBackend:
    """Return the backend of a device, ``"cpu"`` or ``"cuda:0"``."""
    return TorchBackend(torch.device(device))


BACKEND = on("cpu")
