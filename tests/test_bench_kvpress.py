"""kvpress in a process of its own: the texts of methods, the protocol against a worker that is played, and, where
KVMLX_KVPRESS_PYTHON names the interpreter of an environment with kvpress, the presses themselves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_model

from kvmlx.bench.kvpress import LEFT_OUT, SCORERS, WORKER, WRAPPERS, Kvpress, Press
from kvmlx.bench.types import Prompt
from kvmlx.types import KVMLXError, StrategyError

# -- texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("kvpress: snapkv", "kvpress: snapkv"),
        ("kvpress:snapkv( budget = 0.25,window_size=32 )", "kvpress: snapkv(budget=0.25, window_size=32)"),
        ("kvpress: tova(budget=100)", "kvpress: tova(budget=100)"),
        ("kvpress: knorm(budget=0.5)|chunkkv(chunk_length=8)", "kvpress: knorm(budget=0.5) | chunkkv(chunk_length=8)"),
        (
            "kvpress: expected_attention(use_vnorm=false) | criticalkv | adakv",
            "kvpress: expected_attention(use_vnorm=false) | criticalkv | adakv",
        ),
        ("kvpress: full", "kvpress: full"),
    ],
)
def test_methods_print_as_they_parse(text: str, shown: str) -> None:
    assert str(Press.parse(text)) == shown
    assert Press.parse(shown) == Press.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kvpress: snapvk", r"unknown press 'snapvk'\. Did you mean 'snapkv'\? Known: cap, "),
        ("kvpress: kvzip(budget=0.5)", "kvzip is not run: it runs the model a second time"),
        ("kvpress: think", "frees nothing"),
        ("kvpress: adakv", r"adakv wraps a press that scores, as in 'kvpress: snapkv\(budget=0.25\) \| adakv'"),
        ("kvpress: snapkv | knorm", "knorm scores, so it comes first"),
        ("kvpress: snapkv | adakv(budget=0.5)", "the budget belongs to snapkv"),
        ("kvpress: snapkv(budget=1.5)", r"budget as a fraction must be in \(0, 1\]"),
        ("kvpress: snapkv(0.5)", "expected key=value"),
        ("kvpress:", "expected the name of a stage"),
        ("kvpress: full | adakv", "neither parameters nor wrappers"),
    ],
)
def test_wrong_methods_are_refused_with_what_works(text: str, says: str) -> None:
    with pytest.raises(StrategyError, match=says):
        Press.parse(text)


def test_a_name_stands_in_one_table() -> None:
    assert not SCORERS.keys() & WRAPPERS.keys()
    assert not (SCORERS.keys() | WRAPPERS.keys()) & LEFT_OUT.keys()


def test_only_methods_of_kvpress_are_its_own() -> None:
    assert Kvpress.owns("kvpress: snapkv") and not Kvpress.owns("snapkv")


# -- a worker that is played ----------------------------------------------------------------------------------

Play = Callable[..., str]
VERSIONS = {"python": "3.11", "torch": "2", "transformers": "5", "kvpress": "0.5.5"}
ABOUT = {"vocab_size": 50, "end": [2]}


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Return an interpreter that runs this code in the worker's place, and notes the requests."""

    def write(code: str) -> str:
        path = tmp_path / "python"
        head = f"""\
            #!{sys.executable}
            import json, sys, time
            def say(x):
                print(json.dumps(x), flush=True)
            def asked():
                line = sys.stdin.readline()
                with open({str(tmp_path / "requests")!r}, "a") as file:
                    file.write(line)
                return json.loads(line)
            """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(code))
        path.chmod(0o755)
        return str(path)

    return write


def requests(python: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(python).with_name("requests").read_text().splitlines()]


LOADS = f"""
say({{"ok": {VERSIONS}}})
asked()
say({{"ok": {ABOUT}}})
"""

posix = pytest.mark.skipif(os.name != "posix", reason="an executable script plays the worker")


@posix
def test_questions_of_one_context_are_one_request(play: Play) -> None:
    python = play(
        LOADS + 'for n in (2, 1, 1):\n    say({"ok": {"answers": [[i] for i in asked()["most"]], "sizes": {}}})\n'
    )
    one, other = (5, 6, 7), (5, 6, 8)
    prompts = [Prompt(one, (1,)), Prompt(one, (2, 3)), Prompt(other, (1,)), Prompt(one, (4,))]
    with Kvpress(python, "folder", threads=2) as presses:
        assert presses.versions == VERSIONS and presses.end == [2]
        assert list(presses.answers("kvpress: knorm(budget=0.25)", prompts, [9, 8, 7, 6])) == [[9], [8], [7], [6]]
    load, *answers = requests(python)
    assert load == {"do": "load", "path": "folder", "dtype": "float32", "threads": 2, "device": "cpu"}
    assert [a["context"] for a in answers] == [[5, 6, 7], [5, 6, 8], [5, 6, 7]]
    assert answers[0]["questions"] == [[1], [2, 3]] and answers[0]["most"] == [9, 8] and answers[0]["end"] == [2]
    assert answers[0]["press"] == {"parts": [{"class": "KnormPress", "args": {}}], "budget": 0.25}


@posix
def test_a_family_is_tuned_and_measured_once(play: Play) -> None:
    python = play(LOADS + 'asked()\nsay({"ok": {"held_bytes": 49, "full_bytes": 200}})\n')
    with Kvpress(python, "folder") as presses:
        for _ in range(2):
            subject = presses.subject("kvpress: snapkv(kernel_size=7) | chunkkv", 4.0, 30)
            assert subject.method == "kvpress: snapkv(budget=0.25, kernel_size=7) | chunkkv"
            assert subject.family == "kvpress: snapkv(kernel_size=7) | chunkkv"
            assert subject.target == 4.0 and subject.ratio == 0.245
        with pytest.raises(KVMLXError, match=r"has no budget: give it one, as in 'kvpress: knorm\(budget=0.25\)'"):
            presses.subject("kvpress: knorm", None, 30)
        with pytest.raises(KVMLXError, match="has a budget of its own"):
            presses.subject("kvpress: knorm(budget=0.5)", 2.0, 30)
    measured = requests(python)[1]
    assert len(measured["context"]) == 30 and max(measured["context"]) < ABOUT["vocab_size"]
    assert measured["press"]["parts"] == [
        {"class": "SnapKVPress", "args": {"kernel_size": 7}},
        {"class": "ChunkKVPress", "args": {}},
    ]


@posix
def test_a_press_that_holds_everything_is_not_tuned(play: Play) -> None:
    python = play(LOADS + 'while True:\n    asked()\n    say({"ok": {"held_bytes": 200, "full_bytes": 200}})\n')
    with Kvpress(python, "folder") as presses:
        with pytest.raises(KVMLXError, match=r"holds 1.000 .* of 30 tokens, so it does not compress 4x: kvpress masks"):
            presses.subject("kvpress: snapkv | adakv", 4.0, 30)
        assert presses.subject("kvpress: snapkv(budget=0.25) | adakv", None, 30).ratio == 1.0


@posix
def test_what_kvpress_refuses_is_said_and_the_worker_goes_on(play: Play) -> None:
    python = play(LOADS + 'asked()\nsay({"error": "AssertionError: too short"})\nasked()\nsay({"ok": {"rows": 3}})\n')
    with Kvpress(python, "folder") as presses:
        with pytest.raises(KVMLXError, match="kvpress: AssertionError: too short"):
            presses.sizes("kvpress: snapkv(budget=0.5)", [1])
        assert presses.sizes("kvpress: knorm(budget=0.5)", [1, 2, 3]) == {"rows": 3}


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match=r"nothing/python cannot be run: No such file.* --kvpress takes the Python"):
        Kvpress(str(tmp_path / "nothing" / "python"), "folder")


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KVMLXError, match=rf"^{re.escape(str(tmp_path))}/nothing/python cannot be run"):
        Kvpress("~/nothing/python", "folder")


@pytest.mark.skipif("kvpress" in sys.modules, reason="this environment has kvpress")
def test_an_environment_without_kvpress_says_so() -> None:
    with pytest.raises(KVMLXError, match=r"cannot run kvpress; install it there(.|\n)*No module named 'kvpress'"):
        Kvpress(sys.executable, "folder")


@posix
def test_a_worker_that_dies_is_quoted(play: Play) -> None:
    python = play(LOADS + 'asked()\nprint("loading\\nout of memory", file=sys.stderr)\nsys.exit(9)\n')
    with Kvpress(python, "folder") as presses:
        with pytest.raises(KVMLXError, match=r"ended .* asked to do 'check'.* said last:\nloading\nout of memory$"):
            presses.check("kvpress: knorm")
        with pytest.raises(KVMLXError, match="kvpress was closed"):
            presses.check("kvpress: knorm")


@posix
@pytest.mark.parametrize("line", ["hello", '["ok"]', "{}"])
def test_another_program_is_recognized(play: Play, line: str) -> None:
    with pytest.raises(KVMLXError, match="runs something else than the worker of kvpress"):
        Kvpress(play(f"print({line!r}, flush=True)\ntime.sleep(60)\n"), "folder")


@posix
def test_an_interruption_ends_the_worker(play: Play) -> None:
    python = play(LOADS + "asked()\ntime.sleep(60)\n")
    with Kvpress(python, "folder") as presses:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            presses.check("kvpress: knorm")
        assert time.monotonic() - start < 10
        assert presses._process.poll() is not None


@posix
def test_closing_ends_the_worker(play: Play) -> None:
    presses = Kvpress(play(LOADS + "asked()\n"), "folder")
    assert presses._process.poll() is None
    presses.close()
    assert presses._process.poll() is not None
    presses.close()


# -- kvpress itself -------------------------------------------------------------------------------------------

PYTHON = os.environ.get("KVMLX_KVPRESS_PYTHON", "")
with_kvpress = pytest.mark.skipif(not PYTHON, reason="KVMLX_KVPRESS_PYTHON names no environment with kvpress")
TOKENS = 150
END = 0
SAME = {
    "knorm": ("knorm(sinks=0, recent=0)", "knorm"),
    "keydiff": ("keydiff(sinks=0, recent=0)", "keydiff"),
    "streaming": ("streaming(sinks=4, recent=0)", "streaming"),
    "tova": ("tova", "tova"),
    "snapkv": ("snapkv(sinks=0, recent=64, window=64, kernel=5)", "snapkv"),
    "snapkv-as-ours": ("snapkv(sinks=0, recent=32)", "snapkv(window_size=32, kernel_size=21)"),
    "expected_attention": ("expected_attention(sinks=4, recent=0)", "expected_attention"),
    "h2o": ("h2o(sinks=0, recent=0, normalize=true)", "h2o"),
}
"""kvmlx's selectors with kvpress's parameters, and kvpress's: they keep the same rows."""


def context(n: int = TOKENS, seed: int = 0) -> list[int]:
    """Return random tokens, no two alike if there are enough: equal tokens have keys of equal norms, which tie."""
    return np.random.default_rng(seed).choice(np.arange(3, 250), n, replace=n > 240).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("llama") / "model"))


@pytest.fixture(scope="module")
def presses(folder: str) -> Iterator[Kvpress]:
    with Kvpress(PYTHON, folder, threads=1) as presses:
        yield presses


PIPELINE = """
import json, sys, torch, transformers, kvpress
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
asked = json.load(sys.stdin)
tensors = {"context_ids": torch.tensor([asked["context"]]),
           "questions_ids": [torch.tensor([question]) for question in asked["questions"]]}
answers = {}
for name, press, attention in asked["presses"]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.float32, attn_implementation=attention)
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"])
    answers[name] = []
    tokenizer.decode = lambda ids, **options: answers[name].append(ids.tolist())
    pipe = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    with torch.inference_mode():
        pipe._forward(tensors, max_new_tokens=asked["most"], press=eval(press, vars(kvpress)))
print(json.dumps(answers))
"""
PIPELINE_PRESSES = {
    "full": ("None", "sdpa"),
    "snapkv(budget=0.3)": ("SnapKVPress(0.7 - 1e-9)", "sdpa"),
    "knorm(budget=0.3)": ("KnormPress(0.7 - 1e-9)", "sdpa"),
    "expected_attention(budget=0.3)": ("ExpectedAttentionPress(0.7 - 1e-9)", "sdpa"),
    "snapkv(budget=0.3) | adakv": ("AdaKVPress(SnapKVPress(0.7 - 1e-9))", "sdpa"),
    "snapkv(budget=0.3) | criticalkv | adakv": ("AdaKVPress(CriticalKVPress(SnapKVPress(0.7 - 1e-9)))", "sdpa"),
    "keydiff(budget=0.3) | rerotate": ("KeyRerotationPress(KeyDiffPress(0.7 - 1e-9))", "sdpa"),
    "knorm(budget=0.3) | chunkkv(chunk_length=5)": ("ChunkKVPress(KnormPress(0.7 - 1e-9), 5)", "sdpa"),
    "h2o(budget=0.3)": ("ObservedAttentionPress(0.7 - 1e-9)", "eager"),
}


@with_kvpress
def test_answers_are_those_of_kvpress_own_pipeline(presses: Kvpress, folder: str) -> None:
    questions = [context(5, seed=1), context(9, seed=2), context(1, seed=3)]
    asked = {
        "model": folder,
        "context": context(),
        "questions": questions,
        "most": 8,
        "presses": [[name, *how] for name, how in PIPELINE_PRESSES.items()],
    }
    done = subprocess.run([PYTHON, "-I", "-c", PIPELINE], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    answers = {}
    for name in PIPELINE_PRESSES:
        prompts = [Prompt(tuple(context()), tuple(q)) for q in questions]
        answers[name] = list(presses.answers(f"kvpress: {name}", prompts, [8] * 3))
        # The pipeline goes on if its first token ends the answer, and returns the end token.
        for mine, its in zip(answers[name], theirs[name], strict=True):
            assert mine == (its[: its.index(END)] if END in its else its), name
    assert len({json.dumps(a) for a in answers.values()}) > len(answers) // 2


@with_kvpress
@pytest.mark.parametrize(
    "name", [*(f"{n}(budget=0.5)" for n in SCORERS), *(f"snapkv(budget=0.5) | {w}" for w in WRAPPERS)]
)
def test_every_press_runs_and_says_what_it_holds(presses: Kvpress, name: str) -> None:
    tokens = context(300)
    sizes = presses.sizes(f"kvpress: {name}", tokens)
    masks = "adakv" in name
    held = sizes["held_bytes"] / sizes["full_bytes"]
    assert held == (1.0 if masks else pytest.approx(0.5, abs=0.04))
    assert sum(sizes["layer_held_bytes"]) == sizes["held_bytes"]
    seen = np.mean(sizes["layer_seen_rows"]) / 300
    assert seen == pytest.approx(0.5, abs=0.04) and (masks or seen == held)
    (answer,) = presses.answers(f"kvpress: {name}", [Prompt(tuple(tokens), (5, 6))], [3])
    assert len(answer) <= 3


@with_kvpress
def test_a_budget_in_tokens_and_one_that_binary_fractions_miss(presses: Kvpress) -> None:
    for budget, rows in ((37, 37), (0.1, 15), (0.3, 45), (1.0, 150), (400, 150)):
        assert presses.sizes(f"kvpress: knorm(budget={budget})", context())["layer_seen_rows"][0] == rows


@with_kvpress
def test_a_question_leaves_nothing_behind(presses: Kvpress) -> None:
    """Neither its rows, nor the keys that adakv's masks overwrite, nor the masks themselves."""
    prompts = [Prompt(tuple(context()), tuple(context(6, seed=s))) for s in (1, 2)]
    for method in ("snapkv(budget=0.4) | adakv", "pyramidkv(budget=0.8, window_size=8)", "full"):
        alone = [next(presses.answers(f"kvpress: {method}", [p], [10])) for p in prompts]
        assert list(presses.answers(f"kvpress: {method}", [*prompts, prompts[0]], [10] * 3)) == [*alone, alone[0]]


@with_kvpress
def test_parameters_are_checked_by_name(presses: Kvpress) -> None:
    presses.check("kvpress: snapkv(window_size=16) | adakv(alpha_safeguard=0.5)")
    with pytest.raises(KVMLXError, match="SnapKVPress has no parameter 'window'; it takes: window_size, kernel_size"):
        presses.check("kvpress: snapkv(window=16)")
    with pytest.raises(KVMLXError, match="kvpress: AssertionError"):
        presses.sizes("kvpress: snapkv(budget=0.5)", context(20))


@with_kvpress
def test_fidelity_is_against_the_full_cache(presses: Kvpress) -> None:
    tokens = context(TOKENS + 12)
    prefix, fed, scored = tokens[:TOKENS], tokens[TOKENS:-1], tokens[TOKENS + 1 :]
    kl, flips, nll, full_nll = presses.fidelity("kvpress: full", prefix, fed, scored)
    assert len(kl) == len(scored) and not any(kl) and not any(flips) and nll == full_nll
    kl, _, nll, again = presses.fidelity("kvpress: random(budget=0.1)", prefix, fed, scored)
    assert again == full_nll and max(kl) > 1e-6 and nll != full_nll
    assert presses.fidelity("kvpress: random(budget=0.1)", prefix, fed, scored)[0] == kl


@with_kvpress
def test_costs(presses: Kvpress) -> None:
    cost = presses.cost(context(), "kvpress: tova(budget=0.5)", batch=2, steps=3, repeats=2)
    assert len(cost.ttft_s) == 2 and len(cost.step_s) == 6 and min(cost.step_s) > 0
    # float32 in a cache of 149 tokens, whose last token was decoded
    assert cost.held_bytes == 2 * cost.full_nbytes * 74 // 149


def prefilled(model: Any, strategy: str, tokens: list[int]) -> Any:
    """Return kvmlx's cache of these tokens, compressed."""
    import torch

    import kvmlx

    cache = kvmlx.make_prompt_cache(model, strategy, inspect=True)
    with torch.inference_mode():
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    kvmlx.settle(cache)
    return cache


def kept_by_kvmlx(model: Any, strategy: str, tokens: list[int]) -> list[list[list[int]]]:
    from kvmlx.backends.torch import layers_of

    return [[rows.tolist() for rows in x.positions()[0]] for x in layers_of(prefilled(model, strategy, tokens))]


def answer_of_kvmlx(model: Any, strategy: str, tokens: list[int], question: list[int], most: int) -> list[int]:
    """Return the greedy answer; the question is fed a token at a time, so that nothing is selected again."""
    import torch

    cache, fed, out = prefilled(model, strategy, tokens), list(question), []
    with torch.inference_mode():
        while len(out) < most:
            for token in fed:
                logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
            out.append(int(logits[0, -1].argmax()))
            fed = out[-1:]
    return out


def with_budget(text: str, budget: float) -> str:
    name, _, rest = text.partition("(")
    return f"{name}(budget={budget}{', ' + rest if rest else ')'}"


@with_kvpress
@pytest.mark.parametrize("budget", [0.6, 0.5])
@pytest.mark.parametrize("name", SAME)
def test_selectors_keep_what_the_press_of_the_same_name_keeps(
    presses: Kvpress, folder: str, name: str, budget: float
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ours, theirs = (with_budget(text, budget) for text in SAME[name])
    kept = presses.positions(f"kvpress: {theirs}", context())
    assert kept == kept_by_kvmlx(model, ours, context())
    assert len(kept[0][0]) == int(TOKENS * budget)
    question = context(6, seed=4)
    (answer,) = presses.answers(f"kvpress: {theirs}", [Prompt(tuple(context()), tuple(question))], [12])
    assert answer == answer_of_kvmlx(model, ours, context(), question, 12) and len(answer) == 12


@with_kvpress
@pytest.mark.slow
@pytest.mark.model
def test_selectors_keep_the_same_rows_of_a_text() -> None:
    """On the demo model, 600 tokens of prose and a needle, layer by layer: equal, but for ties of equal tokens.

    Keys of the first layer are those of the token turned by its position: equal tokens have equal norms, and knorm's
    choice among them is left to rounding.
    """
    transformers = pytest.importorskip("transformers")
    from kvmlx.demo_model import ensure_demo_model

    folder = str(ensure_demo_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prose = WORKER.with_name("data") / "prose.txt"
    words = tokenizer.encode(prose.read_text(encoding="utf-8")[:4000], add_special_tokens=False)
    needle = tokenizer.encode(" One of the special magic numbers for amber is: 48213.", add_special_tokens=False)
    tokens = [*words[:250], *needle, *words[250:]][:607]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with Kvpress(PYTHON, folder, threads=2) as presses:
        for budget in (0.5, 0.25):
            for name, texts in SAME.items():
                ours, theirs = (with_budget(text, budget) for text in texts)
                pairs = zip(
                    kept_by_kvmlx(model, ours, tokens), presses.positions(f"kvpress: {theirs}", tokens), strict=True
                )
                for layer, (mine, its) in enumerate(pairs):
                    if name != "knorm" or layer:
                        assert mine == its, (name, budget, layer)
                    for a, b in zip(mine, its, strict=True):
                        assert len(a) == len(b) and len(set(a) & set(b)) >= 0.98 * len(a), (name, budget, layer)
