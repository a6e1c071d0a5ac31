"""The tolerance policy, for all that compares floats, codes or indices: the tests and `kvmlx doctor --selftest`.

Floats: the largest error against the float64 oracle is at most ERROR_FACTOR times that of the plain
implementation in the same low precision, plus a floor of FLOOR_ULPS units in the last place of the largest
number there is, for where the plain one happens to be exact. One order of a sum can be lucky, so the plain
implementation may be given in several; its worst counts. Codes and indices: equal, bit by bit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

ERROR_FACTOR = 2.0
FLOOR_ULPS = 4
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Mismatch(AssertionError):
    """A result that the policy refuses; ``ratio`` is its error over the limit, infinite where nothing was near."""

    def __init__(self, message: str, ratio: float = math.inf) -> None:
        super().__init__(message)
        self.ratio = ratio


def assert_close(
    actual: ArrayLike,
    oracle64: ArrayLike,
    low_precision_reference: ArrayLike,
    *,
    dtype: str = "float32",
    name: str = "result",
) -> float:
    """Raise Mismatch where ``actual`` is further from the oracle than the policy allows.

    Args:
        actual: the result under test.
        oracle64: what it should be, made in float64. Infinities must be met exactly, a NaN is never right.
        low_precision_reference: the plain implementation's result in ``dtype``, or several stacked along a new
            first axis: the same sums in other orders.
        dtype: the precision in which both compute, or in which they round their result if that is coarser.
        name: what to call the result in the message.

    Returns:
        the error over the limit, at most 1.
    """
    got, want, plain = (np.asarray(x, np.float64) for x in (actual, oracle64, low_precision_reference))
    plain = plain if plain.ndim > want.ndim else plain[None]
    _require(got.shape == want.shape == plain.shape[1:], f"{name}: shape {got.shape}, expected {want.shape}")
    finite = np.isfinite(want)
    same = np.array_equal(np.where(finite, 0.0, got), np.where(finite, 0.0, want))
    _require(same, f"{name}: not infinite where the oracle is")
    strange = int(np.sum(~np.isfinite(got[finite])))
    _require(not strange, f"{name}: {strange} values are not finite")
    if not finite.any():
        return 0.0
    error = float(np.abs(got[finite] - want[finite]).max())
    plain_error = float(np.abs(plain[:, finite] - want[finite]).max())
    floor = FLOOR_ULPS * EPSILON[dtype] * float(np.abs(want[finite]).max())
    limit = ERROR_FACTOR * plain_error + floor
    if error == 0.0:
        return 0.0
    # Written so that a NaN in the plain implementation lets nothing pass.
    if not error <= limit:
        raise Mismatch(
            f"{name}: error {error:.3g} > {limit:.3g} = {ERROR_FACTOR:g} x {plain_error:.3g} (plain {dtype}) "
            f"+ {floor:.3g} ({FLOOR_ULPS} ulps)",
            error / limit if limit > 0 else math.inf,
        )
    return error / limit


def assert_same(actual: ArrayLike, expected: ArrayLike, *, name: str = "result") -> float:
    """Raise Mismatch unless dtype, shape and every element are equal; name the first difference. Returns 0."""
    got, want = np.asarray(actual), np.asarray(expected)
    _require(got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}")
    _require(got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}")
    differ = np.argwhere(got != want)
    if len(differ):
        first = tuple(differ[0].tolist())
        raise Mismatch(
            f"{name}: {len(differ)} of {got.size} differ, first at {first}: {got[first]!r}, expected {want[first]!r}"
        )
    return 0.0


def _require(ok: bool, message: str) -> None:
    # Not an assert statement: those vanish under python -O, and a selftest must not.
    if not ok:
        raise Mismatch(message)
