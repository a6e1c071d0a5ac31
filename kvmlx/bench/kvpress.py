"""kvpress's presses as methods: run in an environment of their own, driven line by line over pipes.

A method is written ``kvpress: snapkv(budget=0.25, window_size=32)``, wrappers follow as stages do:
``kvpress: snapkv(budget=0.25) | chunkkv(chunk_length=20)``. Parameters have kvpress's own names; ``budget`` is what
is KEPT, as everywhere in kvmlx, so its compression_ratio is 1 - budget. kvpress is not a dependency: the user makes an
environment for it and names its interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from kvmlx.bench.records import Subject
from kvmlx.bench.types import Cost, Prompt
from kvmlx.strategy import parse_calls
from kvmlx.types import Budget, KVMLXError, StrategyError, check_budget, suggest

PREFIX = "kvpress:"
SCORERS = {
    "cap": "CapPress",
    "compactor": "CompactorPress",
    "cur": "CURPress",
    "expected_attention": "ExpectedAttentionPress",
    "h2o": "ObservedAttentionPress",
    "keydiff": "KeyDiffPress",
    "knorm": "KnormPress",
    "lagkv": "LagKVPress",
    "leverage": "LeverageScorePress",
    "noncausal": "NonCausalAttnPress",
    "pyramidkv": "PyramidKVPress",
    "random": "RandomPress",
    "snapkv": "SnapKVPress",
    "streaming": "StreamingLLMPress",
    "tova": "TOVAPress",
}
"""kvpress's single-pass presses that need neither training nor files, by kvmlx's names where it has the method."""
WRAPPERS = {
    "adakv": "AdaKVPress",
    "block": "BlockPress",
    "chunk": "ChunkPress",
    "chunkkv": "ChunkKVPress",
    "critical_adakv": "CriticalAdaKVPress",
    "criticalkv": "CriticalKVPress",
    "entropy_chunkkv": "EntropyGatedChunkKVPress",
    "merging": "MergingPress",
    "rerotate": "KeyRerotationPress",
}
_REPLAYS = "it runs the model a second time over the context, which no single-pass press does"
_FETCHES = "it fetches what was trained or measured for certain models from a hub"
_DECODES = "it acts during decoding, and a context must be compressed before the questions"
LEFT_OUT = {
    "cam": _DECODES,
    "decoding": _DECODES,
    "dms": "it keeps what a trained score puts above a threshold, not a budget",
    "duo_attention": _FETCHES,
    "expected_attention_stats": _FETCHES,
    "fastkvzip": _FETCHES,
    "finch": "it needs a separator token added to the vocabulary, and here all methods get the same tokens",
    "kvcompose": _REPLAYS,
    "kvgrad": _REPLAYS,
    "kvzap": _FETCHES,
    "kvzip": _REPLAYS,
    "lukv": _FETCHES,
    "qfilter": _FETCHES,
    "restorekv": _FETCHES,
    "simlayerkv": "it keeps what a threshold says, not a budget",
    "think": "it sets channels of the keys to zero and frees nothing; its ratio is one of channels",
}
"""Why the others are not run."""
WORKER = Path(__file__).with_name("kvpress_worker.py")
TOLERANCE = 0.02
"""How much more than its share of the bytes a press may hold: pyramidkv rounds up."""
STDERR_LINES = 8
"""Last lines of a dead worker that an error quotes."""


@dataclass(frozen=True)
class Press:
    """A press as a value: a scorer, then what wraps it. Prints as text that parses back to it."""

    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    """Names and parameters, the scorer first."""
    budget: Budget | None = None
    """What is kept; None: left open."""

    @classmethod
    def parse(cls, text: str) -> Press:
        """Read ``kvpress: name(budget=..., parameter=...) | wrapper``; ``kvpress: full`` presses nothing.

        Raises:
            StrategyError: it is not one, or a press that cannot be run; the message says why and what works.
        """
        given = list(parse_calls(text.removeprefix(PREFIX).strip()))
        parts, budget = [], None
        for i, (name, args) in enumerate(given):
            _check_name(name, SCORERS | {"full": ""} if i == 0 else WRAPPERS, i == 0)
            if "budget" in args and i:
                raise StrategyError(f"the budget belongs to {given[0][0]}, which scores, not to {name}")
            budget = args.pop("budget", budget)
            parts.append((name, tuple(args.items())))
        if given[0][0] == "full":
            if len(given) > 1 or parts[0][1] or budget not in (None, 1.0):
                raise StrategyError("kvpress: full keeps every token and takes neither parameters nor wrappers")
            budget = 1.0
        if budget is not None:
            check_budget(budget)
        return cls(tuple(parts), budget)

    def at(self, budget: Budget) -> Press:
        """Return the same with this budget."""
        return replace(self, budget=budget)

    @property
    def spec(self) -> dict[str, Any]:
        """Return it as the worker takes it."""
        classes = SCORERS | WRAPPERS
        parts = [{"class": classes[name], "args": dict(args)} for name, args in self.parts if name != "full"]
        return {"parts": parts, "budget": self.budget}

    def __str__(self) -> str:
        shown = []
        for i, (name, args) in enumerate(self.parts):
            budget = {"budget": self.budget} if i == 0 and self.budget is not None and name != "full" else {}
            pairs = [f"{k}={_text(v)}" for k, v in (budget | dict(args)).items()]
            shown.append(f"{name}({', '.join(pairs)})" if pairs else name)
        return f"{PREFIX} {' | '.join(shown)}"


def _text(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_name(name: str, known: dict[str, str], first: bool) -> None:
    if name in known:
        return
    if name in LEFT_OUT:
        raise StrategyError(f"kvpress's {name} is not run: {LEFT_OUT[name]}. Known: {', '.join(known)}")
    if name in SCORERS or name in WRAPPERS:
        raise StrategyError(
            f"kvpress's {name} wraps a press that scores, as in 'kvpress: snapkv(budget=0.25) | {name}'"
            if first
            else f"kvpress's {name} scores, so it comes first; after it come {', '.join(known)}"
        )
    raise StrategyError(f"unknown press {name!r}.{suggest(name, known)} Known: {', '.join(known)}")


class Kvpress:
    """A model in a process of kvpress's own environment. A context manager; leaving it ends the process.

    Args:
        python: the interpreter of an environment in which kvpress is installed; ``~`` is the home folder.
        model: folder or Hub name of the model.
        dtype: of weights and cache: ``float32``, ``float16`` or ``bfloat16``.
        threads: of torch on a CPU; None for its own choice.
        device: where torch runs.

    Raises:
        KVMLXError: there is no such interpreter, kvpress cannot be imported, or it does not support the model.
    """

    def __init__(
        self,
        python: str,
        model: str,
        *,
        dtype: str = "float32",
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.python = os.path.expanduser(python)
        self._ratios: dict[tuple[Press, int], float] = {}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # -I: the folder of the script is not searched, whose files are named like modules of the library; a session
        # of its own: Ctrl-C reaches this process, which then ends the worker.
        try:
            self._process = subprocess.Popen(
                [self.python, "-I", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise KVMLXError(
                f"{self.python} cannot be run: {error.strerror or error}; --kvpress takes the Python interpreter of an "
                "environment with kvpress, such as /home/me/kvpress/bin/python"
            ) from error
        self.versions: dict[str, str] = self._reply("start")
        """Of python, torch, transformers and kvpress in the worker."""
        about = self._request("load", path=model, dtype=dtype, threads=threads, device=device)
        self.vocab_size: int = about["vocab_size"]
        self.end: list[int] = about["end"]
        """The model's end tokens, by its generation_config.json."""

    @staticmethod
    def owns(method: str) -> bool:
        """Return whether a method is one of kvpress's."""
        return method.startswith(PREFIX)

    # -- what the benchmark asks for ------------------------------------------------------------------------------

    def check(self, method: str) -> None:
        """Raise KVMLXError unless the press can be made as it is written."""
        press = Press.parse(method)
        self._request("check", press=(press if press.budget is not None else press.at(0.5)).spec)

    def subject(self, family: str, target: float | None, length: int) -> Subject:
        """Return the method of a family whose budget is tuned to a compression, or (target None) as it is written.

        Its ratio is measured: bytes that kvpress really holds of a context of so many (random) tokens. Presses that
        mask rows, such as adakv, hold everything: their ratio is 1, and they cannot be tuned to a compression.
        """
        press = Press.parse(family)
        if target is not None:
            if press.budget is not None:
                raise KVMLXError(
                    f"{family} has a budget of its own, so it cannot be tuned to {target:g}x: leave it out"
                )
            press = press.at(round(1 / target, 6))
        elif press.budget is None:
            raise KVMLXError(f"{family} has no budget: give it one, as in '{press.at(0.25)}'")
        ratio = self._ratio(press, length)
        if target is not None and ratio * target > 1 + TOLERANCE:
            why = "kvpress masks rows and keeps them" if ratio == 1 else "of so few it keeps more than its budget"
            raise KVMLXError(
                f"{press} holds {ratio:.3f} of the bytes of {length} tokens, so it does not compress {target:g}x: "
                f"{why}; to see its scores all the same, give it that budget"
            )
        return Subject(str(press), family, target, ratio)

    def _ratio(self, press: Press, length: int) -> float:
        if (press, length) not in self._ratios:
            context = np.random.default_rng(0).integers(0, self.vocab_size, length).tolist()
            sizes = self._request("sizes", context=context, press=press.spec)
            self._ratios[press, length] = sizes["held_bytes"] / sizes["full_bytes"]
        return self._ratios[press, length]

    def answers(self, method: str, prompts: Sequence[Prompt], most: Sequence[int]) -> Iterator[list[int]]:
        """Yield the greedy answers, in order, stopped before an end token.

        Questions of the same context that follow each other are asked of one compressed context, each as if it
        were the first.
        """
        spec = Press.parse(method).spec
        for context, asked in groupby(zip(prompts, most, strict=True), key=lambda pair: pair[0].context):
            pairs = list(asked)
            questions = [list(prompt.question) for prompt, _ in pairs]
            limits = [limit for _, limit in pairs]
            got = self._request(
                "answer", context=list(context), press=spec, questions=questions, most=limits, end=self.end
            )
            yield from got["answers"]

    def fidelity(
        self, method: str, prefix: Sequence[int], fed: Sequence[int], scored: Sequence[int]
    ) -> tuple[tuple[float, ...], tuple[bool, ...], tuple[float, ...], tuple[float, ...]]:
        """Return KL(full || compressed), flips, and both negative log-likelihoods of ``scored``, a number a token.

        The full cache is the worker's own, over the same tokens.
        """
        got = self._request(
            "fidelity", context=list(prefix), press=Press.parse(method).spec, fed=list(fed), scored=list(scored)
        )
        return tuple(got["kl"]), tuple(got["flips"]), tuple(got["nll"]), tuple(got["full_nll"])

    def cost(self, tokens: Sequence[int], method: str, *, batch: int, steps: int, repeats: int) -> Cost:
        """Return bytes and times of the press inside its own prefill; the peak is not measured."""
        spec = Press.parse(method).spec
        got = self._request("cost", tokens=list(tokens), press=spec, batch=batch, steps=steps, repeats=repeats)
        sizes = got["sizes"]
        held, full = sizes["held_bytes"], 2 * sizes["full_elements"]
        return Cost(held, held, full, None, tuple(got["ttft_s"]), tuple(got["step_s"]))

    def sizes(self, method: str, context: Sequence[int]) -> dict[str, Any]:
        """Return what a press really holds of a context: bytes, bytes of each layer, rows that are not masked."""
        return self._request("sizes", context=list(context), press=Press.parse(method).spec)

    def positions(self, method: str, context: Sequence[int]) -> list[list[list[int]]]:
        """Return the positions that a press keeps, of each layer and head, sorted; masked rows are not kept."""
        return self._request("positions", context=list(context), press=Press.parse(method).spec)

    # -- the process ----------------------------------------------------------------------------------------------

    def _request(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            self._fail(do)
        return self._reply(do)

    def _reply(self, do: str) -> Any:
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except BaseException:
            # Interrupted: a reply may come that nobody waits for.
            self.close()
            raise
        if not line.endswith("\n"):
            self._fail(do)
        try:
            document = json.loads(line)
            if "error" in document:
                raise KVMLXError(f"kvpress: {document['error']}")
            return document["ok"]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, KVMLXError):
                raise
            self.close()
            raise KVMLXError(f"{self.python} runs something else than the worker of kvpress: {line[:200]!r}") from error

    def _fail(self, do: str) -> None:
        """Say why the worker is gone."""
        if self._stderr.closed:
            raise KVMLXError(f"kvpress was closed, so it cannot do {do!r}")
        self._process.kill()
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").rstrip().splitlines()
        self.close()
        last = "\n".join(lines[-STDERR_LINES:]) or "it said nothing"
        if do == "start":
            raise KVMLXError(
                f"{self.python} cannot run kvpress; install it there (docs/bench.md), or leave the presses out. "
                f"It said:\n{last}"
            )
        raise KVMLXError(f"the worker of kvpress ended (code {code}) when asked to do {do!r}. It said last:\n{last}")

    def close(self) -> None:
        """End the process. A second call does nothing."""
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Kvpress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
