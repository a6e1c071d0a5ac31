"""Is the default configuration of each kernel the best one: every configuration timed, and checked.

Configurations differ in what is compiled in, so most of the time would go to the compiler. Processes beside each other
make the same calls on small arrays first (`warm`), and Triton's cache has the kernels then: nothing that is compiled
depends on a length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmlx.backends.formats import format_of
from kvmlx.backends.torch.triton import attend, column_sums, compact, encode, prefill
from kvmlx.backends.torch.triton.operands import operands
from kvmlx.strategy import Strategy
from scripts.gpu.attention import DTYPE, QUERY_STD, WRONG, backend_of, rms
from scripts.gpu.run import Run, short
from scripts.gpu.stores import cloned, filled, random_rows

NEAR = 0.05
"""How much slower than the best the default may be."""
SMALL = 512
SAMPLES = 9
WARM_SHARE = 0.6
"""Of the time that is left, for compiling."""


@dataclass(frozen=True)
class Case:
    """One kernel on one format."""

    kernel: str
    """``decode``, ``prefill``, ``encode``, ``column_sums`` or ``compact``."""
    format: str
    new: int = 1
    """New tokens."""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.format}" if self.kernel != "column_sums" else self.kernel


CASES = (
    *(Case("decode", format) for format in ("int4", "int2", "int3", "small", "tiny", "kivi(bits=2)")),
    *(Case("prefill", format, 2048) for format in ("int4", "small")),
    *(Case("encode", format) for format in ("int4", "small", "kivi(bits=2)")),
    Case("column_sums", "int4", 32),
    *(Case("compact", format) for format in ("int4", "small")),
)

Call = Callable[[Any], Any]
"""What runs a case with a configuration, on arrays of its own."""


def prepared(run: Run, case: Case, rows: int, batch: int, sets: int) -> tuple[list[Any], list[Call], int]:
    """Return the configurations, the default first, a call for each input set, and the bytes that a call reads."""
    s, backend = run.sizes, backend_of(run)
    new, scale = min(case.new, rows // 2), s.dim**-0.5
    keys, values = (random_rows(batch, s.kv_heads, rows, s.dim, run.device, seed, DTYPE) for seed in (2, 3))
    queries = random_rows(batch, s.heads, new, s.dim, run.device, 1, DTYPE) * QUERY_STD
    if case.kernel == "encode":
        key_codec = Strategy.parse(case.format).codecs()[0]
        assert key_codec is not None
        flat = [keys.flatten(0, 1), *(keys.flatten(0, 1).clone() for _ in range(sets - 1))]
        made = [lambda c, x=x, codec=key_codec: encode.encode(codec, x, config=c) for x in flat]
        return list(encode.configurations(format_of(key_codec, s.dim), s.dim)), made, keys.nbytes
    if case.kernel == "column_sums":
        held = [keys, *(keys.clone() for _ in range(sets - 1))]
        made = [lambda c, k=k: column_sums.column_sums(queries, k, scale=scale, config=c) for k in held]
        return list(column_sums.configurations(new, s.heads // s.kv_heads, s.dim, False)), made, keys.nbytes
    store = filled(backend, case.format, keys[:, :, : rows - new], values[:, :, : rows - new], exact=s.exact)
    nbytes = sum(p.nbytes for p in store.planes.values())
    if case.kernel == "compact":
        per = {name: store.unit // period for name, period in store._periods().items()}
        units = int(store.length.max()) // store.unit
        kept = [np.arange(lane % 4, units, 4) for lane in range(store.length.size)]
        spans = np.full(store.length.size, -(-units // 4))
        starts = store.start.ravel() // store.unit
        codes = store.planes["keys.codes0"]
        width = per["keys.codes0"] * codes.shape[1] // 4
        stores = [store, *(cloned(store) for _ in range(sets - 1))]
        made = [lambda c, x=x: compact.compact(x.planes, starts, kept, spans, per=per, config=c) for x in stores]
        return list(compact.configurations(width)), made, nbytes // 2
    store.append(keys[:, :, rows - new :], values[:, :, rows - new :])
    given = operands(store, queries, scale=scale)
    stores = [store, *(cloned(store) for _ in range(sets - 1))]
    if case.kernel == "decode":
        made = [lambda c, x=x: attend.attend_decode(x, queries, scale=scale, config=c) for x in stores]
        return list(attend.configurations(given)), made, nbytes
    made = [lambda c, x=x: prefill.attend_prefill(x, queries, scale=scale, config=c) for x in stores]
    return list(prefill.configurations(given)), made, nbytes


def cases_of(run: Run) -> tuple[Case, ...]:
    return CASES[:1] if run.dry else CASES


def rows_of(run: Run, case: Case) -> int:
    """Return the rows of the arrays on which kernels are compiled."""
    return run.sizes.shapes[0][0] if run.dry else SMALL + case.new


def small(run: Run, case: Case) -> tuple[list[Any], list[Call], int]:
    """Return what `prepared` does, on small arrays that make the same kernels."""
    return prepared(run, case, rows_of(run, case), 1, 1)


def warm(run: Run, index: int, of: int) -> dict[str, Any]:
    """Compile every ``of``-th configuration by calling it: the first ones of all cases first.

    Returns which were (number of the case, number of the configuration), and which cannot be launched.
    """
    cases = [small(run, case) for case in cases_of(run)]
    every = sorted((i, n) for n, (options, _, _) in enumerate(cases) for i in range(len(options)))
    done, refused = [], []
    for i, n in every[index::of]:
        if run.left <= 0:
            break
        options, calls, _ = cases[n]
        try:
            calls[0](options[i])
            done.append((n, i))
        # A configuration that no processor has room for, most likely.
        except Exception as error:
            refused.append(f"{CASES[n].name}, {options[i]}: {short(error)}")
    return {"compiled": done, "refused": refused}


def _tensors(x: Any) -> list[Tensor]:
    return list(x.values()) if isinstance(x, dict) else [x]


def _same(one: Any, other: Any) -> bool:
    """Whether two results agree: bytes exactly, attention within rounding."""
    for x, y in zip(_tensors(one), _tensors(other), strict=True):
        if x.dtype in (torch.bfloat16, torch.float32):
            if not rms(x.float() - y.float()) <= WRONG * max(rms(y.float()), 1e-30):
                return False
        elif not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            return False
    return True


def sweep(run: Run, found: dict[str, Any]) -> None:
    """Time the configurations of every kernel: decoding at each shape, the others at one."""
    from scripts.gpu import correctness

    parts, found["broken"] = correctness.in_processes(run, "warm", WARM_SHARE * run.left)
    compiled = {tuple(pair) for part in parts for pair in part["compiled"]}
    found["refused"] = [text for part in parts for text in part["refused"]]
    run.say(f"{len(compiled)} configurations compiled, {len(found['refused'])} cannot be launched")
    found["rows"] = []
    for n, case in enumerate(cases_of(run)):
        ready = [i for number, i in compiled if number == n]
        for tokens, batch in run.sizes.shapes if case.kernel == "decode" else run.sizes.shapes[1:2]:
            run.need(5, f"sweep of {case.name}")
            row = _sweep(run, case, tokens, batch, ready)
            found["rows"].append(row)
            run.say(row["said"])
            run.free()
            run.save()


def _sweep(run: Run, case: Case, tokens: int, batch: int, ready: list[int]) -> dict[str, Any]:
    """Time the default and the configurations that are compiled already; each result is compared with the default's."""
    row: dict[str, Any] = {"name": f"sweep, {case.name}, {tokens} x {batch}", "wrong": None, "configurations": []}
    nbytes = small(run, case)[2] * batch * tokens / rows_of(run, case)
    options, calls, _ = prepared(run, case, tokens, batch, run.sets(nbytes))
    want = calls[0](options[0])
    for i in sorted({0, *ready}):
        entry: dict[str, Any] = {"config": asdict(options[i]), "ms": None}
        row["configurations"].append(entry)
        if run.left < 5:
            entry["refused"] = "no time was left"
            continue
        try:
            right = _same(calls[0](options[i]), want)
            entry |= run.measure([partial(call, options[i]) for call in calls], samples=SAMPLES)
        # What no processor has room for is no candidate.
        except Exception as error:
            entry["refused"] = short(error)
            continue
        if not right:
            row["wrong"] = f"{options[i]} gives another result than the default"
    timed = [entry for entry in row["configurations"] if entry["ms"] is not None]
    best = min(timed, key=lambda entry: entry["ms"])
    default = row["configurations"][0]["ms"] or float("inf")
    row |= {"default_ms": default, "best_ms": best["ms"], "best": best["config"]}
    row["near"] = default <= best["ms"] * (1 + NEAR)
    verdict = "the default is within 5%" if row["near"] else f"the default takes {default * 1e3:.1f} us"
    row["said"] = f"{row['name']}: {len(timed)} timed, best {best['ms'] * 1e3:.1f} us with {best['config']}; {verdict}"
    return row
