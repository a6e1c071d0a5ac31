"""PyramidKV: more rows in the lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from kvmlx.stages.base import Allocate, require_int
from kvmlx.stages.common import largest_remainder


@dataclass(frozen=True)
class PyramidKV(Allocate):
    """Budgets fall linearly from the first layer to the last, whose share is 1 / ``beta`` of the mean.

    The line is the paper's, over the rows beside the protected ones, in exact arithmetic: the integer step of
    the authors' code adds up to more than was asked for (see ``published_budgets``). Where a layer has no
    more rows to keep the line gets flatter; their code turns uniform once fewer than twice the mean exist.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "2406.02069"
    summary: ClassVar[str] = "budgets fall linearly with depth"

    beta: int = 20

    def __post_init__(self) -> None:
        require_int("beta", self.beta, 1)

    def layer_budgets(self, tokens: int, limit: int, n_layers: int, protected: int) -> list[int]:
        """Return the rows per head of each layer, falling, their sum exact."""
        low = min(protected, limit)
        mean, most = tokens - low, limit - low
        if n_layers == 1 or mean <= 0 or mean >= most:
            return [tokens] * n_layers
        last = Fraction(mean, self.beta)
        first = min(2 * mean - last, Fraction(most))
        last = 2 * mean - first
        step = (first - last) / (n_layers - 1)
        shares = [first - layer * step for layer in range(n_layers)]
        return [low + share for share in largest_remainder(shares, n_layers * mean)]


def published_budgets(n_layers: int, capacity: int, window: int, tokens: int, beta: int = 20) -> list[int]:
    """Return the rows beside the window that the paper's code keeps in each layer.

    Args:
        capacity: rows per layer asked for, the window included.
        tokens: length of the prompt.
    """
    mean = capacity - window
    if tokens < capacity:
        return [max(0, tokens - window)] * n_layers
    if n_layers == 1 or tokens < 2 * mean:
        return [mean] * n_layers
    last = mean // beta
    first = 2 * mean - last
    if first >= tokens - window:
        first = tokens - window
        last = 2 * mean - first
    step = (first - last) // (n_layers - 1)
    return [first - layer * step for layer in range(n_layers)]
