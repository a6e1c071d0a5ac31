"""kvmlx: KV-cache compression for MLX and PyTorch.

Importing it imports no array framework, patches nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvmlx.strategy import Strategy
from kvmlx.types import CacheFileError, KVMLXError, StrategyError, UnsupportedModelError

if TYPE_CHECKING:
    from kvmlx.session import Report
    from kvmlx.stages.base import Stage

__version__ = "0.1.0"


def _adapter(backend: str | None = None) -> Any:
    """Load the adapter of a backend: the one place in kvmlx that names them."""
    if backend not in (None, "mlx"):
        raise KVMLXError(f"unknown backend {backend!r}; 'mlx' works")
    try:
        import kvmlx.backends.mlx as adapter
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("mlx", "mlx_lm"):
            raise
        raise KVMLXError(f"the mlx backend needs {error.name}: pip install 'kvmlx[mlx]'") from error
    return adapter


def make_prompt_cache(
    model: Any, strategy: str | Stage | Strategy, *, backend: str | None = None, inspect: bool = False
) -> list[Any]:
    """Return a compressed prompt cache for ``model``, to be given wherever mlx-lm takes a ``prompt_cache``.

    Args:
        model: an mlx-lm model.
        strategy: text such as ``"snapkv(budget=0.25) | int4"``, a stage, or a Strategy.
        backend: ``"mlx"``, or None for the one that the model belongs to. Never falls back to another.
        inspect: keep every row's position too, for tests and tools.

    Raises:
        StrategyError: the strategy is not one, or does not fit the model.
        UnsupportedModelError: the model cannot be served; the message says why and what works.
    """
    return _adapter(backend).make_prompt_cache(model, strategy, inspect=inspect)


def report(caches: Sequence[Any]) -> Report:
    """Return what the caches of one model hold: tokens seen and kept, bytes, ratio to the full 16-bit cache."""
    return _adapter().report(caches)


def settle(caches: Sequence[Any]) -> None:
    """Say that the prompt is complete: what the strategy does at its end is done now, not with the next token."""
    _adapter().settle(caches)


def save_prompt_cache(path: Any, caches: Sequence[Any], metadata: dict[str, str] | None = None) -> None:
    """Write caches to a file of docs/format.md: versioned, checksummed, written beside and renamed."""
    _adapter().save_prompt_cache(path, caches, metadata)


def load_prompt_cache(path: Any, *, model: Any = None, return_metadata: bool = False) -> Any:
    """Read caches from a file; raises CacheFileError for a truncated, damaged, foreign or newer one.

    With ``model`` the file's fingerprint must be that of the model.
    """
    return _adapter().load_prompt_cache(path, model=model, return_metadata=return_metadata)


__all__ = [
    "CacheFileError",
    "KVMLXError",
    "Strategy",
    "StrategyError",
    "UnsupportedModelError",
    "load_prompt_cache",
    "make_prompt_cache",
    "report",
    "save_prompt_cache",
    "settle",
]
