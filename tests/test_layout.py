"""The byte format: bit planes, sums by halves, signs, code books."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from kvmlx import layout
from kvmlx.types import PlaneSpec

DIMS = (64, 80, 96, 128, 256)
WIDTHS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}


def pack_bit_by_bit(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Write one character a bit, lowest first, and read the string back in eights."""
    rows = codes.reshape(-1, codes.shape[-1])
    planes, shift = [], 0
    for width in WIDTHS[bits]:
        plane = np.zeros((len(rows), codes.shape[-1] * width // 8), np.uint8)
        for r, row in enumerate(rows.tolist()):
            text = "".join(format((c >> shift) % 2**width, f"0{width}b")[::-1] for c in row)
            plane[r] = [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]
        planes.append(plane.reshape(*codes.shape[:-1], plane.shape[-1]))
        shift += width
    return planes


def lloyd(bits: int) -> list[float]:
    """Iterate levels -> borders -> means of N(0, 1) between them; return the positive half."""
    n = 2 ** (bits - 1)
    levels, moved = [(i + 0.5) * 3 / n for i in range(n)], 1.0
    while moved > 1e-12:
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels))]
        density = [math.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in borders] + [0.0]
        tail = [math.erfc(b / math.sqrt(2)) / 2 for b in borders] + [0.0]
        means = [(density[i] - density[i + 1]) / (tail[i] - tail[i + 1]) for i in range(n)]
        moved = max(abs(a - b) for a, b in zip(means, levels, strict=True))
        levels = means
    return levels


@pytest.fixture(params=["numpy", "mlx"])
def xp(request):
    return np if request.param == "numpy" else pytest.importorskip("mlx.core")


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("bits", layout.CODE_BITS)
def test_pack_equals_bit_by_bit_and_unpacks(xp, bits, rows, dim):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, rows, dim)).astype(np.uint8)
    planes = layout.pack(xp, xp.asarray(codes), bits)
    expected = pack_bit_by_bit(codes, bits)
    assert len(planes) == len(expected)
    for plane, want, spec in zip(planes, expected, layout.code_planes(bits, dim), strict=True):
        assert np.asarray(plane).dtype == np.uint8
        assert plane.shape[-1] == spec.width
        np.testing.assert_array_equal(np.asarray(plane), want)
    back = layout.unpack(xp, planes, bits)
    assert np.asarray(back).dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(back), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_planes_as_uint32_are_the_packing_of_mlx(bits):
    mx = pytest.importorskip("mlx.core")
    weights = mx.random.normal((64, 128), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weights, group_size=32, bits=bits)
    codes = layout.unpack(mx, [packed.view(mx.uint8)], bits)
    grouped = codes.astype(mx.float32).reshape(64, 4, 32)
    decoded = (grouped * scales[..., None] + biases[..., None]).reshape(64, 128)
    assert mx.array_equal(decoded, mx.dequantize(packed, scales, biases, group_size=32, bits=bits))
    (plane,) = layout.pack(mx, codes, bits)
    assert mx.array_equal(plane.view(mx.uint32), packed)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 80, 96, 128])
def test_fold_sum_is_the_sum_and_equal_on_every_backend(n):
    x = np.random.default_rng(n).normal(size=(3, n * 2)).astype(np.float32)
    folded = layout.fold_sum(np, x, 2)
    np.testing.assert_allclose(folded, x.astype(np.float64).reshape(3, n, 2).sum(axis=1), atol=1e-4)
    mx = pytest.importorskip("mlx.core")
    np.testing.assert_array_equal(np.asarray(layout.fold_sum(mx, mx.array(x), 2)), folded)


def test_to_float16_clamps():
    x = np.array([1e6, -1e6, 65504.0, 0.1], np.float32)
    np.testing.assert_array_equal(layout.to_float16(np, x), np.array([65504.0, -65504.0, 65504.0, 0.1], np.float16))


def test_signs_are_those_of_splitmix64():
    # The first outputs of splitmix64 from state 0, as its author publishes them.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert layout.signs(4).tolist() == [-1.0 if x >> 63 else 1.0 for x in outputs]
    np.testing.assert_array_equal(layout.signs(256)[:64], layout.signs(64))
    assert abs(layout.signs(256).sum()) < 48


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 256)])
def test_hadamard_block(dim, block):
    assert layout.hadamard_block(dim) == block


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_code_books_are_lloyd_max(bits):
    levels, borders = layout.code_book(bits), layout.thresholds(bits)
    assert levels.dtype == borders.dtype == np.float32
    assert len(levels) == 2**bits
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], lloyd(bits), rtol=2e-7)
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_allclose(borders, (levels[1:] + levels[:-1]) / 2, atol=3e-7)
    np.testing.assert_allclose(layout.code_book(bits, 128), levels / math.sqrt(128), rtol=2e-7)


def test_row_bytes_counts_shared_rows():
    planes = (PlaneSpec("codes0", "uint8", 64), PlaneSpec("scales", "float16", 128, rows=32))
    assert layout.row_bytes(planes) == 64 + 8
