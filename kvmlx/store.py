"""Where the rows of one layer live: an encoded body and an exact tail, for B sequences.

The tail is ``[B, H, capacity, D]`` in the model's dtype. Lane (b, h) owns rows ``begin[b, h] .. end``: first the
sinks, then the newest rows; its newest row is always at ``end - 1``. The body holds the rows between them, encoded:
flat planes of shape ``[entries, width]``, lane (b, h) owning rows ``start[b, h] .. start[b, h] + length[b, h]`` of
a span of ``span[b, h]``. So the logical order of a lane is tail sinks, body, rest of the tail.
Every length is a host integer: nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmlx import ops
from kvmlx.stages.encode.codecs import Exact
from kvmlx.types import Array, Backend, Codec

TAIL_STEP = 256
"""Largest growth of a tail that holds every row (mlx-lm's own step)."""
RING_STEP = 32
"""Growth of a tail in front of a body, rows gathered before they are encoded together; the least of any tail."""
SPAN_STEP = 64
"""Growth of a body's span: re-laying costs one copy every 64 rows, little beside reading the body every step."""

Planes = dict[str, Array]


def tail_step(rows: int, in_front: bool) -> int:
    """Return the multiple to which the room of a tail of so many rows is rounded.

    About an eighth of the rows, so that a small budget does not hold mostly head-room: growing copies each row some
    eight times per row that comes, little beside the attention that reads them all.

    Args:
        rows: rows of the tail.
        in_front: whether a body may be behind it.
    """
    if in_front:
        return RING_STEP
    return min(TAIL_STEP, max(1, -(-rows // (8 * RING_STEP))) * RING_STEP)


@dataclass(frozen=True)
class Tile:
    """Consecutive rows of every lane: keys and values in their codec's basis, or exact where the codec is None."""

    keys: Array
    values: Array
    valid: Array | None
    """bool ``[B, H, t]``, None where every row exists."""
    bias: Array | None
    """float32 ``[B, H, t]`` or None."""


class LayerStore:
    """Rows of one attention layer. Functional towards the framework: arrays are replaced, never shared for writing.

    Args:
        backend: the framework's primitives.
        codecs: of keys and values; None for a side whose body rows stay exact. None for a store without body.
        sinks: leading rows that stay in the tail, exact, when others are encoded.
        columns: float32 numbers kept per row, such as ``"bias"`` (added to the logit) or ``"sums"``.
    """

    def __init__(
        self,
        backend: Backend,
        codecs: tuple[Codec | None, Codec | None] | None,
        *,
        sinks: int = 0,
        columns: Sequence[str] = (),
    ) -> None:
        self.backend: Any = backend
        self.given_codecs = codecs
        self.codecs: tuple[Codec, Codec] | None = None
        """The codecs of the body, known with the first rows: exact ones keep the model's dtype."""
        self.sinks = sinks
        self.column_names = tuple(columns)
        self.biased = False
        """Whether any row's bias was ever set; until then attention need not read it."""
        self.keys: Array = None
        self.values: Array = None
        self.columns: dict[str, Array] = {}
        self.begin = np.zeros((0, 0), np.int64)
        self._begins: tuple[bytes, int, bool] = (b"", 0, True)
        self.end = 0
        self.planes: Planes = {}
        self.start = np.zeros((0, 0), np.int64)
        self.length = np.zeros((0, 0), np.int64)
        self.span = np.zeros((0, 0), np.int64)

    def adopt(self, dtype: Any) -> None:
        """Take ``dtype`` as the model's: what is exact is stored in it."""
        if self.given_codecs is not None:
            keys, values = self.given_codecs
            exact = Exact(str(dtype).rpartition(".")[2])  # type: ignore[arg-type]
            self.codecs = (keys or exact, values or exact)

    # -- shape ----------------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        return self.keys is None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (B, H, D, Dv)."""
        b, h, _, d = self.keys.shape
        return b, h, d, self.values.shape[3]

    @property
    def key_codec(self) -> Codec:
        """The codec of the body's keys."""
        return self._side("keys")[0]

    @property
    def unit(self) -> int:
        """Rows that enter or leave the body together."""
        return math.lcm(*(c.block for c in self.codecs)) if self.codecs else 1

    def _room(self, rows: int) -> int:
        """Return the capacity of a tail of so many rows."""
        step = tail_step(rows, bool(self.given_codecs))
        return -(-rows // step) * step

    @property
    def first(self) -> int:
        """The first row of the tail that any lane owns."""
        return self._reckoned()[0]

    def _reckoned(self) -> tuple[int, bool]:
        """Return `first`, and whether every lane begins there: reckoned where ``begin`` has changed, not every step."""
        held = self.begin.tobytes()
        if held != self._begins[0]:
            first = int(self.begin.min())
            self._begins = held, first, bool((self.begin == first).all())
        return self._begins[1:]

    @property
    def tail_lengths(self) -> np.ndarray:
        """Rows of each lane's tail, ``[B, H]``."""
        return self.end - self.begin

    @property
    def lengths(self) -> np.ndarray:
        """Rows that each lane holds, ``[B, H]``."""
        return self.tail_lengths + self.length

    @property
    def has_body(self) -> bool:
        return bool(self.length.any())

    def arrays(self) -> dict[str, Array]:
        """Return every array that the store holds, by name."""
        if self.keys is None:
            return {}
        tail = {"tail.keys": self.keys, "tail.values": self.values}
        return tail | {f"tail.{n}": c for n, c in self.columns.items()} | self.planes

    @property
    def nbytes(self) -> int:
        """Bytes held: exact tail, body, metadata and head-room."""
        return sum(a.nbytes for a in self.arrays().values())

    def _side(self, side: str) -> tuple[Codec, int]:
        assert self.codecs is not None
        return (self.codecs[0], self.shape[2]) if side == "keys" else (self.codecs[1], self.shape[3])

    def _periods(self) -> dict[str, int]:
        """Return the rows that share one entry of each plane."""
        specs = {f"{s}.{p.name}": p.rows for s in ("keys", "values") for c, d in [self._side(s)] for p in c.planes(d)}
        return specs | {f"column.{n}": 1 for n in self.column_names}

    # -- tail -----------------------------------------------------------------------------------------------------

    def append(self, keys: Array, values: Array) -> None:
        """Append ``keys [B, H, n, D]`` and ``values [B, H, n, Dv]`` to the tail of every lane."""
        xp = self.backend.xp
        b, h, n, _ = keys.shape
        if self.keys is None:
            self.adopt(keys.dtype)
            self.keys, self.values = (xp.zeros((b, h, 0, x.shape[3]), dtype=x.dtype) for x in (keys, values))
            self.columns = {name: xp.zeros((b, h, 0), dtype=xp.float32) for name in self.column_names}
            self.begin = np.zeros((b, h), np.int64)
            self.start, self.length, self.span = (np.zeros((b, h), np.int64) for _ in range(3))
        self._reserve(n)
        put = self.backend.put
        self.keys = put(self.keys, keys, self.end)
        self.values = put(self.values, values, self.end)
        for name, column in self.columns.items():
            fresh = xp.zeros((b, h, n, 1), dtype=xp.float32)
            self.columns[name] = put(column[..., None], fresh, self.end)[..., 0]
        self.end += n

    def _reserve(self, n: int) -> None:
        xp = self.backend.xp
        capacity = self.keys.shape[2]
        if self.end + n <= capacity:
            return
        grown = self._room(self.end + n)

        def grow(x: Array) -> Array:
            b, h, _, *rest = x.shape
            return xp.concat([x[:, :, : self.end], xp.zeros((b, h, grown - self.end, *rest), dtype=x.dtype)], axis=2)

        self.keys, self.values = grow(self.keys), grow(self.values)
        self.columns = {name: grow(c) for name, c in self.columns.items()}

    def tail(self) -> tuple[Array, Array, Array | None, Array | None]:
        """Return keys, values, validity and bias of the tail, without head-room and common padding."""
        first = self.first
        cut = slice(first, self.end)
        bias = self.columns["bias"][:, :, cut] if self.biased else None
        return self.keys[:, :, cut], self.values[:, :, cut], self._tail_valid(first), bias

    def _tail_valid(self, first: int) -> Array | None:
        if self._reckoned()[1]:
            return None
        xp = self.backend.xp
        rows = xp.arange(first, self.end)
        return rows >= self.backend.from_numpy(self.begin.astype(np.int32))[..., None]

    def retain_tail(self, kept: Sequence[np.ndarray]) -> None:
        """Keep the tail rows ``kept[lane]`` (indices into the buffer, sorted); free the others.

        Args:
            kept: one index array per lane, lanes in order ``b * H + h``.
        """
        b, h, _, _ = self.shape
        most = max((len(k) for k in kept), default=0)
        index = np.zeros((b * h, most), np.int32)
        for lane, rows in enumerate(kept):
            index[lane, most - len(rows) :] = rows
        capacity = self._room(most) + (RING_STEP if self.codecs else 0)
        self.keys = self._gather_tail(self.keys, index, capacity)
        self.values = self._gather_tail(self.values, index, capacity)
        self.columns = {n: self._gather_tail(c, index, capacity) for n, c in self.columns.items()}
        self.begin = most - np.array([len(k) for k in kept], np.int64).reshape(b, h)
        self.end = most

    def _gather_tail(self, x: Array, index: np.ndarray, capacity: int) -> Array:
        xp = self.backend.xp
        b, h, _, *rest = x.shape
        rows = self.backend.from_numpy(index.reshape(b, h, -1))
        out = ops.take_rows(xp, x, rows)
        room = xp.zeros((b, h, capacity - index.shape[1], *rest), dtype=x.dtype)
        return xp.concat([out, room], axis=2)

    def drop_newest(self, counts: np.ndarray) -> None:
        """Remove the newest ``counts[b]`` rows of each sequence's tail."""
        if not counts.any():
            return
        if (counts == counts[0]).all():
            self.end -= int(counts[0])
            return
        ends = self.end - np.repeat(counts, self.shape[1])
        self.retain_tail([np.arange(lo, hi) for lo, hi in zip(self.begin.ravel(), ends, strict=True)])

    # -- body -----------------------------------------------------------------------------------------------------

    def encode_oldest(self, counts: np.ndarray) -> None:
        """Move the oldest ``counts[b, h]`` tail rows behind the sinks into the body; multiples of ``unit``."""
        if not counts.any():
            return
        first = self.begin.ravel() + np.minimum(self.sinks, self.tail_lengths.ravel())
        flat = counts.ravel()
        for n in np.unique(flat[flat > 0]):
            lanes = np.flatnonzero(flat == n)
            self._append_body(lanes, int(n), self._encode_rows(lanes, first[lanes], int(n)))
        kept = [
            np.concatenate([np.arange(lo, at), np.arange(at + n, self.end)])
            for lo, at, n in zip(self.begin.ravel(), first, flat, strict=True)
        ]
        self.retain_tail(kept)

    def _encode_rows(self, lanes: np.ndarray, first: np.ndarray, n: int) -> Planes:
        """Return the planes ``[lanes, n / rows, width]`` of ``n`` tail rows of each lane from ``first`` on."""
        b, h, _, _ = self.shape
        dense = len(lanes) == b * h and (first == first[0]).all()
        rows = None if dense else first[:, None] + np.arange(n)[None, :]

        def pick(x: Array) -> Array:
            xp = self.backend.xp
            flat = xp.reshape(x, (b * h, *x.shape[2:]))
            if rows is None:
                return flat[:, int(first[0]) : int(first[0]) + n]
            lane_index = (lanes[:, None] * x.shape[2] + rows).astype(np.int32)
            merged = xp.reshape(x, (b * h * x.shape[2], *x.shape[3:]))
            return xp.take(merged, self.backend.from_numpy(lane_index), axis=0)

        planes: Planes = {}
        for side, x in (("keys", self.keys), ("values", self.values)):
            encoded = self.backend.encode(self._side(side)[0], pick(x))
            planes |= {f"{side}.{name}": plane for name, plane in encoded.items()}
        return planes | {f"column.{name}": pick(c)[..., None] for name, c in self.columns.items()}

    def _dense(self) -> bool:
        """Whether every lane has the same span, in order."""
        span = self.span.ravel()
        return bool((span == span[0]).all() and (self.start.ravel() == np.arange(span.size) * span[0]).all())

    def _append_body(self, lanes: np.ndarray, n: int, new: Planes) -> None:
        xp = self.backend.xp
        length = self.length.ravel()
        every = len(lanes) == length.size
        level = every and self._dense() and bool((length == length[0]).all())
        if level and self.planes and length[0] + n <= self.span.flat[0]:
            for name, period in self._periods().items():
                view = xp.reshape(self.planes.pop(name), (len(lanes), int(self.span.flat[0]) // period, -1))
                view = self.backend.put(view, new[name], int(length[0]) // period)
                self.planes[name] = xp.reshape(view, (-1, view.shape[-1]))
            self.length = self.length + n
            return
        grown = length.copy()
        grown[lanes] += n
        span = self._spans(grown)
        if level:
            self._extend_dense(new, int(length[0]), int(span[0]))
        else:
            self._extend_ragged(lanes, n, new, span)
        self._set_layout(grown, span)

    def _spans(self, length: np.ndarray) -> np.ndarray:
        step = math.lcm(SPAN_STEP, self.unit)
        return np.where(length > 0, -(-length // step) * step, 0)

    def _set_layout(self, length: np.ndarray, span: np.ndarray) -> None:
        shape = self.length.shape
        self.length, self.span = length.reshape(shape), span.reshape(shape)
        self.start = (np.cumsum(span) - span).reshape(shape)

    def _extend_dense(self, new: Planes, length: int, span: int) -> None:
        xp = self.backend.xp
        n_lanes = self.length.size
        for name, period in self._periods().items():
            parts = [new[name]]
            if name in self.planes:
                old = self.planes.pop(name)
                view = xp.reshape(old, (n_lanes, -1, old.shape[-1]))
                parts.insert(0, view[:, : length // period])
            used = sum(p.shape[1] for p in parts)
            room = xp.zeros((n_lanes, span // period - used, new[name].shape[-1]), dtype=new[name].dtype)
            joined = xp.concat([*parts, room], axis=1)
            self.planes[name] = xp.reshape(joined, (-1, joined.shape[-1]))

    def _extend_ragged(self, lanes: np.ndarray, n: int, new: Planes, span: np.ndarray) -> None:
        xp, unit = self.backend.xp, self.unit
        fresh: Planes | None = {name: xp.reshape(plane, (-1, plane.shape[-1])) for name, plane in new.items()}
        units = [np.arange(held) for held in self.length.ravel() // unit]
        first = int(self.span.sum()) // unit
        if not self.planes:
            self.planes, fresh, first = fresh, None, 0
        for i, lane in enumerate(lanes):
            at = first + i * (n // unit) - int(self.start.flat[lane]) // unit
            units[lane] = np.append(units[lane], at + np.arange(n // unit))
        self._gather(units, span, fresh)

    def _gather(self, units: Sequence[np.ndarray], span: np.ndarray, fresh: Planes | None = None) -> None:
        """Lay the planes out anew: of each lane the units given, from its start; ``fresh`` lies behind the planes."""
        unit = self.unit
        per = {name: unit // period for name, period in self._periods().items()}
        starts = self.start.ravel() // unit
        self.planes = self.backend.gather_units(self.planes, starts, units, span // unit, per=per, fresh=fresh)

    def _take(self, flat: Array, index: np.ndarray) -> Array:
        return self.backend.xp.take(flat, self.backend.from_numpy(index.astype(np.int32)), axis=0)

    def retain_body(self, kept: Sequence[np.ndarray]) -> None:
        """Keep the body units ``kept[lane]`` (sorted, in units of ``unit`` rows from the lane's start)."""
        length = np.array([len(k) * self.unit for k in kept], np.int64)
        if not self.planes or (length == self.length.ravel()).all():
            return
        span = self._spans(length)
        self._gather(kept, span)
        self._set_layout(length, span)

    def body_tile(self, first: int, stop: int, *, after: Sequence[Array] = ()) -> Tile:
        """Return rows ``first .. stop`` of every lane's body, decoded; multiples of ``unit``.

        A lazy framework decodes the tile only once ``after`` is there.
        """
        b, h, _, _ = self.shape
        xp = self.backend.xp
        stop = min(stop, int(self.length.max()))
        dense = self._dense()
        parts: Planes = {}
        for name, period in self._periods().items():
            plane = self.planes[name]
            lo, hi = first // period, stop // period
            if dense:
                view = xp.reshape(plane, (b, h, int(self.span.flat[0]) // period, plane.shape[-1]))
                parts[name] = view[:, :, lo:hi]
            else:
                last = np.maximum(self.span // period - 1, 0)[..., None]
                rows = self.start[..., None] // period + np.minimum(np.arange(lo, hi), last)
                rows = np.minimum(rows, plane.shape[0] - 1)
                parts[name] = self._take(plane, rows)
        parts = {name: ops.after(xp, part, after) for name, part in parts.items()}
        valid = None
        if not (self.length >= stop).all():
            held = self.backend.from_numpy(self.length.astype(np.int32))
            valid = xp.arange(first, stop) < held[..., None]
        keys, values = (
            self.backend.decode(codec, {p.name: parts[f"{side}.{p.name}"] for p in codec.planes(dim)}, dim)
            for side in ("keys", "values")
            for codec, dim in [self._side(side)]
        )
        bias = parts["column.bias"][..., 0] if self.biased else None
        return Tile(keys, values, valid, bias)

    # -- reading as a stage does ----------------------------------------------------------------------------------

    def lane_rows(self, b: int, heads: slice) -> tuple[Array, Array, dict[str, Array]]:
        """Return keys, values (body decoded, un-rotated) and columns of some heads of one sequence.

        The heads must hold equally many rows in body and tail. Rows are in logical order: ``[1, h, T, ...]``.
        """
        xp = self.backend.xp
        begin, length = self.begin[b, heads], self.length[b, heads]
        if not ((begin == begin[0]).all() and (length == length[0]).all()):
            raise AssertionError("lane_rows needs heads of one length")
        lo, n = int(begin[0]), int(length[0])
        cut = (slice(b, b + 1), heads)
        tail = {"keys": self.keys, "values": self.values, **self.columns}
        tail = {name: x[cut][:, :, lo : self.end] for name, x in tail.items()}
        if n == 0:
            return tail.pop("keys"), tail.pop("values"), tail
        body = self._decode_lanes(b, heads, n)
        s = self.sinks
        joined = {
            name: xp.concat([x[:, :, :s], xp.astype(body[name], x.dtype), x[:, :, s:]], axis=2)
            for name, x in tail.items()
        }
        return joined.pop("keys"), joined.pop("values"), joined

    def _decode_lanes(self, b: int, heads: slice, n: int) -> dict[str, Array]:
        starts = self.start[b, heads]
        parts = {}
        for name, period in self._periods().items():
            rows = starts[:, None] // period + np.arange(n // period)[None, :]
            parts[name] = self._take(self.planes[name], rows)[None]
        out = {}
        for side in ("keys", "values"):
            codec, dim = self._side(side)
            planes = {p.name: parts[f"{side}.{p.name}"] for p in codec.planes(dim)}
            out[side] = codec.unrotate(self.backend, self.backend.decode(codec, planes, dim))
        return out | {name: parts[f"column.{name}"][..., 0] for name in self.column_names}

    def add_to_column(self, name: str, tail: Array, body: Array | None) -> None:
        """Add ``tail [B, H, n]`` (rows from the first valid one on) and ``body [B, H, t]`` to a column."""
        xp = self.backend.xp
        first = self.first
        column = self.columns[name]
        fresh = column[:, :, first : self.end] + tail
        self.columns[name] = self.backend.put(column[..., None], fresh[..., None], first)[..., 0]
        if body is None:
            return
        flat = xp.reshape(body, (-1,))
        longest = body.shape[2]
        lane = np.repeat(np.arange(self.length.size), self.span.ravel())
        row = np.concatenate([np.arange(s) for s in self.span.ravel()])
        inside = row < self.length.ravel()[lane]
        index = np.where(inside, lane * longest + np.minimum(row, longest - 1), 0)
        grown = self._take(flat, index) * self.backend.from_numpy(inside.astype(np.float32))
        plane = self.planes[f"column.{name}"]
        self.planes[f"column.{name}"] = plane + grown[:, None]

    # -- sequences ------------------------------------------------------------------------------------------------

    def trim(self, n: int) -> None:
        """Remove the newest ``n`` rows of every lane; rows that must come back out of the body come decoded."""
        sinks = np.minimum(self.sinks, self.tail_lengths) if self.has_body else 0
        spare = int((self.tail_lengths - sinks).min())
        if n <= spare:
            self.end -= n
            return
        b, h, _, _ = self.shape
        left = np.maximum(self.lengths - n, 0)
        units = np.maximum(left - sinks, 0) // self.unit
        whole = units * self.unit
        loose = left - whole
        parts = [[self.lane_rows(i, slice(j, j + 1)) for j in range(h)] for i in range(b)]
        most = int(loose.max())
        kept = [np.arange(u) for u in units.ravel()]

        def rebuilt(pick: Any, held: Array) -> Array:
            xp = self.backend.xp
            lanes = []
            for i in range(b):
                for j in range(h):
                    rows = pick(parts[i][j])
                    s = int(np.broadcast_to(sinks, (b, h))[i, j])
                    s = min(s, int(loose[i, j]))
                    at = s + int(whole[i, j])
                    lane = xp.concat([rows[:, :, :s], rows[:, :, at : int(left[i, j])]], axis=2)
                    short = most - lane.shape[2]
                    lanes.append(xp.concat([xp.zeros((1, 1, short, *lane.shape[3:]), dtype=lane.dtype), lane], axis=2))
            rows = xp.concat([xp.concat(lanes[i * h : (i + 1) * h], axis=1) for i in range(b)], axis=0)
            return xp.astype(rows, held.dtype)

        keys = rebuilt(lambda p: p[0], self.keys)
        values = rebuilt(lambda p: p[1], self.values)
        columns = {name: rebuilt(lambda p, name=name: p[2][name], c) for name, c in self.columns.items()}
        self.retain_body(kept)
        self.keys, self.values, self.columns = keys, values, columns
        self.begin, self.end = most - loose, most

    def copy(self) -> LayerStore:
        """Return a store that shares no state with this one (arrays are immutable to the outside)."""
        other = object.__new__(LayerStore)
        other.__dict__.update(self.__dict__)
        other.columns, other.planes = dict(self.columns), dict(self.planes)
        return other

    @classmethod
    def assemble(cls, parts: Sequence[tuple[LayerStore, int]]) -> LayerStore:
        """Build a store from sequences of others, in order: batching, filtering and extraction are all this."""
        model = parts[0][0]
        filled = [s for s, _ in parts if not s.empty]
        out = cls(model.backend, model.given_codecs, sinks=model.sinks, columns=model.column_names)
        if not filled:
            return out
        out.adopt(filled[0].keys.dtype)
        out.biased = any(s.biased for s in filled)
        xp = model.backend.xp
        _, h, d, dv = filled[0].shape
        most = max(int(s.tail_lengths[b].max()) for s, b in parts if not s.empty)
        capacity = out._room(most) + (RING_STEP if out.codecs else 0)

        def lane(x: Array | None, s: LayerStore, b: int, rest: tuple[int, ...], dtype: Any) -> Array:
            n = 0 if x is None else int(s.tail_lengths[b].max())
            held = [] if x is None else [x[b : b + 1, :, s.end - n : s.end]]
            left = xp.zeros((1, h, most - n, *rest), dtype=dtype)
            right = xp.zeros((1, h, capacity - most, *rest), dtype=dtype)
            return xp.concat([left, *held, right], axis=2)

        kt, vt = filled[0].keys.dtype, filled[0].values.dtype
        out.keys = xp.concat([lane(s.keys, s, b, (d,), kt) for s, b in parts], axis=0)
        out.values = xp.concat([lane(s.values, s, b, (dv,), vt) for s, b in parts], axis=0)
        out.columns = {
            name: xp.concat([lane(s.columns.get(name), s, b, (), xp.float32) for s, b in parts], axis=0)
            for name in out.column_names
        }
        out.end = most
        zeros = np.zeros(h, np.int64)
        out.begin = np.stack([most - (zeros if s.empty else s.tail_lengths[b]) for s, b in parts])
        out.length = np.stack([zeros if s.empty else s.length[b] for s, b in parts])
        out._assemble_body(parts)
        return out

    def _assemble_body(self, parts: Sequence[tuple[LayerStore, int]]) -> None:
        xp = self.backend.xp
        length = self.length.ravel()
        span = self._spans(length)
        stores = list({id(s): s for s, _ in parts if s.planes}.values())
        if stores:
            for name, period in self._periods().items():
                sources = [s.planes[name] for s in stores]
                base = dict(zip(map(id, stores), np.cumsum([0, *(p.shape[0] for p in sources)]), strict=False))
                pieces = []
                for i, (s, b) in enumerate(parts):
                    for j in range(self.length.shape[1]):
                        room = int(span[i * self.length.shape[1] + j]) // period
                        n = int(self.length[i, j]) // period
                        at = base.get(id(s), 0) + (int(s.start[b, j]) // period if n else 0)
                        pieces.append(np.pad(at + np.arange(n), (0, room - n)))
                source = sources[0] if len(sources) == 1 else xp.concat(sources, axis=0)
                self.planes[name] = self._take(source, np.concatenate(pieces))
        self.span = np.zeros_like(self.length)
        self._set_layout(length, span)

    def tiles(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield the bounds of body tiles of about ``rows`` rows."""
        longest = int(self.length.max()) if self.length.size else 0
        step = max(self.unit, rows // self.unit * self.unit)
        for first in range(0, longest, step):
            yield first, min(longest, first + step)
