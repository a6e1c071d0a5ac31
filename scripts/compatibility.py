"""Run every architecture of mlx-lm through kvmlx, and write docs/compatibility.md.

    python scripts/compatibility.py                run all, write the page
    python scripts/compatibility.py --only llama   run some (repeat the option), write nothing
    python scripts/compatibility.py --json         print the results as JSON

Each model is a small random instance, weights seeded. A prompt of PROMPT tokens goes in by chunks of CHUNK,
then TOKENS tokens are decoded greedily. Compared with mlx-lm's own cache: `full` must give the same logits,
`int8` must be used and stay near, `streaming` must evict, and two sequences of unequal length in one batch
must give what each gives alone. A model is refused only by an error that names the reason, when its cache is
made; anything else is a failure, and the exit status tells.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.cache import make_prompt_cache as make_stock_cache
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvmlx import ops
from kvmlx.backends.mlx import layers_of, make_prompt_cache, settle, unwrap_model, wrap_model
from kvmlx.backends.mlx.models import refusal
from kvmlx.backends.mlx.ops import BACKEND
from kvmlx.types import Rotary, UnsupportedModelError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
VOCAB = 128
PROMPT, SHORT, CHUNK, TOKENS = 150, 97, 64, 16
SMALL_DRIFT = 0.05
"""Mean change of a logit by int8 above which it counts as broken, as a part of the logits' deviation."""
SAME_LOGPROB = 2e-3
"""Change of a log-probability that another order of float32 sums may bring."""
INT8 = "int8(sinks=2, recent=8)"
STREAMING = "streaming(budget=0.5, sinks=2, recent=8)"

Config = dict[str, Any]

COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "sliding_window": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "hidden_act": "silu",
}
"""The names under which most architectures ask for the same things; each takes those that it knows."""

MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
GRANITE: Config = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA4: Config = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "tie_word_embeddings": True,
}
LFM2: Config = {
    "num_hidden_layers": 4,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1, 3],
}
KDA: Config = {
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2, 4],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "num_hidden_layers": 4,
}
ROPES: Config = {
    "full_attention": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
YARN: Config = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

ARCHITECTURES: dict[str, Config] = {
    "Klear": {},
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "afmoe": {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": ALTERNATING},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "bailing_hybrid": MLA | {"layer_group_size": 2, "group_norm_size": 2, "num_hidden_layers": 4},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2, "num_hidden_layers": 4},
    "bailing_moe_v3": MLA | {"layer_group_size": 2, "num_hidden_layers": 4, "head_dim": 16},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window_pattern": 2, "num_hidden_layers": 4},
    "dbrx": {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {"moe_layer_freq": 1},
    "deepseek_v2": MLA | {"topk_method": "greedy", "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 32},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone": {"num_layers": 3},
    "exaone4": {"sliding_window_pattern": "LG", "num_hidden_layers": 4},
    "exaone_moe": {
        "num_hidden_layers": 4,
        "layer_types": ALTERNATING,
        "is_moe_layer": [False, True, True, True],
    },
    "falcon_h1": {
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_n_heads": 4,
        "lm_head_multiplier": 1.0,
        "key_multiplier": 1.0,
    },
    "gear": {
        "num_hidden_layers": 4,
        "layer_types": ["conv_mixer", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma": {},
    "gemma2": {},
    "gemma3": {"model_type": "gemma3", "text_config": {"sliding_window_pattern": 2, "num_hidden_layers": 4}},
    "gemma3_text": {"sliding_window_pattern": 2, "num_hidden_layers": 4, "query_pre_attn_scalar": 16},
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.0] * 6,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
            "intermediate_size": [96] * 6,
        }
    },
    "gemma4": {"text_config": GEMMA4 | {"model_type": "gemma4_text"}},
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA
    | {
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 32,
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 512,
        "num_key_value_heads": 4,
    },
    "gpt_bigcode": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_inner": 96,
        "n_positions": 512,
        "num_key_value_heads": 1,
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_oss": {"num_hidden_layers": 4, "sliding_window": 32, "layer_types": ALTERNATING},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 3, "rotary_dim": 8, "n_positions": 512},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE
    | {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "helium": {},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "num_hidden_layers": 4,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 32},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": MLA},
    "kimi_k3": {"text_config": MLA | KDA | {"hidden_act": "situ", "num_experts_per_token": 2}},
    "kimi_linear": MLA | KDA | {"model_max_length": 4096},
    "kimi_vl": {"text_config": MLA},
    "laguna": {"num_hidden_layers": 4, "layer_types": ALTERNATING, "rope_parameters": ROPES},
    "lfm2": LFM2,
    "lfm2-vl": {"text_config": LFM2},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "conv_bias": False,
        "conv_L_cache": 3,
        "full_attn_idxs": [1, 3],
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "lille-130m": {"block_size": 512, "n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 3},
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    },
    "llama4": {
        "text_config": {
            "num_hidden_layers": 4,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0]},
    "longcat_flash": MLA
    | {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 1,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": MLA
    | {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 1,
        "num_layers": 2,
        "ngram_vocab_size_ratio": 3,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {
        "state_size": 16,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "intermediate_size": 128,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
        "time_step_limit": (0.001, 100.0),
        "time_step_rank": 4,
        "intermediate_size": 128,
    },
    "mellum": {"num_hidden_layers": 4, "layer_types": ALTERNATING, "rope_parameters": ROPES},
    "mimo": {},
    "mimo_v2_flash": {
        "num_hidden_layers": 4,
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True,
        "sliding_window_size": 32,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "n_shared_experts": None,
    },
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0},
    "minicpm3": MLA
    | {
        "dim_model_base": 64,
        "scale_depth": 1.4,
        "scale_emb": 1.0,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 1024,
            "short_factor": 1.0,
            "long_factor": 2.0,
        },
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": {
            "num_hidden_layers": 4,
            "dense_intermediate_size": 96,
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 16,
            "index_topk_blocks": 4,
        }
    },
    "ministral3": {
        "num_hidden_layers": 4,
        "layer_types": ALTERNATING,
        "rope_parameters": YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1},
    },
    "mistral3": {"text_config": {"model_type": "llama"}},
    "mistral4": MLA | {"rope_parameters": YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}},
    "mixtral": {},
    "muse_glimmer": {"num_hidden_layers": 4, "layer_types": ALTERNATING},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 4,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.5}},
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "-", "*", "M", "E", "*"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 48,
    },
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "layer_types": ALTERNATING},
    "olmo_hybrid": DELTA
    | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 4,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [2, 2, 4],
        "ffn_multipliers": [1.0, 1.0, 2.0],
    },
    "phi": {},
    "phi3": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "original_max_position_embeddings": 1024,
    },
    "phimoe": {
        "rope_scaling": {
            "long_mscale": 1.2,
            "long_factor": [2.0] * 8,
            "short_mscale": 1.1,
            "short_factor": [1.0] * 8,
        }
    },
    "phixtral": {"num_vocab": VOCAB, "model_dim": 64, "num_heads": 4, "num_layers": 3, "rotary_dim": 8},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "num_hidden_layers": 4,
        "hidden_size_per_head": 16,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
    },
    "plamo3": {"num_hidden_layers": 4, "sliding_window_pattern": 2, "window_size": 32},
    "qwen": {"kv_channels": 16},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": {}},
    "qwen3": {},
    "qwen3_5": {"text_config": DELTA | {"num_hidden_layers": 4}},
    "qwen3_5_moe": {"text_config": DELTA | {"num_hidden_layers": 4}},
    "qwen3_moe": {},
    "qwen3_next": DELTA | {"num_hidden_layers": 4},
    "qwen3_vl": {"text_config": {}},
    "qwen3_vl_moe": {"text_config": {}},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 32,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "solar_open": {},
    "spark2_5": {
        "num_hidden_layers": 4,
        "layer_types": ALTERNATING,
        "rope_parameters": ROPES,
        "hidden_act": "gelu",
    },
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {"num_attention_groups": 2, "num_hidden_layers": 4, "layer_types": ALTERNATING},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": MLA,
}
"""What each of mlx-lm's architectures asks for beyond, or in place of, COMMON, by module name."""

NOT_BUILT: dict[str, str] = {
    "muse_spark": "its layers call Metal kernels of mlx-lm's, and this page is made without Metal",
    "phi3small": "mlx-lm's own forward damages memory on MLX's CPU build; kvmlx refuses it",
    "olmo": "needs another package, and mlx-lm's own forward fails on a prompt; kvmlx refuses it",
    "deepseek_v41": "its caches are its own, no KV caches of mlx-lm's; kvmlx refuses it",
    "prism_hadamard_qwen35": "qwen3_5 with packed 2-bit weights, which random ones cannot stand for",
}
"""Architectures of mlx-lm that no small random instance is made of, with the reason."""


def digest() -> str:
    """Return what the page must have been made with: a hash of the table and of what is run."""
    made: list[Any] = [ARCHITECTURES, COMMON, NOT_BUILT, PROMPT, SHORT, CHUNK, TOKENS, INT8, STREAMING]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


# -- models --------------------------------------------------------------------------------------------------


def build(name: str) -> Any:
    """Return a small model of an architecture, with seeded random weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    if name == "bitnet" and not mx.metal.is_available():  # its ternary layers are Metal kernels
        vars(module)["BitLinear"] = nn.Linear
    config: Config = COMMON | {"model_type": name} | ARCHITECTURES[name]
    if "text_config" in config:
        config["text_config"] = COMMON | {"model_type": name} | config["text_config"]
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = [(k, _random(k, w)) for k, w in dict(tree_flatten(model.parameters())).items()]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _random(name: str, weight: mx.array) -> mx.array:
    """Draw a weight that keeps activations near 1; vectors stay near what the model starts from."""
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    weight = weight.astype(mx.float32)
    noise = mx.random.normal(weight.shape)
    if weight.ndim < 2 or weight.size == weight.shape[-1]:
        return weight + 0.1 * noise if weight.ndim else weight
    if "embed" in name or "wte" in name:
        return noise
    fan_in = int(np.prod(weight.shape[1:])) if "conv" in name else weight.shape[-1]
    return noise * fan_in**-0.5


def prompt(length: int, seed: int) -> list[int]:
    """Return random tokens; 0 is left to padding."""
    return np.random.RandomState(seed).randint(1, VOCAB, length).tolist()


# -- runs ----------------------------------------------------------------------------------------------------


def decode(model: Any, cache: list[Any], tokens: list[int], forced: list[int] | None = None) -> np.ndarray:
    """Return the logits of TOKENS decoded tokens ``[TOKENS, V]``: greedy, or along ``forced``.

    The prompt goes in as mlx-lm's generators do it: chunks, then its last token alone.
    """
    for start in range(0, len(tokens) - 1, CHUNK):
        model(mx.array([tokens[start : min(start + CHUNK, len(tokens) - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    token, logits = tokens[-1], []
    for step in range(TOKENS):
        out = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        logits.append(np.array(out))
        token = int(logits[-1].argmax()) if forced is None else forced[step]
    return np.stack(logits)


def batched(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], np.ndarray]]:
    """Return tokens and log-probabilities of each prompt through mlx-lm's batch generator."""
    generator = BatchGenerator(model, max_tokens=TOKENS, prefill_step_size=CHUNK)
    uids = generator.insert(prompts)
    out: dict[int, tuple[list[int], list[np.ndarray]]] = {uid: ([], []) for uid in uids}
    try:
        while responses := generator.next_generated():
            for r in responses:
                out[r.uid][0].append(r.token)
                out[r.uid][1].append(np.array(r.logprobs.astype(mx.float32)))
    finally:
        generator.close()
    return [(out[uid][0], np.stack(out[uid][1])) for uid in uids]


def batch_change(model: Any, lengths: tuple[int, int]) -> float:
    """Return how far a batch of two prompts is from each alone: the largest change of a log-probability."""
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths, 1)]
    together = batched(model, prompts)
    alone = [batched(model, [p])[0] for p in prompts]
    change = 0.0
    for (tokens, got), (wanted_tokens, wanted) in zip(together, alone, strict=True):
        if tokens != wanted_tokens:
            return float("inf")
        change = max(change, float(np.abs(got - wanted).max()))
    return change


# -- checks --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What is known of one architecture."""

    name: str
    verdict: str = "failed"
    """works, partly, refused or failed."""
    reason: str = ""
    compressed: list[int] = field(default_factory=list)
    """Which of the model's caches kvmlx holds."""
    left_alone: dict[str, list[int]] = field(default_factory=dict)
    """Which caches stay as the model made them, by kind."""
    identity: str = ""
    drift: float | None = None
    kept: str = ""
    batch: str = ""
    rotary: str = ""
    failures: list[str] = field(default_factory=list)

    def check(self, passed: bool, failure: str) -> None:
        if not passed:
            self.failures.append(failure)


def examine(name: str) -> Result:
    """Run one architecture; whatever goes wrong is in the result."""
    result = Result(name)
    try:
        _examine(result, build(name))
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}")
    if result.failures:
        result.verdict, result.reason = "failed", "; ".join(result.failures)
    return result


def _examine(result: Result, model: Any) -> None:
    tokens = prompt(PROMPT, 1)
    wanted = decode(model, make_stock_cache(model), tokens)
    greedy = wanted.argmax(axis=-1).tolist()
    spread = float(wanted.std())
    result.check(bool(np.isfinite(wanted).all()) and 0.1 < spread < 100, f"logits are degenerate (std {spread:.3g})")
    refused = None
    try:
        cache = make_prompt_cache(model, INT8)
    except UnsupportedModelError as error:
        refused = str(error)
        result.verdict, result.reason = "refused", refusal(model) or refused
    try:
        exact = make_prompt_cache(model, "full")
    except UnsupportedModelError as error:
        result.check(refused is not None, f"full is refused, int8 is not: {error}")
        return
    result.identity = _identity(decode(model, exact, tokens), wanted)
    result.check(result.identity != "no", "full is not the identity")
    if refused is not None:
        return
    layers = _used(exact)
    result.compressed = [i for i, entry in enumerate(exact) if _used([entry])]
    for line in layers[0].session.unmanaged:
        place, _, kind = line.removeprefix("layer ").partition(": ")
        result.left_alone.setdefault(kind, []).append(int(place))
    result.verdict = "partly" if result.left_alone else "works"
    _check_description(result, layers)
    result.rotary = _check_rotary(result, model)
    flipped = _check_int8(result, model, cache, tokens, greedy, wanted)
    _check_streaming(result, model, tokens, greedy)
    _check_batch(result, model, flipped)


def _used(cache: list[Any]) -> list[Any]:
    """Return the compressed layers that hold something: nemotron-nas has caches that no layer uses."""
    return [layer for layer in layers_of(cache) if not layer.empty]


def _identity(got: np.ndarray, wanted: np.ndarray) -> str:
    if np.array_equal(got, wanted):
        return "bits"
    near = np.abs(got - wanted).max() < 1e-5 * max(1.0, float(np.abs(wanted).max()))
    return "1e-5" if near and (got.argmax(-1) == wanted.argmax(-1)).all() else "no"


def _check_description(result: Result, layers: list[Any]) -> None:
    for layer in layers:
        _, h, d, dv = layer.store.shape
        known = (layer.info.n_kv_heads, layer.info.key_dim, layer.info.value_dim)
        for name, told, found in zip(("KV heads", "key dim", "value dim"), known, (h, d, dv), strict=True):
            result.check(told in (0, found), f"layer {layer.layer}: described with {told} {name}, has {found}")


def _check_rotary(result: Result, model: Any) -> str:
    """Compare the measured rotary embeddings with the model's own keys of one token at several positions."""
    cache = make_prompt_cache(model, "full")
    positions = np.array([0, 1, 7, 77])
    # Each position as the first of a sequence of its own: fails where layers share an offset.
    rows = [_keys_at(model, make_prompt_cache(model, "full"), [5], p) for p in positions]
    probes = [[mx.concatenate(list(layer), axis=2) for layer in zip(*rows, strict=True)]]
    if not any(isinstance(part, ArraysCache) for entry in cache for part in getattr(entry, "caches", [entry])):
        # One token repeated: without a recurrent state or attention sinks, they differ by rotation alone.
        probes.append([k[:, :, mx.array(positions)] for k in _keys_at(model, cache, [5] * 78, 0)])
    cache = make_prompt_cache(model, "full")
    model(mx.array([[5]]), cache=cache)
    kinds = set()
    for layer, *keys in zip(_used(cache), *probes, strict=True):
        off = min(_rotary_error(k, positions, layer.info.rotary) for k in keys)
        if layer.info.rotary is None:
            kinds.add("none" if off < 1e-3 else "not measured")
            continue
        kinds.add("plain")
        result.check(off < 1e-3, f"layer {layer.layer}: the measured rotary embedding is off by {off:.2g}")
    return ", ".join(sorted(kinds))


def _rotary_error(keys: mx.array, positions: np.ndarray, rotary: Rotary | None) -> float:
    """Return how far keys ``[1, H, n, D]`` are from the first one turned to their positions, relative."""
    wanted = mx.broadcast_to(keys[:, :, :1], keys.shape)
    if rotary is not None:
        still = ops.unrotate(BACKEND, wanted, np.zeros((1, len(positions))), rotary)
        wanted = ops.rotate(BACKEND, still, positions[None], rotary)
    return float(mx.abs(wanted - keys).max() / mx.abs(keys).max())


def _keys_at(model: Any, cache: list[Any], tokens: list[int], start: int) -> list[mx.array]:
    """Return each layer's keys of ``tokens`` that are told to begin at ``start``."""
    for layer in layers_of(cache):
        layer.start(1)
        layer.offsets[:] = start
    model(mx.array([tokens]), cache=cache)
    return [layer.store.tail()[0] for layer in _used(cache)]


def _check_int8(
    result: Result, model: Any, cache: list[Any], tokens: list[int], greedy: list[int], wanted: np.ndarray
) -> float:
    """Return the largest change of a logit."""
    got = decode(model, cache, tokens, greedy)
    result.drift = float(np.abs(got - wanted).mean() / wanted.std())
    result.check(0 < result.drift < SMALL_DRIFT, f"int8 drifts by {result.drift:.3g}")
    for layer in _used(cache):
        store = layer.store
        result.check(store.has_body and int(store.lengths.min()) == PROMPT + TOKENS - 1, "int8 is not used")
    return float(np.abs(got - wanted).max())


def _check_streaming(result: Result, model: Any, tokens: list[int], greedy: list[int]) -> None:
    cache = make_prompt_cache(model, STREAMING, inspect=True)
    got = decode(model, cache, tokens, greedy)
    settle(cache)
    result.check(bool(np.isfinite(got).all()), "streaming gives logits that are not finite")
    kept = {int(n) for layer in _used(cache) for n in layer.store.lengths.ravel()}
    half = PROMPT // 2
    result.kept = ", ".join(map(str, sorted(kept)))
    result.check(kept == {half + TOKENS - 1}, f"streaming keeps {result.kept} rows, not {half + TOKENS - 1}")
    rows = [r for layer in _used(cache) for r in layer.positions()[0]]
    end = PROMPT + TOKENS - 1
    recent = list(range(end - (half + TOKENS - 3), end))
    result.check(all(r.tolist() == [0, 1, *recent] for r in rows), "streaming keeps other rows than it should")


def _check_batch(result: Result, model: Any, int8_change: float) -> None:
    """A batch must give what each sequence gives alone, wherever it does with mlx-lm's own caches.

    Another order of sums may tip the rounding of a code: int8 may differ as much as from exact rows.
    """
    for word, second in (("equal", SHORT), ("equal lengths only", PROMPT)):
        result.batch, lengths = word, (PROMPT, second)
        try:
            stock = batch_change(model, lengths)
        except Exception as error:
            result.batch = f"not in mlx-lm ({type(error).__name__})"
            return
        if stock < SAME_LOGPROB:
            break
    else:
        result.batch = "differs in mlx-lm too"
        return
    for strategy in ("full", INT8, STREAMING):
        wrap_model(model, strategy)
        try:
            change = batch_change(model, lengths)
        finally:
            unwrap_model(model)
        most = max(SAME_LOGPROB, int8_change) if strategy == INT8 else SAME_LOGPROB
        result.check(change < most, f"a batch with {strategy} is off by {change:.3g}")


# -- the page ------------------------------------------------------------------------------------------------

COLUMNS = (
    "architecture",
    "verdict",
    "compressed",
    "left alone",
    "full",
    "int8",
    "rows kept",
    "batch",
    "rotary",
)


def row(result: Result) -> tuple[str, ...]:
    """Return a result as the cells of COLUMNS."""
    alone = ", ".join(f"{kind} {_places(at)}" for kind, at in result.left_alone.items())
    drift = "" if result.drift is None else f"{result.drift:.2%}"
    layers = _places(result.compressed)
    return (
        *(result.name, result.verdict, layers, alone, result.identity),
        *(drift, result.kept, result.batch, result.rotary),
    )


def _places(indices: list[int]) -> str:
    return ", ".join(map(str, indices))


def page(results: list[Result]) -> str:
    """Return docs/compatibility.md."""
    count = {v: sum(r.verdict == v for r in results) for v in ("works", "partly", "refused", "failed")}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    refused = [r for r in results if r.verdict in ("refused", "failed")]
    device = "Metal" if mx.metal.is_available() else "CPU"
    parts = [
        "# Which models work",
        "<!-- Written by scripts/compatibility.py; do not edit. -->",
        f"<!-- table {digest()} -->",
        f"{len(results)} of mlx-lm's architectures were run: {count['works']} work, "
        f"{count['partly']} work in part (layers with a cache of another kind are left as they are), "
        f"{count['refused']} are refused by name, {count['failed']} fail.",
        f"Made with {versions} on {platform.system()} {platform.machine()}, {device}, float32, by "
        "`python scripts/compatibility.py`. Each is a small model with seeded random weights, so this page "
        "tells whether kvmlx and the model's code fit, and nothing about quality.",
        "\n".join(LEGEND),
        _markdown(COLUMNS, [row(r) for r in results]),
        "## Refused",
        "Where a model has plain KV caches, `full` still works: it is mlx-lm's own computation.",
        _markdown(("architecture", "reason"), [(r.name, r.reason) for r in refused]),
        "## Not run",
        "bitnet is run, without Metal, with dense layers in place of its ternary ones.",
        _markdown(("architecture", "reason"), list(NOT_BUILT.items())),
    ]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "- compressed: the layers whose cache kvmlx holds, from 0. Left alone: those whose cache stays as the "
    "model makes it. `RotatingKVCache` is a sliding window, `ArraysCache` the state of a state-space, "
    "linear-attention or convolution layer, `ChunkedKVCache` attention in chunks.",
    f"- full: logits against mlx-lm's own cache, over a prompt of {PROMPT} tokens in chunks of {CHUNK} and "
    f"{TOKENS} decoded ones: equal to the bit, or within 1e-5.",
    f"- int8: mean change of a logit under `{INT8}`, as a part of the logits' standard deviation.",
    f"- rows kept: of {PROMPT + TOKENS - 1}, under `{STREAMING}`; the kept positions are checked too.",
    f"- batch: prompts of {PROMPT} and {SHORT} tokens together through mlx-lm's batch generator give what "
    "each gives alone, with `full`, `int8` and `streaming`. Where mlx-lm's own caches do not, "
    "equal lengths are tried.",
    "- rotary: whether the rotary embedding was measured (plain), is absent (none), or could not be (not "
    "measured); only `expected_attention` needs it.",
)


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rich(results: list[Result]) -> Table:
    table = Table(*COLUMNS, title=f"mlx-lm {importlib.metadata.version('mlx-lm')}")
    colors = {"works": "green", "partly": "cyan", "refused": "yellow", "failed": "red"}
    for result in results:
        name, verdict, *rest = row(result)
        table.add_row(name, f"[{colors[verdict]}]{verdict}[/]", *rest)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    names = args.only or list(ARCHITECTURES)
    console = Console(stderr=True)
    results = [examine(name) for name in track(names, "Running", console=console)]
    if args.json:
        print(json.dumps([asdict(r) for r in results], indent=2))
    else:
        Console().print(_rich(results))
    for result in results:
        if result.verdict == "failed":
            console.print(f"[red]{result.name}[/]: {result.reason}")
    if not args.only:
        PAGE.write_text(page(results), encoding="utf-8")
    return int(any(r.verdict == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main())
