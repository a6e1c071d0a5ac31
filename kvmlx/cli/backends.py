"""Which backend a command runs on: the one asked for, or the best that this machine has."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import overload

from kvmlx.types import KVMLXError

BACKENDS = ("mlx", "torch")
PACKAGES = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "transformers")}
"""What a backend needs to run models."""


def missing(backend: str) -> str | None:
    """Return the first package that a backend needs and this machine has not, None where all are there."""
    return next((package for package in PACKAGES[backend] if find_spec(package) is None), None)


@overload
def choose(asked: str | None = None) -> str: ...
@overload
def choose(asked: str | None = None, *, or_none: bool) -> str | None: ...
def choose(asked: str | None = None, *, or_none: bool = False) -> str | None:
    """Return the backend that was asked for, or the best: a GPU's before a CPU's, and then MLX's.

    ``or_none``: return None where nothing was asked for and nothing is installed.

    Raises:
        KVMLXError: what was asked for is unknown or not installed, or nothing is.
    """
    if asked is not None:
        if asked not in BACKENDS:
            raise KVMLXError(f"unknown backend {asked!r}: {' or '.join(BACKENDS)} works")
        if package := missing(asked):
            raise KVMLXError(f"--backend {asked} needs the package {package}: pip install 'kvmlx[{asked}]'")
        return asked
    here = [backend for backend in BACKENDS if not missing(backend)]
    if not here and or_none:
        return None
    if not here:
        raise KVMLXError("no backend is installed: pip install 'kvmlx[mlx]' (Apple Silicon) or 'kvmlx[torch]' (NVIDIA)")
    if "torch" in here and sys.platform != "darwin" and _has_cuda():
        return "torch"
    return here[0]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
