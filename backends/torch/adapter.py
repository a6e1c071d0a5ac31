"""The adapter to transformers: a cache that its models and `generate` take for one of their own.

Attention goes through transformers' own AttentionInterface: a model whose cache is made here is set to the
implementation ``kvmlx_sdpa`` (or ``kvmlx_eager``), which hands everything that is not a compressed cache on to the
one that the model had. Nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvmlx.backends.torch import choose
from kvmlx.backends.torch.cache import CompressedRows, KVMLXCache, KVMLXLayer, flat
from kvmlx.backends.torch.hybrid import KVMLXHybridLayer
from kvmlx.backends.torch.interface import install, switch
from kvmlx.backends.torch.models import attention_of, describe, refusal, text_config
from kvmlx.session import LayerCache, Report, Session, check_layers
from kvmlx.session import report as session_report
from kvmlx.stages.base import Stage
from kvmlx.strategy import Strategy
from kvmlx.types import UnsupportedModelError


def make_prompt_cache(model: Any, strategy: str | Stage | Strategy, *, inspect: bool = False) -> KVMLXCache:
    """Return a cache for a transformers ``model``: compressed where the model attends fully, stock elsewhere.

    The model is set to kvmlx's attention (`switch`): with every other cache it computes as before.

    Args:
        model: a decoder of transformers.
        strategy: text such as ``"snapkv(budget=0.25) | int4"``, a stage, or a Strategy.
        inspect: keep every row's position too (`LayerCache.positions`), 4 bytes a row.

    Raises:
        StrategyError: the strategy is not one, or does not fit the model's head dim.
        UnsupportedModelError: no layer of the model can be served; the message says why.
        KVMLXError: $KVMLX_KERNELS asks for kernels that the model's devices have not.
    """
    strategy = Strategy.of(strategy)
    if not all(hasattr(model, name) for name in ("config", "set_attn_implementation")):
        raise UnsupportedModelError(f"{type(model).__name__} is no model of transformers, which kvmlx needs with torch")
    kind = model.config.model_type
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(f"{kind} takes no cache but one of its own kind, which kvmlx has not")
    layers: list[Any] = list(DynamicCache(config=text_config(model)).layers)
    hybrid = [i for i, layer in enumerate(layers) if type(layer) is LinearAttentionAndFullAttentionLayer]
    managed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer or i in hybrid]
    if not managed:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise UnsupportedModelError(
            f"{kind} has no full-attention layer with a plain KV cache (it has {', '.join(kinds)}): there is nothing "
            "that kvmlx could compress"
        )
    reason = refusal(model)
    if reason and not strategy.identity:
        raise UnsupportedModelError(f"{kind} cannot be served with {str(strategy)!r}: {reason}; 'full' works")
    info = describe(model, managed)
    check_layers(strategy, info, managed)
    rest = {i: LinearAttentionLayer if i in hybrid else type(layer) for i, layer in enumerate(layers)}
    unmanaged = tuple(f"layer {i}: {rest[i].__name__}" for i in rest if i not in managed or i in hybrid)
    session = Session(strategy, info, len(managed), unmanaged, inspect)
    attention = attention_of(model)
    early = strategy.bounded and not _shares(model, layers)
    for number, index in enumerate(managed):
        layer = LayerCache(choose.backend(_device(attention.get(index))), session, number)
        if index in hybrid:
            layers[index] = KVMLXHybridLayer(layer, layers[index], early=early)
        else:
            layers[index] = KVMLXLayer(layer, early=early)
    if not reason:
        switch(model)
    return KVMLXCache(layers)


def _shares(model: Any, layers: list[Any]) -> bool:
    """Whether layers may attend to the rows of another one."""
    return bool(getattr(text_config(model), "num_kv_shared_layers", 0)) or len(attention_of(model)) > len(layers)


def _device(attention: Any) -> torch.device:
    """Return where a layer's rows will lie, as far as its weights tell."""
    weight = None if attention is None else next(attention.parameters(), None)
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device


def layers_of(cache: Any) -> list[LayerCache]:
    """Return the compressed layers of a cache."""
    return [layer.layer for layer in cache.layers if isinstance(layer, KVMLXLayer)]


def report(cache: Any) -> Report:
    """Return what a model's cache holds."""
    return session_report(layers_of(cache), unmanaged_nbytes=sum(map(_stock_nbytes, cache.layers)))


def _stock_nbytes(layer: Any) -> int:
    """Return the bytes that transformers holds in a layer: keys and values, states of convolutions and recurrences."""
    found = {id(x): x for x in flat(vars(layer)) if isinstance(x, Tensor)}
    return sum(x.nbytes for x in found.values())


def settle(cache: Any) -> None:
    """Say that the prompt is complete, and do what the strategy does then."""
    for layer in layers_of(cache):
        layer.settle(prompt_end=True)


__all__ = [
    "CompressedRows",
    "KVMLXCache",
    "KVMLXLayer",
    "install",
    "layers_of",
    "make_prompt_cache",
    "report",
    "settle",
    "switch",
]
