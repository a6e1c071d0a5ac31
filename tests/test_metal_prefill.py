"""What is the prefill kernel's own, executed off-Mac: what it reads, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvmlx.backends.mlx.metal import loader
from kvmlx.backends.mlx.metal.prefill import attend_prefill, block_rows
from kvmlx.tolerance import assert_same
from tests.metal.device import Device, Launch
from tests.metal.off_mac import off_mac
from tests.stores import SHAPES, Problem, Shape, make, to_numpy

Runs = list[tuple[str, Launch]]


@pytest.fixture
def device() -> Iterator[Runs]:
    """Run kernels off-Mac; hand out what each launch did."""
    with off_mac(Device()) as ran:
        yield ran


def test_the_history_costs_reads_and_nothing_else(device: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch whose only memory is the output; the body is read once per block of queries; nothing compiled anew."""
    inner, templates = loader.launch, []

    def noted(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        templates.append(arguments["template"])
        return inner(kernel, **arguments)

    monkeypatch.setattr(loader, "launch", noted)
    shape = Shape("int4", "float16", n_kv_heads=1, n_queries=40, body=1024)
    for body in (1024, 4096):
        p = make(replace(shape, body=body))
        attend_prefill(p.store, p.queries, **p.arguments())
    runs = [run for _, run in device]
    short, long = runs
    assert templates[0] == templates[1]
    for run in runs:
        assert [x.shape for x in run.outputs] == [(1, 2, 40, 64)]
        assert {k: n for k, n in run.written.items() if n} == {"out": 2 * 40 * 64 * 2}
    assert short.threadgroup_bytes == long.threadgroup_bytes <= 32768
    blocks = -(-2 * 40 // block_rows(64, 64))
    for run, body in zip(runs, (1024, 4096), strict=True):
        for side in ("keys", "values"):
            assert run.read[f"{side}_codes0"] == run.unique_read[f"{side}_codes0"] == blocks * body * 32
            assert run.unique_read[f"{side}_scales"] == run.unique_read[f"{side}_offsets"] == blocks * body * 2
    assert long.read["queries"] == short.read["queries"]
    assert long.read["tail_keys"] == short.read["tail_keys"]


def test_what_no_query_of_a_block_sees_is_not_read(device: Runs) -> None:
    """Rows of the tail after a block's own, and tiles of the body before a sliding window."""
    p = make(Shape("exact", "float16", n_kv_heads=1, group=1, n_queries=128, body=0, tail=0))
    attend_prefill(p.store, p.queries, **p.arguments())
    assert device[-1][1].read["tail_keys"] == (64 + 128) * 64 * 2
    p = make(Shape("int8", "float16", n_kv_heads=1, group=1, n_queries=40, body=512, tail=2, sinks=2, window=100))
    attend_prefill(p.store, p.queries, **p.arguments())
    # The first token sees its own row and 99 of the body; whole tiles of 32 are read.
    assert device[-1][1].read["keys_codes0"] == 128 * 64


def test_the_order_of_threads_changes_no_bit() -> None:
    p = make(SHAPES[0])
    first, second = (_bits(p, seed) for seed in (0, 7))
    assert_same(second, first)


def _bits(p: Problem, seed: int) -> np.ndarray:
    with off_mac(Device(seed=seed)):
        return to_numpy(attend_prefill(p.store, p.queries, **p.arguments()))
