"""Which of MLX's paths runs: Metal kernels, or plain operations."""

from __future__ import annotations

import os
import sys

import mlx.core as mx

from kvmlx.backends.mlx.metal.backend import BACKEND as METAL
from kvmlx.backends.mlx.ops import BACKEND, MLXBackend
from kvmlx.types import KVMLXError

VARIABLE = "KVMLX_KERNELS"
"""Environment variable: ``auto`` (the default), ``metal`` or ``plain``."""


def why_no_metal() -> str | None:
    """Return why Metal kernels cannot run here, None where they can."""
    if not mx.metal.is_available():
        return "this is not macOS" if sys.platform != "darwin" else "MLX sees no Metal device"
    if mx.default_device() != mx.Device(mx.gpu):
        return f"MLX's default device is {mx.default_device()}"
    return None


def backend() -> MLXBackend:
    """Return the backend that new caches take: Metal kernels where there is a GPU, unless $KVMLX_KERNELS says else.

    Raises:
        KVMLXError: the variable asks for Metal where there is none, or for something unknown.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", "metal", "plain"):
        raise KVMLXError(f"{VARIABLE}={asked!r} is none of auto, metal, plain")
    why = why_no_metal()
    if asked == "metal" and why:
        raise KVMLXError(f"{VARIABLE}=metal asks for Metal kernels, but {why}; auto or plain works here")
    return BACKEND if asked == "plain" or why else METAL
