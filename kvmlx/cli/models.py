"""Where a model comes from: a folder, the Hugging Face Hub, or the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvmlx.cli.output import UsageError
from kvmlx.explain import hub_message, looks_local, read_config

DEMO = "demo"


def resolve_model(name: str) -> str:
    """Return what mlx-lm's ``load`` takes: the word `demo` becomes the demo model's folder, made if needed.

    Raises:
        UsageError: the name is a path, and no model is there.
        DemoModelError: the demo model cannot be had.
    """
    if name == DEMO and not Path(name).exists():
        from kvmlx.demo_model import ensure_demo_model

        return str(ensure_demo_model())
    if looks_local(name):
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            what = "is a file" if path.is_file() else "has no config.json" if path.exists() else "does not exist"
            raise UsageError(f"no model at {name}: it {what}; give a folder, a Hub repository, or `demo`")
        return str(path)
    return name


def config_of(name: str) -> dict[str, Any]:
    """Return a model's config.json; from the Hub nothing else is fetched."""
    return read_config(resolve_model(name))


def tokenizer_of(name: str) -> Any:
    """Return a model's tokenizer alone; mlx-lm and the torch backend both bring the package that reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(name))


def load_error(name: str, error: Exception) -> UsageError | None:
    """Return one line for what mlx-lm's ``load`` raised, None for what looks like a bug."""
    module = type(error).__module__.partition(".")[0]
    # Missing repositories, no network, no permission: all come from the Hub's client or its HTTP library.
    if module in {"huggingface_hub", "requests", "httpx", "httpx2", "httpcore", "httpcore2"}:
        return UsageError(hub_message(name, error))
    if isinstance(error, OSError | ValueError):
        return UsageError(f"cannot load {name!r}: {error}")
    return None
