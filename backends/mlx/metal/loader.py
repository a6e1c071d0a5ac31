"""Hand the `.metal` files to MLX: the one place that makes and launches a kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from kvmlx.metal_kernels import source

SMALL = 8
"""MLX hands inputs of fewer elements over in the constant address space."""


class MetalKernel:
    """A templated function of a `.metal` file as a kernel of MLX.

    Args:
        file: the `.metal` file, without its ending.
        body: the source of the kernel proper: one call of a function of the file.
        inputs: names of the arrays, in the order in which `body` names them.
        outputs: names of the results.
        constants: inputs of fewer than SMALL elements, which the kernel takes as ``const constant``: a GPU keeps them
            at hand. All others are ``const device``.
    """

    def __init__(
        self,
        name: str,
        *,
        file: str,
        body: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        constants: Sequence[str] = (),
    ) -> None:
        self.name, self.file, self.body = name, file, body
        self.inputs, self.outputs, self.constants = list(inputs), list(outputs), frozenset(constants)

    @cached_property
    def function(self) -> Any:
        """The kernel as MLX has it. Its name holds a hash: MLX caches what it compiled by name."""
        header = source(self.file)
        digest = hashlib.sha256((header + self.body).encode()).hexdigest()[:10]
        return mx.fast.metal_kernel(
            name=f"kvmlx_{self.name}_{digest}",
            input_names=self.inputs,
            output_names=self.outputs,
            header=header,
            source=self.body,
        )

    def __call__(
        self,
        inputs: Mapping[str, mx.array],
        *,
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Launch it over ``grid`` threadgroups of ``threadgroup`` threads and return the outputs.

        Device inputs of fewer than SMALL elements are padded with zeros: an address space must not depend on a length.
        Inputs without dimensions are numbers to the kernel.
        """
        given = [self._placed(name, inputs[name]) for name in self.inputs]
        threads = tuple(g * t for g, t in zip(grid, threadgroup, strict=True))
        return launch(
            self,
            inputs=given,
            template=list(template),
            grid=threads,
            threadgroup=threadgroup,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )

    def _placed(self, name: str, x: mx.array) -> mx.array:
        small = x.size < SMALL
        if name in self.constants:
            assert small, f"{name} has {x.size} elements: too many for the constant address space"
            return x
        return mx.pad(x.reshape(-1), (0, SMALL - x.size)) if small and x.ndim else x


def launch(kernel: MetalKernel, **arguments: Any) -> list[mx.array]:
    """Run a kernel on the GPU. The tests put their execution off-Mac in this function's place."""
    return kernel.function(**arguments)


def integers(*numbers: int, least: int = 0) -> mx.array:
    """Return host integers for a kernel, int32, with zeros behind them up to ``least``."""
    return mx.array(np.array([*numbers, *[0] * (least - len(numbers))], np.int32))


def floats(x: mx.array | None) -> mx.array:
    """Return ``x`` in float32, or what stands for it where there is none."""
    return nothing(mx.float32) if x is None else x.astype(mx.float32)


@cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """Return what stands for an array that a kernel has no use for.

    From host memory: an array that waits for its thread's stream cannot be kept for other threads.
    """
    return mx.array(np.zeros(SMALL, str(dtype).rpartition(".")[2]))
