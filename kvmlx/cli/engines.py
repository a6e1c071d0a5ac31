"""A loaded model that answers a prompt from a cache of any strategy: mlx-lm's, or one of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvmlx.cli.held import Held, held_by
from kvmlx.cli.models import load_error, resolve_model
from kvmlx.cli.output import stderr
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError

Progress = Callable[[int, int], None]
"""Called with the prompt tokens done, and all of them."""
PREFILL_STEP = 2048


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; a temperature of 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and what that took."""

    text: str
    tokens: list[int]
    """What was generated, the end token included."""
    held: Held
    prompt_tokens: int
    finish_reason: str
    """``"stop"`` at the end token, ``"length"`` where the tokens allowed were used up."""
    prefill_peak_nbytes: int | None
    """The most held during prefill beyond the weights; None where the framework does not count it."""
    first_token_s: float
    tokens_per_s: float


def load(name: str, backend: str, dtype: str | None, **options: Any) -> MLXEngine | TorchEngine:
    """Load a model and its tokenizer.

    Args:
        name: a folder, a Hub repository, or `demo`.
        backend: ``"mlx"`` or ``"torch"``.
        dtype: type of the model; None: float32 on a CPU, which has no fast half-precision product, else its own.
        options: of the engine.
    """
    path = resolve_model(name)
    try:
        with stderr().status("loading the model"):
            return (MLXEngine if backend == "mlx" else TorchEngine)(path, dtype, **options)
    except KVMLXError:
        raise
    except Exception as error:
        if (line := load_error(name, error)) is None:
            raise
        raise line from error


class MLXEngine:
    """A model of mlx-lm."""

    name = "mlx"

    def __init__(self, path: str, dtype: str | None) -> None:
        import mlx.core as mx
        from mlx_lm import load

        self.model, self.tokenizer = load(path)[:2]
        self.device = "cpu" if mx.default_device() == mx.cpu else "gpu"
        if dtype is None and self.device == "cpu":
            dtype = "float32"
        if dtype is not None:
            self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        self.dtype = dtype or self._weight_dtype()

    def _weight_dtype(self) -> str:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        weights: list[tuple[str, Any]] = tree_flatten(self.model.parameters())  # type: ignore[assignment]
        dtype = next(w.dtype for _, w in weights if mx.issubdtype(w.dtype, mx.floating))
        return str(dtype).removeprefix("mlx.core.")

    def answer(
        self,
        prompt: list[int],
        strategy: Strategy | None,
        *,
        max_tokens: int,
        on_prefill: Progress,
        prefill_step: int = PREFILL_STEP,
    ) -> Answer:
        """Answer once, greedily, from an empty cache; None as strategy is mlx-lm's own."""
        import mlx.core as mx
        from mlx_lm import stream_generate

        caches = self._caches(strategy)
        mx.clear_cache()
        mx.reset_peak_memory()
        weights = mx.get_active_memory()
        text, tokens, peak, first, response = [], [], 0, 0.0, None
        begin = time.perf_counter()
        for response in stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            max_tokens=max_tokens,
            prompt_cache=caches,
            prefill_step_size=prefill_step,
            prompt_progress_callback=on_prefill,
        ):
            if not tokens:
                first, peak = time.perf_counter() - begin, mx.get_peak_memory() - weights
            text.append(response.text)
            tokens.append(response.token)
        if response is None:
            raise KVMLXError("the model said nothing")
        return Answer(
            "".join(text),
            tokens,
            held_by(caches),
            len(prompt),
            response.finish_reason or "length",
            peak,
            first,
            response.generation_tps,
        )

    def _caches(self, strategy: Strategy | None) -> list[Any]:
        if strategy is not None:
            import kvmlx

            return kvmlx.make_prompt_cache(self.model, strategy)
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)


class TorchEngine:
    """A model of transformers, on the GPU where there is one."""

    name = "torch"

    def __init__(self, path: str, dtype: str | None, *, trust_remote_code: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        cuda = torch.cuda.is_available()
        kind: Any = getattr(torch, dtype) if dtype else "auto" if cuda else torch.float32
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        with _quiet():
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **options)
        self.model.to("cuda" if cuda else "cpu").eval()
        self.device = torch.cuda.get_device_name() if cuda else "cpu"
        self.dtype = str(self.model.dtype).removeprefix("torch.")

    def cache(self, strategy: Strategy | None) -> Any:
        """Return an empty cache; None as strategy is transformers' own."""
        if strategy is not None:
            import kvmlx

            return kvmlx.make_prompt_cache(self.model, strategy)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def answer(
        self,
        prompt: list[int],
        strategy: Strategy | None,
        *,
        max_tokens: int,
        on_prefill: Progress,
        prefill_step: int = PREFILL_STEP,
    ) -> Answer:
        """Answer once, greedily, from an empty cache; None as strategy is transformers' own."""
        return self.continued(
            prompt, self.cache(strategy), max_tokens=max_tokens, on_prefill=on_prefill, prefill_step=prefill_step
        )

    def continued(
        self,
        prompt: list[int],
        cache: Any,
        *,
        max_tokens: int,
        on_prefill: Progress | None = None,
        on_text: Callable[[str], None] | None = None,
        prefill_step: int = PREFILL_STEP,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer what follows the tokens that the cache has seen.

        Args:
            prompt: the new tokens only.
            cache: continued in place.
            max_tokens: tokens to generate at most.
            on_prefill: told of the prompt tokens done.
            on_text: given the text as it comes.
            prefill_step: prompt tokens processed at a time.
            sampling: how tokens are drawn; None: greedily.
        """
        import torch
        from transformers import GenerationConfig

        sampling = sampling or Sampling()
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        cuda = self.model.device.type == "cuda"
        watch = _watch(self.tokenizer, len(prompt), on_prefill, on_text, _cuda_peak if cuda else None)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        ids = torch.tensor([prompt], device=self.model.device)
        seen = cache.get_seq_length()
        own = self.model.generation_config
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            chosen |= {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            prefill_chunk_size=prefill_step if len(prompt) > prefill_step else None,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else _first(own.eos_token_id),
            **chosen,
        )
        while config.prefill_chunk_size and len(prompt) % config.prefill_chunk_size == 1:
            # A last chunk of one token would look like the first decoded one: the prompt would end before it.
            config.prefill_chunk_size += 1
        hook = self.model.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
        begin = time.perf_counter()
        try:
            out = self.model.generate(
                ids,
                attention_mask=torch.ones((1, seen + len(prompt)), dtype=torch.long, device=ids.device),
                past_key_values=cache,
                generation_config=config,
                streamer=watch,
            )
        finally:
            hook.remove()
        tokens = out[0, len(prompt) :].tolist()
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        stopped = bool(tokens) and tokens[-1] in ends
        _, first, *rest = watch.times
        return Answer(
            "".join(watch.text),
            tokens,
            held_by(cache),
            len(prompt),
            "stop" if stopped else "length",
            None if watch.peak is None else watch.peak - before,
            first - begin,
            len(rest) / (rest[-1] - first) if rest else 0.0,
        )


def _watch(
    tokenizer: Any,
    total: int,
    on_prefill: Progress | None,
    on_text: Callable[[str], None] | None,
    peak: Callable[[], int] | None,
) -> Any:
    """Return what `generate` reports to as a streamer, and each forward before it begins."""
    from transformers import TextStreamer

    class Watch(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.done = 0
            self.text: list[str] = []
            self.peak: int | None = None
            self.times: list[float] = []
            """When the prompt was handed in, and each token came."""

        def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids")
            if ids is None or self.done >= total:
                return
            if on_prefill:
                on_prefill(self.done, total)
            self.done += ids.shape[-1]

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            if len(self.times) == 2:
                self.peak = peak() if peak else None
                if on_prefill:
                    on_prefill(total, total)
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text.append(text)
            if text and on_text:
                on_text(text)

    return Watch()


def _cuda_peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
