"""TurboQuant: a randomized rotation, then one code book for every channel (arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import require
from kvmlx.stages.encode.codecs import CodeBook, Scale
from kvmlx.stages.encode.sides import Sides


@dataclass(frozen=True)
class TurboQuant(Sides):
    """Rotate rows until their channels look normal, then round to the Lloyd-Max levels of N(0, 1).

    One float16 scale a row is all the metadata. The default scale is EDEN's (arXiv 2108.08842), which makes
    inner products unbiased; the paper stores the norm, which shrinks them.
    """

    name: ClassVar[str] = "turboquant"
    paper: ClassVar[str] = "2504.19874"
    summary: ClassVar[str] = "randomized Hadamard rotation and a Lloyd-Max code book, 1 to 6 bits"
    allowed_bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)

    scale: Scale = "unbiased"
    """What a row's scale is: ``unbiased`` or ``norm``."""
    center: int = 0
    """Keys only: tokens whose per-channel mean is removed and stored apart; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_in("scale", ("unbiased", "norm"))
        self._require_in("center", (0, 16, 32, 64, 128, 256))
        require(
            self.center == 0 or self.key_bits is not None,
            f"center={self.center} removes the mean of keys, but only values are encoded; leave it out",
        )

    def key_codec(self) -> CodeBook | None:
        return self._codec(self.key_bits, self.center)

    def value_codec(self) -> CodeBook | None:
        return self._codec(self.value_bits, 0)

    def _codec(self, bits: int | None, center: int) -> CodeBook | None:
        return None if bits is None else CodeBook(bits, scale=self.scale, center=center)
