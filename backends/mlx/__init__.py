"""MLX: plain operations on CPU, Metal and CUDA builds, and the adapter to mlx-lm."""

from kvmlx.backends.mlx.adapter import (
    KVMLXCache,
    install,
    layers_of,
    make_prompt_cache,
    report,
    settle,
    unwrap_model,
    wrap_model,
)
from kvmlx.backends.mlx.files import load_prompt_cache, save_prompt_cache
from kvmlx.backends.mlx.ops import BACKEND, MLXBackend

__all__ = [
    "BACKEND",
    "KVMLXCache",
    "MLXBackend",
    "install",
    "layers_of",
    "load_prompt_cache",
    "make_prompt_cache",
    "report",
    "save_prompt_cache",
    "settle",
    "unwrap_model",
    "wrap_model",
]
