"""The tolerance policy under the name by which the tests know it; it is in `kvmlx.tolerance`."""

from kvmlx.tolerance import EPSILON, ERROR_FACTOR, FLOOR_ULPS, Mismatch, assert_close, assert_same

__all__ = ["EPSILON", "ERROR_FACTOR", "FLOOR_ULPS", "Mismatch", "assert_close", "assert_same"]
