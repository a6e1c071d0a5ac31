"""`kvmlx generate | chat | server | cache_prompt`: mlx-lm's own commands over a compressed cache.

The stock ``main()`` runs unchanged in this process, with its own parser. The few names that it calls to load
a model and to make, load and save a cache are exchanged in its module while it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvmlx.cli.held import Held, chat_status, held_by, summary
from kvmlx.cli.models import load_error, resolve_model
from kvmlx.cli.output import PrefillBar, UsageError, print_json, stderr
from kvmlx.types import KVMLXError

if TYPE_CHECKING:
    from kvmlx.strategy import Strategy

REFUSED = {
    "--kv-bits": "the strategy says how rows are stored, e.g. --kv int4",
    "--max-kv-size": "the strategy says how many tokens stay, e.g. --kv 'streaming(budget=1024)'",
}
"""Flags of mlx-lm that say again, or otherwise, what ``--kv`` says."""


class Stock:
    """One run of a stock command: what it was asked for and what came of it.

    Args:
        command: the module of mlx-lm.
        args: its own flags.
        kv: text of the strategy; None runs the stock cache.
        dtype: type to bring the model to.
        as_json: print one JSON document instead of text.
    """

    def __init__(
        self, command: str, args: list[str], *, kv: str | None, dtype: str | None, as_json: bool = False
    ) -> None:
        self.command = command
        self.args = args
        self.dtype = dtype
        self.as_json = as_json
        self.strategy = _parse(kv, args) if kv is not None else None
        self.model: Any = None
        self.caches: list[Any] | None = None
        self.response: Any = None
        self.text: list[str] = []
        self._bytes_before = 0

    def run(self) -> None:
        """Run the command to its end."""
        module = _import(self.command)
        args = [*self.args, "--verbose", "False"] if self.as_json and self.command == "generate" else self.args
        quiet = contextlib.redirect_stdout(io.StringIO()) if self.as_json else contextlib.nullcontext()
        with _exchanged(module, self._replacements(module)), _argv(self.command, args), quiet:
            module.main()
        self._finish()

    def _replacements(self, module: ModuleType) -> dict[str, Any]:
        """Return what stands in for names of the stock module, for those that it has."""
        made = {
            "load": self._load(module.load),
            "sharded_load": self._load(getattr(module, "sharded_load", None), sharded=True),
            "make_prompt_cache": self._make_cache(module.make_prompt_cache),
        }
        if self.command in ("generate", "chat"):
            made["stream_generate"] = self._stream(module.stream_generate)
        if self.command == "generate":
            made["load_prompt_cache"] = self._load_cache
        if self.command == "cache_prompt":
            made["save_prompt_cache"] = self._save_cache(module.save_prompt_cache)
        if self.command == "chat":
            made["ChatUI"] = _chat_ui(module.ChatUI, self)
        return {name: value for name, value in made.items() if hasattr(module, name)}

    def _finish(self) -> None:
        held = held_by(self.caches) if self.caches is not None else None
        if held is None or self.command in ("chat", "server"):
            return
        if self.as_json:
            print_json(self._document(held))
            return
        peak, tps = _peak_bytes(), self.response.generation_tps if self.response else None
        stderr().print(summary(held, peak, tps), soft_wrap=True)

    def _document(self, held: Held) -> dict[str, Any]:
        document: dict[str, Any] = {"cache": held.document(), "peak_nbytes": _peak_bytes()}
        if (response := self.response) is not None:
            names = ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "finish_reason")
            document = {"text": "".join(self.text), **{n: getattr(response, n) for n in names}, **document}
        return document

    def _load(self, load: Callable[..., Any] | None, *, sharded: bool = False) -> Callable[..., Any]:
        @wraps(load or _import)
        def stand_in(name: str, *args: Any, **kwargs: Any) -> Any:
            assert load is not None
            path = resolve_model(name)
            try:
                loaded = load(path, *args, **kwargs)
            except KVMLXError:
                raise
            except Exception as error:
                if (line := load_error(name, error)) is None:
                    raise
                raise line from error
            # The stock commands give a tokenizer_config for every model but a draft model.
            self._prepare(loaded[0], main=sharded or "tokenizer_config" in kwargs)
            return loaded

        return stand_in

    def _prepare(self, model: Any, *, main: bool) -> None:
        if self.dtype is not None:
            import mlx.core as mx

            model.set_dtype(getattr(mx, self.dtype))
        if not main:
            return
        self.model = model
        if self.strategy is not None:
            from kvmlx.backends.mlx import wrap_model

            wrap_model(model, self.strategy)
        if self.command == "server":
            self._log_server(model)

    def _log_server(self, model: Any) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        batches = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))
        draft = any("--draft-model".startswith(flag) and len(flag) > len("--d") for flag in _flags(self.args))
        how = "requests are served one at a time"
        if draft:
            how += ", as always with a draft model"
        elif batches:
            how = "concurrent requests are batched"
        logging.info(f"KV cache: {self.strategy or 'the full cache of mlx-lm'}; {how}")

    def _make_cache(self, make: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @wraps(make)
        def stand_in(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
            caches = make(model, *args, **kwargs)
            if model is self.model:
                self.caches = caches
            return caches

        return stand_in

    def _load_cache(self, path: str, return_metadata: bool = False) -> Any:
        if not Path(path).is_file():
            raise UsageError(
                f"no prompt cache at {path}: make one with `kvmlx cache_prompt --prompt-cache-file {path}`"
            )
        caches, metadata = _read_cache(path)
        saved = held_by(caches).strategy
        if saved is not None:
            from kvmlx.backends.mlx import install

            install()
        if self.strategy is not None and saved != str(self.strategy):
            raise UsageError(
                f"{path} was saved with {saved or 'a full cache'}, not with --kv {str(self.strategy)!r}: "
                "leave --kv away, or make the file again with `kvmlx cache_prompt --kv`"
            )
        self.caches = caches
        return (caches, metadata) if return_metadata else caches

    def _save_cache(self, save: Callable[..., None]) -> Callable[..., None]:
        @wraps(save)
        def stand_in(path: str, caches: list[Any], metadata: dict[str, str] | None = None) -> None:
            if self.strategy is None:
                save(path, caches, metadata)
                return
            import kvmlx

            kvmlx.settle(caches)
            kvmlx.save_prompt_cache(path, caches, metadata)

        return stand_in

    def _stream(self, stream: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(stream)
        def stand_in(model: Any, tokenizer: Any, prompt: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            bar = PrefillBar()
            if kwargs.get("draft_model") is None:
                kwargs.setdefault("prompt_progress_callback", bar)
            try:
                for response in stream(model, tokenizer, prompt, *args, **kwargs):
                    bar.close()
                    self.response = response
                    self.text.append(response.text)
                    yield response
            finally:
                bar.close()

        return stand_in

    def chat_status(self) -> str:
        """Return one line on the cache of a chat, and how it has grown since the last."""
        held = held_by(self.caches or [])
        line, self._bytes_before = chat_status(held, self._bytes_before), held.nbytes
        return line


def stock_help(command: str) -> str:
    """Return the stock command's own flags, as its parser prints them."""
    text = io.StringIO()
    try:
        module = _import(command)
        with _argv(command, ["--help"]), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            module.main()
    except ModuleNotFoundError:
        return " Flags of mlx-lm are shown once it is installed: pip install 'kvmlx[mlx]'\n"
    lines = text.getvalue().splitlines()
    start = next((i for i, line in enumerate(lines) if line.endswith(":") and not line.startswith(" ")), 0)
    body = [line for line in lines[start + 1 :] if not line.lstrip().startswith("-h, --help")]
    return "\n".join([f" Flags of mlx_lm.{command}:", *body]) + "\n\n"


def _parse(kv: str, args: list[str]) -> Strategy:
    from kvmlx.strategy import Strategy

    strategy = Strategy.parse(kv)
    for flag in _flags(args):
        for refused, why in REFUSED.items():
            # argparse takes every unambiguous beginning of a flag.
            if refused.startswith(flag) and len(flag) > len("--kv"):
                raise UsageError(f"{refused} does not go with --kv: {why}; or leave --kv away")
    return strategy


def _read_cache(path: str) -> tuple[list[Any], dict[str, Any]]:
    """Read a cache file of kvmlx, or one of mlx-lm."""
    import kvmlx

    return kvmlx.load_prompt_cache(path, return_metadata=True)


def _flags(args: list[str]) -> list[str]:
    return [arg.partition("=")[0] for arg in args if arg.startswith("--")]


def _import(command: str) -> ModuleType:
    # `mlx_lm.generate` as an attribute is a function: only the import system knows the module.
    return importlib.import_module(f"mlx_lm.{command}")


def _peak_bytes() -> int:
    import mlx.core as mx

    return mx.get_peak_memory()


@contextlib.contextmanager
def _exchanged(module: ModuleType, names: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _argv(command: str, args: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [f"kvmlx {command}", *args]
    try:
        yield
    finally:
        sys.argv = before


def _chat_ui(base: type[Any], run: Stock) -> type[Any]:
    """Return mlx-lm's chat interface with a line on the cache after each answer."""

    class ChatUI(base):
        def __enter__(self) -> Any:
            entered = super().__enter__()
            self._tell(f"cache: {run.strategy or 'full, nothing is compressed'}")
            return entered

        def prompt(self) -> str:
            try:
                return super().prompt()
            except EOFError:
                return "q"

        def end_turn(self, response: Any) -> None:
            super().end_turn(response)
            self._tell(run.chat_status())

        def say_reset(self) -> None:
            run._bytes_before = 0
            super().say_reset()

        def _tell(self, line: str) -> None:
            if self._rank == 0:
                self._console.print(f"  [ui.muted]{line}[/ui.muted]", soft_wrap=True)

    return ChatUI
