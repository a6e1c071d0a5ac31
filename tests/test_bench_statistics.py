"""Intervals and verdicts of the benchmark: answers that are known, and how often an interval holds the truth."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from kvmlx.bench import statistics
from kvmlx.bench.statistics import Estimate, estimate, verdict


def one_each(*tasks: list[float]) -> list[list[list[float]]]:
    """One question in each context."""
    return [[[value] for value in task] for task in tasks]


def test_mean_of_task_means_weighs_tasks_alike() -> None:
    got = estimate(one_each([1.0, 1.0], [0.0, 0.0, 0.0, 1.0]))
    assert got is not None
    assert got.value == pytest.approx((1 + 0.25) / 2)
    assert (got.samples, got.questions) == (6, 6)


def test_mean_of_a_task_weighs_questions_alike() -> None:
    got = estimate([[[1.0, 1.0, 1.0], [0.0]]])
    assert got is not None and got.value == pytest.approx(0.75) and got.questions == 4


def test_nothing_is_no_estimate() -> None:
    assert estimate([]) is None and estimate([[]]) is None


def test_one_context_has_no_interval_however_many_questions() -> None:
    got = estimate([[[0.0, 1.0, 1.0, 0.0]]])
    assert got == Estimate(0.5, None, None, 1, 4)
    assert verdict(got) is None
    mixed = estimate(one_each([1.0], [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]))
    assert mixed is not None and mixed.low is None


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7])
def test_equal_numbers_have_a_point_for_an_interval(value: float) -> None:
    got = estimate([[[value, value]] * 7, [[value]] * 3])
    assert got is not None and got.low == got.high == pytest.approx(value)
    assert verdict(got) == ("same" if value == 0 else "better" if value > 0 else "worse")


def test_rounding_decides_nothing() -> None:
    """0.1 + 0.2 - 0.3 is not 0."""
    assert verdict(estimate([[[0.1, 0.2, -0.3]] * 8])) == "same"


def test_interval_needs_contexts_enough() -> None:
    assert verdict(estimate(one_each([-1.0] * 5))) is None
    assert verdict(estimate(one_each([-1.0] * 6))) == "worse"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, -1], "same"),
        ([0, 0, 0, 0, 0, 0, 0, -1, -1, -1], "same"),
        ([0, 0, 0, 0, 0, -1, -1, -1, -1, -1], "worse"),
        ([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], "better"),
        ([1, 1, 1, 1, 1, -1, -1, -1, -1, -1], "same"),
    ],
)
def test_verdicts(values: list[float], expected: str) -> None:
    assert verdict(estimate(one_each([float(v) for v in values]))) == expected


def test_questions_of_a_context_are_not_independent() -> None:
    """Copying each question ten times adds no information, and must not make the interval narrower."""
    values = np.random.default_rng(0).random(12)
    once, tenfold = estimate([[[v] for v in values]]), estimate([[[v] * 10 for v in values]])
    assert once is not None and tenfold is not None
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_interval_of_a_large_sample_is_that_of_the_normal() -> None:
    values = np.random.default_rng(1).normal(size=400)
    got = estimate(one_each(list(values)))
    half = 1.96 * values.std(ddof=1) / 20
    assert got is not None and got.low is not None and got.high is not None
    assert got.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_spread_between_tasks_is_not_uncertainty() -> None:
    """Tasks are strata: they are the same ones in every benchmark."""
    got = estimate(one_each([1.0] * 5, [0.0] * 5))
    assert got is not None and got.low == got.high == 0.5


def test_same_seed_same_interval() -> None:
    data = one_each([0.0, 1.0, 0.5, 0.2], [1.0, 0.0, 0.0])
    assert estimate(data) == estimate(data) != estimate(data, seed=1)


def test_freedom_of_unequal_spreads() -> None:
    """Equal variances add their freedoms; one that outweighs the others has its own."""
    each = np.array([4, 4, 4])
    assert statistics._freedom(np.array([1.0, 1.0, 1.0]), each) == pytest.approx(12)
    assert statistics._freedom(np.array([1.0, 0.0, 0.0]), each) == pytest.approx(4)
    assert statistics._freedom(np.zeros(3), each) == 12


@pytest.mark.parametrize(("freedom", "t"), [(4, 2.776), (9, 2.262), (30, 2.042)])
def test_tail_is_student_s(freedom: int, t: float) -> None:
    assert -NormalDist().inv_cdf(statistics._tail(freedom)) == pytest.approx(t, abs=0.01)


@pytest.mark.parametrize(("tasks", "contexts", "least"), [(1, 8, 0.92), (8, 2, 0.9), (4, 3, 0.92), (6, 10, 0.93)])
def test_intervals_hold_the_truth(tasks: int, contexts: int, least: float) -> None:
    """Of 400 experiments with skewed, clustered scores, about 95% of the intervals hold the true mean.

    A little less with two contexts a task, whose spread nothing can tell well.
    """
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        ease = rng.beta(4, 1.5, size=(tasks, contexts, 1))
        scores = (rng.random((tasks, contexts, 4)) < ease).astype(float)
        got = estimate(scores.tolist())
        assert got is not None and got.low is not None and got.high is not None
        held += got.low <= 4 / 5.5 <= got.high
    assert least <= held / 400 <= 0.99


def test_equal_methods_are_seldom_told_apart() -> None:
    """Paired differences of two methods that are right equally often: about 5% are called otherwise."""
    rng = np.random.default_rng(3)
    told = 0
    for _ in range(400):
        ease = rng.beta(4, 1.5, size=(5, 6, 1))
        a, b = ((rng.random((5, 6, 2)) < ease).astype(float) for _ in range(2))
        told += verdict(estimate((a - b).tolist())) != "same"
    assert told / 400 <= 0.08
