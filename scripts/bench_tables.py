"""What README.md and docs quote of docs/results/bench-*.jsonl; `python -m tests.test_docs` writes it there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kvmlx.bench import baselines
from kvmlx.bench.kvpress import Kvpress
from kvmlx.bench.records import FULL, Costs, Results, Score, read
from kvmlx.bench.report import report_plots
from kvmlx.bench.report.about import facts
from kvmlx.bench.report.words import MARKS, megabytes, times
from kvmlx.bench.statistics import Estimate
from kvmlx.bench.summary import Drift, Name, Quality, Summary, difference, label, name_of, summarize
from kvmlx.bench.types import Mode
from kvmlx.strategy import Strategy

T = TypeVar("T")
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
    return number(row.score) + ("" if row.verdict in (None, "same") else f" {MARKS[row.verdict]}")


def compared(
    results: Results, families: Sequence[str] = (), mode: Mode = "agnostic", several: Results | None = None
) -> str:
    """Return what was run, and a row for each family (all: none named) with a column for each compression.

    Scores of ``several``, questions about one context, are one more column.
    """
    summary = summarize(results.only(families))
    rows = _complete(summary, mode)
    asked = {} if several is None else _complete(summarize(several), mode)
    drifts = {d.name: d for d in summary.drifts if mode == "agnostic"}
    targets = sorted({n.target for n in rows if n.target is not None})
    lines = []
    for family in families or dict.fromkeys(n.family for n in rows):
        alone = rows.get(Name(family, None))
        cells = [score(rows.get(Name(family, t))) for t in (None, *targets)]
        kept = "" if alone is None else f"{alone.ratio:.2f}"
        kl = [_kl(drifts, family)] if drifts else []
        lines.append([code(family), kept, *cells, *([score(at_4x(asked, family))] if asked else []), *kl])
    header = ["method", "keeps", "as it is", *(f"{t:g}x" for t in targets)]
    header += ["eight questions"] * bool(asked) + ["KL"] * bool(drifts)
    return f"{_conditions(results, list(rows.values()), mode, several)}\n\n{table(header, lines)}"


def _complete(summary: Summary, mode: Mode) -> dict[Name, Quality]:
    return {r.name: r for r in summary.pooled if r.mode == mode and r.complete and r.score is not None}


def at_4x(found: Mapping[Name, T], family: str) -> T | None:
    """Return what was found of a family, as it is or at 4x."""
    return found.get(Name(family, None), found.get(Name(family, 4.0)))


def _kl(drifts: dict[Name, Drift], family: str) -> str:
    found = at_4x(drifts, family)
    return "" if found is None or found.name.full else f"{found.kl.value:.4f}"


def _conditions(results: Results, rows: Sequence[Quality], mode: Mode, several: Results | None) -> str:
    contexts = max(r.score.samples for r in rows if r.score is not None)
    tasks = ", ".join(f"`{t.task}`" for t in rows[0].tasks if t.informative)
    lengths = " and ".join(f"{n:,}" for n in sorted({r.length for r in results.of(Score)}))
    when = "before the question is known" if mode == "agnostic" else "with the question at the end"
    more = ""
    if several is not None:
        contexts_asked = len({s.sample for s in several.of(Score)})
        more += f"Eight questions are asked of each of {contexts_asked} other contexts (`several_questions`), "
        more += "KL is the drift of continued prose; both are those of 4x, or of the method as it is. "
    return (
        f"{_model(results)}, {contexts} contexts of {lengths} tokens "
        f"({tasks}), compressed {when}. Scores with 95% intervals; ▼ marks what is worse than the full cache by its "
        f"paired interval. {more}{_machine(results)}."
    )


def _model(results: Results) -> str:
    settings = results.runs[-1]["settings"]
    return f"{MODELS[settings['model']]} in {settings['dtype']}"


def _machine(results: Results) -> str:
    machine, _, _ = facts(results)
    return ", ".join(v if k == "cpu" else f"{k} {v}" for k, v in machine if k not in ("backend", "device"))


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


def presses(results: Results, targets: Sequence[float]) -> str:
    """Return kvpress's presses beside ours on the same contexts: each of one name, and the best of both."""
    scores = [s for s in results.of(Score) if s.mode == "agnostic"]
    rows = _complete(summarize(results), "agnostic")
    families = {n.family for n in rows}
    ours = [f for f in families if baselines.parse(f) is None and not Kvpress.owns(f)]
    evicting = [f for f in ours if not Strategy.parse(f).encodes]
    lines = []
    for press, same in SAME.items():
        for target in targets:
            theirs, mine = rows.get(Name(press, target)), rows.get(Name(same, target))
            if theirs and mine:
                lines.append([code(press), code(same), f"{target:g}x", *_both(scores, theirs, mine)])
    for title, candidates in (("best, eviction alone", evicting), ("best of all", ours)):
        for target in targets:
            theirs = _best(rows, filter(Kvpress.owns, families), target)
            mine = _best(rows, candidates, target)
            if theirs and mine:
                names = [f"{title}: {code(r.name.family)}" for r in (theirs, mine)]
                lines.append([names[0], names[1], f"{target:g}x", *_both(scores, theirs, mine)])
    return table(["kvpress", "kvmlx", "", "theirs", "ours", "ours - theirs"], lines)


def _best(rows: dict[Name, Quality], families: Iterable[str], target: float) -> Quality | None:
    found = [rows[Name(f, target)] for f in sorted(families) if Name(f, target) in rows]
    return max(found, key=_value, default=None)


def _value(row: Quality) -> float:
    return row.score.value if row.score else 0.0


def _both(scores: Sequence[Score], theirs: Quality, mine: Quality) -> list[str]:
    tasks = {t.task for t in mine.tasks if t.informative}
    a, b = ([s for s in scores if name_of(s.subject) == r.name and s.task in tasks] for r in (mine, theirs))
    paired = difference(a, b)
    return [
        *(number(r.score) for r in (theirs, mine) if r.score),
        "" if paired is None else number(paired, signed=True),
    ]
