"""Measure attention over compressed rows beside what MLX and mlx-lm do, on the machine it runs on.

    python -m scripts.bench_kernels [--tokens 1024 8192 ...] [--formats int4 "snapkv(budget=0.25) | int4" ...] [--out F]

Decoding (1 new token) and prefill (512 new tokens) over a cache of so many tokens, new ones included, against
`mx.fast.scaled_dot_product_attention` over dense rows and mlx-lm's attention over its quantized cache. Each result is
checked in float64 before anything is timed, and a wrong one gets no time. Layers have arrays of their own, more than
the last-level cache holds, and each layer's queries are the output of the one before: as in a model, nothing overlaps.
The contenders take turns; a time is the median of --repeats samples, its spread their quartiles.

Without Metal kernels (on Linux, or with KVMLX_KERNELS=plain) our rows are plain operations: no claim about kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import QuantizedKVCache
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvmlx.backends.mlx import choose
from kvmlx.machine import software
from kvmlx.selftest import why_plain
from kvmlx.session import LayerCache, Session
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from kvmlx.types import LayerInfo, ModelInfo
from scripts.timing import quartiles

BASELINE = "mx.fast attention"
"""`mx.fast.scaled_dot_product_attention`."""
QUANTIZED_BITS, QUANTIZED_GROUP = (4, 8), 64
EVICTING = "snapkv(budget=0.25) | int4"
SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "new": 512, "steps": 3}
ON_METAL: dict[str, Any] = SHAPE | {
    "tokens": [1024, 4096, 8192, 32768, 131072],
    "formats": ["int8", "int4", "int4(rotate=hadamard)", "kivi(bits=4)", "balanced", "small", "tiny", EVICTING],
    "dtype": "float16",
    "repeats": 11,
    "cache_mib": 256,
}
# A CPU has no fast half precision.
ON_CPU: dict[str, Any] = SHAPE | {
    "tokens": [1024, 4096],
    "formats": ["int4", "small", EVICTING],
    "new": 64,
    "dtype": "float32",
    "repeats": 5,
    "cache_mib": 64,
}
QUICK: dict[str, Any] = {
    "tokens": [256],
    "formats": ["int4", "small", EVICTING],
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "new": 32,
    "steps": 1,
    "repeats": 2,
    "cache_mib": 1,
}
CHUNK = 8192
"""Tokens that a cache is filled with at a time."""
QUERY_STD = 2.0
"""Standard deviation of the logits: attention is neither flat nor on a single row."""
CHECKED_QUERIES = 8
WRONG = {"float16": 0.02, "bfloat16": 0.08, "float32": 1e-3}
"""Relative rms error, beside float64 attention over the same bytes, from which a result is wrong."""
QUANTIZATION_FACTOR = 3.0
"""How much further from dense attention a result may be than rounding rows explains to first order."""
MEMORY_SHARE = 0.6
console = Console(stderr=True, highlight=False)

Rows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: B, Hq, H, D, and the rows that are held, of them new."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    dtype: Any
    held: int
    new: int

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def dense_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.held * self.dim * self.dtype.size

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores at once, for what makes them."""
        return self.batch * self.heads * self.new * self.held * self.dtype.size


@dataclass
class Contender:
    """One way to attend, with its own copy of the rows for each layer."""

    name: str
    path: str
    run: Callable[[Any, mx.array], mx.array]
    layer: Any
    """What one layer holds."""
    copy: Callable[[Any], Any]
    read_bytes: int
    """Bytes of a layer that must be read."""
    rows: Rows
    """Keys and values ``[T, D]`` of lane (b, h), as they are stored."""
    evicts: bool = False
    layers: list[Any] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of one layer, by sample."""
    error: float = 0.0
    """Relative rms error, beside float64 attention over the same bytes."""
    from_dense: float = 0.0
    """Relative rms distance from dense attention over the exact rows."""
    wrong: str | None = None


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    part_of = {"decode": 1, "prefill": args.new}
    limit = args.memory_gib * 2**30 if args.memory_gib else MEMORY_SHARE * memory_bytes()
    copy_rate = copy_bytes_per_s(min(256 * 2**20, int(limit / 8)) if not args.quick else 2**24)
    rows, skipped = [], []
    for tokens in args.tokens:
        for part in args.parts:
            new = min(part_of[part], max(1, tokens // 2))
            sizes = Sizes(args.batch, args.heads, args.kv_heads, args.head_dim, args.dtype, tokens, new)
            found, missing = measure(part, sizes, args, limit)
            skipped += missing
            rows += [row_of(part, sizes, contender, found[0], copy_rate) for contender in found]
            for line in missing:
                console.print(f"[yellow]skipped[/] {escape(line)}", soft_wrap=True)
            if found:
                show(part, sizes, [row for row in rows if row["part"] == part and row["tokens"] == tokens], copy_rate)
    document = {
        "machine": machine(),
        "kernels": choose.backend().path,
        "claim": None if choose.backend().path == "metal" else f"plain operations, {device_kind()}: no claim",
        "settings": {
            "batch": args.batch,
            "heads": args.heads,
            "kv_heads": args.kv_heads,
            "head_dim": args.head_dim,
            "dtype": name_of(args.dtype),
            "repeats": args.repeats,
            "steps": args.steps,
            "cache_mib": args.cache_mib,
            "quick": args.quick,
        },
        "copy_bytes_per_s": copy_rate,
        "rows": rows,
        "skipped": skipped,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {args.out}")
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        console.print(f"[red]wrong[/] {escape(row['contender'])}, {row['part']}: {escape(row['wrong'])}")
    return 1 if wrong else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="rows held, new ones included")
    parser.add_argument("--formats", nargs="+", metavar="STRATEGY", help="what our caches are")
    parser.add_argument("--parts", nargs="+", choices=["decode", "prefill"], default=["decode", "prefill"])
    parser.add_argument("--new", type=int, help="new tokens of a prefill")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, help="samples of each contender")
    parser.add_argument("--steps", type=int, help="passes over all layers in a sample")
    parser.add_argument("--cache-mib", type=int, help="layers are made until they read more than this in a pass")
    parser.add_argument("--memory-gib", type=float, help=f"skip what needs more; {MEMORY_SHARE:.0%}% of the machine's")
    parser.add_argument("--quick", action="store_true", help="small and few: whether it runs, not how fast")
    parser.add_argument("--out", metavar="FILE", help="write JSON")
    args = parser.parse_args(argv)
    defaults = (ON_CPU if device_kind() == "CPU" else ON_METAL) | (QUICK if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if min(args.tokens) < 2:
        parser.error("--tokens must be 2 at least: one is new")
    args.dtype = getattr(mx, args.dtype)
    return args


def measure(part: str, s: Sizes, args: argparse.Namespace, limit: float) -> tuple[list[Contender], list[str]]:
    """Return the contenders, checked and timed, the baseline first; and what was skipped, with the reason."""
    at = f"{part} at {s.held:,} tokens"
    # Dense rows twice, as much again in float32 while they are made, and what each contender holds.
    needed = 6 * s.dense_bytes + (2 + len(args.formats)) * max(s.dense_bytes, 2 * args.cache_mib * 2**20)
    if needed > limit:
        return [], [f"{at}: needs about {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}"]
    queries, keys, values = random_rows(s)
    contenders, skipped = [dense(s, keys, values)], []
    scores = 3 * s.score_bytes
    if part == "prefill" and needed + scores > limit:
        skipped.append(f"mlx-lm's quantized attention, {at}: its scores take about {scores / 2**30:.1f} GiB")
    else:
        contenders += [quantized(s, keys, values, bits) for bits in QUANTIZED_BITS]
    for text in args.formats:
        with console.status(f"{at}: {text}"):
            contenders.append(ours(s, text, queries, keys, values))
    with console.status(f"{at}: checking"):
        check(s, contenders, queries, keys, values)
    right = [contender for contender in contenders if not contender.wrong]
    for contender in right:
        n = max(2, -(-args.cache_mib * 2**20 // contender.read_bytes))
        contender.layers = [contender.layer, *(contender.copy(contender.layer) for _ in range(n - 1))]
    with console.status(f"{at}: timing"):
        for sample in range(-1, args.repeats):
            for contender in right:
                seconds = timed(contender, queries, args.steps)
                if sample >= 0:
                    contender.seconds.append(seconds)
    for contender in contenders:
        contender.layer = contender.rows = None  # type: ignore[assignment]
    return contenders, skipped


def random_rows(s: Sizes) -> tuple[mx.array, mx.array, mx.array]:
    """Return queries ``[B, Hq, L, D]`` and keys and values ``[B, H, T, D]``."""
    seeds = mx.random.split(mx.random.key(s.held), 3)
    shapes = [(s.batch, s.heads, s.new, s.dim)] + [(s.batch, s.kv_heads, s.held, s.dim)] * 2
    q, k, v = (mx.random.normal(shape, key=seed) for shape, seed in zip(shapes, seeds, strict=True))
    out = (q * QUERY_STD).astype(s.dtype), k.astype(s.dtype), v.astype(s.dtype)
    mx.eval(out)
    return out


# The contenders


def dense(s: Sizes, keys: mx.array, values: mx.array) -> Contender:
    def run(layer: tuple[mx.array, mx.array], q: mx.array) -> mx.array:
        mask = "causal" if s.new > 1 else None
        return mx.fast.scaled_dot_product_attention(q, *layer, scale=s.scale, mask=mask)

    def rows(b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        return host(keys[b, h]), host(values[b, h])

    return Contender(BASELINE, "MLX", run, (keys, values), copied, s.dense_bytes, rows)


def quantized(s: Sizes, keys: mx.array, values: mx.array, bits: int) -> Contender:
    cache = QuantizedKVCache(group_size=QUANTIZED_GROUP, bits=bits)
    layer: Any = cache.update_and_fetch(keys, values)
    mx.eval(layer)

    def run(layer: Any, q: mx.array) -> mx.array:
        mask: Any = "causal" if s.new > 1 else None
        # It scales the queries in place: they must be its own.
        return quantized_scaled_dot_product_attention(
            mx.array(q), *layer, scale=s.scale, mask=mask, group_size=QUANTIZED_GROUP, bits=bits
        )

    def rows(b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        sides = ([x[b, h] for x in side] for side in layer)
        k, v = (host(mx.dequantize(*side, group_size=QUANTIZED_GROUP, bits=bits)) for side in sides)
        return k, v

    read = sum(x.nbytes for side in layer for x in side)
    return Contender(f"mlx-lm {bits} bits", "MLX", run, layer, copied, read, rows)


def ours(s: Sizes, text: str, queries: mx.array, keys: mx.array, values: mx.array) -> Contender:
    """Fill a cache as a model does, and take its store with the new tokens' rows in it."""
    backend = choose.backend()
    strategy = Strategy.parse(text)
    cache = LayerCache(backend, Session(strategy, ModelInfo("bench", (LayerInfo(0),)), 1), 0)
    cache.scale = s.scale
    old = s.held - s.new
    newest = min(old, max(strategy.window, 1))
    steps = [*range(0, old - newest, CHUNK), old - newest] if old > newest else [0]
    for begin, end in zip(steps, [*steps[1:], old], strict=True):
        cache.update(keys[:, :, begin:end], values[:, :, begin:end])
        if end == old and strategy.needs:
            seed = mx.random.key(end)
            cache.attend(
                mx.random.normal((s.batch, s.heads, end - begin, s.dim), key=seed).astype(s.dtype), scale=s.scale
            )
        cache.settle(chunk_end=end < old, prompt_end=end == old)
    cache.update(keys[:, :, old:], values[:, :, old:])
    store = cache.store
    mx.eval(list(store.arrays().values()))

    def run(layer: LayerStore, q: mx.array) -> mx.array:
        return backend.attend(layer, q, scale=s.scale)

    def rows(b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        k, v, _ = store.lane_rows(b, slice(h, h + 1))
        return host(k[0, 0]), host(v[0, 0])

    why = why_plain(backend, "attend", store, queries)
    path = "Metal kernel" if why is None else f"plain operations, {device_kind()}"
    return Contender(text, path, run, store, copied_store, store_bytes(store), rows, strategy.select is not None)


def store_bytes(store: LayerStore) -> int:
    """Return the bytes of a store that attention must read: rows, metadata and biases, no head-room."""
    _, _, d, dv = store.shape
    bias = 4 if store.biased else 0
    total = int(store.tail_lengths.sum()) * ((d + dv) * store.keys.dtype.size + bias)
    if store.codecs is not None:
        planes = [p for codec, dim in zip(store.codecs, (d, dv), strict=True) for p in codec.planes(dim)]
        total += int(store.length.sum() * (sum(p.row_bytes for p in planes) + bias))
    return total


def copied(layer: Any) -> Any:
    """Return the same arrays in memory of their own."""
    if isinstance(layer, mx.array):
        out = layer + mx.zeros((), layer.dtype)
        mx.eval(out)
        return out
    return tuple(copied(x) for x in layer)


def copied_store(store: LayerStore) -> LayerStore:
    out = store.copy()
    out.keys, out.values = copied(store.keys), copied(store.values)
    out.planes = {name: copied(plane) for name, plane in store.planes.items()}
    out.columns = {name: copied(column) for name, column in store.columns.items()}
    return out


# Right, then quick


def check(s: Sizes, contenders: list[Contender], queries: mx.array, keys: mx.array, values: mx.array) -> None:
    """Compare each result with float64 attention over the rows it read, and with dense attention."""
    picked = np.unique(np.linspace(0, s.new - 1, CHECKED_QUERIES).astype(int))
    group = s.heads // s.kv_heads
    q = host(queries)[:, :, picked].reshape(s.batch, s.kv_heads, group, len(picked), s.dim)
    lanes = list(np.ndindex(s.batch, s.kv_heads))
    exact = {lane: (host(keys[lane]), host(values[lane])) for lane in lanes}
    truth = {lane: reference(q[lane], *exact[lane], s, picked) for lane in lanes}
    for contender in contenders:
        out = host(contender.run(contender.layer, mx.array(queries)))[:, :, picked]
        if out.shape != (s.batch, s.heads, len(picked), s.dim):
            contender.wrong = f"the result has the shape {out.shape}"
            continue
        out = out.reshape(s.batch, s.kv_heads, group, len(picked), s.dim)
        own, far, allowed = [], [], 0.0
        for lane in lanes:
            held = contender.rows(*lane)
            own.append(out[lane] - reference(q[lane], *held, s, picked))
            far.append(out[lane] - truth[lane])
            if not contender.evicts:
                off = [rms(x - y) / rms(y) for x, y in zip(held, exact[lane], strict=True)]
                allowed = max(allowed, QUANTIZATION_FACTOR * float(np.hypot(QUERY_STD * off[0], off[1])))
        size = rms(np.stack(list(truth.values())))
        contender.error, contender.from_dense = rms(np.stack(own)) / size, rms(np.stack(far)) / size
        limit = WRONG[name_of(s.dtype)]
        if not contender.error <= limit:
            contender.wrong = f"{contender.error:.2g} beside float64 over the same bytes, more than {limit:g}"
        elif not contender.evicts and not contender.from_dense <= allowed + limit:
            contender.wrong = f"{contender.from_dense:.2g} from dense attention, more than {allowed + limit:.2g}"


def reference(q: np.ndarray, keys: np.ndarray, values: np.ndarray, s: Sizes, picked: np.ndarray) -> np.ndarray:
    """Return in float64 ``[G, n, D]``: the picked queries over a lane, each over the rows up to its own."""
    held = len(keys)
    logits = q.astype(np.float64) @ keys.astype(np.float64).T * s.scale
    logits = np.where(np.arange(held) <= (held - s.new + picked)[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values.astype(np.float64)


def timed(contender: Contender, queries: mx.array, steps: int) -> float:
    """Return the seconds of one layer, mean over passes in which each layer waits for the one before."""
    mx.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        x = mx.array(queries)
        for layer in contender.layers:
            x = contender.run(layer, x)
        mx.eval(x)
    mx.synchronize()
    return (time.perf_counter() - begin) / (steps * len(contender.layers))


def copy_bytes_per_s(nbytes: int) -> float:
    """Return bytes read and written per second by a copy on the same device: what memory allows."""
    x = mx.random.normal((nbytes // 4,))
    mx.eval(x)
    seconds = []
    for _ in range(9):
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(x + 1)
        mx.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * x.nbytes / statistics.median(seconds[1:])


def host(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# What is said


def row_of(part: str, s: Sizes, c: Contender, base: Contender, copy_rate: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "part": part,
        "tokens": s.held,
        "new_tokens": s.new,
        "contender": c.name,
        "path": c.path,
        "read_bytes": c.read_bytes,
        # JSON has no NaN.
        "error": c.error if np.isfinite(c.error) else None,
        "from_dense": c.from_dense if np.isfinite(c.from_dense) else None,
        "evicts": c.evicts,
        "wrong": c.wrong,
        "layers": len(c.layers),
    }
    if not c.seconds:
        return row | dict.fromkeys(("ms", "quartiles_ms", "samples_ms", "bytes_per_s", "of_copy", "speed_up"))
    median = statistics.median(c.seconds)
    low, high = quartiles(c.seconds)
    rate = c.read_bytes / median
    return row | {
        "ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "samples_ms": [x * 1e3 for x in c.seconds],
        "bytes_per_s": rate,
        "of_copy": rate / copy_rate,
        "speed_up": statistics.median(base.seconds) / median if base.seconds else None,
    }


def show(part: str, s: Sizes, rows: list[dict[str, Any]], copy_rate: float) -> None:
    out = Console(highlight=False)
    what = f"{s.new} new token{'s' * (s.new > 1)} over {s.held:,} rows"
    shape = f"B={s.batch}, {s.heads} heads, {s.kv_heads} KV heads, D={s.dim}, {name_of(s.dtype)}"
    out.print(f"\n[bold]{part}[/]: {what}; {shape}; a copy moves {copy_rate / 1e9:.1f} GB/s", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("contender", overflow="fold", min_width=19)
    for name in ("path", "ms a layer", "quartiles", "MB", "GB/s", "speed-up"):
        table.add_column(name, justify="left" if name == "path" else "right", no_wrap=True)
    for row in rows:
        start = [escape(row["contender"]), row["path"].split()[0]]
        megabytes = f"{row['read_bytes'] / 1e6:.1f}"
        if row["ms"] is None:
            table.add_row(*start, "[red]wrong[/]", "", megabytes, "", "")
            continue
        low, high = row["quartiles_ms"]
        speed_up = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
        times = [f"{row['ms']:.3g}", f"{low:.3g}-{high:.3g}", megabytes, f"{row['bytes_per_s'] / 1e9:.1f}"]
        table.add_row(*start, *times, speed_up)
    out.print(table)
    plain = {row["path"] for row in rows if row["path"].startswith("plain")}
    for path in plain:
        out.print(f" [dim]plain: {path}; these speeds say nothing of kernels[/]")


def machine() -> dict[str, Any]:
    """Return hardware and versions, as every result states them."""
    info = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}, {platform.machine()}",
        "device": f"{info.get('device_name', '')}, {device_kind()}",
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "cores": os.cpu_count(),
        **software("mlx", "mlx-lm", "numpy"),
    }


def device_kind() -> str:
    return "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"


def memory_bytes() -> int:
    """Return the bytes that a process may hold."""
    size = mx.device_info().get("max_recommended_working_set_size")
    return int(size) if size else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name_of(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
