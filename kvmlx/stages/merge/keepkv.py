"""KeepKV: fold evicted rows into the most similar kept row without changing the output at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvmlx.ops import NEG_INF, after, logits, take_rows
from kvmlx.stages.base import Merge, require, require_int
from kvmlx.stages.common import spans, unit
from kvmlx.types import Array, Need, Rows

GUARD = (0.8, 1.25)
"""Range of the paper's key factor that is trusted: it has poles where the mean log-attention is near zero."""


@dataclass(frozen=True)
class KeepKV(Merge):
    """Merge a row that leaves into the kept row of the same head with the most similar key.

    With ``s = exp(logit)`` averaged over the window, and b the row's bias, a row weighs ``w = s exp(b)``. The
    merged key and value are means weighted by w. ``form`` says how the merged row keeps the sum of weights:

    - ``bias``: its bias becomes ``ln(sum w) - ln s(merged key)``.
    - ``paper``: its bias is ln(votes), the number of rows in it, and its key is scaled so that
      ``votes s = sum w``, unless the factor leaves GUARD.

    Where one query defines s, its output is unchanged.
    """

    name: ClassVar[str] = "keepkv"
    paper: ClassVar[str] = "2504.09936"
    summary: ClassVar[str] = "folds evicted tokens into similar kept ones, with a bias per token"
    saves: ClassVar[str] = "nothing by itself (quality)"
    needs: ClassVar[frozenset[Need]] = frozenset({"queries"})
    makes_bias: ClassVar[bool] = True

    form: Literal["bias", "paper"] = "bias"
    similarity: float = 0.8
    """Least cosine of two keys to merge; a row with no such neighbour is evicted."""
    window: int = 32
    """Newest queries that weigh the rows."""
    decay: float = 0.9
    """Weight of a query relative to the next newer one."""

    def __post_init__(self) -> None:
        require(self.form in ("bias", "paper"), f"form must be bias or paper, got {self.form!r}")
        require_int("window", self.window, 1)
        for name, low in (("similarity", -1.0), ("decay", 0.0)):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= 1.0
            require(ok, f"{name} must be a number in [{low:g}, 1], got {value!r}")
        require(self.decay > 0.0, "decay must be > 0, got 0; for the newest query alone set window=1")

    def fold(self, rows: Rows, kept: Array, dropped: Array) -> tuple[Array, Array, Array]:
        """Return keys, values and bias of the kept rows; rows that nothing joins are unchanged."""
        xp = rows.xp
        t, c = rows.keys.shape[2], kept.shape[2]
        bias = xp.zeros(rows.keys.shape[:3], dtype=xp.float32) if rows.bias is None else rows.bias
        keys, values, bias_c = (take_rows(xp, x, kept) for x in (rows.keys, rows.values, bias))
        if c == t:
            return keys, values, bias_c
        dropped, target = _by_target(xp, dropped, _nearest(xp, rows.keys, dropped, keys, self.similarity))
        segments = _Segments(xp, target, c)

        every = xp.broadcast_to(xp.arange(t, dtype=xp.int32), rows.keys.shape[:3])
        log_s = self._log_s(rows, rows.keys, every)
        log_s_c, log_s_e = take_rows(xp, log_s, kept), take_rows(xp, log_s, dropped)
        log_w_c, log_w_e = log_s_c + bias_c, log_s_e + take_rows(xp, bias, dropped)
        peak = xp.maximum(log_w_c, segments.max(log_w_e))
        w_c = xp.exp(log_w_c - peak)
        # A row that joins none is in no segment: its weight is finite and not used.
        w_e = xp.exp(xp.where(target < c, log_w_e - take_rows(xp, peak, xp.minimum(target, c - 1)), 0.0))

        mass = w_c + segments.sum(w_e)
        joined = segments.some
        log_mass = xp.log(mass) + peak
        key, value = (
            _weighted_sums(xp, x, kept, w_c, dropped, w_e, segments) / mass[..., None] for x in (rows.keys, rows.values)
        )
        if self.form == "paper":
            merged = xp.log(xp.exp(bias_c) + segments.sum(xp.exp(take_rows(xp, bias, dropped))))
            mean_log_s = (w_c * log_s_c + segments.sum(w_e * log_s_e)) / mass
            key = key * _guarded(xp, log_mass - merged, mean_log_s)[..., None]
        keys = xp.where(joined[..., None], xp.astype(key, keys.dtype), keys)
        values = xp.where(joined[..., None], xp.astype(value, values.dtype), values)
        if self.form == "bias":
            # The stored, rounded key is what later queries see, so the bias is measured on it.
            merged = log_mass - self._log_s(rows, keys, kept)
        return keys, values, xp.where(joined, merged, bias_c)

    def _log_s(self, rows: Rows, keys: Array, index: Array) -> Array:
        """Return ``ln s [1, H, N]`` of ``keys [1, H, N, D]`` at the rows ``index [1, H, N]``.

        s is the mean of ``exp(logit)`` over the group and, decayed, over the queries that see the row.
        """
        assert rows.queries is not None
        xp = rows.xp
        queries = rows.queries[:, :, -self.window :]
        hq, w = queries.shape[1:3]
        h, n = keys.shape[1:3]
        order = xp.arange(w, dtype=xp.int32)
        log_decay = xp.astype(w - 1 - order, xp.float32) * math.log(self.decay)
        first = index + (w - rows.keys.shape[2])
        out = []
        for span in spans(n, hq * w):
            seen = order[None, None, :, None] >= first[:, :, None, span]
            weight = xp.where(seen, log_decay[None, None, :, None], NEG_INF)
            s = logits(xp, after(xp, queries, out), keys[:, :, span], rows.scale)
            s = xp.reshape(s, (1, h, hq // h, w, -1))
            s = xp.reshape(s + weight[:, :, None], (1, h, hq // h * w, -1))
            out.append(_logsumexp(xp, s) - _logsumexp(xp, weight) - math.log(hq // h))
        return xp.concat(out, axis=-1)


def _logsumexp(xp: Any, x: Array) -> Array:
    """Reduce ``x [1, H, M, N]`` over M; every column has a finite entry."""
    peak = xp.max(x, axis=2, keepdims=True)
    return (xp.log(xp.sum(xp.exp(x - peak), axis=2, keepdims=True)) + peak)[:, :, 0]


def _nearest(xp: Any, keys: Array, rows: Array, candidates: Array, similarity: float) -> Array:
    """Return the candidate nearest to each row by cosine ``[1, H, N]``, int32; C if below ``similarity``."""
    h, c, d = candidates.shape[1:]
    units = xp.permute_dims(unit(xp, candidates), (0, 1, 3, 2))
    out = []
    for span in spans(rows.shape[2], h * max(c, d)):
        block = take_rows(xp, keys, after(xp, rows[:, :, span], out))
        cosine = xp.matmul(unit(xp, block), units)
        best = xp.astype(xp.argmax(cosine, axis=-1), xp.int32)
        out.append(xp.where(xp.max(cosine, axis=-1) >= similarity, best, c))
    return xp.astype(xp.concat(out, axis=-1), xp.int32)


def _by_target(xp: Any, rows: Array, target: Array) -> tuple[Array, Array]:
    """Sort ``rows [1, H, N]`` and ``target [1, H, N]`` by target."""
    order = xp.argsort(target, axis=-1)
    return xp.take_along_axis(rows, order, axis=-1), xp.take_along_axis(target, order, axis=-1)


class _Segments:
    """Reductions over runs of equal ``target [1, H, N]``, sorted, for each target below ``count``.

    Segmented scans: elementwise, so that the order of additions is the same on every backend.
    """

    def __init__(self, xp: Any, target: Array, count: int) -> None:
        self.xp, self.target = xp, target
        each = xp.broadcast_to(xp.arange(count, dtype=xp.int32), (*target.shape[:2], count))
        # The rank of 2c + 1 among all 2 * target says how many rows go to targets up to c.
        merged = xp.concat([2 * target, 2 * each + 1], axis=-1)
        rank = xp.argsort(xp.argsort(merged, axis=-1), axis=-1)[..., target.shape[2] :]
        last = xp.astype(rank, xp.int32) - each - 1
        self.last = xp.maximum(last, 0)
        self.some = xp.take_along_axis(target, self.last, axis=-1) == each
        """Whether any row goes to the target ``[1, H, count]``."""

    def sum(self, x: Array) -> Array:
        """Return the sums of ``x [1, H, N]`` or ``[1, H, N, F]`` per target ``[1, H, count]``, else 0."""
        return self._reduce(x, self.xp.add, 0.0)

    def max(self, x: Array) -> Array:
        """Return the maxima, -inf where no row goes."""
        return self._reduce(x, self.xp.maximum, NEG_INF)

    def _reduce(self, x: Array, combine: Any, empty: float) -> Array:
        xp = self.xp
        tail = (None,) * (len(x.shape) - 3)
        step = 1
        while step < x.shape[2]:
            same = (self.target[..., step:] == self.target[..., :-step])[(..., *tail)]
            joined = combine(x[:, :, step:], xp.where(same, x[:, :, :-step], empty))
            x = xp.concat([x[:, :, :step], joined], axis=2)
            step *= 2
        return xp.where(self.some[(..., *tail)], take_rows(xp, x, self.last), empty)


def _weighted_sums(
    xp: Any, x: Array, kept: Array, w_c: Array, dropped: Array, w_e: Array, segments: _Segments
) -> Array:
    """Return ``x [1, H, T, D]`` times its weights, summed over each kept row and the rows that join it."""
    h, n = dropped.shape[1:]
    out = []
    # Blocks of channels: a copy of all the rows that leave would be as large as the cache.
    for span in spans(x.shape[3], h * n):
        part = x[..., span]
        mine = xp.astype(take_rows(xp, part, kept), xp.float32) * w_c[..., None]
        theirs = xp.astype(take_rows(xp, part, dropped), xp.float32) * after(xp, w_e, out)[..., None]
        out.append(mine + segments.sum(theirs))
    return xp.concat(out, axis=-1)


def _guarded(xp: Any, numerator: Array, denominator: Array) -> Array:
    """Return the quotient where it lies within GUARD, else 1."""
    safe = xp.abs(denominator) > 1e-6
    factor = numerator / xp.where(safe, denominator, 1.0)
    return xp.where(safe & (factor > GUARD[0]) & (factor < GUARD[1]), factor, 1.0)
