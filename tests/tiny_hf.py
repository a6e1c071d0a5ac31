"""Tiny transformers models of random weights, made in memory from their configurations: nothing is fetched."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_model import llama_config, llama_weights
from torch import Tensor

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING: dict[str, Any] = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED: dict[str, Any] = {
    "num_hidden_layers": 6,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3n_text": SHARED
    | {
        "intermediate_size": [96] * 6,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": SHARED | {"num_experts": None, "moe_intermediate_size": None},
    "glm": {},
    "gpt2": {},
    "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "mamba": {},
    "mistral": {"sliding_window": 32},
    "phi": {},
    "qwen3": {},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "t5": {},
}
"""What a model type needs beyond COMMON, or in place of it."""


def config(kind: str, **changed: Any) -> Any:
    """Return a tiny configuration; of COMMON it takes what its class knows."""
    cls = transformers.CONFIG_MAPPING[kind]
    own = KINDS[kind] | changed
    known = {*cls.__dataclass_fields__, *cls.attribute_map}
    given = {cls.attribute_map.get(name, name) for name in own}
    common = {k: v for k, v in COMMON.items() if k in known and cls.attribute_map.get(k, k) not in given}
    return cls(**common, **own)


def tiny(kind: str, *, seed: int = 0, **changed: Any) -> Any:
    """Return a tiny model of random weights; greedy decoding of it wanders.

    Args:
        kind: model type, one of KINDS.
        seed: of the weights.
        changed: what differs in the configuration.
    """
    made = config(kind, **changed)
    auto = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(made, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random(name, weight, generator))
    return _ready(model)


def _random(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim < 2:
        return weight + 0.1 * noise
    if "embed" in name or "wte" in name:
        return noise
    gain = 1.7 if any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "dense")) else 1.0
    return noise * gain * weight.shape[-1] ** -0.5


def tiny_llama(*, seed: int = 0, **changed: Any) -> Any:
    """Return the tiny llama of `tiny_model`, same weights, as transformers has it."""
    plain = llama_config(**changed)
    more = {name: COMMON[name] for name in ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")}
    made = transformers.LlamaConfig(**{k: v for k, v in plain.items() if k != "model_type"}, **more)
    model = transformers.LlamaForCausalLM(made)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in llama_weights(plain, seed=seed).items()})
    return _ready(model)


def _ready(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)
