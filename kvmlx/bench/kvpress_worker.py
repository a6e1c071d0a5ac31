"""kvpress behind JSON lines: a script that `kvmlx.bench.kvpress` runs in an environment in which kvpress is installed.

It imports nothing of kvmlx. Its first line says which versions it has; then each line on stdin is a request
``{"do": name, ...}``, answered by one line ``{"ok": ...}`` or ``{"error": message}``. Whatever else is printed
goes to stderr.

A context is prefilled once, as kvpress's pipeline does, and every press is handed what its forward hook would have
been: the hooks of one layer do not change what the next layer sees. Presses that read attention weights are run in
a prefill of their own.
"""

import contextlib
import inspect
import json
import os
import platform
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Before anything is imported that might print: stdout is for replies alone.
_REPLIES = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import kvpress  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

HELD_BYTES = 2 << 30
"""Prefilled contexts are kept up to this size; the one used last always."""
READS_ATTENTION = "ObservedAttentionPress"
LANGUAGE_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""kvpress's SUPPORTED_MODELS, without Gemma 3 of text and images."""


@dataclass
class Recorded:
    """A prefilled context and what the presses' hooks are given."""

    tokens: list[int]
    keys: list[Tensor]
    """Of each layer ``[1, H, T, D]``."""
    values: list[Tensor]
    calls: list[dict[str, Any]]
    """The arguments of each attention layer: hidden states ``[1, T, hidden]``, rotary cosines and sines."""
    full: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Log-probabilities of the full cache after each of some tokens fed."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values, *(c["hidden_states"] for c in self.calls)))


@dataclass
class State:
    """A compressed context."""

    keys: list[Tensor]
    values: list[Tensor]
    masked: list[Any]
    """Of each layer None, or the rows that stay held and are masked: (sequences, heads, rows)."""
    position: int
    """Of the next token."""
    full_rows: int
    """Rows of every head before compression."""
    seconds: float = 0.0
    """What the compression took, or prefill and compression where they are one."""

    def sizes(self) -> dict[str, Any]:
        """Return bytes that are really held, in all and of each layer, and rows that attention still sees."""
        pairs = list(zip(self.keys, self.values, strict=True))
        held = [k.untyped_storage().nbytes() + v.untyped_storage().nbytes() for k, v in pairs]
        full = [self.full_rows * (k[:, :, 0].nbytes + v[:, :, 0].nbytes) for k, v in pairs]
        seen = [
            k.shape[2] - (0 if m is None else len(m[0]) / (k.shape[0] * k.shape[1]))
            for k, m in zip(self.keys, self.masked, strict=True)
        ]
        return {
            "held_bytes": sum(held),
            "full_bytes": sum(full),
            "elements": sum(k.numel() + v.numel() for k, v in pairs),
            "full_elements": sum(self.full_rows * (k[:, :, 0].numel() + v[:, :, 0].numel()) for k, v in pairs),
            "layer_held_bytes": held,
            "layer_seen_rows": seen,
            "rows": self.full_rows,
            "seconds": self.seconds,
        }


def build(spec: dict[str, Any], n_tokens: int) -> Any:
    """Return the press of ``{"parts": [{"class", "args"}, ...], "budget"}``, innermost part first; None: full."""
    press, budget = None, spec["budget"]
    kept = min(1.0, budget if isinstance(budget, float) else budget / n_tokens)
    # kvpress keeps int(T * (1 - ratio)) rows; 1 - (1 - 0.1) is less than 0.1 and would cost a row.
    removed = max(0.0, 1.0 - kept - 1e-9)
    for part in spec["parts"]:
        name, args = part["class"], part["args"]
        cls = getattr(kvpress, name, None)
        if cls is None:
            raise ValueError(f"kvpress {_version()} has no {name}")
        known = [p for p in inspect.signature(cls).parameters if p not in ("press", "compression_ratio")]
        for key in args:
            if key not in known or key.startswith("_"):
                shown = ", ".join(p for p in known if not p.startswith("_"))
                raise ValueError(f"{name} has no parameter {key!r}; it takes: {shown or 'none'}")
        press = cls(compression_ratio=removed, **args) if press is None else cls(press=press, **args)
    return press


def _version() -> str:
    from importlib.metadata import version

    return version("kvpress")


def innermost(press: Any) -> Any:
    """Return the press that scores."""
    while getattr(press, "press", None) is not None:
        press = press.press
    return press


class Worker:
    """One loaded model."""

    def __init__(self, path: str, dtype: str, threads: int | None, device: str) -> None:
        if threads:
            torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = loaded.to(device).eval()
        kind = type(self.model).__name__
        if kind not in LANGUAGE_MODELS:
            raise ValueError(f"kvpress supports {', '.join(LANGUAGE_MODELS)}; {path} is a {kind}")
        self.layers = [layer.self_attn for layer in self.model.model.layers]
        self.attention = self.model.config._attn_implementation
        self.recorded: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Return what the driver wants to know of the model."""
        end = self.model.generation_config.eos_token_id
        return {
            "vocab_size": self.model.config.vocab_size,
            "end": end if isinstance(end, list) else [] if end is None else [end],
            "attention": self.attention,
        }

    # -- contexts -------------------------------------------------------------------------------------------------

    def record(self, tokens: list[int]) -> Recorded:
        """Return the prefilled context of these tokens."""
        at = tuple(tokens)
        if at not in self.recorded:
            self.recorded[at] = self._record(tokens)
        self.recorded.move_to_end(at)
        while len(self.recorded) > 1 and sum(r.nbytes for r in self.recorded.values()) > HELD_BYTES:
            self.recorded.popitem(last=False)
        return self.recorded[at]

    def _record(self, tokens: list[int]) -> Recorded:
        calls: list[dict[str, Any]] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            calls.append({k: v for k, v in kwargs.items() if k != "past_key_values"})

        cache: Any = DynamicCache()
        hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            self.model.model(input_ids=self._ids(tokens), past_key_values=cache)
        finally:
            for hook in hooks:
                hook.remove()
        return Recorded(tokens, [x.keys for x in cache.layers], [x.values for x in cache.layers], calls)

    def compress(self, tokens: list[int], spec: dict[str, Any], *, watch: Any = None) -> State:
        """Return the context as a press leaves it.

        Args:
            watch: told (layer, keys before, keys after) of every layer.
        """
        press = build(spec, len(tokens))
        if press is None:
            recorded = self.record(tokens)
            nothing = [None] * len(self.layers)
            return State(recorded.keys, recorded.values, nothing, len(tokens), len(tokens))
        torch.manual_seed(0)
        if type(innermost(press)).__name__ == READS_ATTENTION:
            return self.prefill(self._ids(tokens), press, watch=watch)
        recorded = self.record(tokens)
        cache = filled(recorded.keys, recorded.values)
        start = time.perf_counter()
        with self._pressed(press, watch):
            for layer, call in zip(self.layers, recorded.calls, strict=True):
                layer.masked_key_indices = None
                press.forward_hook(layer, [], {**call, "past_key_values": cache}, [None, None])
        return self._state(cache, press, len(tokens), time.perf_counter() - start)

    def prefill(self, ids: Tensor, press: Any, *, watch: Any = None) -> State:
        """Return the caches of ``ids [B, T]``, prefilled as kvpress's pipeline does; None presses nothing."""
        cache = DynamicCache()
        start = time.perf_counter()
        for layer in self.layers:
            layer.masked_key_indices = None
        eager = press is not None and type(innermost(press)).__name__ == READS_ATTENTION
        if eager:
            self.model.set_attn_implementation("eager")
        try:
            with self._pressed(press, watch) if press is not None else contextlib.nullcontext():
                self.model.model(input_ids=ids, past_key_values=cache)
        finally:
            if eager:
                self.model.set_attn_implementation(self.attention)
        return self._state(cache, press, ids.shape[1], time.perf_counter() - start)

    @contextlib.contextmanager
    def _pressed(self, press: Any, watch: Any) -> Iterator[None]:
        """Enter a press; tell ``watch`` what it does."""
        compress = press.compress

        def watched(module: Any, hidden: Tensor, keys: Tensor, *rest: Any) -> Any:
            out = compress(module, hidden, keys, *rest)
            watch(module.layer_idx, keys, out[0])
            return out

        if watch is not None:
            press.compress = watched
        with press(self.model):
            yield

    def _state(self, cache: Any, press: Any, rows: int, seconds: float) -> State:
        masked = [getattr(layer, "masked_key_indices", None) for layer in self.layers]
        keys, values = [x.keys for x in cache.layers], [x.values for x in cache.layers]
        # As in kvpress's pipeline: only keys that were turned to new positions are counted anew.
        turned = type(press).__name__ == "KeyRerotationPress"
        return State(keys, values, masked, keys[0].shape[2] if turned else rows, rows, seconds)

    # -- the model ------------------------------------------------------------------------------------------------

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.device)

    def _opened(self, state: State) -> Any:
        """Return a cache over a state's rows; what is appended leaves the state as it is."""
        for layer, masked in zip(self.layers, state.masked, strict=True):
            layer.masked_key_indices = masked
        return filled(state.keys, state.values)

    def _feed(self, cache: Any, ids: Tensor, position: int) -> Tensor:
        """Append ``ids [B, L]``; return the last one's logits ``[B, vocabulary]``."""
        logits = torch.empty(0)
        # transformers makes one causal mask, as long as the first layer's cache: where layers differ in length
        # it fits no other layer, so tokens go one at a time, which needs none.
        uneven = len({layer.keys.shape[2] for layer in cache.layers}) > 1
        for part in ids.split(1, dim=1) if uneven else [ids]:
            places = torch.arange(position, position + part.shape[1], device=ids.device)[None]
            out = self.model(input_ids=part, past_key_values=cache, position_ids=places, logits_to_keep=1)
            position, logits = position + part.shape[1], out.logits[:, -1]
        return logits

    def answer(self, state: State, question: list[int], most: int, end: list[int]) -> list[int]:
        """Return the greedy answer to a question; stops before an end token."""
        cache, position = self._opened(state), state.position
        fed, out = question, []
        while len(out) < most:
            token = int(self._feed(cache, self._ids(fed), position)[0].argmax())
            if token in end:
                break
            out.append(token)
            position, fed = position + len(fed), [token]
        return out

    def forced(self, state: State, tokens: list[int]) -> Tensor:
        """Return the log-probabilities after each token fed ``[n, vocabulary]``, float64."""
        cache, rows = self._opened(state), []
        for i, token in enumerate(tokens):
            rows.append(self._feed(cache, self._ids([token]), state.position + i)[0])
        return torch.log_softmax(torch.stack(rows).double(), dim=-1)

    # -- requests -------------------------------------------------------------------------------------------------

    def do_check(self, press: dict[str, Any]) -> None:
        """Build a press, or fail."""
        build(press, 1 << 20)

    def do_sizes(self, context: list[int], press: dict[str, Any]) -> dict[str, Any]:
        """Say what a compressed context holds."""
        return self.compress(context, press).sizes()

    def do_answer(
        self, context: list[int], press: dict[str, Any], questions: list[list[int]], most: list[int], end: list[int]
    ) -> dict[str, Any]:
        """Answer questions, each on the context as the press left it."""
        state = self.compress(context, press)
        answers = [self.answer(state, q, n, end) for q, n in zip(questions, most, strict=True)]
        return {"answers": answers, "sizes": state.sizes()}

    def do_fidelity(
        self, context: list[int], press: dict[str, Any], fed: list[int], scored: list[int]
    ) -> dict[str, list[Any]]:
        """Feed tokens one at a time; compare each next token's distribution with the full cache's."""
        recorded, at = self.record(context), tuple(fed)
        if at not in recorded.full:
            recorded.full = {at: self.forced(self.compress(context, {"parts": [], "budget": 1.0}), fed)}
        p, q = recorded.full[at], self.forced(self.compress(context, press), fed)
        rows = torch.arange(len(scored))
        return {
            "kl": (p.exp() * (p - q)).sum(dim=1).clamp_min(0.0).tolist(),
            "flips": (p.argmax(dim=1) != q.argmax(dim=1)).tolist(),
            "nll": (-q[rows, scored]).tolist(),
            "full_nll": (-p[rows, scored]).tolist(),
        }

    def do_positions(self, context: list[int], press: dict[str, Any]) -> list[list[list[int]]]:
        """Return the rows that attention still sees, of each layer and head, sorted."""
        kept: dict[int, list[list[int]]] = {}
        state = self.compress(context, press, watch=lambda i, before, after: kept.update({i: rows_of(before, after)}))
        for i, masked in enumerate(state.masked):
            if masked is not None:
                gone = set(zip(masked[1].tolist(), masked[2].tolist(), strict=True))
                kept[i] = [[r for r in rows if (h, r) not in gone] for h, rows in enumerate(kept[i])]
        return [kept[i] for i in range(len(self.layers))]

    def do_cost(self, tokens: list[int], press: dict[str, Any], batch: int, steps: int, repeats: int) -> dict[str, Any]:
        """Prefill equal sequences from nothing, with the press in the forward as kvpress has it, and decode."""
        ttft_s, step_s, sizes = [], [], {}
        ids = self._ids(tokens).expand(batch, -1)
        for _ in range(repeats):
            start = time.perf_counter()
            state = self.prefill(ids[:, :-1], build(press, len(tokens) - 1))
            cache, fed = self._opened(state), ids[:, -1:]
            for i in range(steps + 1):
                fed = self._feed(cache, fed, state.position + i).argmax(dim=-1, keepdim=True)
                if fed.is_cuda:
                    torch.cuda.synchronize()
                now = time.perf_counter()
                (step_s if i else ttft_s).append(now - start)
                start = now
            sizes = state.sizes()
        return {"ttft_s": ttft_s, "step_s": step_s, "sizes": sizes}


def filled(keys: list[Tensor], values: list[Tensor]) -> Any:
    """Return a cache that holds these very arrays; appending to it copies them."""
    cache = DynamicCache()
    for k, v in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = k, v
        layer.dtype, layer.device, layer.is_initialized = k.dtype, k.device, True
        cache.layers.append(layer)
    return cache


def rows_of(before: Tensor, after: Tensor) -> list[list[int]]:
    """Return for each head which rows of ``before [1, H, T, D]`` are those of ``after [1, H, R, D]``, sorted."""
    out = []
    for one, other in zip(before[0], after[0], strict=True):
        old, new = ([row.tobytes() for row in x.cpu().contiguous().view(torch.uint8).numpy()] for x in (one, other))
        where = {row: i for i, row in enumerate(old)}
        if not where.keys() >= set(new):
            raise ValueError("this press changes the keys that it keeps, so their positions cannot be told")
        out.append(sorted(where[row] for row in new))
    return out


def reply(document: dict[str, Any]) -> None:
    _REPLIES.write(json.dumps(document) + "\n")
    _REPLIES.flush()


@torch.inference_mode()
def main() -> None:
    """Answer requests until stdin ends."""
    transformers.utils.logging.disable_progress_bar()
    names = ("python", "torch", "transformers", "kvpress")
    numbers = (platform.python_version(), torch.__version__, transformers.__version__, _version())
    reply({"ok": dict(zip(names, numbers, strict=True))})
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                worker = Worker(**request)
                reply({"ok": worker.about()})
            else:
                reply({"ok": getattr(worker, f"do_{do}")(**request)})
        except Exception as error:  # kvpress raises what it likes; the driver is told, and the worker goes on
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
