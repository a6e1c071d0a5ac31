"""README and docs: the example runs, strategies parse, tables and quoted figures are what code and results say.

python -m tests.test_docs    write the parts of README.md and docs/methods.md that quote docs/results/ again
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvmlx.bench.records import Costs
from kvmlx.layout import row_bytes
from kvmlx.stages.base import Encode, Select, Stage
from kvmlx.strategy import ALIASES, PRESETS, STAGES, Strategy
from scripts import bench_tables

ROOT = Path(__file__).resolve().parents[1]
README, METHODS, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "architecture.md"
METAL, CUDA, BENCH = (ROOT / "docs" / f"{name}.md" for name in ("metal", "cuda", "bench"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"
IN_COMMON = {"backends.base", "backends.files", "backends.formats", "backends.rotary", "backends.rows"}
"""Rooms of backends that stand beside them: no framework is imported there."""
FRAMEWORKS = {"mlx", "mlx_lm", "torch", "triton", "transformers", "array_api_compat"}

per_page = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def table(text: str, first_heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is this, cells stripped."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first_heading} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


# -- the example ----------------------------------------------------------------------------------------------


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    import kvmlx
    from tests.tiny_model import write_model

    example = re.findall(r"```python\n(.*?)```", read(README), re.DOTALL)[0]
    assert len(example.splitlines()) <= 12
    folder, load = write_model(tmp_path / "model"), mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", lambda name: load(str(folder)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Tom surveyed the fence, and all gladness left him. " * 12)
    space: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), space)
    answer, report = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert answer and "tokens kept" in report
    held = kvmlx.report(space["cache"])
    assert str(held) == report
    assert len(space["prompt"]) < held.tokens and held.kept_tokens < held.tokens
    assert kvmlx.report(kvmlx.load_prompt_cache("book.safetensors")) == held


# -- strategies -----------------------------------------------------------------------------------------------

_NAME = r"[a-z_][a-z_0-9]*"
_STAGE = rf"{_NAME}(?:\([^()`]*\))?"
_STRATEGY = re.compile(rf"{_STAGE}(?: \| {_STAGE})*")
_QUOTED = re.compile(r"""(?:--kv|make_prompt_cache\(\w+,|kvmlx explain) (?:"([^"<]+)"|'([^']+)'|(?!["'S])(\S+))""")


def test_readme_example_for_transformers_runs(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "book.txt").write_text("Once upon a time. " * 40)
    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", read(README), re.DOTALL)[1]
    # On a CPU, and a model that is at hand.
    exec(re.sub(r'"meta-llama/[^"]*"', repr(tiny_model), example).replace('"cuda"', '"cpu"'), {})
    out = capsys.readouterr().out
    assert "tokens kept" in out and "of the full 16-bit cache" in out


def strategies_in(text: str) -> Iterator[str]:
    """Yield what looks like a strategy: in code spans, and where code or a command takes one."""
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        first = re.split(r"\W", span)[0]
        known = first in STAGES or first in ALIASES or first in PRESETS
        if known and ("(" in span or "|" in span) and _STRATEGY.fullmatch(span):
            yield span
    for double, single, bare in _QUOTED.findall(text):
        yield double or single or bare.rstrip("`,.")


@per_page
def test_strategies_parse(page: Path) -> None:
    for text in strategies_in(read(page)):
        first = STAGES.get(re.split(r"\W", text)[0])
        alone = first is None or issubclass(first, Select | Encode)
        Strategy.parse(text if alone else f"snapkv(budget=0.25) | {text}")


def test_strategies_are_found() -> None:
    found = list(strategies_in(read(README)))
    assert "snapkv(budget=0.25) | int4" in found and "balanced" in found and "small" in found
    assert len(found) >= 8


# -- methods --------------------------------------------------------------------------------------------------


def sections(text: str, level: str) -> dict[str, str]:
    parts = re.split(rf"^{level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_section_with_its_defaults(name: str) -> None:
    cls = STAGES[name]
    kinds = sections(read(METHODS), "##")
    kind = kinds[cls.kind.capitalize()]
    section = sections(kind, "###")[name]
    base = kind.split("\n### ")[0]
    assert not cls.paper or f"[{cls.paper}](https://arxiv.org/abs/{cls.paper})" in section
    if name == "full":
        return
    for field in fields(cls):
        text = f"`{field.name}={shown(field.default)}`"
        common = issubclass(cls, Select | Encode) and text in base
        assert text in section or common, f"{name}: {text} is missing"


def test_sections_are_stages() -> None:
    assert set(sections(read(METHODS), "###")) == set(STAGES)


def test_readme_table_has_every_stage() -> None:
    rows = [row for row in table(read(README), "stage") if not row[0].startswith("**")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in STAGES]
    for (_, _, paper), cls in zip(rows, STAGES.values(), strict=True):
        assert paper == (f"[{cls.paper}](https://arxiv.org/abs/{cls.paper})" if cls.paper else "")


def codec_bytes(strategy: Strategy, dim: int) -> tuple[float, float]:
    """Return the bytes of a row of keys and of values."""
    keys, values = (2.0 * dim if codec is None else row_bytes(codec.planes(dim)) for codec in strategy.codecs())
    return keys, values


def bits(strategy: Strategy, dim: int) -> str:
    return f"{sum(codec_bytes(strategy, dim)) * 8 / (2 * dim):g}"


def test_bytes_per_row() -> None:
    rows = table(read(METHODS).split("<!-- bytes -->")[1], "strategy")
    assert {row[0] for row in rows} >= {f"`{name}`" for name in PRESETS}
    for text, *cells in rows:
        strategy = Strategy.parse(text.strip("`"))
        expected = []
        for dim in (64, 128):
            expected += [*(f"{n:g}" for n in codec_bytes(strategy, dim)), bits(strategy, dim)]
        assert cells == expected, text


# -- quoted results -------------------------------------------------------------------------------------------

Block = Callable[[], str]


def result(part: str) -> dict[str, Any] | None:
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rendered() -> dict[str, Any]:
    """Return the columns of docs/results/README.md, by part, as scripts/measure.py prints them."""
    from scripts.measure import RENDER

    return RENDER


def cells(part: str, row: dict[str, Any], columns: list[str]) -> list[str]:
    found = result(part)
    assert found is not None
    return [rendered()[part][column](row, found["settings"]) for column in columns]


def settings(found: dict[str, Any]) -> str:
    said = {k: v for k, v in found["settings"].items() if isinstance(v, str | int) and k != "full_bytes"}
    return "; ".join(f"{k.replace('_', ' ')}: {v}" for k, v in said.items())


def render_presets(*, pages: str = "docs/results/README.md") -> str:
    header = ["preset", "is", "bits, D=64", "bits, D=128"]
    rows = [[f"`{n}`", f"`{t}`", *(bits(Strategy.parse(t), d) for d in (64, 128))] for n, t in PRESETS.items()]
    found = result("quality")
    if found is None:
        return bench_tables.table(header, rows)
    columns = ["KL mean", "flips"]
    measured = {row["strategy"]: row for row in found["rows"]}
    for row, name in zip(rows, PRESETS, strict=True):
        row += cells("quality", measured[name], columns)
    note = (
        "\nKL is that of the next token's distribution under the full cache to that under the compressed one, flips "
        f"the share of\ntokens whose most likely next token changed ({settings(found)};\n[all figures]({pages})).\n"
    )
    return bench_tables.table(header + columns, rows) + note


def render_agreement() -> str:
    found = result("memory")
    assert found is not None
    ratios = [row["held_bytes"] / row["nbytes"] for row in found["rows"]]
    small = max(c.held_bytes / c.nbytes for c in bench_tables.results_of("demo").of(Costs) if c.held_bytes)
    return (
        "Bytes reported are those that the allocator holds, head-room included (held / reported is "
        f"{min(ratios):.3f} to {max(ratios):.3f} for {len(ratios)} strategies;\n"
        f"of the small arrays of the [demo model](docs/bench.md#memory-and-speed) up to {small:.3f}), and the peak of "
        "a prefill is never above that\nof the full cache. [docs/results](docs/results/README.md) has memory, peak, "
        "fidelity, needles and speed with machine, versions and spread.\n"
    )


def render_compared() -> str:
    results, several = bench_tables.results_of("demo"), bench_tables.results_of("several")
    return bench_tables.compared(results, bench_tables.SHOWN, several=several)


def render_several() -> str:
    return bench_tables.compared(bench_tables.results_of("several"))


def render_several_best() -> str:
    return bench_tables.presses(bench_tables.results_of("several"), (4, 8))


def render_aware() -> str:
    return bench_tables.compared(bench_tables.results_of("demo"), mode="aware")


def render_costs() -> str:
    return bench_tables.costs(bench_tables.results_of("demo"))


def render_fresh() -> str:
    return bench_tables.compared(bench_tables.results_of("fresh"))


def render_second() -> str:
    return bench_tables.compared(bench_tables.results_of("second"))


def test_the_whole_comparison_is_that_of_the_results() -> None:
    """bench-demo.md is what `kvmlx bench show --format md` prints."""
    assert read(RESULTS / "bench-demo.md") == whole(), "run python -m tests.test_docs"


def whole() -> str:
    from kvmlx.bench.report import to_md

    return to_md(bench_tables.results_of("demo")) + "\n"


def render_presses() -> str:
    return bench_tables.presses(bench_tables.results_of("demo"), (2, 4))


def render_counted() -> str:
    """Return the tables of docs/metal.md."""
    from scripts.count_metal import render

    return render(json.loads((RESULTS / "metal.json").read_text(encoding="utf-8")))


def render_compiled() -> str:
    from scripts.triton_report import render

    found = result("triton")
    assert found is not None
    return render(found)


def render_gpu() -> str:
    """Return what scripts/gpu_check.py measured, or that nobody ran it yet."""
    from scripts.triton_report import measured

    return measured([json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("gpu-*.json"))])


BLOCKS: dict[tuple[Path, str], Block] = {
    (README, "presets"): render_presets,
    (README, "compared"): render_compared,
    (README, "agreement"): render_agreement,
    (BENCH, "aware"): render_aware,
    (BENCH, "costs"): render_costs,
    (BENCH, "several"): render_several,
    (BENCH, "several_best"): render_several_best,
    (BENCH, "fresh"): render_fresh,
    (BENCH, "second"): render_second,
    (BENCH, "presses"): render_presses,
    (METHODS, "presets"): lambda: render_presets(pages="results/README.md"),
    (METAL, "counted"): render_counted,
    (CUDA, "compiled"): render_compiled,
    (CUDA, "measured"): render_gpu,
}


@pytest.mark.parametrize("page, name", BLOCKS, ids=[f"{p.stem}-{n}" for p, n in BLOCKS])
def test_quoted_figures_are_those_of_the_results(page: Path, name: str) -> None:
    pytest.importorskip("mlx_lm")
    quoted = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", read(page), re.DOTALL)
    assert quoted == [BLOCKS[page, name]()], "run python -m tests.test_docs"


# -- links ----------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@per_page
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", read(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(read(target)), link


@per_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:kvmlx|backends|docs|scripts|tests|metal_kernels)/[\w/.-]+)`", read(page)):
        assert (ROOT / name).exists(), name


def test_readme_has_a_readable_length() -> None:
    assert 100 <= len(read(README).splitlines()) <= 230


# -- arrows ---------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, Path]]:
    """Yield every module's room and file."""
    for top, folder in (("", "kvmlx"), ("backends.", "backends"), ("metal_kernels.", "metal_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_symlink() or any(p.is_symlink() for p in path.parents if p != ROOT and ROOT in p.parents):
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = top + ".".join(p for p in parts if p != "__init__")
            yield room_of("kvmlx." + name.strip(".") if name.strip(".") else "kvmlx"), path


def room_of(module: str) -> str:
    """Return the room of a module by its full name."""
    parts = module.split(".")[1:]
    if not parts or parts[0].startswith("__"):
        return "kvmlx"
    return ".".join(parts[:2]) if parts[0] == "backends" else parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (module, at the top of the file and not for types only) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = node.module in ("kvmlx", "kvmlx.backends")
                yield (f"{node.module}.{alias.name}" if deeper else node.module), node in top


@cache
def arrows() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Return for each room the rooms that it imports at the top, and those only inside functions or for types."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for room, path in sources():
        top, inside = found.setdefault(room, (set(), set()))
        for module, at_top in imports(path):
            if module.split(".")[0] == "kvmlx" and room_of(module) != room:
                (top if at_top else inside).add(room_of(module))
    return {room: (frozenset(top), frozenset(inside - top)) for room, (top, inside) in found.items()}


def test_the_table_of_rooms_is_true() -> None:
    listed = {
        row[0].strip("`"): tuple(frozenset(re.findall(r"`([^`]+)`", cell)) for cell in row[2:])
        for row in table(read(ARCHITECTURE), "room")
    }
    found = {room: arrow for room, arrow in arrows().items() if room != "backends"}
    assert listed == found


def test_rooms_have_no_cycles() -> None:
    done: set[str] = set()
    left = {room: set(top) for room, (top, _) in arrows().items() if room != "backends"}
    while left:
        # `files` reads the version number of the package above it.
        ready = {room for room, needs in left.items() if needs - {"kvmlx"} <= done}
        assert ready, left
        done |= ready
        left = {room: needs for room, needs in left.items() if room not in ready}


def test_arrows_that_must_stay() -> None:
    backends = {room for room in arrows() if room.startswith("backends.")}
    both = {room: top | inside for room, (top, inside) in arrows().items()}
    for room, targets in both.items():
        if room not in backends | {"kvmlx", "cli"}:
            assert not targets & backends, room
        assert room in backends or not arrows()[room][0] & backends, room
    assert arrows()["stages"][0] <= {"types", "ops", "layout"}
    for room in backends:
        assert not both[room] & (backends - IN_COMMON), room
    assert not both["metal_kernels"]


def test_kvmlx_names_a_backend_in_one_function() -> None:
    tree = ast.parse((ROOT / "kvmlx" / "__init__.py").read_text(encoding="utf-8"))
    holders = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(n, ast.Import) and "backends" in n.names[0].name for n in ast.walk(node))
    ]
    assert holders == ["_adapter"]


def test_frameworks_are_imported_in_their_backend() -> None:
    for room, path in sources():
        for module, at_top in imports(path):
            if module.split(".")[0] in FRAMEWORKS:
                own = room.startswith("backends.") and room not in IN_COMMON
                own |= path.name == "kvpress_worker.py"  # a script of another environment, which nothing imports
                assert own or (room == "cli" and not at_top), f"{path}: {module}"


def test_stage_classes_are_stages() -> None:
    assert all(issubclass(cls, Stage) and cls.name == name for name, cls in STAGES.items())


def main() -> None:
    """Write the quoted parts again."""
    for (page, name), block in BLOCKS.items():
        text = page.read_text(encoding="utf-8")
        start, stop = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(start)
        page.write_text(head + start + block() + stop + rest.split(stop, 1)[1], encoding="utf-8")
        print(f"wrote {page.name}: {name}")
    (RESULTS / "bench-demo.md").write_text(whole(), encoding="utf-8")
    bench_tables.draw(RESULTS / "bench-demo.png")


if __name__ == "__main__":
    main()
