"""Check and measure kvmlx's Triton kernels on this machine's GPU: correctness first, a short table last.

    python scripts/gpu_check.py --out results.json
    python scripts/gpu_check.py --only copy,decode --seconds 300

Needs torch, triton, numpy, safetensors and this repository; the whole model also transformers. Results are written
after every part, so a run that is stopped leaves what it had. A part that fails is reported, and the next goes on.
Exit code: 0; 1 where something is wrong; 2 without a GPU. `--dry-run` does everything in small on the CPU, kernels
interpreted: whether it runs, not how fast.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "selftest": "correctness.on_device",
    "pytest": "correctness.tests",
    "sanitizer": "correctness.sanitizer",
    "copy": "bandwidth.copy",
    "decode": "attention.decode",
    "graph": "attention.graph",
    "sweep": "sweep.sweep",
    "encode": "work.encode",
    "prefill": "attention.prefill",
    "column_sums": "work.column_sums",
    "compact": "work.compact",
    "model": "model.model",
}
"""What runs each part, in the order in which they run."""
NO_GPU = 2


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PARTS", help=f"comma-separated, of {','.join(PARTS)}")
    parser.add_argument("--skip", metavar="PARTS", default="", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=480.0, help="budget; what does not fit is left out (480)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here, after every part")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, interpreted on the CPU")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for option in ("only", "skip"):
        unknown = set((getattr(args, option) or "").split(",")) - {*PARTS, ""}
        if unknown:
            parser.error(f"--{option}: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    wanted = args.only.split(",") if args.only else list(PARTS)
    args.parts = [part for part in PARTS if part in wanted and part not in args.skip.split(",")]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if args.dry_run:
        # Triton reads it when a kernel is defined, that is, when a backend is imported.
        os.environ |= {"TRITON_INTERPRET": "1", "KVMLX_KERNELS": "triton"}
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked and nothing measured (--dry-run exercises the script)")
        return NO_GPU
    from scripts.gpu.run import DRY, Run, Sizes

    if args.dry_run:
        torch.set_num_threads(1)
    device = torch.device("cpu" if args.dry_run else f"cuda:{torch.cuda.current_device()}")
    deadline = time.monotonic() + args.seconds
    run = Run(device, DRY if args.dry_run else Sizes(), args.dry_run, deadline, args.out)
    if args.worker:
        from scripts.gpu import correctness

        kind, share, *only = args.worker
        return correctness.worker(run, kind, share, only)
    return check(run, args.parts)


def check(run: Any, parts: list[str]) -> int:
    """Run the parts in order, each on its own; return the exit code."""
    from scripts.gpu import verdict
    from scripts.gpu.environment import environment
    from scripts.gpu.run import OutOfTime, short

    run.document |= {"environment": environment(run), "parts": {}, "problems": {}}
    for name, value in run.document["environment"].items():
        run.say(f"{name}: {value}")
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        sys.exit(128 + number)

    # A run that somebody stops still says what it found.
    signal.signal(signal.SIGTERM, stop)
    try:
        for name in parts:
            # Somebody's `except:` may have kept the exit from coming through.
            if stopped:
                break
            begin = time.monotonic()
            run.say(f"\n== {name} ({run.left:.0f} s left)")
            found: dict[str, Any] = {}
            run.document["parts"][name] = found
            try:
                run.need(0, name)
                part(name)(run, found)
            except OutOfTime as reason:
                run.document["problems"][name] = f"left out: {reason}"
                run.say(f"left out: {reason}")
            # Whatever a part raises, the next one still says something.
            except Exception as error:
                run.document["problems"][name] = short(error)
                run.say("".join(traceback.format_exception(error, limit=-4)))
            found["part_seconds"] = time.monotonic() - begin
            run.free()
            run.save()
    finally:
        run.document["verdict"] = verdict.judge(run)
        run.save()
        for line in verdict.lines(run):
            run.say(line)
    return 128 + stopped[0] if stopped else int(verdict.wrong(run) != [])


def part(name: str) -> Any:
    """Return what runs a part: imported here, so that one that cannot be imported does not stop the others."""
    module, _, function = PARTS[name].partition(".")
    return getattr(import_module(f"scripts.gpu.{module}"), function)


if __name__ == "__main__":
    sys.exit(main())
