"""Measure what the README and docs quote, and write it to docs/results/.

    python -m scripts.measure memory|peak|quality|needles|speed [--quick] [--kv STRATEGY ...]
    python -m scripts.measure render

Each part writes docs/results/<part>.json with machine, versions, shapes, medians and spread; `render` turns them
into docs/results/README.md. On Linux run it through scripts/with-openblas, or MLX's matrix products take 30 times
as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.models.cache import make_prompt_cache as stock_cache
from rich.console import Console
from rich.progress import track

import kvmlx
from kvmlx.backends.mlx import layers_of
from kvmlx.bench.tasks.haystack import prose
from kvmlx.demo_model import ensure_demo_model
from kvmlx.machine import cpu, software
from kvmlx.strategy import PRESETS, Strategy
from scripts.timing import quartiles

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
console = Console(stderr=True)

HEADS, KV_HEADS, DIM, LAYERS = 8, 4, 128, 2
"""Shape of the memory part: the head dim of the 8B models; few heads and layers, as bytes scale with them."""

MEMORY = [
    "full",
    "int8",
    "int4",
    "int3",
    "int2",
    "int(k=8, v=4)",
    "int4(rotate=hadamard)",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "turboquant(bits=4)",
    *PRESETS,
    "random(budget=0.25)",
    "streaming(budget=0.25)",
    "h2o(budget=0.25)",
    "tova(budget=0.25)",
    "snapkv(budget=0.25)",
    "keydiff(budget=0.25)",
    "knorm(budget=0.25)",
    "expected_attention(budget=0.25)",
    "snapkv(budget=0.25) | pyramidkv",
    "snapkv(budget=0.25) | adakv",
    "snapkv(budget=0.25) | keepkv",
    "snapkv(budget=0.25) | int4",
    "snapkv(budget=0.25) | adakv | int4",
    "snapkv(budget=0.25) | small",
]
QUALITY = [*PRESETS, "int8", "int4"]
NEEDLES = ["snapkv(budget=0.25)", "snapkv(budget=0.25) | small", "streaming(budget=0.25)"]
PEAK = [
    "full",
    "int4",
    "balanced",
    "snapkv(budget=0.25)",
    "snapkv(budget=0.25) | small",
    "snapkv(budget=0.25) | adakv",
    "snapkv(budget=0.25) | keepkv",
    "h2o(budget=0.25)",
    "expected_attention(budget=0.25)",
    "snapkv(budget=0.25) | bounded",
    "snapkv(budget=0.25) | small | bounded",
]
CHUNK = 512


def machine() -> dict[str, Any]:
    """Return hardware and versions, as every result states them."""
    return {"cpu": cpu(), "device": str(mx.default_device()), **software("mlx", "mlx-lm", "numpy")}


def write(part: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = {"part": part, "machine": machine(), "settings": settings, "rows": rows}
    (RESULTS / f"{part}.json").write_text(json.dumps(out, indent=1) + "\n")
    console.print(f"wrote docs/results/{part}.json")


def body_bits(strategy: Strategy, dim: int) -> float | None:
    """Return bits per element of the encoded body with its metadata, mean of keys and values; None if exact."""
    codecs = strategy.codecs()
    if not any(codecs):
        return None
    bits = [16.0 if c is None else sum(p.row_bytes for p in c.planes(dim)) * 8 / dim for c in codecs]
    return sum(bits) / 2


class Block(nn.Module):
    """What kvmlx reads off a model's block: heads, head dim and rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.n_heads, self.self_attn.n_kv_heads, self.self_attn.head_dim = HEADS, KV_HEADS, DIM
        self.self_attn.rope = nn.RoPE(DIM)


class Attention:
    """Layers of attention without a model around them: what they hold is what the cache holds."""

    model_type = "attention-only"

    def __init__(self) -> None:
        self.layers = [Block() for _ in range(LAYERS)]

    def fill(self, caches: list[Any], tokens: int, chunk: int, dtype: Any) -> None:
        """Prefill ``tokens`` random rows in chunks, then one as a decode step; outputs are not computed."""
        from mlx_lm.models.base import scaled_dot_product_attention as attend

        keys = [mx.random.key(i) for i in range(LAYERS)]
        sizes = [min(chunk, tokens - 1 - at) for at in range(0, tokens - 1, chunk)] + [1]
        for n, part in enumerate(sizes):
            for i, cache in enumerate(caches):
                seeds = mx.random.split(mx.random.split(keys[i], len(sizes))[n], 3)
                q, k, v = (
                    mx.random.normal((1, h, part, DIM), key=s).astype(dtype)
                    for h, s in zip((HEADS, KV_HEADS, KV_HEADS), seeds, strict=True)
                )
                mask: Any = "causal" if part > 1 else None
                attend(q, *cache.update_and_fetch(k, v), cache=cache, scale=DIM**-0.5, mask=mask)
            if part > 1:
                mx.eval([c.state for c in caches])


def measure_memory(texts: list[str], tokens: int) -> None:
    """Held bytes (allocator), nbytes, and the format's arithmetic, after a prefill of ``tokens``."""
    model, rows = Attention(), []
    full = LAYERS * tokens * KV_HEADS * DIM * 2 * 2
    for text in track(texts, description="memory", console=console):
        strategy = Strategy.parse(text)
        mx.clear_cache()
        before = mx.get_active_memory()
        caches = kvmlx.make_prompt_cache(model, strategy)
        model.fill(caches, tokens, CHUNK, mx.float16)
        kvmlx.settle(caches)
        held = mx.get_active_memory() - before
        report = kvmlx.report(caches)
        rows.append(
            {
                "strategy": text,
                "held_bytes": held,
                "nbytes": report.nbytes,
                "format_bytes": format_bytes(caches),
                "ratio": report.nbytes / full,
                "kept": report.kept_tokens / tokens,
            }
        )
        del caches
    shape = f"{LAYERS} layers, {KV_HEADS} KV heads, D={DIM}, {tokens} tokens, chunks of {CHUNK}, float16"
    write("memory", {"shape": shape, "full_bytes": full}, rows)


def format_bytes(caches: list[Any]) -> int:
    """Return what docs/format.md says the rows take, without head-room: spans and tail as long as they are used."""
    total = 0.0
    for layer in layers_of(caches):
        store = layer.store
        _, _, d, dv = store.shape
        columns = 4 * len(store.column_names)
        total += int(store.tail_lengths.sum()) * ((d + dv) * 2 + columns)
        if store.codecs is not None:
            planes = [p for c, x in zip(store.codecs, (d, dv), strict=True) for p in c.planes(x)]
            total += int(store.length.sum()) * (sum(p.row_bytes for p in planes) + columns)
        total += sum(a.nbytes for n, a in layer.arrays().items() if n in ("queries", "moments.sum", "moments.outer"))
    return int(total)


def demo_model() -> tuple[Any, Any]:
    model, tokenizer = load(str(ensure_demo_model()))[:2]
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, tokenizer


def prefill(model: Any, caches: list[Any], tokens: np.ndarray, chunk: int) -> None:
    for at in range(0, len(tokens), chunk):
        model(mx.array(tokens[at : at + chunk])[None], cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()


def logprobs(model: Any, caches: list[Any], tokens: np.ndarray, n_prefix: int) -> Iterable[np.ndarray]:
    """Yield the log-probabilities after each token past the prefix, the tokens fed one at a time."""
    prefill(model, caches, tokens[:n_prefix], CHUNK)
    for token in tokens[n_prefix:]:
        logits = model(mx.array([[int(token)]]), cache=caches)[0, -1].astype(mx.float32)
        yield np.array(logits - mx.logsumexp(logits))


def measure_peak(texts: list[str], tokens: int) -> None:
    """Peak of a real prefill and of the two steps after it, and what the cache held between its chunks."""
    model, tokenizer = demo_model()
    ids = np.array(tokenizer.encode(prose())[: tokens + 2])
    rows = []
    for name in track(["stock", *texts], description="peak", console=console):
        mx.clear_cache()
        before = mx.get_active_memory()
        caches = stock_cache(model) if name == "stock" else kvmlx.make_prompt_cache(model, name)
        mx.reset_peak_memory()
        between = 0
        for at in range(0, tokens, CHUNK):
            prefill(model, caches, ids[at : min(tokens, at + CHUNK)], CHUNK)
            between = max(between, mx.get_active_memory() - before)
        for token in ids[tokens:]:
            mx.eval(model(mx.array([[int(token)]]), cache=caches))
        rows.append({"strategy": name, "peak_bytes": mx.get_peak_memory() - before, "kv_peak_bytes": between})
        del caches
    settings = {"model": "SmolLM2-135M-Instruct, float32", "tokens": tokens, "chunk": CHUNK}
    write("peak", settings, rows)


def quantized(bits: int, group: int) -> Callable[[Any], list[Any]]:
    """Return a maker of mlx-lm's own quantized cache, every token quantized at once."""
    return lambda model: [QuantizedKVCache(group_size=group, bits=bits) for _ in model.layers]


def measure_quality(texts: list[str], n_windows: int, n_prefix: int, n_scored: int) -> None:
    """KL(full || compressed) and flips of the top token, teacher-forced through the cache as a user runs it."""
    model, tokenizer = demo_model()
    ids = np.array(tokenizer.encode(prose()))
    starts = np.linspace(0, len(ids) - n_prefix - n_scored - 1, n_windows).astype(int)
    windows = [ids[s : s + n_prefix + n_scored] for s in starts]
    makers: dict[str, Callable[[Any], list[Any]]] = {
        "mlx-lm affine 8 bits, group 64": quantized(8, 64),
        "mlx-lm affine 4 bits, group 64": quantized(4, 64),
    }
    for text in texts:
        makers[text] = lambda m, text=text: kvmlx.make_prompt_cache(m, text)
    kls: dict[str, list[list[float]]] = {name: [] for name in makers}
    flips: dict[str, list[list[bool]]] = {name: [] for name in makers}
    for w, window in enumerate(windows):
        full = list(logprobs(model, stock_cache(model), window, n_prefix))
        for name, make in track(makers.items(), description=f"quality, text {w + 1} of {n_windows}", console=console):
            other = list(logprobs(model, make(model), window, n_prefix))
            kls[name].append([float(np.sum(np.exp(p) * (p - q))) for p, q in zip(full, other, strict=True)])
            flips[name].append([bool(p.argmax() != q.argmax()) for p, q in zip(full, other, strict=True)])
    dim = model.args.head_dim or model.args.hidden_size // model.args.num_attention_heads
    rows = []
    for name in makers:
        kl, flip = np.array(kls[name]), np.array(flips[name])
        if name in texts and not Strategy.parse(name).identity and not kl.any():
            raise SystemExit(f"{name} changed nothing: the cache was not used")
        rows.append(
            {
                "strategy": name,
                "bits": body_bits(Strategy.parse(name), dim) if name in texts else float(name.split()[2]) + 0.5,
                "kl_mean": float(kl.mean()),
                "kl_p99": float(np.quantile(kl, 0.99)),
                "kl_max": float(kl.max()),
                "flips": float(flip.mean()),
                "kl_mean_by_text": kl.mean(axis=1).tolist(),
                "flips_by_text": flip.mean(axis=1).tolist(),
            }
        )
    settings = {
        "model": "SmolLM2-135M-Instruct, float32",
        "prefix_tokens": n_prefix,
        "chunk": CHUNK,
        "scored_tokens": n_scored,
        "texts": n_windows,
    }
    write("quality", settings, rows)


CITIES = ("Paris", "Lima", "Oslo", "Cairo", "Delhi", "Quito", "Accra", "Dublin")


def needle_prompt(tokenizer: Any, tokens: int, depth: float, n_keys: int, seed: int) -> tuple[list[int], str]:
    """Return a prompt of about ``tokens`` tokens with ``n_keys`` numbers hidden in prose, and the one asked for."""
    rng = np.random.default_rng(seed)
    names = [str(c) for c in rng.permutation(CITIES)[:n_keys]]
    numbers = [str(n) for n in rng.integers(10_000, 99_999, n_keys)]
    needles = [f" The special magic number for {c} is: {n}. " for c, n in zip(names, numbers, strict=True)]
    start = int(rng.integers(0, 30_000))
    start = prose().index(". ", start) + 2
    sentences = prose()[start : start + tokens * 6].replace("\n", " ").split(". ")
    spare = tokens - 90 - 16 * n_keys
    text, count = [], 0
    for sentence in sentences:
        count += len(tokenizer.encode(sentence + ". ", add_special_tokens=False))
        if count > spare:
            break
        text.append(sentence + ".")
    depths = [depth, *(d for d in np.linspace(0.1, 0.9, n_keys + 1) if abs(d - depth) > 0.05)][:n_keys]
    for needle, d in sorted(zip(needles, depths, strict=True), key=lambda x: -x[1]):
        text.insert(int(d * len(text)), needle.strip())
    user = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz "
        f"you about them afterwards.\n\n{' '.join(text)}\n\n"
        f"What is the special magic number for {names[0]} mentioned in the provided text?"
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    prompt += f"The special magic number for {names[0]} mentioned in the provided text is"
    return tokenizer.encode(prompt, add_special_tokens=False), numbers[0]


def resume(model: Any, prefilled: list[Any], text: str) -> list[Any]:
    """Return caches of another strategy with the same prompt: both act at the prompt's end, so its rows are exact."""
    caches = kvmlx.make_prompt_cache(model, text)
    for new, old in zip(layers_of(caches), layers_of(prefilled), strict=True):
        keys, values, _, _ = old.store.tail()
        new.start(1)
        new.store.append(keys, values)
        new.offsets, new.scale = old.offsets.copy(), old.scale
        if new.strategy.window:
            new.queries = old.queries[:, :, -new.strategy.window :]
            new.n_queries = np.minimum(old.n_queries, new.strategy.window)
    return caches


def answer(model: Any, tokenizer: Any, last: int, caches: list[Any], n_tokens: int = 10) -> str:
    """Greedy text after the prompt, whose last token is ``last``."""
    out, token = [], last
    for _ in range(n_tokens):
        token = int(np.argmax(np.array(model(mx.array([[token]]), cache=caches)[0, -1])))
        out.append(token)
    return tokenizer.decode(out)


def ask_needles(
    model: Any, tokenizer: Any, texts: list[str], cases: Iterable[tuple[int, float, int]], tokens: int
) -> dict[str, dict[str, list[bool]]]:
    """Return, by strategy and number of keys, whether each case's number is in the answer (RULER's scoring).

    Each prompt is prefilled once; every strategy must act at its end.
    """
    right: dict[str, dict[str, list[bool]]] = {text: {} for text in texts}
    for n_keys, depth, seed in cases:
        prompt, number = needle_prompt(tokenizer, tokens, depth, n_keys, seed)
        prefilled = kvmlx.make_prompt_cache(model, "snapkv(budget=0.25)")
        prefill(model, prefilled, np.array(prompt[:-1]), CHUNK)
        for text in texts:
            said = answer(model, tokenizer, prompt[-1], resume(model, prefilled, text))
            right[text].setdefault(f"{n_keys}-key", []).append(number in said)
    return right


def measure_needles(texts: list[str], tokens: int, depths: list[float]) -> None:
    """How often the number asked for is answered: single and four-key needles, the question in the prompt."""
    model, tokenizer = demo_model()
    cases = [(n, d, 10 * n + i) for n in (1, 4) for i, d in enumerate(depths)]
    shown = track(cases, description="needles", console=console)
    right = ask_needles(model, tokenizer, ["full", *texts], shown, tokens)
    rows = [{"strategy": name, **{k: [sum(v), len(v)] for k, v in by.items()}} for name, by in right.items()]
    write("needles", {"model": "SmolLM2-135M-Instruct, float32", "tokens": tokens, "depths": depths}, rows)


def measure_speed(texts: list[str], tokens: int, steps: int, rounds: int) -> None:
    """Median time of a decode step after ``tokens``, beside mlx-lm's own cache, the caches taking turns."""
    model, _ = demo_model()
    args = model.args
    dim = args.head_dim or args.hidden_size // args.num_attention_heads
    made = {"stock": stock_cache(model)} | {t: kvmlx.make_prompt_cache(model, t) for t in texts}
    for caches in track(made.values(), description="filling", console=console):
        fill_random(caches, tokens, args.num_attention_heads, args.num_key_value_heads, dim)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in track(range(rounds), description="speed", console=console):
        for name, caches in made.items():
            for step in range(steps + 2):
                tic = time.perf_counter()
                mx.eval(model(mx.array([[17]]), cache=caches))
                if step > 1:
                    times[name].append((time.perf_counter() - tic) * 1e3)
    base = times["stock"]
    rows = []
    for name, t in times.items():
        ratios = [
            statistics.median(t[i * steps : (i + 1) * steps]) / statistics.median(base[i * steps : (i + 1) * steps])
            for i in range(rounds)
        ]
        rows.append(
            {
                "strategy": name,
                "step_ms": statistics.median(t),
                "quartiles_ms": list(quartiles(t)),
                "of_stock": statistics.median(ratios),
                "of_stock_range": [min(ratios), max(ratios)],
            }
        )
    settings = {"model": "SmolLM2-135M-Instruct, float32", "tokens": tokens, "steps": steps, "rounds": rounds}
    write("speed", settings, rows)


def fill_random(caches: list[Any], tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    """Fill a model's caches with random rows, as a prefill would: decoding takes as long over them."""
    from mlx_lm.models.base import scaled_dot_product_attention as attend

    for i, cache in enumerate(caches):
        sizes = [CHUNK] * (tokens // CHUNK) + [1]
        for n, part in enumerate(sizes):
            seeds = mx.random.split(mx.random.key(1000 * i + n), 3)
            q, k, v = (
                mx.random.normal((1, h, part, dim), key=s)
                for h, s in zip((heads, kv_heads, kv_heads), seeds, strict=True)
            )
            mask: Any = "causal" if part > 1 else None
            out = attend(q, *cache.update_and_fetch(k, v), cache=cache, scale=dim**-0.5, mask=mask)
            mx.eval(cache.state if part > 1 else out)
    if layers_of(caches):
        kvmlx.settle(caches)


def render() -> None:
    """Write docs/results/README.md from the JSON files."""
    parts = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    lines = [
        "# Results",
        "",
        "Made by `scripts/measure.py`; each section names its machine, versions and shapes.",
        "Other files: `metal.json` of `scripts/count_metal.py`, shown in [metal.md](../metal.md); `triton.json` of "
        "`scripts/compile_triton.py`, in [cuda.md](../cuda.md); `compatibility-*.json` of `scripts/compatibility.py`, "
        "in [compatibility.md](../compatibility.md); `bench-*.jsonl` of `kvmlx bench` with the configs that stand in "
        "them, in [bench.md](../bench.md) and, whole, in [bench-demo.md](bench-demo.md); "
        "`gpu-*.json`, once a GPU has run `scripts/gpu_check.py`.",
        "",
    ]
    for name, columns in RENDER.items():
        if name not in parts:
            continue
        data = parts[name]
        host = ", ".join(f"{k} {v}" for k, v in data["machine"].items())
        setting = ", ".join(f"{k}: {v}" for k, v in data["settings"].items())
        lines += [f"## {name.capitalize()}", "", f"{setting}. Machine: {host}.", ""]
        lines += ["| strategy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in data["rows"]:
            cells = [cell(row, data["settings"]) for cell in columns.values()]
            name = row["strategy"].replace("|", r"\|")
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        lines.append("")
    (RESULTS / "README.md").write_text("\n".join(lines))
    console.print("wrote docs/results/README.md")


def _mib(n: float) -> str:
    return f"{n / 2**20:.2f}"


Cell = Callable[[dict[str, Any], dict[str, Any]], str]
RENDER: dict[str, dict[str, Cell]] = {
    "memory": {
        "held MiB (allocator)": lambda r, s: _mib(r["held_bytes"]),
        "nbytes MiB": lambda r, s: _mib(r["nbytes"]),
        "held / nbytes": lambda r, s: f"{r['held_bytes'] / r['nbytes']:.3f}",
        "format MiB": lambda r, s: _mib(r["format_bytes"]),
        "of fp16": lambda r, s: f"{r['ratio']:.3f}",
        "inverse": lambda r, s: f"{1 / r['ratio']:.1f}x",
    },
    "peak": {
        "peak MiB beyond the weights": lambda r, s: f"{r['peak_bytes'] / 2**20:.1f}",
        "most that the cache held after a chunk, MiB": lambda r, s: f"{r['kv_peak_bytes'] / 2**20:.1f}",
    },
    "quality": {
        "bits": lambda r, s: "16" if r["bits"] is None else f"{r['bits']:.2f}",
        "KL mean": lambda r, s: f"{r['kl_mean']:.5f}",
        "KL mean, by text": lambda r, s: f"{min(r['kl_mean_by_text']):.5f} - {max(r['kl_mean_by_text']):.5f}",
        "KL p99": lambda r, s: f"{r['kl_p99']:.4f}",
        "KL max": lambda r, s: f"{r['kl_max']:.3f}",
        "flips": lambda r, s: f"{r['flips']:.1%}",
    },
    "needles": {
        "one key": lambda r, s: "{} of {}".format(*r["1-key"]),
        "four keys": lambda r, s: "{} of {}".format(*r["4-key"]),
    },
    "speed": {
        "ms a step (median)": lambda r, s: f"{r['step_ms']:.1f}",
        "quartiles": lambda r, s: "{:.1f} - {:.1f}".format(*r["quartiles_ms"]),
        "of stock (median of rounds)": lambda r, s: f"{r['of_stock']:.2f}",
        "range": lambda r, s: "{:.2f} - {:.2f}".format(*r["of_stock_range"]),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["memory", "peak", "quality", "needles", "speed", "render"])
    parser.add_argument("--kv", action="append", help="a strategy; repeat for several (default: the part's own list)")
    parser.add_argument("--quick", action="store_true", help="fewer texts, cases and rounds")
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    quick = args.quick
    if args.part == "memory":
        measure_memory(args.kv or MEMORY, args.tokens or 4096)
    elif args.part == "peak":
        measure_peak(args.kv or PEAK, args.tokens or 3072)
    elif args.part == "quality":
        measure_quality(args.kv or QUALITY, 1 if quick else 2, 1024, 256)
    elif args.part == "needles":
        measure_needles(args.kv or NEEDLES, args.tokens or 2048, [0.5] if quick else [0.1, 0.3, 0.5, 0.7, 0.9])
    elif args.part == "speed":
        default = ["full", "snapkv(budget=0.25)", "int8", "int4", "small", "snapkv(budget=0.25) | small"]
        measure_speed(args.kv or default, args.tokens or 4096, 8, 3 if quick else 9)
    render()


if __name__ == "__main__":
    main()
