"""The Triton kernels of encode: the same bytes as the plain operations'. Interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import layout
from kvmlx import reference as ref
from kvmlx.backends.formats import format_of
from kvmlx.backends.numpy import BACKEND as NUMPY
from kvmlx.checks import Case, codec_of
from kvmlx.stages.encode.codecs import Affine, Channel, CodeBook, Exact
from kvmlx.strategy import Strategy
from kvmlx.tolerance import assert_same
from kvmlx.types import Codec
from tests.test_vectors import over

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvmlx.backends.formats import GROUPS  # noqa: E402
from kvmlx.backends.torch.ops import on  # noqa: E402
from kvmlx.backends.torch.triton.encode import (  # noqa: E402
    MOST_WARPS,
    NUMBERS,
    config_of,
    configurations,
    encode,
    supported,
)
from kvmlx.backends.torch.triton.launch import recording  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = (64, 80, 96, 128, 192, 256)
ODD_DIMS = (8, 16, 24, 120, 248)


def label(value: object) -> str:
    if not isinstance(value, (Affine, Channel, CodeBook, Exact)):
        return str(value)
    fields = [str(v) for v in vars(value).values() if v not in ("none", None)]
    return "-".join([type(value).__name__.lower(), *fields])


def rows(dtype: str, *shape: int, seed: int = 0) -> Any:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3
    return torch.from_numpy(x).to(DEVICE, getattr(torch, dtype))


def check(codec: Codec, x: Any, **options: Any) -> dict[str, np.ndarray]:
    """Compare the planes with NumPy's, rotated ones too: its butterflies have the kernel's order."""
    want = codec.encode(NUMPY, x.float().cpu().numpy())  # type: ignore[arg-type]
    got = {name: plane.cpu().numpy() for name, plane in encode(codec, x, **options).items()}
    assert list(got) == list(want)
    for name, plane in got.items():
        assert_same(plane, want[name], name=name)
    return got


def check_vector(case: Case) -> None:
    params, t = case
    codec = codec_of(params["stage"], params["side"])
    got = encode(codec, torch.from_numpy(np.array(t["x"])).to(DEVICE))
    assert set(got) == set(t) - {"x", "decoded"}
    for name, plane in got.items():
        assert_same(plane.cpu().numpy(), t[name], name=name)


@over("affine")
def test_affine_vectors(case: Case) -> None:
    check_vector(case)


@over("kivi")
def test_kivi_vectors(case: Case) -> None:
    check_vector(case)


@over("codebook")
def test_codebook_vectors(case: Case) -> None:
    check_vector(case)


@over("packing")
def test_packing_vectors(case: Case) -> None:
    """Rows that are codes, 0 and the largest in each group, have scale 1 and zero 0, and themselves as codes."""
    bits, codes = case[0]["bits"], np.array(case[1]["codes"])
    codec = Affine(bits)
    group = codec.group(codes.shape[-1])
    codes[..., ::group], codes[..., 1::group] = 0, 2**bits - 1
    planes = encode(codec, torch.from_numpy(codes.astype(np.float16)).to(DEVICE))
    for i, want in enumerate(ref.pack(codes, bits)):
        assert_same(planes[f"codes{i}"].cpu().numpy(), want, name=f"codes{i}")


def formats() -> list[tuple[Codec, int, str, tuple[int, ...]]]:
    """Codec, head dim, dtype, leading shape: every bits and group and dim and dtype, in pairs rather than in full."""
    dtypes = ("float16", "bfloat16", "float32")
    lengths = ((1,), (63,), (64,), (65,), (2, 3))
    bits = layout.CODE_BITS
    cases: list[tuple[Codec, int, str, tuple[int, ...]]] = []
    for i, dim in enumerate([*DIMS, *ODD_DIMS]):
        fits = [g for g in GROUPS if dim % g == 0]
        codec: Codec = Affine(bits[i % 7], ("none", "hadamard")[i % 2], fits[-1 - i % len(fits)])
        cases.append((codec, dim, dtypes[i % 3], lengths[i % 5]))
        codec = CodeBook(1 + i % 6, ("hadamard", "none")[i // 6 % 2], ("unbiased", "norm")[i // 3 % 2])
        cases.append((codec, dim, dtypes[(i + 1) % 3], lengths[(i + 1) % 5]))
        block = GROUPS[i % 6]
        codec = Channel(bits[(i + 3) % 7], ("none", "none", "hadamard")[i % 3], block)
        cases.append((codec, dim, dtypes[(i + 2) % 3], (2, block)))
        block = GROUPS[1 + i % 5]
        codec = CodeBook(1 + (i + 2) % 6, scale=("norm", "unbiased")[i // 2 % 2], center=block)
        cases.append((codec, dim, dtypes[i // 2 % 3], (3, block)))
    cases += [(Affine(b, group_size=32), 128, "bfloat16", (5,)) for b in bits]
    cases += [(Channel(b), 128, "bfloat16", (64,)) for b in bits]
    cases += [(CodeBook(b), 128, "bfloat16", (7,)) for b in range(1, 7)]
    cases += [(CodeBook(3, center=center), 128, "float16", (center,)) for center in GROUPS[1:]]
    # Blocks that are held in parts.
    cases += [(CodeBook(4, center=256), 256, "float16", (512,)), (CodeBook(2, center=64), 256, "float32", (64,))]
    return [*cases, (Channel(4, "hadamard", 256), 256, "bfloat16", (256,))]


@pytest.mark.parametrize(("codec", "dim", "dtype", "lead"), formats(), ids=label)
def test_formats(codec: Codec, dim: int, dtype: str, lead: tuple[int, ...]) -> None:
    assert supported(codec, dim) is None
    check(codec, rows(dtype, *lead, dim, seed=dim))


@pytest.mark.parametrize("codec", [Affine(4, "hadamard"), Channel(4), CodeBook(4), CodeBook(4, center=32)], ids=label)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_give_the_planes_of_their_float32_values(codec: Codec, dtype: str) -> None:
    x = rows(dtype, 2, 64, 64)
    want = encode(codec, x.float())
    for name, plane in encode(codec, x).items():
        assert_same(plane.cpu().numpy(), want[name].cpu().numpy(), name=name)


@pytest.mark.parametrize(
    ("codec", "dim"),
    [(Affine(4, "hadamard"), 128), (CodeBook(3), 96), (Channel(2), 128), (CodeBook(4, center=16), 64)],
    ids=label,
)
def test_configurations_give_the_same(codec: Codec, dim: int) -> None:
    """What a sweep may choose among."""
    fmt = format_of(codec, dim)
    found = configurations(fmt, dim)
    assert found[0] == config_of(fmt, dim) and len(found) == len(set(found)) > 3
    x = rows("bfloat16", 1, 2 * max(c.rows for c in found), dim)
    for config in {c.rows: c for c in found[-1:0:-1]}.values():
        check(codec, x, config=config)


# Values

VALUES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "outliers": lambda rng, n, d: rng.standard_normal((n, d)) * np.where(rng.random(d) < 0.1, 50, 1),
    "zero": lambda rng, n, d: np.zeros((n, d)),
    "negative zero": lambda rng, n, d: np.where(rng.random((n, d)) < 0.5, -0.0, 0.0),
    "constant": lambda rng, n, d: np.full((n, d), 1000.3),
    "tiny constant": lambda rng, n, d: np.full((n, d), 1e-9),
    "constant rows": lambda rng, n, d: np.broadcast_to(rng.standard_normal((n, 1)), (n, d)),
    "constant channels": lambda rng, n, d: np.broadcast_to(rng.standard_normal(d), (n, d)),
    "some zero rows": lambda rng, n, d: rng.standard_normal((n, d)) * (rng.random((n, 1)) < 0.5),
    "beyond float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e6,
    "far beyond float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e15,
    "subnormal float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e-6,
    "below float16": lambda rng, n, d: rng.standard_normal((n, d)) * 1e-9,
    "all sizes": lambda rng, n, d: rng.standard_normal((n, d)) * 10.0 ** rng.integers(-40, 15, (n, d)),
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


@pytest.mark.parametrize("values", list(VALUES))
@pytest.mark.parametrize(("codec", "dim"), CODECS, ids=label)
def test_values(codec: Codec, dim: int, values: str) -> None:
    n = -(-33 // codec.block) * codec.block
    x = VALUES[values](np.random.default_rng(dim), n, dim).astype(np.float32)
    check(codec, torch.from_numpy(np.array(x)).to(DEVICE))


@pytest.mark.parametrize("bits", range(1, 7))
def test_numbers_on_a_border_are_below_it(bits: int) -> None:
    """A code counts the borders strictly below, on both sides of 0."""
    borders, dim = layout.thresholds(bits), 256
    x = np.zeros(dim, np.float32)
    x[: len(borders)] = borders
    # The last number makes the row's length sqrt(dim): it is compared as it is.
    x[-1] = np.sqrt(dim - (x**2).sum())
    while np.sqrt(layout.fold_sum(np, x * x)) < 16:
        x[-1] = np.nextafter(x[-1], np.float32(99))
    assert np.sqrt(layout.fold_sum(np, x * x)) == 16
    planes = check(CodeBook(bits, rotation="none"), torch.from_numpy(x[None]).to(DEVICE))
    codes = layout.unpack(np, [planes[f"codes{i}"] for i in range(len(layout.plane_bits(bits)))], bits)
    assert_same(codes[0, : len(borders)], np.arange(len(borders), dtype=np.uint8))


SCRIPT = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvmlx.backends.torch.triton.encode import encode
from kvmlx.backends.torch.triton.launch import recording
from kvmlx.stages.encode.codecs import Affine, CodeBook
for codec in (CodeBook(3, center=16), Affine(4, "hadamard")):
    with recording() as launches:
        encode(codec, torch.zeros((16, 48)))
    (launch,) = launches
    for fusion in (launch.fp_fusion, True):
        options = {"num_warps": launch.num_warps, "enable_fp_fusion": fusion}
        source = ASTSource(launch.fn, launch.signature, launch.constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        patterns = (r"fma|(add|sub|mul)\\.f32", r"(add|sub|mul)\\.rn\\.f32", "div.rn")
        print(*(len(re.findall(pattern, made.asm["ptx"])) for pattern in patterns))
"""


def test_multiply_adds_stay_apart(tmp_path: Path) -> None:
    """The code says of every sum, product and quotient that it is rounded: then no compiler fuses them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    counted = [[int(n) for n in line.split()] for line in ran.stdout.splitlines()]
    assert len(counted) == 4
    for (free, rounded, divisions), (would_be, *_) in zip(counted[::2], counted[1::2], strict=True):
        assert free == 0 and rounded and divisions
        assert would_be > 0


# Exact rows


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
def test_exact_rows(source: str, target: Any) -> None:
    x = torch.cat([rows(source, 2, 63, 7), torch.zeros((2, 1, 7), dtype=getattr(torch, source), device=DEVICE)], dim=1)
    check(Exact(target), x)


# Shapes


@pytest.mark.parametrize("codec", [Affine(3), Channel(4), CodeBook(4, center=64), Exact("float32")], ids=label)
@pytest.mark.parametrize("shape", [(2, 0, 64), (0, 64, 64)], ids=str)
def test_no_rows_are_no_launch(codec: Codec, shape: tuple[int, ...]) -> None:
    with recording() as launches:
        got = encode(codec, torch.zeros(shape, dtype=torch.float16, device=DEVICE))
    for spec in codec.planes(64):
        plane = got[spec.name].cpu().numpy()
        assert plane.shape == (shape[0], shape[1] // spec.rows, spec.width)
        assert plane.dtype == spec.dtype
    assert not launches


def parts() -> dict[str, Any]:
    """Return rows [2, 64, 64] as parts of larger arrays."""
    return {
        "tail": rows("float16", 2, 96, 64)[:, 3:67],
        "heads": rows("bfloat16", 1, 2, 80, 64)[:, :, 16:],
        "tokens first": rows("float16", 64, 2, 64).transpose(0, 1),
        "every other row": rows("float32", 2, 128, 64)[:, ::2],
        "channels": rows("float16", 2, 64, 80)[..., 16:],
        "channels, unaligned": rows("float16", 2, 64, 72)[..., 4:68],
        "one lane of many": rows("float16", 3, 64, 64)[1:2],
        "expanded": rows("float16", 1, 64, 64).expand(3, 64, 64),
    }


@pytest.mark.parametrize("codec", [Affine(4), Channel(4), CodeBook(2, center=16)], ids=label)
@pytest.mark.parametrize("name", list(parts()))
def test_parts_of_an_array_are_read_in_place(codec: Codec, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = parts()[name]
    want = codec.encode(NUMPY, x.float().cpu().numpy())  # type: ignore[arg-type]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _: pytest.fail("copied"))
    got = encode(codec, x)
    for plane, values in want.items():
        assert_same(got[plane].cpu().numpy(), values, name=plane)


def test_rows_at_odd_distances_are_copied() -> None:
    check(Affine(4), rows("float16", 3, 5, 68)[..., :64])
    check(Affine(4), rows("float16", 3, 64, 5).transpose(1, 2))


LENGTHS = (
    (Affine(2), 16, (1,), (5, 130)),
    (CodeBook(4), 80, (1, 1), (16, 128)),
    (CodeBook(2, center=16), 16, (16,), (3, 64)),
    (Channel(4), 128, (1, 32), (16, 320)),
)


@pytest.mark.parametrize(("codec", "dim", "first", "second"), LENGTHS, ids=label)
def test_one_launch_and_nothing_compiled_for_a_length(
    codec: Codec, dim: int, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with recording() as launches:
        encode(codec, rows("float16", *first, dim))
        encode(codec, rows("float16", *second, dim))
    a, b = launches
    assert (a.fn, a.signature, a.constants, a.num_warps) == (b.fn, b.signature, b.constants, b.num_warps)


MEMORY = [
    (Affine(4), 128, "float16", (4, 64)),
    (Affine(6, "hadamard", 16), 80, "bfloat16", (3, 65)),
    (CodeBook(3), 128, "bfloat16", (4, 64)),
    (CodeBook(2), 96, "float32", (65,)),
    (Channel(2), 128, "float16", (2, 96)),
    (Channel(4, group_size=256), 80, "float32", (256,)),
    (CodeBook(4, center=64), 128, "float16", (2, 128)),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="accesses are counted by the interpreter")
@pytest.mark.parametrize(("codec", "dim", "dtype", "lead"), MEMORY, ids=label)
def test_each_byte_once(codec: Codec, dim: int, dtype: str, lead: tuple[int, ...]) -> None:
    from scripts.count_triton import counting

    x = rows(dtype, *lead, dim)
    with counting() as launches:
        planes = encode(codec, x)
    (run,) = launches
    assert run.loaded["x"] == run.read["x"] == x.nbytes
    assert sum(run.written.values()) == sum(plane.nbytes for plane in planes.values())
    tables = sum(n for name, n in run.read.items() if name != "x")
    assert tables <= run.grid[0] * 4 * (dim + 64)


def test_every_stage_has_a_kernel() -> None:
    for stage, dim in product(("int", "kivi", "turboquant"), DIMS):
        for bits in (2, 3, 4, 5, 6):
            for codec in Strategy.parse(f"{stage}(bits={bits})").codecs():
                assert codec is not None
                if isinstance(codec, Affine) and dim % codec.group(dim):
                    continue  # kivi's 32 channels at 80: the codec refuses itself
                assert supported(codec, dim) is None


def test_tiles() -> None:
    """Powers of two, whole blocks, and so many numbers to a thread that they stay in registers."""
    codecs = [
        *(Affine(4, rotation) for rotation in ("none", "hadamard")),
        *(CodeBook(bits) for bits in (1, 6)),
        *(Channel(4, rotation, block) for rotation in ("none", "hadamard") for block in GROUPS),
        *(CodeBook(6, center=block) for block in GROUPS),
    ]
    for codec, dim in product(codecs, range(8, 257, 8)):
        assert supported(codec, dim) is None
        fmt = format_of(codec, dim)
        for config in configurations(fmt, dim):
            held = config.rows // config.parts
            for n in (config.channels, config.rows, config.parts, config.num_warps):
                assert n & (n - 1) == 0
            assert config.rows % fmt.block == 0
            assert config.parts == 1 or config.rows == fmt.block
            assert config.channels >= dim or (fmt.block > 1 and not fmt.rotated)
            assert config.num_warps <= MOST_WARPS
            assert held * config.channels <= NUMBERS[fmt.kind] * 32 * config.num_warps


REFUSED = [
    (Affine(4), 100, "head dim of 100; multiples of 8 up to 256"),
    (Affine(4), 264, "head dim of 264; multiples of 8 up to 256"),
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
            encode(codec, torch.zeros((512, dim)))


def test_refusals_of_rows() -> None:
    with pytest.raises(ValueError, match="blocks of 32, got 33 rows"):
        encode(Channel(4), torch.zeros((33, 64)))
    with pytest.raises(ValueError, match=r"float16, bfloat16, float32, got \(33, 64\) of torch.int32"):
        encode(Affine(4), torch.zeros((33, 64), dtype=torch.int32))


@pytest.mark.parametrize("codec", [Affine(4), CodeBook(4), Channel(3)], ids=label)
def test_plain_torch_decodes_it(codec: Any) -> None:
    """What is encoded means the same to the backend's plain operations."""
    x = rows("float32", 2, 64, 128)
    backend: Any = on(DEVICE)
    planes = encode(codec, x)
    plain = codec.encode(backend, x)
    for name, plane in planes.items():
        assert plane.dtype == plain[name].dtype and plane.shape == plain[name].shape
    back = codec.unrotate(backend, codec.decode(backend, planes, 128))
    assert float((back - x).norm() / x.norm()) < 0.2
