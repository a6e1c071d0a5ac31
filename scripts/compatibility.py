"""Run every architecture of mlx-lm and of transformers through kvmlx, and write docs/compatibility.md.

    python -m scripts.compatibility                run all, write the page
    python -m scripts.compatibility --side torch   run the architectures of one library (mlx or torch), write the page
    python -m scripts.compatibility --only llama   run some (repeat the option), write nothing
    python -m scripts.compatibility --json         print the results as JSON
    python -m scripts.compatibility --render       run nothing, write the page from docs/results/compatibility-*.json

Each model is a small random instance, weights seeded. A prompt of PROMPT tokens goes in by chunks of CHUNK,
then TOKENS tokens are decoded greedily. Compared with the library's own cache: `full` must give the same logits,
`int8` must be used and stay near, `streaming` must evict, and two sequences of unequal length in one batch
must give what each gives alone. A model is refused only by an error that names the reason, when its cache is
made; anything else is a failure, and the exit status tells.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.compatibility_checks import CHUNK, INT8, PROMPT, SHORT, STREAMING, TOKENS, Result, Side, digest, examine

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "docs" / "results"
SIDES = {"mlx": "mlx-lm", "torch": "transformers"}
"""The libraries that models come from, by the name of kvmlx's backend."""


def load(name: str) -> Side:
    """Return a side; imports its framework."""
    return importlib.import_module(f"scripts.compatibility_{name}").SIDE


# -- results -------------------------------------------------------------------------------------------------


def results_path(side: str) -> Path:
    return RESULTS / f"compatibility-{side}.json"


def record(side: Side, results: Sequence[Result]) -> dict[str, Any]:
    """Return what is kept of a side's run: results, and what they hang on."""
    return {
        "table": digest(side),
        "versions": {name: importlib.metadata.version(name) for name in side.packages},
        "platform": f"{platform.system()} {platform.machine()}, {side.device()}",
        "results": [asdict(r) for r in results],
        "not_run": dict(side.not_run),
    }


def read(side: str) -> dict[str, Any]:
    """Return the record of a side's last run, its results as Result."""
    known = json.loads(results_path(side).read_text(encoding="utf-8"))
    names = {f.name for f in fields(Result)}
    known["results"] = [Result(**{k: v for k, v in r.items() if k in names}) for r in known["results"]]
    return known


# -- the page ------------------------------------------------------------------------------------------------

VERDICTS = {"works": "green", "partly": "cyan", "refused": "yellow", "failed": "red"}
COLUMNS = (
    "architecture",
    "verdict",
    "compressed",
    "left alone",
    "full",
    "int8",
    "rows kept",
    "batch",
    "rotary",
)

LEGEND = (
    "- compressed: the layers whose cache kvmlx holds, from 0. Left alone: those whose cache stays as the "
    "library makes it, by its class.",
    f"- full: logits against the library's own cache, over a prompt of {PROMPT} tokens in chunks of {CHUNK} and "
    f"{TOKENS} decoded ones: equal to the bit, or within 1e-5.",
    f"- int8: mean change of a logit under `{INT8}`, as a part of the logits' standard deviation.",
    f"- rows kept: of {PROMPT + TOKENS - 1}, under `{STREAMING}`; the kept positions are checked too.",
    f"- batch: prompts of {PROMPT} and {SHORT} tokens together through the library's own generator give what "
    "each gives alone, with `full`, `int8` and `streaming`. Where the library's own caches do not, "
    "equal lengths are tried.",
    "- rotary: whether the rotary embedding was measured (plain), is absent (none), or could not be (not "
    "measured); only `expected_attention` needs it.",
)
INTRODUCTION = {
    "mlx": "`RotatingKVCache` is a sliding window, `ArraysCache` the state of a state-space, linear-attention or "
    "convolution layer, `ChunkedKVCache` attention in chunks. The batch goes through `BatchGenerator`, padded on the "
    "right. bitnet is run, without Metal, with dense layers in place of its ternary ones.",
    "torch": "`DynamicSlidingWindowLayer` is a sliding window or attention in chunks, `LinearAttentionLayer` the state "
    "of a state-space, linear-attention or convolution layer, `DummyLayer` a layer without a cache: it has no "
    "attention, or reads another layer's rows. The batch goes through `generate`, padded on the left. Names are "
    "`model_type`s of `AutoModelForCausalLM`. mistral, mixtral, ministral3, phi3, phimoe and starcoder2 are run "
    "without a sliding window: one would be in every layer, and nothing left to compress. No GPU was used.",
}
"""What each side's table says in words of its own."""


def row(result: Result) -> tuple[str, ...]:
    """Return a result as the cells of COLUMNS."""
    alone = ", ".join(f"{kind} {_places(at)}" for kind, at in result.left_alone.items())
    drift = "" if result.drift is None else f"{result.drift:.2%}"
    layers = _places(result.compressed)
    return (
        *(result.name, result.verdict, layers, alone, result.identity),
        *(drift, result.kept, result.batch, result.rotary),
    )


def _places(indices: list[int]) -> str:
    return ", ".join(map(str, indices))


def page(records: Mapping[str, dict[str, Any]]) -> str:
    """Return docs/compatibility.md, of the records of both sides."""
    parts = [
        "# Which models work",
        "<!-- Written by scripts/compatibility.py; do not edit. -->",
        "The architectures of mlx-lm and of transformers were run one by one through kvmlx's two adapters, float32. "
        "Each is a small model with seeded random weights, so this page tells whether kvmlx and the model's code fit, "
        "and nothing about quality.",
        "\n".join(f"- {_summary(side, records[side])}" for side in SIDES),
        "The columns of both tables:",
        "\n".join(LEGEND),
        *(part for side in SIDES for part in _section(side, records[side])),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(side: str, known: Mapping[str, Any]) -> str:
    count = {v: sum(r.verdict == v for r in known["results"]) for v in VERDICTS}
    library = SIDES[side]
    return (
        f"[{library}](#{library}): {len(known['results'])} architectures were run: {count['works']} work, "
        f"{count['partly']} work in part (layers with a cache of another kind are left as they are), "
        f"{count['refused']} are refused by name, {count['failed']} fail."
    )


def _section(side: str, known: Mapping[str, Any]) -> Iterable[str]:
    results = known["results"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    refused = [r for r in results if r.verdict in ("refused", "failed")]
    return (
        f"## {SIDES[side]}",
        f"<!-- table {known['table']} -->",
        f"Made with {versions} on {known['platform']}, by `python -m scripts.compatibility --side {side}`.",
        INTRODUCTION[side],
        _markdown(COLUMNS, [row(r) for r in results]),
        f"### Refused ({SIDES[side]})",
        "Refused when the cache is made. Where a model has plain KV caches, `full` still works: it is the library's "
        "own computation.",
        _grouped([(r.name, r.reason.replace(f"{r.name} ", "it ", 1)) for r in refused]),
        f"### Not run ({SIDES[side]})",
        _grouped(known["not_run"].items()),
    )


def _grouped(named: Iterable[tuple[str, str]]) -> str:
    """Return a table of reasons, each with the architectures that share it."""
    names: dict[str, list[str]] = {}
    for name, reason in named:
        names.setdefault(reason, []).append(name)
    return _markdown(("architectures", "reason"), [(", ".join(n), reason) for reason, n in names.items()])


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- command -------------------------------------------------------------------------------------------------


def _rich(side: Side, results: Sequence[Result]) -> Table:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in side.packages)
    table = Table(*COLUMNS, title=versions)
    for result in results:
        name, verdict, *rest = row(result)
        table.add_row(name, f"[{VERDICTS[verdict]}]{verdict}[/]", *rest)
    return table


def run(side: Side, only: Sequence[str], *, as_json: bool, console: Console) -> bool:
    """Run a side's architectures, print what was found and keep it if all were run; return whether none failed."""
    known = [name for name in side.architectures if not only or name in only]
    results = [examine(side, name) for name in track(known, f"Running {side.framework}", console=console)]
    if as_json:
        print(json.dumps([asdict(r) for r in results], indent=2))
    elif results:
        Console().print(_rich(side, results))
    failed = [r for r in results if r.verdict == "failed"]
    for result in failed:
        console.print(f"[red]{result.name}[/]: {result.reason}")
    if not only:
        text = json.dumps(record(side, results), indent=1)
        results_path(side.name).write_text(text + "\n", encoding="utf-8")
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", action="append", choices=list(SIDES), help="one library's models; default: both")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="an architecture by name")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page again")
    args = parser.parse_args()
    # transformers has advice about configurations as small as these; and models so small gain nothing from threads.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console(stderr=True)
    sides = [] if args.render else [load(name) for name in args.side or SIDES]
    unknown = set(args.only).difference(*(side.architectures for side in sides))
    if unknown:
        parser.error(f"no architecture {', '.join(sorted(unknown))} in the table of {', '.join(s.name for s in sides)}")
    passed = [run(side, args.only, as_json=args.json, console=console) for side in sides]
    if not args.only:
        PAGE.write_text(page({name: read(name) for name in SIDES}), encoding="utf-8")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
