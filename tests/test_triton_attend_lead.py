"""The decode attention kernel over stores of every format; interpreted without a GPU, on the device where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvmlx.backends.torch.triton import backend as triton_backend  # noqa: E402
from kvmlx.backends.torch.triton import launch  # noqa: E402
from kvmlx.backends.torch.triton.attend import attend_decode  # noqa: E402
from tests.stores import SHAPES, Shape, check, make  # noqa: E402

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
TRITON = triton_backend.on(DEVICE)
FEW = [replace(s, n_queries=min(s.n_queries, 1 + i % 3)) for i, s in enumerate(SHAPES)]


@pytest.mark.parametrize("shape", FEW, ids=[s.name for s in FEW])
def test_decode(shape: Shape) -> None:
    check(attend_decode, make(shape, 0, TRITON))


@pytest.mark.parametrize("body", [1, 31, 32, 33, 63, 64, 65, 127, 129, 700])
def test_lengths_around_a_tile(body: int) -> None:
    check(attend_decode, make(Shape("int4", "float16", 64, n_queries=1, body=body), body, TRITON))


def test_lengths_are_not_compiled_in() -> None:
    def launches(body: int, tail: int) -> list[Any]:
        p = make(Shape("int4", "float16", 64, n_queries=1, body=body, tail=tail), 0, TRITON)
        with launch.recording() as found:
            attend_decode(p.store, p.queries, **p.arguments())
        return [(one.name, one.signature, one.constants, one.num_warps, one.num_stages) for one in found]

    assert launches(640, 5) == launches(649, 30)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make(Shape("int4", "float16", 64, n_queries=1, body=64), 0, TRITON)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the host reads a tensor")

    with launch.recording():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        attend_decode(p.store, p.queries, **p.arguments())
        monkeypatch.undo()


def test_a_row_without_anything_to_see_is_zero() -> None:
    p = make(Shape(n_queries=2, mask="bool L"), 0, TRITON)
    assert p.mask is not None
    p.mask[:, :, 1] = False
    out = check(attend_decode, p)
    assert np.all(TRITON.to_numpy(out)[:, :, 1] == 0)
