"""The command line run in this process, and a tiny model of random weights for it. Fixtures: conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, HIDDEN = 2, 4, 2, 32, 128
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last or not continue_final_message %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line in-process, 80 columns wide, with a kvmlx cache folder of its own."""
    # Here, since a machine that only checks the kernels need not have it.
    from typer.testing import CliRunner

    from kvmlx.cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setenv("KVMLX_CACHE_DIR", str(tmp_path / "kvmlx-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def invoke(*args: str, code: int = 0, text: str | None = None) -> Any:
        result = CliRunner().invoke(app, list(args), input=text, prog_name="kvmlx")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama of random weights with a byte-level tokenizer and a chat template, as a model folder."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(
        folder / "config.json",
        {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_KV_HEADS,
            "rms_norm_eps": 1e-5,
            "vocab_size": len(vocab),
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "eos_token_id": 0,
        },
    )
    save_file(_weights(len(vocab)), folder / "model.safetensors")
    return str(folder)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def _weights(n_vocab: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = N_KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (64, HIDDEN),
        "mlp.up_proj": (64, HIDDEN),
        "mlp.down_proj": (HIDDEN, 64),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    every = {f"model.layers.{i}.{name}.weight": shape for i in range(N_LAYERS) for name, shape in shapes.items()}
    every |= {"model.embed_tokens.weight": (n_vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {name: (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in every.items()}
