"""What README.md and docs quote of docs/results/bench-*.jsonl; `python -m tests.test_docs` writes it there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvmlx.bench import baselines
from kvmlx.bench.kvpress import Kvpress
from kvmlx.bench.records import FULL, Costs, Fidelity, Results, Score, read
from kvmlx.bench.report import report_plots
from kvmlx.bench.report.words import megabytes, times
from kvmlx.bench.statistics import Estimate
from kvmlx.bench.summary import Drift, Name, Quality, difference, label, summarize
from kvmlx.bench.types import Mode
from kvmlx.strategy import Strategy

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SHOWN = (
    FULL,
    "random",
    "streaming",
    "snapkv",
    "expected_attention",
    "keydiff",
    "leverage",
    "leverage | small",
    "leverage(recent=16) | turboquant(bits=4, center=64, recent=16)",
    "balanced",
    "small",
    "smaller",
    "int4",
    "mlx-lm: affine(bits=4)",
    "kvpress: compactor",
    "kvpress: leverage",
)
"""What the README shows of many; docs/results/bench-demo.md has all."""
SAME = {
    "kvpress: snapkv": "snapkv(sinks=0, recent=64, window=64, kernel=5)",
    "kvpress: tova": "tova",
    "kvpress: keydiff": "keydiff(sinks=0, recent=0)",
    "kvpress: knorm": "knorm(sinks=0, recent=0)",
    "kvpress: h2o": "h2o(sinks=0, recent=0, normalize=true)",
    "kvpress: expected_attention": "expected_attention(sinks=4, recent=0)",
    "kvpress: streaming": "streaming(sinks=4, recent=0)",
    "kvpress: random": "random",
}
"""A press's defaults and the strategy that equals them."""


MODELS = {"demo": "SmolLM2-135M-Instruct", "build/gemma-3-270m": "Gemma 3 270M (base)"}


def results_of(name: str) -> Results:
    return read(RESULTS / f"bench-{name}.jsonl")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def code(method: str) -> str:
    return f"`{method}`".replace("|", "\\|")


def number(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    interval = "" if estimate.low is None else f" ({estimate.low:{sign}.2f} to {estimate.high:{sign}.2f})"
    return f"{estimate.value:{sign}.2f}{interval}"


def score(row: Quality | None) -> str:
    if row is None or row.score is None:
        return ""
    return number(row.score) + {"worse": " ▼", "better": " ▲"}.get(row.verdict or "", "")


def compared(results: Results, families: Sequence[str] = (), mode: Mode = "agnostic") -> str:
    """Return what was run, and a row for each family (all: none named) with a column for each compression."""
    summary = summarize(results.only(families))
    rows = {r.name: r for r in summary.pooled if r.mode == mode and r.complete and r.score is not None}
    drifts = {d.name: d for d in summary.drifts if mode == "agnostic"}
    targets = sorted({n.target for n in rows if n.target is not None})
    lines = []
    for family in families or dict.fromkeys(n.family for n in rows):
        alone = rows.get(Name(family, None))
        cells = [score(rows.get(Name(family, t))) for t in (None, *targets)]
        kept = "" if alone is None else f"{alone.ratio:.2f}"
        kl = [_kl(drifts, family)] if drifts else []
        lines.append([code(family), kept, *cells, *kl])
    header = ["method", "keeps", "as it is", *(f"{t:g}x" for t in targets), *(["KL"] if drifts else [])]
    return f"{_conditions(results, list(rows.values()), mode)}\n\n{table(header, lines)}"


def _kl(drifts: dict[Name, Drift], family: str) -> str:
    found = [drifts.get(Name(family, t)) for t in (None, 4.0)]
    return next((f"{d.kl.value:.4f}" for d in found if d is not None and not d.name.full), "")


def _conditions(results: Results, rows: Sequence[Quality], mode: Mode) -> str:
    contexts = max(r.score.samples for r in rows if r.score is not None)
    tasks = ", ".join(f"`{t.task}`" for t in rows[0].tasks if t.informative)
    lengths = " and ".join(f"{n:,}" for n in sorted({r.length for r in results.of(Score)}))
    when = "before the question is known" if mode == "agnostic" else "with the question at the end"
    kl = (
        "KL is that of the column 4x, or of the method as it is. "
        if mode == "agnostic" and results.of(Fidelity)
        else ""
    )
    return (
        f"{_model(results)}, {contexts} contexts of {lengths} tokens "
        f"({tasks}), compressed {when}. Scores with 95% intervals; ▼ marks what is worse than the full cache by its "
        f"paired interval. {kl}{_machine(results)}."
    )


def _model(results: Results) -> str:
    settings = results.runs[-1]["settings"]
    return f"{MODELS[settings['model']]} in {settings['dtype']}"


def _machine(results: Results) -> str:
    machine = results.runs[-1]["machine"]
    return ", ".join(
        [machine["cpu"], *(f"{k} {v}" for k, v in machine.items() if k not in ("cpu", "backend", "device"))]
    )


def costs(results: Results) -> str:
    """Return what was run, and bytes and times of each method beside those of the full cache."""
    rows = summarize(results).costs
    records = results.of(Costs)
    lengths = " and ".join(f"{n:,}" for n in sorted({c.length for c in rows}))
    runs, steps = (
        {len(times) for times in found} for found in ([c.ttft_s for c in records], [c.step_s for c in records])
    )
    lines = [
        [
            code(label(c.name)),
            str(c.batch),
            megabytes(c.nbytes),
            "" if c.held_of_nbytes is None else f"{c.held_of_nbytes:.3f}",
            megabytes(c.peak_bytes),
            *_times(c.ttft_s, c.ttft_of_full),
            *_times(c.tokens_per_s, c.speed_of_full),
        ]
        for c in sorted(rows, key=lambda c: (c.batch, c.length))
    ]
    header = ["method", "batch", "MB", "held / MB", "peak MB"]
    header += ["first token, s", "x full", "tokens/s", "x full"]
    return (
        f"{_model(results)}, {lengths} tokens. MB is what the cache reports after the prompt, exact rows in the "
        "model's own type; held is what the allocator has given out for it, peak the most during prefill beyond the "
        f"weights. Times are medians with quartiles of {min(runs)} prompts and {min(steps)} decoding steps. "
        f"{_machine(results)}.\n\n{table(header, lines)}"
    )


def _times(quartiles: tuple[float, float, float] | None, of_full: float | None) -> list[str]:
    if quartiles is None:
        return ["", ""]
    low, middle, high = quartiles
    return [f"{middle:.1f} ({low:.1f} to {high:.1f})", times(of_full)]


def draw(path: Path) -> None:
    """Write the README's picture, a PNG file."""
    results = results_of("demo").only(SHOWN)
    agnostic = [r for r in results.of(Score) if r.mode == "agnostic"]
    with tempfile.TemporaryDirectory() as folder:
        report_plots(Results(results.runs, agnostic), folder)
        shutil.copyfile(Path(folder) / "quality.png", path)


def presses(results: Results) -> str:
    """Return kvpress's presses beside ours on the same contexts: each of one name, and the best of both."""
    scores = [s for s in results.of(Score) if s.mode == "agnostic"]
    rows = {r.name: r for r in summarize(results).pooled if r.mode == "agnostic" and r.complete}
    families = {n.family for n in rows}
    ours = [f for f in families if baselines.parse(f) is None and not Kvpress.owns(f)]
    lines = []
    for press, same in SAME.items():
        for target in (2.0, 4.0):
            theirs, mine = rows.get(Name(press, target)), rows.get(Name(same, target))
            lines.append([code(press), code(same), f"{target:g}x", *_both(scores, theirs, mine)])
    for title, candidates in (
        ("best, eviction alone", [f for f in ours if not Strategy.parse(f).encodes]),
        ("best of all", ours),
    ):
        for target in (2.0, 4.0):
            theirs = _best(rows, filter(Kvpress.owns, families), target)
            mine = _best(rows, candidates, target)
            names = [f"{title}: {code(r.name.family)}" if r else "" for r in (theirs, mine)]
            lines.append([names[0], names[1], f"{target:g}x", *_both(scores, theirs, mine)])
    return table(["kvpress", "kvmlx", "", "theirs", "ours", "ours - theirs"], lines)


def _best(rows: dict[Name, Quality], families: Iterable[str], target: float) -> Quality | None:
    found = [rows[Name(f, target)] for f in sorted(families) if Name(f, target) in rows]
    return max((r for r in found if r.score is not None), key=lambda r: r.score.value if r.score else 0.0, default=None)


def _both(scores: Sequence[Score], theirs: Quality | None, mine: Quality | None) -> list[str]:
    if theirs is None or mine is None or theirs.score is None or mine.score is None:
        return ["", "", ""]
    tasks = {(t.task) for t in mine.tasks if t.informative}
    a, b = (
        [
            s
            for s in scores
            if (s.subject.family, s.subject.target) == (r.name.family, r.name.target) and s.task in tasks
        ]
        for r in (mine, theirs)
    )
    paired = difference(a, b)
    return [number(theirs.score), number(mine.score), "" if paired is None else number(paired, signed=True)]
