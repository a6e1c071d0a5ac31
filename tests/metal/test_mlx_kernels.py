"""The harness runs MLX's own Metal kernels, from the installed headers, and they agree with MLX on the CPU."""

from __future__ import annotations

import math
import struct

import mlx.core as mx
import numpy as np
import pytest

from kvmlx import reference
from kvmlx.tolerance import assert_close, assert_same
from tests.metal.device import Device, Launch

KERNELS = "mlx/backend/metal/kernels"
SDPA = f'#include "{KERNELS}/utils.h"\n#include "{KERNELS}/sdpa_vector.h"\n'
QUANTIZED = "".join(
    f'#include "{KERNELS}/{name}.h"\n' for name in ("utils", "steel/gemm/gemm", "quantized_utils", "quantized")
)
DTYPES = {"half": mx.float16, "bfloat16_t": mx.bfloat16}
BLOCKS = 32
UNUSED_STRIDES = ("x_shape", "x_strides", "w_shape", "w_strides", "s_strides", "b_strides")


def wide(x: mx.array) -> np.ndarray:
    """The numbers of an array in float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def draw(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


class Attention:
    """A problem of grouped-query attention, [B, H, L, D] over [B, KV, N, D], and how MLX's kernels are called on it."""

    def __init__(
        self, name: str, d: int, n: int, *, causal: bool = False, extra: str = "", queries: int = 2, heads: int = 4
    ):
        self.name, self.d, self.n, self.causal, self.extra = name, d, n, causal, extra
        dtype = DTYPES[name]
        self.q = draw((2, heads, queries, d), dtype, 1)
        self.k, self.v = draw((2, 2, n, d), dtype, 2), draw((2, 2, n, d), dtype, 3)
        self.scale = 1 / math.sqrt(d)
        self.mask = self.bias = None
        if extra in ("bool", "float"):
            keep = np.random.default_rng(4).random((2, 2, n)) < 0.7
            keep[..., 0] = True
            base = mx.array(keep.tolist()) if extra == "bool" else draw(keep.shape, dtype, 5)
            self.bias = np.where(keep, 0.0, -np.inf) if extra == "bool" else wide(base)
            self.mask = mx.contiguous(mx.repeat(mx.repeat(base, heads // 2, 1)[:, :, None], queries, 2))
        self.sinks = draw((heads,), dtype, 6) if extra == "sinks" else None

    def constants(self) -> dict[str | int, object]:
        return {
            "has_mask": self.mask is not None,
            "query_transposed": False,
            "do_causal": self.causal,
            "bool_mask": self.extra == "bool",
            "float_mask": self.extra == "float",
            "has_sinks": self.sinks is not None,
            "blocks": BLOCKS,
        }

    def buffers(self) -> list[tuple[str, object]]:
        heads, queries = self.q.shape[1], self.q.shape[2]
        bound = [("queries", self.q), ("keys", self.k), ("values", self.v), ("gqa_factor", heads // 2), ("N", self.n)]
        for side in "kv":
            bound += [(f"{side}_head_stride", self.n * self.d), (f"{side}_seq_stride", self.d)]
        bound += [("scale", self.scale), ("num_q_heads", heads), ("mask_kv_seq_stride", 1)]
        bound += [("mask_q_seq_stride", self.n), ("mask_head_stride", queries * self.n)]
        bound += [(f"{self.extra[:1]}mask", self.mask)] if self.mask is not None else []
        return bound + ([("sinks", self.sinks)] if self.sinks is not None else [])

    def one_pass(self, device: Device) -> Launch:
        batch, heads, queries, _ = self.q.shape
        return device.launch_source(
            SDPA,
            f"sdpa_vector<{self.name}, {self.d}, {self.d}>",
            buffers=self.buffers(),
            output_names=["out"],
            output_shapes=[self.q.shape],
            output_dtypes=[self.q.dtype],
            threadgroups=(batch * heads, queries, 1),
            threadgroup=(1024, 1, 1),
            function_constants=self.constants(),
        )

    def two_passes(self, device: Device, gqa: tuple[int, int] | None = None) -> list[Launch]:
        batch, heads, queries, d = self.q.shape
        rows = (batch, heads, queries, BLOCKS)
        kernel = "sdpa_vector_2pass_1" if gqa is None else "sdpa_vector_2pass_1_gqa"
        tail = f"<{self.name}, {d}, {d}>" if gqa is None else f"<{self.name}, {d}, {d}, {gqa[0]}, {gqa[1]}>"
        first = device.launch_source(
            SDPA,
            kernel + tail,
            buffers=self.buffers(),
            output_names=["out", "sums", "maxs"],
            output_shapes=[(*rows, d), rows, rows],
            output_dtypes=[self.q.dtype, mx.float32, mx.float32],
            threadgroups=(2, batch, BLOCKS),
            threadgroup=(32, heads // 2, queries),
            function_constants=self.constants(),
        )
        partials, sums, maxs = first.outputs
        second = device.launch_source(
            SDPA,
            f"sdpa_vector_2pass_2<{self.name}, {d}>",
            buffers=[("partials", partials), ("sums", sums), ("maxs", maxs), ("blocks", BLOCKS)],
            output_names=["out"],
            output_shapes=[self.q.shape],
            output_dtypes=[self.q.dtype],
            threadgroups=(batch * heads, queries, 1),
            threadgroup=(1024, 1, 1),
            function_constants={k: v for k, v in self.constants().items() if k != "blocks"} | {"blocks": BLOCKS},
        )
        return [first, second]

    def check(self, got: mx.array) -> None:
        """Within the tolerance policy of the float64 oracle, measured by MLX on the CPU."""
        mask = "causal" if self.causal else self.mask
        plain = mx.fast.scaled_dot_product_attention(
            self.q, self.k, self.v, scale=self.scale, mask=mask, sinks=self.sinks
        )
        oracle, _ = reference.attention(
            wide(self.q),
            wide(self.k),
            wide(self.v),
            scale=self.scale,
            causal=self.causal,
            bias=self.bias,
            sinks=None if self.sinks is None else wide(self.sinks),
        )
        dtype = "float16" if self.name == "half" else "bfloat16"
        assert_close(wide(got), oracle, wide(plain), dtype=dtype, name="sdpa")


@pytest.mark.parametrize(
    ("causal", "extra"), [(False, ""), (True, ""), (False, "bool"), (False, "float"), (True, "sinks")]
)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", DTYPES)
def test_attention(name: str, d: int, causal: bool, extra: str) -> None:
    problem = Attention(name, d, 97, causal=causal, extra=extra)
    run = problem.one_pass(Device(seed=1))
    problem.check(run.outputs[0])
    assert run.barriers == 16 * (1 + 2 * d // 32)
    problem.check(problem.two_passes(Device(seed=2))[1].outputs[0])


@pytest.mark.parametrize("name", DTYPES)
def test_attention_of_grouped_heads(name: str) -> None:
    problem = Attention(name, 64, 150, queries=1, heads=16)
    plain = problem.two_passes(Device(seed=3))
    grouped = problem.two_passes(Device(seed=3), gqa=(8, 2))
    for first, second in (plain, grouped):
        problem.check(second.outputs[0])
        assert first.outputs[0].shape == (2, 16, 1, BLOCKS, 64)
    # What that kernel is for: a simdgroup reads a key for two heads at once.
    assert grouped[0].read["keys"] * 2 == plain[0].read["keys"]


def quantize(w: mx.array, group: int, bits: int, device: Device) -> list[mx.array]:
    """Codes (uint32, packed as MLX packs them), scales and biases by MLX's Metal kernel."""
    rows, columns = w.shape
    name = "half" if w.dtype == mx.float16 else "bfloat16_t" if w.dtype == mx.bfloat16 else "float"
    run = device.launch_source(
        QUANTIZED,
        f"affine_quantize<{name}, {group}, {bits}>",
        buffers=[("w", w)],
        output_names=["out", "scales", "biases"],
        output_shapes=[(rows, columns * bits // 8), (rows, columns // group), (rows, columns // group)],
        output_dtypes=[mx.uint8, w.dtype, w.dtype],
        grid=(w.size // max(group // 32, 1), 1, 1),
        threadgroup=(64, 1, 1),
    )
    codes, scales, biases = run.outputs
    assert run.written["out"] == run.unique_written["out"] == codes.size
    return [codes.view(mx.uint32), scales, biases]


def unpack(codes: mx.array, bits: int) -> np.ndarray:
    """The numbers of packed codes, one row for each row."""
    data = np.array(codes).view(np.uint8)
    return np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits) @ (1 << np.arange(bits))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_codes(bits: int, group: int) -> None:
    w = draw((4, 256), mx.float16, bits)
    got = quantize(w, group, bits, Device(seed=bits))
    codes, scales, biases = mx.quantize(w, group, bits)
    assert_same(np.array(got[1]), np.array(scales), name="scales")
    assert_same(np.array(got[2]), np.array(biases), name="biases")
    # On the CPU a tie goes to the even number, on the GPU away from zero: nothing else may differ.
    mine, theirs = unpack(got[0], bits), unpack(codes, bits)
    rows = np.array(w).astype(np.float32).reshape(-1, group)
    low, high = np.minimum(rows.min(1), np.inf), np.maximum(rows.max(1), 0)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-7))
    side = np.abs(low) > np.abs(high)
    scale, edge = np.where(side, scale, -scale), np.where(side, low, high)
    whole = np.round(edge / scale)
    scale, edge = np.where(whole == 0, scale, edge / whole), np.where(whole == 0, 0, edge)
    position = ((rows - edge[:, None]) / scale[:, None]).reshape(4, 256)
    tie = np.abs(position - np.floor(position) - 0.5) < 1e-4
    assert tie.sum() < 8
    assert_same(np.where(tie, 0, mine), np.where(tie, 0, theirs), name="codes")
    assert np.abs(mine - theirs).max() <= 1


@pytest.mark.parametrize("name", [*DTYPES, "float"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_values(bits: int, group: int, name: str) -> None:
    dtype = DTYPES.get(name, mx.float32)
    codes, scales, biases = mx.quantize(draw((4, 256), dtype, bits), group, bits)
    per_thread = {3: 8, 5: 8, 6: 4}.get(bits, 8 // bits)
    run = Device(seed=bits).launch_source(
        QUANTIZED,
        f"affine_dequantize<{name}, {group}, {bits}>",
        buffers=[("w", codes), ("scales", scales), ("biases", biases)],
        output_names=["out"],
        output_shapes=[(4, 256)],
        output_dtypes=[dtype],
        grid=(1024 // per_thread, 1, 1),
        threadgroup=(64, 1, 1),
    )
    theirs = wide(mx.dequantize(codes, scales, biases, group, bits))
    oracle = unpack(codes, bits) * np.repeat(wide(scales), group, 1) + np.repeat(wide(biases), group, 1)
    precision = {"half": "float16", "bfloat16_t": "bfloat16"}.get(name, "float32")
    assert_close(wide(run.outputs[0]), oracle, theirs, dtype=precision, name="values")
    assert run.unique_read["w"] == codes.nbytes


@pytest.mark.parametrize("kernel", ["affine_qmv_fast", "affine_qmv", "affine_qvm"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 64)])
def test_quantized_products(bits: int, group: int, kernel: str) -> None:
    inner, outer = 512, 128
    transpose = kernel != "affine_qvm"
    w = draw((outer, inner) if transpose else (inner, outer), mx.float16, 7)
    x = draw((2, inner), mx.float16, 8)
    codes, scales, biases = mx.quantize(w, group, bits)
    run = Device(seed=9).launch_source(
        QUANTIZED,
        f"{kernel}<half, {group}, {bits}, false>",
        buffers=[
            *(("w", codes), ("scales", scales), ("biases", biases), ("x", x)),
            *(("in_vec_size", inner), ("out_vec_size", outer), ("x_batch_ndims", 0), ("w_batch_ndims", 0)),
            *((n, np.zeros(1, np.int64)) for n in UNUSED_STRIDES),
        ],
        output_names=["y"],
        output_shapes=[(2, outer)],
        output_dtypes=[mx.float16],
        threadgroups=(2, outer // (8 if transpose else 64), 1),
        threadgroup=(32, 2, 1),
    )
    theirs = mx.quantized_matmul(x, codes, scales, biases, transpose=transpose, group_size=group, bits=bits)
    values = wide(mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits))
    oracle = wide(x) @ (values.T if transpose else values)
    assert_close(wide(run.outputs[0]), oracle, wide(theirs), dtype="float16", name=kernel)


@pytest.mark.parametrize("rows", [32, 20])
@pytest.mark.parametrize("name", DTYPES)
def test_quantized_matrix_product(name: str, rows: int) -> None:
    """MLX's tiles of simdgroup matrices over threadgroup memory, whole and with rows left over."""
    inner, outer, group, bits = 128, 64, 64, 4
    dtype = DTYPES[name]
    x, w = draw((rows, inner), dtype, 1), draw((outer, inner), dtype, 2)
    codes, scales, biases = mx.quantize(w, group, bits)
    run = Device(seed=4).launch_source(
        QUANTIZED,
        f"affine_qmm_t<{name}, {group}, {bits}, true, false>",
        buffers=[
            *(("w", codes), ("scales", scales), ("biases", biases), ("x", x)),
            *(("K", inner), ("N", outer), ("M", rows), ("x_batch_ndims", 0), ("w_batch_ndims", 0)),
            *((n, np.zeros(1, np.int64)) for n in UNUSED_STRIDES),
        ],
        output_names=["y"],
        output_shapes=[(rows, outer)],
        output_dtypes=[dtype],
        threadgroups=(outer // 32, (rows + 31) // 32, 1),
        threadgroup=(32, 2, 2),
    )
    values = wide(mx.dequantize(codes, scales, biases, group, bits))
    theirs = mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=group, bits=bits)
    precision = "float16" if name == "half" else "bfloat16"
    assert_close(wide(run.outputs[0]), wide(x) @ values.T, wide(theirs), dtype=precision, name="qmm")
    assert run.threadgroup_bytes == 2 * 32 * (32 + 8) * 2 and run.barriers == 2 * (1 + 2 * inner // 32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_tiled_attention(name: str, causal: bool) -> None:
    """Steel attention, whose softmax is in the registers of simdgroup matrices."""
    problem = Attention(name, 64, 70, causal=causal, queries=40)
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, length, d = q.shape
    rows, columns = 32, 32

    def strides(x: mx.array) -> list[int]:
        return [x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3], x.shape[3]]

    blocks, steps = -(-length // rows), -(-problem.n // columns)
    numbers = [batch, heads, d, length, problem.n, heads // 2]
    sizes = [blocks, steps, length // rows, problem.n // columns, length % rows, problem.n % columns]
    params = struct.pack("6if7i", *numbers, problem.scale, *sizes, problem.n - length)
    params += struct.pack("12q", *strides(q), *strides(k), *strides(v), *strides(q))
    run = Device(seed=6).launch_source(
        f'#include "{KERNELS}/utils.h"\n#include "{KERNELS}/steel/attn/kernels/steel_attention.h"\n',
        f"attention<{name}, {rows}, {columns}, 64, 64, 4, 1, {name}>",
        buffers=[("Q", q), ("K", k), ("V", v), ("params", params)],
        output_names=["O"],
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
        threadgroups=(blocks, heads, batch),
        threadgroup=(32, 4, 1),
        function_constants={200: False, 201: False, 300: False, 301: causal, 302: False, 303: False},
    )
    problem.check(run.outputs[0])


@pytest.mark.parametrize("length", [7, 128, 1000])
def test_softmax(length: int) -> None:
    x = draw((3, length), mx.float16, 5)
    run = Device(seed=7).launch_source(
        f'#include "{KERNELS}/utils.h"\n#include "{KERNELS}/softmax.h"\n',
        "softmax_single_row<half, float>",
        buffers=[("in", x), ("axis_size", length)],
        output_names=["out"],
        output_shapes=[x.shape],
        output_dtypes=[mx.float16],
        threadgroups=(3, 1, 1),
        threadgroup=(-(-length // 128) * 32, 1, 1),
    )
    assert_close(
        wide(run.outputs[0]), reference.softmax(wide(x)), wide(mx.softmax(x, -1)), dtype="float16", name="softmax"
    )
