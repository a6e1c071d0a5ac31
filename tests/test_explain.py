"""`kvmlx.explain`: what is said before equals what is held after."""

from __future__ import annotations

from typing import Any

import pytest

from kvmlx.explain import explain, layer_shapes, model_dtype
from kvmlx.types import KVMLXError, LayerInfo, ModelInfo, StrategyError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}

HELD = [
    "full",
    "int4",
    "balanced",
    "small",
    "tiny",
    "kivi(bits=2)",
    "kivi(k=4) | turboquant(v=4)",
    "int(k=16, v=4)",
    "streaming(budget=128)",
    "snapkv(budget=0.3, window=16, recent=16)",
    "snapkv(budget=0.5) | pyramidkv | int8",
    "snapkv(budget=0.5) | int4 | every(tokens=32)",
    "expected_attention(budget=0.4) | int4",
    "h2o(budget=200)",
    "h2o(budget=200) | kivi(bits=4)",
    "snapkv(budget=0.5) | keepkv | int4",
]


@pytest.mark.parametrize("tokens", [1, 70, 256, 777])
@pytest.mark.parametrize("strategy", HELD)
def test_says_what_is_held(strategy: str, tokens: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    llama = pytest.importorskip("mlx_lm.models.llama", reason="needs mlx-lm")
    import kvmlx

    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    model.set_dtype(mx.float32)
    caches = kvmlx.make_prompt_cache(model, strategy)
    ids = mx.arange(tokens)[None] % 64
    for start in range(0, tokens, 300):
        model(ids[:, start : start + 300], cache=caches)
        mx.eval([cache.state for cache in caches])
    kvmlx.settle(caches)

    said = explain(strategy, LLAMA, tokens, dtype="float32", prefill_step=300)
    held = kvmlx.report(caches)
    assert said.nbytes == held.nbytes
    assert said.full_nbytes == held.full_nbytes
    assert said.kept_tokens == held.kept_tokens
    assert said.ratio == held.ratio


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_oss", "cohere2", "qwen3_next", "jamba"])
def test_finds_the_layers_that_mlx_lm_makes(model_type: str) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    from mlx_lm.models import cache

    config = CONFIGS[model_type]
    kinds = {cache.KVCache: "full", cache.RotatingKVCache: "sliding", cache.ArraysCache: "state"}
    made = [kinds[type(c)] for c in _make_cache(config)]
    assert [shape.kind for shape in layer_shapes(config)] == made


def _make_cache(config: dict[str, Any]) -> list[Any]:
    """Build the model, which MLX does lazily, and ask it for its cache."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": QWEN3_8B
    | {
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": 64,
        "rope_theta": 1e4,
    }
    | {"max_position_embeddings": 512, "tie_word_embeddings": True},
    "gemma3_text": LLAMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 8, "head_dim": 32, "sliding_window": 512}
    | {"sliding_window_pattern": 4},
    "gpt_oss": LLAMA
    | {"model_type": "gpt_oss", "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 128}
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_theta": 1e4},
    "cohere2": LLAMA
    | {"model_type": "cohere2", "num_hidden_layers": 9, "head_dim": 32, "sliding_window": 128}
    | {"sliding_window_pattern": 4},
    "qwen3_next": LLAMA
    | {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4, "head_dim": 32}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    | {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 0, "num_experts_per_tok": 0}
    | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 8, "mlp_only_layers": []}
    | {"moe_intermediate_size": 8, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    | {"max_position_embeddings": 512},
    "jamba": LLAMA
    | {"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_offset": 4, "attn_layer_period": 8}
    | {"expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 8}
    | {"mamba_expand": 2, "num_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 512}
    | {"mamba_dt_rank": 8, "mamba_proj_bias": False, "mamba_conv_bias": True},
}


def test_counts_as_an_fp16_cache_does() -> None:
    said = explain("full", QWEN3_8B, 32_768)
    assert said.full_nbytes == 32_768 * 36 * 8 * (128 + 128) * 2
    assert said.nbytes == said.full_nbytes
    assert said.ratio == 1.0
    assert said.peak_nbytes == said.nbytes
    assert said.dtype == "bfloat16"


def test_the_schedule_decides_the_peak() -> None:
    at_end = explain("snapkv(budget=1024, window=64)", QWEN3_8B, 32_768)
    bounded = explain("snapkv(budget=1024, window=64) | bounded", QWEN3_8B, 32_768)
    assert at_end.nbytes == bounded.nbytes
    # The whole prompt, and the queries that SnapKV reads.
    assert at_end.peak_nbytes == at_end.full_nbytes + 36 * 32 * 64 * 128 * 2
    # What the earlier chunks have left, and one chunk of 2,048 exact rows.
    assert bounded.peak_nbytes < 0.11 * bounded.full_nbytes


def test_pyramid_budgets_fall_and_sum_up() -> None:
    said = explain("snapkv(budget=1024) | pyramidkv", QWEN3_8B, 32_768)
    kept = [layer.kept_tokens for layer in said]
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) == 36 * 1024


def test_sliding_layers_are_left_alone() -> None:
    said = explain("int4", CONFIGS["gemma3_text"], 4096)
    assert [layer.managed for layer in said] == [False, False, False, True] * 2
    assert all(layer.kept_tokens == 512 for layer in said if not layer.managed)
    assert said.unmanaged_nbytes == 6 * 512 * 2 * 64 * 2
    assert said.full_nbytes == 2 * 4096 * 2 * 64 * 2


def test_reads_the_text_part_of_a_multimodal_config() -> None:
    inner = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = {"model_type": "llava", "text_config": inner, "dtype": "bfloat16"}
    assert layer_shapes(config) == layer_shapes(LLAMA)
    assert model_dtype(config) == "bfloat16"


def test_takes_a_model_info() -> None:
    info = ModelInfo("llama", tuple(LayerInfo(i, 4, 2, 32, 32) for i in range(3)))
    assert explain("int4", info, 500).nbytes == explain("int4", LLAMA, 500).nbytes
    with pytest.raises(KVMLXError, match="before the model ran"):
        explain("int4", ModelInfo("llama", (LayerInfo(0),)), 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "deepseek_v3 holds a latent of rank 512.*MLA"),
        ({"model_type": "mamba2"}, "mamba2 cannot be explained: it has no attention layers"),
        ({"layer_types": ["full_attention", "odd", "odd"]}, "unknown type 'odd'"),
        ({"layer_types": ["mamba"] * 3}, "nothing to compress"),
        ({"num_hidden_layers": None}, "num_hidden_layers.*is it that of a language model"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        explain("int4", LLAMA | change, 100)


def test_refuses_what_cannot_be_encoded() -> None:
    with pytest.raises(StrategyError):
        explain("int4(group_size=64)", LLAMA, 500)
    with pytest.raises(KVMLXError, match="context must be"):
        explain("int4", LLAMA, 0)
    with pytest.raises(KVMLXError, match="dtype must be one of"):
        explain("int4", LLAMA, 10, dtype="int8")
