"""What kvmlx knows of mlx-lm's models: their layers, their rotary embeddings, and which it cannot serve.

Found by `python -m scripts.compatibility`, which runs every architecture; its table is docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvmlx.backends.rotary import measure
from kvmlx.types import LayerInfo, ModelInfo, Rotary

_LATENT = (
    "it caches the latent of multi-head latent attention (MLA), already a compressed form of keys and "
    "values, and expands it inside the model"
)
_MANUAL = "it computes attention itself, outside mlx-lm's shared function"

REFUSED: dict[str, str] = {
    "bailing_hybrid": _LATENT,
    "bailing_moe_v3": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "kimi_k25": _LATENT,
    "kimi_k3": _LATENT,
    "kimi_linear": _LATENT,
    "kimi_vl": _LATENT,
    "longcat_flash": _LATENT,
    "longcat_flash_ngram": _LATENT,
    "mistral4": _LATENT,
    "gemma2": f"{_MANUAL}, to cap the logits",
    "olmo": _MANUAL,
    "phi3small": f"{_MANUAL} in its block-sparse layers, with a mask over the places of all tokens",
    "plamo": "it repeats its cached keys and values for every query head before it attends",
    "plamo2": "it calls mx.fast.scaled_dot_product_attention itself, not mlx-lm's shared function",
    "minimax_m3_vl": "its indexer selects blocks by the places of all tokens in the cache",
}
"""Models whose attention cannot be handed to kvmlx, by mlx-lm's module name, with the reason."""

_NORM_AFTER_ROPE = frozenset({"afm7", "hunyuan", "hunyuan_v1_dense"})
"""Modules that scale a key's channels after they rotated it: undoing the rotation is not enough there."""

_ROPE_IN_SLIDING_LAYERS = frozenset({"cohere2"})
"""Modules whose full-attention layers own a rotary embedding and leave it unused."""

_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "q_num_heads")
_KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads", "n_head_kv", "k_num_heads")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
"""Projections to queries, keys and values in one."""
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "mixer", "temporal_block", "norm_attn_norm")


def refusal(model: Any) -> str | None:
    """Return why the model cannot have a compressed cache, or None."""
    return next((REFUSED[module] for module in _modules(model) if module in REFUSED), None)


def _modules(model: Any) -> Iterator[str]:
    """Yield the mlx-lm module of the model, and of the language model inside a multi-modal wrapper."""
    language = getattr(model, "language_model", None)
    for part in (model, language, getattr(model, "model", None), getattr(language, "model", None)):
        if part is not None:
            yield _module(part)


def _module(part: Any) -> str:
    return type(part).__module__.rpartition(".")[2]


def describe(model: Any, managed: Sequence[int], n_caches: int) -> ModelInfo:
    """Return what is known of the layers before they run.

    Args:
        model: an mlx-lm model.
        managed: which of its caches kvmlx manages.
        n_caches: how many caches it has: not always as many as layers.
    """
    name = getattr(model, "model_type", None) or _module(model)
    attention = _attention_of(list(model.layers), managed, n_caches)
    return ModelInfo(str(name), tuple(_layer(i, a) for i, a in enumerate(attention)))


def _attention_of(layers: list[Any], managed: Sequence[int], n_caches: int) -> list[Any]:
    """Return the attention module that each managed cache belongs to."""
    found = [_attention(layer) for layer in layers]
    if n_caches > len(layers):  # a looped model runs its layers again, with caches of their own
        return [found[i % len(layers)] for i in managed]
    if n_caches < len(layers):  # some layers have no cache: they attend to another's, or not at all
        present = [a for a in found if a is not None]
        owners = [a for a in present if _projections(a)]
        if len(present) == n_caches:
            return [present[i] for i in managed]
        if len(owners) == len(managed):
            return owners
    return [found[i] for i in managed]


def _attention(layer: Any) -> Any:
    """Return the attention module of a block, or None."""
    for name in _ATTENTION:
        module = getattr(layer, name, None)
        if module is not None:
            inner = (getattr(module, part, None) for part in ("attn", "attention"))
            return next((part for part in inner if isinstance(part, nn.Module)), module)
    return None


def _projections(attention: Any) -> bool:
    return any(getattr(attention, name, None) is not None for name in ("k_proj", *_FUSED))


def _layer(number: int, attention: Any) -> LayerInfo:
    heads = _first(attention, _HEADS)
    kv_heads = _first(attention, _KV_HEADS) or heads
    key_dim, value_dim = _dims(attention, heads, kv_heads)
    return LayerInfo(number, heads, kv_heads, key_dim, value_dim, rotary_of(attention, key_dim))


def _first(module: Any, names: Iterable[str]) -> int:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and v > 0), 0)


def _dims(attention: Any, heads: int, kv_heads: int) -> tuple[int, int]:
    """Return the channels of a key and of a value; 0 where the module does not tell."""
    rope, nope = (_first(attention, (f"qk_{part}_head_dim",)) for part in ("rope", "nope"))
    key = rope + nope if rope and nope else _first(attention, ("head_dim", "head_size", "qk_dim"))
    value = _first(attention, ("v_head_dim", "v_dim")) or key
    if key:
        return key, value
    if not kv_heads:
        return 0, 0
    key, value = (_rows(attention, name) // kv_heads for name in ("k_proj", "v_proj"))
    fused = max(_rows(attention, name) for name in _FUSED) // (heads + 2 * kv_heads)
    return key or fused, value or fused


def _rows(attention: Any, projection: str) -> int:
    weight = getattr(getattr(attention, projection, None), "weight", None)
    return 0 if weight is None else int(weight.shape[0])


# -- rotary embeddings --------------------------------------------------------------------------------------


def rotary_of(attention: Any, dim: int) -> Rotary | None:
    """Measure the layer's rotary embedding: channel pairs, frequencies and factor; None if it is not plain.

    The module itself is asked, whatever its scaling: unit vectors through it at position 1 show the pairs and
    their angles, later positions make these exact, and must agree with them. Where the layer rotates only the
    last channels of a key, the others come first and stay.
    """
    rope = next((m for n in ("rope", "rotary_emb", "rotary") if callable(m := getattr(attention, n, None))), None)
    if not isinstance(rope, nn.Module) or not dim or _module(attention) in _NORM_AFTER_ROPE | _ROPE_IN_SLIDING_LAYERS:
        return None
    rotated = _first(attention, ("qk_rope_head_dim",)) or dim
    rotary = measure(partial(_turn, rope, rotated))
    if rotary is None or rotated == dim:
        return rotary
    first, second = (tuple(i + dim - rotated for i in pair) for pair in (rotary.first, rotary.second))
    return Rotary(first, second, rotary.frequency, rotary.factor)


def _turn(rope: nn.Module, dim: int, position: int) -> np.ndarray | None:
    """Return the rotation at a position as a matrix: row i is where channel i goes. None if it is not one."""
    # On the CPU: a GPU's fast sines are off at large angles.
    with mx.stream(mx.cpu):
        try:
            out = rope(mx.eye(dim)[None, :, None, :], offset=position)
        except (TypeError, ValueError):
            return None
        turn = np.array(out.astype(mx.float32), dtype=np.float64)
    return turn[0, :, 0, :] if turn.shape == (1, dim, 1, dim) else None
