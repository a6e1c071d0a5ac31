"""`kvmlx demo`: a real model answers a question about a long text, from full and from compressed caches."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kvmlx.cli.held import held_by
from kvmlx.cli.models import load_error, resolve_model
from kvmlx.cli.output import PrefillBar, print_json, size, stderr, stdout
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError

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
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


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
    prefill_peak_nbytes: int
    """The most that MLX held during prefill beyond the weights."""
    first_token_s: float
    tokens_per_s: float


def run_demo(model_name: str, texts: Sequence[str], *, tokens: int, dtype: str | None, as_json: bool) -> int:
    """Run the demo, print its table, and return the exit code."""
    strategies = {text: Strategy.parse(text) for text in texts or STRATEGIES}
    model, tokenizer, dtype = _load(model_name, dtype)
    needle = make_needle(tokenizer, tokens)
    if not as_json:
        _introduce(model_name, needle, dtype)
    outcomes = [_ask(model, tokenizer, needle, "full", None)]
    outcomes += [_ask(model, tokenizer, needle, name, s) for name, s in strategies.items()]
    if as_json:
        print_json(
            {
                "model": model_name,
                "dtype": dtype,
                "prompt_tokens": len(needle.tokens),
                "question": QUESTION,
                "expected": needle.answer,
                "runs": [asdict(outcome) for outcome in outcomes],
            }
        )
    else:
        _show(outcomes, needle, dtype)
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
    text = long_text()
    ids = tokenizer.encode(text[: tokens * 8], add_special_tokens=False)
    while len(ids) < tokens:
        ids = ids + ids
    halves = ids[: tokens // 2], ids[tokens // 2 : tokens]
    before, after = (tokenizer.decode(half, skip_special_tokens=True).strip() for half in halves)
    return before, after


def long_text() -> str:
    """Return prose: that of the repository where it is at hand, generated filler elsewhere."""
    path = Path(__file__).parents[2] / "scripts" / "data" / "prose.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else FILLER * 2000


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of the whole prompt, up to where the model has only the number left to say."""
    user = f"{INTRODUCTION}\n\n{text}\n\n{QUESTION}"
    if not getattr(tokenizer, "has_chat_template", False):
        return list(tokenizer.encode(f"{user}\n\n{PREFIX}"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(prompt + PREFIX, add_special_tokens=False))


def _load(name: str, dtype: str | None) -> tuple[Any, Any, str]:
    import mlx.core as mx
    from mlx_lm import load

    path = resolve_model(name)
    try:
        with stderr().status("loading the model"):
            model, tokenizer = load(path)[:2]
    except Exception as error:
        if (line := load_error(name, error)) is None:
            raise
        raise line from error
    # A CPU has no fast half-precision product.
    if dtype is None and mx.default_device() == mx.cpu:
        dtype = "float32"
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model, tokenizer, dtype or str(_weight_dtype(model)).removeprefix("mlx.core.")


def _weight_dtype(model: Any) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return next(w.dtype for _, w in weights if mx.issubdtype(w.dtype, mx.floating))


def _ask(model: Any, tokenizer: Any, needle: Needle, name: str, strategy: Strategy | None) -> Outcome:
    """Answer once, from an empty cache."""
    import mlx.core as mx
    from mlx_lm import stream_generate

    caches = _caches(model, strategy)
    mx.clear_cache()
    mx.reset_peak_memory()
    weights = mx.get_active_memory()
    bar = PrefillBar("full cache" if strategy is None else _clipped(name, 32))
    text, peak, first, response = [], 0, 0.0, None
    begin = time.perf_counter()
    try:
        for response in stream_generate(
            model,
            tokenizer,
            needle.tokens,
            max_tokens=ANSWER_TOKENS,
            prompt_cache=caches,
            prefill_step_size=PREFILL_STEP,
            prompt_progress_callback=bar,
        ):
            if not text:
                bar.close()
                first, peak = time.perf_counter() - begin, mx.get_peak_memory() - weights
            text.append(response.text)
    finally:
        bar.close()
    if response is None:
        raise KVMLXError("the model said nothing")
    held = held_by(caches)
    answer = "".join(text).strip()
    return Outcome(
        name=name,
        strategy=str(strategy) if strategy else None,
        answer=answer,
        right=re.search(rf"(?<!\d){needle.answer}(?!\d)", answer) is not None,
        tokens=held.tokens,
        kept_tokens=held.kept_tokens,
        nbytes=held.nbytes,
        ratio=held.ratio,
        prefill_peak_nbytes=peak,
        first_token_s=first,
        tokens_per_s=response.generation_tps,
    )


def _caches(model: Any, strategy: Strategy | None) -> list[Any]:
    if strategy is not None:
        import kvmlx

        return kvmlx.make_prompt_cache(model, strategy)
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def _introduce(model_name: str, needle: Needle, dtype: str) -> None:
    console = stdout()
    console.print(f"[bold]model[/]     {escape(model_name)}, {dtype}")
    console.print(f"[bold]text[/]      {len(needle.tokens):,} tokens, a number hidden in the middle: {needle.answer}")
    console.print(f"[bold]question[/]  {QUESTION}", soft_wrap=True)


def _show(outcomes: Sequence[Outcome], needle: Needle, dtype: str) -> None:
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
            size(outcome.prefill_peak_nbytes),
            f"{outcome.first_token_s:.1f} s",
            f"{outcome.tokens_per_s:.1f}",
        )
    console.print(table)
    for line in _notes(outcomes, dtype):
        console.print(line)


def _short(answer: str, expected: str) -> str:
    """Return the part of an answer that fits a table: the number, or its beginning."""
    line = answer.split("\n")[0]
    if expected in line:
        return expected
    return _clipped(line, 20)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _notes(outcomes: Sequence[Outcome], dtype: str) -> list[str]:
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
    if dtype == "float32":
        notes.append("[dim]Exact rows are float32 here, the fast type on a CPU: twice the bytes of fp16.[/]")
    notes.append("[dim]Prefill peak: what MLX held beyond the weights, activations included.[/]")
    return notes
