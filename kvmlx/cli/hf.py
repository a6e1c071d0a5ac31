"""`kvmlx generate | chat | cache_prompt --backend torch`: models of transformers behind flags of mlx-lm's commands."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.markup import escape

from kvmlx.bench.tasks.prompts import has_chat_template
from kvmlx.cli.engines import PREFILL_STEP, Answer, Sampling, TorchEngine, load
from kvmlx.cli.held import chat_status, held_by, summary
from kvmlx.cli.output import PrefillBar, UsageError, print_json, stderr, stdout
from kvmlx.strategy import Strategy

HELP = "q quits, r forgets the chat, h shows this"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(
            f"{message}; `kvmlx {self.prog} --backend torch --help` lists the flags, --backend mlx has more"
        )


def run(command: str, args: Sequence[str], *, kv: str | None, dtype: str | None, as_json: bool = False) -> None:
    """Run a command with flags of its own.

    Args:
        command: ``"generate"``, ``"chat"`` or ``"cache_prompt"``.
        args: its flags.
        kv: text of the strategy; None runs the stock cache of transformers.
        dtype: type of the model.
        as_json: print one JSON document instead of text.
    """
    asked = parser(command).parse_args(args)
    strategy = None if kv is None else Strategy.parse(kv)
    COMMANDS[command](asked, strategy, dtype, as_json)


def parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command's flags: a part of those of mlx-lm's command, with their names and defaults."""
    out = _Parser(prog=command, add_help=False, allow_abbrev=False)
    add = out.add_argument
    from_file = command == "generate"
    add("--model", required=not from_file, help="A folder, a Hub repository, or `demo`.")
    add("--trust-remote-code", action="store_true", help="Run code that the model's repository brings.")
    if command != "chat":
        add("--prompt", "-p", default="hello", help="What the user says; - reads stdin.")
        add("--prompt-cache-file", required=not from_file, help="A file of `kvmlx cache_prompt`.")
    add("--prefill-step-size", type=int, default=PREFILL_STEP, metavar="N", help="Prompt tokens processed at a time.")
    if command == "cache_prompt":
        return out
    add("--max-tokens", "-m", type=int, default=256 if command == "chat" else 100, metavar="N")
    add("--temp", type=float, default=0.0, help="Temperature; 0 takes the likeliest token.")
    add("--top-p", type=float, default=1.0, metavar="P")
    add("--top-k", type=int, default=0, metavar="K")
    add("--min-p", type=float, default=0.0, metavar="P")
    add("--seed", type=int, help="Seed of the sampling.")
    add("--system-prompt", help="What the system says.")
    if command == "generate":
        add("--ignore-chat-template", action="store_true", help="Take the prompt as it is.")
        add("--prefill-response", help="How the answer begins.")
        add("--verbose", default="True", help="False prints the answer only.")
    return out


def help_text(command: str) -> str:
    """Return the flags as `--help` shows them."""
    lines = parser(command).format_help().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(":") and not line.startswith(" "))
    return "\n".join([f" Flags of {command} with --backend torch:", *lines[start + 1 :]]) + "\n\n"


def _generate(asked: argparse.Namespace, strategy: Strategy | None, dtype: str | None, as_json: bool) -> None:
    path = asked.prompt_cache_file
    if path is not None:
        asked.model = _same_model(asked.model, _metadata(path, strategy), path)
    if asked.model is None:
        raise UsageError("--model is missing: a folder, a Hub repository, or `demo`")
    engine = _engine(asked, dtype)
    prompt = _prompt(engine.tokenizer, asked, suffix=path is not None)
    if path is not None:
        import kvmlx

        cache = kvmlx.load_prompt_cache(path, model=engine.model)
    else:
        cache = engine.cache(strategy)
    bar = PrefillBar()
    verbose = asked.verbose in ("True", "T", "true") and not as_json
    if verbose:
        print("=" * 10)

    def say(text: str) -> None:
        bar.close()
        if verbose:
            print(text, end="", flush=True)

    given = engine.continued(prompt, cache, on_prefill=bar, on_text=say, **_options(asked))
    bar.close()
    if as_json:
        print_json(_document(given))
        return
    print("\n" + "=" * 10 if verbose else given.text)
    stderr().print(summary(given.held, given.prefill_peak_nbytes, given.tokens_per_s), soft_wrap=True)


def _document(given: Answer) -> dict[str, Any]:
    return {
        "text": given.text,
        "prompt_tokens": given.prompt_tokens,
        "prompt_tps": given.prompt_tokens / given.first_token_s,
        "generation_tokens": len(given.tokens),
        "generation_tps": given.tokens_per_s,
        "finish_reason": given.finish_reason,
        "cache": given.held.document(),
        "peak_nbytes": given.prefill_peak_nbytes,
    }


def _cache_prompt(asked: argparse.Namespace, strategy: Strategy | None, dtype: str | None, as_json: bool) -> None:
    import torch

    import kvmlx

    engine = _engine(asked, dtype)
    text = sys.stdin.read() if asked.prompt == "-" else asked.prompt
    tokenizer = engine.tokenizer
    if has_chat_template(tokenizer):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=False, continue_final_message=True)
        ids = tokenizer.encode(ids, add_special_tokens=False)
    else:
        ids = tokenizer.encode(text)
    # A file of the stock cache is one that keeps everything.
    cache = engine.cache(strategy or Strategy.parse("full"))
    bar = PrefillBar()
    with torch.inference_mode():
        for at in range(0, len(ids), asked.prefill_step_size):
            bar(at, len(ids))
            chunk = torch.tensor([ids[at : at + asked.prefill_step_size]], device=engine.model.device)
            engine.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        kvmlx.settle(cache)
    bar.close()
    # What mlx-lm's own command notes, so that its `generate` goes on from the file.
    kvmlx.save_prompt_cache(asked.prompt_cache_file, cache, {"model": asked.model, "tokenizer_config": json.dumps({})})
    held = held_by(cache)
    if as_json:
        print_json({"cache": held.document(), "peak_nbytes": None})
    else:
        stderr().print(summary(held, None, None), soft_wrap=True)


def _chat(asked: argparse.Namespace, strategy: Strategy | None, dtype: str | None, as_json: bool) -> None:
    engine = _engine(asked, dtype)
    console = stdout()

    def tell(line: str) -> None:
        console.print(f"  [dim]{escape(line)}[/]", soft_wrap=True)

    tell(f"{asked.model}, {engine.dtype} on {engine.device}; {HELP}")
    tell(f"cache: {strategy or 'full, nothing is compressed'}")
    chat = _Chat(engine, asked, strategy)
    while True:
        try:
            said = input(">> ")
        except EOFError:
            said = "q"
        if said == "q":
            print("bye")
            return
        if said == "r":
            chat = _Chat(engine, asked, strategy)
            tell("forgotten")
        elif said == "h":
            tell(HELP)
        else:
            status = chat.turn(said)
            print()
            tell(status)


class _Chat:
    """Messages, and the cache that has seen them."""

    def __init__(self, engine: TorchEngine, asked: argparse.Namespace, strategy: Strategy | None) -> None:
        self.engine, self.options = engine, _options(asked)
        self.cache = engine.cache(strategy)
        system = asked.system_prompt
        self.messages = [{"role": "system", "content": system}] if system else []
        self.unseen: list[int] = []
        """The last token of an answer that was cut off: the cache sees it with the next turn."""
        self.nbytes = 0

    def turn(self, said: str) -> str:
        """Answer what the user says, and return a line on the cache; only what is new goes through the model."""
        tokenizer = self.engine.tokenizer
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        seen = self._seen() if answered else ""
        self.messages.append({"role": "user", "content": said})
        text = self._template(self.messages, add_generation_prompt=True)
        if answered and not (seen and text.startswith(seen)):
            # A template that rewrites what was said before: the turn by itself.
            seen, text = "", self._template(self.messages[-1:], add_generation_prompt=True)
        text = text[len(seen) :]
        prompt = self.unseen + tokenizer.encode(text, add_special_tokens=not has_chat_template(tokenizer))
        given = self.engine.continued(
            prompt, self.cache, on_text=lambda t: print(t, end="", flush=True), **self.options
        )
        self.messages.append({"role": "assistant", "content": given.text})
        # The template writes the end token itself.
        self.unseen = [] if given.finish_reason == "stop" else given.tokens[-1:]
        status, self.nbytes = chat_status(given.held, self.nbytes), given.held.nbytes
        return status

    def _seen(self) -> str:
        """Return the chat as it is written up to the last answer's last word; empty where the template changes it."""
        try:
            return self._template(self.messages, continue_final_message=True)
        except ValueError:
            return ""

    def _template(self, messages: list[dict[str, str]], **options: Any) -> str:
        tokenizer = self.engine.tokenizer
        if not has_chat_template(tokenizer):
            return "".join(m["content"] + "\n" for m in messages)
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    sampling = Sampling(asked.temp, asked.top_p, asked.top_k, asked.min_p, asked.seed)
    return {"max_tokens": asked.max_tokens, "prefill_step": asked.prefill_step_size, "sampling": sampling}


def _engine(asked: argparse.Namespace, dtype: str | None) -> TorchEngine:
    engine = load(asked.model, "torch", dtype, trust_remote_code=asked.trust_remote_code)
    assert isinstance(engine, TorchEngine)
    return engine


def _prompt(tokenizer: Any, asked: argparse.Namespace, *, suffix: bool) -> list[int]:
    """Return the prompt's tokens; a ``suffix`` leaves out what the template puts before the user's words."""
    text = asked.prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = sys.stdin.read() if text == "-" else text
    if asked.ignore_chat_template or not has_chat_template(tokenizer):
        return tokenizer.encode(text, add_special_tokens=not suffix)
    begun = asked.prefill_response is not None

    def written(content: str) -> str:
        messages = [{"role": "system", "content": asked.system_prompt}] if asked.system_prompt is not None else []
        messages.append({"role": "user", "content": content})
        if begun:
            messages.append({"role": "assistant", "content": asked.prefill_response})
        return tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=begun, add_generation_prompt=not begun
        )

    whole = written(text)
    if suffix:
        # As mlx-lm: the file's prompt is the beginning of what the user says.
        whole = whole[written("<query>").index("<query>") :]
    return tokenizer.encode(whole, add_special_tokens=False)


def _metadata(path: str, strategy: Strategy | None) -> dict[str, str]:
    """Return what was noted when a cache file was made, after a look at its strategy."""
    from kvmlx.files import read

    if not Path(path).is_file():
        raise UsageError(f"no prompt cache at {path}: make one with `kvmlx cache_prompt --prompt-cache-file {path}`")
    header = read(path).header
    saved = header.get("strategy")
    if strategy is not None and saved != str(strategy):
        raise UsageError(
            f"{path} was saved with {saved or 'a full cache'}, not with --kv {str(strategy)!r}: "
            "leave --kv away, or make the file again with `kvmlx cache_prompt --kv`"
        )
    return {key.removeprefix("user."): value for key, value in header.items() if key.startswith("user.")}


def _same_model(asked: str | None, metadata: dict[str, str], path: str) -> str | None:
    made_with = metadata.get("model")
    if asked is not None and made_with is not None and asked != made_with:
        raise UsageError(f"{path} was made with --model {made_with}, not with {asked}")
    return asked or made_with


COMMANDS: dict[str, Callable[[argparse.Namespace, Strategy | None, str | None, bool], None]] = {
    "generate": _generate,
    "chat": _chat,
    "cache_prompt": _cache_prompt,
}
