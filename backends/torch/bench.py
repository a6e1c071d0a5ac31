"""The benchmark's engine on transformers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from kvmlx.backends.torch.adapter import layers_of, make_prompt_cache
from kvmlx.backends.torch.cache import KVMLXLayer, flat
from kvmlx.backends.torch.hybrid import joined, parted
from kvmlx.backends.torch.models import text_config
from kvmlx.bench.baselines import PACKAGES, TRANSFORMERS, Baseline
from kvmlx.bench.engine import BenchEngine, Method
from kvmlx.session import LayerCache
from kvmlx.strategy import Strategy
from kvmlx.types import StrategyError, UnsupportedModelError

INSTALLED: dict[str, Callable[[], bool]] = {
    "quanto": is_optimum_quanto_available,
    "hqq": is_hqq_available,
    "fp8": lambda: hasattr(cache_utils, "Fp8QuantizedLayer"),
}
"""Whether a backend of transformers' QuantizedCache can be had."""
AXES = {"quanto": 0, "hqq": 1, "fp8": None}
"""Along which axis transformers' documentation tells a backend to quantize."""


class TorchBench(BenchEngine):
    """A model of transformers."""

    name = "torch"
    framework = TRANSFORMERS

    # -- caches ---------------------------------------------------------------------------------------------------

    def _stock(self) -> Any:
        return DynamicCache(config=text_config(self.model))

    def _own(self, baseline: Baseline) -> Any:
        backend = baseline.parameters["backend"]
        if not INSTALLED[backend]():
            raise StrategyError(f"'{baseline}' needs packages that are not here: pip install {PACKAGES[backend]}")
        kinds = {type(layer).__name__ for layer in self._stock().layers if type(layer) is not DynamicLayer}
        if kinds:
            kind = self.model.config.model_type
            raise UnsupportedModelError(
                f"transformers cannot quantize {', '.join(sorted(kinds))}, which {kind} also has"
            )
        axis = AXES[backend]
        more = {} if axis is None else {"nbits": baseline.parameters["bits"], "axis_key": axis, "axis_value": axis}
        return QuantizedCache(backend, text_config(self.model), **more)

    def _compressed(self, strategy: Strategy) -> Any:
        return make_prompt_cache(self.model, strategy, inspect=self.inspect)

    def _layers(self, caches: Any) -> list[LayerCache]:
        return layers_of(caches)

    def _exchange(self, caches: Any, layers: Sequence[LayerCache]) -> None:
        for slot, layer in zip(caches.managed, layers, strict=True):
            slot.layer = layer

    def _plain(self, recorded: Any) -> Any:
        caches = self._stock()
        caches.layers = [
            _plain(layer) if isinstance(layer, KVMLXLayer) else copy.deepcopy(layer) for layer in recorded.layers
        ]
        return caches

    def _shared(self, caches: Any) -> list[Any]:
        # Quantized tensors of other packages are replaced as a whole; some cannot be copied.
        held = [x for layer in caches.layers for x in flat(vars(layer)) if isinstance(x, Tensor)]
        return super()._shared(caches) + [x for x in held if is_traceable_wrapper_subclass(x)]

    # -- the model ------------------------------------------------------------------------------------------------

    @cached_property
    def _options(self) -> dict[str, Any]:
        known = inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def _feed(self, caches: Any, tokens: Any) -> Tensor:
        ids = torch.as_tensor(tokens, device=self.model.device).long()
        with torch.no_grad():
            return self.model(ids, past_key_values=caches, use_cache=True, **self._options).logits[:, -1]

    def _finish(self, caches: Any, method: Method, *, complete: bool) -> None:
        for layer in layers_of(caches):
            layer.settle(chunk_end=not complete, prompt_end=complete)
        if complete:
            for layer in caches.layers:
                if isinstance(layer, KVMLXLayer):
                    layer.early = False  # what follows is no prompt, however long

    def _greedy(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1, keepdim=True)

    def _logprobs(self, logits: Tensor) -> Tensor:
        return logits[0].float().log_softmax(dim=-1)

    def _host(self, x: Any) -> np.ndarray:
        return x.cpu().numpy()

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.model.device)

    def _stop_tokens(self) -> frozenset[int]:
        ends = (self.model.generation_config.eos_token_id, getattr(self.tokenizer, "eos_token_id", None))
        return frozenset(token for token in flat(ends) if token is not None)

    # -- bytes ----------------------------------------------------------------------------------------------------

    @property
    def _cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def _nbytes(self, caches: Any) -> int:
        return sum(x.nbytes for layer in caches.layers for x in _tensors(layer)) + sum(
            layer.nbytes for layer in layers_of(caches)
        )

    def _unmanaged_nbytes(self, caches: Any) -> int:
        total = 0
        for layer, empty in zip(caches.layers, self._stock().layers, strict=True):
            states = None if isinstance(layer, KVMLXLayer) else parted(layer)
            if type(empty) is not DynamicLayer or isinstance(layer, KVMLXLayer):
                held = _tensors(layer if states is None else states[0])
                total += sum(x.numel() * min(x.element_size(), 2) for x in held)
        return total

    def _active(self) -> int | None:
        return torch.cuda.memory_allocated(self.model.device) if self._cuda else None

    def _peak(self, *, reset: bool = False) -> int | None:
        if not self._cuda:
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        return torch.cuda.max_memory_allocated(self.model.device)

    def _release(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()


def _plain(layer: KVMLXLayer) -> Any:
    """Return transformers' own layer with the rows, and the states, of a recorded one."""
    rows = DynamicLayer()
    if not layer.layer.empty:
        rows.update(*layer.layer.store.tail()[:2])
    parts = parted(layer)
    return rows if parts is None else joined(copy.deepcopy(parts[0]), rows)


def _tensors(layer: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a layer of transformers holds; of kvmlx's layers those beside the rows."""
    found = {id(x): x for x in flat(vars(layer)) if isinstance(x, Tensor)}
    for x in found.values():
        yield from _parts(x)


def _parts(x: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(x):
        yield x
        return
    for name in x.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _parts(getattr(x, name))
