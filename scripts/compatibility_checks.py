"""What scripts/compatibility.py runs with one architecture, on either side, and what it notes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvmlx import ops
from kvmlx.backends.numpy import BACKEND
from kvmlx.session import LayerCache
from kvmlx.types import Rotary, UnsupportedModelError

VOCAB = 128
PROMPT, SHORT, CHUNK, TOKENS = 150, 97, 64, 16
SMALL_DRIFT = 0.05
"""Mean change of a logit by int8 above which it counts as broken, as a part of the logits' deviation."""
SAME_LOGPROB = 2e-3
"""Change of a log-probability that another order of float32 sums may bring."""
INT8 = "int8(sinks=2, recent=8)"
STREAMING = "streaming(budget=0.5, sinks=2, recent=8)"
POSITIONS = np.array([0, 1, 7, 77])
"""Where one token's keys are compared with its key at 0, turned by the measured rotary embedding."""

Config = dict[str, Any]


class Side(Protocol):
    """A library of models and kvmlx's adapter to it, as the checks want them."""

    name: str
    """Of the backend."""
    framework: str
    packages: tuple[str, ...]
    """Whose versions the results hang on."""
    architectures: Mapping[str, Config]
    """What each architecture asks for beyond, or in place of, ``common``, by the library's name of it."""
    common: Config
    not_run: Mapping[str, str]
    """Architectures that no small random instance is made of, with the reason."""

    def device(self) -> str:
        """Return what the models run on, in a word."""
        ...

    def build(self, name: str, /) -> Any:
        """Return a small model of an architecture, with seeded random weights."""
        ...

    def stock_cache(self, model: Any, /) -> Any:
        """Return the library's own cache."""
        ...

    def make_prompt_cache(self, model: Any, strategy: str, *, inspect: bool = False) -> Any: ...

    def used(self, cache: Any, /) -> dict[int, LayerCache]:
        """Return the compressed layers that hold something, by their place among the model's caches."""
        ...

    def settle(self, cache: Any, /) -> None: ...

    def decode(self, model: Any, cache: Any, tokens: list[int], forced: list[int] | None = None) -> np.ndarray:
        """Return the logits of TOKENS decoded tokens ``[TOKENS, V]``: greedy, or along ``forced``.

        The prompt goes in by chunks of CHUNK, as the library's generators do it.
        """
        ...

    def generate(
        self, model: Any, prompts: list[list[int]], strategy: str | None
    ) -> list[tuple[list[int], np.ndarray]]:
        """Return TOKENS tokens and log-probabilities ``[TOKENS, V]`` of each prompt of a batch.

        Through the library's own generator; with the library's own cache where ``strategy`` is None.
        """
        ...

    def turned_keys(self, model: Any, /) -> list[list[np.ndarray]]:
        """Return keys ``[1, H, len(POSITIONS), D]`` of the used layers that differ by their rotation alone.

        One list a way to get such keys; none where the model takes no positions.
        """
        ...


def digest(side: Side) -> str:
    """Return what a side's results must have been made with: a hash of its table and of what is run."""
    made = [side.architectures, side.common, side.not_run, VOCAB, PROMPT, SHORT, CHUNK, TOKENS, INT8, STREAMING]
    return hashlib.sha256(json.dumps([*map(_plain, made)], sort_keys=True).encode()).hexdigest()[:16]


def _plain(x: Any) -> Any:
    return dict(x) if isinstance(x, Mapping) else x


def prompt(length: int, seed: int) -> list[int]:
    """Return random tokens; 0 is left to padding."""
    return np.random.RandomState(seed).randint(1, VOCAB, length).tolist()


@dataclass
class Result:
    """What is known of one architecture."""

    name: str
    verdict: str = "failed"
    """works, partly, refused or failed."""
    reason: str = ""
    compressed: list[int] = field(default_factory=list)
    """Which of the model's caches kvmlx holds."""
    left_alone: dict[str, list[int]] = field(default_factory=dict)
    """Which caches stay as the model made them, by kind."""
    identity: str = ""
    drift: float | None = None
    kept: str = ""
    batch: str = ""
    rotary: str = ""
    failures: list[str] = field(default_factory=list)

    def check(self, passed: bool, failure: str) -> None:
        if not passed:
            self.failures.append(failure)


def examine(side: Side, name: str) -> Result:
    """Run one architecture; whatever goes wrong is in the result."""
    result = Result(name)
    try:
        _examine(side, result, side.build(name))
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}")
    if result.failures:
        result.verdict, result.reason = "failed", "; ".join(result.failures)
    return result


def _examine(side: Side, result: Result, model: Any) -> None:
    tokens = prompt(PROMPT, 1)
    wanted = side.decode(model, side.stock_cache(model), tokens)
    greedy = wanted.argmax(axis=-1).tolist()
    spread = float(wanted.std())
    result.check(bool(np.isfinite(wanted).all()) and 0.1 < spread < 100, f"logits are degenerate (std {spread:.3g})")
    refused = None
    try:
        cache = side.make_prompt_cache(model, INT8)
    except UnsupportedModelError as error:
        refused = str(error)
        result.verdict, result.reason = "refused", _reason(refused)
    try:
        exact = side.make_prompt_cache(model, "full")
    except UnsupportedModelError as error:
        result.check(refused is not None, f"full is refused, int8 is not: {error}")
        return
    stock = side.decode(model, side.stock_cache(model), tokens, greedy)
    result.check(np.array_equal(stock, wanted), f"{side.framework}'s own cache gives other logits than before")
    result.identity = _identity(side.decode(model, exact, tokens), wanted)
    result.check(result.identity != "no", "full is not the identity")
    if refused is not None:
        return
    layers = side.used(exact)
    result.compressed = sorted(layers)
    for line in next(iter(layers.values())).session.unmanaged:
        place, _, kind = line.removeprefix("layer ").partition(": ")
        result.left_alone.setdefault(kind, []).append(int(place))
    result.verdict = "partly" if result.left_alone else "works"
    _check_description(result, list(layers.values()))
    result.rotary = _check_rotary(side, result, model, list(layers.values()))
    change = _check_int8(side, result, model, cache, tokens, greedy, wanted)
    _check_streaming(side, result, model, tokens, greedy)
    _check_batch(side, result, model, change)


def _reason(message: str) -> str:
    """Return why a model is refused, without what is the same in every such message."""
    return re.sub(r"^\S+ cannot be served with '.*?': (.*); 'full' works$", r"\1", message)


def _identity(got: np.ndarray, wanted: np.ndarray) -> str:
    if np.array_equal(got, wanted):
        return "bits"
    near = np.abs(got - wanted).max() < 1e-5 * max(1.0, float(np.abs(wanted).max()))
    return "1e-5" if near and (got.argmax(-1) == wanted.argmax(-1)).all() else "no"


def _check_description(result: Result, layers: Sequence[LayerCache]) -> None:
    for layer in layers:
        _, h, d, dv = layer.store.shape
        known = (layer.info.n_kv_heads, layer.info.key_dim, layer.info.value_dim)
        for name, told, found in zip(("KV heads", "key dim", "value dim"), known, (h, d, dv), strict=True):
            result.check(told in (0, found), f"layer {layer.layer}: described with {told} {name}, has {found}")


def _check_rotary(side: Side, result: Result, model: Any, layers: Sequence[LayerCache]) -> str:
    """Compare the measured rotary embeddings with the model's own keys of one token at several positions."""
    kinds = set()
    for layer, *keys in zip(layers, *side.turned_keys(model), strict=True):
        errors = [_rotary_error(k, layer.info.rotary) for k in keys]
        if layer.info.rotary is None:
            kinds.add("none" if errors and max(errors) < 1e-3 else "not measured")
            continue
        kinds.add("plain")
        off = min(errors, default=np.inf)
        result.check(off < 1e-3, f"layer {layer.layer}: the measured rotary embedding is off by {off:.2g}")
    return ", ".join(sorted(kinds))


def _rotary_error(keys: np.ndarray, rotary: Rotary | None) -> float:
    """Return how far keys ``[1, H, len(POSITIONS), D]`` are from the first one turned to their positions, relative."""
    wanted = np.broadcast_to(keys[:, :, :1], keys.shape)
    if rotary is not None:
        still = ops.unrotate(BACKEND, wanted, np.zeros((1, len(POSITIONS))), rotary)
        wanted = ops.rotate(BACKEND, still, POSITIONS[None], rotary)
    return float(np.abs(wanted - keys).max() / np.abs(keys).max())


def _check_int8(
    side: Side, result: Result, model: Any, cache: Any, tokens: list[int], greedy: list[int], wanted: np.ndarray
) -> float:
    """Return the largest change of a logit."""
    got = side.decode(model, cache, tokens, greedy)
    result.drift = float(np.abs(got - wanted).mean() / wanted.std())
    result.check(0 < result.drift < SMALL_DRIFT, f"int8 drifts by {result.drift:.3g}")
    for layer in side.used(cache).values():
        store = layer.store
        result.check(store.has_body and int(store.lengths.min()) == PROMPT + TOKENS - 1, "int8 is not used")
    return float(np.abs(got - wanted).max())


def _check_streaming(side: Side, result: Result, model: Any, tokens: list[int], greedy: list[int]) -> None:
    cache = side.make_prompt_cache(model, STREAMING, inspect=True)
    got = side.decode(model, cache, tokens, greedy)
    side.settle(cache)
    result.check(bool(np.isfinite(got).all()), "streaming gives logits that are not finite")
    layers = side.used(cache).values()
    kept = {int(n) for layer in layers for n in layer.store.lengths.ravel()}
    half = PROMPT // 2
    result.kept = ", ".join(map(str, sorted(kept)))
    result.check(kept == {half + TOKENS - 1}, f"streaming keeps {result.kept} rows, not {half + TOKENS - 1}")
    rows = [r for layer in layers for r in layer.positions()[0]]
    end = PROMPT + TOKENS - 1
    recent = list(range(end - (half + TOKENS - 3), end))
    result.check(all(r.tolist() == [0, 1, *recent] for r in rows), "streaming keeps other rows than it should")


def batch_change(side: Side, model: Any, lengths: tuple[int, int], strategy: str | None) -> float:
    """Return how far a batch of two prompts is from each alone: the largest change of a log-probability."""
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths, 1)]
    together = side.generate(model, prompts, strategy)
    alone = [side.generate(model, [p], strategy)[0] for p in prompts]
    change = 0.0
    for (tokens, got), (wanted_tokens, wanted) in zip(together, alone, strict=True):
        if tokens != wanted_tokens:
            return float("inf")
        change = max(change, float(np.abs(got - wanted).max()))
    return change


def _check_batch(side: Side, result: Result, model: Any, int8_change: float) -> None:
    """A batch must give what each sequence gives alone, wherever it does with the library's own caches.

    Another order of sums may tip the rounding of a code: int8 may differ as much as from exact rows.
    """
    for word, second in (("equal", SHORT), ("equal lengths only", PROMPT)):
        result.batch, lengths = word, (PROMPT, second)
        try:
            stock = batch_change(side, model, lengths, None)
        except Exception as error:
            result.batch = f"not in {side.framework} ({type(error).__name__})"
            return
        if stock < SAME_LOGPROB:
            break
    else:
        result.batch = f"differs in {side.framework} too"
        return
    for strategy in ("full", INT8, STREAMING):
        change = batch_change(side, model, lengths, strategy)
        most = max(SAME_LOGPROB, int8_change) if strategy == INT8 else SAME_LOGPROB
        result.check(change < most, f"a batch with {strategy} is off by {change:.3g}")
