"""One run: its device, its shapes, the time that is left, and results that are written as soon as they are there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from scripts.timing import spread


class OutOfTime(Exception):
    """The budget is spent: what was measured so far stands."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    shapes: tuple[tuple[int, int], ...] = ((8192, 8), (32768, 1), (131072, 1))
    """Tokens and batch of the decode steps."""
    chunks: tuple[int, ...] = (2048, 8192)
    """New tokens of a prefill."""
    history: int = 32768
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    vocabulary: int = 128256
    context: int = 32768
    """Tokens of the whole model's prompt."""
    batches: tuple[int, ...] = (1, 4)
    """Of the whole model."""
    steps: int = 24
    """Decoded tokens of the whole model."""
    model_chunk: int = 2048
    exact: int = 80
    """Newest rows of a tail: 64 recent ones, and half of the 32 that gather before they are encoded."""
    formats: tuple[str, ...] = ()
    """Those that are timed; empty: all."""
    copy_bytes: int = 1 << 30
    set_bytes: int = 256 << 20
    """Bytes that the input sets of a measurement read at least, all together: more than any L2 holds."""
    samples: int = 25
    sample_seconds: float = 2e-3
    """Repeated until a sample takes as long."""


DRY = Sizes(
    heads=2,
    kv_heads=1,
    dim=64,
    shapes=((96, 1), (128, 1)),
    chunks=(64,),
    history=96,
    hidden=64,
    intermediate=128,
    layers=1,
    vocabulary=128,
    context=288,
    batches=(1,),
    steps=1,
    model_chunk=144,
    exact=12,
    formats=("int4", "int4, a quarter of the tokens", "kivi(bits=2)"),
    copy_bytes=1 << 16,
)
"""What an interpreter does in seconds."""


@dataclass
class Run:
    """Where a part finds its device and puts its results."""

    device: torch.device
    sizes: Sizes
    dry: bool
    deadline: float
    """By time.monotonic()."""
    out: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Raise OutOfTime unless as many seconds are left."""
        if self.left < seconds:
            raise OutOfTime(f"{what} needs about {seconds:.0f} s, {max(self.left, 0):.0f} s are left")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def save(self) -> None:
        """Write the results so far, whole or not at all."""
        if self.out is None:
            return
        beside = self.out.with_name(f".{self.out.name}.tmp")
        beside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.out)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give freed memory back, so that the next measurement finds all of it."""
        if self.cuda:
            torch.cuda.empty_cache()

    def sets(self, read_bytes: float) -> int:
        """Return how many input sets keep data that a call reads from staying in the L2."""
        return 1 if self.dry else max(2, ceil(self.sizes.set_bytes / max(read_bytes, 1)))

    # -- time ---------------------------------------------------------------------------------------------------------

    def measure(
        self, calls: Sequence[Callable[[], Any]], *, graph: bool = True, samples: int | None = None
    ) -> dict[str, Any]:
        """Time calls, each on arrays of its own, one after another; return the spread of the time of one call.

        On a GPU they are captured in a graph and replayed, between events: what the host does takes no time then. Where
        that fails, or ``graph`` is not wanted, they are launched one by one, and ``how`` says so.
        """

        def launched() -> None:
            for call in calls:
                call()

        if not self.cuda:
            return spread([self.timed(launched) / len(calls)]) | {"how": "interpreted", "sets": len(calls)}
        captured, how = self.captured(launched) if graph else (None, "launched")
        play = captured or launched
        play()
        repeats = max(1, ceil(self.sizes.sample_seconds / max(self.timed(play), 1e-7)))
        n = samples or self.sizes.samples
        seconds = [self.timed(play, repeats) / len(calls) for _ in range(n + 1)]
        return spread(seconds[1:]) | {"how": how, "sets": len(calls)}

    def timed(self, play: Callable[[], Any], repeats: int = 1) -> float:
        """Return the seconds of one of so many repetitions."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeats):
                play()
            return (time.perf_counter() - begin) / repeats
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            play()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats

    def captured(self, play: Callable[[], Any]) -> tuple[Callable[[], None] | None, str]:
        """Return what replays the work of a function, None where it cannot be captured, and how it runs."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            play()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                play()
        # Whatever the capture refuses: the work is then timed as it is launched, and the result says so.
        except Exception as error:
            self.synchronize()
            return None, f"launched, not captured: {short(error)}"
        return graph.replay, "graph"


def short(error: BaseException) -> str:
    """Return an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
