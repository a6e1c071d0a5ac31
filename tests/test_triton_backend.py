"""The Triton backend as caches use it: interpreted without a GPU, on the device where there is one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvmlx import selftest  # noqa: E402
from kvmlx.backends.torch import choose, ops  # noqa: E402
from kvmlx.backends.torch.triton import backend as triton_backend  # noqa: E402
from kvmlx.backends.torch.triton import launch  # noqa: E402
from kvmlx.store import LayerStore  # noqa: E402
from kvmlx.types import KVMLXError  # noqa: E402
from tests.layer import Sequence_, feed, make_layer, prefill  # noqa: E402
from tests.test_promises import PARITY, SMALL  # noqa: E402

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
PLAIN, TRITON = ops.on(DEVICE), triton_backend.on(DEVICE)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that are launched, in order."""
    names: list[str] = []
    inner = launch.TritonKernel.__call__

    def noted(self: launch.TritonKernel, *args: Any, **options: Any) -> None:
        names.append(self.fn.__name__)
        inner(self, *args, **options)

    monkeypatch.setattr(launch.TritonKernel, "__call__", noted)
    return names


def held(store: LayerStore, name: str) -> list[np.ndarray]:
    """Return the rows of a plane of codes that each lane holds; what lies in the room behind them is undefined."""
    plane = store.backend.to_numpy(store.planes[name])
    return [plane[at : at + n].ravel() for at, n in zip(store.start.flat, store.length.flat, strict=True)]


@pytest.mark.parametrize("text", PARITY)
def test_a_cache_holds_and_gives_what_the_plain_backend_does(ran: list[str], text: str) -> None:
    batch, lengths = [Sequence_(5, 140, 2, 2), Sequence_(6, 140, 2, 2)], [70, 41]
    plain, triton = (make_layer(backend, text) for backend in (PLAIN, TRITON))
    for cache in (plain, triton):
        prefill(cache, batch, lengths, 32)
    for step in range(8):
        outs = [feed(c, batch, [n - 1 + step for n in lengths], 1) for c in (plain, triton)]
        np.testing.assert_allclose(outs[1], outs[0], rtol=0, atol=5e-5)
    for cache in (plain, triton):
        cache.settle()
    for mine, its in zip(plain.positions(), triton.positions(), strict=True):
        for a, b in zip(mine, its, strict=True):
            np.testing.assert_array_equal(a, b)
    assert triton.nbytes == plain.nbytes
    for name in (name for name in plain.store.planes if ".codes" in name):
        # A key that an earlier attention had a hand in may round to the next code.
        same = [a == b for a, b in zip(held(plain.store, name), held(triton.store, name), strict=True)]
        assert np.concatenate(same).mean() > 0.999, name
    if triton.store.has_body:
        assert any("decode" in name for name in ran), set(ran)


CASES = [
    ("attend", "B1-H1-G3-L64-T65-D96-bias"),
    ("column_sums", "B2-H1-G3-L17-T65-D96-counted"),
    ("affine", "bits4-T65-D96-g32"),
    ("gather", "int4-float32"),
    ("store", "int4-B2-H2-G4-L1-D128-body192-float32"),
    ("store", "int4-B2-H2-G2-L3-D128-body192-ragged-bias-float16"),
    ("store", "int4-B2-H2-G2-L40-D128-body192-sinks-bool-bfloat16"),
]


def test_the_selftest_passes_and_counts_the_kernels() -> None:
    """What a user with a GPU runs: nearly all calls are the kernels'."""
    what = [c for c in selftest.checks_for(TRITON, quick=True) if (c.primitive, c.case) in CASES]
    assert len(what) == len(CASES)
    outcomes = list(selftest.run(TRITON, what))
    assert [outcome.problem for outcome in outcomes] == [None] * len(outcomes)
    assert all(0 < outcome.kernel_calls == outcome.calls for outcome in outcomes)


def test_backends_are_one_for_each_device() -> None:
    assert triton_backend.on(DEVICE) is TRITON and deepcopy(TRITON) is TRITON
    assert TRITON.path == "triton" and PLAIN.path == "plain"


# In use


def test_triton_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(choose.VARIABLE, "triton")
    with pytest.raises(KVMLXError, match=r"KVMLX_KERNELS=triton asks for Triton kernels, but .*; auto or plain works"):
        choose.backend("cpu")
    monkeypatch.setenv(choose.VARIABLE, "metal")
    with pytest.raises(KVMLXError, match=r"auto, triton or plain works"):
        choose.backend("cpu")
    monkeypatch.setenv(choose.VARIABLE, "gpu")
    with pytest.raises(KVMLXError, match="'gpu' is none of auto, triton, plain"):
        choose.backend("cpu")


@pytest.mark.parametrize("asked", ["auto", "plain", None])
def test_plain_operations_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    if asked is None:
        monkeypatch.delenv(choose.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(choose.VARIABLE, asked)
    assert choose.backend("cpu") is ops.on("cpu")


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
def test_kernels_are_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    assert choose.backend("cuda") is TRITON
    monkeypatch.setenv(choose.VARIABLE, "plain")
    assert choose.backend("cuda") is PLAIN


# Under transformers

GENERATE = {
    "turboquant": f"turboquant(k=5, v=4, center=16, {SMALL})",
    "kivi": f"kivi(bits=4, group_size=16, {SMALL})",
    "snapkv-int4": f"snapkv(budget=0.4, window=8, {SMALL}) | int4({SMALL})",
    "snapkv-adakv": f"snapkv(budget=0.4, window=8, {SMALL}) | adakv",
    "h2o-bounded": f"h2o(budget=30, {SMALL}) | bounded",
}


@pytest.mark.parametrize("strategy", GENERATE.values(), ids=GENERATE.keys())
def test_transformers_says_the_same_tokens(ran: list[str], monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    transformers = pytest.importorskip("transformers")
    import kvmlx

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
    ids = torch.randint(3, 256, (1, 90), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def say() -> list[int]:
        cache = kvmlx.make_prompt_cache(model, strategy)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=12, do_sample=False, prefill_chunk_size=40, eos_token_id=None
        )
        return out[0, 90:].tolist()

    monkeypatch.setenv(choose.VARIABLE, "plain")
    plain = say()
    assert not ran and len(set(plain)) > 2
    monkeypatch.setenv(choose.VARIABLE, "triton")
    assert say() == plain
    assert any(("column_sums" if "h2o" in strategy else "decode") in name for name in ran), set(ran)
