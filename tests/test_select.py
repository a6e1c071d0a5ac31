"""Selectors against their papers' formulas, written out in float64 loops over heads, queries and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvmlx import ops
from kvmlx.stages.base import Select
from kvmlx.stages.select.expected_attention import ExpectedAttention, mean_rotation
from kvmlx.stages.select.full import Full
from kvmlx.stages.select.h2o import H2O
from kvmlx.stages.select.keydiff import KeyDiff
from kvmlx.stages.select.knorm import Knorm
from kvmlx.stages.select.leverage import Leverage
from kvmlx.stages.select.random import Random
from kvmlx.stages.select.snapkv import SnapKV
from kvmlx.stages.select.streaming import Streaming
from kvmlx.stages.select.tova import TOVA
from kvmlx.types import Rotary, Rows, StrategyError, UnsupportedModelError

DIM, VALUE_DIM = 16, 12
# Float32 rounding over sums of a few dozen terms, with room for the order in which a backend adds them.
RTOL, ATOL = 2e-5, 2e-6
ROTARY = Rotary(
    first=tuple(range(6)),
    second=tuple(range(6, 12)),
    frequency=tuple(100.0 ** (-i / 6) for i in range(6)),
    factor=1.1,
)


@dataclass(frozen=True)
class PlainBackend:
    """The part of a backend that selectors use."""

    xp: Any

    @property
    def name(self) -> str:
        return self.xp.__name__

    def column_sums(self, queries: Any, keys: Any, **options: Any) -> Any:
        return ops.column_sums(self.xp, queries, keys, **options)

    def from_numpy(self, x: np.ndarray) -> Any:
        return self.xp.array(x)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.array(x)


@pytest.fixture(params=["numpy", "mlx.core"])
def backend(request: pytest.FixtureRequest) -> PlainBackend:
    return PlainBackend(pytest.importorskip(request.param))


@dataclass(frozen=True)
class Case:
    """One sequence in float32 NumPy; the tests convert it to the backend and to float64."""

    h: int
    group: int
    t: int
    w: int
    biased: bool = False
    evicted: int = 0
    seed: int = 0

    def __str__(self) -> str:
        marks = "-bias" * self.biased + "-evicted" * bool(self.evicted)
        return f"H{self.h}-G{self.group}-T{self.t}-W{self.w}{marks}"

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        hq = self.h * self.group

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        spread = normal(1, hq, DIM, DIM)
        return {
            "keys": normal(1, self.h, self.t, DIM) * 1.5,
            "values": normal(1, self.h, self.t, VALUE_DIM),
            "queries": normal(1, hq, self.w, DIM) * 1.5,
            "sums": rng.random((1, self.h, self.t), dtype=np.float32),
            "query_mean": normal(1, hq, DIM),
            "query_cov": spread @ spread.swapaxes(-1, -2) / DIM,
            "bias": normal(1, self.h, self.t),
        }

    def rows(self, backend: PlainBackend, **replaced: Any) -> Rows:
        given = {name: backend.from_numpy(x) for name, x in self.arrays().items()}
        if not self.biased:
            given["bias"] = None
        fixed = {
            "scale": DIM**-0.5,
            "length": self.t + self.evicted,
            "layer": 3,
            "n_layers": 8,
            "rotary": ROTARY,
        }
        return Rows(**{"backend": backend, **fixed, **given, **replaced})


CASES = [
    Case(h=2, group=1, t=37, w=8),
    Case(h=2, group=3, t=63, w=8, biased=True),
    Case(h=1, group=8, t=65, w=8, evicted=40),
    Case(h=2, group=3, t=5, w=5),
    Case(h=2, group=1, t=1, w=1),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def attention(case: Case, query: int, head: int, *, bias: bool = True) -> np.ndarray:
    """Return query ``query``'s attention of query head ``head`` over all rows ``[T]``, float64."""
    x = case.arrays()
    kv = head // case.group
    out = np.zeros(case.t)
    visible = case.t - case.w + query + 1
    for row in range(visible):
        logit = float(x["queries"][0, head, query].astype(np.float64) @ x["keys"][0, kv, row].astype(np.float64))
        logit = logit * DIM**-0.5 + (float(x["bias"][0, kv, row]) if case.biased and bias else 0.0)
        out[row] = math.exp(logit)
    return out / out.sum()


def check(select: Select, rows: Rows, expected: np.ndarray) -> None:
    """Compare the scores with ``expected [H, T]``, and the rows they keep."""
    scores = select.score(rows)
    assert scores.dtype == rows.xp.float32
    assert tuple(scores.shape) == (1, *expected.shape)
    np.testing.assert_allclose(np.array(scores)[0], expected, rtol=RTOL, atol=ATOL)
    for count in {1, max(1, expected.shape[1] // 2)}:
        kept = np.array(ops.top_rows(rows.xp, scores, count))[0]
        best = np.sort(np.argsort(-expected, axis=-1, stable=True)[:, :count], axis=-1)
        np.testing.assert_array_equal(kept, best)


@each_case
def test_tova(backend: PlainBackend, case: Case) -> None:
    heads = [attention(case, case.w - 1, head) for head in range(case.h * case.group)]
    check(TOVA(), case.rows(backend), np.tile(np.mean(heads, axis=0), (case.h, 1)))


def snapkv_scores(case: Case, window: int, kernel: int, pool: str) -> np.ndarray:
    w = min(window, case.w)
    prefix = max(0, case.t - w)
    out = np.full((case.h, case.t), w + 1.0)
    for kv in range(case.h):
        group = []
        for head in range(kv * case.group, (kv + 1) * case.group):
            sums = np.sum([attention(case, case.w - w + i, head) for i in range(w)], axis=0)[:prefix]
            pooled = np.zeros(prefix)
            for row in range(prefix):
                near = [sums[j] for j in range(row - kernel // 2, row + kernel // 2 + 1) if 0 <= j < prefix]
                pooled[row] = sum(near) / kernel if pool == "avg" else max(near)
            group.append(pooled)
        out[kv, :prefix] = np.mean(group, axis=0)
    return out


@each_case
@pytest.mark.parametrize(("window", "kernel", "pool"), [(64, 5, "avg"), (4, 7, "max"), (3, 1, "avg")])
def test_snapkv(backend: PlainBackend, case: Case, window: int, kernel: int, pool: Any) -> None:
    select = SnapKV(window=window, kernel=kernel, pool=pool)
    check(select, case.rows(backend), snapkv_scores(case, window, kernel, pool))


@each_case
def test_keydiff(backend: PlainBackend, case: Case) -> None:
    keys = case.arrays()["keys"][0].astype(np.float64)
    expected = np.zeros((case.h, case.t))
    for kv in range(case.h):
        anchor = np.mean([k / np.linalg.norm(k) for k in keys[kv]], axis=0)
        for row, k in enumerate(keys[kv]):
            expected[kv, row] = -(k @ anchor) / np.linalg.norm(k) / np.linalg.norm(anchor)
    check(KeyDiff(), case.rows(backend), expected)


@each_case
def test_knorm(backend: PlainBackend, case: Case) -> None:
    keys = case.arrays()["keys"][0].astype(np.float64)
    check(Knorm(), case.rows(backend), np.array([[-np.linalg.norm(k) for k in head] for head in keys]))


def leverages(keys: np.ndarray, ridge: float) -> np.ndarray:
    """Scores of one head's rows ``[T, D]``, each as what a ridge regression on the others' noise leaves of it."""
    x = keys.astype(np.float64) - keys.astype(np.float64).mean(axis=0)
    noise = ridge * np.diag((x**2).sum(axis=0))
    return np.array([row @ np.linalg.pinv(x.T @ x + noise) @ row for row in x])


@each_case
@pytest.mark.parametrize(("of", "ridge"), [("values", 0.01), ("keys", 1.0), ("both", 0.1)])
def test_leverage(backend: PlainBackend, case: Case, of: Any, ridge: float) -> None:
    sides = ("keys", "values") if of == "both" else (of,)
    expected = np.sum([[leverages(head, ridge) for head in case.arrays()[side][0]] for side in sides], axis=0)
    check(Leverage(of=of, ridge=ridge), case.rows(backend), expected)


def test_leverage_does_not_depend_on_the_scale_of_channels(backend: PlainBackend) -> None:
    case = CASES[1]
    values = case.arrays()["values"]
    scaled = values * np.logspace(-3, 3, values.shape[-1]).astype(np.float32)
    got = np.array(Leverage().score(case.rows(backend, values=backend.from_numpy(scaled))))
    np.testing.assert_allclose(got, np.array(Leverage().score(case.rows(backend))), rtol=2e-4)


def test_leverage_finds_the_one_direction_that_the_others_lack(backend: PlainBackend) -> None:
    case = Case(h=1, group=1, t=200, w=1)
    values = case.arrays()["values"]
    values[..., 3] = 0.0
    values[0, 0, 77, 3] = 1e-2
    scores = np.array(Leverage().score(case.rows(backend, values=backend.from_numpy(values))))[0, 0]
    assert scores.argmax() == 77 and scores[77] > 0.95 and np.delete(scores, 77).max() < 0.8


@each_case
def test_streaming_keeps_the_newest(backend: PlainBackend, case: Case) -> None:
    check(Streaming(), case.rows(backend), np.tile(np.arange(case.t, dtype=np.float64), (case.h, 1)))


@each_case
def test_h2o_takes_the_sums(backend: PlainBackend, case: Case) -> None:
    check(H2O(), case.rows(backend), case.arrays()["sums"][0].astype(np.float64))


@each_case
def test_h2o_normalized(backend: PlainBackend, case: Case) -> None:
    select = H2O(normalize=True, sinks=4, recent=8)
    expected = case.arrays()["sums"][0].astype(np.float64)
    between = max(0, case.t - 12)
    for row in range(case.t):
        moved = min(1.0, max(0.0, (row - 3) / (between + 1)))
        expected[:, row] /= case.t + case.evicted - (row + case.evicted * moved)
    check(select, case.rows(backend), expected)


def test_h2o_counts_are_the_queries_that_saw_the_row(backend: PlainBackend) -> None:
    # Before any eviction row j of T is seen by T - j queries.
    rows = Case(h=1, group=1, t=9, w=1).rows(backend)
    mean = np.array(H2O(normalize=True, sinks=1, recent=1).score(rows)) / np.array(rows.sums)
    np.testing.assert_allclose(1 / mean[0, 0], np.arange(9, 0, -1), rtol=1e-6)


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    """Rotate ``x [D]`` as a model does at one position."""
    out = x.copy()
    for a, b, frequency in zip(ROTARY.first, ROTARY.second, ROTARY.frequency, strict=True):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a] = ROTARY.factor * (x[a] * cos - x[b] * sin)
        out[b] = ROTARY.factor * (x[b] * cos + x[a] * sin)
    return out


def expected_attention_scores(case: Case, select: ExpectedAttention) -> np.ndarray:
    x = {name: a.astype(np.float64) for name, a in case.arrays().items()}
    length, sinks = case.t + case.evicted, min(select.sinks, case.t)
    rotation = np.mean([[rotate(e, p) for e in np.eye(DIM)] for p in range(length, length + select.n_future)], axis=0).T
    out = np.zeros((case.h, case.t))
    for kv in range(case.h):
        for head in range(kv * case.group, (kv + 1) * case.group):
            mean = rotation @ x["query_mean"][0, head]
            cov = rotation @ x["query_cov"][0, head] @ rotation.T
            weights = np.zeros(case.t)
            for row in range(sinks, case.t):
                k = x["keys"][0, kv, row]
                z = k @ mean / math.sqrt(DIM)
                z += k @ cov @ k / (2 * DIM) if select.use_covariance else 0.0
                weights[row] = math.exp(z + (x["bias"][0, kv, row] if case.biased else 0.0))
            out[kv] += weights / max(weights.sum(), 1e-300) / case.group
        if select.use_vnorm:
            out[kv] = (out[kv] + select.epsilon) * np.linalg.norm(x["values"][0, kv], axis=-1)
        out[kv, :sinks] = out[kv].max()
    return out


@each_case
@pytest.mark.parametrize(
    "select",
    [
        ExpectedAttention(n_future=20),
        ExpectedAttention(n_future=1, sinks=0, epsilon=0.01),
        ExpectedAttention(n_future=7, use_covariance=False, use_vnorm=False),
    ],
    ids=str,
)
def test_expected_attention(backend: PlainBackend, case: Case, select: ExpectedAttention) -> None:
    check(select, case.rows(backend), expected_attention_scores(case, select))


def test_expected_attention_in_blocks_of_rows(backend: PlainBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    case, select = CASES[1], ExpectedAttention(n_future=5)
    monkeypatch.setattr("kvmlx.stages.common.BLOCK_ELEMENTS", 7 * DIM * case.h * case.group)
    check(select, case.rows(backend), expected_attention_scores(case, select))


def test_expected_logit_matches_sampled_queries() -> None:
    # At one position the closed form is ln E[exp(q.k scale)] of Gaussian queries, up to sampling noise.
    case = Case(h=1, group=1, t=6, w=1)
    rows = case.rows(PlainBackend(np))
    z = ExpectedAttention(n_future=1)._logits(rows)[0, 0]
    x = case.arrays()
    rng = np.random.default_rng(1)
    q = rng.multivariate_normal(x["query_mean"][0, 0], x["query_cov"][0, 0], size=50_000)
    q = q @ mean_rotation(ROTARY, DIM, rows.length, 1).T
    sampled = np.log(np.exp(q @ x["keys"][0, 0].T * DIM**-0.5).mean(axis=0))
    np.testing.assert_allclose(z, sampled, atol=0.05)


def test_expected_attention_refuses_a_model_without_plain_rotary(backend: PlainBackend) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 3 has none"):
        ExpectedAttention().score(CASES[0].rows(backend, rotary=None))


def splitmix64(state: int) -> int:
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@each_case
def test_random_is_its_counter(backend: PlainBackend, case: Case) -> None:
    mask = (1 << 64) - 1
    layer_state = splitmix64((splitmix64((7 + 3) & mask) + case.t + case.evicted) & mask)
    expected = np.zeros((case.h, case.t))
    for head in range(case.h):
        state = splitmix64((layer_state + head) & mask)
        expected[head] = [(splitmix64((state + row) & mask) >> 40) / (1 << 24) for row in range(case.t)]
    scores = np.array(Random(seed=7).score(case.rows(backend)))[0]
    np.testing.assert_array_equal(scores, expected.astype(np.float32))


def test_random_is_uniform_and_differs_by_seed_layer_and_head() -> None:
    rows = Case(h=2, group=1, t=4000, w=1).rows(PlainBackend(np))
    scores = Random().score(rows)[0]
    assert abs(scores.mean() - 0.5) < 0.02
    assert scores.min() >= 0.0 and scores.max() < 1.0
    assert abs(np.corrcoef(scores)[0, 1]) < 0.05
    assert abs(np.corrcoef(scores[0], Random(seed=1).score(rows)[0, 0])[0, 1]) < 0.05


def test_splitmix64_known_answer() -> None:
    # First outputs of the reference generator (Vigna) for the seed 1234567.
    state, step = 1234567, 0x9E3779B97F4A7C15
    assert [splitmix64(state + i * step) for i in range(2)] == [6457827717110365317, 3203168211198807973]


def test_full_scores_all_alike(backend: PlainBackend) -> None:
    check(Full(), CASES[0].rows(backend), np.zeros((2, 37)))


DEGENERATE = [
    Knorm(),
    KeyDiff(),
    Leverage(),
    TOVA(),
    SnapKV(window=8),
    ExpectedAttention(n_future=3),
    H2O(normalize=True),
]


@pytest.mark.parametrize("select", DEGENERATE, ids=str)
@pytest.mark.parametrize("fill", [0.0, 3.0, 300.0])
def test_constant_rows_score_alike_and_finite(backend: PlainBackend, select: Select, fill: float) -> None:
    case = Case(h=2, group=3, t=21, w=8)
    x = {name: np.full_like(a, fill) for name, a in case.arrays().items() if name in ("keys", "values", "queries")}
    rows = case.rows(backend, **{name: backend.from_numpy(a) for name, a in x.items()})
    scores = np.array(select.score(rows))
    assert np.isfinite(scores).all()
    if isinstance(select, Knorm | KeyDiff | Leverage | TOVA):
        np.testing.assert_allclose(scores, np.broadcast_to(scores[..., :1], scores.shape), rtol=1e-5)


@pytest.mark.parametrize(
    "select", [*DEGENERATE, Random(), Streaming(), ExpectedAttention(use_covariance=False)], ids=str
)
def test_half_precision_rows_score_as_their_float32_copies(backend: PlainBackend, select: Select) -> None:
    case, xp = CASES[1], backend.xp
    names = ("keys", "values", "queries")
    halves = {name: xp.astype(backend.from_numpy(case.arrays()[name]), xp.float16) for name in names}
    floats = {name: xp.astype(x, xp.float32) for name, x in halves.items()}
    half, single = (select.score(case.rows(backend, **x)) for x in (halves, floats))
    assert half.dtype == xp.float32
    np.testing.assert_array_equal(np.array(half), np.array(single))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Full(budget=0.5), "budget is 1.0, got 0.5"),
        (lambda: SnapKV(window=65), "recent=64 must be >= window=65"),
        (lambda: SnapKV(kernel=4), "kernel must be odd, got 4"),
        (lambda: SnapKV(pool="mean"), "pool must be avg or max, got 'mean'"),  # type: ignore[arg-type]
        (lambda: SnapKV(budget=60), "must be >= 69"),
        (lambda: Random(seed=-1), "seed must be an integer"),
        (lambda: H2O(normalize="yes"), "normalize must be true or false"),  # type: ignore[arg-type]
        (lambda: ExpectedAttention(n_future=0), "n_future must be an integer >= 1"),
        (lambda: ExpectedAttention(epsilon=-1.0), "epsilon must be a number >= 0"),
    ],
    ids=["full", "window", "kernel", "pool", "budget", "seed", "normalize", "n_future", "epsilon"],
)
def test_impossible_parameters_are_refused(build: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        build()
