"""Every backend over the shared vectors: one suite of backends x primitives x cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import layout, ops
from kvmlx import reference as ref
from kvmlx.stages.base import Allocate, Merge, Select
from kvmlx.strategy import STAGES, Strategy
from kvmlx.types import Backend, Codec, Rotary, Rows
from scripts.make_vectors import FILES, FOLDER, differences, read, serialize
from tests.tolerance import assert_close, assert_same

# Name, module of the framework (skipped, with its reason, where it is missing), module that has BACKEND.
BACKENDS = [
    ("numpy", "numpy", "kvmlx.backends.numpy"),
    ("mlx", "mlx.core", "kvmlx.backends.mlx.ops"),
]

Case = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=BACKENDS, ids=[row[0] for row in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Backend:
    _, framework, module = request.param
    pytest.importorskip(framework)
    return import_module(module).BACKEND


@cache
def _file(primitive: str) -> dict[str, Case]:
    tensors, metadata = read(FOLDER / f"{primitive}.safetensors")
    cases: dict[str, Case] = {name: (params, {}) for name, params in metadata["cases"].items()}
    for key, x in tensors.items():
        case, name = key.split("/")
        cases[case][1][name] = x
    return cases


def over(primitive: str, *, without: str = "-none-") -> Callable[[Any], Any]:
    """Parametrize a test by the cases of a vector file, less those with ``without`` in their names."""
    cases = {name: case for name, case in _file(primitive).items() if without not in name}
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def given(backend: Backend, x: np.ndarray) -> Any:
    """Hand an input to the backend, float16 as float32."""
    return backend.from_numpy(x.astype(np.float32) if x.dtype == np.float16 else x)


def optional(backend: Backend, tensors: dict[str, np.ndarray], name: str) -> Any:
    return given(backend, tensors[name]) if name in tensors else None


@pytest.mark.parametrize("primitive", list(FILES))
def test_files_are_what_the_script_writes(primitive: str) -> None:
    assert differences(primitive, FOLDER / f"{primitive}.safetensors") == []


# Attention


# A store never attends over a segment without rows: T0 is for kernels.
@over("attention", without="-T0-")
def test_attention(backend: Backend, case: Case) -> None:
    """Compose attention of kvmlx.ops: logits, mask, softmax, weighted values."""
    params, t = case
    xp = backend.xp
    inputs = {k: t[k] for k in ("queries", "keys", "values", "bias", "sinks", "valid") if k in t}
    s = ops.logits(xp, given(backend, t["queries"]), given(backend, t["keys"]), params["scale"])
    if params["causal"]:
        s = xp.where(ops.causal_mask(xp, s.shape[2], s.shape[3]), s, ops.NEG_INF)
    if "bias" in t:
        s = s + xp.repeat(given(backend, t["bias"]), s.shape[1] // t["bias"].shape[1], axis=1)[:, :, None, :]
    if "valid" in t:
        s = xp.where(given(backend, t["valid"] != 0)[:, None, None, :], s, ops.NEG_INF)
    if "sinks" in t:
        column = xp.broadcast_to(given(backend, t["sinks"])[None, :, None, None], (*s.shape[:3], 1))
        weights = ops.softmax(xp, xp.concat([s, column], axis=-1))[..., :-1]
    else:
        weights = ops.softmax(xp, s)
    out = ops.weighted_values(xp, weights, given(backend, t["values"]))
    assert_close(backend.to_numpy(out), t["out"], plain_attention(inputs, params))


def plain_attention(inputs: dict[str, np.ndarray], params: dict[str, Any]) -> np.ndarray:
    """Return plain float32 attention with its sums taken in eight orders, stacked."""
    out, rng = [], np.random.default_rng(0)
    for _ in range(8):
        t = dict(inputs)
        channels = rng.permutation(t["queries"].shape[-1])
        t["queries"], t["keys"] = t["queries"][..., channels], t["keys"][..., channels]
        if not params["causal"]:
            rows = rng.permutation(t["keys"].shape[2])
            t["keys"], t["values"] = t["keys"][:, :, rows], t["values"][:, :, rows]
            t |= {k: t[k][..., rows] for k in ("bias", "valid") if k in t}
        out.append(ref.attention(**t, scale=params["scale"], causal=params["causal"], dtype=np.float32)[0])
    return np.stack(out)


@over("attention", without="-T0-")
def test_sdpa(backend: Backend, case: Case) -> None:
    """The framework's own fused attention, masked by what is added to the logits."""
    params, t = case
    inputs = {k: t[k] for k in ("queries", "keys", "values", "bias", "sinks", "valid") if k in t}
    zero = np.zeros_like(t["queries"][..., :1])
    zero_key = np.zeros_like(t["keys"][..., :1])
    added = {k: t[k] for k in ("bias", "valid") if k in t}
    mask = ref.masked_logits(zero, zero_key, scale=1.0, causal=params["causal"], **added, dtype=np.float32)
    causal = params["causal"] and not added
    out = backend.sdpa(  # type: ignore[attr-defined]
        given(backend, t["queries"]),
        given(backend, t["keys"]),
        given(backend, t["values"]),
        scale=params["scale"],
        causal=causal,
        mask=None if causal or not added else backend.from_numpy(mask),
        sinks=optional(backend, t, "sinks"),
    )
    assert_close(backend.to_numpy(out), t["out"], plain_attention(inputs, params))


@over("column_sums")
def test_column_sums(backend: Backend, case: Case) -> None:
    params, t = case
    n = backend.from_numpy(t["n_queries"]) if "n_queries" in t else None
    sums = backend.column_sums(
        given(backend, t["queries"]),
        given(backend, t["keys"]),
        scale=params["scale"],
        n_queries=n,
        bias=optional(backend, t, "bias"),
    )
    inputs = {k: t[k] for k in ("queries", "keys", "bias", "n_queries") if k in t}
    assert_close(backend.to_numpy(sums), t["sums"], ref.column_sums(**inputs, **params, dtype=np.float32))


def test_column_sums_in_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded block of queries, not dividing L, changes nothing."""
    params, t = _file("column_sums")["B1-H2-G1-L64-T129-D128-bias"]
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


@over("packing")
def test_packing(backend: Backend, case: Case) -> None:
    params, t = case
    planes = layout.pack(backend.xp, backend.from_numpy(t["codes"]), params["bits"])
    for i, plane in enumerate(planes):
        assert_same(backend.to_numpy(plane), t[f"codes{i}"], name=f"codes{i}")
    expected = [backend.from_numpy(t[f"codes{i}"]) for i in range(len(planes))]
    assert_same(backend.to_numpy(layout.unpack(backend.xp, expected, params["bits"])), t["codes"])


@over("hadamard")
def test_rotation(backend: Backend, case: Case) -> None:
    params, t = case
    x = given(backend, t["x"])
    dim = t["x"].shape[-1]
    assert layout.hadamard_block(dim) == params["block"]
    assert_same(layout.signs(dim).astype(np.int8), t["signs"], name="signs")
    plain = ref.rotate(t["x"], None, np.float32)
    assert_close(backend.to_numpy(backend.hadamard(x, params["block"])), t["plain"], plain, name="hadamard")
    codec = codec_of("turboquant(k=4)", "keys")
    rotated = codec.rotate(backend, x)
    plain = ref.rotate(t["x"], ref.SIGN_SEED, np.float32)
    assert_close(backend.to_numpy(rotated), t["rotated"], plain, name="rotate")
    back = ref.unrotate(plain, ref.SIGN_SEED, np.float32)
    assert_close(backend.to_numpy(codec.unrotate(backend, rotated)), t["x"], back, name="unrotate")


def codec_of(stage: str, side: str) -> Codec:
    keys, values = Strategy.parse(stage).codecs()
    codec = keys if side == "keys" else values
    assert codec is not None
    return codec


def check_codec(backend: Backend, case: Case, plain: np.ndarray) -> None:
    """Compare planes bit by bit and decoded rows by the policy."""
    params, t = case
    codec = codec_of(params["stage"], params["side"])
    names = {spec.name for spec in codec.planes(params["dim"])}
    planes = backend.encode(codec, given(backend, t["x"]))
    assert set(planes) == names == set(t) - {"x", "decoded"}
    for spec in codec.planes(params["dim"]):
        plane = backend.to_numpy(planes[spec.name])
        assert_same(plane, t[spec.name], name=spec.name)
        assert plane.shape[-2:] == (t["x"].shape[-2] // spec.rows, spec.width)
    stored = {name: backend.from_numpy(t[name]) for name in names}
    decoded = backend.to_numpy(backend.decode(codec, stored, params["dim"]))
    assert decoded.dtype == np.float32
    assert_close(decoded, t["decoded"], plain, name="decoded")


def codes(case: Case) -> np.ndarray:
    params, t = case
    planes = [t[name] for name in sorted(t) if name.startswith("codes")]
    return ref.unpack(planes, params["bits"], params["dim"])


@over("affine")
def test_affine(backend: Backend, case: Case) -> None:
    t = case[1]
    check_codec(backend, case, ref.affine_decode(codes(case), t["scales"], t["zeros"], np.float32))


@over("kivi")
def test_kivi_keys(backend: Backend, case: Case) -> None:
    t = case[1]
    check_codec(backend, case, ref.channel_decode(codes(case), t["scales"], t["zeros"], np.float32))


@over("codebook")
def test_codebook(backend: Backend, case: Case) -> None:
    params, t = case
    means = t.get("means")
    check_codec(backend, case, ref.codebook_decode(codes(case), t["scales"], means, params["bits"], np.float32))


# Stages


@over("select")
def test_select(backend: Backend, case: Case) -> None:
    """The rows kept are the oracle's; scores may differ by a factor and an offset."""
    params, t = case
    xp, args = backend.xp, params["args"]
    stage = STAGES[params["method"]](**args)
    assert isinstance(stage, Select)
    sums = None
    if params["method"] == "h2o":
        received = backend.column_sums(given(backend, t["queries"]), given(backend, t["keys"]), scale=params["scale"])
        sums = ops.group_mean(xp, received, t["keys"].shape[1])
    rows = Rows(
        backend=backend,
        keys=given(backend, t["keys"]),
        values=given(backend, t["values"]),
        scale=params["scale"],
        length=params["length"],
        layer=0,
        n_layers=2,
        queries=optional(backend, t, "queries") if sums is None else None,
        sums=sums,
        query_mean=optional(backend, t, "query_mean"),
        query_cov=optional(backend, t, "query_cov"),
        rotary=rotary_of(params["rotary"]) if "rotary" in params else None,
    )
    scores = backend.to_numpy(stage.score(rows))
    assert scores.shape == t["scores"].shape and scores.dtype == np.float32
    protected = np.array(scores)
    protected[..., : args["sinks"]] = np.inf
    protected[..., scores.shape[-1] - args["recent"] :] = np.inf
    kept = ops.top_rows(xp, backend.from_numpy(protected), args["budget"])
    assert_same(backend.to_numpy(kept), t["kept"])


def rotary_of(fields: dict[str, Any]) -> Rotary:
    pairs = {name: tuple(fields[name]) for name in ("first", "second", "frequency")}
    return Rotary(**pairs, factor=fields["factor"])


@over("budgets")
def test_budgets(case: Case) -> None:
    params, t = case
    stage = STAGES[params["method"]]()
    assert isinstance(stage, Allocate)
    if params["method"] == "pyramidkv":
        budgets = stage.layer_budgets(**params["args"])
    else:
        budgets = stage.head_budgets(t["scores"].astype(np.float32), **params["args"])
    assert np.asarray(budgets).tolist() == t["budgets"].tolist()


@over("keepkv")
def test_keepkv(backend: Backend, case: Case) -> None:
    params, t = case
    stage = STAGES["keepkv"](**params["args"])
    assert isinstance(stage, Merge)
    rows = Rows(
        backend=backend,
        keys=given(backend, t["keys"]),
        values=given(backend, t["values"]),
        scale=params["scale"],
        length=t["keys"].shape[2],
        layer=0,
        n_layers=2,
        queries=given(backend, t["queries"]),
        bias=given(backend, t["bias"]),
    )
    folded = stage.fold(rows, backend.from_numpy(t["kept"]), backend.from_numpy(t["dropped"]))
    plain = ref.keepkv_fold(
        *(t[name] for name in ("keys", "values", "queries", "kept", "dropped")),
        bias=t["bias"],
        scale=params["scale"],
        similarity=params["args"]["similarity"],
        form=params["args"]["form"],
        dtype=np.float32,
    )
    for name, got in zip(("keys", "values", "bias"), folded, strict=True):
        assert_close(backend.to_numpy(got), t[f"out_{name}"], getattr(plain, name), name=name)


# The vectors themselves


@pytest.mark.parametrize("primitive", ["affine", "codebook"])
def test_margins_hold(primitive: str) -> None:
    """Five float32 ulps of noise on what the rotation makes change no code and no metadata."""
    noise = np.random.default_rng(0)
    for params, t in _file(primitive).values():
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
    tensors, metadata = read(FOLDER / path.name)
    path.write_bytes(serialize(tensors, metadata | {"format": 0}))
    assert "has format 0" in differences("rope", path)[0]
    path.write_bytes(serialize(tensors, metadata | {"generator": "0"}))
    assert "other cases or margins" in differences("rope", path)[0]
    path.write_bytes(serialize(tensors | {"D64/rotated": tensors["D64/rotated"] + 1}, metadata))
    assert "D64/rotated differs" in differences("rope", path)[0]
