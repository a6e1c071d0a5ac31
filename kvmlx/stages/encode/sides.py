"""What the encode stages share: how many bits each side has, and what stays exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvmlx.stages.base import Encode, require, require_int


@dataclass(frozen=True)
class Sides(Encode):
    """Bits for both sides, or for keys and values apart; a side without bits is left to another stage.

    Equal bits on both sides are the same stage however they are written: ``bits`` is then what is stored.
    """

    allowed_bits: ClassVar[tuple[int, ...]]

    bits: int | None = None
    """Bits of keys and values."""
    k: int | None = None
    """Bits of keys; None: this stage leaves them alone."""
    v: int | None = None
    """Bits of values; None: this stage leaves them alone."""
    sinks: int = 4
    """First tokens kept exact."""
    recent: int = 64
    """Newest tokens kept exact."""

    def __post_init__(self) -> None:
        for name in ("bits", "k", "v"):
            self._require_in(name, (None, *self.allowed_bits))
        given = self.k is not None or self.v is not None
        require(
            (self.bits is None) == given,
            f"{self.name} takes either bits for both sides, or k and v apart: "
            f"{self.name}(bits=4), {self.name}(k=8, v=4), {self.name}(v=4); "
            f"got bits={self.bits}, k={self.k}, v={self.v}",
        )
        if self.k is not None and self.k == self.v:
            object.__setattr__(self, "bits", self.k)
            object.__setattr__(self, "k", None)
            object.__setattr__(self, "v", None)
        require_int("sinks", self.sinks, 0)
        require_int("recent", self.recent, 0)

    @property
    def key_bits(self) -> int | None:
        """Bits of keys, None where the stage does not cover them."""
        return self.bits if self.bits is not None else self.k

    @property
    def value_bits(self) -> int | None:
        """Bits of values, None where the stage does not cover them."""
        return self.bits if self.bits is not None else self.v

    def _require_in(self, name: str, allowed: tuple[object, ...]) -> None:
        value = getattr(self, name)
        ok = any(type(value) is type(a) and value == a for a in allowed)
        shown = ", ".join(str(a) for a in allowed if a is not None)
        require(ok, f"{name} must be one of {shown}, got {value!r}")
