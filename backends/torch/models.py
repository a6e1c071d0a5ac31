"""What kvmlx knows of transformers' models: their layers, their rotary embeddings, and which it cannot serve."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Sequence
from inspect import getsource, signature
from typing import Any

import numpy as np
import torch
from torch import nn

from kvmlx.backends.rotary import measure
from kvmlx.types import LayerInfo, ModelInfo, Rotary

_BIASED = "it adds a bias to the logits of its attention, by the distance of tokens"

REFUSED: dict[str, str] = {
    "diffllama": "it cuts its cached values in two before it attends",
    "doge": "it makes a mask of all its cached values before it attends",
    "inkling2_text": _BIASED,
    "inkling_text": _BIASED,
    "jetmoe": "it repeats its cached keys and values for every expert before it attends",
    "mllama": "some of its layers attend to an image (cross attention)",
}
"""Models whose attention cannot be handed to kvmlx, by the type of their text model, with the reason."""

_SINKS = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})
"""Models without SDPA support whose attention differs from the common one by its sinks only, which kvmlx knows."""

_NAME_IS_MINOR = frozenset({"gpt2", "gemma4_text", "gemma4_unified_text"})
"""Models that ask for the name of their attention, to no effect on what kvmlx does or hands on."""

_NORM_AFTER_ROPE = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})
"""Models that scale a key's channels after they rotated it: undoing the rotation is not enough there."""

_ROPE_IN_SLIDING_LAYERS = frozenset({"afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"})
"""Models whose full-attention layers are handed a rotary embedding and leave it unused."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "W_pack")
"""Projections to queries, keys and values in one."""


def text_config(model: Any) -> Any:
    """Return the configuration of the model's decoder: its own, or that of its language model."""
    return model.config.get_text_config(decoder=True)


def refusal(model: Any) -> str | None:
    """Return why the model cannot have a compressed cache, or None."""
    config = text_config(model)
    kind, told = config.model_type, config.to_dict()
    if kind in REFUSED:
        return REFUSED[kind]
    if model.config.is_encoder_decoder:
        return "its decoder attends to an encoder's output too (cross attention)"
    if told.get("kv_lora_rank"):
        return (
            "it caches the latent of multi-head latent attention (MLA), already a compressed form of keys and "
            "values, and expands it inside the model"
        )
    if told.get("attn_logit_softcapping"):
        return "it caps the logits of its attention"
    decoder = _decoder(model)
    if any(getattr(module, "indexer", None) is not None for module in attention_of(model).values()):
        return "its indexer selects among the places of all tokens in the cache"
    if not getattr(type(decoder), "_can_set_attn_implementation", lambda: True)():
        return "it computes attention itself, outside transformers' AttentionInterface"
    if told.get("reorder_and_upcast_attn") or (kind not in _NAME_IS_MINOR and _asks_by_name(decoder)):
        return "its code asks for the name of its attention, and computes otherwise under another one"
    if not getattr(decoder, "_supports_sdpa", False) and kind not in _SINKS:
        return "its attention is of its own kind: transformers serves it by no common implementation either"
    return None


def _asks_by_name(decoder: Any) -> bool:
    home = sys.modules.get(type(decoder).__module__)
    try:
        code = getsource(home) if home else ""
    except (OSError, TypeError):
        return False
    return re.search(r"config\._attn_implementation (==|!=|in|not in) ", code) is not None


def describe(model: Any, managed: Sequence[int]) -> ModelInfo:
    """Return what is known of the layers before they run.

    Args:
        model: a transformers model.
        managed: which layers of its cache kvmlx manages.
    """
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    found = attention_of(model)
    measured: dict[Any, Rotary | None] = {}
    layers = []
    for number, index in enumerate(managed):
        attention = found.get(index)
        if attention is None:
            layers.append(LayerInfo(number))
            continue
        heads, kv_heads, key_dim, value_dim = _shapes(attention, config)
        kind = kinds[index] if kinds else None
        rope = None if _bare(attention, config, kind) else _rotary_module(model, attention)
        key = (id(rope), kind, key_dim)
        if key not in measured:
            measured[key] = None if rope is None else rotary_of(rope, attention, key_dim, kind)
        layers.append(LayerInfo(number, heads, kv_heads, key_dim, value_dim, measured[key]))
    return ModelInfo(model.config.model_type, tuple(layers))


def attention_of(model: Any) -> dict[int, Any]:
    """Return the attention module of each layer that has one, by the layer's number."""
    found: dict[int, Any] = {}
    for module in _decoder(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(isinstance(getattr(module, n, None), nn.Module) for n in ("k_proj", *_FUSED)):
            found.setdefault(index, module)
    return found


def _decoder(model: Any) -> Any:
    """Return the part of a model that has the layers, without the head and without other modalities."""
    part = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else model
    return part if hasattr(part, "set_attn_implementation") else model  # a head may be called decoder too


def _shapes(attention: Any, config: Any) -> tuple[int, int, int, int]:
    """Return query heads, KV heads, channels of a key and of a value; 0 where the module does not tell."""
    heads = _first((attention, config), _HEADS)
    groups = _first((attention,), ("num_key_value_groups",))
    dim = _first((attention, config), _HEAD_DIM)
    rows = _rows(attention, "k_proj")
    kv_heads = heads // groups if groups else _first((attention,), _KV_HEADS) or (rows // dim if dim else 0) or heads
    if not kv_heads:
        return 0, 0, 0, 0
    key = rows // kv_heads or dim
    return heads, kv_heads, key, _rows(attention, "v_proj") // kv_heads or key


def _first(parts: Iterable[Any], names: Iterable[str]) -> int:
    values = (getattr(part, name, None) for part in parts for name in names)
    return next((v for v in values if type(v) is int and v > 0), 0)


def _rows(attention: Any, projection: str) -> int:
    module = getattr(attention, projection, None)
    weight = getattr(module, "weight", None)
    return getattr(module, "out_features", 0) or (0 if weight is None else int(weight.shape[0]))


# -- rotary embeddings --------------------------------------------------------------------------------------


def _bare(attention: Any, config: Any, kind: str | None) -> bool:
    """Whether the keys of a layer of this type are not rotated, or not only rotated."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if kind in parameters and parameters[kind] is None:
        return True
    if config.model_type in _NORM_AFTER_ROPE or getattr(attention, "use_rope", True) in (False, 0):
        return True
    return config.model_type in _ROPE_IN_SLIDING_LAYERS


def _rotary_module(model: Any, attention: Any) -> Any:
    for part in (attention, _decoder(model)):
        for name in ("rotary_emb", "rotary", "pos_emb"):
            if isinstance(rope := getattr(part, name, None), nn.Module):
                return rope
    return None


def rotary_of(rope: Any, attention: Any, dim: int, kind: str | None) -> Rotary | None:
    """Measure a rotary embedding through the model's own functions; None if it is not plain.

    Args:
        rope: the module that makes cosines and sines of positions.
        attention: a module that rotates by them.
        dim: channels of a key. Where fewer are rotated, they come first.
        kind: type of the layer, for a module that rotates each type its own way.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or not dim:
        return None
    rope = copy.deepcopy(rope).to("cpu")  # some change with the positions that they see
    if any(buffer.is_meta for buffer in rope.buffers()):
        return None
    by_kind = {"layer_type": kind} if "layer_type" in signature(rope.forward).parameters else {}
    keys_alone = "k" not in signature(apply).parameters

    x = torch.zeros(1, 1, dim)

    def cosines(position: int) -> Any:
        for axes in ((), (3,)):  # some want time, height and width, which a text has in one
            try:
                return rope(x, torch.full((*axes, 1, 1), position), **by_kind)
            except IndexError:
                continue
        return None

    def turn(position: int) -> np.ndarray | None:
        out = cosines(position)
        if not isinstance(out, tuple):
            return None
        cos, sin = out
        rotated = min(dim, cos.shape[-1])
        for channels in dict.fromkeys((dim, rotated)):
            keys = torch.eye(channels)[None, :, None]
            try:
                turned = apply(keys, cos, sin) if keys_alone else apply(keys, keys, cos, sin)[1]
            except RuntimeError:  # the attention cuts the channels that are rotated out itself
                continue
            matrix = np.eye(dim)
            matrix[:channels, :channels] = turned[0, :, 0].double().numpy()
            return matrix
        return None

    with torch.no_grad():
        return measure(turn)
