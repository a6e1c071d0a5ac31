"""The frameworks' own caches as methods: their names, parameters, and text such as ``mlx-lm: affine(bits=4)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmlx.strategy import parse_calls
from kvmlx.types import StrategyError, suggest

MLX_LM = "mlx-lm"
TRANSFORMERS = "transformers"

KNOWN: dict[tuple[str, str], dict[str, Any]] = {
    (MLX_LM, "affine"): {"bits": 4, "group_size": 64},
    (MLX_LM, "rotating"): {"size": 512, "keep": 4},
    (TRANSFORMERS, "quantized"): {"bits": 4, "backend": "quanto"},
}
"""Parameters with their defaults, by framework and name."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "affine.bits": (2, 3, 4, 5, 6, 8),
    "affine.group_size": (32, 64, 128),
    "quantized.bits": (1, 2, 3, 4, 8),
    "quantized.backend": ("quanto", "hqq", "fp8"),
}
"""What a parameter may be; a number of tokens >= 0 where there is no entry."""

PACKAGES = {"quanto": "optimum optimum-quanto", "hqq": "hqq", "fp8": "--upgrade transformers"}
"""The packages that a backend of transformers' QuantizedCache needs."""
BITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8), "fp8": (8,)}
"""What a backend of transformers' QuantizedCache can do."""


@dataclass(frozen=True)
class Baseline:
    """A framework's own cache: ``affine`` is mlx-lm's QuantizedKVCache, ``rotating`` its RotatingKVCache,
    ``quantized`` transformers' QuantizedCache.
    """

    framework: str
    name: str
    given: tuple[tuple[str, Any], ...] = ()
    """The parameters that were written, in order."""

    @property
    def parameters(self) -> dict[str, Any]:
        return KNOWN[self.framework, self.name] | dict(self.given)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.given)
        return f"{self.framework}: {self.name}" + (f"({arguments})" if arguments else "")


def parse(text: str) -> Baseline | None:
    """Read a baseline such as ``mlx-lm: affine(bits=4)``; None where the text does not begin with a framework.

    Raises:
        StrategyError: the framework has no such cache, or it has no such parameter.
    """
    framework, colon, rest = text.partition(":")
    framework = framework.strip()
    if not colon or framework not in (MLX_LM, TRANSFORMERS):
        return None
    (name, arguments), *more = parse_calls(rest.strip())
    known = [n for f, n in KNOWN if f == framework]
    if name not in known:
        raise StrategyError(f"{framework} has no cache {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    if more:
        raise StrategyError(
            f"{text!r} goes on after the cache: {framework}'s own caches cannot be combined with stages"
        )
    _check(framework, name, arguments)
    return Baseline(framework, name, tuple(arguments.items()))


def _check(framework: str, name: str, given: Mapping[str, Any]) -> None:
    defaults = KNOWN[framework, name]
    for key, value in given.items():
        if key not in defaults:
            raise StrategyError(
                f"{name} has no parameter {key!r}.{suggest(key, defaults)} It takes: {', '.join(defaults)}"
            )
        choices = CHOICES.get(f"{name}.{key}")
        if choices is not None and value not in choices:
            raise StrategyError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if choices is None and (type(value) is not int or value < 0):
            raise StrategyError(f"{key} must be a number of tokens >= 0, got {value!r}")
    all_given = defaults | dict(given)
    if name == "rotating" and all_given["size"] <= all_given["keep"]:
        raise StrategyError(f"size={all_given['size']} must be more than keep={all_given['keep']}")
    if name == "quantized" and all_given["bits"] not in (bits := BITS[all_given["backend"]]):
        allowed = ", ".join(map(str, bits))
        raise StrategyError(f"backend={all_given['backend']} has bits={allowed}, got bits={all_given['bits']}")
