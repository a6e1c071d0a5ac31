"""kvmlx: KV-cache compression for MLX and PyTorch.

Importing it imports no array framework, patches nothing and prints nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvmlx.strategy import Strategy
from kvmlx.types import CacheFileError, KVMLXError, StrategyError, UnsupportedModelError

if TYPE_CHECKING:
    from kvmlx.session import Report
    from kvmlx.stages.base import Stage

__version__ = "0.1.0"


def _adapter(backend: str | None = None, owner: Any = None) -> Any:
    """Load the adapter of a backend: the one place in kvmlx that names them.

    Args:
        backend: ``"mlx"`` or ``"torch"``; None for the one that ``owner`` belongs to.
        owner: a model, or caches; None: any backend's that is installed.
    """
    homes = {"mlx": ("mlx", "mlx_lm"), "torch": ("torch", "transformers")}
    parts = [owner, *owner] if isinstance(owner, list | tuple) else [owner]
    roots = {_package(cls) for part in parts for cls in type(part).__mro__}
    own = next((name for name, packages in homes.items() if roots & {name, *packages}), None)
    if backend not in (None, *homes):
        raise KVMLXError(f"unknown backend {backend!r}; {' or '.join(map(repr, homes))} works")
    if backend and own and backend != own:
        raise KVMLXError(f"backend={backend!r} cannot serve what belongs to {own}: leave the argument out")
    name = backend or own
    if name is None:
        name = next((n for n, packages in homes.items() if all(map(find_spec, packages))), "mlx")
    try:
        if name == "mlx":
            import kvmlx.backends.mlx as adapter
        else:
            import kvmlx.backends.torch as adapter

            adapter.load_adapter()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in homes[name]:
            raise
        raise KVMLXError(f"the {name} backend needs {error.name}: pip install 'kvmlx[{name}]'") from error
    return adapter


def _package(cls: type) -> str:
    """Return the package that a class comes from; of kvmlx's own, the backend."""
    words = cls.__module__.split(".")
    return words[2] if words[:2] == ["kvmlx", "backends"] and len(words) > 2 else words[0]


def make_prompt_cache(
    model: Any, strategy: str | Stage | Strategy, *, backend: str | None = None, inspect: bool = False
) -> Any:
    """Return a compressed prompt cache for ``model``.

    For a model of mlx-lm: a list, to be given wherever mlx-lm takes a ``prompt_cache``. For one of transformers: a
    `transformers.Cache`, to be given as ``past_key_values``; the model's attention is then set to kvmlx's, which
    hands every other cache on to the one that it had.

    Args:
        model: an mlx-lm model, or one of transformers.
        strategy: text such as ``"snapkv(budget=0.25) | int4"``, a stage, or a Strategy.
        backend: ``"mlx"``, ``"torch"``, or None for the one that the model belongs to. Never falls back to another.
        inspect: keep every row's position too, for tests and tools.

    Raises:
        StrategyError: the strategy is not one, or does not fit the model.
        UnsupportedModelError: the model cannot be served; the message says why and what works.
        KVMLXError: the backend is unknown, not installed, or not that of the model.
    """
    return _adapter(backend, model).make_prompt_cache(model, strategy, inspect=inspect)


def report(caches: Any) -> Report:
    """Return what the caches of one model hold: tokens seen and kept, bytes, ratio to the full 16-bit cache."""
    return _adapter(owner=caches).report(caches)


def settle(caches: Any) -> None:
    """Say that the prompt is complete: what the strategy does at its end is done now, not with the next token."""
    _adapter(owner=caches).settle(caches)


def save_prompt_cache(path: Any, caches: Any, metadata: dict[str, str] | None = None) -> None:
    """Write caches to a file of docs/format.md: versioned, checksummed, written beside and renamed."""
    _adapter(owner=caches).save_prompt_cache(path, caches, metadata)


def load_prompt_cache(
    path: Any, *, model: Any = None, backend: str | None = None, return_metadata: bool = False
) -> Any:
    """Read caches from a file; raises CacheFileError for a truncated, damaged, foreign or newer one.

    With ``model`` the file's fingerprint must be that of the model, whatever backend wrote it. Without, the caches
    are those of ``backend``, or of the one that is installed (mlx before torch).
    """
    return _adapter(backend, model).load_prompt_cache(path, model=model, return_metadata=return_metadata)


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
