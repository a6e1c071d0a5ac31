"""What kvmlx knows of mlx-lm's models: their layers, their rotary embeddings, and which it cannot serve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kvmlx.types import LayerInfo, ModelInfo, Rotary

REFUSED: dict[str, str] = {}
"""Models whose attention does not go through mlx-lm's shared function, by module name, with the reason."""


def refusal(model: Any) -> str | None:
    """Return why the model cannot have a compressed cache, or None."""
    for module in _modules(model):
        if module in REFUSED:
            return REFUSED[module]
    return None


def _modules(model: Any) -> Iterator[str]:
    """Yield the mlx-lm module of the model, and of the language model inside a multi-modal wrapper."""
    seen = [model, getattr(model, "language_model", None), getattr(model, "model", None)]
    for part in seen:
        if part is not None:
            yield type(part).__module__.rpartition(".")[2]


def describe(model: Any, managed: Sequence[int]) -> ModelInfo:
    """Return what is known of the managed layers before they run."""
    name = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    layers = list(model.layers)
    out = []
    for number, i in enumerate(managed):
        attention = _attention(layers[i]) if i < len(layers) else None
        out.append(_layer(number, attention))
    return ModelInfo(str(name), tuple(out))


def _attention(layer: Any) -> Any:
    """Return the attention module of a block: the one that owns key projections or a rotary embedding."""
    for name in ("self_attn", "attn", "attention", "self_attention", "mixer", "temporal_block"):
        module = getattr(layer, name, None)
        if module is not None:
            return module
    return None


def _layer(number: int, attention: Any) -> LayerInfo:
    heads = _first(attention, ("n_heads", "num_heads", "num_attention_heads", "n_head"))
    kv_heads = _first(attention, ("n_kv_heads", "num_kv_heads", "num_key_value_heads", "n_head_kv"))
    dim = _first(attention, ("head_dim", "head_size"))
    key_dim, value_dim = _dims(attention, heads, kv_heads, dim)
    return LayerInfo(number, heads, kv_heads or heads, key_dim, value_dim, rotary_of(attention, key_dim))


def _first(module: Any, names: Iterable[str]) -> int:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def _dims(attention: Any, heads: int, kv_heads: int, dim: int) -> tuple[int, int]:
    if dim:
        return dim, dim
    out = []
    for name in ("k_proj", "v_proj"):
        projection = getattr(attention, name, None)
        weight = getattr(projection, "weight", None)
        out.append(
            weight.shape[0] // (kv_heads or heads) if weight is not None and (kv_heads or heads) else 0
        )
    return out[0], out[1]


def rotary_of(attention: Any, dim: int) -> Rotary | None:
    """Measure the layer's rotary embedding: channel pairs, frequencies and factor; None if it is not plain.

    The module itself is asked: unit vectors through it at position 1 show the pairs and the angles, whatever the
    scaling; a second look at position 1000 must agree, or the angles are not linear in the position.
    """
    rope = next(
        (m for n in ("rope", "rotary_emb", "rotary") if callable(m := getattr(attention, n, None))), None
    )
    if rope is None or not dim or not isinstance(rope, nn.Module):
        return None

    def matrix(position: int) -> np.ndarray | None:
        try:
            out = rope(mx.eye(dim)[:, None, None, :], offset=position)
        except (TypeError, ValueError):
            return None
        return np.array(out.astype(mx.float32))[:, 0, 0, :]

    one, far = matrix(1), matrix(1000)
    if one is None or far is None or one.shape != (dim, dim):
        return None
    found = _pairs(one)
    if found is None:
        return None
    rotary = found
    return rotary if _agrees(rotary, far, 1000) else None


def _pairs(turn: np.ndarray) -> Rotary | None:
    """Read pairs and angles off a rotation's matrix (row i is where channel i goes)."""
    dim = len(turn)
    first, second, frequency, factors = [], [], [], []
    still = [i for i in range(dim) if np.array_equal(turn[i], np.eye(dim)[i])]
    half = (dim - len(still)) // 2
    done: set[int] = set()
    for i in range(dim):
        if i in done or i in still:
            continue
        others = [j for j in np.flatnonzero(turn[i]) if j != i]
        j = int(others[0]) if len(others) == 1 else i + half
        if j >= dim or len(others) > 1:
            return None
        angle = float(np.arctan2(turn[i, j], turn[i, i]))
        first.append(i)
        second.append(j)
        frequency.append(angle)
        factors.append(float(np.hypot(turn[i, i], turn[i, j])))
        done |= {i, j}
    if not first or not np.allclose(factors, factors[0], rtol=1e-4):
        return None
    return Rotary(tuple(first), tuple(second), tuple(frequency), round(factors[0], 6))


def _agrees(rotary: Rotary, turn: np.ndarray, position: int) -> bool:
    angles = np.asarray(rotary.frequency) * position
    cos, sin = np.cos(angles) * rotary.factor, np.sin(angles) * rotary.factor
    first, second = list(rotary.first), list(rotary.second)
    return bool(
        np.allclose(turn[first, first], cos, atol=2e-3) and np.allclose(turn[first, second], sin, atol=2e-3)
    )
