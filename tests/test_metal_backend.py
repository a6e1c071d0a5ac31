"""The Metal backend as caches use it, its kernels executed off-Mac."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from layer import Sequence_, feed, make_layer, prefill
from mlx_lm.generate import BatchGenerator, generate_step
from tiny_model import tiny_llama

import kvmlx
from kvmlx.backends import formats
from kvmlx.backends.mlx import KVMLXCache, choose
from kvmlx.backends.mlx.metal import encode, loader, operands
from kvmlx.backends.mlx.ops import BACKEND as PLAIN
from kvmlx.stages.encode.codecs import CodeBook
from kvmlx.types import KVMLXError
from tests.metal.device import Device, Launch
from tests.metal.off_mac import off_mac
from tests.test_promises import PARITY, SMALL

Ran = list[tuple[str, Launch]]


@pytest.fixture
def ran() -> Iterator[Ran]:
    with off_mac(Device(seed=1)) as launches:
        yield launches


@pytest.mark.parametrize("text", PARITY)
def test_a_cache_holds_and_gives_what_the_plain_backend_does(ran: Ran, text: str) -> None:
    batch, lengths = [Sequence_(5, 140, 2, 2), Sequence_(6, 140, 2, 2)], [70, 41]
    plain, metal = (make_layer(backend, text) for backend in (PLAIN, choose.METAL))
    for cache in (plain, metal):
        prefill(cache, batch, lengths, 32)
    for step in range(12):
        outs = [feed(c, batch, [n - 1 + step for n in lengths], 1) for c in (plain, metal)]
        np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=5e-5)
    for cache in (plain, metal):
        cache.settle()
    for mine, its in zip(plain.positions(), metal.positions(), strict=True):
        for a, b in zip(mine, its, strict=True):
            np.testing.assert_array_equal(a, b)
    assert metal.nbytes == plain.nbytes
    names = {name for name, _ in ran}
    if metal.store.has_body:
        assert {"attend_decode", "attend_merge"} <= names


def test_a_sliding_window_is_a_number_to_the_kernels(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's mask of a window is made and never read; the answer is the mask's."""
    templates = []
    inner = loader.launch

    def noted(kernel: loader.MetalKernel, **arguments: Any) -> list[mx.array]:
        templates.append(dict(arguments["template"]))
        return inner(kernel, **arguments)

    monkeypatch.setattr(loader, "launch", noted)
    rng = np.random.default_rng(0)
    chunks = [rng.standard_normal((3, 1, 2, n, 16)).astype(np.float32) for n in (40, 70, 1, 3)]
    outs: dict[str, list[np.ndarray]] = {}
    for backend in (PLAIN, choose.METAL):
        cache = KVMLXCache(make_layer(backend, f"int8({SMALL}) | bounded", inspect=False))
        for q, k, v in chunks:
            mask = cache.make_mask(q.shape[2], window_size=30)
            cache.update_and_fetch(mx.array(k), mx.array(v))
            out = cache.attend(mx.array(q), 0.25, mask, None)
            outs.setdefault(backend.path, []).append(np.array(out))
    for a, b in zip(outs["metal"], outs["plain"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    assert {"attend_prefill", "attend_decode"} <= {name for name, _ in ran}
    assert {t["MASKED"] for t in templates if "MASKED" in t} == {0}


SHORT = {
    (1, 1): "decode",
    (20, 8): "decode",
    (1, 32): "decode",
    (1, 33): "prefill",
    (15, 9): "decode",
    (16, 9): "prefill",
}


@pytest.mark.parametrize(("batch", "tokens"), list(SHORT))
def test_a_short_turn_on_few_lanes_is_split_like_decoding(ran: Ran, batch: int, tokens: int) -> None:
    """One block of prefill's on fewer lanes than FEW_THREADGROUPS would leave a GPU idle."""
    cache = make_layer(choose.METAL, f"int8({SMALL}) | bounded")
    sequences = [Sequence_(i, 80, 2, 2) for i in range(batch)]
    feed(cache, sequences, [0] * batch, 40)
    cache.settle(chunk_end=True)
    ran.clear()
    feed(cache, sequences, [40] * batch, tokens)
    assert {name for name, _ in ran if name.startswith("attend")} - {"attend_merge"} == {
        f"attend_{SHORT[batch, tokens]}"
    }


# In use


def test_metal_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setenv(choose.VARIABLE, "metal")
    with pytest.raises(KVMLXError, match=r"KVMLX_KERNELS=metal asks for Metal kernels, but .*; auto or plain works"):
        choose.backend()
    monkeypatch.setenv(choose.VARIABLE, "gpu")
    with pytest.raises(KVMLXError, match="'gpu' is none of auto, metal, plain"):
        choose.backend()


@pytest.mark.parametrize("asked", ["auto", "plain", None])
def test_plain_operations_run_without_metal(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    if asked is None:
        monkeypatch.delenv(choose.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(choose.VARIABLE, asked)
    assert choose.backend().path == "plain"


def test_kernels_are_the_default_where_there_is_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "why_no_metal", lambda: None)
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    assert choose.backend() is choose.METAL and choose.METAL.path == "metal"
    monkeypatch.setenv(choose.VARIABLE, "metal")
    assert choose.backend() is choose.METAL
    monkeypatch.setenv(choose.VARIABLE, "plain")
    assert choose.backend() is PLAIN


def test_what_one_thread_keeps_another_can_use() -> None:
    """Arrays that launchers keep are no graphs of the thread that asked first: its stream is not the next one's."""
    made: list[mx.array] = []

    def ask() -> None:
        for dtype in (mx.uint8, mx.float16, mx.float32):
            loader.nothing.cache_clear()
            made.append(loader.nothing(dtype))
        operands._CONSTANTS.clear()
        fmt = formats.format_of(CodeBook(4), 64)
        made.extend([operands.signs_of(fmt, 64), encode._book(True, 4, 64), encode._book(False, 4, 64)])

    first = threading.Thread(target=ask)
    first.start()
    first.join()
    mx.eval([x + 1 for x in made])


# Under mlx-lm

GENERATE = {
    "turboquant": f"turboquant(k=5, v=4, center=16, {SMALL})",
    "kivi": f"kivi(bits=4, group_size=16, {SMALL})",
    "snapkv-int4": f"snapkv(budget=0.4, window=8, {SMALL}) | int4({SMALL})",
    "snapkv-adakv": f"snapkv(budget=0.4, window=8, {SMALL}) | adakv",
    "h2o-bounded": f"h2o(budget=30, {SMALL}) | bounded",
}


@pytest.mark.parametrize("strategy", GENERATE.values(), ids=GENERATE.keys())
def test_mlx_lm_says_the_same_tokens(ran: Ran, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    model = tiny_llama()
    prompt = np.random.default_rng(1).integers(0, 256, 90).tolist()

    def say() -> list[int]:
        caches = kvmlx.make_prompt_cache(model, strategy)
        steps = generate_step(mx.array(prompt), model, max_tokens=20, prompt_cache=caches, prefill_step_size=40)
        return [int(np.array(token)) for token, _ in steps]

    plain = say()
    assert not ran
    monkeypatch.setattr(choose, "why_no_metal", lambda: None)
    assert say() == plain
    assert ("column_sums" if "h2o" in strategy else "attend_decode") in {name for name, _ in ran}


def test_batches_run_through_the_kernels(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    prompts = [np.random.default_rng(i).integers(0, 256, n).tolist() for i, n in enumerate((110, 33))]

    def say() -> dict[int, list[int]]:
        generator = BatchGenerator(model, prefill_step_size=40)
        caches = [kvmlx.make_prompt_cache(model, f"int8({SMALL})") for _ in prompts]
        said: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        order = {uid: i for i, uid in enumerate(generator.insert(prompts, [12, 12], caches=caches))}
        for _ in range(100):
            read, responses = generator.next()
            for r in responses:
                said[order[r.uid]].append(r.token)
            if not read and not responses:
                break
        return said

    plain = say()
    assert [len(tokens) for tokens in plain.values()] == [12, 12] and not ran
    monkeypatch.setattr(choose, "why_no_metal", lambda: None)
    assert say() == plain
    assert {"attend_decode", "attend_prefill", "encode_rows"} <= {name for name, _ in ran}
