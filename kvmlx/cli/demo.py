"""`kvmlx demo`: a real model answers a question about a long text, from full and from compressed caches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmlx.bench.tasks.haystack import prose
from kvmlx.bench.tasks.prompts import has_chat_template
from kvmlx.cli.backends import choose
from kvmlx.cli.engines import MLXEngine, TorchEngine, load
from kvmlx.cli.output import PrefillBar, print_json, size, stdout
from kvmlx.strategy import Strategy

STRATEGIES = ("balanced", "snapkv(budget=0.25) | small")
"""Shown where the user names none: one keeps every token in fewer bits, one also drops three in four."""

PREFILL_STEP = 512
"""Small, so that the model's activations do not hide the cache in the peak."""
ANSWER_TOKENS = 16
KEY = "wonderful-lighthouse"
QUESTION = f"What is the special magic number for {KEY} mentioned in the provided text?"
PREFIX = f"The special magic number for {KEY} mentioned in the provided text is"
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt with a number hidden in the middle of it."""

    tokens: list[int]
    answer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave and took."""

    name: str
    """The strategy as the user wrote it."""
    strategy: str | None
    """The same written out, None for the full cache."""
    answer: str
    right: bool
    tokens: int
    kept_tokens: float
    nbytes: int
    ratio: float
    """Bytes held / bytes of the full cache in fp16."""
    prefill_peak_nbytes: int | None
    """The most that was held during prefill beyond the weights; None where the framework does not count it."""
    first_token_s: float
    tokens_per_s: float


def run_demo(
    model_name: str, texts: Sequence[str], *, tokens: int, dtype: str | None, backend: str | None, as_json: bool
) -> int:
    """Run the demo, print its table, and return the exit code."""
    strategies = {text: Strategy.parse(text) for text in texts or STRATEGIES}
    engine = load(model_name, choose(backend), dtype)
    needle = make_needle(engine.tokenizer, tokens)
    if not as_json:
        _introduce(model_name, needle, engine)
    outcomes = [_ask(engine, needle, "full", None)]
    outcomes += [_ask(engine, needle, name, s) for name, s in strategies.items()]
    if as_json:
        print_json(
            {
                "model": model_name,
                "backend": engine.name,
                "device": engine.device,
                "dtype": engine.dtype,
                "prompt_tokens": len(needle.tokens),
                "question": QUESTION,
                "expected": needle.answer,
                "runs": [asdict(outcome) for outcome in outcomes],
            }
        )
    else:
        _show(outcomes, needle, engine)
    full, *compressed = outcomes
    return 1 if full.right and not all(outcome.right for outcome in compressed) else 0


def make_needle(tokenizer: Any, tokens: int, *, seed: int = 7) -> Needle:
    """Build a prompt of about ``tokens`` tokens; the number is in the middle of the text."""
    number = str(random.Random(seed).randint(10_000, 99_999))
    needle = f"The special magic number for {KEY} is: {number}."
    shell = len(_encode(tokenizer, needle))
    before, after = _halves(tokenizer, max(32, tokens - shell))
    return Needle(_encode(tokenizer, f"{before}\n{needle}\n{after}"), number)


def _halves(tokenizer: Any, tokens: int) -> tuple[str, str]:
    """Return text of ``tokens`` tokens in two halves that end with whole sentences."""
    text = prose()
    ids = tokenizer.encode(text[: tokens * 8], add_special_tokens=False)
    while len(ids) < tokens:
        ids = ids + ids
    halves = ids[: tokens // 2], ids[tokens // 2 : tokens]
    before, after = (tokenizer.decode(half, skip_special_tokens=True).strip() for half in halves)
    return before, after


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of the whole prompt, up to where the model has only the number left to say."""
    user = f"{INTRODUCTION}\n\n{text}\n\n{QUESTION}"
    if not has_chat_template(tokenizer):
        return list(tokenizer.encode(f"{user}\n\n{PREFIX}"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(prompt + PREFIX, add_special_tokens=False))


def _ask(engine: MLXEngine | TorchEngine, needle: Needle, name: str, strategy: Strategy | None) -> Outcome:
    """Answer once, from an empty cache."""
    bar = PrefillBar("full cache" if strategy is None else _clipped(name, 32))
    try:
        given = engine.answer(
            needle.tokens, strategy, max_tokens=ANSWER_TOKENS, on_prefill=bar, prefill_step=PREFILL_STEP
        )
    finally:
        bar.close()
    answer = given.text.strip()
    return Outcome(
        name=name,
        strategy=str(strategy) if strategy else None,
        answer=answer,
        right=re.search(rf"(?<!\d){needle.answer}(?!\d)", answer) is not None,
        tokens=given.held.tokens,
        kept_tokens=given.held.kept_tokens,
        nbytes=given.held.nbytes,
        ratio=given.held.ratio,
        prefill_peak_nbytes=given.prefill_peak_nbytes,
        first_token_s=given.first_token_s,
        tokens_per_s=given.tokens_per_s,
    )


def _introduce(model_name: str, needle: Needle, engine: MLXEngine | TorchEngine) -> None:
    console = stdout()
    console.print(f"[bold]model[/]     {escape(model_name)}, {engine.dtype}, {engine.name} on {escape(engine.device)}")
    console.print(f"[bold]text[/]      {len(needle.tokens):,} tokens, a number hidden in the middle: {needle.answer}")
    console.print(f"[bold]question[/]  {QUESTION}", soft_wrap=True)


def _show(outcomes: Sequence[Outcome], needle: Needle, engine: MLXEngine | TorchEngine) -> None:
    console = stdout()
    full = outcomes[0]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold")
    table.add_column("answer", overflow="fold")
    for name in ("bytes\nheld", "of\nfull", "prefill\npeak", "first\ntoken", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        mark = "[green]right[/]" if outcome.right else "[red]wrong[/]"
        table.add_row(
            f"{escape(outcome.name)}\n[dim]{outcome.kept_tokens:,.0f} of {outcome.tokens:,} tokens[/]",
            f"{escape(_short(outcome.answer, needle.answer))}\n{mark}",
            size(outcome.nbytes),
            f"{outcome.nbytes / full.nbytes:.2f}",
            "-" if outcome.prefill_peak_nbytes is None else size(outcome.prefill_peak_nbytes),
            f"{outcome.first_token_s:.1f} s",
            f"{outcome.tokens_per_s:.1f}",
        )
    console.print(table)
    for line in _notes(outcomes, engine):
        console.print(line)


def _short(answer: str, expected: str) -> str:
    """Return the part of an answer that fits a table: the number, or its beginning."""
    line = answer.split("\n")[0]
    if expected in line:
        return expected
    return _clipped(line, 20)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _notes(outcomes: Sequence[Outcome], engine: MLXEngine | TorchEngine) -> list[str]:
    full, *compressed = outcomes
    notes = []
    if right := [o for o in compressed if o.right]:
        best = min(right, key=lambda o: o.nbytes)
        notes.append(
            f"Right from [bold]{size(best.nbytes)}[/] instead of {size(full.nbytes)}: "
            f"{full.nbytes / best.nbytes:.1f}x less, with [bold]{escape(best.name)}[/]."
        )
    if not full.right:
        notes.append("[yellow]The model does not find the number from the full cache either: try fewer --tokens.[/]")
    if engine.dtype == "float32":
        notes.append("[dim]Exact rows are float32 here, the fast type on a CPU: twice the bytes of fp16.[/]")
    if full.prefill_peak_nbytes is None:
        notes.append("[dim]Prefill peak: torch counts it on a GPU only.[/]")
    else:
        framework = "MLX" if engine.name == "mlx" else "torch"
        notes.append(f"[dim]Prefill peak: what {framework} held beyond the weights, activations included.[/]")
    return notes
