"""Kernels that break the rules of scripts/compile_triton.py, on purpose; compiled by tests/test_triton_compile.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from kvmlx.backends.torch.triton.launch import TritonKernel, recording


@triton.jit(do_not_specialize=["n"])
def good_kernel(x, out, n, D: tl.constexpr):
    """Multiply tiles by their transpose, n rows in all."""
    r, c = tl.arange(0, 64), tl.arange(0, D)
    total = tl.zeros((64, 64), tl.float32)
    for first in range(0, n, 64):
        rows = first + r
        tile = tl.load(x + rows[:, None] * D + c[None, :], mask=(rows < n)[:, None], other=0.0)
        total += tl.dot(tile, tl.trans(tile))
    tl.store(out + r[:, None] * 64 + r[None, :], total)


@triton.jit(do_not_specialize=["n"])
def spilling_kernel(x, out, n, D: tl.constexpr):
    """Hold [256, 128] sums: with one warp, more than its registers."""
    r, s, c = tl.arange(0, 256), tl.arange(0, 128), tl.arange(0, 16)
    total = tl.zeros((256, 128), tl.float32)
    for first in range(0, n, 16):
        left = tl.load(x + r[:, None] * D + first + c[None, :], mask=(first + c < n)[None, :], other=0.0)
        right = tl.load(x + s[:, None] * D + first + c[None, :], mask=(first + c < n)[None, :], other=0.0)
        total += tl.dot(left, tl.trans(right))
    tl.store(out + r[:, None] * 128 + s[None, :], total)


@triton.jit(do_not_specialize=["n"])
def scalar_kernel(x, out, n, D: tl.constexpr):
    """Multiply in float32: on NVIDIA no instruction for the matrix units."""
    r, c = tl.arange(0, 16), tl.arange(0, D)
    total = tl.zeros((16, 16), tl.float32)
    for first in range(0, n, 16):
        rows = first + r
        tile = tl.load(x + rows[:, None] * D + c[None, :], mask=(rows < n)[:, None], other=0.0).to(tl.float32)
        total += tl.dot(tile, tl.trans(tile), input_precision="ieee")
    tl.store(out + r[:, None] * 16 + r[None, :], total)


@triton.jit
def specializing_kernel(x, out, n, D: tl.constexpr):
    """Let Triton compile a variant for n = 1 and one for multiples of 16."""
    c = tl.arange(0, D)
    tl.store(out + c, tl.load(x + c, mask=c < n, other=0.0))


@triton.jit(do_not_specialize=["n"])
def failing_kernel(x, out, n, D: tl.constexpr):
    """Use a name that is not there."""
    c = tl.arange(0, D)
    tl.store(out + c, tl.load(x + no_such_name, mask=c < n, other=0.0))  # noqa: F821  # type: ignore[name-defined]


@triton.jit(do_not_specialize=["n"])
def greedy_kernel(x, out, n, D: tl.constexpr):
    """Multiply tiles of [128, 256]: more operands than gfx942 has shared memory."""
    r, c = tl.arange(0, 128), tl.arange(0, 256)
    total = tl.zeros((128, 128), tl.float32)
    for first in range(0, n, 128):
        left = tl.load(x + (first + r)[:, None] * 256 + c[None, :])
        right = tl.load(x + (n + first + r)[:, None] * 256 + c[None, :])
        total += tl.dot(left, tl.trans(right))
    tl.store(out + r[:, None] * 128 + r[None, :], total)


KERNELS = {
    good_kernel: 4,
    spilling_kernel: 1,
    scalar_kernel: 4,
    specializing_kernel: 4,
    failing_kernel: 4,
    greedy_kernel: 8,
}
"""Warps of each."""


def compiled(cache: str, *targets: str) -> None:
    """Compile the kernels and print as JSON what is found of each, by kernel and target."""
    from scripts import compile_triton as c

    x, out = torch.zeros(256, 128, dtype=torch.bfloat16), torch.zeros(256, 256)
    with recording() as launches:
        for kernel, num_warps in KERNELS.items():
            TritonKernel(kernel)((1,), {"x": x, "out": out, "n": 64}, {"D": 128}, num_warps=num_warps)
    made = c.compile_all([c.job_of(launch, target) for launch in launches for target in targets], Path(cache))
    found = {}
    for job, code in made:
        wrong = [] if "error" in code else c.faults(code)
        found[f"{job.name} {job.target}"] = {"code": code, "wrong": wrong}
    specialized = {launch.name: c.specialized(launch.fn, launch.signature) for launch in launches}
    print(json.dumps({"found": found, "specialized": specialized}))
