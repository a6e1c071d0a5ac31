"""`kvmlx server` in a process of its own, over HTTP: several clients at once, one that leaves, prompts that return."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_model

pytest.importorskip("mlx_lm")

SMALL = "sinks=2, recent=8"
STRATEGIES = {
    "full": "full",
    "int8": f"int8({SMALL})",
    "snapkv-int4": f"snapkv(budget=0.4, window=8, {SMALL}) | int4({SMALL})",
}
WORDS = ("alpha beta gamma delta ", "one two three four five six ", "x", "the quick brown fox jumps over the lazy dog ")
PROMPTS = [word * n for word, n in zip(WORDS, (5, 2, 1, 4), strict=True)]
TOKENS = 40
COMMON = 1
"""Tokens with which every prompt begins: a cache that can be cut back serves those for any other."""


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


class Server:
    """A running server on a free port of this machine."""

    def __init__(self, model: Path, strategy: str, log: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "kvmlx.cli", "server", "--model", str(model), "--kv", strategy]
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                # Tests in a shell's background ignore Ctrl-C, and what they start would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                connection = self.connect()
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(self.log.read_text())

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, prompt: str, tokens: int = TOKENS, **changed: Any) -> http.client.HTTPResponse:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            **changed,
        }
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        return connection.getresponse()

    def ask(self, prompt: str, tokens: int = TOKENS, **changed: Any) -> Answer:
        response = self.post(prompt, tokens, **changed)
        document = json.loads(response.read())
        assert response.status == 200, document
        (choice,), usage = document["choices"], document["usage"]
        return Answer(
            choice["message"]["content"],
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
        )

    def stream(self, prompt: str, tokens: int = TOKENS, *, leave_after: int | None = None) -> str:
        """Read an answer piece by piece; with ``leave_after`` hang up once so many pieces are there."""
        response = self.post(prompt, tokens, stream=True)
        said = []
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
            said.append(choice["delta"].get("content") or "")
            if len(said) == leave_after:
                assert response.fp is not None
                response.fp.raw._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
                response.close()
                break
        return "".join(said)

    def stop(self) -> int:
        """Interrupt it as ctrl-C does, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """Say what mlx-lm answers without a server, one prompt after the other."""
    from mlx_lm import generate, load

    import kvmlx

    model, tokenizer = load(str(folder))[:2]
    made: dict[tuple[str, str, int], str] = {}

    def answer(strategy: str, prompt: str, tokens: int = TOKENS) -> str:
        key = (strategy, prompt, tokens)
        if key not in made:
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            caches = kvmlx.make_prompt_cache(model, strategy)
            made[key] = generate(model, tokenizer, text, max_tokens=tokens, prompt_cache=caches)
        return made[key]

    return answer


@pytest.fixture(scope="module")
def converse(folder: Path) -> Any:
    """Say what mlx-lm answers in a conversation over one cache, each turn feeding only what is new."""
    from mlx_lm import generate, load

    import kvmlx

    model, tokenizer = load(str(folder))[:2]

    def answers(strategy: str) -> Iterator[str]:
        caches = kvmlx.make_prompt_cache(model, strategy)
        messages: list[dict[str, str]] = []
        seen = 0
        for question in PROMPTS:
            messages.append({"role": "user", "content": "Go on. " + question})
            text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            answer = generate(model, tokenizer, text[seen:], max_tokens=TOKENS, prompt_cache=caches)
            messages.append({"role": "assistant", "content": answer})
            seen = len(text) + TOKENS
            yield answer

    return answers


@pytest.fixture(scope="module", params=list(STRATEGIES.values()), ids=list(STRATEGIES))
def served(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(folder, request.param, log)
    yield server, request.param
    code, text = server.stop(), log.read_text()
    # mlx_lm.server itself aborts now and then once all is done: MLX's streams of the generation thread are torn
    # down while the process exits.
    late = code == -signal.SIGABRT and text.endswith("terminate called without an active exception\n")
    assert code == 0 or late, text
    assert "KV cache: " in text
    assert "generation thread died" not in text


def test_four_clients_at_once_get_what_each_gets_alone(served: tuple[Server, str], alone: Any) -> None:
    server, strategy = served
    expected = [alone(strategy, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as clients:
        first, second = (list(clients.map(server.ask, PROMPTS)) for _ in range(2))
    assert [a.text for a in first] == expected
    assert [a.text for a in second] == expected
    assert all(a.finish_reason == "length" for a in first + second)
    assert all(a.cached_tokens <= COMMON for a in first)
    assert all(a.cached_tokens == a.prompt_tokens - 1 for a in second), "the prompt cache is hit"


def test_a_client_that_leaves_disturbs_nobody(served: tuple[Server, str], alone: Any) -> None:
    server, strategy = served
    prompts = [prompt + "?" for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as clients:
        leaving = clients.submit(server.stream, prompts[0], 1000, leave_after=5)
        staying = [clients.submit(server.stream, prompt, 100) for prompt in prompts[1:]]
        assert [f.result() for f in staying] == [alone(strategy, prompt, 100) for prompt in prompts[1:]]
        assert alone(strategy, prompts[0], 100).startswith(leaving.result())
    assert server.ask(prompts[0]).text == alone(strategy, prompts[0])


def test_a_conversation_goes_on_from_its_cache(served: tuple[Server, str], converse: Any) -> None:
    server, strategy = served
    messages: list[dict[str, str]] = []
    seen = 0
    for question, expected in zip(PROMPTS, converse(strategy), strict=True):
        messages.append({"role": "user", "content": "Go on. " + question})
        answer = server.ask("", messages=messages)
        assert answer.text == expected
        assert seen <= answer.cached_tokens <= max(seen, COMMON), "only what is new is read"
        seen = answer.prompt_tokens + TOKENS
        messages.append({"role": "assistant", "content": answer.text})


def test_a_request_with_a_seed_is_served_on_its_own(served: tuple[Server, str], alone: Any) -> None:
    server, strategy = served
    prompts = [prompt + "!" for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda i: server.ask(prompts[i], **({"seed": 1} if i % 2 else {})), range(4)))
    assert [a.text for a in answers] == [alone(strategy, prompt) for prompt in prompts]


def test_an_empty_conversation_is_answered_or_refused(served: tuple[Server, str]) -> None:
    server, _ = served
    assert server.ask("").finish_reason == "length"
    assert server.post("", messages=[]).status in (200, 400, 404, 500)
    assert server.ask("x" * 30).finish_reason == "length"
