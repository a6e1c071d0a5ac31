"""transformers' side of scripts/compatibility.py: small random models of its architectures, and how they are run."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvmlx.backends.torch import KVMLXLayer, make_prompt_cache, settle
from kvmlx.session import LayerCache
from scripts.compatibility_checks import CHUNK, POSITIONS, TOKENS, VOCAB, Config, Side

COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "sliding_window": None,
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
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The names under which most configurations ask for the same things; each takes those that it knows."""

SLIDING: Config = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR: Config = {"layer_types": ["linear_attention", "full_attention"] * 2}
MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
INDEXER: Config = {"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2}
DELTA: Config = LINEAR | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SSD: Config = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}
MAMBA: Config = {"state_size": 16, "time_step_rank": 4, "intermediate_size": 128}
INKLING: Config = {
    "unpadded_vocab_size": VOCAB,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "sliding_window": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "rel_extent": 64,
    "logits_mup_width_multiplier": 1.0,
}
VISION: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 64,
    "patch_size": 16,
}

ARCHITECTURES: dict[str, Config] = {
    "afmoe": SLIDING | {"num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4},
    "axk1": MLA,
    "axk2": MLA | INDEXER,
    "bailing_hybrid": MLA | LINEAR | {"linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": SSD | {"attn_layer_indices": [1, 3]},
    "beam": SLIDING,
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 1.0},
    "cohere2": SLIDING | {"logit_scale": 1.0},
    "cohere2_moe": SLIDING | {"logit_scale": 1.0},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "sliding_window": 32,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "ctrl": {"dff": 96},
    "cwm": SLIDING,
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | INDEXER,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "q_lora_rank": 24,
        "sliding_window": 32,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "qk_rope_head_dim": 8,
        **INDEXER,
    },
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "dots3_note_text": MLA | INDEXER | {"shared_experts_intermediate_size": 48, "sliding_window": 32},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_h1": SSD | {"mamba_d_ssm": 128},
    "falcon_mamba": MAMBA,
    "flex_olmo": {},
    "flint": SLIDING | {"mlp_only_layers": [0]},
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3": {"text_config": "gemma3_text", "vision_config": VISION},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "intermediate_size": [96] * 6,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4": {"text_config": "gemma4_text", "vision_config": VISION, "audio_config": None},
    "gemma4_text": {
        "num_hidden_layers": 6,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "num_experts": None,
        "moe_intermediate_size": None,
    },
    "gemma4_unified_text": SLIDING,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA | INDEXER,
    "gpt-sw3": {"num_key_value_heads": 4},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 32},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": SLIDING,
    "gptj": {"rotary_dim": 8},
    "granite": {"attention_multiplier": 0.25},
    "granite_swa": SLIDING | {"attention_multiplier": 0.25},
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": SLIDING | {"attention_multiplier": 0.25},
    "granitemoehybrid": SSD | LINEAR | {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "helium": {},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": MLA | INDEXER,
    "hyperclovax": {},
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 16},
    "jetmoe": {},
    "kimi_linear": MLA | LINEAR | {"linear_head_dim": 16, "linear_num_heads": 4, "q_lora_rank": None},
    "kolibri1": SLIDING,
    "laguna": SLIDING | {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention", "full_attention"], "sliding_window": 32},
    "llama": {},
    "llama4_text": {
        "attention_chunk_size": 32,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": MLA
    | {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "moe_topk": 2, "zero_expert_num": 1},
    "mamba": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    "mellum": SLIDING,
    "mimo_v2_flash": SLIDING | {"head_dim": 24, "v_head_dim": 16},
    "minicpm3": MLA,
    "minimax": LINEAR | {"block_size": 32},
    "minimax_m2": {"rotary_dim": 8},
    "minimax_m3_vl_text": {"rotary_dim": 8, "dense_intermediate_size": 96},
    "ministral": SLIDING,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "chunk_size": 32,
        "moe_shared_expert_intermediate_size": 48,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmo_hybrid": DELTA | {"linear_num_key_heads": 4},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_moe": {},
    "qwen3_next": DELTA,
    "qwen4_exp_text": DELTA
    | {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32, "num_key_value_heads": 1},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": SLIDING,
    "xglm": {"ffn_dim": 96},
    "youtu": MLA,
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What each of transformers' causal language models asks for beyond, or in place of, COMMON, by model type.

``text_config`` names another of them, whose configuration it takes in.
"""

_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod"
)
_ENCODER_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart "
    "prophetnet trocr whisper"
)
_TEXT_RUN = "dots3_note gemma3n gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp"
_MODALITIES = "emu3 fuyu git got_ocr2 mllama moshi moss_transcribe_diarize phi4_multimodal"
_ASSISTANTS = "gemma4_assistant gemma4_unified_assistant"
_OWN = "cpmant reformer xlnet xlstm"

NOT_RUN: dict[str, str] = {
    **dict.fromkeys(_ENCODERS.split(), "an encoder, which can be run as a decoder"),
    **dict.fromkeys(
        _ENCODER_DECODERS.split(), "an encoder-decoder, or the decoder of one: attends to an encoder's output"
    ),
    **dict.fromkeys(_TEXT_RUN.split(), "its language model is run, by the name that ends in _text"),
    **dict.fromkeys(
        _MODALITIES.split(), "reads images, audio or video through a tower that a small model cannot stand for"
    ),
    **dict.fromkeys(_ASSISTANTS.split(), "drafts for another model and reads that model's cache"),
    **dict.fromkeys(_OWN.split(), "its forward takes no cache of transformers' common kind"),
    "blt": "three transformers over bytes and patches of them, each with a cache of its own",
}
"""Causal language models of transformers' that no small random instance is made of, with the reason."""


class TorchSide(Side):
    """transformers' models through kvmlx's adapter to it."""

    name = "torch"
    framework = "transformers"
    packages = ("torch", "transformers")
    architectures = ARCHITECTURES
    common = COMMON
    not_run = NOT_RUN

    def device(self) -> str:
        return "CPU"

    def build(self, name: str, /) -> Any:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.copy_(_random(key, weight, generator))
        model.generation_config.eos_token_id = None
        return model.eval()

    def stock_cache(self, model: Any, /) -> None:
        """The model makes its own at its first call."""

    def make_prompt_cache(self, model: Any, strategy: str, *, inspect: bool = False) -> Any:
        return make_prompt_cache(model, strategy, inspect=inspect)

    def used(self, cache: Any, /) -> dict[int, LayerCache]:
        """Return the compressed layers that hold something: layers may read the rows of others."""
        entries = ((i, entry.layer) for i, entry in enumerate(cache.layers) if isinstance(entry, KVMLXLayer))
        return {i: layer for i, layer in entries if not layer.empty}

    def settle(self, cache: Any, /) -> None:
        settle(cache)

    @torch.no_grad()
    def decode(self, model: Any, cache: Any, tokens: list[int], forced: list[int] | None = None) -> np.ndarray:
        """As `generate` does it, the prompt's last chunk gives the first logits."""
        pieces = [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]
        logits: list[np.ndarray] = []
        while len(logits) < TOKENS:
            out = model(torch.tensor([pieces.pop(0)]), past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", cache)
            if not pieces:
                logits.append(out.logits[0, -1].float().numpy())
                pieces.append([int(logits[-1].argmax()) if forced is None else forced[len(logits) - 1]])
        return np.stack(logits)

    def generate(
        self, model: Any, prompts: list[list[int]], strategy: str | None
    ) -> list[tuple[list[int], np.ndarray]]:
        """Prompts are padded on the left."""
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        out = model.generate(
            padded,
            attention_mask=(padded != 0).long(),
            past_key_values=None if strategy is None else make_prompt_cache(model, strategy),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.stack(out.logits, dim=1).log_softmax(dim=-1).numpy()
        return [(row[longest:].tolist(), logprobs[b]) for b, row in enumerate(out.sequences)]

    def turned_keys(self, model: Any, /) -> list[list[np.ndarray]]:
        found = []
        if "position_ids" in signature(model.forward).parameters:
            # Each position as the first of a sequence of its own.
            rows, _ = self._keys(model, [[5]] * len(POSITIONS), position_ids=torch.from_numpy(POSITIONS)[:, None])
            found.append([keys.transpose(2, 1, 0, 3) for keys in rows])
        rows, cache = self._keys(model, [[5] * (int(POSITIONS[-1]) + 1)])
        if not any(isinstance(entry, LinearAttentionCacheLayerMixin) for entry in cache.layers):
            # One token repeated: without a recurrent state or attention sinks, they differ by rotation alone.
            found.append([keys[:, :, POSITIONS] for keys in rows])
        return found

    @torch.no_grad()
    def _keys(self, model: Any, tokens: list[list[int]], **kwargs: Tensor) -> tuple[list[np.ndarray], Any]:
        """Return each used layer's keys of ``tokens [B, T]`` as ``[B, H, T, D]``, and the cache."""
        cache = make_prompt_cache(model, "full")
        model(torch.tensor(tokens), past_key_values=cache, use_cache=True, **kwargs)
        return [layer.store.tail()[0].numpy() for layer in self.used(cache).values()], cache


def _config(name: str) -> Any:
    """Return the configuration of a small model; of COMMON it takes what its class knows."""
    kind, own = CONFIG_MAPPING[name], dict(ARCHITECTURES[name])
    if "text_config" in own:
        own["text_config"] = _config(own["text_config"])
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    given = {kind.attribute_map.get(key, key) for key in own}
    common = {k: v for k, v in COMMON.items() if k in known and kind.attribute_map.get(k, k) not in given}
    return kind(**common, **own)


def _random(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a weight that keeps activations near 1; vectors stay near what the model starts from."""
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim < 2 or weight.numel() == weight.shape[-1]:
        return weight + 0.1 * noise
    if "embed" in name or "wte" in name:
        return noise
    fan_in = int(np.prod(weight.shape[1:])) if "conv" in name else weight.shape[-1]
    return noise * fan_in**-0.5


SIDE = TorchSide()
