"""What the whole suite shares."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tests.command_line import run, tiny_model  # noqa: F401


def _has_cuda() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


# Without a GPU the Triton kernels are interpreted; triton reads this when a kernel is defined.
if not _has_cuda():
    os.environ.setdefault("TRITON_INTERPRET", "1")
