"""The Triton kernels of column_sums. Interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvmlx import reference as ref
from kvmlx.checks import Case
from kvmlx.tolerance import assert_close, assert_same
from tests.test_vectors import over

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvmlx.backends.torch.triton import column_sums as kernels  # noqa: E402
from kvmlx.backends.torch.triton.column_sums import (  # noqa: E402
    MAX_SPLITS,
    column_maxima,
    column_sums,
    config_of,
    configurations,
    splits,
    supported,
)
from kvmlx.backends.torch.triton.launch import recording  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = 4
"""Orders of sums in which the plain float32 weights are taken."""


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

    def normal(dtype: str, *size: int) -> Any:
        return torch.from_numpy(rng.standard_normal(size).astype(np.float32)).to(DEVICE, getattr(torch, dtype))

    arrays: dict[str, Any] = {
        "queries": normal(shape.dtype, b, h * shape.group, shape.n_queries, d) * 1.5,
        "keys": normal(shape.keys_dtype, b, h, shape.n_keys, d),
    }
    if shape.biased:
        bias = rng.standard_normal((b, h, shape.n_keys)).astype(np.float32)
        arrays["bias"] = torch.from_numpy(np.where(rng.random(bias.shape) < 0.2, -np.inf, bias)).float().to(DEVICE)
    if shape.counted:
        arrays["n_queries"] = torch.from_numpy(rng.integers(0, shape.n_queries + 1, b).astype(np.int32)).to(DEVICE)
    return arrays, d**-0.5


def to_numpy(x: Any) -> np.ndarray:
    return (x if x.dtype == torch.int32 else x.float()).cpu().numpy()


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


def check(problem: Problem, **options: Any) -> tuple[Any, Any]:
    """Compare both kernels' results with the oracle."""
    arrays, scale = problem
    exact = weights(problem)
    orders = [np.random.default_rng(i) for i in range(ORDERS)]
    low = [weights(problem, np.float32, order) for order in orders]
    summed = [p[:, :, o.permutation(p.shape[2])].sum(axis=2) for p, o in zip(low, orders, strict=True)]
    sums = column_sums(**arrays, scale=scale, **options)
    assert sums.dtype == torch.float32
    assert_close(to_numpy(sums), exact.sum(axis=2), np.stack(summed), name="sums")
    maxima = column_maxima(**arrays, scale=scale, **options)
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
    Shape("float16", "bfloat16", 24, group=4, n_queries=16, n_keys=300, n_kv_heads=1),
    Shape("float32", "float32", 16, group=4, n_queries=130, n_keys=190, n_kv_heads=1),
    Shape("float32", "float16", 32, n_queries=2, n_keys=2000, n_kv_heads=1, group=1),
    Shape("bfloat16", "bfloat16", 80, n_queries=1, n_keys=700, group=20, n_kv_heads=1),
    Shape("float32", "float32", 8, n_queries=1, n_keys=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_shapes(shape: Shape) -> None:
    check(make(shape))


@pytest.mark.parametrize("seed", range(8))
def test_any_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = Shape() if seed % 2 else Shape("float16", "float16", 32, biased=True)
    n = int(rng.integers(1, 70))
    shape = replace(
        base,
        n_batch=int(rng.integers(1, 3)),
        n_kv_heads=int(rng.integers(1, 3)),
        group=int(rng.choice([1, 2, 3, 5])),
        n_queries=n,
        n_keys=n + int(rng.integers(0, 140)),
        counted=bool(rng.random() < 0.5),
    )
    check(make(shape, seed))


@pytest.mark.parametrize(
    "shape",
    [
        Shape("bfloat16", "bfloat16", 128, n_queries=32, n_keys=200, n_kv_heads=1, counted=True),
        Shape("float32", "float32", 40, n_queries=1, n_keys=300, biased=True),
    ],
    ids=lambda s: s.name,
)
def test_configurations_give_the_same(shape: Shape) -> None:
    """What a sweep may choose among."""
    kind = (shape.n_queries, shape.group, shape.dim, shape.dtype == "float32")
    found = configurations(*kind)
    assert found[0] == config_of(*kind) and len(found) == len(set(found)) > 3
    for config in {(c.keys, c.held_keys): c for c in found[-1:0:-1]}.values():
        check(make(shape), config=config)


@over("column_sums")
def test_vectors(case: Case) -> None:
    params, t = case
    arrays = {k: torch.from_numpy(np.array(x)).to(DEVICE) for k, x in t.items() if k != "sums"}
    arrays |= {k: x.float() for k, x in arrays.items() if x.dtype != torch.int32}
    sums, _ = check((arrays, params["scale"]))
    inputs = {k: x for k, x in t.items() if k != "sums"}
    assert_close(to_numpy(sums), t["sums"], ref.column_sums(**inputs, **params, dtype=np.float32))


def test_a_query_that_sees_one_key_gives_it_all() -> None:
    arrays, _ = make(Shape(n_queries=3, n_keys=3, biased=True, n_batch=2))
    arrays["bias"] = arrays["bias"].clamp(min=-3.0).abs()
    one = np.eye(1, 3)[None].repeat(4, axis=1).repeat(2, axis=0)
    for function in (column_sums, column_maxima):
        got = to_numpy(function(**arrays, scale=7.0, n_queries=[1, 1]))
        assert_close(got, one, one)
        assert (got[..., 1:] == 0).all()


def test_a_large_bias_or_logit_neither_overflows_nor_vanishes() -> None:
    arrays, scale = make(Shape(n_queries=37, n_keys=70, biased=True))
    bias = arrays["bias"].clone()
    bias[:, 0, 40], bias[:, 1, 69] = 300.0, -300.0
    check((arrays | {"bias": bias}, scale))
    check((arrays, 40.0))


def test_queries_that_see_nothing_give_nothing() -> None:
    arrays, scale = make(Shape(n_queries=4, n_keys=9, biased=True))
    arrays["bias"][:, :, :7] = -np.inf
    arrays["bias"][:, :, 7:] = 0.5
    sums, maxima = check((arrays, scale))
    assert (to_numpy(sums)[..., :7] == 0).all() and (to_numpy(maxima)[..., :7] == 0).all()
    np.testing.assert_allclose(to_numpy(sums).sum(axis=-1), 2.0, rtol=1e-6)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["nothing", "in the middle", "everything"])
def test_parts_of_the_keys_that_nobody_sees(part: int) -> None:
    """A part without a row gives a query no peak, and the merge no NaN."""
    arrays, scale = make(Shape(n_queries=1, n_keys=1100, biased=True, n_kv_heads=1))
    hidden = (slice(0, 0), slice(250, 800), slice(0, 1100))[part]
    arrays["bias"][:, :, hidden] = -np.inf
    check((arrays, scale))


def test_the_same_again_to_the_bit() -> None:
    arrays, scale = make(Shape(n_queries=70, n_keys=700, n_kv_heads=1))
    first, second = (to_numpy(column_sums(**arrays, scale=scale)) for _ in range(2))
    assert_same(second, first)


def test_parts_of_an_array_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("float16", "float16", n_batch=2, n_queries=9, n_keys=70)
    whole, scale = make(replace(shape, n_batch=3, n_kv_heads=4, n_queries=20, n_keys=90))
    arrays = {"queries": whole["queries"][1:, 4:, 6:15], "keys": whole["keys"][:2, 2:, 3:73]}
    want = check(({k: x.contiguous() for k, x in arrays.items()}, scale))
    tokens_first = {k: x.transpose(1, 2).contiguous().transpose(1, 2) for k, x in arrays.items()}
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda _: pytest.fail("copied"))
    for given in (arrays, tokens_first):
        assert_same(to_numpy(column_sums(**given, scale=scale)), to_numpy(want[0]))
        assert_same(to_numpy(column_maxima(**given, scale=scale)), to_numpy(want[1]))


def test_rows_at_odd_distances_are_copied() -> None:
    arrays, scale = make(Shape("float16", "float16", dim=68))
    check(({k: x[..., :64] for k, x in arrays.items()}, scale))


def test_lengths_compile_nothing_anew() -> None:
    """A few tiles are all that a number of queries chooses among."""

    def launched(**lengths: Any) -> list[Any]:
        arrays, scale = make(Shape("float16", "float16", 64, **lengths))
        with recording() as launches:
            column_sums(**arrays, scale=scale)
        return [(x.fn, x.signature, x.constants, x.num_warps, x.num_stages) for x in launches]

    assert launched(n_queries=40, n_keys=3000) == launched(n_queries=300, n_keys=1100, n_batch=2, n_kv_heads=1)
    assert launched(n_queries=1, n_keys=600) == launched(n_queries=1, n_keys=1700, n_batch=3)
    tiles = {config_of(n, 4, 128, False) for n in range(1, 4097)}
    assert len(tiles) == 5


def test_splits() -> None:
    """The first pass writes for the queries alone, however long the keys are."""
    for programs, n_keys in [(1, 1), (1, 100), (1, 131072), (8, 131072), (8, 257), (64, 131072), (2048, 4096)]:
        n, keys = splits(programs, n_keys, 64, 528)
        assert 1 <= n <= MAX_SPLITS and (n == 1 or n * programs <= 528)
        assert keys % 64 == 0 and (n - 1) * keys < n_keys <= n * keys


def test_memory_is_for_the_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    new_empty = torch.Tensor.new_empty

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        made.append(new_empty(self, *args, **options))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    monkeypatch.setattr(kernels, "processors", lambda _: 132)
    arrays, scale = make(Shape("float16", "float16", 64, n_queries=32, n_keys=8192))
    with recording():
        out = column_sums(**arrays, scale=scale)
    scratch = sum(x.nbytes for x in made if x is not out)
    assert scratch == 2 * 4 * MAX_SPLITS * 4 * 32


def test_supported() -> None:
    assert supported(128) is None and supported(8) is None and supported(256) is None
    assert "264" in str(supported(264)) and "12" in str(supported(12))
