"""The shim's functions against numpy, the counters against known kernels, and the ways to launch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import toolchain
from tests.metal.device import Device, Launch, MetalFault

HEAD = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
SEEDS = (0, 1, 2)
LANE = np.arange(32)
METAL = {np.float32: "float", np.float16: "half", np.int32: "int", np.uint32: "uint", np.int16: "short"}
METAL |= {np.uint16: "ushort", np.int8: "char", np.uint8: "uchar"}


def evaluate(
    expressions: Sequence[str], x: np.ndarray, *more: np.ndarray, out: Any = None, kind: str = "", seed: int = 0
) -> list[np.ndarray]:
    """The values of expressions of `x`, of `x1`, `x2` if there are more arrays, and of `i`, for each element.

    Args:
        out: the results' type; that of x by default.
        kind: "bfloat" for results in bfloat, which numpy does not have; they come back in float32.
    """
    arrays = [x, *more]
    kinds = [METAL[a.dtype.type] for a in arrays]
    names = ["x", *(f"x{j}" for j in range(1, len(arrays)))]
    arguments = "".join(f"const device {k}* b{j} [[buffer({j})]], " for j, k in enumerate(kinds))
    reads = "".join(f"{k} {n} = b{j}[i]; " for j, (k, n) in enumerate(zip(kinds, names, strict=True)))
    dtype = x.dtype.type if out is None else out
    writes = "".join(f"y[i + {j * x.size}] = {e};\n" for j, e in enumerate(expressions))
    source = (
        f"{HEAD}[[kernel]] void k({arguments}device {kind or METAL[dtype]}* y [[buffer({len(arrays)})]], "
        "uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) { "
        f"{reads}\n{writes}}}"
    )
    run = Device(seed=seed).launch_source(
        source,
        "k",
        buffers=[(f"b{j}", mx.array(a)) for j, a in enumerate(arrays)],
        output_names=["y"],
        output_shapes=[(len(expressions), x.size)],
        output_dtypes=[mx.bfloat16 if kind else mx.array(np.zeros(1, dtype)).dtype],
        grid=(x.size, 1, 1),
        threadgroup=(min(x.size, 64), 1, 1),
    )
    return list(np.array(run.outputs[0].astype(mx.float32) if kind else run.outputs[0]))


def check(wanted: dict[str, Any], x: np.ndarray, *more: np.ndarray, ulps: int = 0, **options: Any) -> None:
    """Each expression has the values that are wanted, bit by bit or within a number of units in the last place."""
    for (expression, want), got in zip(wanted.items(), evaluate(list(wanted), x, *more, **options), strict=True):
        if ulps:
            np.testing.assert_array_almost_equal_nulp(got, np.asarray(want, got.dtype), ulps)
        else:
            np.testing.assert_array_equal(got, want, err_msg=expression)


def numbers(dtype: Any, n: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, n, dtype, endpoint=True)
    return rng.standard_normal(n).astype(dtype)


@pytest.mark.parametrize("dtype", METAL)
@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(dtype: Any, seed: int) -> None:
    x = numbers(dtype, seed=seed)
    sources = {
        "simd_shuffle_xor(x, 5)": LANE ^ 5,
        "simd_shuffle(x, (lane * 7 + 3) % 32)": (LANE * 7 + 3) % 32,
        "simd_broadcast(x, 9)": np.full(32, 9),
        "simd_shuffle_up(x, 3)": np.where(LANE < 3, LANE, LANE - 3),
        "simd_shuffle_down(x, 3)": np.where(LANE > 28, LANE, LANE + 3),
        "simd_shuffle_rotate_up(x, 3)": (LANE - 3) % 32,
        "simd_shuffle_rotate_down(x, 3)": (LANE + 3) % 32,
        "quad_shuffle_xor(x, 3)": LANE ^ 3,
        "quad_broadcast(x, 2)": LANE // 4 * 4 + 2,
        "quad_shuffle_up(x, 1)": np.where(LANE % 4 < 1, LANE, LANE - 1),
        "quad_shuffle_down(x, 1)": np.where(LANE % 4 > 2, LANE, LANE + 1),
        "simd_broadcast_first(x)": np.zeros(32, int),
    }
    rows = x.reshape(2, 32)
    check({e: rows[:, source].ravel() for e, source in sources.items()}, x, seed=seed)


def test_shuffles_that_fill() -> None:
    x, fill = numbers(np.float32), numbers(np.float32, seed=1)
    rows, fills = x.reshape(2, 32), fill.reshape(2, 32)
    eight, eights = x.reshape(8, 8), fill.reshape(8, 8)
    wanted = {
        "simd_shuffle_and_fill_down(x, x1, 3)": [rows[:, 3:], fills[:, :3]],
        "simd_shuffle_and_fill_up(x, x1, 3)": [fills[:, -3:], rows[:, :-3]],
        "simd_shuffle_and_fill_down(x, x1, 3, 8)": [eight[:, 3:], eights[:, :3]],
        "simd_shuffle_and_fill_up(x, x1, 3, 8)": [eights[:, -3:], eight[:, :-3]],
    }
    check({e: np.concatenate(parts, 1).ravel() for e, parts in wanted.items()}, x, fill)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.uint8])
def test_integer_reductions(dtype: Any) -> None:
    x = numbers(dtype)
    rows, quads = x.reshape(2, 32), x.reshape(16, 4)
    wanted = {}
    for name, ufunc in (("sum", np.add), ("product", np.multiply), ("min", np.minimum), ("max", np.maximum)):
        wanted[f"simd_{name}(x)"] = np.repeat(ufunc.reduce(rows, axis=1, dtype=dtype), 32)
        wanted[f"quad_{name}(x)"] = np.repeat(ufunc.reduce(quads, axis=1, dtype=dtype), 4)
    for name, ufunc in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        wanted[f"simd_{name}(x)"] = np.repeat(ufunc.reduce(rows, axis=1), 32)
    sums, products = np.cumsum(rows, axis=1, dtype=dtype), np.cumprod(rows, axis=1, dtype=dtype)
    wanted["simd_prefix_inclusive_sum(x)"] = sums.ravel()
    wanted["simd_prefix_exclusive_sum(x)"] = (sums - rows).astype(dtype).ravel()
    wanted["simd_prefix_inclusive_product(x)"] = products.ravel()
    first = np.ones((2, 1), dtype)
    wanted["simd_prefix_exclusive_product(x)"] = np.concatenate([first, products[:, :-1]], 1).ravel()
    check(wanted, x, seed=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float_reductions(dtype: Any) -> None:
    x = numbers(dtype)
    rows = tree = x.reshape(2, 32)
    for step in (16, 8, 4, 2, 1):
        tree = tree[:, :step] + tree[:, step : 2 * step]
    wanted = {
        "simd_sum(x)": np.repeat(tree[:, 0], 32),
        "simd_max(x)": np.repeat(rows.max(1), 32),
        "simd_min(x)": np.repeat(rows.min(1), 32),
        "simd_prefix_inclusive_sum(x)": np.cumsum(rows, 1, dtype=dtype).ravel(),
    }
    check(wanted, x, seed=1)


def test_votes() -> None:
    x = numbers(np.float32)
    rows = x.reshape(2, 32) > 0.3
    ballots = np.repeat((rows.astype(np.uint64) << LANE.astype(np.uint64)).sum(1), 32).astype(np.uint32)
    wanted = {
        "uint(ulong(simd_ballot(x > 0.3f)))": ballots,
        "simd_any(x > 0.3f)": np.ones(64),
        "simd_all(x > 0.3f)": np.zeros(64),
        "simd_all(x < 100)": np.ones(64),
        "simd_any(x > 100)": np.zeros(64),
        "simd_is_first()": np.tile(LANE == 0, 2),
    }
    check(wanted, x, out=np.uint32)


def test_vectors_cross_lanes() -> None:
    x = numbers(np.float32)
    rows = x.reshape(2, 32)
    wanted = {
        "simd_shuffle_xor(float4(x, 2 * x, 3 * x, 4 * x), 1).z": 3 * rows[:, LANE ^ 1].ravel(),
        "simd_max(float2(x, -x)).y": np.repeat(-rows.min(1), 32),
        "float(simd_shuffle_up(half2(1, x), 1).y)": rows[:, np.maximum(LANE - 1, 0)].ravel().astype(np.float16),
    }
    check(wanted, x)


@pytest.mark.parametrize("kind", ["float", "half", "bfloat"])
@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_matrix_product(kind: str, space: str) -> None:
    """A B + C of 8 x 8 matrices, from a larger array, with an origin; and the product with a transpose."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (16, 24)).astype(np.float32) for _ in range(2))
    dtype = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}[kind]
    copy = "threadgroup {k} s[384], r[384]; for (uint j = lane; j < 384; j += 32) {{ s[j] = a[j]; r[j] = b[j]; }} "
    copy += "simdgroup_barrier(mem_flags::mem_threadgroup); "
    source = HEAD + (
        "[[kernel]] void k(const device {k}* a [[buffer(0)]], const device {k}* b [[buffer(1)]], "
        "device {k}* y [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {{ "
        + (copy if space == "threadgroup" else "const device {k}* s = a; const device {k}* r = b; ")
        + "simdgroup_matrix<{k}, 8, 8> p, q, t, c = make_filled_simdgroup_matrix<{k}, 8, 8>({k}(3.0f)); "
        "simdgroup_load(p, s, 24, ulong2(8, 4)); simdgroup_load(q, r + 24 * 3, 24); "
        "simdgroup_multiply_accumulate(c, p, q, c); simdgroup_store(c, y, 8); "
        "simdgroup_load(t, s, 24, ulong2(4, 8), true); simdgroup_multiply(c, t, q); "
        "simdgroup_store(c, y + 64, 8, ulong2(0), true); }}"
    ).format(k=kind)
    run = Device(seed=1).launch_source(
        source,
        "k",
        buffers=[("a", mx.array(a).astype(dtype)), ("b", mx.array(b).astype(dtype))],
        output_names=["y"],
        output_shapes=[(2, 8, 8)],
        output_dtypes=[dtype],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    product, transposed = np.array(run.outputs[0].astype(mx.float32))
    assert np.array_equal(product, a[4:12, 8:16] @ b[3:11, :8] + 3)
    assert np.array_equal(transposed.T, a[4:12, 8:16].T @ b[3:11, :8])


def test_matrix_layout() -> None:
    """Lane and element of each matrix entry are those that MLX relies on (BaseMMAFrag::get_coord)."""
    x = np.arange(64, dtype=np.float32)
    source = HEAD + (
        "[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], "
        "uint lane [[thread_index_in_simdgroup]]) { simdgroup_float8x8 m; simdgroup_load(m, x, 8); "
        "y[2 * lane] = m.thread_elements()[0]; y[2 * lane + 1] = m.thread_elements()[1]; }"
    )
    run = Device().launch_source(
        source,
        "k",
        buffers=[("x", mx.array(x))],
        output_names=["y"],
        output_shapes=[(32, 2)],
        output_dtypes=[mx.float32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    quad = LANE // 4
    row, column = (quad & 4) + LANE // 2 % 4, (quad & 2) * 2 + LANE % 2 * 2
    assert np.array_equal(np.array(run.outputs[0]), np.stack([8 * row + column, 8 * row + column + 1], 1))


HARD = np.array([0.0, -0.0, 1.0, 65504, 65519, 65520, 1e-8, 6e-8, 2.0**-24, 2.0**-25, 3e38, np.inf, -np.inf, np.nan])
TIES = np.float32(1) + np.arange(18, dtype=np.float32) * np.float32(2.0**-12)
BF_TIES = np.float32(1) + np.arange(32, dtype=np.float32) * np.float32(2.0**-9)


def test_rounding_to_half_and_bfloat() -> None:
    x = np.concatenate([HARD, TIES, BF_TIES]).astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    got = evaluate(["half(x)"], x, out=np.float16)[0]
    assert np.array_equal(got, want, equal_nan=True) and np.array_equal(np.signbit(got)[:13], np.signbit(want)[:13])
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    check({"static_cast<bfloat>(x)": np.where(np.isnan(x), x, nearest)}, x, kind="bfloat")


@pytest.mark.skipif(toolchain._machine() != "x86_64", reason="other processors have instructions for half")
def test_the_conversions_that_the_runtime_brings() -> None:
    """Clang calls them where an x86 processor has no instruction: checked on any."""
    runtime = toolchain.runtime()
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = (halves[:-1] + halves[1:]) / 2
    x = np.concatenate(
        [halves, between, np.nextafter(between, 9e9), np.nextafter(between, 0), [65519, 65520, 1e9, 1e-9]]
    )
    for name, argument, source in (("sf", ctypes.c_float, x.astype(np.float32)), ("df", ctypes.c_double, x)):
        convert = runtime[f"__trunc{name}hf2"]
        convert.restype, convert.argtypes = ctypes.c_float, (argument,)
        some = source[:: max(1, len(source) // 4000)]
        got = np.array([convert(v) for v in np.concatenate([some, -some, source[-4:]])], np.float32)
        with np.errstate(over="ignore"):
            want = np.concatenate([some, -some, source[-4:]]).astype(np.float16)
        assert np.array_equal(got.view(np.uint32) & 0xFFFF, want.view(np.uint16))
    widen = runtime["__extendhfsf2"]
    widen.restype, widen.argtypes = ctypes.c_float, (ctypes.c_uint16,)
    bits = np.arange(0, 0x10000, 37, dtype=np.uint16)
    got = np.array([widen(int(b)) for b in bits], np.float32)
    assert np.array_equal(got, bits.view(np.float16).astype(np.float32), equal_nan=True)


def test_arithmetic_in_half_and_bfloat_rounds_each_step() -> None:
    a, b, c = (numbers(np.float16, 256, seed=s) for s in range(3))
    exact = a.astype(np.float64) * b + c
    wanted = {"x * x1 + x2": a * b + c, "x / x1 - x2": a / b - c, "fma(x, x1, x2)": exact.astype(np.float16)}
    check(wanted, a, b, c)
    check({"float(x) * float(x1)": a.astype(np.float32) * b}, a, b, out=np.float32)
    p, q = (mx.array(v).astype(mx.bfloat16) for v in (a, b))
    product = np.array((p * q).astype(mx.float32))
    check({"bfloat(x) * bfloat(x1)": product}, a.astype(np.float32), b.astype(np.float32), kind="bfloat")


@pytest.mark.parametrize("space", ["", "precise::", "fast::"])
def test_float_functions(space: str) -> None:
    x = np.concatenate([np.linspace(-4, 4, 63), [0.5]]).astype(np.float32)
    y = np.abs(x) + np.float32(0.01)
    names = {"exp": np.exp, "exp2": np.exp2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "atan": np.arctan}
    positive = {"log": np.log, "log2": np.log2, "log10": np.log10, "sqrt": np.sqrt}
    wanted = {f"{space}{name}(x)": function(x) for name, function in names.items()}
    wanted |= {f"{space}{name}(x1)": function(y) for name, function in positive.items()}
    wanted |= {f"{space}rsqrt(x1)": 1 / np.sqrt(y), f"{space}pow(x1, 1.5f)": y ** np.float32(1.5)}
    check(wanted, x, y, ulps=4)
    exact = {"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint, "fabs": np.abs, "abs": np.abs}
    wanted = {f"{space}{name}(x)": function(x) for name, function in exact.items()}
    wanted[f"{space}round(x)"] = np.trunc(x + np.copysign(np.float32(0.5), x))
    wanted[f"{space}clamp(x, -1.0f, 2.0f)"] = np.clip(x, -1, 2)
    wanted[f"{space}fma(x, x1, x)"] = (x.astype(np.float64) * y + x).astype(np.float32)
    check(wanted, x, y)


def test_special_values() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, 1e-40, 2], np.float32)
    check({"isnan(x)": np.isnan(x), "isinf(x)": np.isinf(x), "isfinite(x)": np.isfinite(x)}, x, out=np.uint32)
    one = np.float32(1)
    wanted = {"max(x, 1.0f)": np.fmax(x, one), "min(x, 1.0f)": np.fmin(x, one), "exp(x - 2)": np.exp(x - 2)}
    check(wanted | {"select(x, -1.0f, isnan(x))": np.where(np.isnan(x), -1, x)}, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_limits(dtype: Any) -> None:
    info, name = np.finfo(dtype), f"numeric_limits<{METAL[dtype]}>"
    wanted = {"max": info.max, "lowest": info.min, "min": info.smallest_normal, "epsilon": info.eps}
    wanted |= {"infinity": np.inf, "quiet_NaN": np.nan, "denorm_min": info.smallest_subnormal}
    check({f"{name}::{limit}()": [value] for limit, value in wanted.items()}, np.ones(1, dtype))


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.uint16, np.int16, np.uint8])
def test_bits(dtype: Any) -> None:
    x, y = numbers(dtype), numbers(dtype, seed=1)
    width = 8 * x.itemsize
    x[0] = 0
    raw = [int(v) % (1 << width) for v in x]

    def as_dtype(values: list[int]) -> np.ndarray:
        return np.array([v % (1 << width) for v in values], np.uint64).astype(f"u{x.itemsize}").view(dtype)

    wanted = {}
    for offset, bits in ((0, 3), (3, 4), (width - 5, 5), (0, width), (2, 0)):
        field = [(v >> offset) % (1 << bits) for v in raw]
        if np.issubdtype(dtype, np.signedinteger) and bits:
            field = [v - (1 << bits) if v >> (bits - 1) else v for v in field]
        wanted[f"extract_bits(x, {offset}, {bits})"] = as_dtype(field)
        mask = ((1 << bits) - 1) << offset
        field = [(v & ~mask) | (int(w) << offset & mask) for v, w in zip(raw, y, strict=True)]
        wanted[f"insert_bits(x, x1, {offset}, {bits})"] = as_dtype(field)
    wanted["popcount(x)"] = [v.bit_count() for v in raw]
    wanted["clz(x)"] = [width - v.bit_length() for v in raw]
    wanted["ctz(x)"] = [(v & -v).bit_length() - 1 if v else width for v in raw]
    wanted["reverse_bits(x)"] = as_dtype([int(f"{v:0{width}b}"[::-1], 2) for v in raw])
    wanted["rotate(x, decltype(x)(3))"] = as_dtype([v << 3 | v >> (width - 3) for v in raw])
    wanted |= {"min(x, x1)": np.minimum(x, y), "max(x, x1)": np.maximum(x, y)}
    check(wanted, x, y)


def test_wide_products_and_bit_casts() -> None:
    x, y = numbers(np.int32), numbers(np.int32, seed=1)
    high = (x.astype(np.int64) * y >> 32).astype(np.int32)
    check({"as_type<int>(as_type<float>(x))": x, "mulhi(x, x1)": high}, x, y)


def test_vectors() -> None:
    x = numbers(np.float32)
    wanted = {
        "float4(x, float2(2, 3), 4).w": np.full(64, 4),
        "float4(x).yx.y": x,
        "dot(float4(x, x, 1, 2), float4(2, 1, x, 0))": ((2 * x + x) + x) + 0 * x,
        "float4(half4(x)).z": x.astype(np.float16),
        "float(int4(float4(10 * x)).x)": np.trunc(10 * x),
        "float(as_type<uchar4>(x).w)": x.view(np.uint32) >> 24,
        "vec<float, 2>(x, 1).x": x,
        "metal::vec<float, 3>(x, 1, 2)[0]": x,
        "max(float2(x), float2(0, 1)).x": np.maximum(x, 0),
        "clamp(float4(x), -0.5f, 0.5f).z": np.clip(x, -0.5, 0.5),
        "float(max(int2(10 * x), 3).y)": np.maximum(np.trunc(10 * x), 3),
        "any(float2(x) > float2(0)) ? 1.0f : 0.0f": x > 0,
        "select(float2(1), float2(2), float2(x) > 0).y": np.where(x > 0, 2, 1),
        "exp(float4(x, 0, x, x)).y": np.ones(64),
    }
    check(wanted, x, ulps=1)
    source = HEAD + (
        "[[kernel]] void k(device float* y [[buffer(0)]]) { float4 v(1, 2, 3, 4); packed_float3 p = float3(5, 6, 7); "
        "y[0] = v.w + p.y; y[1] = sizeof(p) + sizeof(float3); }"
    )
    run = Device().launch_source(
        source,
        "k",
        output_names=["y"],
        output_shapes=[(2,)],
        output_dtypes=[mx.float32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    assert np.array_equal(np.array(run.outputs[0]), [10, 28])


POSITIONS = """
[[kernel]] void k(device uint* y [[buffer(0)]], uint3 p [[thread_position_in_grid]],
    uint3 g [[threadgroup_position_in_grid]], ushort3 q [[thread_position_in_threadgroup]],
    uint t [[thread_index_in_threadgroup]], uint3 size [[threads_per_threadgroup]],
    uint2 asked [[dispatch_threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
    uint3 grid [[threads_per_grid]], uint lane [[thread_index_in_simdgroup]],
    uint s [[simdgroup_index_in_threadgroup]], uint ns [[simdgroups_per_threadgroup]],
    uint w [[threads_per_simdgroup]]) {
  device uint* o = y + 16 * (p.x + grid.x * (p.y + grid.y * p.z));
  o[0] = p.x; o[1] = p.y; o[2] = p.z; o[3] = g.x; o[4] = g.y; o[5] = q.x; o[6] = q.y; o[7] = t; o[8] = size.x;
  o[9] = size.y; o[10] = asked.x; o[11] = groups.x * 100 + groups.y * 10 + groups.z; o[12] = lane; o[13] = s;
  o[14] = ns; o[15] = w;
}"""


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_of_a_grid_that_is_no_multiple_of_the_threadgroup(seed: int) -> None:
    grid, group = (10, 7, 2), (8, 5, 1)
    run = Device(seed=seed).launch_source(
        HEAD + POSITIONS,
        "k",
        output_names=["y"],
        output_shapes=[(2, 7, 10, 16)],
        output_dtypes=[mx.uint32],
        grid=grid,
        threadgroup=group,
    )
    got = np.array(run.outputs[0])
    z, y, x = np.meshgrid(*(np.arange(n) for n in grid[::-1]), indexing="ij")
    width, height = np.minimum(8, 10 - x // 8 * 8), np.minimum(5, 7 - y // 5 * 5)
    index = y % 5 * width + x % 8
    want = [
        x,
        y,
        z,
        x // 8,
        y // 5,
        x % 8,
        y % 5,
        index,
        width,
        height,
        8 + 0 * x,
        222 + 0 * x,
        index % 32,
        index // 32,
    ]
    want += [(width * height + 31) // 32, 32 + 0 * x]
    assert np.array_equal(got, np.stack(want, -1))
    assert run.threads == 140


COUNTED = """
threadgroup float s[64];
uint i = thread_position_in_grid.x;
uint t = thread_position_in_threadgroup.x;
s[t] = x[i] * 2 + x[0];
threadgroup_barrier(mem_flags::mem_threadgroup);
float v = simd_sum(s[63 - t]);
simdgroup_barrier(mem_flags::mem_none);
y[i] = T(simd_max(v) + exp(v));
"""


def counted(device: Device) -> Launch:
    kernel = mx.fast.metal_kernel(name="counted", input_names=["x"], output_names=["y"], source=COUNTED)
    return device.launch(
        kernel,
        inputs=[mx.ones((256,))],
        input_names=["x"],
        output_names=["y"],
        output_shapes=[(256,)],
        output_dtypes=[mx.float16],
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        template=[("T", mx.float16)],
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_counters(seed: int) -> None:
    run = counted(Device(seed=seed))
    assert run.read == {"x": 2 * 4 * 256, "y": 0} and run.written == {"x": 0, "y": 2 * 256}
    # Each threadgroup of 64 reads its 64 numbers and x[0], which is the first one's own.
    assert run.unique_read == {"x": 4 * (64 + 3 * 65), "y": 0} and run.unique_written == {"x": 0, "y": 512}
    assert (run.barriers, run.simdgroup_barriers, run.simd_ops) == (4, 8, 2 * 256)
    assert (run.threadgroup_bytes, run.threads, run.instructions) == (256, 256, {})
    lean = counted(Device(seed=seed, races=False, counters=False))
    assert lean.read == run.read and lean.written == run.written
    assert np.array_equal(np.array(lean.outputs[0]), np.array(run.outputs[0]))


def test_instructions() -> None:
    run = counted(Device(count_instructions=True))
    n = run.instructions
    # x * 2 + x is one fused operation, simd_max + exp the other; the conversion is to half.
    assert n["float"] == 2 * 256 and n["transcendental"] == 256 and n["convert"] == 256
    assert n["load_device"] == 2 * 256 and n["store_device"] == 256
    assert n["load_threadgroup"] == n["store_threadgroup"] == 256
    assert "branch" not in n and "integer_divide" not in n
    assert np.array_equal(np.array(run.outputs[0]), np.array(counted(Device()).outputs[0]))


def test_instructions_of_a_loop() -> None:
    source = HEAD + (
        "[[kernel]] void k(const device float4* x [[buffer(0)]], device float* y [[buffer(1)]], "
        "const constant int& n [[buffer(2)]], uint i [[thread_position_in_grid]]) { float4 s = 0; "
        '_Pragma("clang loop unroll(disable)") for (int j = 0; j < n; j++) { s += x[(j + i) & 7] / (x[j].w + 1.0f); } '
        "y[i] = s.x * s.y * s.z * s.w; }"
    )

    def launch(n: int) -> Launch:
        return Device(count_instructions=True).launch_source(
            source,
            "k",
            buffers=[("x", mx.ones((8, 4))), ("n", n)],
            output_names=["y"],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
        )

    few, many = launch(3).instructions, launch(8).instructions
    step = {k: (many[k] - few[k]) / (5 * 64) for k in many}
    assert step["float_divide"] == 4 and step["float"] == 5 and step["load_device"] == 2 and step["branch"] == 1
    assert step["compare_select"] == 1 and step["address"] >= 2 and step.get("store_device", 0) == 0


def test_contraction() -> None:
    x = numbers(np.float32, 256)
    pragma = "\n#pragma METAL fp contract(off)\n"

    def launch(contract: bool, body: str) -> np.ndarray:
        source = HEAD + (
            "[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], "
            f"uint i [[thread_position_in_grid]]) {{ {body} }}"
        )
        run = Device(contract=contract).launch_source(
            source,
            "k",
            buffers=[("x", mx.array(x))],
            output_names=["y"],
            output_shapes=[(256,)],
            output_dtypes=[mx.float32],
            grid=(256, 1, 1),
            threadgroup=(256, 1, 1),
        )
        return np.array(run.outputs[0])

    apart, fused = x * x - x, (x.astype(np.float64) ** 2 - x).astype(np.float32)
    assert not np.array_equal(apart, fused)
    assert np.array_equal(launch(False, "y[i] = x[i] * x[i] - x[i];"), apart)
    assert np.array_equal(launch(True, "y[i] = x[i] * x[i] - x[i];"), fused)
    assert np.array_equal(launch(True, f"{pragma}y[i] = x[i] * x[i] - x[i];"), apart)


def test_dtypes_go_through_unchanged() -> None:
    kernel = mx.fast.metal_kernel(
        name="copied",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i];",
    )
    for dtype in (
        *(mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32),
        *(mx.int64, mx.uint64, mx.bool_, mx.complex64),
    ):
        for shape in ((3, 5), (4,))[: 1 if dtype == mx.complex64 else 2]:
            x = mx.array(np.random.default_rng(1).integers(0, 100, shape)).astype(dtype)
            run = Device().launch(
                kernel,
                inputs=[x],
                input_names=["x"],
                output_names=["y"],
                output_shapes=[shape],
                output_dtypes=[dtype],
                grid=(max(1, x.size), 1, 1),
                threadgroup=(8, 1, 1),
            )
            assert run.outputs[0].dtype == dtype and run.outputs[0].shape == shape
            assert mx.array_equal(run.outputs[0], x).item()


def test_shapes_and_strides_are_bound() -> None:
    kernel = mx.fast.metal_kernel(
        name="shaped",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x;y[i] = 1000 * x_shape[0] + 100 * x_strides[0] + 10 * x_ndim + x[i];",
    )
    run = Device().launch(
        kernel,
        inputs=[mx.arange(12).reshape(4, 3).T],
        input_names=["x"],
        output_names=["y"],
        output_shapes=[(12,)],
        output_dtypes=[mx.int32],
        grid=(12, 1, 1),
        threadgroup=(4, 1, 1),
    )
    assert np.array_equal(np.array(run.outputs[0]), 3420 + np.arange(12).reshape(4, 3).T.ravel())


def test_one_kernel_with_several_templates() -> None:
    kernel = mx.fast.metal_kernel(
        name="templated",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i] * N + (FLAG ? 1 : 0);",
    )
    for n, flag in ((2, True), (3, False), (3, True)):
        run = Device().launch(
            kernel,
            inputs=[mx.arange(8)],
            input_names=["x"],
            output_names=["y"],
            output_shapes=[(8,)],
            output_dtypes=[mx.int32],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            template=[("N", n), ("FLAG", flag)],
        )
        assert np.array_equal(np.array(run.outputs[0]), np.arange(8) * n + flag)


def test_nothing_is_left_of_a_launch() -> None:
    """Every launch finds its outputs poisoned and its counters at zero."""
    source = (
        HEAD + "[[kernel]] void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {"
        " if (i < 4) y[i] = i; }"
    )

    def launch(n: int, **options: Any) -> Launch:
        return Device().launch_source(
            source,
            "k",
            output_names=["y"],
            output_shapes=[(8,)],
            output_dtypes=[mx.float32],
            grid=(n, 1, 1),
            threadgroup=(8, 1, 1),
            **options,
        )

    assert np.array_equal(np.array(launch(4, init_value=5).outputs[0]), [0, 1, 2, 3, 5, 5, 5, 5])
    with pytest.raises(MetalFault, match="16 of 32 bytes"):
        launch(8)
    assert launch(4, init_value=0).written == {"y": 16}


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(toolchain.CompileError, match="pip install ziglang"):
        toolchain._tools.__wrapped__()


SCRIPT = """
import mlx.core as mx
from tests.metal import toolchain
from tests.metal.device import Device
k = mx.fast.metal_kernel(name="alone", input_names=["x"], output_names=["y"], source="y[0] = x[0] + 1;")
run = Device().launch(k, inputs=[mx.ones((8,))], input_names=["x"], output_names=["y"], output_shapes=[(1,)],
                      output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1))
print("made", run.outputs[0].item())
"""


def test_a_script_with_a_cache_of_its_own(tmp_path: Path) -> None:
    """Without pytest; broken files of an interrupted compilation do no harm, and nothing else is printed."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"KVMLX_METAL_CACHE": str(tmp_path), "PYTHONPATH": root}
    for _ in range(2):
        said = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        assert said.stdout == "made 2.0\n"
    kept = sorted(p.suffix for p in tmp_path.iterdir())
    assert kept == [".json", ".so", ".so"]
    for path in tmp_path.glob("*.json"):
        path.unlink()
    said = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "made 2.0\n" and sorted(p.suffix for p in tmp_path.iterdir()) == kept
