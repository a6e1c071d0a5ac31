"""The checks of the shared test vectors: what each primitive is given, how it is called, what it is compared with.

One function per primitive, ``check(backend, case)``: it returns the worst error over its limit, and raises
`kvmlx.tolerance.Mismatch` where the policy refuses a result. `tests/test_vectors.py` and `kvmlx doctor --selftest`
run the same functions over the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from safetensors.numpy import load

from kvmlx import layout, ops
from kvmlx import reference as ref
from kvmlx.stages.base import Allocate, Merge, Select
from kvmlx.store import LayerStore
from kvmlx.strategy import STAGES, Strategy
from kvmlx.tolerance import Mismatch, assert_close, assert_same
from kvmlx.types import Backend, Codec, Rotary, Rows

Tensors = dict[str, np.ndarray]
Case = tuple[dict[str, Any], Tensors]
"""Parameters, and arrays by name."""
Check = Callable[[Backend, Case], float]

ORDERS = 8
"""Orders of summation of a plain float32 implementation: one can be lucky."""


def parse(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the metadata of a vector file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["kvmlx"])


@cache
def cases(file: str) -> dict[str, Case]:
    """Return the cases of one file of vectors, by name."""
    tensors, metadata = parse((files("kvmlx.vectors") / f"{file}.safetensors").read_bytes())
    out: dict[str, Case] = {name: (given, {}) for name, given in metadata["cases"].items()}
    for key, x in tensors.items():
        case, name = key.split("/")
        out[case][1][name] = x
    return out


def given(backend: Backend, x: np.ndarray) -> Any:
    """Hand an input to the backend, float16 as float32."""
    return backend.from_numpy(x.astype(np.float32) if x.dtype == np.float16 else x)


def optional(backend: Backend, tensors: Tensors, name: str) -> Any:
    return given(backend, tensors[name]) if name in tensors else None


# Attention


def attention(backend: Backend, case: Case) -> float:
    """Compose attention of kvmlx.ops: logits, mask, softmax, weighted values."""
    params, t = case
    xp = backend.xp
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
    return assert_close(backend.to_numpy(out), t["out"], _plain_attention(case))


def sdpa(backend: Backend, case: Case) -> float:
    """The framework's own fused attention, masked by what is added to the logits."""
    params, t = case
    zero = np.zeros_like(t["queries"][..., :1])
    zero_key = np.zeros_like(t["keys"][..., :1])
    added = {k: t[k] for k in ("bias", "valid") if k in t}
    mask = ref.masked_logits(zero, zero_key, scale=1.0, causal=params["causal"], **added, dtype=np.float32)
    causal = params["causal"] and not added
    out = backend.sdpa(
        given(backend, t["queries"]),
        given(backend, t["keys"]),
        given(backend, t["values"]),
        scale=params["scale"],
        causal=causal,
        mask=None if causal or not added else backend.from_numpy(mask),
        sinks=optional(backend, t, "sinks"),
    )
    return assert_close(backend.to_numpy(out), t["out"], _plain_attention(case))


def attend(backend: Backend, case: Case) -> float:
    """The backend's attention over a store of exact rows; its newest rows are the queries' own."""
    params, t = case
    store = LayerStore(backend, None, columns=("bias",) if "bias" in t else ())
    store.append(given(backend, t["keys"]), given(backend, t["values"]))
    if "bias" in t:
        room = store.columns["bias"].shape[2] - t["bias"].shape[2]
        padded = np.pad(t["bias"].astype(np.float32), ((0, 0), (0, 0), (0, room)))
        store.columns["bias"], store.biased = backend.from_numpy(padded), True
    if "valid" in t:
        store.begin = store.begin + (t["valid"] == 0).sum(axis=1)[:, None]
    out = store.backend.attend(
        store, given(backend, t["queries"]), scale=params["scale"], sinks=optional(backend, t, "sinks")
    )
    return assert_close(backend.to_numpy(out), t["out"], _plain_attention(case))


def _plain_attention(case: Case) -> np.ndarray:
    """Return plain float32 attention with its sums taken in several orders, stacked."""
    params, tensors = case
    out, rng = [], np.random.default_rng(0)
    for _ in range(ORDERS):
        t = {k: tensors[k] for k in ("queries", "keys", "values", "bias", "sinks", "valid") if k in tensors}
        channels = rng.permutation(t["queries"].shape[-1])
        t["queries"], t["keys"] = t["queries"][..., channels], t["keys"][..., channels]
        if not params["causal"]:
            rows = rng.permutation(t["keys"].shape[2])
            t["keys"], t["values"] = t["keys"][:, :, rows], t["values"][:, :, rows]
            t |= {k: t[k][..., rows] for k in ("bias", "valid") if k in t}
        out.append(ref.attention(**t, scale=params["scale"], causal=params["causal"], dtype=np.float32)[0])
    return np.stack(out)


def column_sums(backend: Backend, case: Case) -> float:
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
    return assert_close(backend.to_numpy(sums), t["sums"], ref.column_sums(**inputs, **params, dtype=np.float32))


# Bytes


def packing(backend: Backend, case: Case) -> float:
    params, t = case
    planes = layout.pack(backend.xp, backend.from_numpy(t["codes"]), params["bits"])
    for i, plane in enumerate(planes):
        assert_same(backend.to_numpy(plane), t[f"codes{i}"], name=f"codes{i}")
    expected = [backend.from_numpy(t[f"codes{i}"]) for i in range(len(planes))]
    return assert_same(backend.to_numpy(layout.unpack(backend.xp, expected, params["bits"])), t["codes"])


def rotation(backend: Backend, case: Case) -> float:
    params, t = case
    x = given(backend, t["x"])
    dim = t["x"].shape[-1]
    assert_same(layout.hadamard_block(dim), params["block"], name="block")
    assert_same(layout.signs(dim).astype(np.int8), t["signs"], name="signs")
    plain = ref.rotate(t["x"], None, np.float32)
    errors = [assert_close(backend.to_numpy(backend.hadamard(x, params["block"])), t["plain"], plain, name="hadamard")]
    codec = codec_of("turboquant(k=4)", "keys")
    rotated = codec.rotate(backend, x)
    plain = ref.rotate(t["x"], ref.SIGN_SEED, np.float32)
    errors.append(assert_close(backend.to_numpy(rotated), t["rotated"], plain, name="rotate"))
    back = ref.unrotate(plain, ref.SIGN_SEED, np.float32)
    errors.append(assert_close(backend.to_numpy(codec.unrotate(backend, rotated)), t["x"], back, name="unrotate"))
    return max(errors)


def codec_of(stage: str, side: str) -> Codec:
    """Return the codec of one side of a stage."""
    keys, values = Strategy.parse(stage).codecs()
    codec = keys if side == "keys" else values
    assert codec is not None
    return codec


def affine(backend: Backend, case: Case) -> float:
    t = case[1]
    return _codec(backend, case, ref.affine_decode(_codes(case), t["scales"], t["zeros"], np.float32))


def kivi_keys(backend: Backend, case: Case) -> float:
    t = case[1]
    return _codec(backend, case, ref.channel_decode(_codes(case), t["scales"], t["zeros"], np.float32))


def codebook(backend: Backend, case: Case) -> float:
    params, t = case
    plain = ref.codebook_decode(_codes(case), t["scales"], t.get("means"), params["bits"], np.float32)
    return _codec(backend, case, plain)


def _codec(backend: Backend, case: Case, plain: np.ndarray) -> float:
    """Compare planes bit by bit, from float32 and from float16 rows, and decoded rows by the policy."""
    params, t = case
    codec = codec_of(params["stage"], params["side"])
    specs = codec.planes(params["dim"])
    names = {spec.name for spec in specs}
    for rows in (given(backend, t["x"]), backend.from_numpy(t["x"])):
        planes = backend.encode(codec, rows)
        if not set(planes) == names == set(t) - {"x", "decoded"}:
            raise Mismatch(f"planes {sorted(planes)}, expected {sorted(names)}")
        for spec in specs:
            plane = backend.to_numpy(planes[spec.name])
            assert_same(plane, t[spec.name], name=f"{spec.name} of {str(rows.dtype).rpartition('.')[2]} rows")
            shape = (t["x"].shape[-2] // spec.rows, spec.width)
            if plane.shape[-2:] != shape:
                raise Mismatch(f"{spec.name}: shape {plane.shape[-2:]}, expected {shape}")
    stored = {name: backend.from_numpy(t[name]) for name in names}
    decoded = backend.to_numpy(backend.decode(codec, stored, params["dim"]))
    if decoded.dtype != np.float32:
        raise Mismatch(f"decoded: dtype {decoded.dtype}, expected float32")
    return assert_close(decoded, t["decoded"], plain, name="decoded")


def _codes(case: Case) -> np.ndarray:
    params, t = case
    planes = [t[name] for name in sorted(t) if name.startswith("codes")]
    return ref.unpack(planes, params["bits"], params["dim"])


# Stages


def select(backend: Backend, case: Case) -> float:
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
    if scores.shape != t["scores"].shape or scores.dtype != np.float32:
        raise Mismatch(f"scores: {scores.dtype} {scores.shape}, expected float32 {t['scores'].shape}")
    protected = np.array(scores)
    protected[..., : args["sinks"]] = np.inf
    protected[..., scores.shape[-1] - args["recent"] :] = np.inf
    kept = ops.top_rows(xp, backend.from_numpy(protected), args["budget"])
    return assert_same(backend.to_numpy(kept), t["kept"], name="kept")


def rotary_of(fields: dict[str, Any]) -> Rotary:
    pairs = {name: tuple(fields[name]) for name in ("first", "second", "frequency")}
    return Rotary(**pairs, factor=fields["factor"])


def budgets(backend: Backend, case: Case) -> float:
    """Budgets are made on the host: the backend has no part in them."""
    params, t = case
    stage = STAGES[params["method"]]()
    assert isinstance(stage, Allocate)
    if params["method"] == "pyramidkv":
        shares = stage.layer_budgets(**params["args"])
    else:
        shares = stage.head_budgets(t["scores"].astype(np.float32), **params["args"])
    return assert_same(np.asarray(shares).astype(t["budgets"].dtype), t["budgets"], name="budgets")


def keepkv(backend: Backend, case: Case) -> float:
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
    return max(
        assert_close(backend.to_numpy(got), t[f"out_{name}"], getattr(plain, name), name=name)
        for name, got in zip(("keys", "values", "bias"), folded, strict=True)
    )


def rope(backend: Backend, case: Case) -> float:
    params, t = case
    rotary = rotary_of(params["rotary"])
    x, positions = t["x"][:, None], np.stack([t["positions"]] * len(t["x"]))
    turned = ops.rotate(backend, given(backend, x), positions, rotary)
    back = ops.unrotate(backend, turned, positions, rotary)
    plain = _plain_rope(t["x"], t["positions"], rotary, rotary.factor)
    plain_back = _plain_rope(plain, -t["positions"], rotary, 1 / rotary.factor)
    return max(
        assert_close(backend.to_numpy(turned)[:, 0], t["rotated"], plain, name="rotated"),
        assert_close(backend.to_numpy(back)[:, 0], t["x"], plain_back, name="rotated back"),
    )


def _plain_rope(x: np.ndarray, positions: np.ndarray, rotary: Rotary, factor: float) -> np.ndarray:
    """Turn ``[..., n, D]`` in float32, by angles made in float64."""
    angles = positions[:, None] * np.array(rotary.frequency)
    cos, sin = ((f(angles) * factor).astype(np.float32) for f in (np.cos, np.sin))
    out = x.astype(np.float32)
    first, second = list(rotary.first), list(rotary.second)
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


@dataclass(frozen=True)
class VectorCheck:
    """A check, and the cases that it runs over."""

    file: str
    run: Check
    without: tuple[str, ...] = ()
    """The cases left out have one of these in their names."""


NO_ROWS = "-T0-"
"""A segment without rows: no store ever attends over one. Kernels may."""
NO_OWN_ROWS = "-segment"
"""Queries without rows of their own among the keys: a part of a store, not a store."""

CHECKS: dict[str, VectorCheck] = {
    "attention": VectorCheck("attention", attention, (NO_ROWS,)),
    "sdpa": VectorCheck("attention", sdpa, (NO_ROWS,)),
    "attend": VectorCheck("attention", attend, (NO_ROWS, NO_OWN_ROWS)),
    "column_sums": VectorCheck("column_sums", column_sums),
    "packing": VectorCheck("packing", packing),
    "rotation": VectorCheck("hadamard", rotation),
    "affine": VectorCheck("affine", affine),
    "kivi_keys": VectorCheck("kivi", kivi_keys),
    "codebook": VectorCheck("codebook", codebook),
    "select": VectorCheck("select", select),
    "budgets": VectorCheck("budgets", budgets),
    "keepkv": VectorCheck("keepkv", keepkv),
    "rope": VectorCheck("rope", rope),
}
"""Every file of vectors is in one check at least."""


def cases_of(check: str) -> dict[str, Case]:
    """Return the cases that a check runs over, by name."""
    found = cases(CHECKS[check].file)
    return {name: case for name, case in found.items() if not any(part in name for part in CHECKS[check].without)}
