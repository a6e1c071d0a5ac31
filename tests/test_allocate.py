"""Allocators: published numbers, exact sums, bounds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlx.stages.allocate.adakv import AdaKV
from kvmlx.stages.allocate.pyramidkv import PyramidKV, published_budgets
from kvmlx.stages.allocate.uniform import Uniform
from kvmlx.stages.common import largest_remainder
from kvmlx.types import StrategyError


def test_published_pyramid() -> None:
    caps = published_budgets(32, capacity=2048, window=32, tokens=32768)
    assert (caps[0] + 32, caps[-1] + 32) == (3964, 151)
    assert np.mean(caps) + 32 == 2057.5
    caps = published_budgets(32, capacity=128, window=8, tokens=32768)
    assert (caps[0] + 8, caps[-1] + 8, np.mean(caps) + 8) == (242, 25, 133.5)


def test_published_pyramid_of_short_prompts() -> None:
    assert published_budgets(4, capacity=128, window=8, tokens=100) == [92] * 4
    assert published_budgets(4, capacity=128, window=8, tokens=200) == [120] * 4
    assert published_budgets(4, capacity=128, window=8, tokens=241)[0] == 233
    assert published_budgets(1, capacity=128, window=8, tokens=999) == [120]


@pytest.mark.parametrize(("capacity", "window", "tokens"), [(2048, 32, 32768), (128, 8, 32768), (512, 64, 1000)])
def test_pyramid_follows_the_published_line(capacity: int, window: int, tokens: int) -> None:
    ours = np.array(PyramidKV().layer_budgets(capacity, tokens, 32, window))
    theirs = np.array(published_budgets(32, capacity, window, tokens)) + window
    assert ours.sum() == 32 * capacity
    # Their integer step is short of the exact one by less than one row a layer.
    gap = theirs - ours
    assert abs(gap[0]) <= 1
    assert np.all((gap >= -1) & (gap <= np.arange(32) + 1))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pyramid_is_exact_falling_and_bounded(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 5000), "limit")
    protected = data.draw(st.integers(0, 300), "protected")
    low = min(protected, limit)
    tokens = data.draw(st.integers(max(1, low), limit), "tokens")
    n_layers = data.draw(st.integers(1, 80), "n_layers")
    beta = data.draw(st.integers(1, 50), "beta")
    shares = PyramidKV(beta=beta).layer_budgets(tokens, limit, n_layers, protected)
    assert len(shares) == n_layers
    assert sum(shares) == n_layers * tokens
    assert all(low <= share <= limit for share in shares)
    assert shares == sorted(shares, reverse=True)


def adakv_oracle(scores: np.ndarray, tokens: int, floor: Fraction) -> list[Fraction]:
    """Return the shares before rounding, by a loop over all entries; for scores without ties."""
    entries = []
    for head, row in enumerate(scores.astype(np.float64)):
        weight = sum(sorted(row, reverse=True)[:tokens]) / sum(row)
        entries += [(s * weight, head) for s in row]
    won = [head for _, head in sorted(entries, reverse=True)[: len(scores) * tokens]]
    return [won.count(head) * (1 - floor) + tokens * floor for head in range(len(scores))]


@pytest.mark.parametrize(("h", "t", "tokens"), [(1, 9, 4), (3, 65, 17), (8, 63, 20), (8, 200, 1)])
@pytest.mark.parametrize("floor", ["0.2", "0", "1", "0.35"])
def test_adakv(h: int, t: int, tokens: int, floor: str) -> None:
    rng = np.random.default_rng(h * t + tokens)
    scores = (rng.random((h, t)) ** rng.integers(1, 12, (h, 1))).astype(np.float32)
    shares = adakv_oracle(scores, tokens, Fraction(floor))
    budgets = AdaKV(floor=float(floor)).head_budgets(scores, tokens, 68)
    assert budgets.sum() == h * tokens
    assert all(abs(int(budget) - share) < 1 for budget, share in zip(budgets, shares, strict=True))
    # Largest remainder: no head that was rounded down had more to lose than one that was rounded up.
    up = [share % 1 for budget, share in zip(budgets, shares, strict=True) if budget > share]
    down = [share % 1 for budget, share in zip(budgets, shares, strict=True) if budget < share]
    assert not up or not down or min(up) >= max(down)


def test_adakv_gives_more_to_the_head_that_spreads_its_attention() -> None:
    focused, spread = np.full(100, 0.001), np.full(100, 0.01)
    focused[3] = 0.9
    budgets = AdaKV().head_budgets(np.stack([focused, spread]).astype(np.float32), 20, 0)
    assert budgets.tolist() == [5, 35]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_adakv_is_exact_and_bounded(data: st.DataObject) -> None:
    h, t = data.draw(st.integers(1, 16), "h"), data.draw(st.integers(1, 120), "t")
    tokens = data.draw(st.integers(0, t), "tokens")
    floor = data.draw(st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.3, 0.7, 1.0]), "floor")
    kind = data.draw(st.sampled_from(["attention", "peaked", "signed", "levels", "constant", "zero"]), "kind")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    scores = {
        "attention": rng.random((h, t)),
        "peaked": np.exp(20 * rng.standard_normal((h, t))),
        "signed": rng.standard_normal((h, t)),
        "levels": rng.integers(0, 3, (h, t)),
        "constant": np.full((h, t), 0.25),
        "zero": np.zeros((h, t)),
    }[kind].astype(np.float32)
    budgets = AdaKV(floor=floor).head_budgets(scores, tokens, 4)
    assert budgets.shape == (h,) and budgets.dtype == np.int64
    assert budgets.sum() == h * tokens
    assert budgets.max() <= t
    assert budgets.min() >= int(tokens * floor)
    if kind in ("constant", "zero"):
        assert budgets.tolist() == [tokens] * h


def test_uniform_is_equal_shares() -> None:
    assert Uniform().layer_budgets(7, 100, 3, 4) == [7, 7, 7]
    assert Uniform().head_budgets(np.ones((2, 9), dtype=np.float32), 3, 4) is None


def test_largest_remainder() -> None:
    assert largest_remainder([Fraction(7, 3), Fraction(7, 3), Fraction(4, 3)], 6) == [3, 2, 1]
    assert largest_remainder([Fraction(1, 2), Fraction(1, 2), Fraction(2)], 3) == [1, 0, 2]


@pytest.mark.parametrize("floor", [-0.1, 1.5, float("nan"), True, "half"])
def test_adakv_refuses_a_floor_that_is_no_fraction(floor: object) -> None:
    with pytest.raises(StrategyError, match=r"floor must be a fraction in \[0, 1\]"):
        AdaKV(floor=floor)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [0, 2.5])
def test_pyramid_refuses_beta(beta: object) -> None:
    with pytest.raises(StrategyError, match="beta must be an integer >= 1"):
        PyramidKV(beta=beta)  # type: ignore[arg-type]
