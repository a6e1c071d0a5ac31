"""Count what the Metal kernels read, write and compute, executed off-Mac, and write docs/results/metal.json.

    python -m scripts.count_metal [--quick]

Nothing here is a time: bytes and operations are counted (tests/metal/), and what an Apple GPU would make of them is a
roofline, stated as a prediction. `--quick` counts short histories only and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.progress import track

from kvmlx.backends.mlx.metal import attend, column_sums, encode, prefill
from kvmlx.backends.mlx.metal.operands import CONSTANTS
from kvmlx.backends.mlx.ops import BACKEND
from kvmlx.store import LayerStore
from kvmlx.strategy import Strategy
from tests.metal.device import Device, Launch
from tests.metal.off_mac import off_mac

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
HEADERS = "mlx/backend/metal/kernels"
console = Console(stderr=True)

DIM, KV_HEADS = 128, 8
"""Shape of the 8B models. KV heads are counted one at a time: each has threadgroups of its own."""
TAIL = 96
"""Exact rows behind the body: 64 recent ones and half of the 32 that gather before they are encoded."""
STRATEGIES = ["int4", "int2", "small", "tiny", "kivi(bits=2)"]
GROUPS = [1, 4, 8]
PREDICTED = ["int4", "int2"]
LENGTHS = [8192, 32768, 131072]
PREFILL_LENGTHS = [8192, 16384, 32768, 65536]
PREFILL_QUERIES = 16
BASELINE_GROUPS = [1, 4]

ALU = ("float", "float_divide", "transcendental", "integer", "integer_divide", "convert", "compare_select")
"""Categories of tests/metal/device.py that take a slot of an ALU. `widen` takes none: a float instruction reads a half.
Addresses are left out: which of them are instructions, a compiler for another machine cannot tell."""

STRIDES = ("k_head_stride", "k_seq_stride", "v_head_stride", "v_seq_stride")
UNIFORM = {*CONSTANTS, "scale", "splits", "numbers", "gqa_factor", "N", *STRIDES}
"""Inputs in the constant address space: a few numbers that all threads share."""

CHIPS = {
    "M1": (68.25, 2.6),
    "M1 Max": (400.0, 10.4),
    "M2": (100.0, 3.6),
    "M2 Max": (400.0, 13.6),
    "M2 Ultra": (800.0, 27.2),
}
"""Memory bandwidth in GB/s and FP32 TFLOPS, as Apple has published them (it has given no TFLOPS since)."""


NOTES = """\
D = 128, float16, one KV head of eight, 96 exact rows in the tail; `G` is the query heads of a KV head. Read are the
distinct bytes of device memory per threadgroup, summed; loaded are the bytes that all threads ask for. A value is one
channel of one key or value. ALU operations are those of LLVM's IR, simd functions with them, loads and addresses
without (`tests/metal/device.py` says which); a code book's codes are addresses, so `small` and `tiny` count fewer than
they cost."""
PREDICTION = """\
**A prediction, not a measurement**: the speed-up of a decode step's attention over fp16 attention, as a roofline. Time
is the larger of bytes over the chip's bandwidth and ALU operations over half of its FP32 FLOPS, both as Apple published
them. The fp16 attention reads every row once at full bandwidth and computes nothing. `bound` is the ALU operations a
value at which the chip is as busy with them as with the bytes: above it, arithmetic decides. Every query head
multiplies every value once, so at G = 8 and 2 bits the multiply-adds alone are above it."""


def make_store(strategy: str, rows: int) -> LayerStore:
    """Return one KV head with ``rows`` random rows in its body and TAIL exact ones, float16."""
    rng = np.random.default_rng(0)
    store = LayerStore(BACKEND, Strategy.parse(strategy).codecs(), sinks=4)
    for n in (rows + TAIL,):
        keys, values = (mx.array(rng.standard_normal((1, 1, n, DIM)).astype(np.float16)) for _ in range(2))
        store.append(keys, values)
    store.encode_oldest(np.array([[rows]]))
    return store


def held_bytes(store: LayerStore) -> int:
    """Return the bytes of the rows that are there, without head-room."""
    used = int(store.length.sum()) / int(store.span.sum())
    _, _, d, dv = store.shape
    return int(sum(p.nbytes for p in store.planes.values()) * used) + TAIL * (d + dv) * 2


def total(runs: Sequence[Launch], name: str) -> int:
    """Return the bytes of a counter over all buffers in device memory."""
    return sum(n for run in runs for buffer, n in getattr(run, name).items() if buffer not in UNIFORM)


def operations(runs: Sequence[Launch]) -> dict[str, int]:
    """Return operations by category, simdgroup functions among them."""
    out: dict[str, int] = {"simd": sum(run.simd_ops for run in runs)}
    for run in runs:
        for name, n in run.instructions.items():
            out[name] = out.get(name, 0) + n
    return out


def alu(found: dict[str, int]) -> int:
    return sum(found.get(name, 0) for name in ALU) + found["simd"]


def count_decode(strategy: str, rows: int, group: int) -> dict[str, Any]:
    """Count one new token over ``rows`` encoded rows, for ``group`` query heads of one KV head."""
    store = make_store(strategy, rows)
    queries = mx.random.normal((1, group, 1, DIM)).astype(mx.float16)
    device = Device(races=False, count_instructions=True)
    # The other KV heads bring threadgroups too: a head on its own would be split further.
    names = ("TARGET_THREADGROUPS", "FEW_THREADGROUPS")
    wanted = {name: getattr(attend, name) for name in names}
    try:
        for name, n in wanted.items():
            setattr(attend, name, n // KV_HEADS)
        with off_mac(device) as ran:
            attend.attend_decode(store, queries, scale=DIM**-0.5)
    finally:
        for name, n in wanted.items():
            setattr(attend, name, n)
    runs = [run for _, run in ran]
    base = held_bytes(store) + queries.nbytes
    found = operations(runs)
    values = 2 * rows * DIM
    return {
        "strategy": strategy,
        "rows": rows,
        "group": group,
        "bytes": base,
        "fp16_bytes": 2 * (rows + TAIL) * DIM * 2,
        "read": total(runs, "unique_read"),
        "requested": total(runs, "read"),
        "written": total(runs, "written"),
        "threadgroups": runs[0].threads // (32 * attend.SIMDGROUPS),
        "threadgroup_bytes": runs[0].threadgroup_bytes,
        "alu_per_value": alu(found) / values,
        "operations_per_value": {name: n / values for name, n in sorted(found.items())},
    }


def count_baseline(rows: int, group: int) -> dict[str, Any]:
    """Count MLX's own fp16 `sdpa_vector` on the same history, one KV head."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n, rows_, DIM)).astype(np.float16) for n, rows_ in ((group, 1), (1, rows), (1, rows))
    )
    flags = ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")
    constants: dict[str | int, object] = {"blocks": 1, **dict.fromkeys(flags, False)}
    size = rows * DIM
    run = Device(races=False, count_instructions=True).launch_source(
        "".join(f'#include "{HEADERS}/{name}.h"\n' for name in ("utils", "sdpa_vector")),
        f"sdpa_vector<half, {DIM}, {DIM}>",
        buffers=[
            ("queries", mx.array(q)),
            ("keys", mx.array(k)),
            ("values", mx.array(v)),
            ("gqa_factor", np.int32(group)),
            ("N", np.int32(rows)),
            *((name, np.uint64(n)) for name, n in zip(STRIDES, (size, DIM, size, DIM), strict=True)),
            ("scale", np.float32(DIM**-0.5)),
        ],
        output_names=["out"],
        output_shapes=[(group, 1, DIM)],
        output_dtypes=[mx.float16],
        threadgroups=(group, 1, 1),
        threadgroup=(1024, 1, 1),
        function_constants=constants,
    )
    found = operations([run])
    values = 2 * rows * DIM
    return {
        "rows": rows,
        "group": group,
        "bytes": k.nbytes + v.nbytes + q.nbytes,
        "read": total([run], "unique_read"),
        "requested": total([run], "read"),
        "written": total([run], "written"),
        "alu_per_value": alu(found) / values,
        "operations_per_value": {name: n / values for name, n in sorted(found.items())},
    }


def count_prefill(strategy: str, rows: int) -> dict[str, Any]:
    """Count a chunk of PREFILL_QUERIES tokens over ``rows`` encoded rows, 4 query heads of one KV head."""
    store = make_store(strategy, rows)
    queries = mx.random.normal((1, 4, PREFILL_QUERIES, DIM)).astype(mx.float16)
    with off_mac(Device(races=False)) as ran:
        out = prefill.attend_prefill(store, queries, scale=DIM**-0.5)
    runs = [run for _, run in ran]
    made = sum(x.nbytes for run in runs for x in run.outputs)
    return {
        "strategy": strategy,
        "rows": rows,
        "scratch": made - out.nbytes,
        "threadgroup_bytes": runs[0].threadgroup_bytes,
        "read": total(runs, "unique_read"),
        "bytes": held_bytes(store) + queries.nbytes,
        "threadgroups": len(runs),
    }


def count_encode(strategy: str, rows: int) -> dict[str, Any]:
    """Count the encoding of ``rows`` rows of keys and of values."""
    x = mx.random.normal((1, rows, DIM)).astype(mx.float16)
    found = {"strategy": strategy, "rows": rows, "bytes_in": 2 * x.nbytes, "read": 0, "written": 0, "bytes_out": 0}
    for codec in Strategy.parse(strategy).codecs():
        assert codec is not None
        with off_mac(Device(races=False)) as ran:
            planes = encode.encode(codec, x)
        runs = [run for _, run in ran]
        found["read"] += total(runs, "unique_read")
        found["written"] += total(runs, "written")
        found["bytes_out"] += sum(p.nbytes for p in planes.values())
    return found


def count_column_sums(rows: int, queries: int = 32) -> dict[str, Any]:
    """Count a window of ``queries`` tokens on ``rows`` keys, 4 query heads of one KV head: SnapKV's observation."""
    keys = mx.random.normal((1, 1, rows, DIM)).astype(mx.float16)
    q = mx.random.normal((1, 4, queries, DIM)).astype(mx.float16)
    with off_mac(Device(races=False)) as ran:
        out = column_sums.column_sums(q, keys, scale=DIM**-0.5)
    runs = [run for _, run in ran]
    made = sum(x.nbytes for run in runs for x in run.outputs)
    return {"rows": rows, "queries": queries, "scratch": made - out.nbytes, "matrix": 4 * queries * rows * 4}


def predict(counted: dict[str, Any], chip: tuple[float, float]) -> dict[str, float]:
    """Return the roofline of one decode: times of memory and of the ALUs in ns, and the speed-up over fp16 attention.

    The fp16 attention that it is compared with reads every row once and does nothing else: no kernel is faster.
    An ALU operation is half of an FMA's two FLOPs.
    """
    bandwidth, teraflops = chip
    memory = (counted["read"] + counted["written"]) / bandwidth
    ops = counted["alu_per_value"] * 2 * counted["rows"] * DIM / (teraflops / 2 * 1e3)
    return {"memory_ns": memory, "alu_ns": ops, "speedup": counted["fp16_bytes"] / bandwidth / max(memory, ops)}


def bound(counted: dict[str, Any], chip: tuple[float, float]) -> float:
    """Return the ALU operations per value at which the chip takes as long for them as for the bytes."""
    bandwidth, teraflops = chip
    seconds = counted["read"] / (bandwidth * 1e9)
    return seconds * teraflops / 2 * 1e12 / (2 * counted["rows"] * DIM)


def measure(*, quick: bool) -> dict[str, Any]:
    lengths = [1024] if quick else LENGTHS
    jobs: list[tuple[str, Any]] = [
        ("decode", (s, t, g))
        for t in lengths
        for s in STRATEGIES
        for g in GROUPS
        if s in PREDICTED or (t == lengths[0] and not quick)
    ]
    jobs += [("baseline", (t, g)) for t in lengths[:1] for g in BASELINE_GROUPS]
    jobs += [("prefill", ("int4", t)) for t in (lengths if quick else PREFILL_LENGTHS)]
    jobs += [("encode", (s, 256)) for s in STRATEGIES[: 2 if quick else None]]
    jobs += [("column_sums", (t,)) for t in (lengths if quick else LENGTHS[:2])]
    count = {
        "decode": count_decode,
        "baseline": count_baseline,
        "prefill": count_prefill,
        "encode": count_encode,
        "column_sums": count_column_sums,
    }
    found: dict[str, Any] = {name: [] for name in count}
    for name, arguments in track(jobs, description="counting", console=console):
        found[name].append(count[name](*arguments))
    return {
        "machine": f"{platform.system()} {platform.machine()}: executed off-Mac, no Apple GPU",
        "versions": {name: version(name) for name in ("mlx", "ziglang", "numpy")},
        "shape": {"head_dim": DIM, "kv_heads": KV_HEADS, "tail_rows": TAIL, "dtype": "float16"},
        "chips": {name: {"GB/s": chip[0], "TFLOPS": chip[1]} for name, chip in CHIPS.items()},
        **found,
    }


def render(results: dict[str, Any]) -> str:
    """Return the tables of docs/metal.md."""
    out = [
        *NOTES.splitlines(),
        "",
        "| decode over 8k rows | G | read / held | loaded / held | written / held | ALU operations a value |",
        "|---|---|---|---|---|---|",
    ]
    short = results["decode"][0]["rows"]
    for row in results["decode"]:
        if row["rows"] == short:
            held = row["bytes"]
            out.append(
                f"| `{row['strategy']}` | {row['group']} | {row['read'] / held:.3f} | {row['requested'] / held:.3f} "
                f"| {row['written'] / held:.3f} | {row['alu_per_value']:.1f} |"
            )
    for row in results["baseline"]:
        held = row["bytes"]
        out.append(
            f"| MLX's `sdpa_vector`, fp16 | {row['group']} | {row['read'] / held:.3f} | {row['requested'] / held:.3f} "
            f"| {row['written'] / held:.4f} | {row['alu_per_value']:.1f} |"
        )
    out += [
        "",
        *PREDICTION.splitlines(),
        "",
        "| | G | " + " | ".join(CHIPS) + " |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    for strategy in PREDICTED:
        rows = [row for row in results["decode"] if row["strategy"] == strategy]
        cells = " | ".join(f"{bound(rows[-1], chip):.1f}" for chip in CHIPS.values())
        out.append(f"| `{strategy}`: bound | | {cells} |")
        for row in rows:
            cells = " | ".join(f"{predict(row, chip)['speedup']:.1f}x" for chip in CHIPS.values())
            out.append(f"| `{strategy}`, {row['rows'] // 1024}k | {row['group']} | {cells} |")
    scratch = ", ".join(f"{row['scratch']} at {row['rows'] // 1024}k" for row in results["prefill"])
    shared = f"{results['prefill'][0]['threadgroup_bytes'] / 1024:.1f} KB of threadgroup memory"
    encoded, sums = results["encode"][0], results["column_sums"][-1]
    read, written = encoded["read"] / encoded["bytes_in"], encoded["written"] / encoded["bytes_out"]
    out += [
        "",
        f"Scratch of `attend_prefill` in device memory, in bytes by rows of history: {scratch}; and {shared}.",
        f"`encode` to `{encoded['strategy']}` reads {read:.3f} of its input and writes {written:.3f} of its output.",
        f"`column_sums` of {sums['queries']} queries on {sums['rows'] // 1024}k keys has {sums['scratch']:,} bytes of",
        f"scratch; the matrix of weights would have {sums['matrix']:,}.",
    ]
    return "\n".join(out) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="short histories, printed only")
    quick = parser.parse_args(arguments).quick
    results = measure(quick=quick)
    if quick:
        print(render(results), end="")
        return 0
    path = RESULTS / "metal.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {path.relative_to(ROOT)}; python -m tests.test_docs puts it into docs/metal.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
