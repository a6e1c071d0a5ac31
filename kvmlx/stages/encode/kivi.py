"""KIVI: keys per channel, values per token (arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.encode.codecs import Affine, Channel
from kvmlx.stages.encode.sides import Sides


@dataclass(frozen=True)
class KIVI(Sides):
    """Quantize keys per channel over groups of tokens, values per token over groups of channels.

    The outliers of keys sit in few channels, so a channel's own scale serves them. The paper's residual of
    exact tokens is ``recent``; keys leave it in whole groups.
    """

    name: ClassVar[str] = "kivi"
    paper: ClassVar[str] = "2402.02750"
    summary: ClassVar[str] = "keys per channel over groups of tokens, values per token, 2 to 8 bits"
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)

    group_size: int = 32
    """Tokens that share a key channel's scale, and channels that share a value's scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_in("group_size", (8, 16, 32, 64, 128, 256))

    def key_codec(self) -> Channel | None:
        return None if self.key_bits is None else Channel(self.key_bits, group_size=self.group_size)

    def value_codec(self) -> Affine | None:
        return None if self.value_bits is None else Affine(self.value_bits, group_size=self.group_size)
