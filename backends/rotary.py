"""A rotary position embedding as data, measured through the model's own module, whatever its scaling or layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmlx.types import Rotary

Turn = Callable[[int], np.ndarray | None]
"""The rotation at a position as a matrix: row i is where channel i goes. None if it is not one."""


def measure(turn: Turn) -> Rotary | None:
    """Return channel pairs, frequencies and factor of a rotary embedding; None if it is not plain.

    Unit vectors at position 1 show the pairs and their angles, later positions make these exact, and must agree
    with them: an embedding that changes with the length of the text is not plain.
    """
    found = _pairs(turn(1))
    if found is None:
        return None
    first, second, angle, factor = found
    # A float32 frequency times a power of two is exact, so that each step gives more bits of it.
    for position in (2**6, 2**12, 2**20):
        matrix = turn(position)
        if matrix is None:
            return None
        small = angle * position < 2**13  # beyond it some float32 sines are off
        seen = np.arctan2(matrix[first, second], matrix[first, first])
        off = (seen - angle * position + np.pi) % (2 * np.pi) - np.pi
        if np.abs(off[small]).max(initial=0.0) > 1e-2:
            return None
        angle = np.where(small, angle + off / position, angle)
    return Rotary(tuple(map(int, first)), tuple(map(int, second)), tuple(map(float, angle)), round(float(factor), 6))


def _pairs(turn: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, float] | None:
    """Read pairs, angles and factor off a rotation's matrix; None if it is another map, or the identity."""
    if turn is None:
        return None
    first, second = np.nonzero(np.triu(turn, 1))
    if not len(first) or len(np.unique([*first, *second])) < 2 * len(first):
        return None
    factors = np.hypot(turn[first, first], turn[first, second])
    angle = np.arctan2(turn[first, second], turn[first, first])
    if not np.allclose(turn, _matrix(first, second, angle, factors[0], len(turn)), atol=1e-6):
        return None
    return first, second, angle, float(factors[0])


def _matrix(first: np.ndarray, second: np.ndarray, angle: np.ndarray, factor: float, dim: int) -> np.ndarray:
    out = np.eye(dim)
    out[first, first] = out[second, second] = np.cos(angle) * factor
    out[first, second], out[second, first] = np.sin(angle) * factor, -np.sin(angle) * factor
    return out
