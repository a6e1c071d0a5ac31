"""The Triton kernels for attention of a few new tokens: interpreted without a GPU, on the device where there is one.

NVIDIA gets PTX where others get plain operations; without a device that PTX is executed by a few lines of Python.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402

from kvmlx import layout  # noqa: E402
from kvmlx.backends.torch.ops import on  # noqa: E402
from kvmlx.backends.torch.triton import attend, codecs, launch  # noqa: E402
from kvmlx.backends.torch.triton.attend import Config, attend_decode, configuration, configurations  # noqa: E402
from kvmlx.backends.torch.triton.launch import Launch, recording  # noqa: E402
from kvmlx.backends.torch.triton.operands import HEADER, NUMBERS, numbers_of, operands  # noqa: E402
from kvmlx.checks import Case  # noqa: E402
from kvmlx.store import SPAN_STEP  # noqa: E402
from kvmlx.tolerance import assert_close, assert_same  # noqa: E402
from tests.stores import (  # noqa: E402
    PLACES,
    SHAPES,
    Problem,
    Shape,
    check,
    make,
    oracle,
    plain,
    poison,
    shapes,
    to_numpy,
    vector_problem,
)
from tests.test_triton_prefill import execute  # noqa: E402
from tests.test_vectors import over  # noqa: E402

CUDA = torch.cuda.is_available()
BACKEND = on("cuda" if CUDA else "cpu")
INTERPRETED = not isinstance(attend.attend_decode_kernel, triton.JITFunction)
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# PTX without a device


def words_of(bits: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return codes ``[n, 2, per word]`` of pairs of words, every pair of values somewhere, and `ptx`'s registers."""
    rng = np.random.default_rng(bits)
    n = codecs.codes_per_word(bits)
    codes = rng.integers(0, 2**bits, (4096, 2, n), np.uint8)
    codes[:256] = (np.arange(256)[:, None, None] + 5 * np.arange(2)[:, None] + np.arange(n)) % 2**bits
    registers: list[np.ndarray] = []
    for plane, width in zip(layout.pack(np, codes.reshape(4096, -1), bits), layout.plane_bits(bits), strict=True):
        if width * n > 8:
            registers += list(np.ascontiguousarray(plane).view(np.uint32).T)
        else:
            # Words of 8 bits: 16 bits that both words of a pair have, and masks of whose is whose.
            pair = np.ascontiguousarray(plane).view(np.uint16)[:, 0].astype(np.uint32)
            registers += [pair | pair << 16, np.full(4096, 0xFF0000FF, np.uint32)]
    return codes, registers


def executed(text: str, bits: int, registers: list[np.ndarray]) -> np.ndarray:
    """Return the numbers ``[n, 2, per word]`` that a text gives."""
    out = execute(text, registers, codecs.codes_per_word(bits))
    return np.stack([np.ascontiguousarray(x).view(np.float16).reshape(-1, 2) for x in out], axis=-1)


@pytest.mark.parametrize("bits", codecs.PLACES)
def test_ptx_unpacks_every_code(bits: int) -> None:
    codes, registers = words_of(bits)
    assert_same(executed(codecs.ptx(bits, False), bits, registers), codes.astype(np.float16))


# A standard deviation of a channel is 1: what rounding a level to a half may cost, and what docs say of each.
LEVEL_ERRORS = {1: 1e-7, 2: 2.1e-4, 3: 4.1e-4, 4: 6e-4, 5: 7.2e-4}


@pytest.mark.parametrize("bits", codecs.POLYNOMIALS)
def test_ptx_gives_every_level(bits: int) -> None:
    codes, registers = words_of(bits)
    want = layout.code_book(bits).astype(np.float64)[codes]
    got = executed(codecs.ptx(bits, True), bits, registers).astype(np.float64) * codecs.POLYNOMIALS[bits][0]
    assert np.abs(got - want).max() <= LEVEL_ERRORS[bits] < 2.0**-10


@pytest.mark.parametrize("bits", [2, 4])
def test_ptx_looks_up_every_level(bits: int) -> None:
    codes, registers = words_of(bits)
    levels = (layout.code_book(bits) / codecs.POLYNOMIALS[bits][0]).astype(np.float16)
    assert_same(executed(codecs.table_ptx(bits), bits, registers), levels[codes])


def test_ptx_is_accepted(tmp_path: Path) -> None:
    """By NVIDIA's assembler, which comes with Triton."""
    texts = {codecs.ptx(b, centered): b for b in codecs.PLACES for centered in (False, b in codecs.POLYNOMIALS)}
    texts |= {codecs.table_ptx(b): b for b in (2, 4)}
    lines = [".version 7.0", ".target sm_80", ".address_size 64", ".visible .entry all() {", ".reg .b32 r<12>;"]
    lines += [re.sub(r"\$(\d+)", r"r\1", text) for text in texts]
    for text, bits in texts.items():
        used = {int(n) for n in re.findall(r"\$(\d+)", text)}
        assert used == set(range(len(codecs._constraints(bits).split(","))))
    source = tmp_path / "all.ptx"
    source.write_text("\n".join([*lines, "ret;", "}"]))
    done = subprocess.run(
        [knobs.nvidia.ptxas.path, "-arch=sm_80", str(source), "-o", str(tmp_path / "all.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout


@contextmanager
def as_on(monkeypatch: pytest.MonkeyPatch, backend: str) -> Iterator[list[str]]:
    """Interpret kernels as they are compiled for ``cuda``, PTX included, or ``hip``. Yields the PTX that was run."""
    from triton.runtime import interpreter

    ran: list[str] = []

    def run(self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> Any:
        ran.append(text)
        registers: list[np.ndarray] = []
        for v in values:
            x = np.ascontiguousarray(v.data)
            registers += list(x.reshape(-1, pack).view(np.uint32).T)
        assert len(registers) == constraints.split(",").count("r") and len(types) == constraints.count("=&r")
        made = []
        for y in execute(text, registers, len(types)):
            halves = np.ascontiguousarray(y).view(np.float16).reshape(values[0].data.shape)
            made.append(interpreter.TensorHandle(halves, types[0].scalar))
        return SimpleNamespace(get_result=made.__getitem__)

    with monkeypatch.context() as patch:
        for module in (codecs, attend):
            patch.setattr(module, "compiled_for", lambda name: name == backend)
        patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run)
        yield ran


# Every format

# Prefill's shapes with the few tokens of decoding, and every format, head dim and number of query rows in turn.
FEW = [replace(s, n_queries=(1, 2, 1, 3, 8, 1, 5)[i % 7]) for i, s in enumerate(SHAPES)]
ONE = [
    Shape(stage, dtype, dim, n_kv_heads=1, group=group, n_queries=n, body=body, tail=tail, biased=n == 2)
    for stage, dtype, dim, group, n, body, tail in [
        ("int2", "float16", 128, 1, 1, 129, 9),
        ("int2", "bfloat16", 64, 8, 1, 64, 1),
        ("int2", "float32", 192, 4, 2, 33, 31),
        ("int3", "float16", 96, 2, 1, 95, 33),
        ("int3", "bfloat16", 256, 1, 3, 1, 65),
        ("int4", "float16", 80, 7, 1, 63, 4),
        ("int4", "bfloat16", 128, 8, 1, 257, 64),
        ("int4", "float16", 256, 4, 1, 65, 3),
        ("int4", "bfloat16", 128, 16, 2, 127, 3),
        ("int4(group_size=128)", "float16", 128, 3, 1, 40, 5),
        ("int4(group_size=8)", "bfloat16", 64, 8, 1, 40, 5),
        ("int5", "float16", 192, 1, 8, 31, 7),
        ("int5", "bfloat16", 80, 4, 1, 32, 8),
        ("int6", "float16", 64, 5, 1, 97, 2),
        ("int6", "bfloat16", 96, 8, 1, 34, 3),
        ("int8", "float16", 128, 4, 1, 61, 6),
        ("int8", "bfloat16", 24, 2, 4, 62, 5),
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
        ("turboquant(bits=2, center=64)", "bfloat16", 256, 4, 1, 64, 31),
        ("turboquant(bits=1, center=256)", "float16", 96, 2, 3, 256, 30),
        ("turboquant(bits=6)", "bfloat16", 64, 8, 1, 45, 29),
        ("turboquant(k=2, v=5)", "float16", 40, 8, 1, 45, 29),
        ("turboquant(bits=1)", "bfloat16", 8, 2, 1, 33, 3),
        ("exact", "bfloat16", 128, 4, 1, 70, 3),
        ("exact", "float16", 192, 8, 1, 35, 2),
    ]
]


def named(shape: Shape) -> str:
    return shape.name


def run(p: Problem, **more: Any) -> Any:
    return attend_decode(p.store, p.queries, **p.arguments(), **more)


@pytest.mark.parametrize("shape", [*FEW, *ONE], ids=named)
def test_decode(shape: Shape) -> None:
    check(attend_decode, make(shape, backend=BACKEND))


PACKED = [s for s in [*FEW, *ONE] if s.stage != "exact" and s.body and s.dtype != "float32"]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs what is compiled for it: test_decode")
@pytest.mark.parametrize("shape", PACKED, ids=named)
def test_decode_with_what_nvidia_gets(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    with as_on(monkeypatch, "cuda") as ran:
        check(attend_decode, make(shape, backend=BACKEND))
    assert bool(ran) == (shape.stage != "turboquant(bits=6)")


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs what is compiled for it: test_decode")
@pytest.mark.parametrize("shape", [s for s in PACKED if s.dim >= 96][::3], ids=named)
def test_decode_with_what_amd_gets(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    """Query rows padded to 16, and scales that meet each code where there would be too many columns then."""
    with as_on(monkeypatch, "hip") as ran:
        check(attend_decode, make(shape, backend=BACKEND))
    assert not ran


@pytest.mark.parametrize("body", [1, 31, 32, 33, 63, 65, 129, 700])
@pytest.mark.parametrize("tail", [0, 16, 64, 65])
def test_lengths_around_tiles(body: int, tail: int) -> None:
    stage = ("int4", "turboquant(bits=4)")[(body + tail) % 2]
    check(attend_decode, make(Shape(stage, "float16", 32, n_queries=1, body=body, tail=tail), body, BACKEND))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), seed=st.integers(0, 99), n=st.integers(1, 8), split=st.booleans())
def test_any_lengths(shape: Shape, seed: int, n: int, split: bool) -> None:
    p = make(replace(shape, n_queries=n), seed, BACKEND)
    config = Config(tile=16, least_rows=16, tail_rows=16) if split else Config(tile=64, programs=1)
    check(partial(attend_decode, config=config), p)


@pytest.mark.parametrize(("place", "absent"), PLACES)
@over("attention")
def test_vectors(case: Case, place: str, absent: str) -> None:
    p = vector_problem(case, BACKEND, place, absent)
    assert_close(to_numpy(run(p)), case[1]["out"], plain(p))


# How the work is divided

SPLIT = [
    Shape("int4", "float16", n_batch=2, n_queries=1, body=(200, 1, 0, 65), tail=90, attention_sinks=True),
    Shape("turboquant(bits=4, center=16)", "bfloat16", 64, n_queries=2, body=(48, 160), tail=4),
    Shape("int8", "float32", 32, n_queries=3, body=100, tail=20, window=60, begin=(3,)),
    Shape("kivi(bits=2)", "float16", 32, n_queries=8, body=128, mask="bool BHL"),
    Shape("exact", "bfloat16", 32, n_batch=2, n_queries=1, body=0, tail=100, begin=(0, 60), biased=True),
]


def parts(launches: list[Launch]) -> int:
    return launches[0].grid[1]


@pytest.mark.parametrize("shape", SPLIT, ids=named)
@pytest.mark.parametrize("config", [Config(least_rows=16, tail_rows=16), Config(programs=0, tail_rows=1000)], ids=str)
def test_many_splits_and_few_agree(shape: Shape, config: Config) -> None:
    p = make(shape, backend=BACKEND)
    with recording() as launches:
        run(p, config=config)
    assert parts(launches) >= 6 if config.least_rows == 16 else parts(launches) <= 2
    check(partial(attend_decode, config=config), p)


@pytest.mark.parametrize("shape", [SPLIT[4], replace(SPLIT[4], attention_sinks=True, n_queries=3)], ids=named)
def test_one_split_is_one_launch(shape: Shape) -> None:
    p = make(shape, backend=BACKEND)
    for tail_rows, n_launches in ((1000, 1), (16, 2)):
        config = Config(tail_rows=tail_rows)
        with recording() as launches:
            run(p, config=config)
        assert len(launches) == n_launches
        check(partial(attend_decode, config=config), p)


@pytest.mark.parametrize(
    "config", [Config(16, 1), Config(64, 2, 2), Config(128, 4, 4), Config(32, tail_tile=64)], ids=str
)
def test_any_configuration_is_right(config: Config) -> None:
    for shape in (FEW[0], replace(SPLIT[1], n_queries=8), ONE[20]):
        check(partial(attend_decode, config=config), make(shape, backend=BACKEND))


def test_configurations() -> None:
    p = make(FEW[0], backend=BACKEND)
    x = operands(p.store, p.queries, scale=p.scale)
    found = list(configurations(x))
    assert found[0] == configuration(x) and len(found) == len(set(found)) > 8


def test_splits_fill_the_processors() -> None:
    def splits(n_batch: int, body_rows: int, config: Config = Config(), n_blocks: int = 1) -> tuple[int, int]:  # noqa: B008
        x = SimpleNamespace(
            n_batch=n_batch, n_kv_heads=8, body_rows=body_rows, tail_rows=96, constants={"BODY": body_rows > 0}
        )
        return attend.splits(x, n_blocks, config, 132)  # type: ignore[arg-type]

    for n_batch in (1, 2, 8, 16):
        body, tail = splits(n_batch, 131072)
        assert 0.85 * 132 * 8 <= (body + tail) * n_batch * 8 <= 132 * 8
    assert splits(1, 131072, n_blocks=4)[0] <= 131 // 4
    assert splits(1, 1024) == (8, 2) and splits(1, 100) == (1, 2)
    assert splits(1024, 4096)[0] == 1 and splits(1, 0)[0] == 0


# What a model hands over


@pytest.mark.parametrize("layout", ["heads last", "cut", "odd"])
def test_queries_as_a_model_hands_them(layout: str) -> None:
    p = make(replace(FEW[0], n_queries=3), backend=BACKEND)
    want, low = oracle(p), plain(p)
    b, hq, n, d = p.queries.shape
    if layout == "heads last":
        queries = p.queries.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "cut":
        queries = torch.cat([p.queries, p.queries], dim=3)[..., :d]
    else:
        queries = torch.cat([p.queries, p.queries[..., :3]], dim=3)[..., :d]
    assert queries.stride() != p.queries.stride()
    out = attend_decode(p.store, queries, **p.arguments())
    assert_close(to_numpy(out), want, low, dtype="float16")
    assert out.shape == (b, hq, n, d) and out.transpose(1, 2).is_contiguous()


def test_a_mask_that_is_a_view() -> None:
    """Cut out of something larger, and one row for all."""
    p = make(replace(FEW[2], n_queries=4, mask="bool BHL"), backend=BACKEND)
    assert p.mask is not None
    wide = torch.cat([p.mask, ~p.mask], dim=3)[..., : p.mask.shape[3]]
    for mask in (wide, p.mask[:, :, 1:2].expand(-1, -1, 4, -1), p.mask[:1, :1, :1]):
        p = make(replace(FEW[2], n_queries=4), backend=BACKEND)
        p.mask = mask
        assert mask.numel() == 1 or not mask.is_contiguous() or mask.shape[0] == 1
        check(attend_decode, p)


def test_what_is_not_written_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of splits without rows, padded channels and padded query rows: memory that was not a number before."""
    fresh = torch.empty

    def spoiled(*size: Any, **how: Any) -> Any:
        x = fresh(*size, **how)
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", spoiled)
    for shape in (SPLIT[0], SPLIT[4], replace(FEW[3], n_batch=2, body=(31, 0), begin=(4, 0)), ONE[25]):
        check(attend_decode, make(shape, backend=BACKEND))


def test_queries_that_see_nothing_give_zeros() -> None:
    for tail_rows in (2, 64):
        p = make(Shape("exact", n_queries=6, body=0, tail=0), backend=BACKEND)
        p.store.begin[:] = 4
        out = to_numpy(check(partial(attend_decode, config=Config(tail_rows=tail_rows)), p))
        assert (out[:, :, :4] == 0).all() and (out[:, :, 4:] != 0).any()
    p = make(Shape(mask="bool L", n_queries=4), backend=BACKEND)
    assert p.mask is not None
    p.mask[:, :, 2] = False
    assert (to_numpy(check(attend_decode, p))[:, :, 2] == 0).all()


def test_a_large_sink_or_logit_neither_overflows_nor_vanishes() -> None:
    p = make(Shape(attention_sinks=True, n_queries=2), backend=BACKEND)
    p.sinks = BACKEND.from_numpy(np.array([200.0, -200.0, 0.0, 90.0], np.float32))
    check(attend_decode, p)
    for scale in (40.0, -0.5):
        p = make(Shape(n_queries=2), backend=BACKEND)
        p.scale = scale
        check(attend_decode, p)


@pytest.mark.parametrize("stage", ["int4", "turboquant(bits=4)"])
def test_queries_beyond_the_range_of_halves(stage: str) -> None:
    """bfloat16 reaches to 3e38, and products with the body are of halves; each row in a size of its own."""
    for sizes, scale in (([1e30, 1e-30, 1.0, 3e5], 1e-6), ([1e-30, 3e-30, 1e-32, 1e-36], 1e29)):
        p = make(Shape(stage, "bfloat16", n_queries=2, body=70), backend=BACKEND)
        p.queries = p.queries * BACKEND.from_numpy(np.array(sizes, np.float32)).bfloat16()[None, :, None, None]
        p.scale = scale
        check(attend_decode, p)


@pytest.mark.parametrize("stage", ["int8", "turboquant(bits=4)", "exact"])
def test_many_small_weights_are_not_lost(stage: str) -> None:
    """One row takes nearly everything; hundreds of others, 2^-25 each, make the output: less than a half can hold."""
    body = 0 if stage == "exact" else 64
    shape = Shape(stage, "float16", 16, n_kv_heads=1, group=1, n_queries=1, body=body, tail=200)
    p = make(shape, backend=BACKEND)
    store = p.store
    p.queries[:], store.keys[:], store.values[:, :, 0] = 1.0, 0.0, 0.0
    store.keys[:, :, 0] = 25 * np.log(2) / 16
    for name, plane in store.planes.items():
        if name.startswith("keys."):
            plane.zero_()
    p.scale = 1.0
    check(attend_decode, p)


@pytest.mark.parametrize("stage", ["int2", "turboquant(bits=2)"])
@pytest.mark.parametrize("grows", [True, False])
def test_values_of_very_different_sizes(stage: str, grows: bool) -> None:
    """Rows from 1e-4 to 1e4 in one split, those that weigh most the smallest: weights times scales stay halves."""
    shape = Shape(stage, "float16", 64, n_kv_heads=1, n_queries=1, body=192, tail=3)
    p = make(shape, backend=BACKEND)
    sizes = np.geomspace(1e-4, 1e4, 192)[:: 1 if grows else -1]
    size = BACKEND.from_numpy(np.ascontiguousarray(sizes, np.float32))[:, None]
    for name in ("scales", "zeros"):
        plane = p.store.planes.get(f"values.{name}")
        if plane is not None:
            plane[:192] = (plane[:192].float() * size).clamp(-60000, 60000).half()
    for mask in (None, BACKEND.from_numpy(-10 * np.log10(sizes).astype(np.float32))):
        if mask is not None:
            # In logits: what is 1e8 times larger has 1e-35 of the weight.
            rest = torch.full((p.store.end - 2,), -99.0, device=mask.device)
            p.mask = torch.cat([rest[:2], mask, rest])[None, None, None]
        check(partial(attend_decode, config=Config(programs=0)), p)


def test_rows_that_no_token_sees_are_not_read() -> None:
    """Those that a sliding window has left: not a number there reaches nothing."""
    shape = Shape("int8", "float16", n_kv_heads=1, group=1, n_queries=4, body=512, tail=2, sinks=2, window=100)
    p = make(shape, backend=BACKEND)
    clean = run(p)
    for plane in ("keys.scales", "values.zeros"):
        p.store.planes[plane][:384] = NAN
    assert_same(to_numpy(run(p)), to_numpy(clean))
    p.store.planes["values.zeros"][416:448] = NAN
    assert run(p).isnan().all()


# What a step costs the host


class Reads(TorchDispatchMode):
    """Refuses what makes the host wait, and counts what is sent to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "equal", "nonzero", "is_pinned")), name
        if "_to_copy" in name or "copy_" in name:
            raise AssertionError(f"{name} in a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [FEW[0], FEW[16], SPLIT[0], SPLIT[4]], ids=named)
def test_a_step_neither_waits_nor_sends(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    p = make(shape, backend=BACKEND)
    b, h, d, dv = p.store.shape
    rows = [BACKEND.from_numpy(np.zeros((b, h, 1, k), np.float32)).to(p.queries.dtype) for k in (d, dv)]
    queries = p.queries[:, :, :1].contiguous()

    def step() -> None:
        p.store.append(rows[0], rows[1])
        attend_decode(p.store, queries, scale=p.scale, sinks=p.sinks)

    p.store._reserve(4)
    with recording():
        step()
        sent = []
        monkeypatch.setattr(launch, "upload", lambda *x: sent.append(x))
        # Appending copies rows into the tail: the cache's business.
        p.store.append(rows[0], rows[1])
        with Reads():
            attend_decode(p.store, queries, scale=p.scale, sinks=p.sinks)
    assert not sent
    monkeypatch.undo()
    if CUDA:
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_history_is_data() -> None:
    """No length is compiled in: neither as a constant nor by what Triton specializes."""
    launches: list[list[Launch]] = []
    for body, tail, n_batch, n in ((64, 5, 1, 1), (640, 78, 2, 1), (4097, 15, 3, 1)):
        p = make(Shape("int4", "float16", n_kv_heads=1, n_queries=n, body=64, tail=tail, n_batch=n_batch), 0, BACKEND)
        span = -(-body // SPAN_STEP) * SPAN_STEP
        p.store.planes = {k: x[:1].repeat(n_batch * span, 1) for k, x in p.store.planes.items()}
        p.store._set_layout(np.full(n_batch, body), np.full(n_batch, span))
        with recording() as made:
            run(p)
        launches.append(made)
    for kernel in zip(*launches, strict=True):
        for field in ("name", "constants", "signature", "num_warps", "num_stages"):
            assert len({str(getattr(x, field)) for x in kernel}) == 1


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not keep what a kernel must not be specialized for")
def test_no_integer_is_specialized() -> None:
    for kernel in (attend.attend_decode_kernel, attend.attend_merge_kernel):
        integers = {*NUMBERS, "n_body", "n_tail", "n_heads", "out_batch", "out_head", "out_token"}
        kept = {p.name for p in kernel.params if p.do_not_specialize}
        assert kept == integers & {p.name for p in kernel.params}


# Captured launches


def test_a_captured_launch_is_replayed_over_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the arguments of one launch, other numbers on the device, rows appended in place: the right answer."""
    shape = Shape("int4", "float16", n_batch=2, n_queries=1, body=(64, 128, 0, 32), tail=7, attention_sinks=True)
    p = make(shape, backend=BACKEND)
    store = p.store
    store._reserve(24)
    room = int(store.span.sum())
    numbers = torch.zeros(HEADER + 3 * store.length.size, dtype=torch.int32, device=p.queries.device)
    captured: list[tuple[Any, ...]] = []
    called = launch.TritonKernel.__call__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        captured.append((self, arguments, options))
        called(self, *arguments, **options)

    def update() -> None:
        numbers.copy_(torch.from_numpy(numbers_of(store)))

    with monkeypatch.context() as patch:
        patch.setattr(launch.TritonKernel, "__call__", noted)
        update()
        out = run(p, numbers=numbers)
    assert_close(to_numpy(out), oracle(p), plain(p), dtype="float16")
    rng = np.random.default_rng(0)
    for n, lengths in ((1, (64, 128, 0, 32)), (9, (64, 100, 0, 1)), (3, (1, 65, 0, 32))):
        rows = [BACKEND.from_numpy(rng.standard_normal((2, 2, n, 64)).astype(np.float32)).half() for _ in range(2)]
        store.append(rows[0], rows[1])
        store.length = np.array(lengths, np.int64).reshape(2, 2)
        assert int(store.span.sum()) == room and store.keys.data_ptr() == captured[0][1][1]["tail_keys"].data_ptr()
        update()
        for kernel, arguments, options in captured:
            called(kernel, *arguments, **options)
        assert_close(to_numpy(out), oracle(p), plain(p), dtype="float16")


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
def test_in_a_cuda_graph() -> None:
    p = make(Shape("int4", "float16", 128, n_kv_heads=8, group=4, n_queries=1, body=700, tail=20), backend=BACKEND)
    store = p.store
    store._reserve(8)
    numbers = torch.from_numpy(numbers_of(store)).cuda()
    run(p, numbers=numbers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(p, numbers=numbers)
    for length in (700, 333):
        store.length = np.full_like(store.length, length)
        store.end -= 1
        numbers.copy_(torch.from_numpy(numbers_of(store)))
        graph.replay()
        assert_close(to_numpy(out), oracle(p), plain(p), dtype="float16")


def test_numbers_are_those_of_the_store() -> None:
    for shape in (FEW[7], FEW[14], SPLIT[0]):
        p = make(shape, backend=BACKEND)
        want, low = oracle(p), plain(p)
        poison(p.store)
        out = run(p, numbers=torch.from_numpy(numbers_of(p.store)).to(p.queries.device))
        assert_close(to_numpy(out), want, low, dtype=shape.dtype)
