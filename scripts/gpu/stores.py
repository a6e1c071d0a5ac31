"""Stores as a cache fills them, on any device, and what attention over them must read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy

SINKS = 4
"""Exact rows at the front of a tail."""
EXACT = "exact body"
"""Exact rows in a body, as unequal budgets per head make them."""


def filled(backend: object, format: str, keys: Tensor, values: Tensor, *, exact: int, sinks: int = SINKS) -> LayerStore:
    """Return a store of ``keys [B, H, T, D]`` and values, all but the sinks and the newest ``exact`` rows encoded."""
    codecs = (None, None) if format == EXACT else Strategy.parse(format).codecs()
    store = LayerStore(backend, codecs, sinks=sinks)  # type: ignore[arg-type]
    store.append(keys, values)
    body = max(0, keys.shape[2] - sinks - exact) // store.unit * store.unit
    if body:
        store.encode_oldest(np.full(keys.shape[:2], body))
    return store


def cloned(store: LayerStore) -> LayerStore:
    """Return a store of the same rows in memory of its own."""
    out = store.copy()
    out.keys, out.values = store.keys.clone(), store.values.clone()
    out.planes = {name: plane.clone() for name, plane in store.planes.items()}
    out.columns = {name: column.clone() for name, column in store.columns.items()}
    return out


def read_bytes(store: LayerStore, queries: Tensor) -> int:
    """Return the bytes that attention must move: rows and metadata without head-room, queries, output."""
    _, hq, n, _ = queries.shape
    b, _, d, dv = store.shape
    size = store.keys.element_size()
    bias = 4 if store.biased else 0
    total = int(store.tail_lengths.sum()) * ((d + dv) * size + bias) + queries.nbytes + b * hq * n * dv * size
    if store.codecs is not None:
        planes = [p for codec, dim in zip(store.codecs, (d, dv), strict=True) for p in codec.planes(dim)]
        total += int(store.length.sum() * (sum(p.row_bytes for p in planes) + bias))
    return total


def random_rows(batch: int, heads: int, tokens: int, dim: int, device: torch.device, seed: int, dtype: torch.dtype):
    """Return normal numbers ``[batch, heads, tokens, dim]``, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty((batch, heads, tokens, dim), dtype=dtype, device=device)
    return out.normal_(generator=generator)
