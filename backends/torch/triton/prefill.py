# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Attention of a chunk of new tokens over a store, flash style: rows are dequantized in registers, tile by tile.

One program takes BLOCK_M query rows of a KV head, its query heads at one token after another, through the body and then
through the tail. A tile goes from its planes through registers and shared memory to the matrix units, and only the
output is written. The accumulator leaves the values' rotated basis once, between body and tail.

What dequantizing costs: every block of query rows that reads a tile dequantizes it, so with 128 of them a value, which
takes 2 instructions (`int4`), stands beside 128 multiply-adds on the matrix units and half a weight of the softmax,
which takes 8. Counted in the machine code for sm_90 (scripts/compile_triton.py; D = 128), a warp issues some 830
instructions for 128 rows of `int4` where exact rows, in tiles of 64, take 690. With 8 warps on 4 schedulers that
is 1660 cycles beside 2048 of the matrix units: where they overlap it takes as long as dense attention, where nothing
does 1.1 to 1.2 times as long. That is a prediction: no GPU was there to measure it.

A chunk that has too few query rows to fill the device is split along the store's rows too, into as many programs as
the device runs at once, merged by log-sum-exp. What that needs is the only scratch memory: at most `Config.programs`
blocks of float32 outputs per multiprocessor, whatever the history, and none where the query rows suffice.

Products with dequantized rows are of halves also where the model computes in bfloat16: codes and scales hold no more.
Each query row is divided by a power of two first, so that its size cannot leave a half's range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx.backends.formats import FLOAT32, Format
from kvmlx.backends.torch.triton.codecs import bound, product
from kvmlx.backends.torch.triton.launch import TritonKernel, chip_of, constant, processors
from kvmlx.backends.torch.triton.operands import NUMBERS, SIDES, UNALIGNED, Operands, counts, lane_of, operands
from kvmlx.backends.torch.triton.tiles import table_of, tile
from kvmlx.store import LayerStore

ALIGNED = 8
"""Elements of which the distances between query rows are multiples: a thread can then load 16 bytes at once."""
MERGED = 16
"""Query rows of a program that merges splits."""

_EXACT = tl.constexpr(FLOAT32)
_ALIGNED = tl.constexpr(ALIGNED)
_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))
_LIFT = tl.constexpr(8.0)
"""Weights are 2^8 times larger than they need be: what is far below the largest one is still a normal half."""
_SIDE = tl.constexpr(128)
"""Channels that the Hadamard matrix of one product has."""


# Kernels


@triton.jit
def _power_of_two(x):
    """Return the powers of two that divide the rows of float32 x [R, C] to within -2 .. 2, and 1 over them."""
    bits = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _signed_sums(x, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Multiply blocks of channels of float32 x [R, S], within -2 .. 2, by Sylvester's matrix of 1 and -1.

    The matrix is exact in halves. So is x in PARTS of them: 1 where it came from halves, 2 for a float's 22 bits.
    """
    S: tl.constexpr = x.shape[1]
    i = tl.arange(0, S)[:, None]
    j = tl.arange(0, S)[None, :]
    odd = i & j & (BLOCK - 1)
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    matrix = tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * odd.to(tl.float32), 0.0).to(tl.float16)
    high = x.to(tl.float16)
    y = tl.dot(high, matrix)
    if PARTS > 1:
        rest = (x - high.to(tl.float32)) * 2048.0
        y = tl.dot(rest.to(tl.float16), matrix) * (1.0 / 2048.0) + y
    return y


@triton.jit
def _hadamard(x, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Multiply blocks of channels of float32 x [R, P], within -2 .. 2, by the orthonormal Hadamard matrix."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    if P > _SIDE:
        # The matrix of 256 is four times that of 128: a quarter of the shared memory.
        HALF: tl.constexpr = P // 2
        low, high = tl.split(tl.permute(tl.reshape(x, (R, 2, HALF)), (0, 2, 1)))
        low = _signed_sums(low, BLOCK if BLOCK < P else HALF, PARTS)
        high = _signed_sums(high, BLOCK if BLOCK < P else HALF, PARTS)
        y = tl.join(low + high, low - high) if BLOCK == P else tl.join(low, high)
        y = tl.reshape(tl.permute(y, (0, 2, 1)), (R, P))
    else:
        y = _signed_sums(x, BLOCK, PARTS)
    return y * (1.0 / tl.sqrt(BLOCK * 1.0))


@triton.jit
def _table(p):
    """Return the four numbers of `table_of`, zeros where there is none."""
    a, b, c, d = 0, 0, 0, 0
    if p is not None:
        a, b, c, d = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
    return a, b, c, d


@triton.jit
def _starts(token, own, first, sinks, body_rows, window):
    """Return the first row of the body, and of the tail's buffer, that a new token's sliding window reaches."""
    hidden = tl.where(window > 0, tl.maximum(own - first + body_rows + token + 1 - window, 0), 0)
    in_tail = tl.where(hidden <= sinks, hidden, tl.maximum(hidden - body_rows, sinks))
    return tl.maximum(hidden - sinks, 0), first + in_tail


@triton.jit
def _add_tile(
    acc, peak, total, q, factor,
    k_codes0, k_codes1, k_scales, k_offsets, k_levels, k0, k1, k2, k3,
    v_codes0, v_codes1, v_scales, v_offsets, v_levels, v0, v1, v2, v3,
    bias, mask, mask_column, base, before, shift,
    lane, row, stop, row_start, row_stop,
    D: tl.constexpr, P: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    KT: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr, V_KIND: tl.constexpr, V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr, VT: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take a tile into the online softmax: acc [BLOCK_M, PV], peak (in units of log2) and total [BLOCK_M].

    CHECKED: whether rows of the tile may be hidden from a query row, which sees row_start .. row_stop of them.
    """
    k = tile(
        k_codes0, k_codes1, k_scales, k_offsets, k_levels, k0, k1, k2, k3, lane, row, stop,
        BLOCK_N, D, P, K_KIND, K_BITS, K_GROUP, KT, CHECKED,
    )  # fmt: skip
    s = product(q, tl.trans(k), None)
    if CHECKED:
        at = row + tl.arange(0, BLOCK_N)
        s = s * factor[:, None]
        if BIASED:
            s += tl.load(bias + lane + at, mask=at < stop, other=0.0)[None, :] * _LOG2E
        seen = (at[None, :] >= row_start[:, None]) & (at[None, :] < row_stop[:, None])
        if MASKED > 0:
            column = at - base + tl.where(at - base < before, 0, shift)
            m = tl.load(mask[:, None] + column[None, :].to(tl.int64) * mask_column, mask=seen, other=0)
            if MASKED == 1:
                seen = seen & m
            else:
                s += m.to(tl.float32) * _LOG2E
        s = tl.where(seen, s, -_INF)
        new = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(new == -_INF, 0.0, new)
        p = tl.exp2(s - (safe - _LIFT)[:, None])
    else:
        new = tl.maximum(peak, tl.max(s, 1) * factor)
        safe = new
        p = tl.exp2(s * factor[:, None] - (new - _LIFT)[:, None])
    shrink = tl.exp2(peak - safe)
    v = tile(
        v_codes0, v_codes1, v_scales, v_offsets, v_levels, v0, v1, v2, v3, lane, row, stop,
        BLOCK_N, DV, PV, V_KIND, V_BITS, V_GROUP, VT, CHECKED,
    )  # fmt: skip
    total = total * shrink + tl.sum(p, 1)
    acc = product(p.to(VT), v, acc * shrink[:, None])
    return acc, new, total


@triton.jit
def _add_rows(
    acc, peak, total, q, factor,
    k_codes0, k_codes1, k_scales, k_offsets, k_levels, k0, k1, k2, k3,
    v_codes0, v_codes1, v_scales, v_offsets, v_levels, v0, v1, v2, v3,
    bias, mask, mask_column, base, before, shift,
    lane, begin, stop, all_begin, all_stop, held, row_start, row_stop,
    D: tl.constexpr, P: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    KT: tl.constexpr, DV: tl.constexpr, PV: tl.constexpr, V_KIND: tl.constexpr, V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr, VT: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Take rows begin .. stop of a lane's body or tail into the softmax.

    Tiles within all_begin .. all_stop, which every query row sees, are added without a look at single rows, unless a
    bias or a mask concerns them. lane: int64, the lane's first row. held: rows that it holds. base, before, shift: row
    r is column r - base of the mask, and from column `before` on `shift` further.
    """
    n_before = 0
    n_whole = 0
    if not BIASED and MASKED == 0:
        n_before = tl.maximum(tl.cdiv(all_begin - begin, BLOCK_N), 0)
        n_whole = tl.maximum((tl.minimum(all_stop, stop) - begin) // BLOCK_N - n_before, 0)
        for i in tl.range(0, bound(n_whole), num_stages=STAGES):
            acc, peak, total = _add_tile(
                acc, peak, total, q, factor,
                k_codes0, k_codes1, k_scales, k_offsets, k_levels, k0, k1, k2, k3,
                v_codes0, v_codes1, v_scales, v_offsets, v_levels, v0, v1, v2, v3,
                bias, mask, mask_column, base, before, shift,
                lane, begin + (n_before + i) * BLOCK_N, held, row_start, row_stop,
                D, P, K_KIND, K_BITS, K_GROUP, KT, DV, PV, V_KIND, V_BITS, V_GROUP, VT, BIASED, MASKED, False, BLOCK_N,
            )  # fmt: skip
    for i in tl.range(0, bound(tl.cdiv(stop - begin, BLOCK_N) - n_whole), num_stages=STAGES):
        acc, peak, total = _add_tile(
            acc, peak, total, q, factor,
            k_codes0, k_codes1, k_scales, k_offsets, k_levels, k0, k1, k2, k3,
            v_codes0, v_codes1, v_scales, v_offsets, v_levels, v0, v1, v2, v3,
            bias, mask, mask_column, base, before, shift,
            lane, begin + (i + tl.where(i < n_before, 0, n_whole)) * BLOCK_N, held, row_start, row_stop,
            D, P, K_KIND, K_BITS, K_GROUP, KT, DV, PV, V_KIND, V_BITS, V_GROUP, VT, BIASED, MASKED, True, BLOCK_N,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def _with_sinks(acc, peak, total, lift, sinks, head, exists):
    """Divide by the weights' sum, which attention sinks have a part in where there are any; lift: of the weights."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=exists, other=-_INF).to(tl.float32) * _LOG2E
        new = tl.maximum(peak, sink)
        safe = tl.where(new == -_INF, 0.0, new)
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.exp2(sink - safe + lift)
        acc = acc * shrink[:, None]
    return acc / tl.maximum(total, 1e-30)[:, None]


@triton.jit(do_not_specialize=[*NUMBERS, "n_splits"], do_not_specialize_on_alignment=[*UNALIGNED, "sink_logits"])
def attend_prefill_kernel(
    queries,
    keys_codes0, keys_codes1, keys_scales, keys_offsets, keys_levels, keys_signs,
    values_codes0, values_codes1, values_scales, values_offsets, values_levels, values_signs,
    body_bias, tail_keys, tail_values, tail_bias, mask, lanes, numbers,
    scale, n_kv_heads, n_queries, capacity, sinks, window,
    q_batch, q_head, q_token, mask_batch, mask_head, mask_token, mask_column,
    end, first, body_rows,
    keys_table, values_table, sink_logits, out, partial, lse, n_splits,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_ROTATED: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_ROTATED: tl.constexpr,
    BODY: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
    P: tl.constexpr, PV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    TAIL_N: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of query rows of a KV head, over a split of its rows. Grid: blocks x splits, H, B.

    out: [B, L, Hq, DV]; or, where there are splits, partial: float32 [n_splits, B * L * Hq, DV], and lse without the
    last axis, in units of log2.
    """
    # The last tokens see most of the chunk: they begin first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program // n_splits
    split = program % n_splits
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    i_lane = sequence * n_kv_heads + kv_head
    end, first, body_rows = counts(numbers, end, first, body_rows)
    start, length, begin = lane_of(lanes, i_lane)

    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = r // GROUP
    head = kv_head * GROUP + r % GROUP
    exists = token < n_queries
    first_token = block * BLOCK_M // GROUP
    last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, n_queries - 1)
    own = end - n_queries
    body_start, tail_start = _starts(token, own, first, sinks, body_rows, window)
    body_first, tail_first = _starts(first_token, own, first, sinks, body_rows, window)
    body_last, tail_last = _starts(last_token, own, first, sinks, body_rows, window)
    body_begin = body_first // BLOCK_N * BLOCK_N
    tail_begin = tl.maximum(begin, tail_first)
    body_stop = length
    tail_stop = own + last_token + 1
    if partial is not None:
        # A split has its share of the tiles of body and tail, one after the other.
        n_body = tl.maximum(tl.cdiv(length - body_begin, BLOCK_N), 0)
        n_tail = tl.maximum(tl.cdiv(tail_stop - tail_begin, TAIL_N), 0)
        share = tl.cdiv(n_body + n_tail, n_splits)
        lo = split * share
        hi = lo + share
        body_stop = tl.minimum(body_stop, body_begin + tl.minimum(hi, n_body) * BLOCK_N)
        body_begin += lo * BLOCK_N
        tail_stop = tl.minimum(tail_stop, tail_begin + tl.maximum(hi - n_body, 0) * TAIL_N)
        tail_begin += tl.maximum(lo - n_body, 0) * TAIL_N

    c = tl.arange(0, P)
    d = tl.arange(0, PV)
    T: tl.constexpr = queries.dtype.element_ty
    KT: tl.constexpr = T if tl.float32 == T or K_KIND <= _EXACT else tl.float16
    VT: tl.constexpr = T if tl.float32 == T or V_KIND <= _EXACT else tl.float16
    q_row = sequence.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    q_at = queries + (tl.multiple_of(q_row, _ALIGNED)[:, None] + c[None, :])
    q_mask = exists[:, None] & (c < D)[None, :]
    mask_row = mask
    if MASKED > 0:
        mask_row = mask + sequence.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
        mask_row += token.to(tl.int64) * mask_token
    factor = tl.full((BLOCK_M,), 1.0, tl.float32) * (scale * _LOG2E)

    acc = tl.zeros((BLOCK_M, PV), tl.float32)
    peak = tl.full((BLOCK_M,), -_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if BODY:
        q = tl.load(q_at, mask=q_mask, other=0.0)
        body_factor = factor
        if K_KIND > _EXACT:
            q = q.to(tl.float32)
            size, over = _power_of_two(q)
            q = q * over[:, None]
            body_factor = factor * size
            if K_ROTATED:
                signs = tl.load(keys_signs + c, mask=c < D, other=0.0)
                q = _hadamard(q * signs[None, :], D & -D, 2 if tl.float32 == T else 1)
            q = q.to(KT)
        k0, k1, k2, k3 = _table(keys_table)
        v0, v1, v2, v3 = _table(values_table)
        acc, peak, total = _add_rows(
            acc, peak, total, q, body_factor,
            keys_codes0, keys_codes1, keys_scales, keys_offsets, keys_levels, k0, k1, k2, k3,
            values_codes0, values_codes1, values_scales, values_offsets, values_levels, v0, v1, v2, v3,
            body_bias, mask_row, mask_column, 0, 0, sinks,
            start, body_begin, body_stop, body_last, length, length, body_start, tl.where(exists, length, 0),
            D, P, K_KIND, K_BITS, K_GROUP, KT, DV, PV, V_KIND, V_BITS, V_GROUP, VT, BIASED, MASKED, BLOCK_N, STAGES,
        )  # fmt: skip
        if V_ROTATED:
            size, over = _power_of_two(acc)
            signs = tl.load(values_signs + d, mask=d < DV, other=0.0)
            acc = _hadamard(acc * over[:, None], DV & -DV, 2) * (size[:, None] * signs[None, :])

    q = tl.load(q_at, mask=q_mask, other=0.0)
    acc, peak, total = _add_rows(
        acc, peak, total, q, factor,
        tail_keys, None, None, None, None, 0, 0, 0, 0,
        tail_values, None, None, None, None, 0, 0, 0, 0,
        tail_bias, mask_row, mask_column, first, sinks, body_rows,
        i_lane.to(tl.int64) * capacity, tail_begin, tail_stop, tl.maximum(begin, tail_last), own + first_token + 1, end,
        tl.maximum(begin, tail_start), tl.where(exists, own + token + 1, 0),
        D, P, 0, 0, 0, T, DV, PV, 0, 0, 0, T, BIASED, MASKED, TAIL_N, TAIL_STAGES,
    )  # fmt: skip

    row = (sequence.to(tl.int64) * n_queries + token) * (n_kv_heads * GROUP) + head
    o_mask = exists[:, None] & (d < DV)[None, :]
    if partial is None:
        x = _with_sinks(acc, peak, total, _LIFT, sink_logits, head, exists)
        tl.store(out + ((row * DV)[:, None] + d[None, :]), x.to(T), mask=o_mask)
    else:
        row += tl.num_programs(2).to(tl.int64) * n_queries * (n_kv_heads * GROUP) * split
        x = _with_sinks(acc, peak, total, _LIFT, None, head, exists)
        tl.store(partial + ((row * DV)[:, None] + d[None, :]), x, mask=o_mask)
        tl.store(lse + row, peak - _LIFT + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n_splits"], do_not_specialize_on_alignment=["sink_logits"])
def prefill_merge_kernel(
    partial, lse, sink_logits, out, n_rows, n_heads, n_splits, DV: tl.constexpr, PV: tl.constexpr, ROWS: tl.constexpr
):
    """One program: the splits of ROWS query rows, [B, L, Hq] as they lie in the output."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PV)
    exists = r < n_rows
    acc = tl.zeros((ROWS, PV), tl.float32)
    peak = tl.full((ROWS,), -_INF, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mask = exists[:, None] & (d < DV)[None, :]
    row = r.to(tl.int64)
    for _ in tl.range(0, bound(n_splits)):
        x = tl.load(partial + ((row * DV)[:, None] + d[None, :]), mask=mask, other=0.0)
        size = tl.load(lse + row, mask=exists, other=-_INF)
        new = tl.maximum(peak, size)
        safe = tl.where(new == -_INF, 0.0, new)
        shrink = tl.exp2(peak - safe)
        weight = tl.exp2(size - safe)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        peak = new
        row += n_rows
    x = _with_sinks(acc, peak, total, 0.0, sink_logits, r % n_heads, exists)
    tl.store(out + ((r.to(tl.int64) * DV)[:, None] + d[None, :]), x.to(out.dtype.element_ty), mask=mask)


_PREFILL = TritonKernel(attend_prefill_kernel)
_MERGE = TritonKernel(prefill_merge_kernel)


# Launches


@dataclass(frozen=True)
class Config:
    """How a launch divides its work. What the defaults are worth, only a GPU can say."""

    block_m: int
    """Query rows of a program: heads of a KV head's group times tokens."""
    block_n: int
    """Rows of a tile of the body."""
    warps: int
    stages: int = 3
    """Tiles of the body on their way at once, the one that is computed included."""
    tail_n: int = 64
    tail_stages: int = 3
    programs: int = 1
    """Programs that a multiprocessor is given: rows are split where there are fewer; 0: they never are."""
    least_tiles: int = 4
    """Tiles of a split, at least."""


def attend_prefill(
    store: LayerStore,
    queries: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    window: int = 0,
    numbers: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return ``[B, Hq, L, Dv]``: `kvmlx.attention.attend` for ``queries [B, Hq, L, D]``, as one launch or two.

    Args:
        store: rows to attend over, of codecs that `formats.unsupported` has nothing against.
        queries: float16, bfloat16 or float32, in the dtype of the store's exact rows.
        scale: factor of the logits.
        sinks: logits ``[Hq]`` that take attention and give no value.
        mask: bool (True = seen) or additive ``[B or 1, Hq or 1, L or 1, T]``.
        window: newest tokens that a token sees, itself included; 0: all.
        numbers: where the kernel reads the lengths instead, for launches that are captured (`operands`).
        config: how the work is divided; None: `configuration`.
    """
    if any(stride % ALIGNED for stride in queries.stride()[:3]):
        queries = queries.contiguous()
    if scale < 0:
        queries, scale = -queries, -scale  # the kernel scales a row's largest product, not its logits
    x = operands(store, queries, scale=scale, mask=mask, window=window, numbers=numbers)
    config = config or configuration(x)
    b, hq, n, _ = queries.shape
    # As the next layer wants it, heads of a token together; handed out as [B, Hq, L, Dv].
    out = torch.empty((b, n, hq, x.value_dim), dtype=queries.dtype, device=queries.device)
    n_blocks = -(-x.group * n // config.block_m)
    n_splits = splits(x, n_blocks, config, processors(queries.device))
    given: dict[str, Tensor | None] = {"out": out, "sink_logits": sinks, "partial": None, "lse": None}
    if n_splits:
        made = {"dtype": torch.float32, "device": queries.device}
        given["partial"] = torch.empty((n_splits, b * n * hq, x.value_dim), **made)
        given["lse"] = torch.empty((n_splits, b * n * hq), **made)
    for side, fmt, dim in zip(SIDES, (x.keys, x.values), (x.key_dim, x.value_dim), strict=True):
        given[f"{side}_table"] = _table_on(fmt, dim, queries.device)
    _launch(
        _PREFILL,
        (n_blocks * max(1, n_splits), x.n_kv_heads, b),
        given,
        x.arguments | {"n_splits": max(1, n_splits)},
        x.constants
        | {
            "P": padded(x.key_dim),
            "PV": padded(x.value_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
            "TAIL_N": config.tail_n,
            "TAIL_STAGES": config.tail_stages,
        },
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if n_splits:
        _launch(
            _MERGE,
            (-(-b * n * hq // MERGED),),
            {name: given[name] for name in ("out", "sink_logits", "partial", "lse")},
            {"n_rows": b * n * hq, "n_heads": hq, "n_splits": n_splits},
            {"DV": x.value_dim, "PV": padded(x.value_dim), "ROWS": MERGED},
            num_warps=4,
        )
    return out.transpose(1, 2)


def _launch(
    kernel: TritonKernel,
    grid: tuple[int, ...],
    optional: dict[str, Tensor | None],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    **options: int,
) -> None:
    """Launch with tensors that may be missing: those are None to the compiler."""
    arguments = arguments | {name: t for name, t in optional.items() if t is not None}
    kernel(grid, arguments, constants | {name: None for name, t in optional.items() if t is None}, **options)


@lru_cache
def _table_on(fmt: Format, dim: int, device: torch.device) -> Tensor | None:
    table = table_of(fmt, dim)
    return None if table is None else constant(table, device)


def splits(x: Operands, n_blocks: int, config: Config, n_processors: int) -> int:
    """Return into how many programs the rows of each lane are split; 0, nothing to merge, where query rows suffice."""
    wanted = n_processors * config.programs // max(1, n_blocks * x.n_kv_heads * x.n_batch)
    if wanted < 2:
        return 0
    return max(1, min(wanted, (x.body_rows + x.tail_rows) // (config.least_tiles * config.block_n)))


def configuration(x: Operands) -> Config:
    """Return the configuration that a launch takes: by formats, head dims, dtype and kind of GPU, not by any length."""
    queries = x.arguments["queries"]
    assert isinstance(queries, Tensor)
    narrow = max(x.key_dim, x.value_dim) <= 128
    if queries.dtype == torch.float32:
        # Without the matrix units, operands and sums of a product are registers of every thread.
        return Config(32, 16, 8, 1, 16, 1)
    chip = chip_of(queries.device)
    if chip.backend == "hip":
        return Config(64, 32, 4, 1, 32, 1)
    # An H100 multiplies out of shared memory; an A100 needs registers for it, and small GPUs have 99 KB of it in all.
    large = 90 <= chip.capability < 120
    if not narrow:
        return Config(128, 32, 8, tail_n=32) if large else Config(32, 64, 4, 2, 32, 2, 2)
    packed = x.keys.kind > FLOAT32 and x.values.kind > FLOAT32
    return Config(128, 128 if packed and large else 64, 8)


def configurations(x: Operands) -> Iterator[Config]:
    """Yield what is worth measuring on a GPU, the default first: some need more shared memory than a GPU has.

    Long tiles have fewer maxima and barriers for a row. With 8 warps a program has a multiprocessor for itself; with 4,
    two share it, and one can dequantize while the other multiplies.
    """
    default = configuration(x)
    yield default
    wide = max(x.key_dim, x.value_dim) > 128
    for block_m, warps, programs, tail_stages in ((128, 8, 1, 3), (64, 4, 2, 2), (128, 4, 2, 2), (256, 8, 1, 2)):
        for block_n in (64, 32) if wide else (128, 64, 32):
            for stages in (3, 4, 2):
                config = Config(block_m, block_n, warps, stages, 32 if wide else 64, tail_stages, programs)
                if config != default:
                    yield config


def padded(dim: int) -> int:
    """Return the channels of a tile: a power of two that the matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())
