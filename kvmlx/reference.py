"""Float64 oracles of every primitive: explicit NumPy, written from the papers and docs/format.md alone.

The code under test never imports this module and this module imports none of it. A function that takes
``dtype`` is also the plain low-precision implementation that the tolerance policy compares with.
Letters are those of ``kvmlx.types``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmlx.types import Rotary

Float = NDArray[np.floating[Any]]
Codes = NDArray[np.uint8]
Half = NDArray[np.float16]

HALF_MAX = 65504.0
SIGN_SEED = 0
"""Where the rotation's splitmix64 starts: one rotation for every model and layer."""
PLANE_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Code bits to plane bits, lowest bits first."""


# Attention


def masked_logits(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    scale: float,
    causal: bool = True,
    bias: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    dtype: type = np.float64,
) -> Float:
    """Return ``[B, Hq, L, T]``: scaled products, plus ``bias [B, H, T]``, -inf where a query may not look.

    Causal is lower-right aligned: query i sees keys ``0 .. T - L + i``. ``valid [B, T]`` is False for keys
    that do not exist.
    """
    q, k = np.asarray(queries, dtype), np.asarray(keys, dtype)
    n, t, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    s = q @ np.swapaxes(np.repeat(k, group, axis=1), -1, -2) * dtype(scale)
    if bias is not None:
        s = s + np.repeat(np.asarray(bias, dtype), group, axis=1)[:, :, None, :]
    if causal:
        s = np.where(np.arange(t)[None, :] <= np.arange(n)[:, None] + (t - n), s, dtype(-np.inf))
    if valid is not None:
        s = np.where(np.asarray(valid, bool)[:, None, None, :], s, dtype(-np.inf))
    return s


def log_sum_exp(x: Float, axis: int = -1) -> Float:
    """Return ``ln sum exp x`` along ``axis``; -inf where all are -inf or there is none."""
    peak = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    safe = np.where(np.isfinite(peak), peak, x.dtype.type(0))
    with np.errstate(divide="ignore"):
        return np.squeeze(safe, axis) + np.log(np.sum(np.exp(x - safe), axis=axis))


def softmax(x: Float) -> Float:
    """Softmax over the last axis; a row that is all -inf gives zeros."""
    lse = log_sum_exp(x)[..., None]
    return np.exp(x - np.where(np.isfinite(lse), lse, x.dtype.type(0)))


def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    scale: float,
    causal: bool = True,
    bias: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    dtype: type = np.float64,
) -> tuple[Float, Float]:
    """Return the output ``[B, Hq, L, Dv]`` and its log-sum-exp ``[B, Hq, L]``.

    ``sinks [Hq]`` are logits of a key with value zero: they join the denominator, and the log-sum-exp, so in
    a merge of segments exactly one segment has them. A query that sees nothing gives 0 and -inf.
    """
    s = masked_logits(queries, keys, scale=scale, causal=causal, bias=bias, valid=valid, dtype=dtype)
    v = np.asarray(values, dtype)
    v = np.repeat(v, s.shape[1] // v.shape[1], axis=1)
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, dtype)[None, :, None, None], (*s.shape[:3], 1))
        s = np.concatenate([s, column], axis=-1)
        v = np.concatenate([v, np.zeros((*v.shape[:2], 1, v.shape[3]), dtype)], axis=2)
    return softmax(s) @ v, log_sum_exp(s)


def merge_segments(parts: Sequence[tuple[Float, Float]]) -> tuple[Float, Float]:
    """Merge (output, log-sum-exp) of disjoint sets of keys into those of their union."""
    lse = np.stack([p[1] for p in parts], axis=-1)
    weights = softmax(lse)
    out = sum(weights[..., i, None] * p[0] for i, p in enumerate(parts))
    return np.asarray(out), log_sum_exp(lse)


def column_sums(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    scale: float,
    n_queries: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    dtype: type = np.float64,
) -> Float:
    """Return ``[B, Hq, T]``: attention received, summed over the queries, from the full ``[L, T]`` matrix."""
    p = softmax(masked_logits(queries, keys, scale=scale, bias=bias, dtype=dtype))
    if n_queries is not None:
        counted = np.arange(p.shape[2])[None, :] < np.asarray(n_queries)[:, None]
        p = p * counted[:, None, :, None]
    return p.sum(axis=2)


def column_sums_two_pass(queries: ArrayLike, keys: ArrayLike, *, scale: float, block: int) -> Float:
    """Equal ``column_sums`` from each query's log-sum-exp (pass 1), in tiles of ``block`` keys (pass 2)."""
    q, k = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    n, t, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k = np.repeat(k, group, axis=1)
    own = np.arange(n)[:, None] + (t - n)
    tiles = []
    for start in range(0, t, block):
        index = np.arange(start, min(t, start + block))
        s = scale * np.einsum("bhld,bhtd->bhlt", q, k[:, :, index])
        tiles.append(np.where(index <= own, s, -np.inf))
    lse = log_sum_exp(np.stack([log_sum_exp(s) for s in tiles], axis=-1))
    return np.concatenate([np.exp(s - lse[..., None]).sum(axis=2) for s in tiles], axis=-1)


# Bit planes


def pack(codes: ArrayLike, bits: int) -> list[Codes]:
    """Pack codes ``[..., D]`` to planes ``[..., D * width / 8]``, lowest bits first, one bit at a time.

    In a plane of ``width`` bits, bit j of channel c is bit ``c * width + j`` of the row; bit n of a row is
    bit ``n % 8`` of its byte ``n // 8``.
    """
    codes = np.asarray(codes).astype(np.uint32)
    planes, low = [], 0
    for width in PLANE_WIDTHS[bits]:
        plane = np.zeros((*codes.shape[:-1], codes.shape[-1] * width // 8), np.uint8)
        for c in range(codes.shape[-1]):
            for j in range(width):
                n = c * width + j
                bit = (codes[..., c] >> (low + j)) & 1
                plane[..., n // 8] |= (bit << (n % 8)).astype(np.uint8)
        planes.append(plane)
        low += width
    return planes


def unpack(planes: Sequence[ArrayLike], bits: int, dim: int) -> Codes:
    """Return the codes ``[..., dim]`` of ``pack``, one bit at a time."""
    first = np.asarray(planes[0])
    codes = np.zeros((*first.shape[:-1], dim), np.uint8)
    low = 0
    for width, plane in zip(PLANE_WIDTHS[bits], planes, strict=True):
        for c in range(dim):
            for j in range(width):
                n = c * width + j
                bit = (np.asarray(plane)[..., n // 8] >> (n % 8)) & 1
                codes[..., c] |= (bit << (low + j)).astype(np.uint8)
        low += width
    return codes


# Affine codes


def to_half(x: ArrayLike) -> Half:
    """Clamp to the finite float16 range and round to nearest even."""
    return np.clip(np.asarray(x, np.float64), -HALF_MAX, HALF_MAX).astype(np.float16)


def default_group(dim: int) -> int:
    """Return the largest of 64, 32, 16, 8 that divides ``dim``."""
    return next(g for g in (64, 32, 16, 8) if dim % g == 0)


def _affine(x: Float, bits: int, axis: int) -> tuple[Float, Half, Half]:
    """Return real-valued codes, scales and zeros of the groups along ``axis`` (kept with length 1)."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scales, zeros = to_half((high - low) / (2**bits - 1)), to_half(low)
    s, z = scales.astype(np.float64), zeros.astype(np.float64)
    return np.where(s > 0, (x - z) / np.where(s > 0, s, 1.0), 0.0), scales, zeros


def _round_codes(real: Float, bits: int) -> Codes:
    return np.clip(np.rint(real), 0, 2**bits - 1).astype(np.uint8)


def affine_encode(x: ArrayLike, bits: int, group_size: int) -> tuple[Codes, Half, Half]:
    """Encode groups of channels of ``[..., D]``: codes ``[..., D]``, scales, zeros ``[..., D / group]``."""
    real, scales, zeros = affine_real_codes(x, bits, group_size)
    return _round_codes(real, bits), scales, zeros


def affine_real_codes(x: ArrayLike, bits: int, group_size: int) -> tuple[Float, Half, Half]:
    """Return ``affine_encode`` before the codes are rounded: the distance to a half is their margin."""
    x = np.asarray(x, np.float64)
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    real, scales, zeros = _affine(grouped, bits, -1)
    return real.reshape(x.shape), scales[..., 0], zeros[..., 0]


def affine_decode(codes: Codes, scales: Half, zeros: Half, dtype: type = np.float64) -> Float:
    """Return ``scale * code + zero`` ``[..., D]``."""
    group_size = codes.shape[-1] // scales.shape[-1]
    s, z = (np.repeat(a.astype(dtype), group_size, axis=-1) for a in (scales, zeros))
    return s * codes.astype(dtype) + z


def channel_encode(x: ArrayLike, bits: int, group_size: int) -> tuple[Codes, Half, Half]:
    """Encode ``[..., n, D]`` in groups of consecutive rows per channel (KIVI's keys).

    Codes ``[..., n, D]``; scales and zeros ``[..., n / group, D]``.
    """
    real, scales, zeros = channel_real_codes(x, bits, group_size)
    return _round_codes(real, bits), scales, zeros


def channel_real_codes(x: ArrayLike, bits: int, group_size: int) -> tuple[Float, Half, Half]:
    """Return ``channel_encode`` before the codes are rounded."""
    x = np.asarray(x, np.float64)
    *lead, n, d = x.shape
    real, scales, zeros = _affine(x.reshape(*lead, n // group_size, group_size, d), bits, -2)
    return real.reshape(x.shape), scales[..., 0, :], zeros[..., 0, :]


def channel_decode(codes: Codes, scales: Half, zeros: Half, dtype: type = np.float64) -> Float:
    """Return ``scale * code + zero`` ``[..., n, D]``, scales and zeros shared by consecutive rows."""
    group_size = codes.shape[-2] // max(1, scales.shape[-2])
    s, z = (np.repeat(a.astype(dtype), group_size, axis=-2) for a in (scales, zeros))
    return s * codes.astype(dtype) + z


# Rotation and code book


def signs(seed: int, dim: int) -> Float:
    """Return ``dim`` signs: -1 where bit 63 of the i-th output of splitmix64 from ``seed`` is set."""
    mask, state, out = 2**64 - 1, seed & (2**64 - 1), []
    for _ in range(dim):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        out.append(-1.0 if z >> 63 else 1.0)
    return np.array(out)


def hadamard_matrix(n: int) -> Float:
    """Return Sylvester's orthonormal ``[n, n]``: ``(-1) ** popcount(i & j) / sqrt(n)``."""
    i = np.arange(n)
    odd = np.array([[int(a & b).bit_count() & 1 for b in i] for a in i])
    return (1 - 2 * odd) / math.sqrt(n)


def hadamard_block(dim: int) -> int:
    """Return the largest power of two that divides ``dim``."""
    return dim & -dim


@cache
def _rotation(dim: int, seed: int | None) -> Float:
    block = hadamard_block(dim)
    h = np.kron(np.eye(dim // block), hadamard_matrix(block))
    return h if seed is None else h * signs(seed, dim)[None, :]


def rotate(x: ArrayLike, seed: int | None, dtype: type = np.float64) -> Float:
    """Return ``H S x`` of ``[..., D]``: signs, then Hadamard blocks. ``seed=None`` leaves the signs out."""
    x = np.asarray(x, dtype)
    return x @ _rotation(x.shape[-1], seed).T.astype(dtype)


def unrotate(y: ArrayLike, seed: int | None, dtype: type = np.float64) -> Float:
    """Undo ``rotate``: the matrix is orthogonal."""
    y = np.asarray(y, dtype)
    return y @ _rotation(y.shape[-1], seed).astype(dtype)


@cache
def lloyd_max(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ``2 ** bits`` levels of the Lloyd-Max code book of N(0, 1) and their midpoints."""
    half = 2 ** (bits - 1)
    levels = np.arange(0.5, half) * 4 / half
    for step in range(60):
        edges = np.array([0.0, *(levels[:-1] + levels[1:]) / 2, np.inf])
        # The upper tail (erfc) keeps the mass of the outermost cell exact.
        mass = -np.diff([math.erfc(e / math.sqrt(2)) / 2 for e in edges])
        density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
        centroids = -np.diff(density) / mass
        if step < 40:
            levels = centroids
            continue
        # Lloyd's own iteration converges linearly, and slowly from 5 bits on: Newton finishes it.
        finite = edges[1:-1]
        to_upper = density[1:-1] * (finite - centroids[:-1]) / mass[:-1] / 2
        to_lower = density[1:-1] * (centroids[1:] - finite) / mass[1:] / 2
        slope = np.diag(to_upper, 1) + np.diag(to_lower, -1)
        slope += np.diag(np.append(to_upper, 0.0) + np.insert(to_lower, 0, 0.0))
        levels = levels - np.linalg.solve(np.eye(half) - slope, levels - centroids)
    full = [*-levels[::-1], *levels]
    return tuple(map(float, full)), tuple(float(a + b) / 2 for a, b in pairwise(full))


def codebook_encode(
    y: ArrayLike, bits: int, *, scale: str = "unbiased", center: int = 0
) -> tuple[Codes, Half, Half | None]:
    """Encode rotated rows ``[..., n, D]``: codes ``[..., n, D]``, scales ``[..., n, 1]``, means or None.

    With ``center``, means ``[..., n / center, D]`` of consecutive rows are rounded to float16 and removed.
    A code counts the thresholds strictly below ``sqrt(D) y / ||y||``, and stands for ``level / sqrt(D)``.
    The scale is ``||y|| / <y / ||y||, y^>`` ("unbiased") or ``||y||`` ("norm"); a zero row has scale 0.
    """
    _, codes, scales, means = codebook_parts(y, bits, scale=scale, center=center)
    return codes, to_half(scales), means


def codebook_parts(
    y: ArrayLike, bits: int, *, scale: str = "unbiased", center: int = 0
) -> tuple[Float, Codes, Float, Half | None]:
    """Return normalised channels, codes, scales before rounding and means of ``codebook_encode``."""
    y = np.asarray(y, np.float64)
    *lead, n, d = y.shape
    means = None
    if center:
        means = to_half(y.reshape(*lead, n // center, center, d).mean(axis=-2))
        y = y - np.repeat(means.astype(np.float64), center, axis=-2)
    levels, thresholds = (np.array(a) for a in lloyd_max(bits))
    norm = np.sqrt((y * y).sum(axis=-1, keepdims=True))
    unit = y / np.where(norm > 0, norm, 1.0)
    codes = (unit[..., None] * math.sqrt(d) > thresholds).sum(axis=-1).astype(np.uint8)
    if scale == "norm":
        return unit * math.sqrt(d), codes, norm, means
    overlap = (unit * levels[codes]).sum(axis=-1, keepdims=True) / math.sqrt(d)
    return unit * math.sqrt(d), codes, norm / np.where(norm > 0, overlap, 1.0), means


def codebook_decode(codes: Codes, scales: Half, means: Half | None, bits: int, dtype: type = np.float64) -> Float:
    """Return ``scale * level / sqrt(D) (+ mean)`` ``[..., n, D]`` in the rotated basis."""
    d = codes.shape[-1]
    levels = np.array(lloyd_max(bits)[0]).astype(dtype)
    y = scales.astype(dtype) * (levels / dtype(math.sqrt(d)))[codes]
    if means is None:
        return y
    return y + np.repeat(means.astype(dtype), codes.shape[-2] // max(1, means.shape[-2]), axis=-2)


# Scores of rows, [B, H, T], larger is kept


def group_mean(x: Float, n_kv_heads: int) -> Float:
    """Average ``[B, Hq, ...]`` over the query heads of each KV head."""
    return x.reshape(x.shape[0], n_kv_heads, -1, *x.shape[2:]).mean(axis=2)


def streaming_scores(keys: ArrayLike) -> Float:
    """Newer is better: the row index (StreamingLLM)."""
    b, h, t, _ = np.shape(keys)
    return np.broadcast_to(np.arange(t, dtype=np.float64), (b, h, t))


def h2o_scores(queries: ArrayLike, keys: ArrayLike, *, scale: float) -> Float:
    """Attention received, summed over the queries, mean over the group (H2O)."""
    return group_mean(column_sums(queries, keys, scale=scale), np.shape(keys)[1])


def tova_scores(queries: ArrayLike, keys: ArrayLike, *, scale: float) -> Float:
    """Attention of the last query, mean over ALL heads, the same for every KV head (TOVA)."""
    p = softmax(masked_logits(np.asarray(queries)[:, :, -1:], keys, scale=scale))
    b, h, t, _ = np.shape(keys)
    return np.broadcast_to(p.mean(axis=(1, 2))[:, None, :], (b, h, t))


def snapkv_scores(queries: ArrayLike, keys: ArrayLike, *, scale: float, kernel: int = 5) -> Float:
    """Attention of the last W queries, mean over them, average-pooled, mean over the group (SnapKV).

    Pooling sees only the ``T - W`` rows before the window, with zeros beyond either end, which count
    (torch's ``count_include_pad``). The window's own rows have +inf: the method keeps them.
    """
    w, t, h = np.shape(queries)[2], np.shape(keys)[2], np.shape(keys)[1]
    received = column_sums(queries, keys, scale=scale)[:, :, : t - w] / w
    padded = np.pad(received, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
    pooled = sum(padded[:, :, i : i + t - w] for i in range(kernel)) / kernel
    own = np.full((len(received), h, w), np.inf)
    return np.concatenate([group_mean(np.asarray(pooled), h), own], axis=2)


def keydiff_scores(keys: ArrayLike) -> Float:
    """Minus the cosine with the mean of the normalised keys (KeyDiff)."""
    k = np.asarray(keys, np.float64)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    anchor = unit.mean(axis=2, keepdims=True)
    return -(unit * anchor).sum(axis=-1) / np.linalg.norm(anchor, axis=-1)


def leverage_scores(rows: ArrayLike, *, ridge: float = 0.01) -> Float:
    """Diagonal of the hat matrix of the centred, standardised rows, with a ridge (leverage)."""
    x = np.asarray(rows, np.float64)
    x = (x - x.mean(axis=2, keepdims=True)) / x.std(axis=2, keepdims=True)
    t, d = x.shape[2:]
    transposed = np.swapaxes(x, 2, 3)
    hat = x @ np.linalg.solve(transposed @ x + ridge * t * np.eye(d), transposed)
    return np.diagonal(hat, axis1=2, axis2=3).copy()


def knorm_scores(keys: ArrayLike) -> Float:
    """Minus the norm of the key (Knorm)."""
    return -np.linalg.norm(np.asarray(keys, np.float64), axis=-1)


def expected_attention_scores(
    keys: ArrayLike,
    values: ArrayLike,
    query_mean: ArrayLike,
    query_cov: ArrayLike,
    *,
    scale: float,
    rotary: Rotary,
    length: int,
    n_future: int = 512,
    epsilon: float = 0.0,
    covariance: bool = True,
    value_norm: bool = True,
) -> Float:
    """Expected attention of future Gaussian queries, times the norm of the value (Expected Attention).

    ``query_mean [B, Hq, D]`` and ``query_cov [B, Hq, D, D]`` are pre-RoPE. The mean rotation of positions
    ``length .. length + n_future - 1`` is applied to both, then ``z = scale k.mu + scale^2 k' Sigma k / 2``,
    and the score is ``(mean over group softmax(z) + epsilon) * ||v||``.
    """
    k = np.asarray(keys, np.float64)
    mu, cov = np.asarray(query_mean, np.float64), np.asarray(query_cov, np.float64)
    h, group = k.shape[1], mu.shape[1] // k.shape[1]
    r = mean_rotation(rotary, k.shape[-1], length, n_future)
    mu, cov = mu @ r.T, r @ cov @ r.T
    k = np.repeat(k, group, axis=1)
    z = scale * np.einsum("bhtd,bhd->bht", k, mu)
    if covariance:
        z = z + scale**2 / 2 * np.einsum("bhtd,bhde,bhte->bht", k, cov, k)
    score = group_mean(softmax(z), h) + epsilon
    return score * np.linalg.norm(np.asarray(values, np.float64), axis=-1) if value_norm else score


def top_rows(scores: ArrayLike, count: int) -> NDArray[np.int32]:
    """Return the ``count`` best of ``[..., T]``, ascending; ties go to the older row."""
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    return np.sort(order[..., :count], axis=-1).astype(np.int32)


def keep_rows(scores: ArrayLike, count: int, *, sinks: int, recent: int) -> NDArray[np.int32]:
    """Return ``count`` rows, ascending: the first ``sinks``, the last ``recent``, then the best."""
    s = np.array(scores, np.float64)
    s[..., :sinks] = np.inf
    s[..., max(0, s.shape[-1] - recent) :] = np.inf
    return top_rows(s, count)


# Budgets


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Round down shares that sum to ``total``; the rest goes to the largest remainders, the earlier first."""
    whole = [math.floor(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def pyramid_paper_capacities(n_layers: int, budget: int, window: int, tokens: int, beta: int = 20) -> list[int]:
    """Return rows kept per layer, window included, by PyramidKV's own integer rule (not an exact sum)."""
    low = (budget - window) // beta
    high = 2 * (budget - window) - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * (budget - window) - high
    step = (high - low) // (n_layers - 1)
    return [high - layer * step + window for layer in range(n_layers)]


def pyramid_shares(n_layers: int, tokens: int, limit: int, protected: int, beta: int = 20) -> list[Fraction]:
    """Return the real-valued budgets per layer of PyramidKV; their sum is ``n_layers * tokens``.

    With c = ``tokens - protected``, linear from ``2 c - c / beta`` down to ``c / beta``, plus the protected;
    where the first would exceed what exists it is cut to that and the last is raised by as much.
    """
    c = Fraction(tokens - protected)
    low = c / beta
    high = min(2 * c - low, Fraction(limit - protected))
    low = 2 * c - high
    if n_layers == 1:
        return [Fraction(tokens)]
    return [protected + high - (high - low) * Fraction(i, n_layers - 1) for i in range(n_layers)]


def pyramid_budgets(n_layers: int, tokens: int, limit: int, protected: int, beta: int = 20) -> list[int]:
    """Return integer budgets per layer that sum to ``n_layers * tokens`` exactly."""
    return largest_remainder(pyramid_shares(n_layers, tokens, limit, protected, beta), n_layers * tokens)


def adakv_scores(scores: ArrayLike, tokens: int) -> Float:
    """Scale each head of ``[H, T]`` by the share of its sum that its best ``tokens`` rows hold (Ada-KV)."""
    s = np.asarray(scores, np.float64)
    best = np.sort(s, axis=-1)[:, ::-1][:, :tokens].sum(axis=-1)
    return s * (best / s.sum(axis=-1))[:, None]


def adakv_budgets(
    scores: ArrayLike, tokens: int, *, floor: Fraction = Fraction(1, 5), normalize: bool = True
) -> NDArray[np.int64]:
    """Return rows per head ``[H]`` that sum to ``H * tokens`` exactly (Ada-KV).

    ``1 - floor`` times a head's count among the best ``H * tokens`` of all heads, plus ``floor * tokens``.
    """
    s = adakv_scores(scores, tokens) if normalize else np.asarray(scores, np.float64)
    h, t = s.shape
    winners = np.argsort(-s.reshape(-1), kind="stable")[: h * tokens] // t
    counts = np.bincount(winners, minlength=h)
    shares = [(1 - floor) * int(c) + floor * tokens for c in counts]
    return np.array(largest_remainder(shares, h * tokens))


# Merging (KeepKV)


def log_score(queries: ArrayLike, keys: ArrayLike, *, scale: float, dtype: type = np.float64) -> Float:
    """Return ``ln s [n]`` of ``keys [n, D]``: the log of the mean of exp(logit) over ``queries [m, D]``."""
    q = np.asarray(queries, dtype)
    s = np.asarray(keys, dtype) @ q.T * dtype(scale)
    return log_sum_exp(s) - dtype(math.log(len(q)))


def merge_rows(
    keys: ArrayLike,
    values: ArrayLike,
    log_votes: ArrayLike,
    queries: ArrayLike,
    *,
    scale: float,
    form: str = "bias",
    dtype: type = np.float64,
) -> tuple[Float, Float, float]:
    """Merge rows ``[n, D]`` into one: key, value and the bias ``beta`` that attention adds to its logit.

    With ``w = votes * s`` (`log_score`) the value is the w-weighted mean. ``form``:
    "zip", the paper: the key is the w-weighted mean times ``ln(sum w / sum votes) / mean_w(ln s)`` and beta
    the log of the sum of votes. "guarded": the same, the factor 1 unless it lies in (0.8, 1.25).
    "bias": factor 1, ``beta = ln sum w - ln s(new key)``. With one query all but "guarded" keep its output.
    """
    k, v, p = (np.asarray(a, dtype) for a in (keys, values, log_votes))
    s = log_score(queries, k, scale=scale, dtype=dtype)
    w = softmax(p + s)
    if form == "bias":
        own = log_score(queries, (w @ k)[None], scale=scale, dtype=dtype)[0]
        return w @ k, w @ v, float(log_sum_exp(p + s) - own)
    factor = zip_factor(p, s)
    if form == "guarded" and not 0.8 < factor < 1.25:
        factor = 1.0
    return dtype(factor) * (w @ k), w @ v, float(log_sum_exp(p))


def zip_factor(log_votes: Float, log_scores: Float) -> float:
    """Return KeepKV's key factor; 1 where its denominator vanishes."""
    logit = float(softmax(log_votes + log_scores) @ log_scores)
    total = float(log_sum_exp(log_votes + log_scores) - log_sum_exp(log_votes))
    return total / logit if abs(logit) > 1e-12 else 1.0


@dataclass(frozen=True)
class Folded:
    """The kept rows after a merge, and how far the nearest decision was from falling the other way."""

    keys: Float
    values: Float
    bias: Float
    margins: list[float]


def keepkv_fold(
    keys: ArrayLike,
    values: ArrayLike,
    queries: ArrayLike,
    kept: ArrayLike,
    dropped: ArrayLike,
    *,
    scale: float,
    similarity: float,
    bias: ArrayLike | None = None,
    form: str = "bias",
    dtype: type = np.float64,
) -> Folded:
    """Merge each dropped row into the kept row with the most similar key, where cosine >= similarity.

    Rows ``[1, H, T, D]``, indices ``[1, H, C]`` and ``[1, H, T - C]``. All rows that join one merge at once.
    ``bias`` is the log of the votes. ``form`` "paper" is "guarded" of ``merge_rows``.
    """
    k, v = np.asarray(keys, dtype), np.asarray(values, dtype)
    votes = np.zeros(k.shape[:3], dtype) if bias is None else np.asarray(bias, dtype)
    out_k, out_v, out_bias = ([[] for _ in range(k.shape[1])] for _ in range(3))
    margins = [np.inf]
    for head in range(k.shape[1]):
        stay, leave = np.asarray(kept)[0, head], np.asarray(dropped)[0, head]
        own = np.split(np.asarray(queries, dtype)[0], k.shape[1])[head].reshape(-1, k.shape[-1])
        unit = k[0, head] / np.linalg.norm(k[0, head], axis=-1, keepdims=True)
        cosine = unit[leave] @ unit[stay].T
        best = np.sort(cosine, axis=-1)[:, -2:]
        margins += [float(np.abs(best[:, 1] - similarity).min()), float((best[:, 1] - best[:, 0]).min())]
        joins = np.where(best[:, 1] >= similarity, cosine.argmax(axis=-1), -1)
        for i, row in enumerate(stay):
            members = [int(row), *leave[joins == i]]
            rows_k, rows_v, rows_p = (a[0, head, members] for a in (k, v, votes))
            merged = rows_k[0], rows_v[0], rows_p[0]
            if len(members) > 1:
                inner = "guarded" if form == "paper" else form
                merged = merge_rows(rows_k, rows_v, rows_p, own, scale=scale, form=inner, dtype=dtype)
            if len(members) > 1 and form == "paper":
                s = log_score(own, rows_k, scale=scale, dtype=dtype)
                factor = zip_factor(rows_p, s)
                margins += [abs(factor - 0.8), abs(factor - 1.25)]
                # The factor's denominator: near zero it magnifies rounding.
                margins.append(float(abs(softmax(rows_p + s) @ s)) / 10)
            out_k[head].append(merged[0])
            out_v[head].append(merged[1])
            out_bias[head].append(merged[2])
    return Folded(np.array([out_k]), np.array([out_v]), np.array([out_bias]), margins)


# Rotary positions


def _angles(positions: ArrayLike, rotary: Rotary) -> Float:
    return np.asarray(positions, np.float64)[:, None] * np.array(rotary.frequency, np.float64)[None, :]


def rope(x: ArrayLike, positions: ArrayLike, rotary: Rotary) -> Float:
    """Rotate ``[..., n, D]`` at ``positions [n]``; ``rotary.factor`` multiplies the rotated channels."""
    return _turn(np.array(x, np.float64), _angles(positions, rotary), rotary, rotary.factor)


def unrope(x: ArrayLike, positions: ArrayLike, rotary: Rotary) -> Float:
    """Undo ``rope``."""
    return _turn(np.array(x, np.float64), -_angles(positions, rotary), rotary, 1 / rotary.factor)


def _turn(x: Float, angles: Float, rotary: Rotary, factor: float) -> Float:
    first, second = list(rotary.first), list(rotary.second)
    a, b = x[..., first], x[..., second]
    x[..., first] = factor * (a * np.cos(angles) - b * np.sin(angles))
    x[..., second] = factor * (a * np.sin(angles) + b * np.cos(angles))
    return x


def mean_rotation(rotary: Rotary, dim: int, start: int, count: int) -> Float:
    """Return the ``[D, D]`` mean of the rotations of ``count`` positions from ``start``."""
    return np.mean([rope(np.eye(dim), np.full(dim, p), rotary).T for p in range(start, start + count)], axis=0)
