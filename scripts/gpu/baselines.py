"""What others do with exact bf16 rows on the same device: torch's attention with each backend, FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from scripts.gpu.run import short

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = ("gqa", "rows", "expanded")
"""``gqa``: enable_gqa. ``rows``: the query heads of a group as queries of one head, for one new token. ``expanded``:
keys and values repeated for every query head beforehand, where a backend has no enable_gqa; the copy is not timed."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(queries [B, Hq, L, D], keys [B, H, T, D], values) -> [B, Hq, L, D]``."""


@dataclass(frozen=True)
class Baseline:
    name: str
    attend: Attend
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """Makes of the rows what ``attend`` takes; not timed."""


def _as_given(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def sdpa(backend: str, form: str, scale: float) -> Baseline:
    """Return torch's attention through one of its backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask: Any = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
        with sdpa_kernel(BACKENDS[backend]):
            if form == "rows":
                b, hq, n, d = q.shape
                out = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], -1, d), k, v, scale=scale)
                return out.reshape(b, hq, n, v.shape[3])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=form == "gqa")

    return Baseline(f"sdpa {backend}, {form}", attend, _expanded if form == "expanded" else _as_given)


def flex(scale: float, *, compiled: bool, causal: tuple[int, int] | None, device: torch.device) -> Baseline:
    """Return FlexAttention, which decodes with a kernel of its own; ``causal``: queries and keys of a chunk."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One graph for each shape: what is compiled in is its own advantage.
    run: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    mask = None
    if causal is not None:
        n, held = causal

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + held - n

        mask = create_block_mask(seen, None, None, n, held, device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, scale=scale, enable_gqa=True, block_mask=mask)

    return Baseline("flex", attend, _as_given)


def available(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, compiled: bool, math: bool = True
) -> tuple[list[Baseline], dict[str, str]]:
    """Return the baselines that run on these rows, and why others do not. ``math`` holds all scores at once."""
    out: list[Baseline] = []
    refused: dict[str, str] = {}
    n, held = q.shape[2], k.shape[2]
    for backend in BACKENDS:
        if backend == "math" and not math:
            refused["sdpa math"] = "its scores would not fit"
            continue
        for form in FORMS:
            if form == "rows" and n > 1:
                continue
            if form == "expanded" and any(b.name == f"sdpa {backend}, gqa" for b in out):
                continue
            _try(sdpa(backend, form, scale), (q, k, v), out, refused)
    try:
        causal = (n, held) if n > 1 else None
        _try(flex(scale, compiled=compiled, causal=causal, device=q.device), (q, k, v), out, refused)
    # FlexAttention compiles: anything may come out of it, and the others still count.
    except Exception as error:
        refused["flex"] = short(error)
    return out, refused


def _try(baseline: Baseline, rows: tuple[Tensor, Tensor, Tensor], out: list[Baseline], refused: dict[str, str]) -> None:
    reasons = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            baseline.attend(*baseline.prepare(*rows))
        out.append(baseline)
        return
    except Exception as error:
        # torch says in warnings why a backend does not take something.
        reasons = [" ".join(str(w.message).split()) for w in said if "not" in str(w.message)]
        refused[baseline.name] = "; ".join([short(error), *reasons])[:400]
