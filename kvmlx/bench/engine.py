"""What the engines of both frameworks share: prefill, record, compress, ask, and count. Knows no framework."""

from __future__ import annotations

import copy
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from kvmlx.bench import baselines
from kvmlx.bench.baselines import Baseline
from kvmlx.bench.recorder import Recorder, recording
from kvmlx.bench.types import Cost
from kvmlx.session import LayerCache
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError, StrategyError

CHUNK = 512
"""Tokens of a context that are processed at a time."""
TOGETHER_BYTES = 2 << 30
"""Most bytes of caches of questions that are answered together."""
WARM_TOKENS, WARM_STEPS = 64, 2
"""Length of the run that compiles what a CPU compiles, before anything is timed."""

Method = Strategy | Baseline | None
"""A strategy, a framework's own cache, or None for its uncompressed one."""


def parse_method(text: str) -> Method:
    """Read a method: ``full`` is the framework's own cache.

    Raises:
        StrategyError: it is neither a strategy nor a baseline.
    """
    baseline = baselines.parse(text)
    if baseline is not None:
        return baseline
    strategy = Strategy.parse(text)
    return None if str(strategy) == "full" else strategy


@dataclass
class Filled:
    """An engine's state: the caches of some tokens."""

    caches: Any
    method: str
    batch: int
    tokens: int
    """Tokens seen by each sequence."""
    noted: frozenset[str] = field(default=frozenset())
    """Of a record: the methods that it was made for."""


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Yield the parts in which a context is fed: never one token last, which caches take for a decoded one."""
    at = 0
    while at < tokens:
        stop = min(tokens, at + size)
        if tokens - stop == 1:
            stop = tokens
        yield slice(at, stop)
        at = stop


class BenchEngine(ABC):
    """A loaded model, driven as `kvmlx.bench.types.Engine` says; a framework brings the methods marked abstract.

    Args:
        model: a loaded model.
        tokenizer: its tokenizer.
        device: its name, for reports.
        dtype: of the model.
        chunk: tokens of a context processed at a time.
        inspect: keep every row's position, for tests.
    """

    name: ClassVar[str]
    framework: ClassVar[str]
    """Whose baselines it runs."""

    def __init__(
        self, model: Any, tokenizer: Any, device: str, dtype: str, chunk: int = CHUNK, *, inspect: bool = False
    ) -> None:
        if chunk < 2:
            raise KVMLXError(f"chunk must be >= 2 tokens, got {chunk}")
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.chunk = chunk
        self.inspect = inspect
        self._made: dict[Strategy, Any] = {}

    # -- what a framework brings ----------------------------------------------------------------------------------

    @abstractmethod
    def _stock(self) -> Any:
        """Return the framework's own empty caches."""

    @abstractmethod
    def _own(self, baseline: Baseline) -> Any:
        """Return the empty caches of a baseline, or raise an error that says what it needs."""

    @abstractmethod
    def _compressed(self, strategy: Strategy) -> Any:
        """Return kvmlx's empty caches."""

    @abstractmethod
    def _layers(self, caches: Any) -> list[LayerCache]:
        """Return the layers that kvmlx manages."""

    @abstractmethod
    def _exchange(self, caches: Any, layers: Sequence[LayerCache]) -> None:
        """Put these in the places of the managed layers."""

    @abstractmethod
    def _plain(self, recorded: Any) -> Any:
        """Return the framework's own caches with the rows of recorded ones."""

    @abstractmethod
    def _feed(self, caches: Any, tokens: Any) -> Any:
        """Run the model over tokens ``[B, n]``, an array of the host or what `_greedy` gave; return the last
        logits ``[B, vocabulary]``, which a lazy framework need not have computed.
        """

    @abstractmethod
    def _finish(self, caches: Any, method: Method, *, complete: bool) -> None:
        """Compute what the caches hold after a chunk; ``complete`` says that it was the last one."""

    @abstractmethod
    def _greedy(self, logits: Any) -> Any:
        """Return the likeliest tokens ``[B, 1]``, begun to be computed."""

    @abstractmethod
    def _logprobs(self, logits: Any) -> Any:
        """Return the log-probabilities of the first sequence, float32, begun to be computed."""

    @abstractmethod
    def _host(self, x: Any) -> np.ndarray:
        """Wait for an array and return it."""

    @abstractmethod
    def _wait(self) -> None:
        """Wait until the device has nothing left to do."""

    def _joins(self, caches: Any) -> bool:
        """Whether copies of these caches can be joined into those of a batch."""
        return False

    def _joined(self, caches: Sequence[Any]) -> Any:
        """Return the caches of a batch with a sequence of each of these."""
        raise NotImplementedError

    def _picked(self, caches: Any, rows: Sequence[int]) -> Any:
        """Return joined caches with these sequences only."""
        raise NotImplementedError

    @abstractmethod
    def _nbytes(self, caches: Any) -> int:
        """Return the bytes that all the caches say they hold."""

    @abstractmethod
    def _unmanaged_nbytes(self, caches: Any) -> int:
        """Return those of the caches that no method changes, in 16 bits."""

    @abstractmethod
    def _stop_tokens(self) -> frozenset[int]:
        """Return the tokens that end an answer."""

    @abstractmethod
    def _active(self) -> int | None:
        """Return the bytes that the allocator has given out; None where it does not count."""

    @abstractmethod
    def _peak(self, *, reset: bool = False) -> int | None:
        """Return the most that it had given out since the last reset."""

    @abstractmethod
    def _release(self) -> None:
        """Give unused memory back."""

    # -- methods --------------------------------------------------------------------------------------------------

    def check(self, method: str) -> None:
        """Raise StrategyError or UnsupportedModelError unless the method can be run on this model."""
        self._empty(parse_method(method))

    def acts_at_end(self, method: str) -> bool:
        """Whether `compress` can make the method of a recorded context: it leaves a prompt alone until it is over."""
        parsed = parse_method(method)
        if isinstance(parsed, Baseline):
            return False
        return parsed is None or not (parsed.bounded or parsed.identity)

    def _empty(self, method: Method) -> Any:
        if method is None:
            return self._stock()
        if isinstance(method, Strategy):
            return self._fresh(method)
        if method.framework != self.framework:
            raise StrategyError(f"'{method}' is a cache of {method.framework}, this engine runs {self.framework}")
        return self._own(method)

    def _fresh(self, strategy: Strategy) -> Any:
        """Return kvmlx's empty caches; what the model is asked for to make them is asked once."""
        if strategy not in self._made:
            self._made[strategy] = self._compressed(strategy)
        return self._copied(self._made[strategy])

    # -- contexts -------------------------------------------------------------------------------------------------

    def record(self, tokens: Sequence[int], methods: Sequence[str]) -> Filled:
        """Prefill once, uncompressed, and note what these methods (all `acts_at_end`) need to act on it."""
        wrong = [m for m in methods if not self.acts_at_end(m)]
        if wrong:
            raise KVMLXError(f"{wrong[0]!r} acts before a context is complete: it cannot be made of a recorded one")
        strategies = [s for m in methods if isinstance(s := parse_method(m), Strategy)]
        caches = self._fresh(recording(strategies, 0))
        sinks = sorted({s.sinks for s in strategies if "query_moments" in s.needs})
        self._exchange(caches, [Recorder(layer, sinks) for layer in self._layers(caches)])
        for part in chunks(len(tokens), self.chunk):
            self._feed(caches, np.array([tokens[part]], np.int32))
            self._finish(caches, None, complete=False)
        return Filled(caches, "record", 1, len(tokens), frozenset(methods))

    def compress(self, recorded: Filled, method: str) -> Filled:
        """Return the method's caches of a recorded context, compressed; the record stays as it was."""
        parsed = parse_method(method)
        if method not in recorded.noted and parsed is not None:
            raise KVMLXError(f"{method!r} is not among the methods that the context was recorded for")
        if parsed is None:
            return Filled(self._plain(recorded.caches), method, 1, recorded.tokens)
        assert isinstance(parsed, Strategy)
        fresh = self._layers(self._fresh(parsed))
        memo: dict[int, Any] = {}
        for recorder, layer in zip(self._layers(recorded.caches), fresh, strict=True):
            assert isinstance(recorder, Recorder)
            recorder.refill(layer)
            # Layer by layer: the rows of all layers are never held twice.
            layer.settle(prompt_end=True)
            memo[id(recorder)] = layer
        # The wrappers, and the caches of layers that kvmlx leaves alone, are copied with the new layers in place.
        caches = copy.deepcopy(recorded.caches, memo)
        self._finish(caches, parsed, complete=True)
        return Filled(caches, method, 1, recorded.tokens)

    def prefill(self, tokens: Sequence[int], method: str) -> Filled:
        """Prefill from nothing through the method's own caches, in chunks, and complete it as `compress` does."""
        return self._fill(np.array([tokens], np.int32), method)

    def _fill(self, tokens: np.ndarray, method: str) -> Filled:
        parsed = parse_method(method)
        caches = self._empty(parsed)
        batch, length = tokens.shape
        for part in chunks(length, self.chunk):
            self._feed(caches, tokens[:, part])
            self._finish(caches, parsed, complete=part.stop == length)
        return Filled(caches, method, batch, length)

    def copy(self, state: Filled) -> Filled:
        """Return an independent copy."""
        return Filled(self._copied(state.caches), state.method, state.batch, state.tokens, state.noted)

    def _copied(self, caches: Any) -> Any:
        return copy.deepcopy(caches, {id(x): x for x in self._shared(caches)})

    def _shared(self, caches: Any) -> list[Any]:
        """Return what copies may share, since it is never written to."""
        return [layer.session for layer in self._layers(caches)]

    # -- what follows a context -----------------------------------------------------------------------------------

    def answer(self, state: Filled, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Feed a question's tokens, none of which makes the method select again, and go on greedily.

        The state is used up. Stops before an end token, which is not returned.
        """
        return self._decode([state.caches], [tokens], [max_tokens])[0]

    def answers(
        self, state: Filled, questions: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> Iterator[list[int]]:
        """Answer several questions as `answer` does, each on a copy of one state, which is used up.

        Where the framework joins caches, as many as fit into `TOGETHER_BYTES` decode as one batch.
        """
        each = 1 if not self._joins(state.caches) else max(1, TOGETHER_BYTES // max(1, self._nbytes(state.caches)))
        for start in range(0, len(questions), each):
            asked = questions[start : start + each]
            last = start + len(asked) == len(questions)
            copies = [self._copied(state.caches) for _ in range(len(asked) - last)]
            copies += [state.caches] * last
            yield from self._decode(copies, asked, max_tokens[start : start + each])

    def _decode(self, caches: list[Any], questions: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """Feed each question to its own caches, then decode all of them together."""
        first = [self._host(self._greedy(self._ask(c, q))) for c, q in zip(caches, questions, strict=True)]
        together = caches[0] if len(caches) == 1 else self._joined(caches)
        caches.clear()
        said: list[list[int]] = [[] for _ in questions]
        ends, going = self._stop_tokens(), list(range(len(questions)))
        shown = token = np.concatenate(first)
        while True:
            for i, number in zip(going, shown[:, 0].tolist(), strict=True):
                if number not in ends:
                    said[i].append(number)
            stay = [row for row, i in enumerate(going) if shown[row, 0] not in ends and len(said[i]) < most[i]]
            if not stay:
                return said
            if len(stay) < len(going):
                together, going = self._picked(together, stay), [going[row] for row in stay]
                token = shown[stay]
            token = self._greedy(self._feed(together, token))
            shown = self._host(token)

    def _ask(self, caches: Any, tokens: Sequence[int]) -> Any:
        if not tokens:
            raise KVMLXError("a question has at least one token")
        logits = self._feed(caches, np.array([tokens], np.int32))
        if len(tokens) > 1:
            for layer in self._layers(caches):
                layer.count_as_decoded(len(tokens))
        return logits

    def forced(self, state: Filled, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Feed tokens one at a time; give after each the log-probabilities of the next, float32 ``[vocabulary]``.

        The state is used up.
        """
        ahead = None
        for token in tokens:
            row = self._logprobs(self._feed(state.caches, np.array([[token]], np.int32)))
            if ahead is not None:
                yield self._host(ahead)
            ahead = row
        if ahead is not None:
            yield self._host(ahead)

    # -- bytes and times ------------------------------------------------------------------------------------------

    def sizes(self, state: Filled) -> tuple[int, int]:
        """Return the bytes that the caches hold, and those of a full 16-bit cache of the same tokens.

        Caches that no method changes (sliding windows, recurrent states) count in both.
        """
        full = state.batch * state.tokens * sum(2 * h * (d + dv) for h, d, dv in self._shapes)
        full += self._unmanaged_nbytes(state.caches)
        return self._nbytes(state.caches), full

    @cached_property
    def _shapes(self) -> list[tuple[int, int, int]]:
        """KV heads and head dims (keys, values) of the layers that kvmlx manages, known once they have seen rows."""
        caches = self._fresh(recording([], 0))
        self._feed(caches, np.zeros((1, 2), np.int32))
        return [layer.store.shape[1:] for layer in self._layers(caches) if not layer.empty]

    def cost(self, tokens: Sequence[int], method: str, *, batch: int, steps: int, repeats: int) -> Cost:
        """Prefill ``batch`` equal sequences from nothing and decode ``steps`` tokens of each, ``repeats`` times.

        The time to the first token covers the prefill of all tokens but the last through the method's own caches,
        the method's own work, and the step of the last token. Bytes are measured then; the peak up to then. One run
        before those that count is not counted: a whole one on a GPU, where kernels are compiled and tuned for
        shapes, a short one on a CPU.
        """
        ids = np.repeat(np.array([tokens], np.int32), batch, axis=0)
        if ids.shape[1] < 3:
            raise KVMLXError(f"a cost needs a context of at least 3 tokens, got {ids.shape[1]}")
        warm = (ids[:, :WARM_TOKENS], WARM_STEPS) if self.device == "cpu" else (ids, steps)
        self._run(warm[0], method, warm[1])
        runs = [self._run(ids, method, steps) for _ in range(repeats)]
        first = runs[0]
        return Cost(
            nbytes=first.nbytes,
            held_bytes=first.held_bytes,
            full_nbytes=first.full_nbytes,
            peak_bytes=None if first.peak_bytes is None else max(r.peak_bytes or 0 for r in runs),
            ttft_s=tuple(t for r in runs for t in r.ttft_s),
            step_s=tuple(t for r in runs for t in r.step_s),
        )

    def _run(self, ids: np.ndarray, method: str, steps: int) -> Cost:
        before = self.allocated_bytes()
        self._peak(reset=True)
        begin = time.perf_counter()
        state = self._fill(ids[:, :-1], method)
        token = self._greedy(self._feed(state.caches, ids[:, -1:]))
        shown = self._host(token)
        ttft = time.perf_counter() - begin
        peak = self._peak()
        state.tokens += 1
        self._wait()
        del token
        self._finish(state.caches, None, complete=False)
        after = self.allocated_bytes()
        nbytes, full = self.sizes(state)
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            shown = self._host(self._greedy(self._feed(state.caches, shown)))
            times.append(time.perf_counter() - begin)
        return Cost(
            nbytes=nbytes,
            held_bytes=None if before is None or after is None else after - before,
            full_nbytes=full,
            peak_bytes=None if before is None or peak is None else peak - before,
            ttft_s=(ttft,),
            step_s=tuple(times),
        )

    def allocated_bytes(self) -> int | None:
        """Return what the framework's allocator holds now, after letting go of what it can; None: it cannot tell."""
        gc.collect()
        self._release()
        return self._active()
