"""Device and versions, as every result states them."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from typing import Any

import torch

from kvmlx.machine import cpu, software
from scripts.gpu.run import Run


def environment(run: Run) -> dict[str, Any]:
    """Return device, driver, clocks and versions."""
    found: dict[str, Any] = {"device": "CPU, kernels interpreted: these times mean nothing"}
    if run.cuda:
        about = torch.cuda.get_device_properties(run.device)
        found = {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "processors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "l2_mib": round(getattr(about, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "driver": _driver(),
        }
    return found | {"cpu": cpu()} | software("torch", "triton", "numpy", "transformers", "safetensors")


def _driver() -> str | None:
    """Return the driver's version and the clocks that it allows, None where nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    return None
