"""A `transformers.Cache` whose full-attention layers are kvmlx's: what transformers' models and `generate` call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

from kvmlx.backends.rows import RefusingRows
from kvmlx.backends.torch import choose
from kvmlx.session import LayerCache, Session
from kvmlx.types import UnsupportedModelError

PREFIX = "kvmlx_"
"""Begins the names of kvmlx's implementations of attention: ``kvmlx_sdpa``, ``kvmlx_eager``."""
CHUNK_ROWS = 64
"""A forward of so many tokens is part of a prompt, not a draft that may be taken back: rows are encoded at once."""

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """Keep torch.compile out of a function: what it decides on the host is not to be compiled."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class CompressedRows(RefusingRows):
    """Stands for keys or values that only kvmlx can read; a model hands it on to its attention function untouched.

    Anything else done with it is an error, so that a model that computes with its cache cannot go wrong silently.
    """

    __slots__ = ("held", "layer")
    hint = (
        ". If its attention was changed after the cache was made, set it back: "
        f"model.set_attn_implementation('{PREFIX}sdpa')"
    )

    def __init__(self, layer: KVMLXLayer, held: Tensor) -> None:
        self.layer = layer
        self.held = held
        """The exact rows of the side: only their dtype, device and channels are told."""

    @property
    def session(self) -> Session:
        return self.layer.layer.session

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.held.device

    @property
    def shape(self) -> torch.Size:
        """Return (B, H, T, D) as if every token seen were held: models read a length off it."""
        b, h, _, d = self.held.shape
        return torch.Size((b, h, self.layer.columns, d))

    def to(self, *args: Any, **kwargs: Any) -> CompressedRows:
        """Return the same rows: attention reads them where they are, in the precision of the queries."""
        return self

    contiguous = to

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        rows = next(x for x in flat((args, kwargs)) if isinstance(x, CompressedRows))
        rows._refuse(getattr(func, "__name__", str(func)))


def flat(x: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dictionaries hold, however deep."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        for part in x:
            yield from flat(part)
    else:
        yield x


class Padding:
    """Which of a forward's columns are padding, and the way from columns to rows: real tokens first, in order.

    Real tokens in front need no mask but the causal one: attention computes as in a batch without padding.
    """

    def __init__(self, columns: int, mask: np.ndarray) -> None:
        self.columns = columns
        """Columns seen before these."""
        self.real = mask.sum(axis=1)
        """Real tokens ``[B]``."""
        order = np.argsort(~mask, axis=1, kind="stable")
        self._index = {True: order, False: np.argsort(order, axis=1, kind="stable")}
        self._sent: dict[tuple[bool, torch.device], Tensor] = {}

    def to_rows(self, x: Tensor) -> Tensor:
        """Return ``x [B, H, n, D]`` with the padding of each sequence last."""
        return self._moved(x, True)

    def to_columns(self, x: Tensor) -> Tensor:
        """Undo `to_rows`."""
        return self._moved(x, False)

    def _moved(self, x: Tensor, forth: bool) -> Tensor:
        key = forth, x.device
        if key not in self._sent:
            self._sent[key] = torch.from_numpy(self._index[forth]).to(x.device)[:, None, :, None]
        return torch.take_along_dim(x, self._sent[key], dim=2)


class Forward:
    """What the layers of a cache know together of the forward that is running."""

    def __init__(self) -> None:
        self.padding: Padding | None = None
        self.causal: Tensor | None = None
        """A causal mask, made because the model insists on one: it says nothing that attention does not know."""
        self.checked: Tensor | None = None
        """The last mask of the model's own that was found to show no token its future."""


class KVMLXLayer(CacheLayerMixin):
    """One layer's compressed cache. Tokens are counted as transformers does, in columns, padding included."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, layer: LayerCache, *, early: bool = False) -> None:
        super().__init__()
        self.is_initialized = not layer.empty
        self.layer = layer
        self.early = early
        """Whether rows of a prompt are encoded as soon as the layer has attended to them: no other layer needs them."""
        self.identity = layer.strategy.identity
        self.columns = int(layer.offsets.max()) if layer.batch else 0
        """Columns seen; `layer.offsets` counts tokens."""
        self.padded_until = self.columns if (layer.offsets != self.columns).any() else 0
        """How many of these columns may have padding among them."""
        self.forward = Forward()
        self.newest = 0
        """Columns of the last forward."""
        self.in_prompt = True
        """Whether the next single token ends a prompt."""
        self.attended = False
        """Whether the newest tokens' own layer has attended: further layers may share its rows."""

    @property
    def open(self) -> bool:
        """Whether rows are handed out as they are: a cache that changes nothing, of sequences without padding."""
        return self.identity and not self.padded_until

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.layer.trimmable

    # -- what models call -----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the device of the first rows: the layers of a model may lie on several."""
        old, backend = self.layer, choose.backend(key_states.device)
        if old.empty and backend is not old.backend:
            self.layer = LayerCache(backend, old.session, old.layer)
        self.is_initialized = True

    @eager
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedModelError(
                "kvmlx's caches are for inference, no gradient flows through them: run the model under "
                "torch.no_grad(), as generate does, or torch.inference_mode()"
            )
        if torch.is_inference_mode_enabled():
            # Tensors made in inference mode could never be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return self._update(key_states, value_states)
        return self._update(key_states, value_states)

    def _update(self, keys: Tensor, values: Tensor) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        layer, n = self.layer, keys.shape[2]
        if n == 1 and self.in_prompt:
            layer.settle(prompt_end=True)
        self.in_prompt = n > 1 or layer.empty
        padding = self._padding(self.columns)
        if padding is not None:
            keys, values = padding.to_rows(keys), padding.to_rows(values)
            layer.remaining = padding.real
            self.padded_until = self.columns + n
        layer.update(keys, values)
        layer.remaining = None
        self.columns += n
        self.newest = n
        self.attended = False
        store = layer.store
        if self.open:
            return store.keys[:, :, : store.end], store.values[:, :, : store.end]
        return CompressedRows(self, store.keys), CompressedRows(self, store.values)

    def _padding(self, columns: int) -> Padding | None:
        """Return the padding of the forward that began at this many columns."""
        padding = self.forward.padding
        return padding if padding is not None and padding.columns == columns else None

    def attend(self, queries: Tensor, *, scale: float, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Return ``[B, Hq, n, Dv]``: attention of the newest n columns, the last ones of the forward or all.

        Args:
            queries: post-RoPE ``[B, Hq, n, D]``.
            scale: factor of the logits.
            mask: the model's own mask over every column seen, bool or additive.
            sinks: attention-sink logits ``[Hq]``.
        """
        layer, n = self.layer, queries.shape[2]
        padding = self._padding(self.columns - self.newest)
        if mask is not None:
            self._check_mask(mask, n)
        if padding is not None:
            # A layer that shares these rows may come with its last queries only.
            queries = padding.to_rows(functional.pad(queries, (0, 0, self.newest - n, 0)))
        if not self.attended:
            self.attended = True
            out = layer.attend(queries, scale=scale, sinks=sinks, mask=mask)
        else:
            # A further layer that shares these rows; the observations are those of the rows' own layer.
            if mask is not None:
                layer._check_mask(mask)
            out = layer.backend.attend(layer.store, queries, scale=scale, sinks=sinks, mask=mask)
        if self.early and n >= CHUNK_ROWS:
            layer.settle(chunk_end=True)
        return out if padding is None else padding.to_columns(out)[:, :, self.newest - n :]

    def _check_mask(self, mask: Tensor, n: int) -> None:
        """Raise where a mask of the model's own says what a compressed cache cannot do."""
        if self.padded_until:
            raise UnsupportedModelError(
                f"layer {self.layer.layer} brings an attention mask of its own, in a batch with padding: "
                "kvmlx serves the one or the other"
            )
        if n == 1 or mask is self.forward.checked:
            return
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if seen.triu(seen.shape[-1] - n + 1).any():
            raise UnsupportedModelError(
                f"{self.layer.session.model.model_type} lets tokens see later ones (as within an image): a compressed "
                "cache of kvmlx's is causal; 'full' works"
            )
        self.forward.checked = mask

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Older versions give the positions of the new tokens, not how many there are.
        n = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.columns + n, 0

    # -- what generate calls --------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Become empty, as it was made."""
        old = self.layer
        fresh = KVMLXLayer(LayerCache(old.backend, old.session, old.layer), early=self.early)
        fresh.forward, self.forward.padding = self.forward, None
        vars(self).update(vars(fresh))

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: ``-n`` removes the newest n, a positive number is the length that is to remain."""
        n = -tokens_to_remove if tokens_to_remove <= 0 else self.columns - tokens_to_remove
        n = min(n, self.columns)
        if n <= 0:
            return
        self.activate_past_recording()
        if self.columns - n < self.padded_until:
            raise UnsupportedModelError(f"the newest {n} columns have padding among them: they cannot be cropped")
        self.layer.trim(n)
        self.columns -= n

    def activate_past_recording(self) -> None:
        """Raise where tokens cannot be taken back: assisted decoding asks before it begins."""
        if not self.layer.trimmable:
            raise UnsupportedModelError(
                f"{self.layer.strategy} selects or encodes at the prompt's end: it cannot take back tokens, as "
                "assisted decoding does; strategies without a select stage can"
            )

    def offload(self) -> NoReturn:
        raise UnsupportedModelError("kvmlx's caches are not offloaded to the CPU: they stay on the model's device")

    prefetch = offload

    # -- what batches call ----------------------------------------------------------------------------------------

    def pick(self, rows: Sequence[int]) -> None:
        """Become the cache of these sequences, in order."""
        if not self.layer.empty and list(rows) != list(range(self.layer.batch)):
            self.layer = self.layer.take([(self.layer, b) for b in rows])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.pick(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers, or those that a mask shows."""
        self.pick(np.arange(self.layer.batch)[indices.cpu().numpy()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.pick([b for b in range(self.layer.batch) for _ in range(repeats)])

    def forget(self, counts: np.ndarray) -> None:
        """Drop the newest ``counts[b]`` tokens of each sequence, which turned out to be padding."""
        layer = self.layer
        store = layer.store
        sinks = np.minimum(layer.strategy.sinks, store.tail_lengths) if store.has_body else 0
        self.padded_until = self.columns
        if (counts[:, None] <= store.tail_lengths - sinks).all():
            store.drop_newest(counts)
            layer.offsets = layer.offsets - counts
            return
        if not layer.trimmable:
            raise UnsupportedModelError(
                f"the attention mask hides the newest {counts.tolist()} tokens of the sequences, which "
                f"{layer.strategy} has encoded already: leave them visible, as they were when they were read"
            )
        parts = [layer.take([(layer, b)]) for b in range(layer.batch)]
        for part, n in zip(parts, counts, strict=True):
            part.trim(int(n))
        self.layer = layer.take([(part, 0) for part in parts])


class Origin(int):
    """The number 0, where the keys begin by transformers' count. Knows the cache: a mask function sees whose keys."""

    cache: KVMLXCache


class KVMLXCache(Cache):
    """The caches of one model's layers: compressed where the model attends fully, transformers' own elsewhere."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=list(layers))
        self.forward = Forward()
        for layer in self.managed:
            layer.forward = self.forward

    @property
    def managed(self) -> list[KVMLXLayer]:
        """The layers that kvmlx manages."""
        return [layer for layer in self.layers if isinstance(layer, KVMLXLayer)]

    @property
    def open(self) -> bool:
        """Whether the forward that begins gets rows as they are, and masks them itself."""
        return self.managed[0].open and self.forward.padding is None

    @property
    def nbytes(self) -> int:
        """Bytes held by the managed layers."""
        return sum(layer.layer.nbytes for layer in self.managed)

    @eager
    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if not getattr(self.layers[layer_idx], "is_sliding", False):  # the number may be that of a layer without rows
            offset = Origin(offset)
            offset.cache = self
        return length, offset

    def begin(self, n: int, attention_mask: Tensor | None) -> None:
        """Note which of the n columns of the forward that begins are padding.

        The host waits for the mask, as it does in transformers' own mask functions; not for one token of one
        sequence, which is none.
        """
        forward = self.forward
        forward.padding = forward.causal = forward.checked = None
        if attention_mask is None or attention_mask.ndim != 2 or attention_mask.shape[0] == n == 1:
            return
        first = self.managed[0]
        seen = first.columns
        if attention_mask.shape[1] < seen + n:
            raise ValueError(
                f"the attention mask has {attention_mask.shape[1]} columns: the cache has seen {seen} and {n} are "
                f"new, it must have {seen + n}"
            )
        mask = (attention_mask if n > 1 else attention_mask[:, seen : seen + 1]).cpu().numpy().astype(bool)
        if n > 1:
            if first.layer.batch == len(mask):
                self._forget(mask[:, :seen], first.layer.offsets)
            mask = mask[:, seen : seen + n]
        if not mask.all():
            forward.padding = Padding(seen, mask)

    def _forget(self, mask: np.ndarray, offsets: np.ndarray) -> None:
        """Drop tokens that the mask hides by now: what `generate` fed to sequences that had ended."""
        hidden = offsets - mask.sum(axis=1)
        if not hidden.any():
            return
        newest = np.arange(mask.shape[1]) >= mask.shape[1] - hidden[:, None]
        if (hidden < 0).any() or (mask & newest).any():
            raise UnsupportedModelError(
                "the attention mask shows other tokens of the past than those that the cache has read: tokens may be "
                "hidden later only at the end of a sequence"
            )
        for layer in self.managed:
            layer.forget(hidden)

    def reorder_cache(self, beam_idx: Any) -> None:
        rows = beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, KVMLXLayer):
                layer.pick(rows)
            else:
                layer.reorder_cache(beam_idx)
