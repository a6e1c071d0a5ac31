"""What a strategy will hold, from a model's config.json alone: no weights, no framework."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvmlx.stages.base import Stage
from kvmlx.store import SPAN_STEP, tail_step
from kvmlx.strategy import Strategy
from kvmlx.types import KVMLXError, ModelInfo, UnsupportedModelError, resolve_budget

LayerKind = Literal["full", "sliding", "state"]

FP16_BYTES = 2
PREFILL_STEP = 2048
"""Prompt tokens that mlx-lm processes at a time unless told otherwise."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

UNREADABLE = {
    "baichuan_m1": "its config.json does not say which layers are which",
    "bailing_moe_linear": "its config.json does not say which layers are which",
    "falcon_h1": "each layer holds a state beside its keys and values",
    "gemma3n": "its later layers share the keys and values of earlier ones",
    "gemma4": "its later layers share the keys and values of earlier ones",
    "gemma4_text": "its later layers share the keys and values of earlier ones",
    "mamba": "it has no attention layers",
    "mamba2": "it has no attention layers",
    "plamo2": "its config.json does not say which layers are which",
    "recurrent_gemma": "its config.json does not say which layers are which",
    "rwkv7": "it has no attention layers",
}
"""Model types that cannot be explained, and why."""

SLIDING_PERIOD = {
    "cohere2": 4,
    "gemma3": 6,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
}
"""Every n-th layer attends to everything, the others to a window, where config.json leaves it out."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's cache, as config.json describes it."""

    kind: LayerKind
    n_heads: int = 0
    n_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None

    @property
    def row_elements(self) -> int:
        """Elements of one token's keys and values, all heads."""
        return self.n_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What one layer will hold once the prompt is complete."""

    index: int
    kind: LayerKind
    managed: bool
    """False: the strategy leaves this layer as the model made it."""
    kept_tokens: int
    """Rows per head, the mean where heads differ."""
    exact_tokens: int
    """Those of them in the model's own dtype."""
    nbytes: int
    """Rows, metadata, head-room and what the stages observe."""
    full_nbytes: int
    """The same layer uncompressed, in fp16."""
    peak_nbytes: int
    """The most it holds during prefill."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The cache of one model under one strategy; iterates over its layers."""

    strategy: Strategy
    context: int
    dtype: str
    prefill_step: int
    layers: tuple[LayerBytes, ...]

    def __iter__(self) -> Iterator[LayerBytes]:
        return iter(self.layers)

    @property
    def managed(self) -> tuple[LayerBytes, ...]:
        return tuple(layer for layer in self.layers if layer.managed)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers that the strategy manages."""
        return sum(layer.nbytes for layer in self.managed)

    @property
    def full_nbytes(self) -> int:
        """Bytes of the same layers uncompressed, in fp16."""
        return sum(layer.full_nbytes for layer in self.managed)

    @property
    def ratio(self) -> float:
        """Bytes held / bytes of the full fp16 cache."""
        return self.nbytes / self.full_nbytes

    @property
    def unmanaged_nbytes(self) -> int:
        """Bytes of sliding-window layers, which are left as they are; recurrent states are not counted."""
        return sum(layer.nbytes for layer in self.layers if not layer.managed)

    @property
    def peak_nbytes(self) -> int:
        """The most that keys and values hold at one moment of the prefill, all layers."""
        return sum(layer.peak_nbytes for layer in self.layers)

    @property
    def kept_tokens(self) -> float:
        """Rows per head, mean over the managed layers."""
        return sum(layer.kept_tokens for layer in self.managed) / len(self.managed)


def explain(
    strategy: str | Stage | Strategy,
    model: ModelInfo | Mapping[str, Any],
    context: int,
    *,
    dtype: str | None = None,
    prefill_step: int = PREFILL_STEP,
) -> Explanation:
    """Return what ``strategy`` will hold of ``context`` tokens, layer by layer.

    Args:
        strategy: a strategy, or its text.
        model: the content of config.json, or a ModelInfo whose head counts and sizes are known.
        context: tokens of the prompt.
        dtype: float32, float16 or bfloat16 of the exact rows; None for what the config says.
        prefill_step: tokens that the prefill processes at a time.

    Raises:
        StrategyError: the strategy cannot encode vectors of this model's size.
        UnsupportedModelError: the model's cache is not one of keys and values per head.
    """
    strategy = Strategy.of(strategy)
    if context < 1:
        raise KVMLXError(f"context must be a number of tokens >= 1, got {context!r}")
    if isinstance(model, ModelInfo):
        shapes, own_dtype = shapes_of_info(model), "float16"
    else:
        shapes, own_dtype = layer_shapes(model), model_dtype(model)
    dtype = dtype or own_dtype
    if dtype not in ITEM_BYTES:
        raise KVMLXError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
    plan = Plan(strategy, sum(s.kind == "full" for s in shapes), ITEM_BYTES[dtype])
    if plan.n_layers == 0:
        raise UnsupportedModelError("the model has no layer with a full attention cache: there is nothing to compress")
    layers = _layers(plan, shapes, context, prefill_step)
    return Explanation(strategy, context, dtype, prefill_step, tuple(layers))


def _layers(plan: Plan, shapes: list[LayerShape], context: int, step: int) -> Iterator[LayerBytes]:
    kept = iter(plan.kept(context))
    # The last chunk joins what the earlier ones have left; the strategy runs after it.
    before = (context - 1) // step * step if plan.strategy.bounded else 0
    earlier = iter(plan.kept(before) if before else [0] * plan.n_layers)
    for index, shape in enumerate(shapes):
        if shape.kind != "full":
            yield _unmanaged(index, shape, context, plan.item_bytes)
            continue
        rows, rows_before = next(kept), next(earlier)
        nbytes, exact = plan.held(shape, context, rows)
        peak = plan.held(shape, before, rows_before)[0] + plan.observed(shape, prefilling=True)
        peak += (context - before) * shape.row_elements * plan.item_bytes
        nbytes += plan.observed(shape, prefilling=False)
        full = context * shape.row_elements * FP16_BYTES
        yield LayerBytes(index, "full", True, rows, exact, nbytes, full, max(nbytes, peak))


def _unmanaged(index: int, shape: LayerShape, context: int, item_bytes: int) -> LayerBytes:
    tokens = min(context, shape.window or context) if shape.kind == "sliding" else 0
    elements = tokens * shape.row_elements
    nbytes = elements * item_bytes
    return LayerBytes(index, shape.kind, False, tokens, tokens, nbytes, elements * FP16_BYTES, nbytes)


@dataclass(frozen=True)
class Plan:
    """A strategy's arithmetic."""

    strategy: Strategy
    n_layers: int
    item_bytes: int

    def kept(self, tokens: int) -> list[int]:
        """Return the rows per head that each managed layer keeps of ``tokens``."""
        select = self.strategy.select
        if select is None:
            return [tokens] * self.n_layers
        protected = min(tokens, self.strategy.sinks + self.strategy.recent)
        budget = max(resolve_budget(select.budget, tokens), protected)
        return self.strategy.allocate.layer_budgets(budget, tokens, self.n_layers, protected)

    def held(self, shape: LayerShape, tokens: int, rows: int) -> tuple[int, int]:
        """Return the bytes held by ``rows`` rows per head, left of ``tokens``, and how many rows are exact.

        The arithmetic of `LayerStore` and `LayerCache`, head-room included.
        """
        if rows == 0:
            return 0, 0
        strategy = self.strategy
        encoded = 0
        if self.has_body:
            encoded = max(0, rows - strategy.sinks - strategy.recent) // self.unit * self.unit
        exact = rows - encoded
        step = tail_step(exact, self.has_body)
        capacity = _up(exact, step) + (step if self.has_body and (encoded or rows < tokens) else 0)
        span = _up(encoded, math.lcm(SPAN_STEP, self.unit))
        column_bytes = 4 * sum((bool(strategy.merge and strategy.merge.makes_bias), "sums" in strategy.needs))
        nbytes = capacity * (shape.row_elements * self.item_bytes + shape.n_kv_heads * column_bytes)
        nbytes += span * shape.n_kv_heads * (self._encoded_row_bytes(shape) + column_bytes if span else 0)
        return round(nbytes), exact

    @property
    def has_body(self) -> bool:
        """Whether rows are stored encoded, or by head in spans of unequal length."""
        return self.strategy.encodes or self.strategy.ragged

    @property
    def unit(self) -> int:
        """Rows that are encoded together."""
        return math.lcm(*(codec.block for codec in self.strategy.codecs() if codec is not None))

    def _encoded_row_bytes(self, shape: LayerShape) -> float:
        total = 0.0
        for codec, dim in zip(self.strategy.codecs(), (shape.key_dim, shape.value_dim), strict=True):
            if codec is None:
                total += dim * self.item_bytes
                continue
            codec.check(dim)
            total += sum(plane.row_bytes for plane in codec.planes(dim))
        return total

    def observed(self, shape: LayerShape, *, prefilling: bool) -> int:
        """Return the bytes of the queries, or of their moments, that a stage reads.

        They are let go once the prompt is complete, unless decoding selects too.
        """
        needs, dim = self.strategy.needs, shape.key_dim
        nbytes = 0
        if not prefilling and self.strategy.every is None:
            return nbytes
        if "queries" in needs:
            nbytes += shape.n_heads * self.strategy.window * dim * self.item_bytes
        if "query_moments" in needs:
            nbytes += shape.n_heads * (dim + dim * dim) * 4
        return nbytes


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def layer_shapes(config: Mapping[str, Any]) -> list[LayerShape]:
    """Read the caches of a model's layers from its config.json.

    Raises:
        UnsupportedModelError: they are not keys and values per head, or config.json does not say.
    """
    config = _text_config(config)
    name = config.get("model_type", "this model")
    if config.get("kv_lora_rank"):
        raise UnsupportedModelError(
            f"{name} holds a latent of rank {config['kv_lora_rank']} instead of keys and values (MLA): "
            "it is small already, and no strategy applies to it"
        )
    if name in UNREADABLE:
        raise UnsupportedModelError(f"{name} cannot be explained: {UNREADABLE[name]}")
    n_layers = _first_int(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
    kinds = _layer_kinds(config, n_layers)
    heads = _per_layer(config, len(kinds), "num_attention_heads", "n_heads", "n_head", "num_heads")
    one = 1 if config.get("multi_query") else None
    kv_heads = _per_layer(config, len(kinds), "num_key_value_heads", "num_kv_heads", "n_kv_heads", default=one)
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    shapes = []
    for kind, n_heads, n_kv_heads in zip(kinds, heads, kv_heads, strict=True):
        n_heads = n_heads or 0
        dim = config.get("head_dim") or (width // n_heads if width and n_heads else None)
        if kind != "state" and (not n_heads or not isinstance(dim, int)):
            raise UnsupportedModelError(f"{name}: config.json names neither head_dim nor hidden_size and heads")
        window = config.get("sliding_window") if kind == "sliding" else None
        value_dim = config.get("v_head_dim") or dim or 0
        shapes.append(LayerShape(kind, n_heads, n_kv_heads or n_heads, dim or 0, value_dim, window))
    return shapes


def model_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that config.json gives to the weights; float16 where it is silent."""
    for part in (config, _text_config(config)):
        name = part.get("torch_dtype") or part.get("dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in ITEM_BYTES:
            return name.removeprefix("torch.")
    return "float16"


def read_config(model: str | Path) -> dict[str, Any]:
    """Return config.json of a model: a folder, the file itself, or a repository of the Hugging Face Hub.

    From the Hub only config.json is fetched.

    Raises:
        KVMLXError: there is none, or it cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _fetch_config(str(model), path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KVMLXError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise KVMLXError(f"{path} is not the config.json of a model")
    return config


def looks_local(model: str) -> bool:
    """Tell whether a model's name can only be a path: the Hub's names are `owner/name` or `name`."""
    return Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _fetch_config(model: str, path: Path) -> Path:
    if looks_local(model):
        raise KVMLXError(f"no model at {path}: it should be a folder with a config.json")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise KVMLXError(
            f"{model!r} is not a folder here, and the Hugging Face Hub needs huggingface_hub: pip install 'kvmlx[mlx]'"
        ) from error
    try:
        return Path(hf_hub_download(model, "config.json"))
    # The Hub's client raises its own errors, those of its HTTP library and OSError; each is a config not had.
    except Exception as error:
        raise KVMLXError(hub_message(model, error)) from error


def hub_message(model: str, error: Exception) -> str:
    """Return one line for a model that the Hugging Face Hub did not give."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = f": {lines[0]}" if lines else ""
    return (
        f"cannot fetch {model!r} from the Hugging Face Hub ({type(error).__name__}{why}); "
        "give a local folder, or `demo` for the demo model"
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    return {"model_type": config.get("model_type", "this model"), **text}


def _first_int(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise UnsupportedModelError(f"config.json has none of {', '.join(names)}: is it that of a language model?")


def _per_layer(config: Mapping[str, Any], n_layers: int, *names: str, default: int | None = None) -> list[int | None]:
    """Return a number for each layer: some models give one number, some a list."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int):
            return [value] * n_layers
        if isinstance(value, list) and len(value) == n_layers:
            return value
    return [default] * n_layers


def _layer_kinds(config: Mapping[str, Any], n_layers: int) -> list[LayerKind]:
    """Return what each layer that has a cache holds."""
    if isinstance(types := config.get("layer_types") or config.get("layers_block_type"), list):
        return [kind for name in types if (kind := _kind(config, name)) is not None]
    if pattern := config.get("hybrid_override_pattern"):
        marks: dict[str, LayerKind] = {"*": "full", "M": "state"}
        return [marks[mark] for mark in pattern if mark in marks]
    if interval := config.get("full_attention_interval"):
        return ["state" if (i + 1) % interval else "full" for i in range(n_layers)]
    if isinstance(full := config.get("full_attn_idxs"), list):
        return ["full" if i in full else "state" for i in range(n_layers)]
    if period := config.get("attn_layer_period"):
        offset = config.get("attn_layer_offset", 0)
        return ["full" if i % period == offset else "state" for i in range(n_layers)]
    pattern = config.get("sliding_window_pattern") or SLIDING_PERIOD.get(config.get("model_type", ""))
    if isinstance(pattern, str):
        return ["sliding" if pattern[i % len(pattern)] == "L" else "full" for i in range(n_layers)]
    if pattern and config.get("sliding_window"):
        return ["sliding" if (i + 1) % pattern else "full" for i in range(n_layers)]
    return ["full"] * n_layers


def _kind(config: Mapping[str, Any], name: str) -> LayerKind | None:
    """Translate an entry of ``layer_types``; None for a layer that holds nothing."""
    known: dict[str, LayerKind | None] = {
        "full_attention": "full",
        "attention": "full",
        "sliding_attention": "sliding",
        "chunked_attention": "sliding",
        "linear_attention": "state",
        "mamba": "state",
        "conv": "state",
        "moe": None,
        "mlp": None,
    }
    if name not in known:
        model = config.get("model_type", "this model")
        raise UnsupportedModelError(f"{model} has layers of an unknown type {name!r}; known: {', '.join(known)}")
    return known[name]


def shapes_of_info(info: ModelInfo) -> list[LayerShape]:
    unknown = [x.index for x in info.layers if not (x.n_kv_heads and x.key_dim)]
    if unknown:
        raise KVMLXError(
            f"the sizes of layers {unknown} are not known before the model ran: give its config.json instead"
        )
    return [LayerShape("full", x.n_heads, x.n_kv_heads, x.key_dim, x.value_dim or x.key_dim) for x in info.layers]
