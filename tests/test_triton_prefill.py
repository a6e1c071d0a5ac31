"""The Triton kernel for attention of a chunk, interpreted where there is no CUDA device, over stores of every format.

NVIDIA gets PTX where others get plain operations; without a device a few lines here execute that PTX, so that what will
run on a GPU is compared with the oracle too.
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
from kvmlx.backends.formats import AFFINE, CODEBOOK, Format  # noqa: E402
from kvmlx.backends.torch.ops import on  # noqa: E402
from kvmlx.backends.torch.triton import prefill, tiles  # noqa: E402
from kvmlx.backends.torch.triton.launch import A100, H100, MI300X, Launch, recording  # noqa: E402
from kvmlx.backends.torch.triton.operands import NUMBERS, numbers_of, operands  # noqa: E402
from kvmlx.backends.torch.triton.prefill import Config, attend_prefill, configuration, configurations  # noqa: E402
from kvmlx.checks import Case  # noqa: E402
from kvmlx.store import LayerStore  # noqa: E402
from kvmlx.tolerance import assert_close, assert_same  # noqa: E402
from tests.stores import PLACES, SHAPES, Problem, Shape, check, make, oracle, plain, shapes, to_numpy, vector_problem  # noqa: E402
from tests.test_vectors import over  # noqa: E402

CUDA = torch.cuda.is_available()
BACKEND = on("cuda" if CUDA else "cpu")
INTERPRETED = not isinstance(prefill.attend_prefill_kernel, triton.JITFunction)
PTX_BITS = layout.CODE_BITS

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


# PTX without a device

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def execute(text: str, given: list[np.ndarray], n_outputs: int) -> list[np.ndarray]:
    """Run straight-line PTX: ``$0 ..`` are n_outputs results, then what is given; uint32 or uint64 arrays."""
    r: dict[str, np.ndarray] = {f"${n_outputs + i}": x for i, x in enumerate(given)}

    def value(x: str) -> np.ndarray:
        return r[x] if x in r else np.asarray(int(x, 0), np.uint32)

    def halves(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(x, shape)).astype(np.uint32)[..., None].view(np.float16)

    shape = np.broadcast_shapes(*(x.shape for x in given))
    for statement in filter(None, (s.strip() for s in text.strip("{} \n").split(";"))):
        op, _, rest = statement.partition(" ")
        if op == ".reg":
            continue
        if op == "mov.b64":
            low, high, of = re.findall(r"[$\w]+", rest)
            r[low], r[high] = (value(of) & 0xFFFFFFFF).astype(np.uint32), (value(of) >> np.uint64(32)).astype(np.uint32)
            continue
        to, *names = (x.strip() for x in rest.split(","))
        x = [value(name) for name in names]
        if op == "prmt.b32":
            eight = [(half >> np.uint32(8 * i)) & np.uint32(255) for half in x[:2] for i in range(4)]
            y = np.zeros(shape, np.uint32)
            for i in range(4):
                nibble = np.broadcast_to((x[2] >> np.uint32(4 * i)) & np.uint32(15), shape)
                byte = np.choose(nibble & 7, [np.broadcast_to(b, shape) for b in eight])
                byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
                y = y | (byte.astype(np.uint32) << np.uint32(8 * i))
        elif op == "lop3.b32":
            table, y = int(names[3], 0), np.uint32(0)
            for i in range(8):
                a, b, c = (x[k] if i >> 2 - k & 1 else ~x[k] for k in range(3))
                y = y | (a & b & c if table >> i & 1 else np.uint32(0))
        elif op in ("add.rn.f16x2", "mul.rn.f16x2", "fma.rn.f16x2"):
            a, b, *c = (halves(v).astype(np.float64) for v in x)
            exact = a + b if op.startswith("add") else a * b + (c[0] if c else 0.0)
            y = exact.astype(np.float16).view(np.uint32)[..., 0]
        else:
            y = {
                "mov.b32": lambda a: a,
                "not.b32": lambda a: ~a,
                "and.b32": lambda a, b: a & b,
                "or.b32": lambda a, b: a | b,
                "xor.b32": lambda a, b: a ^ b,
                "sub.u32": lambda a, b: a - b,
                "mul.lo.u32": lambda a, b: a * b,
                "shl.b32": lambda a, b: a << b,
                "shr.u32": lambda a, b: a >> b,
            }[op](*x)
        r[to] = np.asarray(y, np.uint32)
    return [np.broadcast_to(r[f"${i}"], shape) for i in range(n_outputs)]


@contextmanager
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let interpreted kernels take the PTX that they have for NVIDIA, and execute it. Yields what was executed."""
    from triton.runtime import interpreter

    ran: list[str] = []

    def run(self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> Any:
        ran.append(text)
        words = []
        for v in values:
            x = np.ascontiguousarray(v.data)
            words.append(x.view(_UNSIGNED[min(8, x.itemsize * pack)]))
        out = execute(text, words, len(types))
        made = []
        for y, kind in zip(out, types, strict=True):
            dtype = interpreter._get_np_dtype(kind.scalar)
            made.append(interpreter.TensorHandle(np.ascontiguousarray(y).view(dtype), kind.scalar))
        return SimpleNamespace(get_result=made.__getitem__)

    def chosen(kind: Any, bits: Any, dtype: Any) -> str:
        return tiles.ptx_of("cuda", *(getattr(x, "value", x) for x in (kind, bits, dtype)))

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_ptx", chosen)
        patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", run)
        yield ran


def codes_of(bits: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return rows of 8 codes, every pair of values beside each other somewhere, and their planes as registers."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (4096, 8), np.uint8)
    codes[:256] = (np.arange(256)[:, None] + np.arange(8)) % 2**bits
    registers = []
    for plane, width in zip(layout.pack(np, codes, bits), layout.plane_bits(bits), strict=True):
        padded = np.zeros((len(codes), 8 if width == 8 else 4), np.uint8)
        padded[:, :width] = plane
        registers.append(padded.view(np.uint64 if width == 8 else np.uint32)[:, 0])
    return codes, registers


def pairs(out: list[np.ndarray]) -> np.ndarray:
    return np.stack(out, axis=-1).view(np.float16)


@pytest.mark.parametrize("bits", PTX_BITS)
def test_ptx_unpacks_every_code(bits: int) -> None:
    codes, registers = codes_of(bits)
    assert_same(pairs(execute(tiles.codes_ptx(bits), registers, 4)), codes.astype(np.float16))


@pytest.mark.parametrize("bits", tiles.LOOKED_UP)
def test_ptx_looks_up_every_level(bits: int) -> None:
    codes, registers = codes_of(bits)
    table = tiles.table_of(Format(CODEBOOK, bits, 0, True, {}, 0.0), 128)
    assert table is not None
    numbers = [np.full(len(codes), n, np.uint64) for n in table.view(np.uint64)[: 2 if bits < 5 else 4]]
    out = pairs(execute(tiles.levels_ptx(bits), registers + numbers, 4))
    assert_same(out, layout.code_book(bits, 128).astype(np.float16)[codes])


def test_ptx_is_accepted(tmp_path: Path) -> None:
    """By NVIDIA's assembler, which comes with Triton."""
    texts = [tiles.codes_ptx(b) for b in PTX_BITS] + [tiles.levels_ptx(b) for b in tiles.LOOKED_UP]
    lines = [".version 7.0", ".target sm_80", ".address_size 64", ".visible .entry all() {"]
    lines += [".reg .b32 o<4>, i<2>;", ".reg .b64 wide<6>;"]
    for text in texts:
        wide = {int(n) for n in re.findall(r"mov\.b64 \{\w+, \w+\}, \$(\d+)", text)}
        name = {f"${n}": f"o{n}" if n < 4 else f"wide{n - 4}" if n in wide else f"i{n - 4}" for n in range(10)}
        lines.append(re.sub(r"\$\d+", lambda m, name=name: name[m.group()], text))
    source = tmp_path / "all.ptx"
    source.write_text("\n".join([*lines, "ret;", "}"]))
    done = subprocess.run(
        [knobs.nvidia.ptxas.path, "-arch=sm_80", str(source), "-o", str(tmp_path / "all.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout


# Every format

# Those of SHAPES, and every format, head dim and 16-bit dtype with the tiles of a chunk.
MORE = [
    Shape(stage, dtype, dim, n_kv_heads=1, group=group, n_queries=n, body=body, tail=tail)
    for stage, dtype, dim, group, n, body, tail in [
        ("int2", "float16", 128, 4, 33, 129, 9),
        ("int2", "bfloat16", 64, 8, 17, 64, 1),
        ("int3", "bfloat16", 256, 1, 12, 65, 65),
        ("int3", "float16", 128, 7, 19, 95, 33),
        ("int4", "bfloat16", 128, 8, 33, 257, 64),
        ("int4(group_size=8)", "float16", 64, 2, 70, 40, 5),
        ("int4(group_size=128)", "bfloat16", 128, 3, 50, 40, 5),
        ("int5", "float16", 192, 1, 9, 31, 7),
        ("int5", "bfloat16", 80, 4, 32, 64, 8),
        ("int6", "float16", 64, 5, 30, 97, 2),
        ("int8", "float16", 128, 4, 40, 61, 6),
        ("int8(rotate=hadamard)", "bfloat16", 24, 2, 40, 62, 5),
        ("int4(rotate=hadamard)", "bfloat16", 96, 2, 64, 66, 4),
        ("int2(rotate=hadamard)", "float16", 192, 4, 16, 33, 4),
        ("kivi(bits=2)", "bfloat16", 128, 8, 16, 96, 1),
        ("kivi(k=4, v=2, group_size=8)", "float16", 256, 4, 10, 24, 6),
        ("kivi(k=3, group_size=128) | int(v=3)", "float16", 192, 1, 40, 256, 6),
        ("kivi(bits=8, group_size=16)", "bfloat16", 80, 3, 20, 48, 6),
        ("turboquant(k=5, v=4, center=64)", "float16", 128, 4, 33, 192, 40),
        ("turboquant(bits=4, center=64)", "bfloat16", 64, 8, 20, 128, 33),
        ("turboquant(k=3, v=2, center=64)", "float16", 80, 1, 130, 64, 32),
        ("turboquant(bits=2, center=64)", "bfloat16", 256, 2, 20, 64, 31),
        ("turboquant(bits=1, center=256)", "float16", 96, 2, 30, 256, 30),
        ("turboquant(bits=6)", "bfloat16", 16, 8, 20, 45, 29),
        ("turboquant(bits=5)", "bfloat16", 8, 8, 20, 45, 29),
        ("exact", "float16", 192, 8, 20, 35, 2),
    ]
]


def named(shape: Shape) -> str:
    return shape.name


def unsplit(store: LayerStore, queries: Any, **given: Any) -> Any:
    """Attend as where the query rows fill the device; the default of these small shapes is to merge splits."""
    x = operands(store, queries, scale=1.0)
    return attend_prefill(store, queries, **given, config=replace(configuration(x), programs=0))


def run(p: Problem, **more: Any) -> Any:
    return attend_prefill(p.store, p.queries, **p.arguments(), **more)


@pytest.mark.parametrize("shape", [*SHAPES, *MORE], ids=named)
def test_prefill(shape: Shape) -> None:
    check(unsplit, make(shape, backend=BACKEND))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs what is compiled for it: test_prefill")
@pytest.mark.parametrize(
    "shape", [s for s in [*SHAPES, *MORE] if s.stage != "exact" and s.body and s.dtype != "float32"], ids=named
)
def test_prefill_with_what_nvidia_gets(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> None:
    with executed(monkeypatch) as ran:
        check(attend_prefill, make(shape, backend=BACKEND))
    by_ptx = shape.stage not in ("turboquant(bits=1, center=256)", "turboquant(bits=6)")
    assert bool(ran) == by_ptx


def test_what_is_compiled_for_nvidia_and_for_others() -> None:
    half, single = triton.language.float16, triton.language.float32
    assert tiles.ptx_of("cuda", AFFINE, 4, half) == tiles.codes_ptx(4)
    assert tiles.ptx_of("cuda", CODEBOOK, 4, half) == tiles.levels_ptx(4)
    others = [("cuda", CODEBOOK, 6, half), ("cuda", AFFINE, 4, single), ("hip", AFFINE, 4, half), ("", AFFINE, 4, half)]
    assert [tiles.ptx_of(*x) for x in others] == [""] * 4


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), seed=st.integers(0, 99), split=st.booleans())
def test_any_lengths(shape: Shape, seed: int, split: bool) -> None:
    p = make(shape, seed, backend=BACKEND)
    config = Config(64, 64, 4, 1, 32, 1, least_tiles=1 if split else 64)
    check(partial(attend_prefill, config=config), p)


@pytest.mark.parametrize(("place", "absent"), PLACES)
@over("attention")
def test_vectors(case: Case, place: str, absent: str) -> None:
    p = vector_problem(case, BACKEND, place, absent)
    kernel = attend_prefill if place == "both" else unsplit
    assert_close(to_numpy(kernel(p.store, p.queries, **p.arguments())), case[1]["out"], plain(p))


# What splits, strides, sinks and windows must not change

SPLIT = [
    Shape("int4", "float16", n_batch=2, n_queries=12, body=(200, 1, 0, 65), tail=90, attention_sinks=True),
    Shape("turboquant(bits=4, center=16)", "bfloat16", 64, n_queries=20, body=(48, 160), tail=4),
    Shape("int8", "float32", 32, n_queries=9, body=100, tail=20, window=60, begin=(3,)),
    Shape("kivi(bits=2)", "float16", 32, n_queries=33, body=128, mask="bool BHL"),
    Shape("exact", "bfloat16", 32, n_batch=2, n_queries=10, body=0, tail=100, begin=(0, 60), biased=True),
]


@pytest.mark.parametrize("shape", SPLIT, ids=named)
def test_splits_agree(shape: Shape) -> None:
    p = make(shape, backend=BACKEND)
    for least_tiles in (1, 2):
        config = Config(64, 32, 4, 1, 32, 1, least_tiles=least_tiles)
        x = operands(p.store, p.queries, scale=p.scale)
        n_splits = prefill.splits(x, -(-shape.group * shape.n_queries // 64), config, 132)
        assert n_splits >= (3 if least_tiles == 1 else 1)
        check(partial(attend_prefill, config=config), p)


def test_few_query_rows_are_split_and_many_are_not() -> None:
    def n_splits(body_rows: int, n_blocks: int, n_batch: int = 1, programs: int = 1) -> int:
        x: Any = SimpleNamespace(n_kv_heads=8, n_batch=n_batch, body_rows=body_rows, tail_rows=80)
        return prefill.splits(x, n_blocks, Config(128, 64, 8, least_tiles=4, programs=programs), 132)

    assert [n_splits(8192, n) for n in (1, 2, 8, 9, 17, 100)] == [16, 8, 2, 0, 0, 0]
    assert [n_splits(rows, 1) for rows in (100, 500, 1000)] == [1, 2, 4]
    assert n_splits(8192, 1, n_batch=4) == 4
    assert n_splits(8192, 1, programs=0) == 0


@pytest.mark.parametrize("layout", ["heads last", "cut", "odd"])
def test_queries_as_a_model_hands_them(layout: str) -> None:
    p = make(SHAPES[0], backend=BACKEND)
    want, low = oracle(p), plain(p)
    b, hq, n, d = p.queries.shape
    if layout == "heads last":
        queries = p.queries.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "cut":
        queries = torch.cat([p.queries, p.queries], dim=3)[..., :d]
    else:
        queries = torch.cat([p.queries, p.queries[..., :3]], dim=3)[..., :d]
    assert queries.stride() != p.queries.stride()
    out = attend_prefill(p.store, queries, **p.arguments())
    assert_close(to_numpy(out), want, low, dtype="float16")
    assert out.shape == (b, hq, n, d) and out.transpose(1, 2).is_contiguous()


def test_a_mask_of_one_row_for_all() -> None:
    p = make(replace(SHAPES[2], n_queries=20, mask="bool L"), backend=BACKEND)
    assert p.mask is not None
    p.mask = p.mask[:, :, :1].expand(2, 4, 20, -1)
    check(attend_prefill, p)


def test_queries_that_see_nothing_give_zeros() -> None:
    p = make(Shape("exact", n_queries=12, body=0, tail=0), backend=BACKEND)
    p.store.begin[:] = 4
    out = to_numpy(check(attend_prefill, p))
    assert (out[:, :, :4] == 0).all() and (out[:, :, 4:] != 0).any()
    p = make(Shape(mask="bool L", n_queries=12), backend=BACKEND)
    assert p.mask is not None
    p.mask[:, :, 2] = False
    for kernel in (attend_prefill, unsplit):
        assert (to_numpy(check(kernel, p))[:, :, 2] == 0).all()


def test_a_large_sink_or_logit_neither_overflows_nor_vanishes() -> None:
    p = make(Shape(attention_sinks=True, n_queries=9), backend=BACKEND)
    p.sinks = BACKEND.from_numpy(np.array([200.0, -200.0, 0.0, 90.0], np.float32))
    check(attend_prefill, p)
    check(unsplit, p)
    for scale in (40.0, -0.5):
        p = make(Shape(n_queries=9), backend=BACKEND)
        p.scale = scale
        check(attend_prefill, p)


@pytest.mark.parametrize("stage", ["int4", "turboquant(bits=4)"])
def test_queries_beyond_the_range_of_halves(stage: str) -> None:
    """bfloat16 reaches to 3e38, and products with the body are of halves."""
    p = make(Shape(stage, "bfloat16", n_queries=12, body=70), backend=BACKEND)
    size = BACKEND.from_numpy(np.array([1e30, 1e-30, 1.0, 3e5], np.float32)).bfloat16()
    p.queries = p.queries * size[None, :, None, None]
    p.scale = 1e-6
    check(attend_prefill, p)


@pytest.mark.parametrize("stage", ["int8", "exact"])
def test_many_small_weights_are_not_lost(stage: str) -> None:
    """One row takes nearly everything, and others, with 2^-25 each, make the output: less than a half can hold."""
    shape = Shape(stage, "float16", 16, n_kv_heads=1, group=1, n_queries=9, body=64 if stage == "int8" else 0, tail=200)
    p = make(shape, backend=BACKEND)
    store = p.store
    p.queries[:], store.keys[:], store.values[:, :, 0] = 1.0, 0.0, 0.0
    store.keys[:, :, 0] = 25 * np.log(2) / 16
    for name, plane in store.planes.items():
        if name.startswith("keys."):
            plane.zero_()
    p.scale = 1.0
    check(attend_prefill, p)


def test_rows_that_no_query_of_a_block_sees_are_not_read() -> None:
    """Later tokens' rows, and those that a sliding window has left: not a number there reaches nothing."""
    nan = float("nan")
    shape = Shape("exact", "float16", n_kv_heads=1, group=1, n_queries=256, body=0, tail=0, biased=True)
    p = make(shape, backend=BACKEND)
    clean = run(p)
    p.store.values[:, :, 192:256] = nan
    out = run(p)
    assert_same(to_numpy(out[:, :, :128]), to_numpy(clean[:, :, :128]))
    assert out[:, :, 192:].isnan().all()
    shape = Shape("int8", "float16", n_kv_heads=1, group=1, n_queries=40, body=512, tail=2, sinks=2, window=100)
    p = make(shape, backend=BACKEND)
    clean = run(p)
    # The first token sees its own row and 99 of the body; whole tiles of 64 are read.
    for plane in ("keys.scales", "values.zeros"):
        p.store.planes[plane][:384] = nan
    assert_same(to_numpy(run(p)), to_numpy(clean))
    p.store.planes["values.zeros"][384:448] = nan
    assert run(p).isnan().all(dim=-1)[:, :, :20].all()


def test_lengths_may_come_from_the_device() -> None:
    """As a captured launch reads them: its host numbers are those of another store."""
    for shape in (SHAPES[14], replace(SPLIT[0], attention_sinks=False)):
        p = make(shape, backend=BACKEND)
        numbers = torch.from_numpy(numbers_of(p.store)).to(p.queries.device)
        check(partial(attend_prefill, numbers=numbers, config=Config(64, 32, 4, 1, 32, 1, least_tiles=1)), p)


# One call or several


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[16], SHAPES[28], replace(SHAPES[30], tail=9)], ids=named)
def test_a_chunk_is_its_parts(shape: Shape) -> None:
    """One call of 40 tokens, and five of 8 whose keys are appended between, agree with the same oracle."""
    p = make(replace(shape, n_queries=40, mask="", attention_sinks=False), backend=BACKEND)
    want, low = oracle(p), plain(p)
    store, end = p.store.copy(), p.store.end
    keys, values = (x[:, :, end - 40 : end].clone() for x in (p.store.keys, p.store.values))
    bias = {name: c[:, :, end - 40 : end].clone() for name, c in p.store.columns.items()}
    store.end -= 40
    store.keys, store.values = store.keys.clone(), store.values.clone()
    store.keys[:, :, store.end :], store.values[:, :, store.end :] = float("nan"), float("nan")
    parts = []
    for first in range(0, 40, 8):
        part = slice(first, first + 8)
        store.append(keys[:, :, part], values[:, :, part])
        for name, column in bias.items():
            store.columns[name][:, :, store.end - 8 : store.end] = column[:, :, part]
        parts.append(attend_prefill(store, p.queries[:, :, part], scale=p.scale, window=p.window))
    for out in (run(p), torch.cat(parts, dim=2)):
        assert_close(to_numpy(out), want, low, dtype=shape.dtype)


# What it costs


class Allocated(TorchDispatchMode):
    """Notes the bytes of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "empty" in str(func):
            self.sizes.append(out.numel() * out.element_size())
        return out


def scratch(n_queries: int, body: int) -> list[int]:
    """Return the bytes of what a launch allocates besides its output; a store whose rows nobody reads."""
    p = blank(n_queries, body)
    with Allocated() as allocated, recording():
        run(p)
    out, *more = allocated.sizes
    assert out == p.queries.numel() * 2
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(p)
        # The allocator rounds up to 512 bytes; lengths and the like are sent once.
        assert torch.cuda.max_memory_allocated() - before <= sum(allocated.sizes) + 4096
    return more


def blank(n_queries: int, body: int) -> Problem:
    """Return a problem of Llama-3-8B's shape with ``body`` rows of zeros."""
    p = make(Shape("int4", "float16", 128, n_kv_heads=8, group=4, n_queries=n_queries, body=64), backend=BACKEND)
    store = p.store
    store.planes = {
        name: torch.zeros((8 * body, plane.shape[1]), dtype=plane.dtype, device=plane.device)
        for name, plane in store.planes.items()
    }
    store._set_layout(np.full(8, body), np.full(8, body))
    return p


def test_scratch_does_not_grow_with_the_history() -> None:
    assert scratch(1024, 4096) == scratch(1024, 65536) == []
    bound = prefill.processors(blank(16, 64).queries.device) * 128 * (128 + 1) * 4
    for n in (16, 100, 500):
        sizes = {body: scratch(n, body) for body in (16384, 65536, 131072)}
        assert sizes[16384] == sizes[65536] == sizes[131072]
        assert sum(sizes[65536]) <= bound


@pytest.mark.parametrize("n_kv_heads", [1, 128])
def test_the_history_is_data(n_kv_heads: int) -> None:
    """No length is compiled in, where rows are split (1 KV head) and where they are not."""
    launches: list[list[Launch]] = []
    for n, body, tail, n_batch in ((40, 64, 5, 1), (50, 2560, 77, 2), (17, 512, 9, 1)):
        shape = Shape("int4", "float16", 8, group=1, n_kv_heads=n_kv_heads, n_queries=n, body=64, n_batch=n_batch)
        p = make(replace(shape, tail=tail), backend=BACKEND)
        lanes = n_batch * n_kv_heads
        p.store.planes = {k: x[:1].repeat(lanes * body, 1) for k, x in p.store.planes.items()}
        p.store._set_layout(np.full(lanes, body), np.full(lanes, body))
        with recording() as made:
            run(p, config=Config(16, 64, 8))
        launches.append(made)
    assert [len(made) for made in launches] == [2 if n_kv_heads == 1 else 1] * 3
    for kernel in zip(*launches, strict=True):
        for field in ("constants", "signature", "num_warps", "num_stages"):
            assert len({str(getattr(launch, field)) for launch in kernel}) == 1


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not keep what a kernel must not be specialized for")
def test_no_integer_is_specialized() -> None:
    for kernel, own in (
        (prefill.attend_prefill_kernel, NUMBERS),
        (prefill.prefill_merge_kernel, ("n_rows", "n_heads")),
    ):
        kept = {p.name for p in kernel.params if p.do_not_specialize}
        assert kept >= {*own, "n_splits"} & {p.name for p in kernel.params}


def test_configurations() -> None:
    p = make(SHAPES[0], backend=BACKEND)
    x = operands(p.store, p.queries, scale=p.scale)
    chosen = []
    for chip in (H100, A100, MI300X):
        with recording(chip):
            chosen.append(configuration(x))
    assert CUDA or (len(set(chosen)) == 3 and chosen[0] == configuration(x))
    found = list(configurations(x))
    assert found[0] == configuration(x) and len(found) == len(set(found)) > 8
    for config in (Config(64, 32, 4), Config(256, 16, 8)):
        check(partial(attend_prefill, config=config), p)
