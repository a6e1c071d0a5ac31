"""Plain integers: per-token affine groups along the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvmlx.stages.encode.codecs import Affine, Rotation
from kvmlx.stages.encode.sides import Sides


@dataclass(frozen=True)
class Int(Sides):
    """Round each group of channels of a token to ``2**bits`` evenly spaced levels; 16 bits keep rows exact.

    With ``rotate="hadamard"`` the channels are rotated first, which spreads outliers over all of them
    (QuaRot, arXiv 2404.00456).
    """

    name: ClassVar[str] = "int"
    summary: ClassVar[str] = "per-token affine groups, 2 to 8 bits, with an optional Hadamard rotation"
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8, 16)

    group_size: int | None = None
    """Channels that share a scale; None: the largest of 64, 32, 16, 8 that divides the head dim."""
    rotate: Rotation = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_in("group_size", (None, 8, 16, 32, 64, 128, 256))
        self._require_in("rotate", ("none", "hadamard"))

    def text(self) -> str:
        """Return ``int4(group_size=32)`` for ``int(bits=4, group_size=32)``, ``int4`` for ``int(bits=4)``."""
        head, text = f"int(bits={self.bits}", super().text()
        rest = text.removeprefix(head)
        if rest == text:
            return text
        return f"int{self.bits}" + ("" if rest == ")" else "(" + rest.removeprefix(", "))

    def key_codec(self) -> Affine | None:
        return self._codec(self.key_bits)

    def value_codec(self) -> Affine | None:
        return self._codec(self.value_bits)

    def _codec(self, bits: int | None) -> Affine | None:
        if bits is None or bits == 16:
            return None
        return Affine(bits, self.rotate, self.group_size)


ALIASES: dict[str, dict[str, Any]] = {f"int{bits}": {"bits": bits} for bits in Int.allowed_bits}
"""Names that stand for the stage with arguments filled in."""
