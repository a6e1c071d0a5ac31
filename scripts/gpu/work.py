"""What a cache does beside attention: encoding a chunk, column sums, moving the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvmlx.backends.torch import ops
from kvmlx.layout import row_bytes
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from scripts.gpu.attention import DTYPE, backend_of, rms
from scripts.gpu.bandwidth import copy_rate
from scripts.gpu.run import Run
from scripts.gpu.stores import filled, random_rows

ENCODED = ("int4", "int2", "small", "tiny", "kivi(bits=2)", "int4(rotate=hadamard)")
WINDOW = 32
"""Queries of SnapKV's observation."""
COMPACTED = ("int4", "small", "kivi(bits=2)")
SUMS_OFF = 0.01
"""Relative rms distance of column sums from the plain ones, from which they are wrong."""


class Layer:
    """One layer of an 8B-shaped model without norms: what its prefill costs at least, in bf16."""

    def __init__(self, run: Run) -> None:
        s = run.sizes
        kv, q = s.kv_heads * s.dim, s.heads * s.dim
        self.sizes = s

        def weight(rows: int, columns: int) -> Tensor:
            return torch.empty((rows, columns), dtype=DTYPE, device=run.device).normal_(std=columns**-0.5)

        self.qkv, self.out = weight(q + 2 * kv, s.hidden), weight(s.hidden, q)
        self.gate_up, self.down = weight(2 * s.intermediate, s.hidden), weight(s.hidden, s.intermediate)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [1, L, hidden]`` -> the same shape."""
        s = self.sizes
        n, kv, q = x.shape[1], s.kv_heads * s.dim, s.heads * s.dim
        parts = F.linear(x, self.qkv).split([q, kv, kv], dim=-1)
        heads = [p.view(1, n, -1, s.dim).transpose(1, 2) for p in parts]
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(1, n, q), self.out)
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


def encode(run: Run, found: dict[str, Any]) -> None:
    """Time the encoding of a chunk's keys and values, and a whole settling, beside the prefill of a layer."""
    found["chunks"] = []
    s = run.sizes
    layer = Layer(run)
    for new in s.chunks:
        run.need(5, f"encode of {new} rows")
        x = random_rows(1, 1, new, s.hidden, run.device, 4, DTYPE)[0]
        chunk: dict[str, Any] = {"new": new, "layer": run.measure([partial(layer, x)])}
        found["chunks"].append(chunk)
        chunk["formats"] = []
        layer_ms = chunk["layer"]["ms"]
        run.say(f"prefill of {new} tokens, one layer: {layer_ms:.3f} ms")
        for format in run.sizes.formats[:1] or ENCODED:
            run.need(2, f"encode to {format}")
            row = _encode(run, format, new)
            row["of_layer"] = row["ms"] / layer_ms
            row["settle_of_layer"] = row["settle"]["ms"] / layer_ms
            chunk["formats"].append(row)
            run.say(
                f"  {format}: {row['ms'] * 1e3:.1f} us, {row['of_layer']:.2%} of the layer; "
                f"with what it moves {row['settle_of_layer']:.2%}"
            )
            run.save()


def _encode(run: Run, format: str, new: int) -> dict[str, Any]:
    s, backend = run.sizes, backend_of(run)
    codecs = [c for c in Strategy.parse(format).codecs() if c is not None]
    nbytes = sum(s.kv_heads * new * (2 * s.dim + row_bytes(c.planes(s.dim))) for c in codecs)
    n = run.sets(nbytes)
    rows = [random_rows(1, s.kv_heads, new, s.dim, run.device, i, DTYPE)[0] for i in range(n * len(codecs))]

    def call(at: int) -> None:
        for i, codec in enumerate(codecs):
            backend.encode(codec, rows[at + i])

    timed = run.measure([partial(call, i * len(codecs)) for i in range(n)])
    rate = copy_rate(run)
    bytes_per_s = nbytes / timed["ms"] * 1e3
    row: dict[str, Any] = {"format": format} | timed | {"bytes": int(nbytes), "bytes_per_s": bytes_per_s}
    row["of_copy"] = bytes_per_s / rate if rate else None

    # What settle does with a chunk: encode it, append it to the body, move the rest of the tail down.
    chunk = [random_rows(1, s.kv_heads, new + 64, s.dim, run.device, i, DTYPE) for i in (7, 8)]

    def fill() -> LayerStore:
        return filled(backend, format, *chunk, exact=64)

    row["settle"] = run.measure([fill], graph=False)
    return row


def column_sums(run: Run, found: dict[str, Any]) -> None:
    """Time what SnapKV observes at the end of a prompt: a window of queries on every key of a layer."""
    found["rows"] = []
    s, backend = run.sizes, backend_of(run)
    plain = ops.on(str(run.device))
    for tokens, batch in s.shapes:
        run.need(3, f"column sums over {tokens} keys")
        q = random_rows(batch, s.heads, min(WINDOW, tokens), s.dim, run.device, 1, DTYPE)
        k = random_rows(batch, s.kv_heads, tokens, s.dim, run.device, 2, DTYPE)
        scale = s.dim**-0.5
        out = backend.column_sums(q, k, scale=scale)
        want = plain.column_sums(q.float(), k.float(), scale=scale)
        off = rms(out.float() - want.float()) / rms(want.float())
        nbytes = k.nbytes + q.nbytes
        sets = [k, *(k.clone() for _ in range(run.sets(nbytes) - 1))]
        calls: list[Callable[[], Any]] = [partial(backend.column_sums, q, x, scale=scale) for x in sets]
        row: dict[str, Any] = {"tokens": tokens, "batch": batch, "error": off}
        row["wrong"] = None if off <= SUMS_OFF else f"{off:.2g} from plain float32 operations"
        row |= run.measure(calls) | {"bytes": nbytes, "bytes_per_s": 0.0}
        row["bytes_per_s"] = nbytes / row["ms"] * 1e3
        found["rows"].append(row)
        run.say(f"{tokens} keys, B={batch}: {row['ms'] * 1e3:.1f} us, {row['bytes_per_s'] / 1e9:,.0f} GB/s of keys")
        del sets, calls
        run.free()
        run.save()


def compact(run: Run, found: dict[str, Any]) -> None:
    """Time the move of a quarter of a body's rows into new spans; what the host does is counted too."""
    found["rows"] = []
    s, backend = run.sizes, backend_of(run)
    tokens, batch = s.shapes[-1]
    rng = np.random.default_rng(0)
    for format in run.sizes.formats[:1] or COMPACTED:
        run.need(3, f"compaction of {format}")
        k = random_rows(batch, s.kv_heads, tokens, s.dim, run.device, 2, DTYPE)
        store = filled(backend, format, k, k, exact=s.exact)
        units = int(store.length.max()) // store.unit
        kept = [np.sort(rng.permutation(units)[: units // 4]) for _ in range(store.length.size)]
        nbytes = 2 * sum(p.nbytes for p in store.planes.values()) // 4

        def move(store: LayerStore = store, kept: list[np.ndarray] = kept) -> LayerStore:
            out = store.copy()
            out.retain_body(kept)
            return out

        wrong = _moved_wrong(store, move(), kept)
        row: dict[str, Any] = {"format": format, "tokens": tokens, "wrong": wrong}
        row |= run.measure([move], graph=False) | {"bytes": nbytes}
        row["bytes_per_s"] = nbytes / row["ms"] * 1e3
        found["rows"].append(row)
        run.say(f"{format}, a quarter of {tokens} rows: {row['ms']:.3f} ms, host included")
        del store
        run.free()
        run.save()


def _moved_wrong(before: LayerStore, after: LayerStore, kept: list[np.ndarray]) -> str | None:
    """Return what is wrong with the rows of a compacted store, None where they are the kept ones, bit by bit."""
    for name, period in before._periods().items():
        per = before.unit // period
        for lane, units in enumerate(kept):
            index = torch.from_numpy((units[:, None] * per + np.arange(per)).ravel())
            old = cut(before, name, period, lane)[index.to(before.keys.device)]
            if not torch.equal(cut(after, name, period, lane)[: len(index)], old):
                return f"{name} of lane {lane} differs"
    return None


def cut(store: LayerStore, name: str, period: int, lane: int) -> Tensor:
    """Return a lane's entries of a plane, as bytes."""
    at, n = int(store.start.flat[lane]), int(store.length.flat[lane])
    return store.planes[name][at // period : (at + n) // period].view(torch.uint8)
