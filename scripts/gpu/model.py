"""A whole model of Llama-3-8B's shape with random weights: prefill, peak, decoding, beside transformers' own caches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import kvmlx
from scripts.gpu.attention import DTYPE
from scripts.gpu.run import Run, short
from scripts.timing import spread

STRATEGY = "int4"
FULL = "full"
GROUP = 8
"""Decoded tokens of a sample: nothing waits for the device within one."""
GRAPH_REPLAYS = 20


def build(run: Run) -> Any:
    """Return the model, made on the device, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = run.sizes
    config = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.dim,
        max_position_embeddings=4 * s.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with run.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def caches(run: Run, net: Any) -> dict[str, Callable[[], Any]]:
    """Return what makes each cache, ours second: where time runs out, the last are missing.

    The baselines are transformers' two caches, and kvmlx's own that changes nothing: it appends in place, which
    transformers' dynamic one does not.
    """
    from transformers import DynamicCache, StaticCache

    s = run.sizes
    room = s.context + 2 * s.steps + 2 * GROUP + 8

    def static() -> Any:
        return StaticCache(config=net.config, max_cache_len=room)

    return {
        "dynamic": lambda: DynamicCache(config=net.config),
        STRATEGY: lambda: kvmlx.make_prompt_cache(net, STRATEGY),
        FULL: lambda: kvmlx.make_prompt_cache(net, FULL),
        "static": static,
    }


class Driver:
    """Feeds one cache, as `generate` would, without what `generate` does beside."""

    def __init__(self, run: Run, net: Any, cache: Any, batch: int) -> None:
        self.run, self.net, self.cache = run, net, cache
        self.seen = 0
        generator = torch.Generator(run.device).manual_seed(1)
        shape = (batch, run.sizes.context)
        self.prompt = torch.randint(run.sizes.vocabulary, shape, device=run.device, generator=generator)
        self.next = self.prompt[:, :1]

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        at = torch.arange(self.seen, self.seen + n, device=ids.device)
        out = self.net(
            input_ids=ids,
            past_key_values=self.cache,
            position_ids=at[None].expand(ids.shape[0], -1),
            cache_position=at,
            use_cache=True,
            logits_to_keep=1,
        )
        self.seen += n
        return out.logits[:, -1]

    def prefill(self) -> Tensor:
        logits = None
        for part in self.prompt.split(self.run.sizes.model_chunk, dim=1):
            logits = self.forward(part)
        assert logits is not None
        self.next = logits.argmax(-1, keepdim=True)
        return logits

    def decode(self) -> Tensor:
        logits = self.forward(self.next)
        self.next = logits.argmax(-1, keepdim=True)
        return logits


def kv_bytes(cache: Any) -> int:
    """Return the bytes that a cache's arrays hold, those of the sequence so far where it knows them."""
    if type(cache).__module__.startswith("kvmlx"):
        return kvmlx.report(cache).nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@torch.inference_mode()
def one(run: Run, net: Any, make: Callable[[], Any], batch: int) -> dict[str, Any]:
    """Fill a cache with a prompt, then decode: times, the peak beyond the weights, the bytes that it holds."""
    row: dict[str, Any] = {}
    driver = Driver(run, net, make(), batch)
    run.synchronize()
    if run.cuda:
        base = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
    begin = time.perf_counter()
    logits = driver.prefill()
    run.synchronize()
    row["prefill_s"] = time.perf_counter() - begin
    if run.cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated(run.device) - base
    row["finite"] = bool(torch.isfinite(logits).all())
    for _ in range(3):
        driver.decode()
    run.synchronize()
    seconds = []
    group = min(GROUP, run.sizes.steps)
    for _ in range(max(1, run.sizes.steps // group)):
        begin = time.perf_counter()
        for _ in range(group):
            driver.decode()
        run.synchronize()
        seconds.append((time.perf_counter() - begin) / group)
    row["eager"] = spread(seconds)
    row["tokens_per_s"] = batch * 1e3 / row["eager"]["ms"]
    row["kv_bytes"] = kv_bytes(driver.cache)
    row["tokens"] = driver.seen
    if run.cuda:
        row["graph"] = _graph(run, driver)
    return row


def _graph(run: Run, driver: Driver) -> dict[str, Any]:
    """Capture one decode step and replay it: the device's time of a step, without the host's."""
    stream = torch.cuda.Stream(run.device)
    stream.wait_stream(torch.cuda.current_stream(run.device))
    with torch.cuda.stream(stream):
        driver.decode()
    run.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            driver.decode()
    # Whatever the capture refuses: it is said, and the eager times stand.
    except Exception as error:
        run.synchronize()
        return {"refused": short(error)}
    seconds = [run.timed(graph.replay) for _ in range(GRAPH_REPLAYS)]
    return spread(seconds[2:])


def model(run: Run, found: dict[str, Any]) -> None:
    """Measure each batch with each cache, ours against the better of the others."""
    if find_spec("transformers") is None:
        found["skipped"] = "transformers is not installed"
        run.say(found["skipped"])
        return
    run.need(60 if run.cuda else 0, "the whole model")
    net = build(run)
    found["batches"] = []
    found["strategy"] = STRATEGY
    for batch in run.sizes.batches:
        row: dict[str, Any] = {"name": f"whole model, B={batch}", "batch": batch, "context": run.sizes.context}
        row |= {"caches": {}, "wrong": None}
        found["batches"].append(row)
        for name, make in caches(run, net).items():
            run.need(25 if run.cuda else 0, f"{name} cache, B={batch}")
            net.set_attn_implementation("sdpa")
            try:
                row["caches"][name] = one(run, net, make, batch)
            # Out of memory, most likely: the other caches still say something.
            except Exception as error:
                row["caches"][name] = {"refused": short(error)}
                if name == STRATEGY:
                    row["wrong"] = short(error)
            _say(run, name, row["caches"][name])
            gc.collect()
            run.free()
            _compare(row)
            run.save()
    del net
    gc.collect()


def _say(run: Run, name: str, row: dict[str, Any]) -> None:
    if "refused" in row:
        run.say(f"  {name}: {row['refused']}")
        return
    peak = f", peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
    graph = row.get("graph", {})
    replay = f", {graph['ms']:.2f} ms replayed" if "ms" in graph else f", {graph.get('refused', 'no graph')}"
    run.say(
        f"  {name}: prefill {row['prefill_s']:.2f} s{peak}, {row['tokens_per_s']:.1f} tokens/s "
        f"({row['eager']['ms']:.2f} ms a step{replay}), KV {row['kv_bytes'] / 2**30:.3f} GiB"
    )


def _compare(row: dict[str, Any]) -> None:
    """Put ours beside the best of the others into the row, as far as there are any."""
    done = {name: x for name, x in row["caches"].items() if "refused" not in x}
    others = [x for name, x in done.items() if name != STRATEGY]
    if STRATEGY not in done or not others:
        return
    ours = done[STRATEGY]
    if not ours["finite"] and any(x["finite"] for x in others):
        row["wrong"] = "the logits are not finite"
    row["speed_up_eager"] = ours["tokens_per_s"] / max(x["tokens_per_s"] for x in others)
    graphs = [x["graph"]["ms"] for x in others if "ms" in x.get("graph", {})]
    if graphs and "ms" in ours.get("graph", {}):
        row["speed_up_graph"] = min(graphs) / ours["graph"]["ms"]
    dynamic = done.get("dynamic")
    if dynamic:
        row["kv_ratio"] = ours["kv_bytes"] / dynamic["kv_bytes"]
        if "peak_bytes" in dynamic:
            row["peak_ratio"] = ours["peak_bytes"] / dynamic["peak_bytes"]
