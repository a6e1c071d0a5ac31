"""Count the bytes that the Triton kernels read and write: their calls run in Triton's interpreter, every access seen.

    TRITON_INTERPRET=1 python -m scripts.count_triton    prints JSON; scripts/compile_triton.py runs it

Of each program the distinct bytes are counted (``read``), summed over programs: what must come from memory or from the
L2. ``loaded`` counts a byte as often as a program asks for it. An access outside of every argument is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kvmlx.backends.torch.triton import attend, launch, prefill
from kvmlx.backends.torch.triton.backend import on
from kvmlx.layout import row_bytes
from scripts.gpu.stores import read_bytes
from scripts.triton_calls import DTYPES, EXACT, Call, codecs_of

PROCESSORS = 132
"""Of an H100."""
KV_HEADS = 8
"""Of the model that is meant; attention is counted one KV head at a time, each of which has programs of its own."""
FORMATS = ("int4", "int2", "int3", "small", "tiny", "kivi(bits=2)", EXACT)
ONE = Call("decode", n_kv_heads=1)
COUNTED = [
    *(replace(ONE, format=name) for name in FORMATS),
    *(replace(ONE, format=name, group=group) for name in ("int4", "int2") for group in (1, 8)),
    replace(ONE, rows=32768),
    *(replace(ONE, primitive="prefill", rows=rows, n_queries=64) for rows in (2048, 8192)),
    *(Call("encode", format=name, rows=512, n_kv_heads=1) for name in FORMATS if name != EXACT),
    Call("column_sums", n_queries=32, n_kv_heads=1),
    Call("compact", n_kv_heads=1),
]
QUICK = [replace(ONE, rows=512), Call("encode", rows=64, n_kv_heads=1)]


KINDS = ("read", "loaded", "written")


class OutOfBounds(AssertionError):
    """A kernel touched memory that no argument holds."""


@dataclass
class Traffic:
    """Bytes that one launch moved, by argument."""

    kernel: str
    grid: tuple[int, ...]
    read: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


class Counter:
    """Sees the loads and stores of the interpreter while a launch runs."""

    def __init__(self) -> None:
        self.launches: list[Traffic] = []
        self._names: list[str] = []
        self._first = self._last = np.zeros(0, np.int64)
        self._seen: dict[str, list[np.ndarray]] = {}

    @contextmanager
    def launched(self, kernel: str, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Iterator[None]:
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.numel()}
        order = sorted(tensors, key=lambda name: tensors[name].data_ptr())
        self._names = order
        self._first = np.array([tensors[name].data_ptr() for name in order], np.int64)
        self._last = np.array([tensors[name].data_ptr() + span_bytes(tensors[name]) for name in order], np.int64)
        self.launches.append(Traffic(kernel, grid))
        yield
        self.next_program()

    def next_program(self) -> None:
        """Add up what the program read that has ended."""
        for name, parts in self._seen.items():
            read = self.launches[-1].read
            read[name] = read.get(name, 0) + len(np.unique(np.concatenate(parts)))
        self._seen = {}

    def access(self, addresses: np.ndarray, size: int, mask: np.ndarray, *, write: bool) -> None:
        where = np.asarray(addresses).astype(np.int64)[np.asarray(mask).astype(bool)]
        if not where.size:
            return
        traffic = self.launches[-1]
        owner = np.searchsorted(self._first, where, side="right") - 1
        outside = (owner < 0) | (where + size > self._last[np.maximum(owner, 0)])
        if outside.any():
            raise OutOfBounds(f"{traffic.kernel} touches {int(outside.sum())} elements outside of its arguments")
        for i in np.unique(owner):
            name, mine = self._names[i], where[owner == i]
            counted = traffic.written if write else traffic.loaded
            counted[name] = counted.get(name, 0) + mine.size * size
            if not write:
                every = (np.unique(mine)[:, None] + np.arange(size)).ravel() if size > 1 else np.unique(mine)
                self._seen.setdefault(name, []).append(every)


def span_bytes(x: Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


@contextmanager
def counting() -> Iterator[list[Traffic]]:
    """Count every launch within; needs the interpreter."""
    from triton.runtime.interpreter import interpreter_builder as builder

    counter = Counter()
    call, hooks = launch.TritonKernel.__call__, ("create_masked_load", "create_masked_store", "create_atomic_rmw")

    def counted(self: Any, grid: Any, arguments: Any, constants: Any, **options: Any) -> None:
        with counter.launched(self.fn.__name__, grid, arguments):
            call(self, grid, arguments, constants, **options)

    made: Any = builder
    before = {name: getattr(made, name) for name in (*hooks, "set_grid_idx")}

    def load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        counter.access(pointers.data, width(pointers), mask.data, write=False)
        return before["create_masked_load"](pointers, mask, *rest, **options)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        counter.access(pointers.data, width(pointers), mask.data, write=True)
        return before["create_masked_store"](pointers, value, mask, *rest, **options)

    def atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.access(pointers.data, width(pointers), mask.data, write=True)
        return before["create_atomic_rmw"](operation, pointers, value, mask, *rest)

    def program(x: int, y: int, z: int) -> None:
        counter.next_program()
        before["set_grid_idx"](x, y, z)

    replaced = dict(zip(hooks, (load, store, atomic), strict=True)) | {"set_grid_idx": program}
    for name, function in replaced.items():
        setattr(made, name, function)
    setattr(launch.TritonKernel, "__call__", counted)  # noqa: B010
    try:
        yield counter.launches
    finally:
        setattr(launch.TritonKernel, "__call__", call)  # noqa: B010
        for name in replaced:
            delattr(made, name)


def width(pointers: Any) -> int:
    """Return the bytes of what a pointer points to."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def ideal_bytes(call: Call) -> int:
    """Return the bytes that a call must move: what it is given and what it returns, each once."""
    b, h, d, size = call.n_batch, call.n_kv_heads, call.dim, DTYPES[call.dtype].itemsize
    if call.primitive in ("decode", "prefill"):
        queries = torch.empty((b, h * call.group, call.n_queries, d), dtype=DTYPES[call.dtype])
        return read_bytes(call.store(on("cpu")), queries)
    if call.primitive == "column_sums":
        return b * h * (call.rows * d * size + call.group * (call.n_queries * d * size + call.rows * 4))
    codecs = [c for c in codecs_of(call.format) if c is not None]
    planes = int(sum(b * h * call.rows * row_bytes(c.planes(d)) for c in codecs))
    return planes + len(codecs) * b * h * call.rows * d * size if call.primitive == "encode" else planes


def count(call: Call) -> dict[str, Any]:
    """Run a call interpreted; return its bytes, and those of each launch."""
    # The other KV heads bring programs too: a head on its own would be split further.
    fewer = lru_cache(lambda device: -(-PROCESSORS * call.n_kv_heads // KV_HEADS))
    with (
        patch.object(attend, "processors", fewer),
        patch.object(prefill, "processors", fewer),
        counting() as launches,
    ):
        call.run(on("cpu"))
    if not launches:
        raise ValueError(f"{call.name} launches no kernel: plain operations take it")
    read, loaded, written = (sum(sum(getattr(x, name).values()) for x in launches) for name in KINDS)
    row = asdict(call) | {"ideal": ideal_bytes(call), "read": read, "loaded": loaded, "written": written}
    if call.primitive in ("decode", "prefill"):
        row["dense"] = dense_bytes(call)
    return row | {"launches": [asdict(x) for x in launches]}


def dense_bytes(call: Call) -> int:
    """Return the bytes of the same rows held exact, with queries and output: what attention over them reads."""
    store = call.store(on("cpu"))
    rows = int(store.lengths.sum())
    new = call.n_batch * call.n_kv_heads * call.group * call.n_queries
    return 2 * (rows + new) * call.dim * DTYPES[call.dtype].itemsize


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short histories")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1: accesses are seen in the interpreter")
    found = []
    for i, call in enumerate(QUICK if args.quick else COUNTED, 1):
        found.append(count(call))
        print(f"\r{i} calls counted", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
