"""What a model gets instead of a layer's compressed keys or values: it can be handed to attention, nothing else."""

from __future__ import annotations

from typing import Any, NoReturn

from kvmlx.session import Session
from kvmlx.types import UnsupportedModelError


class RefusingRows:
    """Keys or values that no array holds. What an adapter does not define is refused by the model's name."""

    __slots__ = ()
    hint = ""
    """What else may help."""

    @property
    def session(self) -> Session:
        """The session of the layer whose rows these are."""
        raise NotImplementedError

    def _refuse(self, what: str) -> NoReturn:
        session = self.session
        raise UnsupportedModelError(
            f"{session.model.model_type} computes with its cached keys or values itself ({what}), so a cache "
            f"compressed by {str(session.strategy)!r} cannot serve it; 'full' works{self.hint}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __getitem__(self, item: Any) -> NoReturn:
        self._refuse("[...]")

    def __matmul__(self, other: Any) -> NoReturn:
        self._refuse("an operator")

    __rmatmul__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __matmul__
