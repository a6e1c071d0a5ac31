"""Tiny models of random weights, in memory or as a folder with a tokenizer: no network, made in milliseconds.

The weights are scaled so that attention decides what comes next: greedy decoding wanders, and forgetting or
coarsening a row shows in the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last or not continue_final_message %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


def llama_config(**changed: Any) -> dict[str, Any]:
    """Return the configuration of a tiny llama."""
    return {**LLAMA, **changed}


def llama_weights(config: dict[str, Any], *, seed: int = 0, spoken: Sequence[int] | None = None) -> dict[str, Any]:
    """Return random float32 weights by mlx-lm's names.

    Args:
        config: as `llama_config` returns it.
        seed: of the generator.
        spoken: the only tokens that the model ever says; None for all.
    """
    rng = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    # (rows, columns, standard deviation of an output of unit input)
    shapes = {
        "self_attn.q_proj": (heads, hidden, 1.4),
        "self_attn.k_proj": (kv_heads, hidden, 1.4),
        "self_attn.v_proj": (kv_heads, hidden, 2.0),
        "self_attn.o_proj": (hidden, heads, 2.0),
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, 0.7),
    }
    every = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    every["model.embed_tokens.weight"] = (config["vocab_size"], hidden, hidden**0.5)
    every["lm_head.weight"] = (config["vocab_size"], hidden, 3.0)
    weights = {
        name: (rng.standard_normal((rows, columns)) * (scale / columns**0.5)).astype(np.float32)
        for name, (rows, columns, scale) in every.items()
    }
    if spoken is not None:
        weights["lm_head.weight"][np.setdiff1d(np.arange(config["vocab_size"]), spoken)] = 0
    norms = [
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in range(config["num_hidden_layers"])
        for n in ("input", "post_attention")
    ]
    return weights | {name: np.ones(hidden, np.float32) for name in [*norms, "model.norm.weight"]}


def tiny_llama(*, seed: int = 0, dtype: str = "float32", **changed: Any) -> Any:
    """Return a tiny llama in memory.

    Args:
        seed: of the weights.
        dtype: of the weights.
        changed: what differs from `LLAMA`.
    """
    import mlx.core as mx
    from mlx_lm.models import llama

    config = llama_config(**changed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights([(name, mx.array(w)) for name, w in llama_weights(config, seed=seed).items()])
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model


def tiny_vocab() -> dict[str, int]:
    """Return the tokens of `write_tokenizer`: the special ones, then one for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer: Any = Tokenizer(models.BPE(vocab=tiny_vocab(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a tiny llama that speaks printable ASCII, with its tokenizer, as mlx-lm loads it; return the folder."""
    from safetensors.numpy import save_file

    vocab = tiny_vocab()
    config = llama_config(vocab_size=len(vocab), torch_dtype="float32", eos_token_id=0, **changed)
    spoken = [i for token, i in vocab.items() if len(token) == 1 and "!" <= token <= "~"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(llama_weights(config, seed=seed, spoken=spoken), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder
