"""Results of an imagined benchmark, seeded: what the tests of the report and of its page are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmlx.bench.records import Costs, Fidelity, Record, Results, Score, Skip, Subject

TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "kv_retrieval", "variable_tracking", "early_fact", "cwe")
LENGTHS = (1024, 4096)
TARGETS = (2.0, 4.0, 8.0, 16.0)
MODES = ("agnostic", "aware")
QUESTIONS = 2
FAMILIES = {
    "random": 0.9,
    "streaming": 0.8,
    "snapkv": 0.5,
    "keydiff": 0.3,
    "expected_attention | adakv": 0.2,
    "turboquant": 0.02,
    "snapkv | turboquant(k=5, v=4, center=64)": 0.12,
    "mlx-lm: affine": 0.1,
    "kvpress: snapkv": 0.52,
}
"""How much each loses."""


def score(subject: Subject, value: float, **place: Any) -> Score:
    """Return one answer; what is not said is the first question of the first context."""
    defaults = {"mode": "agnostic", "task": "niah_single", "length": 1024, "sample": 0, "question": 0, "depth": None}
    return Score(subject=subject, score=value, response="7", answers=("7",), **(defaults | place))


def full() -> Subject:
    return Subject("full", "full", None, 1.0)


def subject(family: str, target: float | None = 4.0) -> Subject:
    return Subject(f"{family}(budget={1 / (target or 1):.3f})", family, target, 1 / (target or 1))


def run() -> dict[str, Any]:
    """Return the first line of a results file."""
    return {
        "settings": {
            "model": "SmolLM2-135M-Instruct",
            "backend": "mlx",
            "dtype": "float32",
            "chunk": 512,
            "seed": 0,
            "lengths": list(LENGTHS),
            "samples": 5,
        },
        "machine": {
            "cpu": "Imagined CPU, 2 cores",
            "device": "cpu",
            "python": "3.11.9",
            "mlx": "0.32.0",
            "mlx-lm": "0.32.1",
            "torch": None,
            "kvmlx": "0.1.0",
        },
        "started": "2026-11-22T15:00:00+00:00",
        "command": "kvmlx bench --model demo --match-bytes 2x,4x,8x,16x --out results.jsonl",
    }


def many(*, samples: int = 5, seed: int = 0, families: dict[str, float] | None = None) -> Results:
    """Return results of several families at four targets, two lengths and two modes, with failures and skips."""
    rng = np.random.default_rng(seed)
    records: list[Record] = []
    losses = FAMILIES if families is None else families
    subjects = [(full(), 0.0)] + [(subject(f, t), loss * np.log2(t) / 4) for f, loss in losses.items() for t in TARGETS]
    for who, loss in subjects:
        if who.family == "mlx-lm: affine" and who.target == 16:
            reason = "affine needs at least 2 bits: 16x cannot be reached, 7.1x is the most"
            records.append(Skip(who, "all", None, reason))
            continue
        records += _scores(who, loss, samples, rng)
        records += _fidelity(who, loss, rng)
        if who.family.startswith("kvpress"):
            records.append(Skip(who, "cost", None, "costs of another framework's process are not comparable"))
        else:
            records += _costs(who, rng)
    return Results([run()], records)


def _scores(who: Subject, loss: float, samples: int, rng: np.random.Generator) -> list[Record]:
    out: list[Record] = []
    for mode in MODES:
        for length in LENGTHS:
            for task in TASKS:
                able = 0.2 if task == "cwe" else 0.97
                keeps = 1 - loss * (0.5 if mode == "aware" else 1)
                for sample in range(samples):
                    for question in range(QUESTIONS):
                        right = float(rng.random() < able * keeps)
                        place = {"mode": mode, "length": length, "task": task, "sample": sample, "question": question}
                        out.append(score(who, right, depth=float(rng.random()), **place))
    return out


def _fidelity(who: Subject, loss: float, rng: np.random.Generator) -> list[Record]:
    out: list[Record] = []
    for length in LENGTHS:
        for text in range(2):
            slope = np.linspace(1.5, 0.5, 128)
            kl = rng.exponential(1, 128) * loss**2 * slope
            nll = rng.normal(2.5, 0.4, 128)
            drifted = nll + kl
            flips = tuple(bool(f) for f in rng.random(128) < loss / 3)
            out.append(Fidelity(who, length, text, tuple(kl), flips, tuple(drifted), tuple(nll)))
    return out


def _costs(who: Subject, rng: np.random.Generator) -> list[Record]:
    out: list[Record] = []
    for length in LENGTHS:
        for batch in (1, 4):
            full_nbytes = length * batch * 23040
            nbytes = int(full_nbytes * who.ratio)
            step = (0.02 + 5e-6 * length * batch * who.ratio) * rng.normal(1, 0.03, 24)
            ttft = length / 900 * batch * (1.05 - 0.05 * who.ratio) * rng.normal(1, 0.02, 3)
            held, peak = int(nbytes * 1.01), nbytes + 30_000_000
            out.append(
                Costs(nbytes, held, full_nbytes, peak, tuple(ttft), tuple(float(s) for s in step), who, length, batch)
            )
    return out
