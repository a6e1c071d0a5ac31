"""What a list of caches holds, compressed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvmlx.cli.output import ratio, size


@dataclass(frozen=True, slots=True)
class Held:
    """A report on the caches of one model, for people and programs."""

    strategy: str | None
    """None where the stock cache holds everything."""
    tokens: int
    kept_tokens: float
    nbytes: int
    full_nbytes: int
    layers: int
    unmanaged: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        return self.nbytes / self.full_nbytes if self.full_nbytes else 0.0

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {**asdict(self), "ratio": self.ratio}


def held_by(caches: Any) -> Held:
    """Report on caches of kvmlx, on the stock caches of mlx-lm, or on the stock cache of transformers."""
    if type(caches).__module__.startswith("transformers."):
        return _held_by_transformers(caches.layers)
    if isinstance(caches, Sequence) and all(type(cache).__module__.startswith("mlx_lm.") for cache in caches):
        from mlx_lm.models.cache import KVCache

        full = [cache for cache in caches if isinstance(cache, KVCache)]
        others = tuple(type(cache).__name__ for cache in caches if not isinstance(cache, KVCache))
        tokens = max((cache.offset for cache in full), default=0)
        nbytes = sum(cache.nbytes for cache in full)
        return Held(None, tokens, tokens, nbytes, sum(map(_fp16_bytes, full)), len(full), others)
    import kvmlx

    report = kvmlx.report(caches)
    return Held(
        str(report.strategy),
        report.tokens,
        report.kept_tokens,
        report.nbytes,
        report.full_nbytes,
        report.layers,
        tuple(report.unmanaged),
    )


def _held_by_transformers(layers: Sequence[Any]) -> Held:
    from transformers.cache_utils import DynamicLayer

    full: list[Any] = [layer for layer in layers if type(layer) is DynamicLayer and layer.is_initialized]
    others = tuple(type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer)
    tokens = max((layer.get_seq_length() * layer.keys.shape[0] for layer in full), default=0)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in full)
    fp16 = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in full)
    return Held(None, tokens, tokens, nbytes, fp16, len(full), others)


def _fp16_bytes(cache: Any) -> int:
    """Return what a stock cache's tokens take in fp16, without its head-room."""
    if cache.keys is None:
        return 0
    heads, key_dim, value_dim = cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3]
    return cache.offset * heads * (key_dim + value_dim) * 2


def summary(held: Held, peak_nbytes: int | None, tokens_per_second: float | None) -> str:
    """Return the line that follows a generation; without a peak where the framework does not count it."""
    parts = [
        f"kept {held.kept_tokens:,.0f} of {held.tokens:,} tokens",
        f"{size(held.nbytes)}, {ratio(held.ratio)}",
    ]
    if peak_nbytes is not None:
        parts.append(f"peak {size(peak_nbytes)}")
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.1f} tok/s")
    return " · ".join(parts)


def chat_status(held: Held, nbytes_before: int) -> str:
    """Return one line on the cache of a chat, and how it has grown since the last."""
    grown = held.nbytes - nbytes_before
    return (
        f"cache {size(held.nbytes)} ({'-' if grown < 0 else '+'}{size(abs(grown))}) · "
        f"kept {held.kept_tokens:,.0f} of {held.tokens:,} tokens · {ratio(held.ratio)}"
    )
