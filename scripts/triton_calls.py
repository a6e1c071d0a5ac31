"""Calls of the Triton kernels on stores without content: to record what they launch, or to count what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
from torch import Tensor

from kvmlx.backends.torch.triton.backend import TritonBackend, on
from kvmlx.backends.torch.triton.launch import A100, H100, MI300X, Launch, recording
from kvmlx.layout import row_bytes
from kvmlx.store import SPAN_STEP, LayerStore
from kvmlx.strategy import PRESETS, Strategy
from kvmlx.types import Codec

Make = Callable[..., Tensor]
"""`torch.zeros`, or `torch.empty` where nobody reads: then no memory is touched."""
EXACT = "exact"
"""A body of exact rows, as unequal budgets per head make it."""
FORMATS = ("int4", "int3", "int2", "int8", "int4(rotate=hadamard)", "kivi(bits=2)", *PRESETS, EXACT)
SINKS = 4
TAIL = 4 + 64 + 16
"""Exact rows: sinks, recent ones, and half of the 32 that gather before they are encoded."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def codecs_of(format: str) -> tuple[Codec | None, Codec | None]:
    return (None, None) if format == EXACT else Strategy.parse(format).codecs()


@dataclass(frozen=True)
class Call:
    """One call of a primitive, B sequences of H KV heads."""

    primitive: str
    """``decode``, ``prefill`` (attend with few or with many new tokens), ``encode``, ``column_sums`` or ``compact``."""
    format: str = "int4"
    dtype: str = "bfloat16"
    dim: int = 128
    group: int = 4
    """Query heads of a KV head."""
    n_queries: int = 1
    rows: int = 8192
    """Rows of a body, or keys."""
    n_batch: int = 1
    n_kv_heads: int = 8

    @property
    def name(self) -> str:
        parts = [self.primitive, self.format, self.dtype, f"D{self.dim}"]
        if self.primitive in ("decode", "prefill", "column_sums"):
            parts += [f"G{self.group}", f"L{self.n_queries}"]
        return "-".join(parts)

    @property
    def row_bytes(self) -> float:
        """Bytes of a body's row, keys and values."""
        exact = self.dim * DTYPES[self.dtype].itemsize
        return sum(exact if c is None else row_bytes(c.planes(self.dim)) for c in codecs_of(self.format))

    def run(self, backend: TritonBackend, make: Make = torch.zeros) -> None:
        """Make the call, on arrays that ``make`` makes."""
        b, h, d = self.n_batch, self.n_kv_heads, self.dim
        dtype, device = DTYPES[self.dtype], backend.device
        queries = make((b, h * self.group, self.n_queries, d), dtype=dtype, device=device)
        if self.primitive in ("decode", "prefill"):
            backend.attend(self.store(backend, make), queries, scale=d**-0.5)
        elif self.primitive == "encode":
            rows = make((b * h, self.rows, d), dtype=dtype, device=device)
            for codec in codecs_of(self.format):
                if codec is not None:
                    backend.encode(codec, rows)
        elif self.primitive == "column_sums":
            keys = make((b, h, self.rows, d), dtype=dtype, device=device)
            backend.column_sums(queries, keys, scale=d**-0.5)
        elif self.primitive == "compact":
            store = self.store(backend, make)
            units = self.rows // store.unit
            store.retain_body([np.arange(lane % 2, units, 2) for lane in range(b * h)])
        else:
            raise ValueError(f"primitive {self.primitive!r} is none of decode, prefill, encode, column_sums, compact")

    def store(self, backend: TritonBackend, make: Make = torch.zeros) -> LayerStore:
        """Return the store that the call reads, with the new tokens' own rows in its tail."""
        return blank_store(backend, self, TAIL + (self.n_queries if self.primitive != "compact" else 0), make)

    def launches(self, target: str = "sm_90") -> list[Launch]:
        """Return what the call launches on a target, without running it."""
        with recording(CHIPS[target]) as launches:
            self.run(on("cpu"), torch.empty)
        if not launches:
            raise ValueError(f"{self.name} launches no kernel: plain operations take it")
        return launches


def blank_store(backend: TritonBackend, call: Call, tail: int, make: Make) -> LayerStore:
    """Return a store with ``tail`` exact rows, of a body that ``make`` makes."""
    b, h, d = call.n_batch, call.n_kv_heads, call.dim
    store = LayerStore(backend, codecs_of(call.format), sinks=SINKS)
    dtype = DTYPES[call.dtype]
    store.append(*(torch.zeros((b, h, tail, d), dtype=dtype, device=backend.device) for _ in range(2)))
    assert store.codecs is not None
    rows = call.rows // store.unit * store.unit
    step = lcm(SPAN_STEP, store.unit)
    span = -(-rows // step) * step
    store._set_layout(np.full(b * h, rows), np.full(b * h, span))
    for side, codec in zip(("keys", "values"), store.codecs, strict=True):
        for spec in codec.planes(d):
            dtype = getattr(torch, spec.dtype)
            shape = (b * h * span // spec.rows, spec.width)
            store.planes[f"{side}.{spec.name}"] = make(shape, dtype=dtype, device=backend.device)
    return store


def _each(base: Call, formats: Sequence[str], **changes: object) -> list[Call]:
    return [replace(base, format=format, **changes) for format in formats]  # type: ignore[arg-type]


CHIPS = {"sm_80": A100, "sm_90": H100, "gfx942": MI300X}
"""What a target stands for: launches choose their tiles by it."""

DECODE = Call("decode")
PREFILL = Call("prefill", n_queries=512)
ENCODE = Call("encode", rows=2048)
SUMS = Call("column_sums", n_queries=32)
COMPACT = Call("compact")

QUICK = [
    *_each(DECODE, ("int4", "int2", "small", "kivi(bits=2)")),
    replace(DECODE, dtype="float16", group=8),
    replace(PREFILL),
    replace(ENCODE),
    replace(SUMS),
    replace(COMPACT),
]
"""What `--check` compiles for every target."""
QUICK_NVIDIA = [replace(DECODE, dim=256), replace(DECODE, n_queries=4), replace(DECODE, format="smaller")]
"""What it compiles for NVIDIA only: for AMD they take minutes."""
FULL = [
    *_each(DECODE, FORMATS),
    *_each(DECODE, ("int4", "int2", "small"), group=1),
    *_each(DECODE, ("int4", "int2", "small"), group=8),
    *_each(DECODE, ("int4", "small", "kivi(bits=2)"), dtype="float16"),
    *(call for dim in (64, 80, 256) for call in _each(DECODE, ("int4", "small"), dim=dim)),
    replace(DECODE, n_queries=4),
    *_each(PREFILL, ("int4", "int2", "small", "tiny", "kivi(bits=2)", EXACT)),
    *(replace(PREFILL, dim=dim) for dim in (64, 80, 256)),
    replace(PREFILL, dtype="float16"),
    *_each(ENCODE, [f for f in FORMATS if f != EXACT]),
    *(replace(ENCODE, dim=dim) for dim in (64, 80, 256)),
    *(replace(SUMS, dim=dim) for dim in (128, 64, 256)),
    *_each(COMPACT, ("int4", "small")),
]
