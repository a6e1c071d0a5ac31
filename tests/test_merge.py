"""KeepKV against its formulas, written out in float64 loops over heads, queries and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlx.ops import top_rows
from kvmlx.stages.merge.keepkv import GUARD, KeepKV
from kvmlx.types import Rows, StrategyError

DIM, VALUE_DIM = 16, 12
# Float32 rounding of exponentials of logits up to about ten.
RTOL, ATOL = 5e-5, 5e-5


@dataclass(frozen=True)
class PlainBackend:
    """The part of a backend that a merge uses."""

    xp: Any

    @property
    def name(self) -> str:
        return self.xp.__name__

    def from_numpy(self, x: np.ndarray) -> Any:
        return self.xp.array(x)

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.array(x)


@pytest.fixture(params=["numpy", "mlx.core"])
def backend(request: pytest.FixtureRequest) -> PlainBackend:
    return PlainBackend(pytest.importorskip(request.param))


@dataclass(frozen=True)
class Case:
    """Keys around a few centres, so that some pairs are similar; the newest ``w`` rows always stay."""

    h: int
    group: int
    t: int
    w: int
    kept: int
    biased: bool = False
    loud: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        marks = "-bias" * self.biased + f"-x{self.loud:g}" * (self.loud != 1.0)
        return f"H{self.h}-G{self.group}-T{self.t}-W{self.w}-C{self.kept}{marks}"

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        centres = rng.standard_normal((5, DIM))
        keys = centres[rng.integers(0, 5, (1, self.h, self.t))] + 0.4 * rng.standard_normal((1, self.h, self.t, DIM))
        x = {
            "keys": keys * self.loud,
            "values": rng.standard_normal((1, self.h, self.t, VALUE_DIM)),
            "queries": rng.standard_normal((1, self.h * self.group, self.w, DIM)) * self.loud,
            "bias": np.log(rng.integers(1, 6, (1, self.h, self.t))) if self.biased else None,
        }
        return {name: a.astype(np.float32) for name, a in x.items() if a is not None}

    def rows(self, backend: PlainBackend, **replaced: Any) -> Rows:
        x = {name: backend.from_numpy(a) for name, a in self.arrays().items()}
        fixed = {"scale": DIM**-0.5, "length": self.t, "layer": 0, "n_layers": 1}
        return Rows(**{"backend": backend, **fixed, **x, **replaced})

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that stay ``[1, H, C]`` and those that leave: a different choice in each head."""
        scores = np.random.default_rng(self.seed + 1).random((1, self.h, self.t))
        scores[..., self.t - self.w :] = 2.0
        kept = top_rows(np, scores, self.kept)
        every = range(self.t)
        dropped = np.array([[[r for r in every if r not in set(rows)] for rows in kept[0].tolist()]], dtype=np.int32)
        return kept, dropped.reshape(1, self.h, self.t - self.kept)


CASES = [
    Case(h=2, group=1, t=37, w=8, kept=19),
    Case(h=2, group=3, t=63, w=5, kept=11, biased=True),
    Case(h=1, group=8, t=65, w=3, kept=3),
    Case(h=2, group=1, t=33, w=4, kept=12, loud=6.0, biased=True),
    Case(h=2, group=3, t=2, w=1, kept=1),
    Case(h=1, group=1, t=1, w=1, kept=1, biased=True),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
FORMS: list[Any] = ["bias", "paper"]
each_form = pytest.mark.parametrize("form", FORMS)


def fold(stage: KeepKV, case: Case, backend: PlainBackend, **replaced: Any) -> tuple[np.ndarray, ...]:
    kept, dropped = (backend.from_numpy(x) for x in case.split())
    keys, values, bias = stage.fold(case.rows(backend, **replaced), kept, dropped)
    assert bias.dtype == backend.xp.float32
    return tuple(np.array(backend.xp.astype(x, backend.xp.float32)) for x in (keys, values, bias))


def log_s(case: Case, stage: KeepKV, kv: int, key: np.ndarray, row: int) -> float:
    """Return the log of the mean over the group and, decayed, over the queries that see ``row``."""
    queries = case.arrays()["queries"][0].astype(np.float64)
    w = min(stage.window, case.w)
    heads, terms = [], []
    for head in range(kv * case.group, (kv + 1) * case.group):
        weights, logits = [], []
        for age in range(w):
            if row <= case.t - 1 - age:
                weights.append(stage.decay**age)
                logits.append(float(queries[head, case.w - 1 - age] @ key) * DIM**-0.5)
        terms += logits
        heads.append((weights, logits))
    peak = max(terms)
    means = [sum(a * math.exp(x - peak) for a, x in zip(*head, strict=True)) / sum(head[0]) for head in heads]
    return math.log(sum(means) / case.group) + peak


def oracle(case: Case, stage: KeepKV) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return merged keys, values, bias, and how many rows each kept row took in."""
    x = {name: a[0].astype(np.float64) for name, a in case.arrays().items()}
    bias = x.get("bias", np.zeros((case.h, case.t)))
    kept, dropped = (rows[0].tolist() for rows in case.split())
    out_k = np.zeros((case.h, case.kept, DIM))
    out_v, out_b = np.zeros((case.h, case.kept, VALUE_DIM)), np.zeros((case.h, case.kept))
    taken = np.zeros((case.h, case.kept), dtype=int)
    for kv in range(case.h):
        k, v = x["keys"][kv], x["values"][kv]
        members: dict[int, list[int]] = {row: [row] for row in kept[kv]}
        for row in dropped[kv]:
            cosines = {c: k[row] @ k[c] / np.linalg.norm(k[row]) / np.linalg.norm(k[c]) for c in kept[kv]}
            nearest = max(cosines, key=lambda c: cosines[c])
            if cosines[nearest] >= stage.similarity:
                members[nearest].append(row)
        for i, row in enumerate(kept[kv]):
            group = members[row]
            taken[kv, i] = len(group) - 1
            out_k[kv, i], out_v[kv, i], out_b[kv, i] = k[row], v[row], bias[kv, row]
            if len(group) == 1:
                continue
            logs = np.array([log_s(case, stage, kv, k[m], m) for m in group])
            log_w = logs + bias[kv, group]
            total = log_w.max() + math.log(np.exp(log_w - log_w.max()).sum())
            share = np.exp(log_w - total)
            key, out_v[kv, i] = share @ k[group], share @ v[group]
            if stage.form == "paper":
                out_b[kv, i] = math.log(np.exp(bias[kv, group]).sum())
                factor = (total - out_b[kv, i]) / (share @ logs)
                key = key * (factor if GUARD[0] < factor < GUARD[1] else 1.0)
            else:
                out_b[kv, i] = total - log_s(case, stage, kv, key, row)
            out_k[kv, i] = key
    return out_k, out_v, out_b, taken


@each_case
@each_form
@pytest.mark.parametrize(("similarity", "window", "decay"), [(0.8, 32, 0.9), (0.9, 2, 0.5), (-1.0, 3, 1.0)])
def test_keepkv(backend: PlainBackend, case: Case, form: Any, similarity: float, window: int, decay: float) -> None:
    stage = KeepKV(form=form, similarity=similarity, window=window, decay=decay)
    *expected, taken = oracle(case, stage)
    for given_, wanted in zip(fold(stage, case, backend), expected, strict=True):
        np.testing.assert_allclose(given_[0], wanted, rtol=RTOL, atol=ATOL)
    assert case.kept == case.t or similarity > 0 or taken.sum() == case.h * (case.t - case.kept)


def test_the_cases_merge_some_rows_and_evict_others() -> None:
    counts = [oracle(case, KeepKV())[3] for case in CASES[:4]]
    dropped = [case.h * (case.t - case.kept) for case in CASES[:4]]
    assert all(0 < taken.sum() < n for taken, n in zip(counts, dropped, strict=True))
    assert max(taken.max() for taken in counts) > 3


@each_form
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_in_blocks(backend: PlainBackend, case: Case, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = KeepKV(form=form)
    monkeypatch.setattr("kvmlx.stages.common.BLOCK_ELEMENTS", 5 * case.h * case.kept)
    for given_, wanted in zip(fold(stage, case, backend), oracle(case, stage), strict=False):
        np.testing.assert_allclose(given_[0], wanted, rtol=RTOL, atol=ATOL)


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = keys.astype(np.float64) @ query * DIM**-0.5 + bias
    weights = np.exp(logits - logits.max())
    return weights @ values.astype(np.float64) / weights.sum()


def newest_outputs(case: Case, folded: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the newest query's outputs ``[H, Dv]`` over all rows, and over the folded ones."""
    x = {name: a[0] for name, a in case.arrays().items()}
    bias = x.get("bias", np.zeros((case.h, case.t)))
    heads = range(case.h)
    query = x["queries"][:, -1].astype(np.float64)
    before = [attend(query[h], x["keys"][h], x["values"][h], bias[h]) for h in heads]
    after = [attend(query[h], *(a[0, h] for a in folded)) for h in heads]
    return np.array(before), np.array(after)


@pytest.mark.parametrize("loud", [1.0, 12.0])
@pytest.mark.parametrize("biased", [False, True])
def test_bias_form_is_exact_for_the_merging_query(backend: PlainBackend, loud: float, biased: bool) -> None:
    # One query defines the logits, and every row finds a neighbour: nothing is lost, even for large logits.
    case = Case(h=4, group=1, t=65, w=1, kept=9, loud=loud, biased=biased)
    before, after = newest_outputs(case, fold(KeepKV(similarity=-1.0, window=1), case, backend))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * loud**2)


@pytest.mark.parametrize("window", [1, 4])
def test_only_the_newest_queries_count(backend: PlainBackend, window: int) -> None:
    case, stage = Case(h=2, group=2, t=31, w=8, kept=10), KeepKV(window=window)
    queries = case.arrays()["queries"]
    queries[:, :, : 8 - window] = 9.0
    plain = fold(stage, case, backend)
    other = fold(stage, case, backend, queries=backend.from_numpy(queries))
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_paper_form_is_exact_where_its_factor_is_trusted(backend: PlainBackend) -> None:
    # Logits far from zero keep the factor near one.
    case = Case(h=4, group=1, t=41, w=1, kept=8, seed=3)
    x = case.arrays()
    query = x["queries"][:, :, 0]
    shifted = x["keys"] + (60.0 / np.sum(query**2, axis=-1)[..., None] * query)[:, :, None]
    folded = fold(KeepKV("paper", similarity=-1.0, window=1), case, backend, keys=backend.from_numpy(shifted))
    votes = np.exp(folded[2])
    np.testing.assert_allclose(votes.sum(axis=-1), case.t, rtol=1e-5)
    for h in range(case.h):
        before = attend(query[0, h], shifted[0, h], x["values"][0, h], np.zeros(case.t))
        np.testing.assert_allclose(attend(query[0, h], *(a[0, h] for a in folded)), before, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_votes_are_conserved_and_finite(data: st.DataObject) -> None:
    t = data.draw(st.integers(1, 40), "t")
    w = data.draw(st.integers(1, min(t, 6)), "w")
    case = Case(
        h=data.draw(st.integers(1, 3), "h"),
        group=data.draw(st.sampled_from([1, 3, 8]), "group"),
        t=t,
        w=w,
        kept=data.draw(st.integers(w, t), "kept"),
        biased=data.draw(st.booleans(), "biased"),
        loud=data.draw(st.sampled_from([0.0, 1.0, 30.0]), "loud"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    folded = fold(KeepKV("paper", similarity=-1.0), case, PlainBackend(np))
    assert all(np.isfinite(x).all() for x in folded)
    before = np.exp(case.arrays().get("bias", np.zeros((1, case.h, t)))).sum(axis=-1)
    np.testing.assert_allclose(np.exp(folded[2]).sum(axis=-1), before, rtol=1e-5)


def test_a_chain_of_merges_keeps_the_votes_and_the_output(backend: PlainBackend) -> None:
    case = Case(h=2, group=1, t=45, w=1, kept=45)
    for form in FORMS:
        stage = KeepKV(form, similarity=-1.0, window=1)
        rows = case.rows(backend)
        for kept in range(41, 0, -4):
            every = np.arange(rows.keys.shape[2], dtype=np.int32)
            # The newest row, the query's own, stays.
            split = [np.tile(x, (1, 2, 1)) for x in (every[-kept:], every[:-kept])]
            keys, values, bias = stage.fold(rows, *(backend.from_numpy(x) for x in split))
            rows = case.rows(backend, keys=keys, values=values, bias=bias)
        folded = tuple(np.array(x) for x in (rows.keys, rows.values, rows.bias))
        assert folded[0].shape[2] == 1
        if form == "paper":
            np.testing.assert_allclose(np.exp(folded[2])[..., 0], case.t, rtol=1e-5)
        else:
            before, after = newest_outputs(case, folded)
            np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@each_form
def test_equal_keys_count_their_votes(backend: PlainBackend, form: Any) -> None:
    # Rows with one key merge to that key; its bias is then ln(votes), whatever the queries.
    case = Case(h=2, group=3, t=21, w=4, kept=4)
    keys = np.ascontiguousarray(np.broadcast_to(case.arrays()["keys"][:, :, :1], (1, 2, 21, DIM)))
    given_keys, _, bias = fold(KeepKV(form, window=4), case, backend, keys=backend.from_numpy(keys))
    np.testing.assert_allclose(given_keys, keys[:, :, :4], rtol=0.25 if form == "paper" else 1e-5)
    np.testing.assert_allclose(np.exp(bias).sum(axis=-1), 21, rtol=1e-5)


@each_form
def test_rows_that_nothing_joins_are_untouched(backend: PlainBackend, form: Any) -> None:
    case, stage = CASES[1], KeepKV(form, similarity=0.96)
    folded = fold(stage, case, backend)
    kept, alone = case.split()[0], oracle(case, stage)[3] == 0
    assert 0 < (~alone).sum() < alone.sum()
    for name, x in zip(("keys", "values", "bias"), folded, strict=True):
        before = case.arrays()[name]
        rows = np.take_along_axis(before, kept if name == "bias" else kept[..., None], axis=2)
        np.testing.assert_array_equal(x[0][alone], rows[0][alone])


@each_form
@pytest.mark.parametrize("fill", [0.0, 3.0, 200.0])
def test_constant_rows_stay_finite(backend: PlainBackend, form: Any, fill: float) -> None:
    case = Case(h=2, group=3, t=21, w=4, kept=4)
    x = {name: backend.from_numpy(np.full_like(a, fill)) for name, a in case.arrays().items()}
    x["bias"] = None
    for folded in fold(KeepKV(form), case, backend, **x):
        assert np.isfinite(folded).all()


@each_form
def test_half_precision_rows_keep_their_type(backend: PlainBackend, form: Any) -> None:
    case, xp = Case(h=4, group=1, t=65, w=1, kept=9, loud=4.0), backend.xp
    halves = {name: xp.astype(backend.from_numpy(case.arrays()[name]), xp.float16) for name in ("keys", "values")}
    kept, dropped = (backend.from_numpy(x) for x in case.split())
    keys, values, bias = KeepKV(form, similarity=-1.0).fold(case.rows(backend, **halves), kept, dropped)
    assert keys.dtype == values.dtype == xp.float16
    if form == "bias":
        # The bias takes up the rounding of the stored key: the weights still sum to what they did.
        query = case.arrays()["queries"][0].astype(np.float64)
        sums = []
        for k, b in ((halves["keys"], np.zeros((4, 65))), (keys, np.array(bias)[0])):
            logits = (np.array(k)[0].astype(np.float64) @ query.swapaxes(-1, -2))[..., 0] * DIM**-0.5 + b
            sums.append(np.log(np.exp(logits).sum(axis=-1)))
        np.testing.assert_allclose(sums[1], sums[0], atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "zip"}, "form must be bias or paper, got 'zip'"),
        ({"similarity": 1.5}, r"similarity must be a number in \[-1, 1\], got 1.5"),
        ({"decay": 0.0}, "set window=1"),
        ({"window": 0}, "window must be an integer >= 1"),
    ],
    ids=["form", "similarity", "decay", "window"],
)
def test_impossible_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        KeepKV(**fields)
