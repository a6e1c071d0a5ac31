"""PyTorch with kvmlx's own Triton kernels where there is one for the shape, plain operations where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmlx.backends.formats import unsupported
from kvmlx.backends.torch.ops import TorchBackend
from kvmlx.backends.torch.triton import attend, column_sums, compact, encode, prefill
from kvmlx.store import LayerStore
from kvmlx.types import Codec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(TorchBackend):
    """The primitives as kernels. Whether one is taken depends on codec, shape and dtype, never on an exception."""

    path = "triton"

    def __reduce__(self) -> Any:
        return on, (str(self.device),)

    def attend(
        self,
        store: LayerStore,
        queries: Tensor,
        *,
        scale: float,
        sinks: Tensor | None = None,
        mask: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        if self.why_plain_attend(store, queries, mask):
            return super().attend(store, queries, scale=scale, sinks=sinks, mask=mask, window=window)
        kernel = attend.attend_decode if attend.takes(store, queries) else prefill.attend_prefill
        if mask is not None:
            mask = None if window else mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        return kernel(store, queries, scale=scale, sinks=sinks, mask=mask, window=window or 0)

    def encode(self, codec: Codec, x: Tensor) -> dict[str, Tensor]:
        if self.why_plain_encode(codec, x):
            return super().encode(codec, x)
        return encode.encode(codec, x)

    def column_sums(
        self, queries: Tensor, keys: Tensor, *, scale: float, n_queries: Any = None, bias: Tensor | None = None
    ) -> Tensor:
        if self.why_plain_column_sums(queries, keys):
            return super().column_sums(queries, keys, scale=scale, n_queries=n_queries, bias=bias)
        return column_sums.column_sums(queries, keys, scale=scale, n_queries=n_queries, bias=bias)

    def gather_units(
        self,
        planes: Mapping[str, Tensor],
        starts: np.ndarray,
        units: Sequence[np.ndarray],
        spans: np.ndarray,
        *,
        per: Mapping[str, int],
        fresh: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        return compact.compact(planes, starts, units, spans, per=per, fresh=fresh)

    def why_plain_attend(self, store: LayerStore, queries: Tensor, mask: Tensor | None = None) -> str | None:
        """Return why attention over this store runs through torch's own operations, None where a kernel takes it."""
        level = bool((store.begin == store.begin[:1, :1]).all())
        if not store.has_body and not store.biased and level:
            return "the rows are exact and dense: torch's own attention reads them"
        if queries.dtype != store.keys.dtype or queries.dtype not in DTYPES:
            return f"queries are {queries.dtype}, rows {store.keys.dtype}"
        _, _, dim, value_dim = store.shape
        return unsupported(store.codecs if store.has_body else None, dim, value_dim)

    def why_plain_encode(self, codec: Codec, x: Tensor) -> str | None:
        """Return why these rows are encoded by plain operations, None where a kernel does it."""
        return f"rows are {x.dtype}" if x.dtype not in DTYPES else encode.supported(codec, x.shape[-1])

    def why_plain_column_sums(self, queries: Tensor, keys: Tensor) -> str | None:
        """Return why plain operations sum these queries' attention, None where a kernel does it."""
        for name, x in (("queries", queries), ("keys", keys)):
            if x.dtype not in DTYPES:
                return f"{name} are {x.dtype}"
        return column_sums.supported(keys.shape[-1])


@cache
def on(device: str) -> TritonBackend:
    """Return the backend of a device, ``"cuda:0"``; interpreted on ``"cpu"`` where $TRITON_INTERPRET is 1."""
    return TritonBackend(torch.device(device))


BACKEND = on("cuda" if torch.cuda.is_available() else "cpu")
