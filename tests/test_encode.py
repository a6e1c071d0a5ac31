"""The encode stages and their codecs, on NumPy and on MLX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvmlx import layout
from kvmlx.stages.encode.codecs import Affine, Channel, CodeBook, Exact
from kvmlx.stages.encode.int import ALIASES, Int
from kvmlx.stages.encode.kivi import KIVI
from kvmlx.stages.encode.turboquant import TurboQuant
from kvmlx.types import StrategyError


@dataclass(frozen=True)
class NumPyBackend:
    name: str = "numpy"
    xp: Any = np

    def hadamard(self, x, block):
        shape = x.shape
        x = x.reshape(-1, block)
        half = 1
        while half < block:
            pairs = x.reshape(len(x), -1, 2, half)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([low + high, low - high], axis=2).reshape(len(x), block)
            half *= 2
        return (x * np.float32(1 / math.sqrt(block))).reshape(shape)

    def from_numpy(self, x):
        return x

    def to_numpy(self, x):
        return x

    def encode(self, codec, x):
        return codec.encode(self, x)

    def decode(self, codec, planes, dim):
        return codec.decode(self, planes, dim)


@dataclass(frozen=True)
class MLXBackend:
    xp: Any
    name: str = "mlx"

    def hadamard(self, x, block):
        return self.xp.hadamard_transform(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)

    def from_numpy(self, x):
        return self.xp.array(x)

    def to_numpy(self, x):
        return np.array(x.astype(self.xp.float32) if x.dtype == self.xp.bfloat16 else x)

    def encode(self, codec, x):
        return codec.encode(self, x)

    def decode(self, codec, planes, dim):
        return codec.decode(self, planes, dim)


NUMPY: Any = NumPyBackend()
CODECS = [
    *(Affine(bits) for bits in (2, 3, 4, 5, 6, 8)),
    Affine(4, "hadamard"),
    Affine(3, "hadamard", group_size=16),
    *(Channel(bits) for bits in (2, 3, 4, 5, 8)),
    Channel(4, group_size=8),
    *(CodeBook(bits) for bits in (1, 2, 3, 4, 5, 6)),
    CodeBook(4, scale="norm"),
    CodeBook(3, center=32),
    Exact("float16"),
    Exact("float32"),
]
DIMS = (64, 80, 96, 128, 256)


def mlx_backend() -> Any:
    return MLXBackend(pytest.importorskip("mlx.core"))


@pytest.fixture(params=["numpy", "mlx"])
def backend(request):
    return NUMPY if request.param == "numpy" else mlx_backend()


def data(*shape: int, seed: int = 0, outliers: bool = True) -> np.ndarray:
    """Return rows that look like keys: normal, with a mean in every eleventh channel."""
    x = np.random.default_rng(seed).normal(size=shape)
    if outliers:
        x[..., ::11] += 6.0
    return x.astype(np.float16).astype(np.float32)


def round_trip(backend, codec, x: np.ndarray) -> np.ndarray:
    """Encode and decode in the codec's basis."""
    planes = codec.encode(backend, backend.from_numpy(x))
    return backend.to_numpy(codec.decode(backend, planes, x.shape[-1]))


def label(codec) -> str:
    fields = vars(codec).values()
    return "-".join([type(codec).__name__, *(str(f) for f in fields if f not in (None, 0, "none"))])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("codec", CODECS, ids=label)
def test_planes_are_as_declared_and_equal_on_numpy_and_mlx(codec, dim):
    mlx = mlx_backend()
    codec.check(dim)
    x = data(2, 3, 64, dim)
    ours, theirs = codec.encode(NUMPY, x), codec.encode(mlx, mlx.from_numpy(x))
    specs = {spec.name: spec for spec in codec.planes(dim)}
    assert set(ours) == set(theirs) == set(specs)
    for name, spec in specs.items():
        a, b = ours[name], mlx.to_numpy(theirs[name])
        assert a.shape == b.shape == (2, 3, 64 // spec.rows, spec.width)
        assert a.dtype == b.dtype == np.dtype(spec.dtype)
        if name.startswith("codes"):
            assert np.mean(a == b) >= 0.9999
        else:
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        codec.decode(NUMPY, ours, dim), mlx.to_numpy(codec.decode(mlx, mlx_planes(mlx, ours), dim)), rtol=1e-6
    )


def mlx_planes(mlx: Any, planes: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: mlx.from_numpy(plane) for name, plane in planes.items()}


@pytest.mark.parametrize("codec", CODECS, ids=label)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
def test_any_number_of_blocks_and_leading_dims(backend, codec, rows):
    n = rows * codec.block
    x = data(n, 64)
    decoded = round_trip(backend, codec, x)
    assert decoded.shape == (n, 64)
    assert decoded.dtype == np.float32
    lead = round_trip(backend, codec, x[None, None, None])
    np.testing.assert_array_equal(lead[0, 0, 0], decoded)
    basis = backend.to_numpy(codec.rotate(backend, backend.from_numpy(x)))
    assert np.isfinite(decoded).all()
    assert ((decoded - basis) ** 2).sum() <= 0.7 * (basis**2).sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("codec", [Affine(4), Affine(4, "hadamard"), Channel(4), CodeBook(4, center=32)], ids=label)
def test_input_dtypes_give_the_planes_of_their_float32_values(codec, dtype):
    mlx = mlx_backend()
    x = mlx.from_numpy(data(2, 64, 64)).astype(getattr(mlx.xp, dtype))
    want = codec.encode(mlx, x.astype(mlx.xp.float32))
    for name, plane in codec.encode(mlx, x).items():
        assert mlx.xp.array_equal(plane, want[name])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("codec", [Affine(8, "hadamard"), CodeBook(4)], ids=label)
def test_rotation_is_orthogonal_and_undone(backend, codec, dim):
    q, k = data(2, 5, dim, seed=1), data(2, 7, dim, seed=2)
    rotated = [backend.to_numpy(codec.rotate(backend, backend.from_numpy(x))) for x in (q, k)]
    np.testing.assert_allclose(rotated[0] @ rotated[1].swapaxes(1, 2), q @ k.swapaxes(1, 2), rtol=1e-5, atol=1e-3)
    back = backend.to_numpy(codec.unrotate(backend, backend.from_numpy(rotated[1])))
    np.testing.assert_allclose(back, k, atol=1e-5)


@pytest.mark.parametrize("codec", [Affine(4), Channel(4), Exact("float16")], ids=label)
def test_without_rotation_the_basis_is_the_input(codec):
    x = data(3, 64)
    assert codec.rotate(NUMPY, x) is x
    assert codec.unrotate(NUMPY, x) is x


# Affine codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    "codec", [Affine(2), Affine(2, group_size=32), Channel(2), Channel(2, group_size=64)], ids=label
)
def test_error_is_at_most_half_a_scale(backend, codec, bits):
    codec = type(codec)(bits, group_size=codec.group_size)
    x = data(2, 64, 128)
    planes = codec.encode(backend, backend.from_numpy(x))
    decoded = backend.to_numpy(codec.decode(backend, planes, 128))
    scales = backend.to_numpy(planes["scales"]).astype(np.float32)
    axis, times = (-1, 128 // scales.shape[-1]) if isinstance(codec, Affine) else (-2, 64 // scales.shape[-2])
    bound = np.repeat(scales, times, axis=axis) / 2
    # A scale rounded down to float16 leaves the top value up to (2**bits - 1) * 2**-11 scales out.
    slack = 1 + 2 * (2**bits - 1) * 2.0**-11 * 0.5
    assert (np.abs(decoded - x) <= bound * slack).all()


@pytest.mark.parametrize("codec", [Affine(4), Channel(4)], ids=label)
@pytest.mark.parametrize("value", [0.0, -3.5, 1000.3, 1e6, 1e-9])
def test_constant_groups_have_scale_zero(backend, codec, value):
    x = np.full((1, 32, 64), value, np.float32)
    with np.errstate(all="raise", under="ignore"):
        planes = codec.encode(backend, backend.from_numpy(x))
    assert not backend.to_numpy(planes["scales"]).any()
    assert not backend.to_numpy(planes["codes0"]).any()
    decoded = backend.to_numpy(codec.decode(backend, planes, 64))
    np.testing.assert_array_equal(decoded, np.float32(np.float16(np.clip(value, -65504, 65504))))


def test_affine_groups_by_default_are_the_largest_that_divide():
    assert [Affine(4).group(d) for d in (64, 72, 80, 96, 128, 256)] == [64, 8, 16, 32, 64, 64]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_planes_serve_the_kernels_of_mlx(bits):
    mlx = mlx_backend()
    x = data(16, 128)
    planes = Affine(bits).encode(mlx, mlx.from_numpy(x))
    scales, zeros = (planes[name].astype(mlx.xp.float32) for name in ("scales", "zeros"))
    theirs = mlx.xp.dequantize(planes["codes0"].view(mlx.xp.uint32), scales, zeros, group_size=64, bits=bits)
    np.testing.assert_allclose(
        mlx.to_numpy(theirs), mlx.to_numpy(Affine(bits).decode(mlx, planes, 128)), rtol=1e-6, atol=1e-6
    )


def test_rotation_tames_an_outlier_channel():
    x = data(64, 128, outliers=False)
    x[:, 5] += 40.0
    plain, rotated = Affine(4), Affine(4, "hadamard")
    error = round_trip(NUMPY, plain, x) - x
    rotated_error = rotated.unrotate(NUMPY, round_trip(NUMPY, rotated, x)) - x
    assert (rotated_error**2).mean() < 0.5 * (error**2).mean()


def test_channel_needs_whole_blocks():
    with pytest.raises(ValueError, match="blocks of 32, got 33"):
        Channel(4).encode(NUMPY, data(33, 64))


# Code books

DISTORTION = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950, 5: 0.00251, 6: 0.00064}


@pytest.mark.parametrize("bits", DISTORTION)
def test_distortion_is_that_of_lloyd_max(bits):
    x = data(2000, 128, outliers=False)
    decoded = round_trip(NUMPY, CodeBook(bits, scale="norm"), x)
    rotated = CodeBook(bits).rotate(NUMPY, x)
    relative = ((decoded - rotated) ** 2).sum() / (rotated**2).sum()
    assert relative == pytest.approx(DISTORTION[bits], rel=0.03)


# Unbiased means over rotations, and ours is one: a mean that all keys share keeps its luck, 2% at one bit.
@pytest.mark.parametrize(("bits", "outliers"), [(1, False), (2, False), (2, True), (3, True), (4, True)])
def test_unbiased_scale_keeps_inner_products_and_norm_shrinks_them(bits, outliers):
    rng = np.random.default_rng(bits)
    k = data(4000, 128, seed=bits, outliers=outliers)
    q = k + rng.normal(size=k.shape).astype(np.float32) * 3
    truth = (q * k).sum(axis=-1)

    def slope(codec: CodeBook) -> float:
        estimate = (codec.rotate(NUMPY, q) * round_trip(NUMPY, codec, k)).sum(axis=-1)
        return float((estimate * truth).sum() / (truth * truth).sum())

    assert 0.99 <= slope(CodeBook(bits)) <= 1.01
    assert slope(CodeBook(bits, scale="norm")) == pytest.approx(1 - DISTORTION[bits], abs=0.015)


def test_zero_rows_of_a_code_book(backend):
    x = np.zeros((2, 64), np.float32)
    with np.errstate(all="raise"):
        decoded = round_trip(backend, CodeBook(4), x)
    assert not decoded.any()


def test_center_removes_the_mean_of_each_block(backend):
    codec = CodeBook(3, center=32)
    x = data(64, 128, outliers=False) + 5 * data(1, 128, seed=3)
    planes = codec.encode(backend, backend.from_numpy(x))
    rotated = backend.to_numpy(codec.rotate(backend, backend.from_numpy(x)))
    means = backend.to_numpy(planes["means"])
    np.testing.assert_allclose(means, rotated.reshape(2, 32, 128).mean(axis=1), atol=0.02)
    plain = round_trip(backend, CodeBook(3), x)
    centered = round_trip(backend, codec, x)
    assert ((centered - rotated) ** 2).mean() < 0.1 * ((plain - rotated) ** 2).mean()


# Exact rows


def test_exact_bfloat16_is_the_identity_on_its_bits():
    mlx = mlx_backend()
    codec = Exact("bfloat16")
    x = mlx.from_numpy(data(3, 64) * 1e-3).astype(mlx.xp.bfloat16)
    planes = codec.encode(mlx, x)
    assert mlx.xp.array_equal(planes["rows"], x.view(mlx.xp.uint16))
    assert mlx.xp.array_equal(codec.decode(mlx, planes, 64), x.astype(mlx.xp.float32))
    np.testing.assert_array_equal(codec.encode(NUMPY, mlx.to_numpy(x))["rows"], mlx.to_numpy(planes["rows"]))


def test_exact_bfloat16_rounds_to_nearest_even():
    mlx = mlx_backend()
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    want = mlx.from_numpy(x).astype(mlx.xp.bfloat16).view(mlx.xp.uint16)
    np.testing.assert_array_equal(Exact("bfloat16").encode(NUMPY, x)["rows"], mlx.to_numpy(want))


# Bytes

FORMULAS = [
    (Int(8), 272),
    (Int(4), 144),
    (Int(3), 112),
    (Int(2), 80),
    (Int(k=8, v=4), 136 + 72),
    (KIVI(4), 160),
    (KIVI(2), 96),
    (KIVI(2, group_size=64), 80),
    (KIVI(2, group_size=128), 72),
    (TurboQuant(2), 68),
    (TurboQuant(3), 100),
    (TurboQuant(4), 132),
    (TurboQuant(4, center=64), 132 + 4),
]


@pytest.mark.parametrize(("stage", "nbytes"), FORMULAS, ids=[str(stage) for stage, _ in FORMULAS])
def test_row_bytes_follow_the_formulas_and_the_arrays(stage, nbytes):
    codecs = stage.key_codec(), stage.value_codec()
    assert sum(layout.row_bytes(c.planes(128)) for c in codecs) == nbytes
    held = sum(plane.nbytes for c in codecs for plane in c.encode(NUMPY, data(256, 128)).values())
    assert held == 256 * nbytes


# Stages

TEXTS = [
    (Int(4), "int4"),
    (Int(k=4, v=4), "int4"),
    (Int(16), "int16"),
    (Int(4, group_size=32, rotate="hadamard"), "int4(group_size=32, rotate=hadamard)"),
    (Int(k=8, v=4, recent=128), "int(k=8, v=4, recent=128)"),
    (Int(k=8), "int(k=8)"),
    (KIVI(2), "kivi(bits=2)"),
    (KIVI(k=4), "kivi(k=4)"),
    (TurboQuant(k=4, v=3, center=64), "turboquant(k=4, v=3, center=64)"),
    (TurboQuant(v=4, scale="norm"), "turboquant(v=4, scale=norm)"),
]


@pytest.mark.parametrize(("stage", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_stage_text(stage, text):
    assert str(stage) == text


def test_equal_bits_are_one_stage_and_aliases_name_it():
    assert Int(k=4, v=4) == Int(bits=4) == Int(**ALIASES["int4"])
    assert hash(KIVI(k=2, v=2)) == hash(KIVI(2))
    assert sorted(ALIASES) == ["int16", "int2", "int3", "int4", "int5", "int6", "int8"]


def test_sides_without_bits_have_no_codec():
    assert (Int(16).key_codec(), Int(16).value_codec()) == (None, None)
    assert (Int(k=16, v=4).key_codec(), Int(k=16, v=4).value_codec()) == (None, Affine(4))
    assert (KIVI(k=4).key_codec(), KIVI(k=4).value_codec()) == (Channel(4), None)
    assert (TurboQuant(v=4).key_codec(), TurboQuant(v=4).value_codec()) == (None, CodeBook(4))
    assert TurboQuant(4, center=64).key_codec() == CodeBook(4, center=64)
    assert TurboQuant(4, center=64).value_codec() == CodeBook(4)
    assert KIVI(4, group_size=64).key_codec() == Channel(4, group_size=64)


def test_blocks():
    assert [c.block for c in (Affine(4), Channel(4), CodeBook(4), CodeBook(4, center=64))] == [1, 32, 1, 64]


REFUSED = [
    (Int, {}, "either bits for both sides, or k and v apart"),
    (Int, {"bits": 4, "k": 8}, "either bits for both sides, or k and v apart"),
    (Int, {"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, 16, got 7"),
    (Int, {"bits": 4.0}, "got 4.0"),
    (Int, {"bits": True}, "got True"),
    (Int, {"bits": 4, "rotate": "haar"}, "rotate must be one of none, hadamard, got 'haar'"),
    (Int, {"bits": 4, "group_size": 48}, "group_size must be one of 8, 16, 32, 64, 128, 256, got 48"),
    (Int, {"bits": 4, "sinks": -1}, "sinks must be an integer >= 0, got -1"),
    (Int, {"bits": 4, "recent": 1.5}, "recent must be an integer >= 0"),
    (KIVI, {"bits": 16}, "bits must be one of 2, 3, 4, 5, 6, 8, got 16"),
    (KIVI, {"bits": 2, "group_size": None}, "group_size must be one of"),
    (TurboQuant, {"k": 8}, "k must be one of 1, 2, 3, 4, 5, 6, got 8"),
    (TurboQuant, {"bits": 4, "scale": "mse"}, "scale must be one of unbiased, norm"),
    (TurboQuant, {"bits": 4, "center": 10}, "center must be one of 0, 16, 32"),
    (TurboQuant, {"v": 4, "center": 32}, "only values are encoded"),
]


@pytest.mark.parametrize(("stage", "args", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_refusals_name_the_value_and_what_works(stage, args, message):
    with pytest.raises(StrategyError, match=message):
        stage(**args)


@pytest.mark.parametrize(
    ("codec", "dim", "message"),
    [
        (Affine(4), 100, "multiple of 8, got 100"),
        (Channel(4), 0, "multiple of 8, got 0"),
        (CodeBook(4), 4, "multiple of 8, got 4"),
        (Affine(4, group_size=64), 80, "group_size=64 does not divide the head dim 80; one of 8, 16 does"),
    ],
    ids=["affine", "channel", "codebook", "group"],
)
def test_check_refuses_dims_that_cannot_be_encoded(codec, dim, message):
    with pytest.raises(StrategyError, match=message):
        codec.check(dim)
