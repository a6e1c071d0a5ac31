"""The kernels of column_sums.metal, executed off-Mac."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmlx import reference as ref
from kvmlx.backends.mlx.metal.column_sums import BLOCK, MAX_SPLITS, column_maxima, column_sums, splits, supported
from kvmlx.checks import Case
from kvmlx.tolerance import assert_close, assert_same
from tests.metal.device import Device, Launch
from tests.metal.off_mac import off_mac
from tests.test_vectors import over

Runs = list[tuple[str, Launch]]
ORDERS = 4
"""Orders of sums in which the plain float32 weights are taken."""


@pytest.fixture(params=[0, 1], ids=["ascending", "shuffled"])
def device(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Run kernels off-Mac, lanes in one order or another; hand out what each launch did."""
    with off_mac(Device(seed=request.param)) as ran:
        yield ran


@dataclass(frozen=True)
class Shape:
    dtype: str = "float32"
    keys_dtype: str = "float32"
    dim: int = 64
    n_batch: int = 1
    n_kv_heads: int = 2
    group: int = 2
    n_queries: int = 5
    n_keys: int = 65
    biased: bool = False
    counted: bool = False

    @property
    def name(self) -> str:
        common = Shape().__dict__
        return "-".join(f"{k}={v}" for k, v in self.__dict__.items() if v != common[k]) or "plain"


Problem = tuple[dict[str, Any], float]


def make(shape: Shape, seed: int = 0) -> Problem:
    """Return the arguments of a call, as arrays, and its scale."""
    rng = np.random.default_rng(seed)
    b, h, d = shape.n_batch, shape.n_kv_heads, shape.dim

    def normal(dtype: str, *size: int) -> mx.array:
        return mx.array(rng.standard_normal(size).astype(np.float32)).astype(getattr(mx, dtype))

    arrays: dict[str, Any] = {
        "queries": normal(shape.dtype, b, h * shape.group, shape.n_queries, d) * 1.5,
        "keys": normal(shape.keys_dtype, b, h, shape.n_keys, d),
    }
    if shape.biased:
        bias = rng.standard_normal((b, h, shape.n_keys)).astype(np.float32)
        arrays["bias"] = mx.array(np.where(rng.random(bias.shape) < 0.2, -np.inf, bias))
    if shape.counted:
        arrays["n_queries"] = mx.array(rng.integers(0, shape.n_queries + 1, b).astype(np.int32))
    return arrays, d**-0.5


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(x if x.dtype == mx.int32 else x.astype(mx.float32))


def weights(problem: Problem, dtype: Any = np.float64, order: np.random.Generator | None = None) -> np.ndarray:
    """Return ``[B, Hq, L, T]`` in ``dtype``: the whole matrix, zeros for queries that do not count."""
    arrays: dict[str, Any] = {k: to_numpy(x) for k, x in problem[0].items()}
    n = arrays.pop("n_queries", None)
    if order is not None:
        channels = order.permutation(arrays["keys"].shape[-1])
        arrays |= {name: arrays[name][..., channels] for name in ("queries", "keys")}
    p = ref.softmax(ref.masked_logits(**arrays, scale=problem[1], dtype=dtype))
    counted = np.ones((len(p), p.shape[2]), bool) if n is None else np.arange(p.shape[2]) < n[:, None]
    return p * counted[:, None, :, None].astype(dtype)


def check(problem: Problem) -> tuple[mx.array, mx.array]:
    """Compare both kernels' results with the oracle."""
    arrays, scale = problem
    exact = weights(problem)
    orders = [np.random.default_rng(i) for i in range(ORDERS)]
    low = [weights(problem, np.float32, order) for order in orders]
    summed = [p[:, :, o.permutation(p.shape[2])].sum(axis=2) for p, o in zip(low, orders, strict=True)]
    sums = column_sums(**arrays, scale=scale)
    assert sums.dtype == mx.float32
    assert_close(to_numpy(sums), exact.sum(axis=2), np.stack(summed), name="sums")
    maxima = column_maxima(**arrays, scale=scale)
    assert_close(to_numpy(maxima), exact.max(axis=2), np.stack([p.max(axis=2) for p in low]), name="maxima")
    return sums, maxima


SHAPES = [
    Shape("float16", "float16", 128, group=4, n_queries=17),
    Shape("bfloat16", "bfloat16", 128, group=8, n_kv_heads=1, n_queries=33, n_keys=129, biased=True),
    Shape("float32", "float32", 64, group=1, n_queries=64, n_keys=64),
    Shape("float16", "float32", 80, group=3, n_queries=65, n_keys=127, counted=True, n_batch=2),
    Shape("bfloat16", "float32", 96, n_queries=1, n_keys=1100, biased=True),
    Shape("float32", "bfloat16", 192, n_queries=31, n_keys=63, biased=True, counted=True, n_batch=2),
    Shape("float16", "float16", 256, group=3, n_queries=40, n_keys=97),
    Shape("float32", "float32", 16, group=4, n_queries=130, n_keys=190, n_kv_heads=1),
    Shape("float32", "float16", 32, n_queries=2, n_keys=2000, n_kv_heads=1, group=1),
    Shape("float32", "float32", 8, n_queries=1, n_keys=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_shapes(device: Runs, shape: Shape) -> None:
    check(make(shape))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([Shape(), Shape("float16", "float16", 32, biased=True)]),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 70)),
    history=st.integers(0, 140),
    counted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_lengths(
    device: Runs, base: Shape, sizes: tuple[int, int, int, int], history: int, counted: bool, seed: int
) -> None:
    b, h, group, n = sizes
    shape = replace(base, n_batch=b, n_kv_heads=h, group=group, n_queries=n, n_keys=n + history, counted=counted)
    check(make(shape, seed))


@over("column_sums")
def test_vectors(device: Runs, case: Case) -> None:
    params, t = case
    arrays = {k: mx.array(x if x.dtype == np.int32 else x.astype(np.float32)) for k, x in t.items() if k != "sums"}
    sums, _ = check((arrays, params["scale"]))
    inputs = {k: x for k, x in t.items() if k != "sums"}
    assert_close(to_numpy(sums), t["sums"], ref.column_sums(**inputs, **params, dtype=np.float32))


def test_a_query_that_sees_one_key_gives_it_exactly_one(device: Runs) -> None:
    arrays, _ = make(Shape(n_queries=3, n_keys=3, biased=True, n_batch=2))
    arrays["bias"] = mx.abs(mx.maximum(arrays["bias"], -3.0))
    first = to_numpy(column_maxima(**arrays, scale=7.0, n_queries=[1, 1]))
    assert (first[..., 0] == 1).all() and (first[..., 1:] == 0).all()
    assert (to_numpy(column_sums(**arrays, scale=7.0, n_queries=[1, 1]))[..., 0] == 1).all()


def test_a_large_bias_or_logit_neither_overflows_nor_vanishes(device: Runs) -> None:
    arrays, scale = make(Shape(n_queries=37, n_keys=70, biased=True))
    bias = np.array(arrays["bias"])
    bias[:, 0, 40], bias[:, 1, 69] = 300.0, -300.0
    check((arrays | {"bias": mx.array(bias)}, scale))
    check((arrays, 40.0))


def test_queries_that_see_nothing_give_nothing(device: Runs) -> None:
    arrays, scale = make(Shape(n_queries=4, n_keys=9, biased=True))
    bias = np.array(arrays["bias"])
    bias[:, :, :7] = -np.inf
    bias[:, :, 7:] = 0.5
    arrays["bias"] = mx.array(bias)
    sums, maxima = check((arrays, scale))
    assert (to_numpy(sums)[..., :7] == 0).all() and (to_numpy(maxima)[..., :7] == 0).all()
    np.testing.assert_allclose(to_numpy(sums).sum(axis=-1), 2.0, rtol=1e-6)


def test_the_order_of_threads_changes_no_bit() -> None:
    arrays, scale = make(Shape(n_queries=70, n_keys=700, n_kv_heads=1))
    first, second = (_bits(arrays, scale, seed) for seed in (0, 7))
    assert_same(second, first)


def _bits(arrays: dict[str, Any], scale: float, seed: int) -> np.ndarray:
    with off_mac(Device(seed=seed)):
        return to_numpy(column_sums(**arrays, scale=scale))


def test_splits() -> None:
    """The first pass writes for the queries alone, however long the keys are."""
    for threadgroups, n_keys in [(1, 1), (1, 100), (1, 131072), (8, 131072), (8, 257), (64, 131072), (2048, 4096)]:
        n, keys = splits(threadgroups, n_keys)
        assert 1 <= n <= MAX_SPLITS and (n == 1 or n * threadgroups <= BLOCK)
        assert keys % 32 == 0 and (n - 1) * keys < n_keys <= n * keys


def test_supported() -> None:
    assert supported(128) is None and supported(8) is None and supported(256) is None
    assert "264" in str(supported(264)) and "12" in str(supported(12))
