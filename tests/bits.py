"""Arrays of either framework as their bits, to be compared between frameworks and with files of before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
FILES_OF_BEFORE = {"format1-mlx": "a59b543d", "format1-mlx-lm": "a59b543d", "format1-torch": "7ca55bc1"}
"""Files of tests/data and the digests of their arrays. kvmlx 0.1.0 wrote them, its MLX side through mlx-lm's own saver
too: of tiny models of three layers, the middle one of which slides."""


def bits(array: Any) -> np.ndarray:
    """Return an array of MLX or torch in NumPy; bfloat16, which NumPy has not, as uint16."""
    module = type(array).__module__.partition(".")[0]
    bfloat = str(array.dtype).endswith("bfloat16")
    if module == "torch":
        import torch

        array = array.detach().cpu()
        return (array.view(torch.uint16) if bfloat else array).numpy()
    if module == "mlx":
        import mlx.core as mx

        return np.array(array.view(mx.uint16) if bfloat else array)
    return np.asarray(array)


def dtype_of(array: Any) -> str:
    """Return the dtype's name, the same for all frameworks."""
    return str(array.dtype).rpartition(".")[2]


def digest(arrays: Mapping[str, Any]) -> str:
    """Return the first digits of a hash of names, dtypes, shapes and bytes."""
    out = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        out.update(f"{name} {dtype_of(array)} {tuple(array.shape)}".encode() + bits(array).tobytes())
    return out.hexdigest()[:8]


def assert_same_bits(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise unless both hold the same arrays: names, dtypes, shapes and every bit."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        a, b = bits(mine[name]), bits(theirs[name])
        assert dtype_of(mine[name]) == dtype_of(theirs[name]) and a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), name
