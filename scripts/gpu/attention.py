"""Decoding and prefill over compressed rows, against the best that others do with exact ones in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvmlx.backends.torch import ops
from kvmlx.backends.torch.triton.attend import attend_decode
from kvmlx.backends.torch.triton.backend import TritonBackend
from kvmlx.backends.torch.triton.backend import on as triton_on
from kvmlx.backends.torch.triton.operands import numbers_of
from kvmlx.store import LayerStore
from scripts.gpu import baselines
from scripts.gpu.bandwidth import copy_rate
from scripts.gpu.run import Run
from scripts.gpu.stores import EXACT, cloned, filled, random_rows, read_bytes

DTYPE = torch.bfloat16
QUERY_STD = 2.0
"""Standard deviation of the logits: attention is neither flat nor on a single row."""
QUARTER = "int4, a quarter of the tokens"
FORMATS = ("int4", QUARTER, "int2", "int3", "small", "tiny", "balanced", "smaller", "kivi(bits=2)", "int8", EXACT)
"""In the order of their weight: where time runs out, the last are missing."""
PREFILL_FORMATS = ("int4", "small", "int2", "kivi(bits=2)")
CHECKED = 64
WRONG = 0.02
"""Relative rms error, beside plain float32 attention over the same bytes, from which a bfloat16 result is wrong."""


def backend_of(run: Run) -> TritonBackend:
    return triton_on(str(run.device))


def make_store(run: Run, format: str, keys: Tensor, values: Tensor) -> LayerStore:
    if format == QUARTER:
        # The rows that a selection leaves lie together like any others.
        kept = keys.shape[2] // 4
        return filled(backend_of(run), "int4", keys[:, :, :kept], values[:, :, :kept], exact=run.sizes.exact)
    return filled(backend_of(run), format, keys, values, exact=run.sizes.exact)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def error_of(run: Run, store: LayerStore, queries: Tensor, out: Tensor) -> float:
    """Return the relative rms error beside plain float32 operations over the same bytes, on the same device.

    Of a chunk the newest tokens are looked at, which see the most.
    """
    exact = store.copy()
    exact.keys, exact.values = store.keys.float(), store.values.float()
    newest = queries[:, :, -CHECKED:].float()
    want = ops.on(str(run.device)).attend(exact, newest, scale=queries.shape[3] ** -0.5)
    return rms(out[:, :, -CHECKED:].float() - want) / max(rms(want), 1e-30)


def _rows(run: Run, batch: int, tokens: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    s = run.sizes
    make = partial(random_rows, batch, device=run.device, dim=s.dim, dtype=DTYPE)
    return (
        make(s.heads, new, seed=1) * QUERY_STD,
        make(s.kv_heads, tokens, seed=2),
        make(s.kv_heads, tokens, seed=3),
    )


def timed_row(
    run: Run, name: str, calls: list[Callable[[], Tensor]], nbytes: int, *, graph: bool = True
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name} | run.measure(calls, graph=graph) | {"bytes": nbytes}
    row["bytes_per_s"] = nbytes / row["ms"] * 1e3
    rate = copy_rate(run)
    row["of_copy"] = row["bytes_per_s"] / rate if rate else None
    return row


def time_baselines(run: Run, q: Tensor, k: Tensor, v: Tensor, found: dict[str, Any], *, math: bool = True) -> None:
    """Time every baseline into ``found``: rows, which is best, and why some are missing."""
    scale = q.shape[3] ** -0.5
    usable, refused = baselines.available(q, k, v, scale, compiled=run.cuda, math=math)
    found["refused"] = refused
    nbytes = q.nbytes * 2 + k.nbytes + v.nbytes
    rows: list[dict[str, Any]] = []
    found["baselines"] = rows
    n = run.sets(nbytes)
    sets = [(q, k, v), *((q, k.clone(), v.clone()) for _ in range(n - 1))]
    for baseline in usable:
        prepared = [baseline.prepare(*x) for x in sets]
        calls: list[Callable[[], Tensor]] = [partial(baseline.attend, *x) for x in prepared]
        rows.append(timed_row(run, baseline.name, calls, nbytes))
        del prepared, calls
        run.free()
    found["best"] = min(rows, key=lambda row: row["ms"])["name"]
    found["best_ms"] = min(row["ms"] for row in rows)


def attend(run: Run, store: LayerStore, queries: Tensor) -> Tensor:
    return backend_of(run).attend(store, queries, scale=queries.shape[3] ** -0.5)


def time_ours(run: Run, store: LayerStore, name: str, queries: Tensor) -> dict[str, Any]:
    """Check a store's attention, then time it; a wrong result gets no time."""
    error = error_of(run, store, queries, attend(run, store, queries))
    if not error <= WRONG:
        return {
            "name": name,
            "error": error,
            "wrong": f"{error:.2g} beside plain float32 over the same bytes",
            "ms": None,
        }
    nbytes = read_bytes(store, queries)
    stores = [store, *(cloned(store) for _ in range(run.sets(nbytes) - 1))]
    calls: list[Callable[[], Tensor]] = [partial(attend, run, x, queries) for x in stores]
    return timed_row(run, name, calls, nbytes) | {"error": error, "wrong": None}


def decode(run: Run, found: dict[str, Any]) -> None:
    """Time one new token over each shape's history."""
    found["shapes"] = []
    for tokens, batch in run.sizes.shapes:
        run.need(10, f"decode at {tokens} tokens")
        q, k, v = _rows(run, batch, tokens, 1)
        shape: dict[str, Any] = {"tokens": tokens, "batch": batch}
        found["shapes"].append(shape)
        time_baselines(run, q, k, v, shape)
        shape["ours"] = []
        run.say(f"{tokens} tokens, B={batch}: best is {shape['best']}, {shape['best_ms'] * 1e3:.1f} us")
        for format in run.sizes.formats or FORMATS:
            run.need(4, f"{format} at {tokens} tokens")
            row = time_ours(run, make_store(run, format, k, v), format, q)
            if row["ms"]:
                row["speed_up"] = shape["best_ms"] / row["ms"]
                share = f", {row['of_copy']:.0%} of copy" if row["of_copy"] else ""
                run.say(f"  {format}: {row['ms'] * 1e3:.1f} us, {row['speed_up']:.2f}x{share}")
            else:
                run.say(f"  {format}: WRONG, {row['wrong']}")
            shape["ours"].append(row)
            run.free()
            run.save()


def prefill(run: Run, found: dict[str, Any]) -> None:
    """Time a chunk of new tokens over a compressed history, against dense attention over the same history."""
    found["chunks"] = []
    for new in run.sizes.chunks:
        run.need(10, f"prefill of {new} tokens")
        held = run.sizes.history + new
        q, k, v = _rows(run, 1, held, new)
        chunk: dict[str, Any] = {"new": new, "tokens": held}
        found["chunks"].append(chunk)
        # All scores at once, in float32: up to 8 GiB are left to it.
        scores = 4 * run.sizes.heads * new * held
        time_baselines(run, q, k, v, chunk, math=scores < 8 * 2**30)
        chunk["ours"] = []
        run.say(f"{new} new tokens over {run.sizes.history}: best is {chunk['best']}, {chunk['best_ms']:.2f} ms")
        for format in run.sizes.formats[:1] or PREFILL_FORMATS:
            run.need(4, f"prefill of {format}")
            store = make_store(run, format, k[:, :, :-new], v[:, :, :-new])
            store.append(k[:, :, -new:], v[:, :, -new:])
            row = time_ours(run, store, format, q)
            if row["ms"]:
                row["speed_up"] = chunk["best_ms"] / row["ms"]
                run.say(f"  {format}: {row['ms']:.2f} ms, {row['speed_up']:.2f}x")
            else:
                run.say(f"  {format}: WRONG, {row['wrong']}")
            chunk["ours"].append(row)
            run.free()
            run.save()


def graph(run: Run, found: dict[str, Any]) -> None:
    """Capture a decode step once and replay it over other lengths; each replay is checked against plain operations."""
    found["rows"] = []
    s = run.sizes
    tokens = min(t for t, _ in s.shapes)
    for format in run.sizes.formats[:1] or ("int4", "small", "kivi(bits=2)"):
        run.need(3, f"graph of {format}")
        q, k, v = _rows(run, 2, tokens, 1)
        store = make_store(run, format, k, v)
        given = torch.from_numpy(numbers_of(store)).to(run.device)
        call = partial(attend_decode, store, q, scale=s.dim**-0.5, numbers=given)
        out: list[Tensor] = [call()]

        def play(out: list[Tensor] = out, call: Callable[[], Tensor] = call) -> None:
            out[0] = call()

        replay, how = run.captured(play) if run.cuda else (play, "interpreted")
        worst, units = 0.0, int(store.length.max()) // store.unit
        for fewer in (0, 1, units // 2, units - 1):
            other = store.copy()
            other.end -= min(fewer, s.exact // 2)
            other.length = store.length - fewer * store.unit
            given.copy_(torch.from_numpy(numbers_of(other)))
            (replay or play)()
            worst = max(worst, error_of(run, other, q, out[0]))
        wrong = None if worst <= WRONG else f"{worst:.2g} beside plain float32 over the same bytes"
        if replay is None:
            wrong = how
        found["rows"].append({"name": f"graph, {format}", "error": worst, "wrong": wrong, "how": how})
        run.say(f"{format}: {how}, worst error over 4 lengths {worst:.2g}{'' if wrong is None else ', WRONG'}")
        run.save()
