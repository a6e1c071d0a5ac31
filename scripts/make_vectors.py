"""Write tests/vectors/*.safetensors, the shared test vectors, from the float64 oracle.

    python scripts/make_vectors.py            write them
    python scripts/make_vectors.py --check    compare those that exist with what would be written

Inputs are float16 numbers, stored as such. They are drawn again until every decision that they lead to (the
rounding of a code, a threshold, a float16 rounding, the border of a top-k) has the margin stated in MARGINS:
then every correct float32 backend makes the same codes and keeps the same rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from kvmlx import reference as ref
from kvmlx.checks import parse
from kvmlx.types import Rotary

FORMAT = 1
"""Raise it where the files' structure or the meaning of a tensor changes."""
MARGINS = {
    "code": 1e-3,  # of an affine code's step, from the half where it rounds
    "threshold": 2e-5,  # of a code book's unit, about 60 float32 ulps after the rotation
    "half_relative": 4e-6,  # of a float16 scale or mean before it is rounded
    "half_absolute": 2e-6,  # of the row's rms, for what a rotation made
    "top_k": 1e-3,  # of the spread of the scores that compete, between last kept and first dropped
    "factor": 1e-2,  # of KeepKV's cosines and guard, a tenth of the factor's denominator
}
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors"

Tensors = dict[str, Any]
"""Arrays by name."""
Case = tuple[str, dict[str, Any], Tensors]


class Random:
    """Draws float16 numbers. RandomState, because NumPy froze its stream; a Generator's may change."""

    def __init__(self, seed: str) -> None:
        self.state = np.random.RandomState(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little"))

    def normal(self, *shape: int, std: Any = 1.0, mean: Any = 0.0) -> np.ndarray:
        """Return float16 ``shape``."""
        return (self.state.standard_normal(shape) * std + mean).astype(np.float16)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        return self.state.randint(0, high, shape)

    def channels(self, dim: int) -> np.ndarray:
        """Return the standard deviation of each channel ``[dim]``: a few outliers, as keys have."""
        return np.where(self.state.uniform(size=dim) < 0.05, 6.0, 1.0)


# Attention


def attention_cases() -> Iterator[Case]:
    # B, H, G, L, T, D, Dv, options
    shapes = [
        (2, 2, 1, 1, 1, 64, 64, ""),
        (1, 2, 3, 3, 63, 80, 80, ""),
        (1, 1, 8, 1, 129, 128, 128, ""),
        (1, 1, 1, 64, 64, 64, 64, ""),
        (1, 1, 3, 64, 65, 96, 64, "bias"),
        (2, 1, 8, 3, 65, 64, 64, "sinks valid"),
        (1, 2, 1, 3, 65, 256, 256, "bias sinks valid"),
        (2, 1, 3, 1, 65, 128, 128, "valid"),
        (1, 2, 3, 3, 64, 64, 64, "segment bias"),
        (1, 2, 3, 3, 0, 64, 64, "segment sinks"),
        (1, 2, 3, 3, 0, 64, 64, "segment"),
    ]
    for b, h, g, n, t, d, dv, options in shapes:
        causal = "segment" not in options
        name = "-".join([f"B{b}", f"H{h}", f"G{g}", f"L{n}", f"T{t}", f"D{d}", *options.split()])
        rng = Random(f"attention {name}")
        x: Tensors = {
            "queries": rng.normal(b, h * g, n, d, std=1.5),
            "keys": rng.normal(b, h, t, d),
            "values": rng.normal(b, h, t, dv),
        }
        extra: Tensors = {}
        if "bias" in options:
            extra["bias"] = np.abs(rng.normal(b, h, t))
        if "sinks" in options:
            extra["sinks"] = rng.normal(h * g)
        if "valid" in options:
            # Left padding: no query of the newest rows is blind.
            extra["valid"] = (np.arange(t)[None] >= 5 + 7 * np.arange(b)[:, None]).astype(np.uint8)
        scale = float(np.float32(d**-0.5))
        out, lse = ref.attention(**x, **extra, scale=scale, causal=causal)
        yield name, {"scale": scale, "causal": causal}, x | extra | {"out": f32(out), "lse": f32(lse)}


def column_sums_cases() -> Iterator[Case]:
    shapes = [
        (1, 1, 1, 1, 1, 64, ""),
        (2, 2, 3, 3, 63, 80, "bias"),
        (1, 1, 8, 33, 64, 64, ""),
        (1, 2, 1, 64, 129, 128, "bias"),
        (2, 1, 3, 17, 65, 96, "counted"),
        (2, 1, 8, 3, 65, 256, "counted bias"),
    ]
    for b, h, g, n, t, d, options in shapes:
        name = "-".join([f"B{b}", f"H{h}", f"G{g}", f"L{n}", f"T{t}", f"D{d}", *options.split()])
        rng = Random(f"column_sums {name}")
        x: Tensors = {"queries": rng.normal(b, h * g, n, d, std=1.5), "keys": rng.normal(b, h, t, d)}
        if "bias" in options:
            bias = rng.normal(b, h, t)
            bias[:, :, ::9] = -np.inf
            bias[:, :, t - n :] = 0
            x["bias"] = bias
        if "counted" in options:
            x["n_queries"] = np.array([n, n // 2], np.int32)
        scale = float(np.float32(d**-0.5))
        yield name, {"scale": scale}, x | {"sums": f32(ref.column_sums(**x, scale=scale))}


# Bytes


def packing_cases() -> Iterator[Case]:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        for dim, rows in ((8, 3), (64, 1), (80, 5), (96, 2), (128, 0), (256, 2)):
            name = f"bits{bits}-D{dim}-R{rows}"
            codes = Random(f"packing {name}").integers(2**bits, 2, rows, dim).astype(np.uint8)
            yield name, {"bits": bits}, {"codes": codes} | planes_of(codes, bits)


def hadamard_cases() -> Iterator[Case]:
    for dim in (64, 80, 96, 128, 256):
        rng = Random(f"hadamard {dim}")
        x = rng.normal(2, 3, dim, std=rng.channels(dim))
        yield (
            f"D{dim}",
            {"block": ref.hadamard_block(dim)},
            {
                "x": x,
                "signs": ref.signs(ref.SIGN_SEED, dim).astype(np.int8),
                "plain": f32(ref.rotate(x, None)),
                "rotated": f32(ref.rotate(x, ref.SIGN_SEED)),
            },
        )


def affine_cases() -> Iterator[Case]:
    # bits, T, D, group, rotate
    shapes = [(b, 3, 64, 64, False) for b in (2, 3, 4, 5, 6, 8)]
    shapes += [(b, 3, 128, 32, True) for b in (2, 3, 4, 5, 6, 8)]
    shapes += [(4, 0, 64, 64, False), (4, 1, 80, 16, False), (4, 65, 96, 32, False), (8, 63, 64, 64, False)]
    shapes += [(2, 64, 64, 8, True), (4, 65, 80, 16, True), (3, 1, 96, 32, True), (4, 5, 256, 64, True)]
    # The 33 rows of KIVI's values: any number may be encoded, unlike its keys.
    shapes += [(2, 33, 64, 32, False)]
    for bits, t, d, group, rotated in shapes:
        name = f"bits{bits}-T{t}-D{d}-g{group}" + ("-hadamard" if rotated else "")
        rng = Random(f"affine {name}")
        seed = ref.SIGN_SEED if rotated else None

        def unsafe(x: np.ndarray, bits: int = bits, group: int = group, rotated: bool = rotated) -> np.ndarray:
            y = ref.rotate(x, ref.SIGN_SEED) if rotated else x.astype(np.float64)
            return np.asarray(unsafe_affine(y, bits, group, -1, rotated).any(axis=-1, keepdims=True))

        x = draw(rng, (2, t, d), rng.channels(d), 0.0, unsafe)
        if bits == 4 and t > 1 and not rotated:
            x = edge_rows(x, group)
        y = ref.rotate(x, seed) if rotated else x
        codes, scales, zeros = ref.affine_encode(y, bits, group)
        stage = f"int(bits={bits}, group_size={group}" + (", rotate=hadamard)" if rotated else ")")
        side = "keys"
        if t == 33:
            stage, side = f"kivi(v={bits})", "values"
        tensors = {"x": x, "scales": scales, "zeros": zeros} | planes_of(codes, bits)
        tensors["decoded"] = f32(ref.affine_decode(codes, scales, zeros))
        yield name, {"stage": stage, "side": side, "bits": bits, "dim": d}, tensors


def edge_rows(x: np.ndarray, group: int) -> np.ndarray:
    """Start with groups that go wrong easily: zeros, a constant, a range below float16, the full range."""
    x = x.copy()
    x[0, 0, :group] = 0.0
    x[0, 1, :group] = 1.5
    x[0, 2, :group] = 0.0
    x[0, 2, group // 2] = 2.0**-24
    x[1, 0, :group] = np.where(np.arange(group) % 3 == 0, ref.HALF_MAX, -ref.HALF_MAX)
    return x


def kivi_cases() -> Iterator[Case]:
    for bits, t, d in [
        (2, 32, 64),
        (2, 96, 64),
        (4, 64, 80),
        (3, 32, 96),
        (4, 32, 256),
        (8, 32, 64),
        (2, 0, 64),
    ]:
        name = f"bits{bits}-T{t}-D{d}"
        rng = Random(f"kivi {name}")

        def unsafe(x: np.ndarray, bits: int = bits) -> np.ndarray:
            bad = unsafe_affine(x.astype(np.float64), bits, 32, -2, False)
            blocks = bad.reshape(bad.shape[0], -1, 32, bad.shape[-1]).any(axis=2)
            return np.repeat(blocks, 32, axis=1)

        x = draw(rng, (2, t, d), rng.channels(d), rng.normal(d, std=2).astype(np.float64), unsafe)
        if t:
            x[0, :32, 3] = 0.25
        codes, scales, zeros = ref.channel_encode(x, bits, 32)
        tensors = {"x": x, "scales": scales, "zeros": zeros} | planes_of(codes, bits)
        tensors["decoded"] = f32(ref.channel_decode(codes, scales, zeros))
        yield name, {"stage": f"kivi(k={bits})", "side": "keys", "bits": bits, "dim": d}, tensors


def codebook_cases() -> Iterator[Case]:
    # bits, T, D, scale, center
    shapes = [(b, 3, 128, "unbiased", 0) for b in (1, 2, 3, 4, 5)]
    shapes += [(2, 32, 128, "unbiased", 32), (4, 64, 80, "unbiased", 64)]
    shapes += [(4, 0, 64, "unbiased", 0), (4, 1, 80, "unbiased", 0), (2, 65, 64, "norm", 0)]
    shapes += [(3, 63, 96, "unbiased", 0), (4, 5, 256, "norm", 0), (3, 64, 64, "unbiased", 32)]
    for bits, t, d, scale, center in shapes:
        name = f"bits{bits}-T{t}-D{d}-{scale}" + (f"-center{center}" if center else "")
        rng = Random(f"codebook {name}")
        # A mean near zero has a float16 grid finer than float32's error: means are kept away from it.
        means = (1.0 + rng.state.uniform(size=d)) * np.where(rng.integers(2, d) == 1, 1, -1)
        mean = ref.unrotate(means, ref.SIGN_SEED) if center else 0.0

        def unsafe(x: np.ndarray, bits: int = bits, scale: str = scale, center: int = center) -> np.ndarray:
            return unsafe_codebook(ref.rotate(x, ref.SIGN_SEED), bits, scale, center)

        x = draw(rng, (2, t, d), 1.0 if center else rng.channels(d), mean, unsafe)
        if t > 1 and not center:
            x[1, 0] = 0.0
        y = ref.rotate(x, ref.SIGN_SEED)
        codes, scales, block_means = ref.codebook_encode(y, bits, scale=scale, center=center)
        stage = f"turboquant(k={bits}, scale={scale}" + (f", center={center})" if center else ")")
        tensors = {"x": x, "scales": scales} | planes_of(codes, bits)
        if block_means is not None:
            tensors["means"] = block_means
        tensors["decoded"] = f32(ref.codebook_decode(codes, scales, block_means, bits))
        yield name, {"stage": stage, "side": "keys", "bits": bits, "dim": d}, tensors


def planes_of(codes: np.ndarray, bits: int) -> Tensors:
    return {f"codes{i}": plane for i, plane in enumerate(ref.pack(codes, bits))}


def unsafe_affine(y: np.ndarray, bits: int, group: int, axis: int, rotated: bool) -> np.ndarray:
    """Say which elements of ``y [2, T, D]`` have a code, or their group a scale or zero, near a border."""
    encode = ref.affine_real_codes if axis == -1 else ref.channel_real_codes
    real, scales, _ = encode(y, bits, group)
    real = np.clip(real, 0, 2**bits - 1)
    bad = np.abs(real - np.floor(real) - 0.5) < MARGINS["code"]
    lead, t, d = y.shape
    shape = (lead, t, d // group, group) if axis == -1 else (lead, t // group, group, d)
    groups = y.reshape(shape)
    low, high = groups.min(axis=axis, keepdims=True), groups.max(axis=axis, keepdims=True)
    noise = MARGINS["half_absolute"] * rms(y).max(initial=0.0) if rotated else 0.0
    step = (high - low) / (2**bits - 1)
    bad_group = near_half_border(low, noise) | near_half_border(step, noise / 2**bits + MARGINS["half_relative"] * step)
    return np.asarray(bad | np.broadcast_to(bad_group, shape).reshape(y.shape) | (scales.min(initial=1.0) <= 0))


def unsafe_codebook(y: np.ndarray, bits: int, scale: str, center: int) -> np.ndarray:
    """Say which rows of ``y [2, T, D]`` have a code, a scale, or their block a mean, near a border."""
    unit, _, scales, means = ref.codebook_parts(y, bits, scale=scale, center=center)
    thresholds = np.array(ref.lloyd_max(bits)[1])
    bad = (np.abs(unit[..., None] - thresholds).min(axis=-1) < MARGINS["threshold"]).any(axis=-1, keepdims=True)
    bad |= near_half_border(scales, MARGINS["half_relative"] * scales)
    if means is not None:
        blocks = y.reshape(len(y), -1, center, y.shape[-1])
        exact = blocks.mean(axis=2)
        noise = MARGINS["half_absolute"] * rms(y).max()
        bad_block = near_half_border(exact, noise).any(axis=-1) | bad.reshape(len(y), -1, center).any(axis=-1)
        bad = np.repeat(bad_block, center, axis=1)[..., None]
    return bad


def rms(y: np.ndarray) -> np.ndarray:
    return np.sqrt((y * y).mean(axis=-1))


def near_half_border(x: np.ndarray, noise: Any) -> np.ndarray:
    """Say where ``x +- noise`` does not round to one float16."""
    return ref.to_half(x - noise) != ref.to_half(x + noise)


def draw(
    rng: Random, shape: tuple[int, ...], std: Any, mean: Any, unsafe: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Draw float16 ``shape``, and again what ``unsafe`` (broadcast to it) names, until it names nothing."""
    x = rng.normal(*shape, std=std, mean=mean)
    for _ in range(400):
        bad = np.broadcast_to(unsafe(x), shape)
        if not bad.any():
            return x
        x = np.where(bad, rng.normal(*shape, std=std, mean=mean), x)
    raise RuntimeError(f"no draw of {shape} has the margins {MARGINS}")


# Rows kept


ROTARY_64 = Rotary(
    first=tuple(range(32)),
    second=tuple(range(32, 64)),
    frequency=tuple(float(f) for f in 10_000.0 ** (-np.arange(32) / 32)),
)
# Interleaved pairs, half of the channels, and YaRN's factor.
ROTARY_80 = Rotary(
    first=tuple(range(0, 40, 2)),
    second=tuple(range(1, 40, 2)),
    frequency=tuple(float(f) for f in 10_000.0 ** (-np.arange(20) / 20)),
    factor=1.125,
)


def rotary_dict(rotary: Rotary) -> dict[str, Any]:
    return {name: getattr(rotary, name) for name in ("first", "second", "frequency", "factor")}


def select_cases() -> Iterator[Case]:
    # H, G, T, D, W
    shapes = [(1, 3, 129, 64, 16), (1, 8, 65, 80, 1), (3, 1, 63, 64, 5)]
    for h, g, t, d, w in shapes:
        sinks, recent, budget = 4, 16, t // 2
        for method in ("streaming", "h2o", "tova", "snapkv", "keydiff", "knorm", "leverage", "expected_attention"):
            if (method == "expected_attention" and h == 3) or (method == "streaming" and d != 80):
                continue
            name = f"{method}-H{h}-G{g}-T{t}-D{d}"
            args: dict[str, Any] = {"budget": budget, "sinks": sinks, "recent": recent}
            if method == "leverage":
                args |= {"of": {64: "values", 80: "keys"}[d] if h == 1 else "both", "ridge": 0.01}
            if method == "snapkv":
                args |= {"window": w, "kernel": 5}
            if method == "expected_attention":
                args |= {"n_future": 64, "epsilon": 0.0 if d == 64 else 0.01}
            for attempt in range(100):
                rng = Random(f"select {name} {attempt}")
                tensors, params, scores = select_inputs(rng, method, h, g, t, d, w, args)
                if safe_top(scores, budget, sinks, recent):
                    break
            else:
                raise RuntimeError(f"no draw of {name} has a margin at the border")
            kept = ref.keep_rows(scores, budget, sinks=sinks, recent=recent)
            params |= {"method": method, "args": args, "length": t + 10}
            # Infinite: rows that the method itself keeps.
            yield name, params, tensors | {"scores": f32(scores), "kept": kept}


def select_inputs(
    rng: Random, method: str, h: int, g: int, t: int, d: int, w: int, args: dict[str, Any]
) -> tuple[Tensors, dict[str, Any], np.ndarray]:
    """Return a selector's inputs, its parameters and the scores ``[1, H, T]``."""
    scale = float(np.float32(d**-0.5))
    keys, values = rng.normal(1, h, t, d, std=rng.channels(d)), rng.normal(1, h, t, 8)
    tensors: Tensors = {"keys": keys, "values": values}
    params: dict[str, Any] = {"scale": scale}
    if method in ("h2o", "tova", "snapkv"):
        n = {"h2o": t, "tova": 1, "snapkv": w}[method]
        tensors["queries"] = rng.normal(1, h * g, n, d)
        if method == "h2o":
            return tensors, params, ref.h2o_scores(tensors["queries"], keys, scale=scale)
        if method == "tova":
            return tensors, params, ref.tova_scores(tensors["queries"], keys, scale=scale)
        return tensors, params, ref.snapkv_scores(tensors["queries"], keys, scale=scale, kernel=args["kernel"])
    if method == "expected_attention":
        rotary = ROTARY_64 if d == 64 else ROTARY_80
        root = rng.normal(1, h * g, d, d // 4).astype(np.float64)
        tensors["query_mean"] = rng.normal(1, h * g, d)
        tensors["query_cov"] = (root @ root.swapaxes(-1, -2) / (d // 4)).astype(np.float16)
        params["rotary"] = rotary_dict(rotary)
        scores = ref.expected_attention_scores(
            keys,
            values,
            tensors["query_mean"],
            tensors["query_cov"],
            scale=scale,
            rotary=rotary,
            length=t + 10,
            n_future=args["n_future"],
            epsilon=args["epsilon"],
        )
        return tensors, params, scores
    if method == "leverage":
        sides = {"keys": [keys], "values": [values], "both": [keys, values]}[args["of"]]
        return tensors, params, np.sum([ref.leverage_scores(x, ridge=args["ridge"]) for x in sides], axis=0)
    function = {"streaming": ref.streaming_scores, "keydiff": ref.keydiff_scores, "knorm": ref.knorm_scores}
    return tensors, params, function[method](keys)


def safe_top(scores: np.ndarray, budget: int, sinks: int, recent: int) -> bool:
    """Say whether the last row kept and the first dropped differ by the margin, in each head."""
    competing = np.sort(scores[..., sinks : scores.shape[-1] - recent], axis=-1)[..., ::-1]
    count = budget - sinks - recent
    gap = competing[..., count - 1] - competing[..., count]
    finite = np.where(np.isfinite(competing), competing, 0.0)
    return bool((gap > MARGINS["top_k"] * finite.std(axis=-1)).all())


def budget_cases() -> Iterator[Case]:
    shapes = [
        (32, 2048, 32768, 32),
        (32, 128, 32768, 8),
        (28, 512, 700, 68),
        (7, 100, 1000, 20),
        (1, 50, 60, 9),
    ]
    for layers, tokens, limit, protected in shapes:
        budgets = ref.pyramid_budgets(layers, tokens, limit, protected)
        args = {"tokens": tokens, "limit": limit, "n_layers": layers, "protected": protected}
        name = f"pyramidkv-L{layers}-C{tokens}-T{limit}-P{protected}"
        yield name, {"method": "pyramidkv", "args": args}, {"budgets": np.array(budgets, np.int32)}
    for h, t, tokens in [(2, 63, 16), (8, 64, 20), (3, 129, 128), (1, 40, 7)]:
        name = f"adakv-H{h}-T{t}-C{tokens}"
        for attempt in range(100):
            rng = Random(f"{name} {attempt}")
            weights = np.exp(rng.normal(h, t, std=np.linspace(0.3, 2.0, h)[:, None]).astype(np.float64))
            scores = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float16)
            if safe_adakv(scores, tokens):
                break
        else:
            raise RuntimeError(f"no draw of {name} has a margin at the border")
        budgets = ref.adakv_budgets(scores, tokens)
        params = {"method": "adakv", "args": {"tokens": tokens, "protected": 20}}
        yield name, params, {"scores": scores, "budgets": np.array(budgets, np.int32)}


def safe_adakv(scores: np.ndarray, tokens: int) -> bool:
    s = np.sort(ref.adakv_scores(scores, tokens).reshape(-1))[::-1]
    cut = len(scores) * tokens
    if cut == s.size:
        return True
    # Equal remainders of two heads would leave the extra row to the order of summation.
    h = len(scores)
    winners = np.argsort(-ref.adakv_scores(scores, tokens).reshape(-1), kind="stable")[:cut] // scores.shape[1]
    remainders = [(Fraction(4, 5) * int(c) + Fraction(tokens, 5)) % 1 for c in np.bincount(winners, minlength=h)]
    extra = int(sum(remainders))
    ranked = sorted(remainders, reverse=True)
    tied = 0 < extra < h and ranked[extra - 1] == ranked[extra]
    return bool(s[cut - 1] - s[cut] > MARGINS["top_k"] * s.std()) and not tied


# Merging


def keepkv_cases() -> Iterator[Case]:
    for form in ("bias", "paper"):
        for h, g, t, d, c in [(2, 1, 33, 64, 16), (1, 8, 65, 80, 20), (1, 3, 40, 128, 20)]:
            name = f"{form}-H{h}-G{g}-T{t}-D{d}-C{c}"
            for attempt in range(200):
                rng = Random(f"keepkv {name} {attempt}")
                case = keepkv_case(rng, form, h, g, t, d, c)
                if case is not None:
                    break
            else:
                raise RuntimeError(f"no draw of {name} has a margin at its borders")
            params = {
                "args": {"form": form, "similarity": 0.8, "window": 1},
                "scale": float(np.float32(d**-0.5)),
            }
            yield name, params, case


def keepkv_case(rng: Random, form: str, h: int, g: int, t: int, d: int, c: int) -> Tensors | None:
    """Return one fold with a single query, or None where a cosine or a guarded factor is near its border."""
    kept = np.stack([np.sort(rng.state.permutation(t)[:c]) for _ in range(h)])[None].astype(np.int32)
    dropped = np.stack([np.setdiff1d(np.arange(t), row) for row in kept[0]])[None].astype(np.int32)
    keys = rng.normal(1, h, t, d)
    for i in range(h):
        # Most dropped keys resemble a kept one, several the same; the others find none and leave.
        twin = keys[0, i, kept[0, i][rng.integers(c // 2, t - c)]].astype(np.float64)
        near = (twin + rng.normal(t - c, d, std=0.3)).astype(np.float16)
        alone = rng.state.uniform(size=(t - c, 1)) < 0.25
        keys[0, i, dropped[0, i]] = np.where(alone, keys[0, i, dropped[0, i]], near)
    x: Tensors = {"keys": keys, "values": rng.normal(1, h, t, d), "queries": rng.normal(1, h * g, 1, d)}
    bias = np.log(1.0 + rng.integers(3, 1, h, t)).astype(np.float16)
    scale = float(np.float32(d**-0.5))
    folded = ref.keepkv_fold(
        x["keys"], x["values"], x["queries"], kept, dropped, bias=bias, scale=scale, similarity=0.8, form=form
    )
    if min(folded.margins) < MARGINS["factor"]:
        return None
    out = {"out_keys": f32(folded.keys), "out_values": f32(folded.values), "out_bias": f32(folded.bias)}
    return x | {"bias": bias, "kept": kept, "dropped": dropped} | out


def rope_cases() -> Iterator[Case]:
    for rotary, d in ((ROTARY_64, 64), (ROTARY_80, 80)):
        rng = Random(f"rope {d}")
        x = rng.normal(2, 5, d)
        positions = np.array([0, 1, 63, 1000, 32767], np.int32)
        yield (
            f"D{d}",
            {"rotary": rotary_dict(rotary)},
            {
                "x": x,
                "positions": positions,
                "rotated": f32(ref.rope(x, positions, rotary)),
            },
        )


FILES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "column_sums": column_sums_cases,
    "packing": packing_cases,
    "hadamard": hadamard_cases,
    "affine": affine_cases,
    "kivi": kivi_cases,
    "codebook": codebook_cases,
    "select": select_cases,
    "budgets": budget_cases,
    "keepkv": keepkv_cases,
    "rope": rope_cases,
}


def f32(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x), np.float32)


def make(primitive: str) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors, named ``case/tensor``, and the metadata of one file."""
    tensors: Tensors = {}
    params: dict[str, Any] = {}
    for name, case_params, case_tensors in FILES[primitive]():
        params[name] = case_params
        tensors |= {f"{name}/{key}": np.ascontiguousarray(x) for key, x in case_tensors.items()}
    shapes = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
    described = json.dumps([FORMAT, MARGINS, params, shapes], sort_keys=True)
    metadata = {
        "format": FORMAT,
        "primitive": primitive,
        "generator": hashlib.sha256(described.encode()).hexdigest()[:16],
        "margins": MARGINS,
        "cases": params,
    }
    return tensors, metadata


def serialize(tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    # One key: the order of several is not defined, and the files would differ from run to run.
    return save(tensors, {"kvmlx": json.dumps(metadata, sort_keys=True)})


def differences(primitive: str, path: Path) -> list[str]:
    """Return what is wrong with the file at ``path``, with a hint; nothing where it is up to date."""
    if not path.exists():
        return [f"{path.name} is missing: run python scripts/make_vectors.py"]
    tensors, metadata = make(primitive)
    old, old_metadata = parse(path.read_bytes())
    if old_metadata["format"] != FORMAT:
        return [f"{path.name} has format {old_metadata['format']}, this script writes {FORMAT}: write it again"]
    if old_metadata["generator"] != metadata["generator"]:
        return [
            f"{path.name} was made with other cases or margins ({old_metadata['generator']}, now "
            f"{metadata['generator']}): write it again, and see that only the cases you meant changed"
        ]
    problems = []
    for name, x in tensors.items():
        y = old[name]
        # Libraries differ in the last bit of exp and of a product: not a change of the format.
        exact = x.dtype != np.float32
        if not (np.array_equal(x, y) if exact else np.allclose(x, y, rtol=1e-6, atol=1e-7)):
            problems.append(
                f"{path.name}: {name} differs: kvmlx/reference.py gives another result. If that is a change "
                "of the format, raise FORMAT and say so in docs/format.md; else the oracle has a bug"
            )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the shared test vectors from the float64 oracle.")
    parser.add_argument("--check", action="store_true", help="compare only, exit 1 on a difference")
    check = parser.parse_args().check
    problems: list[str] = []
    for primitive in FILES:
        path = FOLDER / f"{primitive}.safetensors"
        if check:
            problems += differences(primitive, path)
        else:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_bytes(serialize(*make(primitive)))
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
