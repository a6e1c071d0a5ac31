"""Which of torch's paths a device gets: Triton kernels, or plain operations."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from kvmlx.backends.torch.ops import TorchBackend, on
from kvmlx.types import KVMLXError

if TYPE_CHECKING:
    from kvmlx.backends.torch.triton.backend import TritonBackend

VARIABLE = "KVMLX_KERNELS"
"""Environment variable: ``auto`` (the default), ``triton`` or ``plain``."""


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"the device is {device.type}, not a CUDA or ROCm GPU"


def backend(device: torch.device | str | None = None) -> TorchBackend | TritonBackend:
    """Return the backend of a device: Triton kernels on a GPU, plain operations elsewhere, unless $KVMLX_KERNELS says.

    Interpreted kernels ($TRITON_INTERPRET=1, on the CPU) are for tests: they run where ``triton`` is asked for.

    Args:
        device: None for the machine's best.

    Raises:
        KVMLXError: the variable asks for kernels that cannot run here, or for something unknown.
    """
    device = _numbered(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    asked = os.environ.get(VARIABLE, "auto")
    if asked == "metal":
        raise KVMLXError(
            f"{VARIABLE}=metal asks for Metal kernels, but torch's are Triton's: auto, triton or plain works"
        )
    if asked not in ("auto", "triton", "plain"):
        raise KVMLXError(f"{VARIABLE}={asked!r} is none of auto, triton, plain")
    why = why_no_triton(device)
    if asked == "triton" and why:
        raise KVMLXError(f"{VARIABLE}=triton asks for Triton kernels, but {why}; auto or plain works here")
    if asked == "plain" or why or (asked == "auto" and device.type == "cpu"):
        return on(str(device))
    from kvmlx.backends.torch.triton import backend as triton

    return triton.on(str(device))


def _numbered(device: torch.device) -> torch.device:
    """Return the device with its number: ``cuda`` is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
