"""Attention beside a state-space model or a convolution in one layer: rows that kvmlx holds, states as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvmlx.backends.torch.cache import KVMLXLayer
from kvmlx.session import LayerCache
from kvmlx.types import UnsupportedModelError


class KVMLXHybridLayer(KVMLXLayer, LinearAttentionAndFullAttentionLayer):
    """One layer's compressed cache, and the states that transformers keeps beside it.

    Args:
        layer: the cache of the layer's attention.
        states: transformers' own cache of the layer's states; they become this one's.
        early: as KVMLXLayer has it.
    """

    is_croppable = False  # type: ignore[assignment]

    def __init__(self, layer: LayerCache, states: LinearAttentionLayer, *, early: bool = False) -> None:
        super().__init__(layer, early=early)
        vars(self).update(vars(states) | {"is_initialized": self.is_initialized})

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # As transformers' own layer of this kind tells the calls apart: rows come by place, states by name.
        if args:
            KVMLXLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Become empty, as it was made."""
        KVMLXLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def pick(self, rows: Sequence[int]) -> None:
        """Become the cache of these sequences, in order."""
        KVMLXLayer.pick(self, rows)
        LinearAttentionLayer.reorder_cache(self, torch.tensor(rows))  # type: ignore[arg-type]

    def activate_past_recording(self) -> NoReturn:
        """Raise: a state cannot take tokens back."""
        raise UnsupportedModelError(
            "a layer with a recurrent state cannot take tokens back, as crop and assisted decoding do"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Raise, unless nothing is to be removed."""
        if tokens_to_remove and self.columns:
            self.activate_past_recording()


_SLIDING: Any = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None)
"""Not in every version."""
HYBRIDS: dict[type, type] = {KVMLXLayer: KVMLXHybridLayer, DynamicLayer: LinearAttentionAndFullAttentionLayer} | (
    {DynamicSlidingWindowLayer: _SLIDING} if _SLIDING else {}
)
"""Layers with states and rows, by what has such rows alone."""


def parted(layer: Any) -> tuple[LinearAttentionLayer, Any] | None:
    """Return a layer's states and its rows as layers that share them, to be read only; None for other layers."""
    kind = next((rows for rows, both in HYBRIDS.items() if type(layer) is both), None)
    if kind is None:
        return None
    given = {KVMLXLayer: "layer", DynamicSlidingWindowLayer: "sliding_window"}.get(kind)
    parts = LinearAttentionLayer(), kind(*([getattr(layer, given)] if given else []))
    for part in parts:
        vars(part).update({name: vars(layer)[name] for name in vars(part)})
    return parts


def joined(states: LinearAttentionLayer, rows: Any) -> Any:
    """Undo `parted`: return one layer that owns both."""
    if isinstance(rows, KVMLXLayer):
        whole: Any = KVMLXHybridLayer(rows.layer, states)
    elif isinstance(rows, DynamicSlidingWindowLayer):
        whole = _SLIDING(rows.sliding_window)
    else:
        whole = LinearAttentionAndFullAttentionLayer()
    vars(whole).update(vars(states) | vars(rows))
    return whole
