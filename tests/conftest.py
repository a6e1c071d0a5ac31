"""What the whole suite shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

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


@pytest.fixture(autouse=True)
def one_thread_of_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run torch's tiny operations on one thread, many times faster than shared among several; not a real model's."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("model"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
