"""Every backend over the shared vectors: one suite of backends x primitives x cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import checks, ops
from kvmlx import reference as ref
from kvmlx.backends.numpy import BACKEND as NUMPY
from kvmlx.checks import Case, cases, cases_of, given, parse
from kvmlx.tolerance import assert_close, assert_same
from kvmlx.types import Backend
from scripts.make_vectors import FILES, FOLDER, differences, serialize

# Name, module of the framework (skipped, with its reason, where it is missing), module that has BACKEND.
BACKENDS = [
    ("numpy", "numpy", "kvmlx.backends.numpy"),
    ("mlx", "mlx.core", "kvmlx.backends.mlx.ops"),
    ("metal", "mlx.core", "kvmlx.backends.mlx.metal.backend"),
    ("torch", "torch", "kvmlx.backends.torch.ops"),
    ("triton", "triton", "kvmlx.backends.torch.triton.backend"),
]


@pytest.fixture(scope="module", params=BACKENDS, ids=[row[0] for row in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, framework, module = request.param
    pytest.importorskip(framework)
    with _off_mac() if name == "metal" else nullcontext():
        yield import_module(module).BACKEND


def _off_mac() -> AbstractContextManager[Any]:
    """Execute the Metal kernels on the CPU (tests/metal)."""
    from tests.metal.device import Device
    from tests.metal.off_mac import off_mac

    return off_mac(Device(seed=1))


def over(primitive: str, *, without: str = "-none-") -> Callable[[Any], Any]:
    """Parametrize a test by the cases of a vector file, less those with ``without`` in their names."""
    return _parametrize({name: case for name, case in cases(primitive).items() if without not in name})


def checked(check: str) -> Callable[[Any], Any]:
    """Parametrize a test by the cases that a check of kvmlx.checks runs over."""
    return _parametrize(cases_of(check))


def _parametrize(found: dict[str, Case]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("case", list(found.values()), ids=list(found))


@pytest.mark.parametrize("primitive", list(FILES))
def test_files_are_what_the_script_writes(primitive: str) -> None:
    assert differences(primitive, FOLDER / f"{primitive}.safetensors") == []


def test_every_case_is_checked() -> None:
    """Of every file all cases, less those that no store can have: attention over no rows."""
    assert {check.file for check in checks.CHECKS.values()} == set(FILES)
    for file in FILES:
        run = set().union(*(cases_of(name) for name, check in checks.CHECKS.items() if check.file == file))
        assert run and run == {name for name in cases(file) if file != "attention" or "-T0-" not in name}


# Attention


@checked("attention")
def test_attention(backend: Backend, case: Case) -> None:
    checks.attention(backend, case)


@checked("sdpa")
def test_sdpa(backend: Backend, case: Case) -> None:
    checks.sdpa(backend, case)


@checked("attend")
def test_attend(backend: Backend, case: Case) -> None:
    checks.attend(backend, case)


@checked("column_sums")
def test_column_sums(backend: Backend, case: Case) -> None:
    checks.column_sums(backend, case)


def test_column_sums_in_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded block of queries, not dividing L, changes nothing."""
    params, t = cases("column_sums")["B1-H2-G1-L64-T129-D128-bias"]
    monkeypatch.setattr(ops, "QUERY_BLOCK_ELEMENTS", 2 * 129 * 7)
    inputs = {k: t[k] for k in ("queries", "keys", "bias")}
    sums = ops.column_sums(backend.xp, **{k: given(backend, x) for k, x in inputs.items()}, **params)
    assert_close(backend.to_numpy(sums), t["sums"], ref.column_sums(**inputs, **params, dtype=np.float32))


def test_top_rows_give_ties_to_the_older(backend: Backend) -> None:
    scores = np.array([[[1, 3, 2, 3, 3, 0], [0, 0, 0, 0, 0, 0]]], np.float32)
    got = backend.to_numpy(ops.top_rows(backend.xp, backend.from_numpy(scores), 2))
    assert_same(got, np.array([[[1, 3], [0, 1]]], np.int32))


def test_softmax_of_nothing_is_zero(backend: Backend) -> None:
    x = np.array([[-np.inf, -np.inf], [0, -np.inf]], np.float32)
    got = backend.to_numpy(ops.softmax(backend.xp, backend.from_numpy(x)))
    assert_same(got, np.array([[0, 0], [1, 0]], np.float32))


# Bytes


@checked("packing")
def test_packing(backend: Backend, case: Case) -> None:
    checks.packing(backend, case)


@checked("rotation")
def test_rotation(backend: Backend, case: Case) -> None:
    checks.rotation(backend, case)


@checked("affine")
def test_affine(backend: Backend, case: Case) -> None:
    checks.affine(backend, case)


@checked("kivi_keys")
def test_kivi_keys(backend: Backend, case: Case) -> None:
    checks.kivi_keys(backend, case)


@checked("codebook")
def test_codebook(backend: Backend, case: Case) -> None:
    checks.codebook(backend, case)


# Stages


@checked("select")
def test_select(backend: Backend, case: Case) -> None:
    checks.select(backend, case)


@checked("budgets")
def test_budgets(case: Case) -> None:
    checks.budgets(NUMPY, case)


@checked("keepkv")
def test_keepkv(backend: Backend, case: Case) -> None:
    checks.keepkv(backend, case)


@checked("rope")
def test_rope(backend: Backend, case: Case) -> None:
    checks.rope(backend, case)


# The vectors themselves


@pytest.mark.parametrize("primitive", ["affine", "codebook"])
def test_margins_hold(primitive: str) -> None:
    """Five float32 ulps of noise on what the rotation makes change no code and no metadata."""
    noise = np.random.default_rng(0)
    for params, t in cases(primitive).values():
        if "hadamard" not in params["stage"] and primitive == "affine":
            continue
        y = ref.rotate(t["x"], ref.SIGN_SEED)
        moved = y * (1 + 5 * 2.0**-24 * noise.uniform(-1, 1, y.shape))
        if primitive == "affine":
            group = y.shape[-1] // t["scales"].shape[-1]
            codes, scales, zeros = ref.affine_encode(moved, params["bits"], group)
            assert_same(zeros, t["zeros"])
        else:
            center = y.shape[-2] // t["means"].shape[-2] if "means" in t else 0
            scale = "norm" if "norm" in params["stage"] else "unbiased"
            codes, scales, _ = ref.codebook_encode(moved, params["bits"], scale=scale, center=center)
        assert_same(scales, t["scales"])
        for i, plane in enumerate(ref.pack(codes, params["bits"])):
            assert_same(plane, t[f"codes{i}"])


def test_check_explains_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "rope.safetensors"
    assert "missing" in differences("rope", path)[0]
    tensors, metadata = parse((FOLDER / path.name).read_bytes())
    path.write_bytes(serialize(tensors, metadata | {"format": 0}))
    assert "has format 0" in differences("rope", path)[0]
    path.write_bytes(serialize(tensors, metadata | {"generator": "0"}))
    assert "other cases or margins" in differences("rope", path)[0]
    path.write_bytes(serialize(tensors | {"D64/rotated": tensors["D64/rotated"] + 1}, metadata))
    assert "D64/rotated differs" in differences("rope", path)[0]
