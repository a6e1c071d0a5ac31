"""Equal bytes: the budget with which a method keeps a given share of a full 16-bit cache."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from kvmlx.bench import baselines
from kvmlx.bench.baselines import Baseline
from kvmlx.explain import FP16_BYTES, LayerShape, Plan, layer_shapes, shapes_of_info
from kvmlx.store import SPAN_STEP
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError, ModelInfo

STEP = 256
"""Growth of mlx-lm's own caches."""
SLACK = 1e-9
DRAWS, UNEVENNESS = 256, 0.4
"""Random shares over which unequal heads are averaged, and the standard deviation of their logarithms."""
SPREAD = 2.0
"""Standard deviations that unequal heads are left below their share: 98 of 100 contexts then hold no more."""

Model = ModelInfo | Mapping[str, Any]
"""What `explain` takes: the content of config.json, or a ModelInfo with sizes."""


def family_of(method: str) -> str:
    """Return a method with its budget left open: ``snapkv | small`` of ``snapkv(budget=0.25) | small``."""
    text = re.sub(rf"\b{_knob(method)}\s*=\s*[\w.+-]+\s*(,\s*)?", "", method)
    text = re.sub(r"\(\s*\)", "", re.sub(r",\s*\)", ")", re.sub(r"\(\s+", "(", text)))
    return " | ".join(part.strip() for part in text.split("|"))


def with_budget(family: str, tokens: int | float) -> str:
    """Return a method that keeps ``tokens`` rows per head, or that fraction of them.

    Raises:
        KVMLXError: it has no budget.
    """
    if not has_budget(family):
        raise KVMLXError(f"{family!r} has no budget: it keeps every token")
    framework, colon, rest = family_of(family).rpartition(":")
    name, rest = re.fullmatch(r"\s*([\w-]+)\s*(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    given = f"{_knob(family)}={tokens}"
    tail = f"({given}, {rest[1:].lstrip()}" if rest.startswith("(") else f"({given}) {rest}".rstrip()
    return f"{framework}: {name}{tail}" if colon else name + tail


def has_budget(method: str) -> bool:
    """Whether a number of tokens says what the method keeps.

    Raises:
        StrategyError: the text is no method.
    """
    baseline = baselines.parse(method)
    if baseline is not None:
        return baseline.name == "rotating"
    return Strategy.parse(method).select is not None


def _knob(method: str) -> str:
    return "size" if baselines.parse(method) is not None else "budget"


def ratio_of(method: str, tokens: int, model: Model) -> float:
    """Return bytes kept of ``tokens`` tokens / bytes of a full 16-bit cache, exact rows counted in 16 bits.

    What is held at the end of the context, metadata, head-room and observations included, as `explain` counts it:
    equal to the byte to what kvmlx's caches hold, except where heads keep unequal shares (``adakv``). What the
    rounding of each head's room takes there depends on the text, and is counted as it is expected. ``full`` is 1 by
    definition.
    """
    baseline = baselines.parse(method)
    if baseline is not None:
        return _baseline_ratio(baseline, tokens)
    strategy = Strategy.parse(method)
    return 1.0 if str(strategy) == "full" else _ratio(strategy, tokens, _shapes(model))[0]


def match(method: str, target: float, tokens: int, model: Model) -> tuple[str, float]:
    """Return the method with the largest budget that keeps ``1 / target`` of a full 16-bit cache, and its ratio.

    Args:
        method: a strategy or baseline; a budget that it has is replaced.
        target: the compression asked for, e.g. 4.0.
        tokens: length of the context.
        model: its config.json or description.

    Raises:
        KVMLXError: the method cannot be so small; the message says what it holds at least.
    """
    if not target >= 1.0:
        raise KVMLXError(f"a compression is at least 1x, got {target!r}")
    if not has_budget(method):
        return method, _check(method, ratio_of(method, tokens, model), target, tokens)
    family = family_of(method)
    ratio, least, unit = _careful(family, tokens, model)
    if least >= tokens:
        raise KVMLXError(f"{family!r} keeps at least {least} tokens: a context of {tokens} cannot be compressed by it")
    _check(family, ratio(least), target, tokens)
    chosen = with_budget(family, _largest(ratio, 1 / target + SLACK, least, tokens, unit))
    return chosen, ratio_of(chosen, tokens, model)


def _check(method: str, ratio: float, target: float, tokens: int) -> float:
    if ratio > 1 / target + SLACK:
        raise KVMLXError(
            f"{method!r} holds at least {ratio:.3g} of fp16 at {tokens} tokens ({1 / ratio:.1f}x), "
            f"{target:g}x asks for {1 / target:.3g}"
        )
    return ratio


def _careful(family: str, tokens: int, model: Model) -> tuple[Callable[[int], float], int, int]:
    """Return what a budget holds at most, in nearly all contexts, the least budget, and rows encoded together."""
    baseline = baselines.parse(family)
    if baseline is not None:
        return lambda size: min(size, tokens) / tokens, baseline.parameters["keep"] + 1, 1
    strategy, shapes = Strategy.parse(family), _shapes(model)

    @cache
    def ratio(budget: int) -> float:
        stages = (replace(s, budget=budget) if s is strategy.select else s for s in strategy.stages)
        expected, deviation = _ratio(Strategy(tuple(stages)), tokens, shapes)
        return expected + SPREAD * deviation

    return ratio, strategy.sinks + strategy.recent + 1, Plan(strategy, len(shapes), FP16_BYTES).unit


def _largest(ratio: Callable[[int], float], limit: float, low: int, high: int, unit: int) -> int:
    """Return the largest budget in ``[low, high]`` whose ratio is at most the limit; that of ``low`` is.

    A row more may take less: what fills a block of ``unit`` rows is encoded, what is left over stays exact. The ratio
    grows only from block to block, so each number of rows left over is searched by itself.
    """
    best = low
    for first in range(low, min(low + unit, high + 1)):
        below, above = -1, (high - first) // unit
        while below < above:
            middle = (below + above + 1) // 2
            below, above = (middle, above) if ratio(first + middle * unit) <= limit else (below, middle - 1)
        best = max(best, first + below * unit if below >= 0 else low)
    return best


def _baseline_ratio(baseline: Baseline, tokens: int) -> float:
    """Return the share that a framework's own cache keeps, with a scale and a zero of 16 bits for each group."""
    parameters = baseline.parameters
    if baseline.name == "rotating":
        return min(parameters["size"], tokens) / tokens
    if baseline.name == "affine":
        return -(-tokens // STEP) * STEP / tokens * (parameters["bits"] + 32 / parameters["group_size"]) / 16
    metadata = 0.0 if parameters["backend"] == "fp8" else 32 / 64
    return (parameters["bits"] + metadata) / 16


def _shapes(model: Model) -> list[LayerShape]:
    shapes = shapes_of_info(model) if isinstance(model, ModelInfo) else layer_shapes(model)
    return [shape for shape in shapes if shape.kind == "full"]


def _ratio(strategy: Strategy, tokens: int, shapes: list[LayerShape]) -> tuple[float, float]:
    """Return what is expected to be held as a share of a full 16-bit cache, and its standard deviation."""
    plan = Plan(strategy, len(shapes), FP16_BYTES)
    nbytes, variance = 0.0, 0.0
    for (shape, rows), count in Counter(zip(shapes, plan.kept(tokens), strict=True)).items():
        if strategy.ragged and rows < tokens:
            held, deviation = _ragged_bytes(plan, shape, tokens, rows)
        else:
            held, deviation = plan.held(shape, tokens, rows)[0], 0.0
        nbytes += count * (held + plan.observed(shape, prefilling=False))
        variance += count * deviation**2
    full = sum(tokens * shape.row_elements * FP16_BYTES for shape in shapes)
    return nbytes / full, variance**0.5 / full


def _ragged_bytes(plan: Plan, shape: LayerShape, tokens: int, rows: int) -> tuple[float, float]:
    """Return the bytes expected of a layer whose heads keep unequal shares, and their standard deviation.

    Over random shares of the right sum: each head's room is rounded up by itself, and the tail has room for the head
    with most rows left over from whole blocks.
    """
    protected = plan.strategy.sinks + plan.strategy.recent
    unit, heads = plan.unit, shape.n_kv_heads
    step = math.lcm(SPAN_STEP, unit)
    most = tokens - protected
    mean = max(rows - protected, 0)
    # The smaller part is shared out, of what is kept and what is dropped: no head keeps more rows than there are.
    shares = _shared(heads, mean) if mean <= most / 2 else most - _shared(heads, most - mean)
    shares = np.clip(shares, 0, most)
    left = shares % unit
    spans = -(-(shares - left) // step) * step
    tails = np.array([plan.held(shape, tokens, protected + n)[0] for n in range(unit)])
    row_bytes = (plan.held(shape, tokens, protected + step)[0] - tails[0]) / (heads * step)
    nbytes = tails[left.max(axis=1)] + spans.sum(axis=1) * row_bytes
    return float(nbytes.mean()), float(nbytes.std())


def _shared(heads: int, mean: int) -> np.ndarray:
    """Return draws of how unequally heads share ``heads * mean`` rows, ``[DRAWS, heads]``."""
    weights = np.random.default_rng(0).lognormal(0.0, UNEVENNESS, (DRAWS, heads))
    shares = np.floor(heads * mean * weights / weights.sum(axis=1, keepdims=True)).astype(int)
    return shares + (np.arange(heads) < heads * mean - shares.sum(axis=1, keepdims=True))
