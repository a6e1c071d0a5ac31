"""The benchmark's engine on mlx-lm."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as stock

from kvmlx.backends.mlx.adapter import KVMLXCache, _flat, layers_of, make_prompt_cache, model_type
from kvmlx.bench.baselines import MLX_LM, Baseline
from kvmlx.bench.engine import BenchEngine, Method
from kvmlx.session import LayerCache
from kvmlx.strategy import Strategy
from kvmlx.types import StrategyError, UnsupportedModelError


class MLXBench(BenchEngine):
    """A model of mlx-lm."""

    name = "mlx"
    framework = MLX_LM

    # -- caches ---------------------------------------------------------------------------------------------------

    def _stock(self) -> list[Any]:
        return stock.make_prompt_cache(self.model)

    def _own(self, baseline: Baseline) -> list[Any]:
        caches, parameters = self._stock(), baseline.parameters
        plain = [i for i, cache in enumerate(caches) if type(cache) is stock.KVCache]
        if not plain:
            raise UnsupportedModelError(
                f"{model_type(self.model)} has no plain KV cache in whose place '{baseline}' could be"
            )
        if baseline.name == "rotating":
            for i in plain:
                caches[i] = stock.RotatingKVCache(parameters["size"], keep=parameters["keep"])
            return caches
        others = {type(c).__name__ for c in caches if hasattr(c, "to_quantized") and type(c) is not stock.KVCache}
        if others:
            kind = model_type(self.model)
            raise UnsupportedModelError(f"mlx-lm cannot quantize {', '.join(sorted(others))}, which {kind} also has")
        misfits = {dim for _, *dims in self._shapes for dim in dims if dim % parameters["group_size"]}
        if misfits:
            raise StrategyError(f"'{baseline}' needs a head dim that its groups divide, got {min(misfits)}")
        return caches

    def _compressed(self, strategy: Strategy) -> list[Any]:
        return make_prompt_cache(self.model, strategy, inspect=self.inspect)

    def _layers(self, caches: list[Any]) -> list[LayerCache]:
        return layers_of(caches)

    def _exchange(self, caches: list[Any], layers: Sequence[LayerCache]) -> None:
        managed = [c for c in _flat(caches) if isinstance(c, KVMLXCache)]
        for cache, layer in zip(managed, layers, strict=True):
            cache.layer = layer

    def _plain(self, recorded: list[Any]) -> list[Any]:
        memo: dict[int, Any] = {}
        for cache in _flat(recorded):
            if isinstance(cache, KVMLXCache):
                memo[id(cache)] = plain = stock.KVCache()
                if not cache.layer.empty:
                    plain.update_and_fetch(*cache.layer.store.tail()[:2])
                    mx.eval(plain.keys, plain.values)
        return copy.deepcopy(recorded, memo)

    # -- the model ------------------------------------------------------------------------------------------------

    def _feed(self, caches: list[Any], tokens: Any) -> mx.array:
        return self.model(mx.array(tokens), cache=caches)[:, -1]

    def _finish(self, caches: list[Any], method: Method, *, complete: bool) -> None:
        for layer in layers_of(caches):
            layer.settle(chunk_end=not complete, prompt_end=complete)
        if isinstance(method, Baseline) and method.name == "affine":
            # As mlx-lm's own generators do after each chunk.
            maybe_quantize_kv_cache(caches, 0, method.parameters["group_size"], method.parameters["bits"])
        mx.eval(list(_arrays(caches)))

    def _greedy(self, logits: mx.array) -> mx.array:
        tokens = mx.argmax(logits, axis=-1, keepdims=True)
        mx.async_eval(tokens)
        return tokens

    def _logprobs(self, logits: mx.array) -> mx.array:
        row = logits[0].astype(mx.float32)
        row = row - mx.logsumexp(row)
        mx.async_eval(row)
        return row

    def _host(self, x: Any) -> np.ndarray:
        return np.array(x)

    def _wait(self) -> None:
        mx.synchronize()

    def _stop_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)

    def _joins(self, caches: list[Any]) -> bool:
        return all(type(c) in (KVMLXCache, stock.KVCache) for c in _flat(caches))

    def _joined(self, caches: Sequence[list[Any]]) -> list[Any]:
        return [type(same[0]).merge(same) for same in zip(*caches, strict=True)]

    def _picked(self, caches: list[Any], rows: Sequence[int]) -> list[Any]:
        for cache in caches:
            cache.filter(mx.array(list(rows)))
        return caches

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _nbytes(self, caches: list[Any]) -> int:
        return sum(c.nbytes for c in _flat(caches))

    def _unmanaged_nbytes(self, caches: list[Any]) -> int:
        kinds = (KVMLXCache, stock.KVCache, stock.QuantizedKVCache)
        own = {i for i, c in enumerate(_flat(self._stock())) if type(c) is stock.KVCache}
        rest = [c for i, c in enumerate(_flat(caches)) if i not in own and not isinstance(c, kinds)]
        return sum(x.size * min(x.itemsize, 2) for x in _arrays(rest))

    def _active(self) -> int:
        return mx.get_active_memory()

    def _peak(self, *, reset: bool = False) -> int:
        if reset:
            mx.reset_peak_memory()
        return mx.get_peak_memory()

    def _release(self) -> None:
        mx.clear_cache()


def _arrays(caches: Sequence[Any]) -> Iterator[mx.array]:
    """Yield every array that caches hold."""
    for cache in _flat(caches):
        if isinstance(cache, KVMLXCache):
            yield from cache.layer.arrays().values()
        else:
            yield from (x for _, x in tree_flatten(cache.state) if isinstance(x, mx.array))
