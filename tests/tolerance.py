"""The tolerance policy, for every test that compares floats, codes or indices.

Floats: the largest error against the float64 oracle is at most ERROR_FACTOR times that of the plain
implementation in the same low precision, plus a floor of FLOOR_ULPS units in the last place of the largest
number there is, for where the plain one happens to be exact. One order of a sum can be lucky, so the plain
implementation may be given in several; its worst counts. Codes and indices: equal, bit by bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

ERROR_FACTOR = 2.0
FLOOR_ULPS = 4
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_close(
    actual: ArrayLike,
    oracle64: ArrayLike,
    low_precision_reference: ArrayLike,
    *,
    dtype: str = "float32",
    name: str = "result",
) -> None:
    """Raise AssertionError where ``actual`` is further from the oracle than the policy allows.

    Args:
        actual: the result under test.
        oracle64: what it should be, made in float64. Infinities must be met exactly, a NaN is never right.
        low_precision_reference: the plain implementation's result in ``dtype``, or several stacked along a new
            first axis: the same sums in other orders.
        dtype: the precision in which both compute, or in which they round their result if that is coarser.
        name: what to call the result in the message.
    """
    got, want, plain = (np.asarray(x, np.float64) for x in (actual, oracle64, low_precision_reference))
    plain = plain if plain.ndim > want.ndim else plain[None]
    assert got.shape == want.shape == plain.shape[1:], f"{name}: shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    assert np.array_equal(np.where(finite, 0.0, got), np.where(finite, 0.0, want)), (
        f"{name}: not infinite where the oracle is"
    )
    assert np.isfinite(got[finite]).all(), f"{name}: {np.sum(~np.isfinite(got[finite]))} values are not finite"
    if not finite.any():
        return
    error = np.abs(got[finite] - want[finite]).max()
    plain_error = np.abs(plain[:, finite] - want[finite]).max()
    floor = FLOOR_ULPS * EPSILON[dtype] * np.abs(want[finite]).max()
    limit = ERROR_FACTOR * plain_error + floor
    assert error <= limit, (
        f"{name}: error {error:.3g} > {limit:.3g} = {ERROR_FACTOR:g} x {plain_error:.3g} (plain {dtype}) "
        f"+ {floor:.3g} ({FLOOR_ULPS} ulps)"
    )


def assert_same(actual: ArrayLike, expected: ArrayLike, *, name: str = "result") -> None:
    """Raise AssertionError unless dtype, shape and every element are equal; name the first difference."""
    got, want = np.asarray(actual), np.asarray(expected)
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    differ = np.argwhere(got != want)
    assert not len(differ), (
        f"{name}: {len(differ)} of {got.size} differ, first at {tuple(differ[0].tolist())}: "
        f"{got[tuple(differ[0])]!r}, expected {want[tuple(differ[0])]!r}"
    )
