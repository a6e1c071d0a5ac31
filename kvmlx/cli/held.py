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


def held_by(caches: Sequence[Any]) -> Held:
    """Report on caches of kvmlx, or on the stock caches of mlx-lm."""
    from mlx_lm.models.cache import KVCache

    if all(type(cache).__module__.startswith("mlx_lm.") for cache in caches):
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


def _fp16_bytes(cache: Any) -> int:
    """Return what a stock cache's tokens take in fp16, without its head-room."""
    if cache.keys is None:
        return 0
    heads, key_dim, value_dim = cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3]
    return cache.offset * heads * (key_dim + value_dim) * 2


def summary(held: Held, peak_nbytes: int, tokens_per_second: float | None) -> str:
    """Return the line that follows a generation."""
    parts = [
        f"kept {held.kept_tokens:,.0f} of {held.tokens:,} tokens",
        f"{size(held.nbytes)}, {ratio(held.ratio)}",
        f"peak {size(peak_nbytes)}",
    ]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.1f} tok/s")
    return " · ".join(parts)
