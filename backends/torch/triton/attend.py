# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false
"""Attention of one or a few new tokens over a store, split over its rows.

One program takes a split of a lane's body, or of its tail, for some query rows (heads of the KV head's group x new
tokens), which share every code that is read. Rows of the store are the M side of the matrix units' products,
S^T = K q^T, and channels that of O^T = V^T P^T: packed codes become operands in the registers into which they were
loaded (codecs.py), and 8 query rows need no padding.

Affine scales stay out of the inner products. The columns of S^T are (query row, group of channels), and q is laid out
block by block on that diagonal: q . (s c + z) is then a multiply-add per column, and the groups' sum. Columns of O^T
likewise: each group of channels has its own weights, p times its scale. 4 query heads and 2 groups fill the 8 columns
that a product has anyway. Scales meet each code where there are many groups, and in float32: what the factored form
cancels is below a half's precision, but not below a float's.

`attend_merge_kernel` merges the splits by their log-sum-exp: the body's in the values' basis, then the tail's. A store
without body whose tail is one split needs no merging.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmlx.backends.formats import AFFINE, CHANNEL, CODEBOOK, FLOAT32, Format
from kvmlx.backends.torch.triton.codecs import (
    EXACT_KINDS,
    bound,
    compiled_for,
    deal,
    hadamard,
    level_factor,
    load_words,
    product,
    streams,
    streams_of,
)
from kvmlx.backends.torch.triton.launch import TritonKernel, processors
from kvmlx.backends.torch.triton.operands import NUMBERS, UNALIGNED, Operands, counts, lane_of, operands
from kvmlx.store import LayerStore

MAX_QUERIES = 8
"""New tokens up to which this kernel is the one to take."""
COLUMNS = 8
"""Columns of the smallest product of NVIDIA's matrix units: as many are always computed."""
MAX_COLUMNS = 32
"""Columns of a program's products: its accumulators are in registers."""
MAX_GROUPS = 4
"""Groups of channels up to which affine scales stay out of the products."""

_LOG2E = tl.constexpr(1.4426950408889634)
_AFFINE, _CHANNEL, _CODEBOOK = tl.constexpr(AFFINE), tl.constexpr(CHANNEL), tl.constexpr(CODEBOOK)
_LIFT = tl.constexpr(8.0)
"""Weights are 2^8 times larger than they need be: what is far below the largest one is still a normal half."""
_SMALLEST = tl.constexpr(2.0**-100)
_SMALLEST_HALF = tl.constexpr(2.0**-24)


# Kernels


@triton.jit
def _power_of_two(x):
    """Return the power of two at or below x, which is at least 2^-126, and 1 over it."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _near_log2(x):
    """Return the logarithm of x > 0 to a tenth: from its bits, exponent and mantissa."""
    return x.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0


@triton.jit
def _query_rows(q, r, stop, n_queries, q_head, q_token, signs, D: tl.constexpr, P: tl.constexpr,
                ROTATED: tl.constexpr):  # fmt: skip
    """Return the query rows r of a KV head, float32 [R, P], in the keys' basis; q: its head 0, token 0."""
    c = tl.arange(0, P)
    at = (r // n_queries).to(tl.int64) * q_head + (r % n_queries).to(tl.int64) * q_token
    x = tl.load(q + at[:, None] + c[None, :], mask=(r < stop)[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    if ROTATED:
        x = hadamard(x * tl.load(signs + c, mask=c < D, other=0.0)[None, :], D & -D)
    return x


@triton.jit
def _query_streams(x, G: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr):
    """Return the operands of rows x [R, W * S]: S tiles T [W, R * max(G, 1)]; and the groups' sums [R, max(G, 1)]."""
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1] // S
    C: tl.constexpr = R * G if G > 1 else R
    dealt = deal(x, S)
    out = ()
    sums = tl.zeros((16, C), tl.float32)
    for j in tl.static_range(S):
        y = tl.trans(dealt[j])
        if G > 1:
            own = (tl.arange(0, W) * S // GROUP)[:, None] == tl.arange(0, G)[None, :]
            y = tl.reshape(tl.where(own[:, None, :], y[:, :, None], 0.0), (W, C))
        y = y.to(T)
        if G > 0:
            # Summed as it will be multiplied: an operand with two uses does not change its layout anew for every tile.
            sums = tl.dot(tl.full((16, W), 1.0, T), y, sums)
        out += (y,)
    return out, tl.reshape(tl.max(sums, axis=0), (R, C // R))


@triton.jit
def _row_numbers(p, first, rows, live, N: tl.constexpr, G: tl.constexpr):
    """Load the N numbers of each row, float32 [T, G]; zeros beyond N, and where rows are not."""
    g = tl.arange(0, G)
    mask = live[:, None] if G == N else live[:, None] & (g < N)[None, :]
    return tl.load(p + first * N + (rows[:, None] * N + g[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_number(p, first, rows, left, TILE: tl.constexpr):
    """Load the number of each of a tile's rows, float32 [TILE], of which ``left`` exist; zeros for others.

    Several at a time, so that they are copied ahead: rows of a span's head-room, behind the last one, are read too.
    """
    t = tl.arange(0, TILE)
    x = tl.load(p + first + rows, mask=t // 8 * 8 < left, other=0.0)
    return tl.where(t < left, x, 0.0).to(tl.float32)


@triton.jit
def _dequantized(codes, scales, offsets, first, start, rows, live, D: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
                 KIND: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, TURNED: tl.constexpr,
                 T: tl.constexpr):  # fmt: skip
    """Return streams of values for those of affine codes, a tile of rows from ``start`` on."""
    w = tl.arange(0, W)
    out = ()
    if KIND == _CHANNEL:
        first = first // GROUP * D
        if TILE <= GROUP:
            # One block's numbers for all rows of the tile.
            c = tl.arange(0, W * S)
            at = start // GROUP * D + c
            s = deal(tl.load(scales + first + at, mask=c < D, other=0.0).to(T)[None, :], S)
            z = deal(tl.load(offsets + first + at, mask=c < D, other=0.0).to(T)[None, :], S)
            for j in tl.static_range(S):
                out += (codes[j] * s[j] + z[j],)
        else:
            for j in tl.static_range(S):
                c = w * S + j
                at = (rows // GROUP)[:, None] * D + c[None, :]
                mask = live[:, None] & (c < D)[None, :]
                s = tl.load(scales + first + at, mask=mask, other=0.0).to(T)
                z = tl.load(offsets + first + at, mask=mask, other=0.0).to(T)
                out += (codes[j] * s + z,)
    else:
        N: tl.constexpr = D // GROUP
        if TURNED:
            at = rows[None, :] * N + (w * S // GROUP)[:, None]
            mask = live[None, :] & (w * S < D)[:, None]
        else:
            at = rows[:, None] * N + (w * S // GROUP)[None, :]
            mask = live[:, None] & (w * S < D)[None, :]
        s = tl.load(scales + first * N + at, mask=mask, other=0.0).to(T)
        z = tl.load(offsets + first * N + at, mask=mask, other=0.0).to(T)
        for j in tl.static_range(S):
            out += (codes[j] * s + z,)
    return out


@triton.jit
def _attend_rows(
    q, keys_codes0, keys_codes1, keys_scales, keys_offsets, keys_levels, keys_signs,
    values_codes0, values_codes1, values_scales, values_offsets, values_levels,
    bias, mask, mask_column, mask_head, mask_token, sink_logits,
    i_lane, i_split, n_splits, scale, n_queries, q_head, q_token,
    first, lo, hi, seen, newest, window, first_column, sinks, body_rows,
    partial, lse, out_head, out_token,
    D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_ROTATED: tl.constexpr,
    K_STREAMS: tl.constexpr, K_WORDS: tl.constexpr, K_GROUPS: tl.constexpr, K_FACTOR: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_STREAMS: tl.constexpr, V_WORDS: tl.constexpr, V_GROUPS: tl.constexpr, V_FACTOR: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, LARGEST_TILE: tl.constexpr, STAGES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Attend over rows lo .. hi of a lane's body or tail, and write what the split gives.

    first: int64, entry of row 0 in the planes. seen: rows of the tail that new token 0 sees. newest: its column.
    first_column: of row 0. K_GROUPS, V_GROUPS: groups whose scales stay out of the products, padded to a power of
    two; 0: none do. partial: WHOLE: the output, at this lane's first head; else a split's place.
    """
    # AMD's products have 16 columns, and its registers no room for larger tiles of them, or for 4 times as many.
    AMD: tl.constexpr = compiled_for("hip")
    R: tl.constexpr = 16 if AMD and ROWS < 16 else ROWS
    TILE: tl.constexpr = 32 if AMD and LARGEST_TILE > 32 else LARGEST_TILE
    K_KEPT: tl.constexpr = 0 if AMD and R * K_GROUPS > 32 else K_GROUPS
    V_KEPT: tl.constexpr = 0 if AMD and R * V_GROUPS > 32 else V_GROUPS
    M: tl.constexpr = q.dtype.element_ty
    KT: tl.constexpr = M if K_KIND <= EXACT_KINDS or tl.float32 == M else tl.float16
    VT: tl.constexpr = M if V_KIND <= EXACT_KINDS or tl.float32 == M else tl.float16
    KG: tl.constexpr = K_KEPT if K_KEPT > 0 else 1
    VG: tl.constexpr = V_KEPT if V_KEPT > 0 else 1
    MEANS: tl.constexpr = K_KIND == _CODEBOOK and K_GROUP > 0
    SIZED: tl.constexpr = V_KEPT > 0 or V_KIND == _CODEBOOK
    LIFT: tl.constexpr = _LIFT if tl.float16 == VT else 0.0
    n_rows = HEADS * n_queries
    r = tl.program_id(0) * ROWS + tl.arange(0, R)
    stop = tl.minimum(tl.program_id(0) * ROWS + ROWS, n_rows)
    token = r % n_queries

    x = _query_rows(q, r, stop, n_queries, q_head, q_token, keys_signs, D, K_STREAMS * K_WORDS, K_ROTATED)
    unit = tl.full((R,), 1.0, tl.float32) * (scale * _LOG2E)
    if K_KIND > EXACT_KINDS and tl.float16 == KT:
        # The model's dtype may have a larger range than the halves that codes are multiplied by.
        power, inverse = _power_of_two(tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST))
        x = x * inverse[:, None]
        unit = unit * power
    qs, q_sums = _query_streams(x, K_KEPT, K_STREAMS, K_GROUP if K_KEPT > 0 else 1, KT)
    if MEANS:
        q_whole = tl.trans(x).to(KT)

    peak = tl.full((R,), -float("inf"), tl.float32)
    total = tl.zeros((TILE, R), tl.float32)
    zeros = tl.zeros((TILE, R, VG), tl.float32)
    acc = ()
    for _j in tl.static_range(V_STREAMS):
        acc += (tl.zeros((V_WORDS, R * VG), tl.float32),)

    for start in tl.range(bound(lo), bound(hi), TILE, num_stages=STAGES):
        rows = start + tl.arange(0, TILE)
        # Not rows < hi: that would be compared in the 64 bits of the offsets.
        live = tl.arange(0, TILE) < hi - start
        words = load_words(keys_codes0, keys_codes1, first, rows, live, D, K_WORDS, K_KIND, K_BITS, False)
        k = streams(words, keys_levels, K_KIND, K_BITS, K_STREAMS, False, KT)
        if K_KIND == _CHANNEL or (K_KIND == _AFFINE and K_KEPT == 0):
            k = _dequantized(k, keys_scales, keys_offsets, first, start, rows, live, D, K_WORDS, K_STREAMS, K_KIND,
                             K_GROUP, TILE, False, KT)  # fmt: skip
        s = tl.zeros((TILE, R * KG), tl.float32)
        for j in tl.static_range(K_STREAMS):
            s = product(k[j], qs[j], s)
        if KG > 1:
            k_sizes = _row_numbers(keys_scales, first, rows, live, D // K_GROUP, KG)
            k_zeros = _row_numbers(keys_offsets, first, rows, live, D // K_GROUP, KG)
            s = tl.reshape(s, (TILE, R, KG)) * k_sizes[:, None, :] + k_zeros[:, None, :] * q_sums[None, :, :]
            s = tl.sum(s, axis=2)
        elif K_KEPT > 0:
            k_zeros = _row_number(keys_offsets, first, rows, hi - start, TILE)[:, None] * tl.reshape(q_sums, (1, R))
            s = s * _row_number(keys_scales, first, rows, hi - start, TILE)[:, None] + k_zeros
        elif K_KIND == _CODEBOOK:
            s = s * (_row_number(keys_scales, first, rows, hi - start, TILE) * K_FACTOR)[:, None]
        if MEANS:
            # Every row of a block has the block's mean in it.
            c = tl.arange(0, K_STREAMS * K_WORDS)
            mean = tl.load(keys_offsets + (first + start) // K_GROUP * D + c, mask=c < D, other=0.0)
            if tl.float16 == KT:
                s += tl.max(tl.dot(tl.broadcast_to(mean[None, :], (16, K_STREAMS * K_WORDS)), q_whole), axis=0)[None, :]
            else:
                s += tl.sum(mean.to(tl.float32)[:, None] * q_whole, axis=0)[None, :]
        s = s * unit[None, :]
        if BIASED:
            s += (tl.load(bias + first + rows, mask=live, other=0.0) * _LOG2E)[:, None]
        visible = live[:, None]
        if TAIL:
            visible = visible & (rows[:, None] < seen + token[None, :])
        if WINDOWED or MASKED > 0:
            column = first_column + rows
            if TAIL:
                column = tl.where(column < sinks, column, column + body_rows)
            if WINDOWED:
                visible = visible & (column[:, None] > newest + token[None, :] - window)
            if MASKED > 0:
                at = (r // n_queries).to(tl.int64) * mask_head + token.to(tl.int64) * mask_token
                at = at[None, :] + column.to(tl.int64)[:, None] * mask_column
                m = tl.load(mask + at, mask=visible & (r < stop)[None, :], other=0)
                if MASKED == 1:
                    visible = visible & m
                else:
                    s += m.to(tl.float32) * _LOG2E
        s = tl.where(visible, s, -float("inf"))

        # The peak is that of the weights that are multiplied: halves, which must neither overflow nor vanish.
        reach = s
        if VG > 1:
            v_sizes = _row_numbers(values_scales, first, rows, live, DV // V_GROUP, VG)
            reach = s + _near_log2(tl.maximum(tl.max(tl.abs(v_sizes), axis=1), _SMALLEST_HALF))[:, None]
        elif SIZED:
            v_sizes = _row_number(values_scales, first, rows, hi - start, TILE)[:, None]
            reach = s + _near_log2(tl.maximum(tl.abs(v_sizes), _SMALLEST_HALF))
        new = tl.maximum(peak, tl.max(reach, axis=0))
        safe = tl.where(new == -float("inf"), 0.0, new) - LIFT
        shrink = tl.exp2(peak - LIFT - safe)[None, :]
        p = tl.exp2(s - safe[None, :])
        peak = new
        total = total * shrink + p

        words = load_words(values_codes0, values_codes1, first, rows, live, DV, V_WORDS, V_KIND, V_BITS, True)
        v = streams(words, values_levels, V_KIND, V_BITS, V_STREAMS, True, VT)
        weights = p
        if VG > 1:
            weights = tl.reshape(p[:, :, None] * v_sizes[:, None, :], (TILE, R * VG))
        elif SIZED:
            weights = p * v_sizes
        if VG > 1:
            v_zeros = _row_numbers(values_offsets, first, rows, live, DV // V_GROUP, VG)
            zeros = zeros * shrink[:, :, None] + p[:, :, None] * v_zeros[:, None, :]
        elif V_KEPT > 0:
            v_zeros = _row_number(values_offsets, first, rows, hi - start, TILE)[:, None]
            zeros = zeros * shrink[:, :, None] + (p * v_zeros)[:, :, None]
        elif V_KIND == _AFFINE:
            v = _dequantized(v, values_scales, values_offsets, first, start, rows, live, DV, V_WORDS, V_STREAMS, V_KIND,
                             V_GROUP, TILE, True, VT)  # fmt: skip
        weights = weights.to(VT)
        sums = ()
        for j in tl.static_range(V_STREAMS):
            if VG > 1:
                a = tl.reshape(tl.reshape(acc[j], (V_WORDS, R, VG)) * shrink[:, :, None], (V_WORDS, R * VG))
            else:
                a = acc[j] * shrink
            sums += (product(v[j], weights, a),)
        acc = sums

    weight = tl.sum(total, axis=0)
    shrunk = V_FACTOR
    if WHOLE:
        if sink_logits is not None:
            logit = tl.load(sink_logits + r // n_queries, mask=r < stop, other=-float("inf")).to(tl.float32) * _LOG2E
            new = tl.maximum(peak, logit)
            safe = tl.where(new == -float("inf"), 0.0, new)
            shrink = tl.exp2(peak - safe)
            weight = weight * shrink + tl.exp2(logit - safe + LIFT)
            shrunk = shrink[None, :]
        at = (r // n_queries).to(tl.int64) * out_head + token.to(tl.int64) * out_token
    else:
        at = (i_lane.to(tl.int64) * n_rows + r) * n_splits + i_split
        # Without any row the peak is -inf.
        tl.store(lse + at, peak - LIFT + tl.log2(tl.maximum(weight, 1e-30)), mask=r < stop)
        at = at * POSITIONS
    over = 1.0 / tl.maximum(weight, 1e-30)
    w = tl.arange(0, V_WORDS)
    held = (w * V_STREAMS < DV)[:, None] & (r < stop)[None, :]
    if V_KEPT > 0:
        own = ((w * V_STREAMS // V_GROUP)[:, None] == tl.arange(0, VG)[None, :])[:, None, :]
        zero = tl.reshape(tl.sum(zeros, axis=0), (1, R, VG))
    for j in tl.static_range(V_STREAMS):
        y = acc[j] * shrunk
        if V_KEPT > 0:
            y = tl.sum(tl.where(own, tl.reshape(y, (V_WORDS, R, VG)) + zero, 0.0), axis=2)
        y = y * over[None, :]
        tl.store(partial + at[None, :] + (j * V_WORDS + w)[:, None], y.to(M), mask=held)


@triton.jit
def _nothing(lse, i_lane, i_split, n_splits, n_rows, ROWS: tl.constexpr):
    """Say that a split has no rows: what it would have written is not read then."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (i_lane.to(tl.int64) * n_rows + r) * n_splits + i_split
    tl.store(lse + at, tl.full((ROWS,), -float("inf"), tl.float32), mask=r < n_rows)


@triton.jit(
    do_not_specialize=[*NUMBERS, "n_body", "n_tail", "out_batch", "out_head", "out_token"],
    do_not_specialize_on_alignment=[*UNALIGNED, "sink_logits"],
)
def attend_decode_kernel(
    queries,
    keys_codes0, keys_codes1, keys_scales, keys_offsets, keys_levels, keys_signs,
    values_codes0, values_codes1, values_scales, values_offsets, values_levels, values_signs,
    body_bias, tail_keys, tail_values, tail_bias, mask, lanes, numbers,
    scale, n_kv_heads, n_queries, capacity, sinks, window,
    q_batch, q_head, q_token, mask_batch, mask_head, mask_token, mask_column,
    end, first, body_rows,
    partial, lse, sink_logits, n_body, n_tail, out_batch, out_head, out_token,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_ROTATED: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_ROTATED: tl.constexpr,
    BODY: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, WHOLE: tl.constexpr,
    K_STREAMS: tl.constexpr, K_WORDS: tl.constexpr, K_GROUPS: tl.constexpr, K_FACTOR: tl.constexpr,
    V_STREAMS: tl.constexpr, V_WORDS: tl.constexpr, V_GROUPS: tl.constexpr, V_FACTOR: tl.constexpr,
    P: tl.constexpr, PV: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, TAIL_TILE: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a split of a lane's tail or body, for ROWS query rows. Grid: blocks of rows, splits, lanes.

    partial: [B * Hq * L, n_tail + n_body, POSITIONS] in the queries' dtype, the tail's splits first; channels of the
    body's lie stream by stream. lse: float32 [B * Hq * L, n_tail + n_body], in units of log2, -inf where there are no
    rows. WHOLE: there is one split, of the tail; partial is the output, with its strides, and sinks are taken in.
    """
    i_split = tl.program_id(1)
    i_lane = tl.program_id(2)
    n_splits = n_body + n_tail
    end, first, body_rows = counts(numbers, end, first, body_rows)
    start, length, begin = lane_of(lanes, i_lane)
    i_batch = i_lane // n_kv_heads
    i_head = (i_lane % n_kv_heads) * GROUP
    q = queries + i_batch.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    if MASKED > 0:
        mask += i_batch.to(tl.int64) * mask_batch + i_head.to(tl.int64) * mask_head
    if WHOLE:
        partial += i_batch.to(tl.int64) * out_batch + i_head.to(tl.int64) * out_head
        if sink_logits is not None:
            sink_logits += i_head
    # The mask's column of the first of the new tokens.
    newest = end - first + body_rows - n_queries

    if i_split < n_tail:
        n_held = end - begin
        step = tl.cdiv(tl.cdiv(end - first, n_tail), TAIL_TILE) * TAIL_TILE
        lo = i_split * step
        hi = tl.minimum(lo + step, n_held)
        # A lone split writes its output even where it sees nothing.
        if (lo < hi) | WHOLE:
            _attend_rows(
                q, tail_keys, None, None, None, None, None, tail_values, None, None, None, None,
                tail_bias, mask, mask_column, mask_head, mask_token, sink_logits,
                i_lane, i_split, n_splits, scale, n_queries, q_head, q_token,
                i_lane.to(tl.int64) * capacity + begin, lo, hi, n_held - n_queries + 1, newest, window, begin - first,
                sinks, body_rows, partial, lse, out_head, out_token,
                D, DV, GROUP, 0, 0, 0, False, 1, P, 0, 1.0, 0, 0, 0, 1, PV, 0, 1.0,
                BIASED, MASKED, WINDOWED, True, WHOLE, ROWS, TAIL_TILE, TAIL_STAGES, POSITIONS,
            )  # fmt: skip
        else:
            _nothing(lse, i_lane, i_split, n_splits, GROUP * n_queries, ROWS)
    elif BODY:
        step = tl.cdiv(tl.cdiv(body_rows, n_body), UNIT) * UNIT
        lo = (i_split - n_tail) * step
        hi = tl.minimum(lo + step, length)
        if WINDOWED:
            # Rows that no new token sees any more are not read.
            lo = tl.maximum(lo, (newest + 1 - window - sinks) // UNIT * UNIT)
        if lo < hi:
            _attend_rows(
                q, keys_codes0, keys_codes1, keys_scales, keys_offsets, keys_levels, keys_signs,
                values_codes0, values_codes1, values_scales, values_offsets, values_levels,
                body_bias, mask, mask_column, mask_head, mask_token, None,
                i_lane, i_split, n_splits, scale, n_queries, q_head, q_token,
                start, lo, hi, 0, newest, window, sinks, sinks, body_rows, partial, lse, out_head, out_token,
                D, DV, GROUP, K_KIND, K_BITS, K_GROUP, K_ROTATED, K_STREAMS, K_WORDS, K_GROUPS, K_FACTOR,
                V_KIND, V_BITS, V_GROUP, V_STREAMS, V_WORDS, V_GROUPS, V_FACTOR,
                BIASED, MASKED, WINDOWED, False, False, ROWS, TILE, STAGES, POSITIONS,
            )  # fmt: skip
        else:
            _nothing(lse, i_lane, i_split, n_splits, GROUP * n_queries, ROWS)


@triton.jit
def _add_splits(x, total, partial, lse, safe, at, begin, stop, held, POSITIONS: tl.constexpr, CHUNK: tl.constexpr):
    """Add splits begin .. stop to x [P] and their weights to total; held: positions that were written, or None."""
    c = tl.arange(0, x.shape[0])
    for start in tl.range(bound(begin), bound(stop), CHUNK):
        i = start + tl.arange(0, CHUNK)
        w = tl.exp2(tl.load(lse + at + i, mask=i < stop, other=-float("inf")) - safe)
        there = (w > 0.0)[:, None]
        if held is not None:
            there = there & held[None, :]
        y = tl.load(partial + (at + i)[:, None] * POSITIONS + c[None, :], mask=there, other=0.0)
        x += tl.sum(y.to(tl.float32) * w[:, None], axis=0)
        total += tl.sum(w, axis=0)
    return x, total


@triton.jit(
    do_not_specialize=["n_heads", "n_queries", "n_body", "n_tail", "out_batch", "out_head", "out_token"],
    do_not_specialize_on_alignment=["sink_logits"],
)
def attend_merge_kernel(
    partial, lse, sink_logits, signs, out, n_heads, n_queries, n_body, n_tail, out_batch, out_head, out_token,
    DV: tl.constexpr, V_ROTATED: tl.constexpr, V_STREAMS: tl.constexpr, V_WORDS: tl.constexpr,
    POSITIONS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the splits of one query row."""
    P: tl.constexpr = V_STREAMS * V_WORDS
    i_row = tl.program_id(0)
    head = i_row // n_queries % n_heads
    n_splits = n_body + n_tail
    at = i_row.to(tl.int64) * n_splits
    peak = -float("inf")
    for start in tl.range(0, bound(n_splits), 128):
        i = start + tl.arange(0, 128)
        peak = tl.maximum(peak, tl.max(tl.load(lse + at + i, mask=i < n_splits, other=-float("inf")), axis=0))
    logit = -float("inf")
    if sink_logits is not None:
        logit = tl.load(sink_logits + head).to(tl.float32) * _LOG2E
        peak = tl.maximum(peak, logit)
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.exp2(logit - safe)
    c = tl.arange(0, P)
    x = tl.zeros((P,), tl.float32)
    if DV == P:
        x, total = _add_splits(x, total, partial, lse, safe, at, n_tail, n_splits, None, POSITIONS, CHUNK)
    else:
        held = c % V_WORDS * V_STREAMS < DV
        x, total = _add_splits(x, total, partial, lse, safe, at, n_tail, n_splits, held, POSITIONS, CHUNK)
    # Streams lie one after another: channels in their order.
    x = tl.reshape(tl.trans(tl.reshape(x, (V_STREAMS, V_WORDS))), (P,))
    if V_ROTATED:
        x = tl.reshape(hadamard(x[None, :], DV & -DV), (P,)) * tl.load(signs + c, mask=c < DV, other=0.0)
    if DV == P:
        x, total = _add_splits(x, total, partial, lse, safe, at, 0, n_tail, None, POSITIONS, CHUNK)
    else:
        x, total = _add_splits(x, total, partial, lse, safe, at, 0, n_tail, c < DV, POSITIONS, CHUNK)
    i_batch = (i_row // (n_queries * n_heads)).to(tl.int64)
    at = i_batch * out_batch + head.to(tl.int64) * out_head + (i_row % n_queries).to(tl.int64) * out_token
    tl.store(out + at + c, (x / tl.maximum(total, 1e-30)).to(out.dtype.element_ty), mask=c < DV)


_DECODE = TritonKernel(attend_decode_kernel)
_MERGE = TritonKernel(attend_merge_kernel)


# Launches


@dataclass(frozen=True)
class Config:
    """How a launch divides its work."""

    tile: int = 32
    """Rows of the body that a program takes at a time; fewer where a block of the planes has fewer."""
    warps: int = 1
    stages: int = 3
    """Tiles of the body that are on their way or being computed."""
    programs: int = 8
    """Splits are made until each processor has as many programs."""
    least_rows: int = 128
    """Rows of a split of the body, at least."""
    tail_tile: int = 16
    tail_stages: int = 2
    tail_rows: int = 64
    """Rows of a split of the tail, unless there were more than MAX_TAIL_SPLITS."""


MAX_TAIL_SPLITS = 64
MERGE_CHUNK = 32
"""Splits that are merged at a time."""


def attend_decode(
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
    """Return ``[B, Hq, L, Dv]``: `kvmlx.attention.attend` for ``queries [B, Hq, L, D]``, L small, as two launches.

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
    x = operands(store, queries, scale=scale, mask=mask, window=window, numbers=numbers)
    b, hq, n, _ = queries.shape
    dtype, device = queries.dtype, queries.device
    config = config or configuration(x)
    constants = _constants(x.keys, x.values, x.key_dim, x.value_dim, dtype, x.group * n, config)
    n_blocks = -(-x.group * n // constants["ROWS"])
    n_body, n_tail = splits(x, n_blocks, config, processors(device))
    whole = n_body + n_tail == 1
    # As the next layer wants it, heads of a token together; handed out as [B, Hq, L, Dv].
    out = torch.empty((b, n, hq, x.value_dim), dtype=dtype, device=device).transpose(1, 2)
    sizes = {"n_body": n_body, "n_tail": n_tail}
    place = {"out_batch": out.stride(0), "out_head": out.stride(1), "out_token": out.stride(2)}
    given = {} if sinks is None else {"sink_logits": sinks}
    absent = {"sink_logits": None} if sinks is None else {}
    if whole:
        partial, lse = out, out
    else:
        partial = torch.empty((b * hq * n, n_body + n_tail, constants["POSITIONS"]), dtype=dtype, device=device)
        lse = torch.empty((b * hq * n, n_body + n_tail), dtype=torch.float32, device=device)
    flags = {"WINDOWED": window > 0, "WHOLE": whole}
    _DECODE(
        (n_blocks, n_body + n_tail, b * x.n_kv_heads),
        x.arguments | sizes | place | given | {"partial": partial, "lse": lse},
        x.constants | constants | flags | absent,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if whole:
        return out
    merged = {"partial": partial, "lse": lse, "out": out, "n_heads": hq, "n_queries": n} | sizes | place | given
    compiled = {name: constants[name] for name in ("V_STREAMS", "V_WORDS", "POSITIONS")} | absent
    compiled |= {"DV": x.value_dim, "V_ROTATED": x.values.rotated, "CHUNK": MERGE_CHUNK}
    if x.values.rotated:
        merged["signs"] = x.arguments["values_signs"]
    else:
        compiled["signs"] = None
    _MERGE((b * hq * n,), merged, compiled, num_warps=4)
    return out


def takes(store: LayerStore, queries: Tensor) -> bool:
    """Whether this kernel attends, and not prefill's: for a few new tokens."""
    return queries.shape[2] <= MAX_QUERIES


def splits(x: Operands, n_blocks: int, config: Config, n_processors: int) -> tuple[int, int]:
    """Return the splits of the body and of the tail."""
    n_tail = max(1, min(MAX_TAIL_SPLITS, -(-x.tail_rows // config.tail_rows)))
    if not x.constants["BODY"]:
        return 0, n_tail
    wanted = n_processors * config.programs // (x.n_batch * x.n_kv_heads * n_blocks) - n_tail
    return max(1, min(wanted, -(-x.body_rows // config.least_rows))), n_tail


def configuration(x: Operands) -> Config:
    """Return the configuration that a launch takes."""
    float32 = x.arguments["queries"].dtype == torch.float32  # type: ignore[union-attr]
    return _configuration(x.keys, x.values, x.key_dim, x.value_dim, float32, x.group * x.n_queries)


@lru_cache(maxsize=1024)
def _configuration(keys: Format, values: Format, dim: int, value_dim: int, float32: bool, n_rows: int) -> Config:
    """Choose by what a program's accumulators and queries take of the registers.

    Chosen by counting the instructions, registers and bytes of code compiled for an H100; nothing was measured.
    """
    if float32:
        return Config(tile=16, warps=4, stages=2, programs=4)
    rows, groups = _rows(keys, values, dim, value_dim, float32, n_rows)
    numbers = max(_words(dim), _words(value_dim)) * rows * groups
    if numbers > 1024 and keys.kind <= FLOAT32:
        # Rows as they are: shared memory is scarce, not registers.
        return Config(tile=32, warps=2, stages=2, programs=4)
    if numbers > 4096:
        return Config(tile=64, warps=4, programs=2)
    if numbers > 2048 or (numbers > 1024 and max(dim, value_dim) > 128):
        return Config(tile=32, warps=2, stages=2 if keys.kind == CHANNEL else 3, programs=4)
    # What a tile of few bits saves is less than it costs where words are padded.
    few_bits = {keys.bits, values.bits} <= {1, 2} or (CODEBOOK in (keys.kind, values.kind) and keys.bits != 5)
    padded = _words(dim) != dim or _words(value_dim) != value_dim
    return Config(tile=64 if numbers <= 512 or (few_bits and not padded and numbers <= 1024) else 32)


def configurations(x: Operands) -> Iterator[Config]:
    """Yield what is worth measuring on a GPU, the default first."""
    default = configuration(x)
    yield default
    seen = {default}
    for tile, warps in ((32, 1), (64, 1), (64, 2), (128, 2), (64, 4), (128, 4)):
        for stages in (3, 4, 2):
            for warps_of_processor in (8, 12, 16):
                programs = warps_of_processor // warps
                config = replace(default, tile=tile, warps=warps, stages=stages, programs=programs)
                if config not in seen:
                    yield config
                    seen.add(config)


@lru_cache(maxsize=1024)
def _constants(
    keys: Format, values: Format, dim: int, value_dim: int, dtype: torch.dtype, n_rows: int, config: Config
) -> dict[str, Any]:
    """Return what is compiled in besides `Operands.constants`."""
    float32 = dtype == torch.float32
    made = _side("K", keys, dim, float32) | _side("V", values, value_dim, float32)
    rows, _ = _rows(keys, values, dim, value_dim, float32, n_rows)
    block = max(keys.block, values.block)
    tile = min(config.tile, block) if block >= 16 else config.tile
    pv = _words(value_dim)
    return made | {
        "P": _words(dim),
        "PV": pv,
        "POSITIONS": max(pv, made["V_STREAMS"] * made["V_WORDS"]),
        "ROWS": rows,
        "TILE": tile,
        "UNIT": max(tile, block),
        "STAGES": config.stages,
        "TAIL_TILE": config.tail_tile,
        "TAIL_STAGES": config.tail_stages,
    }


def _side(name: str, fmt: Format, dim: int, float32: bool) -> dict[str, Any]:
    n = streams_of(fmt)
    return {
        f"{name}_STREAMS": n,
        f"{name}_WORDS": _words(dim, n),
        f"{name}_GROUPS": _groups(fmt, dim, float32),
        f"{name}_FACTOR": level_factor(fmt, dim, float32),
    }


def _groups(fmt: Format, dim: int, float32: bool) -> int:
    """Return the groups whose scales stay out of the products, padded to a power of two; 0: another way is taken."""
    groups = _power_of_two_from(dim // fmt.group) if fmt.kind == AFFINE and not float32 else 0
    return groups if groups <= MAX_GROUPS else 0


def _rows(keys: Format, values: Format, dim: int, value_dim: int, float32: bool, n_rows: int) -> tuple[int, int]:
    """Return the query rows of a program, and the columns that one takes."""
    groups = max(1, _groups(keys, dim, float32), _groups(values, value_dim, float32))
    return max(-(-COLUMNS // groups), min(_power_of_two_from(n_rows), MAX_COLUMNS // groups)), groups


def _words(dim: int, n_streams: int = 1) -> int:
    """Return the words of a row of n streams, padded to a power of two that the matrix units take."""
    return max(16, _power_of_two_from(dim) // n_streams)


def _power_of_two_from(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
