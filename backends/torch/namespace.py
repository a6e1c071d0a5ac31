"""torch under the Python array API's names that the stages use, for the arrays of one device.

array-api-compat would give the names, but neither a default device nor takes and concatenations of uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scalar = bool | int | float


class Namespace:
    """Functions that make arrays make them on ``device``; the others go where their arguments are."""

    __name__ = "torch"

    bool = torch.bool
    uint8, uint16 = torch.uint8, torch.uint16
    int32, int64 = torch.int32, torch.int64
    float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    finfo = staticmethod(torch.finfo)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    # -- making -------------------------------------------------------------------------------------------------------

    def zeros(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def full(self, shape: Sequence[int], value: Scalar, *, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=self.device)

    def arange(self, *bounds: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.arange(*bounds, dtype=dtype, device=self.device)

    zeros_like, ones_like = staticmethod(torch.zeros_like), staticmethod(torch.ones_like)

    # -- shape and dtype ----------------------------------------------------------------------------------------------

    @staticmethod
    def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(shape)

    @staticmethod
    def permute_dims(x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(*axes)

    @staticmethod
    def expand_dims(x: Tensor, *, axis: int) -> Tensor:
        return x.unsqueeze(axis)

    @staticmethod
    def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.expand(shape)

    @staticmethod
    def concat(arrays: Sequence[Tensor], *, axis: int = 0) -> Tensor:
        return _as_integers(arrays[0].dtype, lambda *x: torch.cat(x, dim=axis), *arrays)

    @staticmethod
    def repeat(x: Tensor, count: int, *, axis: int) -> Tensor:
        return x.repeat_interleave(count, dim=axis)

    # -- element by element -------------------------------------------------------------------------------------------

    abs, exp, log = staticmethod(torch.abs), staticmethod(torch.exp), staticmethod(torch.log)
    sqrt, round = staticmethod(torch.sqrt), staticmethod(torch.round)
    add, matmul = staticmethod(torch.add), staticmethod(torch.matmul)

    @staticmethod
    def where(condition: Tensor, a: Tensor | Scalar, b: Tensor | Scalar) -> Tensor:
        return torch.where(condition, a, b)

    @staticmethod
    def maximum(x: Tensor, y: Tensor | Scalar) -> Tensor:
        return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)

    @staticmethod
    def minimum(x: Tensor, y: Tensor | Scalar) -> Tensor:
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)

    @staticmethod
    def clip(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
        return x.clamp(low, high)

    # -- along an axis ------------------------------------------------------------------------------------------------

    @staticmethod
    def sum(x: Tensor, *, axis: int, keepdims: bool = False) -> Tensor:
        return x.sum(dim=axis, keepdim=keepdims)

    @staticmethod
    def mean(x: Tensor, *, axis: int, keepdims: bool = False) -> Tensor:
        return x.mean(dim=axis, keepdim=keepdims)

    @staticmethod
    def max(x: Tensor, *, axis: int, keepdims: bool = False) -> Tensor:
        return x.amax(dim=axis, keepdim=keepdims)

    @staticmethod
    def min(x: Tensor, *, axis: int, keepdims: bool = False) -> Tensor:
        return x.amin(dim=axis, keepdim=keepdims)

    @staticmethod
    def argmax(x: Tensor, *, axis: int) -> Tensor:
        return x.argmax(dim=axis)

    @staticmethod
    def sort(x: Tensor, *, axis: int) -> Tensor:
        return x.sort(dim=axis).values

    @staticmethod
    def argsort(x: Tensor, *, axis: int) -> Tensor:
        return x.argsort(dim=axis, stable=True)

    @staticmethod
    def searchsorted(borders: Tensor, x: Tensor) -> Tensor:
        return torch.searchsorted(borders, x)

    @staticmethod
    def take(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
        """Take along an axis by an index array of any shape, which comes in the axis's place."""
        axis %= x.ndim
        out = _as_integers(x.dtype, lambda x: x.index_select(axis, index.reshape(-1).int()), x)
        return out.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    @staticmethod
    def take_along_axis(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
        return torch.take_along_dim(x, index.long(), dim=axis)


def _as_integers(dtype: torch.dtype, f: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
    """Apply what moves elements: as int16 where they are uint16, for which torch has few kernels."""
    if dtype != torch.uint16:
        return f(*arrays)
    return f(*(x.view(torch.int16) for x in arrays)).view(dtype)
