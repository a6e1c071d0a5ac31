"""The kernels of encode.metal, executed off-Mac: the same bytes as the plain operations'."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlx import layout
from kvmlx import reference as ref
from kvmlx.backends.formats import CODEBOOK, GROUPS, format_of
from kvmlx.backends.mlx.metal import loader
from kvmlx.backends.mlx.metal.encode import encode, supported, tile_of
from kvmlx.backends.numpy import BACKEND as NUMPY
from kvmlx.checks import Case, codec_of
from kvmlx.stages.encode.codecs import Affine, Channel, CodeBook, Exact
from kvmlx.strategy import Strategy
from kvmlx.tolerance import assert_same
from kvmlx.types import Codec
from tests.metal import device as harness
from tests.metal import toolchain
from tests.metal.device import Device, Launch
from tests.test_vectors import over

DIMS = (64, 80, 96, 128, 192, 256)
ODD_DIMS = (8, 16, 24, 120, 248, 272, 512)


@pytest.fixture(params=[0, 1, 2], ids=["ascending", "shuffled", "shuffled2"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Run kernels off-Mac, lanes in one order or another; return what each launch did."""
    return run_off_mac(monkeypatch, request.param)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The same in one order only, for what is about values."""
    return run_off_mac(monkeypatch, 1)


def run_off_mac(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Launch]:
    runs: list[Launch] = []

    def launch(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        names = {"input_names": kernel.inputs, "output_names": kernel.outputs}
        runs.append(Device(seed=seed).launch(kernel.function, **names, **arguments))
        return runs[-1].outputs

    monkeypatch.setattr(loader, "launch", launch)
    return runs


def label(value: object) -> str:
    if not isinstance(value, (Affine, Channel, CodeBook, Exact)):
        return str(value)
    fields = [str(v) for v in vars(value).values() if v not in ("none", None)]
    return "-".join([type(value).__name__.lower(), *fields])


def rows(dtype: str, *shape: int, seed: int = 0) -> mx.array:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3
    return mx.array(x).astype(getattr(mx, dtype))


def as_float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def check(codec: Codec, x: mx.array) -> dict[str, np.ndarray]:
    """Compare the planes with NumPy's, rotated ones too: its butterflies have the kernel's order."""
    want = codec.encode(NUMPY, as_float32(x))  # type: ignore[arg-type]
    got = encode(codec, x)
    assert list(got) == list(want)
    for name, plane in got.items():
        assert_same(np.array(plane), want[name], name=name)
    return {name: np.array(plane) for name, plane in got.items()}


def check_vector(case: Case) -> None:
    params, t = case
    codec = codec_of(params["stage"], params["side"])
    got = encode(codec, mx.array(t["x"]))
    assert set(got) == set(t) - {"x", "decoded"}
    for name, plane in got.items():
        assert_same(np.array(plane), t[name], name=name)


@over("affine")
def test_affine_vectors(one_device: list[Launch], case: Case) -> None:
    check_vector(case)


@over("kivi")
def test_kivi_vectors(one_device: list[Launch], case: Case) -> None:
    check_vector(case)


@over("codebook")
def test_codebook_vectors(one_device: list[Launch], case: Case) -> None:
    check_vector(case)


@over("packing")
def test_packing_vectors(one_device: list[Launch], case: Case) -> None:
    """Rows that are codes, 0 and the largest in each group, have scale 1 and zero 0, and themselves as codes."""
    bits, codes = case[0]["bits"], np.array(case[1]["codes"])
    codec = Affine(bits)
    group = codec.group(codes.shape[-1])
    codes[..., ::group], codes[..., 1::group] = 0, 2**bits - 1
    planes = encode(codec, mx.array(codes.astype(np.float16)))
    for i, want in enumerate(ref.pack(codes, bits)):
        assert_same(np.array(planes[f"codes{i}"]), want, name=f"codes{i}")


def formats() -> list[tuple[Codec, int, str, tuple[int, ...]]]:
    """Codec, head dim, dtype, leading shape: every bits and group and dim and dtype, in pairs rather than in full."""
    dtypes = ("float16", "bfloat16", "float32")
    lengths = ((1,), (63,), (64,), (65,), (2, 3))
    cases: list[tuple[Codec, int, str, tuple[int, ...]]] = []
    dims = [*DIMS, *ODD_DIMS]
    for i, dim in enumerate(dims):
        fits = [g for g in GROUPS if dim % g == 0]
        bits = [b for b in layout.CODE_BITS]
        codec = Affine(bits[i % 7], ("none", "hadamard")[i % 2], fits[-1 - i % len(fits)])
        cases.append((codec, dim, dtypes[i % 3], lengths[i % 5]))
        codec = CodeBook(1 + i % 6, ("hadamard", "none")[i // 6 % 2], ("unbiased", "norm")[i // 3 % 2])
        cases.append((codec, dim, dtypes[(i + 1) % 3], lengths[(i + 1) % 5]))
        block = GROUPS[i % 6]
        codec = Channel(bits[(i + 3) % 7], ("none", "none", "hadamard")[i % 3], block)
        cases.append((codec, dim, dtypes[(i + 2) % 3], (2, block)))
        block = GROUPS[1 + i % 5]
        codec = CodeBook(1 + (i + 2) % 6, scale=("norm", "unbiased")[i // 2 % 2], center=block)
        cases.append((codec, dim, dtypes[i // 2 % 3], (3, block)))
    cases += [(Affine(bits, group_size=32), 128, "bfloat16", (5,)) for bits in layout.CODE_BITS]
    cases += [(Channel(bits), 128, "bfloat16", (64,)) for bits in layout.CODE_BITS]
    cases += [(CodeBook(bits), 128, "bfloat16", (7,)) for bits in range(1, 7)]
    cases += [(CodeBook(3, center=center), 128, "float16", (center,)) for center in GROUPS[1:]]
    return cases


@pytest.mark.parametrize(("codec", "dim", "dtype", "lead"), formats(), ids=label)
def test_formats(device: list[Launch], codec: Codec, dim: int, dtype: str, lead: tuple[int, ...]) -> None:
    assert supported(codec, dim) is None
    check(codec, rows(dtype, *lead, dim, seed=dim))
    assert len(device) == 1


MEMORY = [
    (Affine(4), 128, "float16", (4, 64)),
    (Affine(6, "hadamard", 16), 80, "bfloat16", (3, 65)),
    (CodeBook(3), 128, "bfloat16", (4, 64)),
    (CodeBook(2), 96, "float32", (65,)),
    (Channel(2), 128, "float16", (2, 96)),
    (Channel(4, group_size=256), 80, "float32", (256,)),
    (CodeBook(4, center=64), 128, "float16", (2, 128)),
    (CodeBook(4, center=128), 128, "bfloat16", (256,)),
    (CodeBook(2, center=64), 256, "float16", (64,)),
]


@pytest.mark.parametrize(("codec", "dim", "dtype", "lead"), MEMORY, ids=label)
def test_each_byte_once(one_device: list[Launch], codec: Codec, dim: int, dtype: str, lead: tuple[int, ...]) -> None:
    x = rows(dtype, *lead, dim)
    planes = check(codec, x)
    (run,) = one_device
    assert run.read["x"] == x.nbytes
    assert sum(run.written.values()) == sum(run.unique_written.values()) == sum(p.nbytes for p in planes.values())
    assert not sum(run.read[name] for name in run.written if run.written[name])
    # At most a bit per number, a code book per threadgroup, a length per thread.
    assert run.read["signs"] <= x.size // 8
    assert run.read["book"] <= run.threads // 64 * 4 * 127
    assert run.read.get("shape", 0) <= 4 * run.threads


@pytest.mark.parametrize(
    ("codec", "dim", "dtype"),
    [
        (CodeBook(4, center=256), 256, "float16"),
        (CodeBook(4, center=256), 128, "bfloat16"),
        (CodeBook(2, center=128), 256, "float16"),
        (CodeBook(2, center=64), 256, "float32"),
    ],
    ids=label,
)
def test_blocks_beyond_the_registers_are_read_twice(
    one_device: list[Launch], codec: CodeBook, dim: int, dtype: str
) -> None:
    x = rows(dtype, codec.center, dim)
    check(codec, x)
    (run,) = one_device
    assert run.read["x"] == 2 * x.nbytes


@pytest.mark.parametrize("codec", [Affine(4, "hadamard"), Channel(4), CodeBook(4), CodeBook(4, center=32)], ids=label)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_give_the_planes_of_their_float32_values(one_device: list[Launch], codec: Codec, dtype: str) -> None:
    x = rows(dtype, 2, 64, 64)
    want = encode(codec, x.astype(mx.float32))
    for name, plane in encode(codec, x).items():
        assert_same(np.array(plane), np.array(want[name]), name=name)


# Values

VALUES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "normal": lambda rng, n, d: rng.standard_normal((n, d)),
    "outliers": lambda rng, n, d: rng.standard_normal((n, d)) * np.where(rng.random(d) < 0.1, 50, 1),
    "zero": lambda rng, n, d: np.zeros((n, d)),
    "negative zero": lambda rng, n, d: np.where(rng.random((n, d)) < 0.5, -0.0, 0.0),
    "constant": lambda rng, n, d: np.full((n, d), rng.choice([1.0, -3.5, 1000.3, 1e-9])),
    "constant rows": lambda rng, n, d: np.broadcast_to(rng.standard_normal((n, 1)), (n, d)),
    "constant channels": lambda rng, n, d: np.broadcast_to(rng.standard_normal(d), (n, d)),
    "some zero rows": lambda rng, n, d: rng.standard_normal((n, d)) * (rng.random((n, 1)) < 0.5),
    "beyond float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e6,
    "far beyond float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e15,
    "subnormal float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e-6,
    "below float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e-9,
    "halves": lambda rng, n, d: rng.integers(0, 31, (n, d)) / 2,
    "one number": lambda rng, n, d: np.eye(n, d) * 7,
}
CODECS: list[tuple[Codec, int]] = [
    (Affine(4), 64),
    (Affine(8, group_size=16), 80),
    (Affine(3, "hadamard"), 96),
    (Channel(2), 64),
    (Channel(4, group_size=8), 80),
    (CodeBook(4), 64),
    (CodeBook(3, scale="norm"), 80),
    (CodeBook(2, center=16), 96),
    (CodeBook(6, rotation="none"), 128),
]


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.sampled_from(CODECS),
    values=st.sampled_from(list(VALUES)),
    dtype=st.sampled_from(["float16", "float32"]),
    lead=st.tuples(st.integers(1, 2), st.integers(1, 70)),
    seed=st.integers(0, 999),
)
def test_any_rows(
    one_device: list[Launch], case: tuple[Codec, int], values: str, dtype: str, lead: tuple[int, int], seed: int
) -> None:
    codec, dim = case
    b, n = lead[0], -(-lead[1] // codec.block) * codec.block
    x = VALUES[values](np.random.default_rng(seed), b * n, dim).astype(np.float32)
    x = np.clip(x, -65504, 65504) if dtype == "float16" else x
    check(codec, mx.array(x.reshape(b, n, dim)).astype(getattr(mx, dtype)))


@pytest.mark.parametrize("codec", [CodeBook(3, center=32), CodeBook(2), Affine(4, "hadamard")], ids=label)
def test_multiply_adds_stay_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_device: list[Launch], codec: Codec
) -> None:
    """A compiler that may fuse them everywhere, as Metal's does, is told to leave these as they are."""
    made: list[str] = []
    to_ir = toolchain.to_ir

    def kept(*args: Any) -> str:
        made.append(to_ir(*args))
        return made[-1]

    flags = ["-ffp-contract=fast" if flag == "-ffp-contract=off" else flag for flag in toolchain.CODE]
    assert flags != toolchain.CODE
    monkeypatch.setenv("KVMLX_METAL_CACHE", str(tmp_path))
    monkeypatch.setattr(harness, "_COMPILED", {})
    monkeypatch.setattr(toolchain, "CODE", flags)
    monkeypatch.setattr(toolchain, "to_ir", kept)
    check(codec, rows("float32", 64, 96))
    assert re.search(r"\bf(add|sub|mul) float", made[0])
    assert not re.search(r"\bf(add|sub|mul) contract", made[0])


# Exact rows


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_exact_rows_of_the_same_dtype_are_no_launch(one_device: list[Launch], dtype: Any) -> None:
    x = rows(dtype, 2, 5, 100)
    check(Exact(dtype), x)
    assert not one_device


@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a, b in product(("float16", "bfloat16", "float32"), repeat=2) if a != b],
    ids=label,
)
def test_exact_rows_of_another_dtype(one_device: list[Launch], source: str, target: Any) -> None:
    x = mx.concatenate([rows(source, 2, 63, 7), mx.zeros((2, 1, 7), getattr(mx, source))], axis=1)
    check(Exact(target), x)
    (run,) = one_device
    assert run.read["x"] == x.nbytes


# Shapes


@pytest.mark.parametrize("codec", [Affine(3), Channel(4), CodeBook(4, center=64), Exact("float32")], ids=label)
@pytest.mark.parametrize("shape", [(2, 0, 64), (0, 64, 64)], ids=str)
def test_no_rows_are_no_launch(one_device: list[Launch], codec: Codec, shape: tuple[int, ...]) -> None:
    got = encode(codec, mx.zeros(shape, mx.float16))
    for spec in codec.planes(64):
        plane = np.array(got[spec.name])
        assert plane.shape == (shape[0], shape[1] // spec.rows, spec.width)
        assert plane.dtype == spec.dtype
    assert not one_device


def test_rows_cut_from_a_buffer(one_device: list[Launch]) -> None:
    """What MLX must make contiguous first, and what starts within an array."""
    buffer = rows("float16", 4, 96, 64)
    check(Affine(4), buffer[:, 3:68])
    check(Channel(4), buffer[1:3, 32:64])


def test_lengths_compile_nothing_anew(one_device: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    encode(CodeBook(2, center=16), rows("float16", 16, 16))
    encode(Affine(2), rows("float16", 1, 16))
    monkeypatch.setattr(harness, "_compile", fail_on_new(harness._compile))
    encode(CodeBook(2, center=16), rows("float16", 3, 64, 16))
    encode(Affine(2), rows("float16", 5, 130, 16))


def fail_on_new(compile_kernel: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(*args: Any) -> Any:
        known = len(harness._COMPILED)
        made = compile_kernel(*args)
        assert len(harness._COMPILED) == known
        return made

    return compiled


def test_every_stage_has_a_kernel() -> None:
    for stage, dim in product(("int", "kivi", "turboquant"), DIMS):
        for bits in (2, 3, 4, 5, 6):
            for codec in Strategy.parse(f"{stage}(bits={bits})").codecs():
                assert codec is not None
                if isinstance(codec, Affine) and dim % codec.group(dim):
                    continue  # kivi's 32 channels at 80: the codec refuses itself
                assert supported(codec, dim) is None


def test_tiles_fit_a_threadgroup() -> None:
    """Power-of-two simdgroups, whole blocks, at most 512 threads and 32 KB."""
    codecs = [
        *(Channel(4, rotation, block) for rotation in ("none", "hadamard") for block in GROUPS),
        *(CodeBook(6, center=block) for block in GROUPS),
    ]
    dims = [*range(8, 257, 8), *range(272, 513, 16)]
    for codec, dim in product(codecs, dims):
        assert supported(codec, dim) is None
        fmt = format_of(codec, dim)
        tile = tile_of(fmt, dim)
        assert tile.simdgroups in (1, 2, 4, 8, 16)
        assert codec.block % (tile.rows * tile.simdgroups) == 0
        width = 8 if tile.channels <= 256 else 16
        parts = tile.channels // width
        assert parts * tile.rows <= 32 and tile.channels % width == 0
        odd = parts // (parts & -parts)
        floats = 2 * tile.channels
        if fmt.kind == CODEBOOK:
            floats = tile.channels + (tile.rows * odd * width if odd > 1 else 0)
        assert 4 * (floats * tile.simdgroups + 128) <= 32768


REFUSED = [
    (Affine(4), 100, "head dim of 100; multiples of 8 up to 256"),
    (Affine(4), 264, "head dim of 264; multiples of 8 up to 256 and multiples of 16 up to 512"),
    (Affine(4), 520, "head dim of 520"),
    (CodeBook(4), 0, "head dim of 0"),
    (Affine(7), 64, "7 bits; 1, 2, 3, 4, 5, 6, 8 have one"),
    (CodeBook(8), 64, "8 bits; 1, 2, 3, 4, 5, 6 have one"),
    (Affine(4, group_size=64), 80, "group_size=64 at a head dim of 80; 8, 16 have one"),
    (Channel(4, group_size=48), 64, "group_size=48; 8, 16, 32, 64, 128, 256 have one"),
    (CodeBook(4, center=512), 64, "center=512; 8, 16"),
    (CodeBook(4, center=1), 64, "center=1; 8, 16"),
]


@pytest.mark.parametrize(("codec", "dim", "message"), REFUSED, ids=label)
def test_reasons_name_the_value_and_what_works(codec: Codec, dim: int, message: str) -> None:
    reason = supported(codec, dim)
    assert reason is not None and message in reason
    if dim:
        with pytest.raises(ValueError, match=message.split(";")[0]):
            encode(codec, mx.zeros((512, dim)))


def test_refusals_of_rows() -> None:
    with pytest.raises(ValueError, match="blocks of 32, got 33 rows"):
        encode(Channel(4), mx.zeros((33, 64)))
    with pytest.raises(ValueError, match="float16, bfloat16, float32"):
        encode(Affine(4), mx.zeros((33, 64), mx.int32))
