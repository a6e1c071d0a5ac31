"""kvmlx's attention in transformers' AttentionInterface, and the masks that go with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmlx.backends.torch.cache import PREFIX, CompressedRows, KVMLXLayer, Origin, eager
from kvmlx.backends.torch.models import attention_of, text_config
from kvmlx.types import UnsupportedModelError

BASES = ("sdpa", "eager")
"""Implementations that a model may have had: everything that is not a compressed cache is handed on to them."""


def _refuse(layer: KVMLXLayer, what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{layer.layer.session.model.model_type} asks for {what}, which attention over a compressed cache has not"
    )


@eager
def _attend(
    module: Any,
    query: Tensor,
    rows: CompressedRows,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Any = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = rows.layer
    causal = is_causal is not False and getattr(module, "is_causal", True)
    if softcap or dropout or output_attentions or position_bias is not None or not causal:
        asked = {
            "capped logits": softcap,
            "dropout": dropout,
            "attention weights as an output": output_attentions,
            "a position bias": position_bias is not None,
            "attention that is not causal": not causal,
        }
        _refuse(layer, next(name for name, there in asked.items() if there))
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 4:
        _refuse(layer, "a mask that is not [B, H, L, T]")
    arguments = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "mask": None if attention_mask is layer.forward.causal else attention_mask,
        "sinks": s_aux,
    }
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            out = layer.attend(query, **arguments)
    else:
        out = layer.attend(query, **arguments)
    return out.transpose(1, 2).contiguous(), None


def _attention(
    base: str, module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attend over a compressed cache; everything else goes to the implementation that the model had."""
    if type(key) is CompressedRows:
        return _attend(module, query, key, attention_mask, **kwargs)
    return _function(base, module)(module, query, key, value, attention_mask, **kwargs)


def _function(base: str, module: Any) -> Callable[..., Any]:
    """Return the attention function of this name as the module's own file has it."""
    home = sys.modules[type(module).__module__]
    if base == "eager":
        return home.eager_attention_forward
    return getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[base]


def _mask(base: str, **kwargs: Any) -> Any:
    """Make the mask of a forward: none for rows that kvmlx attends to itself, the implementation's own otherwise."""
    if type(kwargs.get("kv_offset")) is Origin:
        return _mask_of(base, **kwargs)
    return _base_mask(base, kwargs)


def _base_mask(base: str, kwargs: dict[str, Any]) -> Any:
    # Layers that share rows may come with their last queries only. Without a mask SDPA aligns these with the first
    # keys; models avoid that where they find their attention to be named sdpa, which it is not here.
    if getattr(kwargs.get("config"), "num_kv_shared_layers", 0) and kwargs.get("q_length", 1) > 1:
        kwargs = kwargs | {"allow_is_causal_skip": False}
    return ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)


@eager
def _mask_of(base: str, *, kv_offset: Origin, **kwargs: Any) -> Any:
    cache = kv_offset.cache
    # Older versions give the positions of the new tokens, not how many there are.
    n = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    cache.begin(n, kwargs.get("attention_mask"))
    plain = not cache.open and kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if plain and kwargs.get("allow_is_causal_skip", True):
        return None
    mask = _base_mask(base, {"kv_offset": int(kv_offset), **kwargs})
    if plain:
        cache.forward.causal = mask
    return mask


def install() -> None:
    """Register kvmlx's attention with transformers. Idempotent; no model uses it before it is told to."""
    for base in BASES:
        if PREFIX + base not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(PREFIX + base, partial(_attention, base))
            AttentionMaskInterface.register(PREFIX + base, partial(_mask, base))


def switch(model: Any) -> None:
    """Let the model's decoder use kvmlx's attention, which hands other caches on to the one that it had.

    ``model.set_attn_implementation("sdpa")`` undoes it; compressed caches are refused from then on.

    Raises:
        UnsupportedModelError: the model has another implementation than SDPA or eager, or cannot change it.
    """
    install()
    config = text_config(model)
    had = config._attn_implementation
    if str(had).startswith(PREFIX):
        return
    if had not in BASES:
        raise UnsupportedModelError(
            f"the model attends by {had!r}: kvmlx hands other caches on to {' or '.join(BASES)} only; call "
            "model.set_attn_implementation('sdpa') first"
        )
    name = PREFIX + had
    model.set_attn_implementation(_path(model.config, config, name))
    configs = [config, *(module.config for module in attention_of(model).values() if hasattr(module, "config"))]
    if any(c._attn_implementation != name for c in configs):
        raise UnsupportedModelError(
            f"{config.model_type} does not let its attention be set through transformers' AttentionInterface"
        )


def _path(top: Any, config: Any, name: str) -> dict[str, Any]:
    """Return what `set_attn_implementation` takes to set one configuration among those of a model."""
    if top is config:
        return {"": name}
    for key in top.sub_configs:
        below = getattr(top, key, None)
        if below is not None and (path := _path(below, config, name)):
            return {key: path[""] if list(path) == [""] else path}
    return {}
