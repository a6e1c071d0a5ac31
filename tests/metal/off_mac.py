"""Put the execution off-Mac in the place of MLX's own launch, for tests and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from kvmlx.backends.mlx.metal import loader
from tests.metal.device import Device, Launch


@contextmanager
def off_mac(device: Device) -> Iterator[list[tuple[str, Launch]]]:
    """Run every kernel that kvmlx launches on ``device``; yield (kernel's name, what it did), in order."""
    ran: list[tuple[str, Launch]] = []

    def launch(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        run = device.launch(kernel.function, input_names=kernel.inputs, output_names=kernel.outputs, **arguments)
        ran.append((kernel.name, run))
        return run.outputs

    own = loader.launch
    loader.launch = launch
    try:
        yield ran
    finally:
        loader.launch = own
