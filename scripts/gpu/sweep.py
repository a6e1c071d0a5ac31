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
"""Rows of the arrays on which kernels are compiled."""
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


def warm(run: Run, index: int, of: int) -> dict[str, Any]:
    """Compile every ``of``-th configuration of all cases, by calling it on small arrays."""
    refused, done, at = [], 0, 0
    for case in CASES:
        mine = None
        n = len(configurations(run, case))
        for i in range(n):
            at += 1
            if at % of != index or run.left <= 0:
                continue
            if mine is None:
                mine = prepared(run, case, run.sizes.shapes[0][0] if run.dry else SMALL + case.new, 1, 1)
            done += 1
            try:
                mine[1][0](mine[0][i])
            # A configuration that no processor has room for, most likely: the sweep says so too.
            except Exception as error:
                refused.append(f"{case.name}, {mine[0][i]}: {short(error)}")
    return {"compiled": done, "refused": refused}


def configurations(run: Run, case: Case) -> list[Any]:
    return prepared(run, case, run.sizes.shapes[0][0] if run.dry else SMALL + case.new, 1, 1)[0]


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

    found["warm"], broken = correctness.in_processes(run, "warm", WARM_SHARE * run.left)
    run.say(
        f"{sum(x['compiled'] for x in found['warm'])} configurations compiled; {len(broken)} workers did not end well"
    )
    found["rows"] = []
    for case in CASES[:1] if run.dry else CASES:
        for tokens, batch in run.sizes.shapes if case.kernel == "decode" else run.sizes.shapes[1:2]:
            run.need(5, f"sweep of {case.name}")
            row = _sweep(run, case, tokens, batch)
            found["rows"].append(row)
            run.say(row["said"])
            run.free()
            run.save()


def _sweep(run: Run, case: Case, tokens: int, batch: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": f"sweep, {case.name}, {tokens} x {batch}", "wrong": None, "configurations": []}
    nbytes = prepared(run, case, run.sizes.shapes[0][0] if run.dry else SMALL + case.new, 1, 1)[2]
    sets = run.sets(nbytes * batch * tokens / (run.sizes.shapes[0][0] if run.dry else SMALL + case.new))
    options, calls, _ = prepared(run, case, tokens, batch, sets)
    want = calls[0](options[0])
    for config in options[:2] if run.dry else options:
        entry: dict[str, Any] = {"config": asdict(config), "ms": None}
        row["configurations"].append(entry)
        if run.left < 5:
            entry["refused"] = "no time was left"
            continue
        try:
            right = _same(calls[0](config), want)
            entry |= run.measure([partial(call, config) for call in calls], samples=SAMPLES)
        # What no processor has room for is no candidate.
        except Exception as error:
            entry["refused"] = short(error)
            continue
        if not right:
            row["wrong"] = f"{config} gives another result than the default"
    timed = [entry for entry in row["configurations"] if entry["ms"] is not None]
    best = min(timed, key=lambda entry: entry["ms"])
    default = row["configurations"][0]["ms"]
    if default is None:
        row["wrong"] = f"the default cannot run: {row['configurations'][0].get('refused')}"
        default = float("inf")
    row |= {"default_ms": default, "best_ms": best["ms"], "best": best["config"]}
    row["near"] = default <= best["ms"] * (1 + NEAR)
    verdict = "the default is near it" if row["near"] else f"the default takes {default * 1e3:.1f} us"
    row["said"] = f"{row['name']}: {len(timed)} timed, best {best['ms'] * 1e3:.1f} us with {best['config']}; {verdict}"
    return row
