"""Intervals for means of few, clustered, stratified scores: what may be called better, same or worse.

Questions about one context are not independent, so contexts are resampled (clusters), each task for itself (strata).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np

Verdict = Literal["better", "same", "worse"]
Strata = Sequence[Sequence[Sequence[float]]]
"""Tasks, each a list of contexts, each a list of numbers, one a question."""

CONFIDENCE = 0.95
RESAMPLES = 4000
SEED = 0
MIN_SAMPLES = 6
"""Contexts for an interval: even the whole range of five numbers holds the true median in 94% of cases only."""


def quartiles(numbers: Iterable[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third, within the range of the numbers."""
    low, middle, high = np.quantile(list(numbers), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of task means, with its confidence interval."""

    value: float
    low: float | None
    """None, as `high`: there are fewer than `MIN_SAMPLES` contexts, or a task has but one."""
    high: float | None
    samples: int
    """Contexts."""
    questions: int


def estimate(strata: Strata, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate | None:
    """Return the mean over tasks of each task's mean over questions, and its interval; None without any number.

    Percentile bootstrap over contexts within tasks. A task with n contexts is resampled with n - 1, which makes the
    variance of its mean unbiased (Rao and Wu 1988, doi:10.1080/01621459.1988.10478591), and the percentiles lie where
    Student's t has its own (Hesterberg 2015, arXiv:1411.5279): the plain bootstrap is too narrow for the few contexts
    that a benchmark has.
    """
    tasks = [task for task in strata if task]
    if not tasks:
        return None
    sums = [np.array([sum(context) for context in task]) for task in tasks]
    counts = [np.array([len(context) for context in task], float) for task in tasks]
    value = float(np.mean([s.sum() / c.sum() for s, c in zip(sums, counts, strict=True)]))
    samples, questions = sum(len(s) for s in sums), int(sum(c.sum() for c in counts))
    if samples < MIN_SAMPLES or min(len(task) for task in tasks) < 2:
        return Estimate(value, None, None, samples, questions)
    weights = [_weights(len(s), index, resamples, seed) for index, s in enumerate(sums)]
    means = np.array([w @ s / (w @ c) for w, s, c in zip(weights, sums, counts, strict=True)])
    tail = _tail(_freedom(means.var(axis=1), np.array([len(s) - 1 for s in sums])))
    # What is equal in every resample differs by rounding only, which must not decide about 0.
    low, high = (round(float(q), 12) for q in np.quantile(means.mean(axis=0), [tail, 1 - tail]))
    return Estimate(value, low, high, samples, questions)


def verdict(difference: Estimate | None) -> Verdict | None:
    """Return what a paired difference says; None where there are too few contexts for an interval."""
    if difference is None or difference.low is None or difference.high is None:
        return None
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "same"


@lru_cache(maxsize=128)
def _weights(n: int, stratum: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n contexts is drawn, float64 ``[resamples, n]``; the same for every method."""
    rng = np.random.default_rng([seed, stratum, n])
    return rng.multinomial(n - 1, np.full(n, 1 / n), size=resamples).astype(float)


def _freedom(variances: np.ndarray, each: np.ndarray) -> float:
    """Return the degrees of freedom of a sum of means with unequal variances (Welch and Satterthwaite)."""
    total = variances.sum()
    return float(total**2 / (variances**2 / each).sum()) if total > 0 else float(each.sum())


def _tail(freedom: float) -> float:
    """Return the normal's probability beyond Student's t quantile (Abramowitz and Stegun 26.7.5)."""
    z = -NormalDist().inv_cdf((1 - CONFIDENCE) / 2)
    t = z + (z**3 + z) / (4 * freedom)
    t += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return NormalDist().cdf(-t)
