"""The attention kernels, executed off-Mac, over stores of every format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlx import attention
from kvmlx.backends.formats import unsupported
from kvmlx.backends.mlx.metal import attend, loader
from kvmlx.backends.mlx.metal.attend import attend_decode
from kvmlx.backends.mlx.metal.prefill import attend_prefill
from kvmlx.backends.mlx.ops import BACKEND
from kvmlx.checks import Case
from kvmlx.stages.encode.codecs import Affine, Channel
from kvmlx.tolerance import assert_close, assert_same
from tests.metal.device import Device, Launch
from tests.metal.off_mac import off_mac
from tests.stores import (
    PLACES,
    SHAPES,
    Kernel,
    Shape,
    check,
    make,
    oracle,
    plain,
    shapes,
    sliding,
    to_numpy,
    vector_problem,
)
from tests.test_vectors import over

Runs = list[tuple[str, Launch]]
KERNELS = {"decode": attend_decode, "prefill": attend_prefill}


@pytest.fixture(params=[0, 1], ids=["ascending", "shuffled"])
def device(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Run kernels off-Mac, lanes in one order or another; hand out what each launch did."""
    with off_mac(Device(seed=request.param)) as ran:
        yield ran


@pytest.fixture(params=KERNELS.values(), ids=list(KERNELS))
def kernel(request: pytest.FixtureRequest, device: Runs) -> Kernel:
    return request.param


# Prefill's shapes with the few tokens of decoding, and every format, head dim and number of query rows in turn.
FEW = [replace(s, n_queries=(1, 2, 1, 3, 8, 1, 5)[i % 7]) for i, s in enumerate(SHAPES)]
ONE = [
    Shape(stage, dtype, dim, n_kv_heads=1, group=group, n_queries=n, body=body, tail=tail, biased=n > 1)
    for stage, dtype, dim, group, n, body, tail in [
        ("int2", "float16", 128, 1, 1, 129, 9),
        ("int2", "bfloat16", 64, 8, 1, 64, 1),
        ("int2", "float32", 192, 4, 2, 33, 31),
        ("int3", "float16", 96, 2, 1, 95, 33),
        ("int3", "bfloat16", 256, 1, 3, 1, 65),
        ("int4", "float16", 80, 7, 1, 63, 4),
        ("int4", "bfloat16", 128, 8, 1, 257, 64),
        ("int4", "float16", 256, 4, 1, 65, 3),
        ("int4(group_size=128)", "float16", 128, 3, 1, 40, 5),
        ("int4(group_size=8)", "bfloat16", 64, 8, 1, 40, 5),
        ("int5", "float16", 192, 1, 8, 31, 7),
        ("int5", "float32", 80, 4, 1, 32, 8),
        ("int6", "float16", 64, 5, 1, 97, 2),
        ("int6", "bfloat16", 96, 8, 1, 34, 3),
        ("int8", "float16", 128, 4, 1, 61, 6),
        ("int8", "bfloat16", 192, 2, 4, 62, 5),
        ("int(k=8, v=4)", "float16", 96, 4, 1, 66, 4),
        ("int(k=3, v=5)", "bfloat16", 128, 8, 8, 67, 3),
        ("int(k=2, v=6)", "float16", 64, 6, 1, 68, 2),
        ("kivi(bits=2)", "bfloat16", 128, 8, 1, 96, 1),
        ("kivi(k=4, v=2, group_size=8)", "float16", 256, 4, 1, 24, 6),
        ("kivi(k=3, group_size=128) | int(v=3)", "float16", 192, 1, 1, 256, 6),
        ("kivi(bits=5, group_size=16)", "bfloat16", 80, 3, 2, 48, 6),
        ("turboquant(k=5, v=4, center=64)", "float16", 128, 4, 1, 192, 40),
        ("turboquant(bits=4, center=64)", "bfloat16", 64, 8, 1, 128, 33),
        ("turboquant(k=3, v=2, center=64)", "float16", 80, 1, 1, 64, 32),
        ("turboquant(bits=2, center=64)", "bfloat16", 192, 4, 1, 64, 31),
        ("turboquant(bits=1, center=256)", "float16", 96, 2, 3, 256, 30),
        ("turboquant(bits=6)", "bfloat16", 256, 8, 1, 45, 29),
        ("exact", "bfloat16", 128, 4, 1, 70, 3),
        ("exact", "float16", 192, 8, 1, 35, 2),
    ]
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_prefill(device: Runs, shape: Shape) -> None:
    check(attend_prefill, make(shape))


@pytest.mark.parametrize("shape", [*FEW, *ONE], ids=lambda s: s.name)
def test_decode(device: Runs, shape: Shape) -> None:
    check(attend_decode, make(shape))


@pytest.mark.parametrize("rows", [1, 2])
def test_many_splits_agree(device: Runs, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Splits of 32 rows and more lanes than rows for some: partial results of nothing, and of one row, are merged."""
    monkeypatch.setattr(attend, "SPLIT_ROWS", 32)
    shape = Shape("int4", "float16", n_batch=2, n_queries=rows, body=(200, 1, 0, 65), tail=90, attention_sinks=True)
    check(attend_decode, make(shape))
    _, splits = device[0][1].outputs[1].shape
    assert splits >= 7 + 2


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.body or s.biased], ids=lambda s: s.name)
def test_the_oracle_is_the_plain_path(shape: Shape) -> None:
    p = make(shape)
    mask = sliding(p) if p.window else p.mask
    out = attention.attend(BACKEND, p.store, p.queries, scale=p.scale, sinks=p.sinks, mask=mask)
    assert_close(to_numpy(out), oracle(p), plain(p), dtype=shape.dtype)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 99))
def test_any_lengths(kernel: Kernel, shape: Shape, seed: int) -> None:
    check(kernel, make(shape, seed))


# Shared vectors


@pytest.mark.parametrize(("place", "absent"), PLACES)
@over("attention")
def test_vectors(kernel: Kernel, case: Case, place: str, absent: str) -> None:
    p = vector_problem(case, BACKEND, place, absent)
    want, low = oracle(p), plain(p)
    assert_close(want, case[1]["out"], low, name="oracle")
    out = kernel(p.store, p.queries, **p.arguments())
    assert_close(to_numpy(out), case[1]["out"], low)


def test_queries_that_see_nothing_give_zeros(kernel: Kernel) -> None:
    p = make(Shape("exact", n_queries=6, body=0, tail=0))
    p.store.begin[:] = 4
    out = to_numpy(check(kernel, p))
    assert (out[:, :, :4] == 0).all() and (out[:, :, 4:] != 0).any()
    p = make(Shape(mask="bool L"))
    assert p.mask is not None
    p.mask[:, :, 2] = False
    assert (to_numpy(check(kernel, p))[:, :, 2] == 0).all()


def test_a_large_sink_or_logit_neither_overflows_nor_vanishes(kernel: Kernel) -> None:
    p = make(Shape(attention_sinks=True))
    p.sinks = mx.array([200.0, -200.0, 0.0, 90.0])
    check(kernel, p)
    p = make(Shape())
    p.scale = 40.0
    check(kernel, p)


# What decoding costs


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("stage", ["int4", "int2", "kivi(bits=2)", "turboquant(bits=4, center=64)"])
def test_decode_reads_the_body_once_for_all_heads(monkeypatch: pytest.MonkeyPatch, stage: str, group: int) -> None:
    """At most 1.05 of what is held is read, no plane more than once, and 2% are written: one KV head of eight."""
    for name in ("TARGET_THREADGROUPS", "FEW_THREADGROUPS"):
        monkeypatch.setattr(attend, name, getattr(attend, name) // 8)
    p = make(Shape(stage, "float16", 128, n_kv_heads=1, group=group, n_queries=1, body=8192, tail=60))
    with off_mac(Device(races=False)) as ran:
        attend_decode(p.store, p.queries, **p.arguments())
    held = sum(x.nbytes for x in p.store.planes.values()) * 8192 // int(p.store.span.sum())
    held += 2 * int(p.store.tail_lengths.sum()) * 128 * 2 + p.queries.nbytes
    (_, decode), (_, merge) = ran
    assert sum(sum(run.unique_read.values()) for run in (decode, merge)) <= 1.05 * held
    assert sum(sum(run.written.values()) for run in (decode, merge)) <= 0.02 * held
    for name, plane in p.store.planes.items():
        buffer = name.replace(".", "_").replace("zeros", "offsets").replace("means", "offsets")
        assert decode.read[buffer] == plane.nbytes * 8192 // int(p.store.span.sum())


def test_the_history_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No length is a template argument: a longer history compiles nothing anew."""
    templates = []

    def noted(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        templates.append((kernel.name, arguments["template"]))
        return (
            Device(races=False)
            .launch(kernel.function, input_names=kernel.inputs, output_names=kernel.outputs, **arguments)
            .outputs
        )

    monkeypatch.setattr(loader, "launch", noted)
    for body, tail in ((64, 5), (640, 77), (4096, 9)):
        p = make(Shape("int4", "float16", n_kv_heads=1, n_queries=1, body=body, tail=tail))
        attend_decode(p.store, p.queries, **p.arguments())
    assert templates[0:2] == templates[2:4] == templates[4:6]


def test_the_order_of_threads_changes_no_bit() -> None:
    p = make(FEW[0])
    found = []
    for seed in (0, 7):
        with off_mac(Device(seed=seed)):
            found.append(to_numpy(attend_decode(p.store, p.queries, **p.arguments())))
    assert_same(found[0], found[1])


def test_what_is_not_taken_is_said_in_words() -> None:
    int4 = Affine(4)
    assert unsupported((int4, int4), 128, 64) is None and unsupported(None, 80, 80) is None
    assert "264" in str(unsupported(None, 264, 64)) and "12" in str(unsupported(None, 64, 12))
    assert "32 rows" in str(unsupported((int4, Channel(4)), 64, 64))
