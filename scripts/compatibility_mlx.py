"""mlx-lm's side of scripts/compatibility.py: small random models of its architectures, and how they are run."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.cache import make_prompt_cache as make_stock_cache

from kvmlx.backends.mlx import layers_of, make_prompt_cache, settle, unwrap_model, wrap_model
from kvmlx.session import LayerCache
from scripts.compatibility_checks import CHUNK, POSITIONS, TOKENS, VOCAB, Config, Side

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

NOT_RUN: dict[str, str] = {
    "muse_spark": "its layers call Metal kernels of mlx-lm's, and this page is made without Metal",
    "phi3small": "mlx-lm's own forward damages memory on MLX's CPU build; kvmlx refuses it",
    "olmo": "needs another package, and mlx-lm's own forward fails on a prompt; kvmlx refuses it",
    "deepseek_v41": "its caches are its own, no KV caches of mlx-lm's; kvmlx refuses it",
    "prism_hadamard_qwen35": "qwen3_5 with packed 2-bit weights, which random ones cannot stand for",
}
"""Architectures of mlx-lm that no small random instance is made of, with the reason."""


class MLXSide(Side):
    """mlx-lm's models through kvmlx's adapter to it."""

    name = "mlx"
    framework = "mlx-lm"
    packages = ("mlx", "mlx-lm")
    architectures = ARCHITECTURES
    common = COMMON
    not_run = NOT_RUN

    def device(self) -> str:
        return "Metal" if mx.metal.is_available() else "CPU"

    def build(self, name: str, /) -> Any:
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

    def stock_cache(self, model: Any, /) -> list[Any]:
        return make_stock_cache(model)

    def make_prompt_cache(self, model: Any, strategy: str, *, inspect: bool = False) -> list[Any]:
        return make_prompt_cache(model, strategy, inspect=inspect)

    def settle(self, cache: list[Any], /) -> None:
        settle(cache)

    def used(self, cache: list[Any], /) -> dict[int, LayerCache]:
        """Return the compressed layers that hold something: nemotron-nas has caches that no layer uses."""
        return {i: layer for i, entry in enumerate(cache) for layer in layers_of([entry]) if not layer.empty}

    def decode(self, model: Any, cache: list[Any], tokens: list[int], forced: list[int] | None = None) -> np.ndarray:
        """As mlx-lm's generators do it, the prompt's last token goes in alone."""
        for start in range(0, len(tokens) - 1, CHUNK):
            model(mx.array([tokens[start : min(start + CHUNK, len(tokens) - 1)]]), cache=cache)
            mx.eval([c.state for c in cache])
        token, logits = tokens[-1], []
        for step in range(TOKENS):
            out = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
            logits.append(np.array(out))
            token = int(logits[-1].argmax()) if forced is None else forced[step]
        return np.stack(logits)

    def generate(
        self, model: Any, prompts: list[list[int]], strategy: str | None
    ) -> list[tuple[list[int], np.ndarray]]:
        if strategy is None:
            return self._generate(model, prompts)
        wrap_model(model, strategy)
        try:
            return self._generate(model, prompts)
        finally:
            unwrap_model(model)

    def _generate(self, model: Any, prompts: list[list[int]]) -> list[tuple[list[int], np.ndarray]]:
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

    def turned_keys(self, model: Any, /) -> list[list[np.ndarray]]:
        # Each position as the first of a sequence of its own: wrong where layers share an offset.
        rows = [self._keys_at(model, [5], int(p)) for p in POSITIONS]
        found = [[np.concatenate(layer, axis=2) for layer in zip(*rows, strict=True)]]
        cache = make_prompt_cache(model, "full")
        if not any(isinstance(part, ArraysCache) for entry in cache for part in getattr(entry, "caches", [entry])):
            # One token repeated: without a recurrent state or attention sinks, they differ by rotation alone.
            found.append([keys[:, :, POSITIONS] for keys in self._keys_at(model, [5] * (int(POSITIONS[-1]) + 1), 0)])
        return found

    def _keys_at(self, model: Any, tokens: list[int], start: int) -> list[np.ndarray]:
        """Return each layer's keys of ``tokens`` that are told to begin at ``start``."""
        cache = make_prompt_cache(model, "full")
        for layer in layers_of(cache):
            layer.start(1)
            layer.offsets[:] = start
        model(mx.array([tokens]), cache=cache)
        return [np.array(layer.store.tail()[0]) for layer in self.used(cache).values()]


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


SIDE = MLXSide()
