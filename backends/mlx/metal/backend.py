"""MLX with kvmlx's own Metal kernels where there is one for the shape, and plain operations where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from kvmlx.backends.formats import unsupported
from kvmlx.backends.mlx.metal import attend, column_sums, compact, encode, prefill
from kvmlx.backends.mlx.ops import MLXBackend
from kvmlx.store import LayerStore
from kvmlx.types import Array, Codec

DTYPES = (mx.float16, mx.bfloat16, mx.float32)


class MetalBackend(MLXBackend):
    """The primitives as kernels. Whether one is taken depends on codec, shape and dtype, never on an exception."""

    path = "metal"

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
        if self.why_plain_attend(store, queries, mask):
            return super().attend(store, queries, scale=scale, sinks=sinks, mask=mask, window=window)
        kernel = attend.attend_decode if attend.takes(store, queries) else prefill.attend_prefill
        if mask is not None:
            mask = None if window else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return kernel(store, queries, scale=scale, sinks=sinks, mask=mask, window=window or 0)

    def encode(self, codec: Codec, x: Array) -> dict[str, Array]:
        if self.why_plain_encode(codec, x):
            return super().encode(codec, x)
        return encode.encode(codec, x)

    def column_sums(
        self, queries: Array, keys: Array, *, scale: float, n_queries: Any = None, bias: Array | None = None
    ) -> Array:
        if self.why_plain_column_sums(queries, keys):
            return super().column_sums(queries, keys, scale=scale, n_queries=n_queries, bias=bias)
        return column_sums.column_sums(queries, keys, scale=scale, n_queries=n_queries, bias=bias)

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
        return compact.compact(planes, starts, units, spans, per=per, fresh=fresh)

    def why_plain_attend(self, store: LayerStore, queries: Array, mask: Array | None = None) -> str | None:
        """Return why attention over this store runs through MLX's own operations, None where a kernel takes it."""
        level = bool((store.begin == store.begin[:1, :1]).all())
        if not store.has_body and not store.biased and level:
            return "the rows are exact and dense: MLX's own attention reads them"
        if queries.dtype != store.keys.dtype or queries.dtype not in DTYPES:
            return f"queries are {queries.dtype}, rows {store.keys.dtype}"
        if mask is not None and mask.size >= 2**31:
            return f"a mask of {mask.size:,} elements is beyond 32 bits"
        _, _, dim, value_dim = store.shape
        return unsupported(store.codecs if store.has_body else None, dim, value_dim)

    def why_plain_encode(self, codec: Codec, x: Array) -> str | None:
        """Return why these rows are encoded by plain operations, None where a kernel does it."""
        return f"rows are {x.dtype}" if x.dtype not in DTYPES else encode.supported(codec, x.shape[-1])

    def why_plain_column_sums(self, queries: Array, keys: Array) -> str | None:
        """Return why plain operations sum these queries' attention, None where a kernel does it."""
        for name, x in (("queries", queries), ("keys", keys)):
            if x.dtype not in DTYPES:
                return f"{name} are {x.dtype}"
        return column_sums.supported(keys.shape[-1])


BACKEND = MetalBackend()
