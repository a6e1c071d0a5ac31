"""How Triton kernels are launched, and how launches are recorded instead, to be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.uint16: "u16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
"""Triton's names of the dtypes that kernels read and write."""


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: enough to compile it for another machine."""

    fn: Any
    """The `triton.jit` function."""
    grid: tuple[int, ...]
    signature: dict[str, str]
    """Type of every argument, ``"*fp16"``, ``"i32"``, ``"fp32"``; ``"constexpr"`` for those compiled in."""
    constants: dict[str, Any] = field(hash=False)
    num_warps: int
    num_stages: int
    fp_fusion: bool = True
    """Whether a product and a sum may become one multiply-add, of one rounding (Triton's `enable_fp_fusion`)."""

    @property
    def name(self) -> str:
        return self.fn.__name__


@dataclass(frozen=True)
class Chip:
    """What launches choose their tiles by."""

    backend: str = "cuda"
    """``"cuda"`` or ``"hip"``."""
    capability: int = 90
    """NVIDIA's compute capability, 10 * major + minor; 0 for AMD's."""


H100, A100, MI300X = Chip(), Chip(capability=80), Chip("hip", 0)

_RECORDED: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_CHIP: ContextVar[Chip] = ContextVar("chip", default=H100)


@contextmanager
def recording(chip: Chip = H100) -> Iterator[list[Launch]]:
    """Note launches in the list that is yielded, and run nothing: outputs stay as they were allocated.

    ``chip``: what CPU tensors stand for.
    """
    launches: list[Launch] = []
    tokens = _RECORDED.set(launches), _CHIP.set(chip)
    try:
        yield launches
    finally:
        _RECORDED.reset(tokens[0])
        _CHIP.reset(tokens[1])


def chip_of(device: torch.device) -> Chip:
    """Return the kind of GPU that a device is; interpreted, an H100 unless `recording` says else."""
    return _real_chip(device) if device.type == "cuda" else _CHIP.get()


@lru_cache
def _real_chip(device: torch.device) -> Chip:
    if torch.version.hip:
        return MI300X
    major, minor = torch.cuda.get_device_capability(device)
    return Chip(capability=10 * major + minor)


@lru_cache
def processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; on a CPU those of an H100, so that work is divided as there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class TritonKernel:
    """A `triton.jit` function, launched by name of argument; ``fp_fusion`` as in `Launch`."""

    def __init__(self, fn: Callable[..., None], *, fp_fusion: bool = True) -> None:
        self.fn: Any = fn
        self.fp_fusion = fp_fusion

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: Mapping[str, Tensor | int | float],
        constants: Mapping[str, Any],
        *,
        num_warps: int,
        num_stages: int = 2,
    ) -> None:
        """Launch ``grid`` programs.

        Args:
            grid: programs along up to three axes; nothing runs where one of them is 0.
            arguments: tensors and numbers that the kernel reads when it runs.
            constants: what is compiled in; never a length.
            num_warps: warps of a program.
            num_stages: loads in flight of a pipelined loop.
        """
        recorded = _RECORDED.get()
        if recorded is not None:
            types = {name: type_of(x) for name, x in arguments.items()} | dict.fromkeys(constants, "constexpr")
            order = self.fn.arg_names
            signature = {name: types[name] for name in order}
            launch = Launch(self.fn, grid, signature, dict(constants), num_warps, num_stages, self.fp_fusion)
            recorded.append(launch)
        elif 0 not in grid:
            options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": self.fp_fusion}
            self.fn[grid](**arguments, **constants, **options)


def type_of(x: Tensor | int | float) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(x, Tensor):
        return f"*{TYPES[x.dtype]}"
    return "fp32" if isinstance(x, float) else "i32"


@lru_cache(maxsize=1024)
def _uploaded(data: bytes, dtype: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    x = torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())
    return upload(x, device)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def integers(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return int32 numbers on the device; numbers that were there lately are not sent again. Not to be written to."""
    x = np.ascontiguousarray(values, np.int32)
    return _uploaded(x.tobytes(), "int32", x.shape, device)


def constant(x: np.ndarray, device: torch.device) -> Tensor:
    """Return a small constant array on the device, sent once. Not to be written to."""
    x = np.ascontiguousarray(x)
    return _uploaded(x.tobytes(), x.dtype.str, x.shape, device)
