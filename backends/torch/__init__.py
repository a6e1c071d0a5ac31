"""PyTorch: plain operations on CPU and CUDA, Triton kernels, and the adapter to transformers.

The adapter is loaded when it is first asked for: the primitives need torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmlx.backends.torch.adapter import (
        KVMLXCache,
        KVMLXLayer,
        install,
        layers_of,
        make_prompt_cache,
        report,
        settle,
        switch,
    )
    from kvmlx.backends.torch.files import load_prompt_cache, save_prompt_cache

__all__ = [
    "KVMLXCache",
    "KVMLXLayer",
    "install",
    "layers_of",
    "load_prompt_cache",
    "make_prompt_cache",
    "report",
    "save_prompt_cache",
    "settle",
    "switch",
]
_HOMES = dict.fromkeys(__all__, "adapter") | dict.fromkeys(("load_prompt_cache", "save_prompt_cache"), "files")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def load_adapter() -> None:
    """Import the adapter now: what it needs and is missing is an error here."""
    for home in set(_HOMES.values()):
        import_module(f"{__name__}.{home}")
