"""What a report says of results whose numbers are known, and that every format says the same."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from kvmlx.bench import report
from kvmlx.bench.records import Costs, Fidelity, Results, Score, Skip
from kvmlx.bench.report import figures, tables, text
from kvmlx.bench.report.findings import best, findings
from kvmlx.bench.summary import Name, Quality, Summary, pareto, summarize
from kvmlx.types import KVMLXError
from tests.bench_results import full, many, run, score, subject

EVIL = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"' onmouseover=window.pwned=1 | $x$ `a` & *b*"


@pytest.fixture(scope="module")
def results() -> Results:
    return many()


@pytest.fixture(scope="module")
def summary(results: Results) -> Summary:
    return summarize(results)


def of(*records: Score | Fidelity | Costs | Skip) -> Results:
    return Results([run()], list(records))


def answers(who: str, values: list[float], **place: object) -> list[Score]:
    """One question for each context."""
    subjects = full() if who == "full" else subject(who)
    return [score(subjects, v, sample=i, **place) for i, v in enumerate(values)]


def row(results: Results, family: str, **place: object) -> Quality:
    (found,) = [
        r
        for r in summarize(results).rows
        if r.name.family == family and all(getattr(r, k) == v for k, v in place.items())
    ]
    return found


# -- quality --------------------------------------------------------------------------------------------------


def test_only_informative_tasks_are_averaged() -> None:
    known = [*answers("full", [1, 1, 1, 0, 1, 1]), *answers("snapkv", [1, 0, 0, 0, 1, 1])]
    hard = [*answers("full", [0, 0, 1, 0, 0, 1], task="cwe"), *answers("snapkv", [1, 1, 1, 1, 1, 1], task="cwe")]
    got = row(of(*known, *hard), "snapkv")
    assert got.score is not None and got.score.value == pytest.approx(0.5)
    assert got.full == pytest.approx(5 / 6) and got.share == pytest.approx(0.6)
    assert {t.task: (t.informative, t.mean) for t in got.tasks} == {"niah_single": (True, 0.5), "cwe": (False, 1.0)}


def test_half_of_the_questions_make_a_task_informative() -> None:
    assert row(of(*answers("full", [1, 0])), "full").tasks[0].informative


def test_a_task_may_be_informative_at_one_length_only() -> None:
    short = [*answers("full", [1, 1], length=1024), *answers("snapkv", [1, 0], length=1024)]
    long = [*answers("full", [0, 0], length=4096), *answers("snapkv", [1, 1], length=4096)]
    results = of(*short, *long)
    assert row(results, "snapkv", length=1024).score is not None
    assert row(results, "snapkv", length=4096).score is None
    (pooled,) = [r for r in summarize(results).pooled if r.name.family == "snapkv"]
    assert pooled.score is not None and pooled.score.value == 0.5


def test_modes_are_never_averaged(summary: Summary) -> None:
    apart = [*answers("full", [1, 1]), *answers("snapkv", [0, 0])]
    apart += [*answers("full", [1, 1], mode="aware"), *answers("snapkv", [1, 1], mode="aware")]
    assert [row(of(*apart), "snapkv", mode=m).share for m in ("agnostic", "aware")] == [0, 1]
    assert {r.mode for r in summary.pooled} == {"agnostic", "aware"}


def test_difference_is_paired() -> None:
    """Contexts differ much, the method is a little worse on each: only a paired interval sees it."""
    theirs = [0.9, 0.5, 1.0, 0.6, 0.8, 0.7, 1.0, 0.55]
    losses = [0.05, 0.04, 0.06, 0.05, 0.05, 0.04, 0.06, 0.05]
    ours = [t - lost for t, lost in zip(theirs, losses, strict=True)]
    got = row(of(*answers("full", theirs), *answers("snapkv", ours)), "snapkv")
    assert got.verdict == "worse" and got.difference is not None
    assert got.difference.value == pytest.approx(-0.05)
    assert got.score is not None and got.score.high is not None and got.full is not None
    assert got.score.high > got.full, "an unpaired interval would not have told"


def test_equal_answers_are_the_same() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    got = row(of(*answers("full", values), *answers("snapkv", values)), "snapkv")
    assert got.verdict == "same" and got.difference is not None
    assert (got.difference.low, got.difference.high) == (0, 0)


def test_full_has_no_verdict(summary: Summary) -> None:
    assert all(r.verdict is None and r.difference is None and r.share == 1 for r in summary.rows if r.name.full)


def test_interrupted_runs_are_marked_and_not_ranked() -> None:
    values = [1.0] * 8
    results = of(*answers("full", values), *answers("snapkv", values[:6]), *answers("keydiff", [0.0] * 6 + [1, 1]))
    assert not row(results, "snapkv").complete and row(results, "keydiff").complete
    assert not row(results, "snapkv").front
    assert [r.cells[2].text for r in best(results, summarize(results)).rows] == ["keydiff"]
    assert "100.0%\\*" in text.to_md(results)


def test_uninformative_tasks_need_not_be_answered() -> None:
    results = of(*answers("full", [1, 1]), *answers("full", [0, 0], task="cwe"), *answers("snapkv", [1, 1]))
    assert row(results, "snapkv").complete


def test_without_full_nothing_is_averaged() -> None:
    got = summarize(of(*answers("snapkv", [1, 1])))
    assert got.rows[0].score is None and "has not been run" in got.errors[0]
    hopeless = summarize(of(*answers("full", [0, 0]), *answers("snapkv", [1, 1])))
    assert "reaches 0.5 on no task" in hopeless.errors[0]


def test_pareto() -> None:
    points = [(1.0, 0.9), (0.5, 0.9), (0.5, 0.8), (0.25, 0.7), (0.25, 0.7), (0.1, 0.75), (0.05, 0.0)]
    assert pareto(points) == {1, 5, 6}


def test_front_of_each_facet(summary: Summary) -> None:
    for mode, length in (("agnostic", 1024), ("aware", 4096)):
        rows = [r for r in summary.rows if (r.mode, r.length) == (mode, length) and r.score]
        for r in rows:
            assert r.score is not None
            beaten = any(
                o.ratio <= r.ratio
                and o.score.value >= r.score.value
                and (o.ratio, o.score.value) != (r.ratio, r.score.value)
                for o in rows
                if o.score
            )
            assert r.front != beaten


# -- fidelity and costs ---------------------------------------------------------------------------------------


def fidelity(family: str = "snapkv", kl: tuple[float, ...] = (0.8, 0.4, 0.2, 0.0), number: int = 0) -> Fidelity:
    nll = (2.0, 1.0, 3.0, 2.0)
    drifted = tuple(n + 0.1 for n in nll)
    return Fidelity(subject(family), 1024, number, kl, (True, False, False, False), drifted, nll)


def test_drift() -> None:
    (got,) = summarize(of(fidelity(), fidelity(kl=(0.0, 0.0, 0.0, 0.2), number=1))).drifts
    assert got.kl.value == pytest.approx(0.2) and got.kl_max == 0.8 and got.tokens == 8
    assert got.kl.low is None, "two texts tell nothing about their spread"
    assert got.flips == 0.25
    assert got.quarters == pytest.approx((0.4, 0.2, 0.1, 0.1))
    assert got.perplexity - got.full_perplexity == pytest.approx(math.exp(2.1) - math.exp(2.0))
    assert not got.unused


def test_zero_drift_of_a_lossy_method_is_an_error(tmp_path: Path) -> None:
    results = of(fidelity(kl=(0.0,) * 4))
    (message,) = summarize(results).errors
    assert "snapkv at 4x" in message and "not used" in message
    page = report.report_html(results, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'role="alert"' in page and "not used" in page
    assert "not used" in text.to_md(results)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    report.print_summary(results, console)
    assert "error: snapkv at 4x" in console.file.getvalue()  # type: ignore[attr-defined]


def test_zero_drift_of_a_method_that_keeps_everything_is_none() -> None:
    everything = replace(fidelity(kl=(0.0,) * 4), subject=replace(subject("snapkv"), ratio=1.0))
    assert not summarize(of(everything)).errors


def cost(who: str, seconds: tuple[float, ...], batch: int = 2, **more: object) -> Costs:
    own = full() if who == "full" else subject(who)
    numbers = {"nbytes": 250, "held_bytes": 300, "full_nbytes": 1000, "peak_bytes": None, "ttft_s": (1.0, 2.0, 3.0)}
    return Costs(subject=own, length=1024, batch=batch, step_s=seconds, **(numbers | more))  # type: ignore[arg-type]


def test_costs_stand_beside_full_at_the_same_length_and_batch() -> None:
    records = [cost("full", (0.2,) * 4, ttft_s=(4.0,)), cost("snapkv", (0.1, 0.1, 0.2, 0.4)), cost("snapkv", (1.0,), 8)]
    two, eight = [c for c in summarize(of(*records)).costs if not c.name.full]
    assert two.tokens_per_s == pytest.approx((8.75, 15.0, 20.0)) and two.speed_of_full == pytest.approx(1.5)
    assert two.ttft_s == (1.5, 2.0, 2.5) and two.ttft_of_full == pytest.approx(0.5)
    assert two.ratio == 0.25 and two.held_of_nbytes == pytest.approx(1.2)
    assert eight.speed_of_full is None and eight.tokens_per_s == (8.0, 8.0, 8.0)
    held = tables.costs(summarize(of(*records))).rows[1].cells[6]
    assert held.text == "120.0%" and held.mark == "bad"


def test_missing_costs_are_dashes() -> None:
    (line,) = tables.costs(summarize(of(cost("snapkv", (), held_bytes=None, ttft_s=())))).rows
    assert [c.text for c in line.cells[6:12]] == ["–"] * 6


def test_skips_are_listed_once_with_their_reason(summary: Summary) -> None:
    listed = [tuple(c.text for c in r.cells) for r in tables.skips(summary).rows]
    assert ("kvpress: snapkv", "2x, 4x, 8x, 16x", "cost", "all") in [r[:4] for r in listed]
    assert any("7.1x is the most" in r[4] for r in listed)


# -- sentences ------------------------------------------------------------------------------------------------


def test_findings_name_the_least_bytes_without_loss() -> None:
    ones, zeros = [1.0] * 8, [0.0] * 8
    results = of(*answers("full", ones), *answers("snapkv", zeros), *answers("keydiff", ones))
    said = findings(summarize(results))
    assert said[0].startswith("Query-agnostic: `keydiff at 4x` keeps 25.0% of the bytes")
    assert "1 other with as many bytes or more is worse" in said[0]
    all_worse = findings(summarize(of(*answers("full", ones), *answers("snapkv", zeros))))
    assert all_worse == ["Query-agnostic: every method is worse than the full cache."]


def test_best_lists_who_is_level_with_it() -> None:
    values = {"a": [1.0] * 10, "b": [1.0] * 9 + [0.0], "c": [0.0] * 10}
    results = of(*answers("full", [1.0] * 10), *(s for who, v in values.items() for s in answers(who, v)))
    (line,) = best(results, summarize(results)).rows
    assert [c.text for c in line.cells] == ["agnostic", "4x", "a", "100.0%", "= same", "b", "1"]


def test_methods_as_written_have_a_column_of_their_own() -> None:
    own = replace(subject("int8"), target=None, ratio=0.53)
    ones = answers("full", [1.0] * 8)
    summary = summarize(of(*ones, *answers("snapkv", [1.0] * 8), *(replace(s, subject=own) for s in ones)))
    table = tables.overview(summary, "agnostic")
    assert [c.title for c in table.columns] == ["Method", "4x", "as written"]
    assert {tuple(c.text for c in r.cells) for r in table.rows} == {
        ("snapkv", "100.0% =", "–"),
        ("int8", "–", "100.0% at 53.0% ="),
    }
    (chart,) = figures.quality_charts(summary)
    assert {p.family: p.x for p in chart.points} == {"full": 1.0, "snapkv": 0.25, "int8": 0.53}


def test_too_few_contexts_are_said() -> None:
    results = of(*answers("full", [1, 1]), *answers("snapkv", [0, 0]))
    assert findings(summarize(results)) == ["Too few contexts for verdicts: run again with more --samples."]
    assert row(results, "snapkv").verdict is None


# -- formats --------------------------------------------------------------------------------------------------


def test_csv_has_one_number_a_line(results: Results, summary: Summary) -> None:
    lines = list(csv.DictReader(io.StringIO(report.to_csv(results))))
    assert tuple(lines[0]) == text.COLUMNS
    assert {line["measure"] for line in lines} == set(text.MEASURES)
    assert all(line["unit"] == text.MEASURES[line["measure"]][0] for line in lines)
    want = next(r for r in summary.rows if r.name == Name("snapkv", 4.0) and r.mode == "aware" and r.length == 4096)
    place = {"family": "snapkv", "target": "4", "mode": "aware", "length": "4096"}
    (got,) = [n for n in lines if n["measure"] == "score_difference" and place.items() <= n.items()]
    assert want.difference is not None and want.difference.low is not None
    assert float(got["value"]) == pytest.approx(want.difference.value)
    assert float(got["low"]) == pytest.approx(want.difference.low)
    assert (got["n"], got["verdict"]) == (str(want.difference.samples), want.verdict)


def test_json_says_what_the_summary_says(results: Results, summary: Summary) -> None:
    document = json.loads(report.to_json(results))
    assert document["runs"][0]["machine"]["mlx"] == "0.32.0"
    assert len(document["rows"]) == len(summary.rows)
    first = document["rows"][1]
    assert first["name"] == {"family": "full", "target": None, "full": True} and first["share"] == 1
    assert document["costs"][0]["held_of_nbytes"] == pytest.approx(1.01, abs=0.001)


def test_markdown_tables_are_rectangular(results: Results) -> None:
    page = report.to_md(results)
    blocks = [b.splitlines() for b in page.split("\n\n") if b.startswith("|")]
    assert len(blocks) == 8
    for block in blocks:
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in block} == {len(re.findall(r"(?<!\\)\|", block[0]))}
    assert "`snapkv \\| turboquant(k=5, v=4, center=64)`" in page
    assert "kvmlx bench --model demo" in page and "mlx-lm: 0.32.1" in page


def test_terminal_fits_in_100_columns(results: Results) -> None:
    out = io.StringIO()
    report.print_summary(results, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("snapkv | turboquant(k=5, v=4, center=64)" in line and "▼" not in line for line in lines)


def test_a_long_name_leaves_room_for_the_plots(results: Results, tmp_path: Path) -> None:
    name = "leverage(recent=16) | turboquant(bits=4, center=64, recent=16)"
    family = next(r.subject.family for r in results.of(Score) if r.subject.family != "full")
    renamed = [
        replace(r, subject=replace(r.subject, family=name)) if r.subject.family == family else r
        for r in results.records
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.report_plots(Results(results.runs, renamed), tmp_path)


def test_plots_are_written(results: Results, tmp_path: Path) -> None:
    kept = [r for r in results.records if r.subject.family in ("full", "snapkv") and getattr(r, "length", 0) == 1024]
    small = Results(results.runs, [r for r in kept if not isinstance(r, Score) or r.mode == "agnostic"])
    small.records += answers("a $name$ with $\\frac$", [1.0] * 8)
    paths = report.report_plots(small, tmp_path / "plots")
    assert {p.stem for p in paths} >= {"quality", "speed", "fidelity", "position", "tasks-agnostic-1024"}
    for path in paths:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    drawn = (tmp_path / "plots" / "quality.svg").read_text(encoding="utf-8")
    assert "a $name$ with $\\frac$" in drawn, "text stays text"


def test_points_of_a_chart_are_those_of_the_summary(summary: Summary) -> None:
    chart = next(c for c in figures.quality_charts(summary) if c.name == "quality-aware-4096")
    rows = [r for r in summary.rows if (r.mode, r.length) == ("aware", 4096)]
    assert sorted(p.y for p in chart.points) == sorted(r.score.value for r in rows if r.score)
    assert sum(p.front for p in chart.points) == sum(r.front for r in rows)
    by_x = [p.family for p in sorted(chart.points, key=lambda p: p.x) if p.target == 4]
    assert len(set(by_x)) == len(by_x) == 9


# -- the page -------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.found if "id" in a]


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = report.report_html(results, tmp_path_factory.mktemp("page") / "page.html")
    return path.read_text(encoding="utf-8")


def test_page_is_one_file_of_moderate_size(page: str) -> None:
    assert len(page.encode()) < 1_500_000
    found = Elements(page).found
    assert not [t for t, a in found if t in ("img", "iframe", "object", "embed") or "src" in a]
    assert [a["href"] for t, a in found if t == "link"] == ["data:,"]
    assert not re.findall(r"url\((?!#)", page) and "@import" not in page
    links = {str(a["href"]) for t, a in found if t == "a"}
    assert links and all(link.startswith("#") and link[1:] in Elements(page).ids() for link in links)


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = Counter(Elements(page).ids())
    assert not [i for i, n in ids.items() if n > 1]
    references = set(re.findall(r'<use [^>]*href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert references and references <= set(ids)


def test_page_has_all_that_was_measured(page: str, results: Results) -> None:
    for part in ("Imagined CPU, 2 cores", "0.32.1", "kvmlx bench --model demo", "7.1x is the most", "not averaged in"):
        assert part in page, part
    for record in results.records:
        assert record.subject.family.replace("|", "|") in page


def test_what_comes_from_results_is_inert(tmp_path: Path) -> None:
    results = evil()
    page = report.report_html(results, tmp_path / "page.html").read_text(encoding="utf-8")
    found = Elements(page).found
    assert [a for t, a in found if t == "script"] == [{}]
    assert not [t for t, a in found if t == "img" or any(name.startswith("on") for name in a)]
    outside_code = re.sub(r"(`+)[^`]+\1", "", re.sub(r"(`{3,})\n.*\n\1", "", report.to_md(results)))
    assert "<script>" not in outside_code and "<img" not in outside_code


def evil() -> Results:
    """Return results in which everything that is text is an attack."""
    own = replace(subject("x"), family=EVIL, method=EVIL)
    scores = [replace(s, task=EVIL, response=EVIL, mode=EVIL) for s in answers("full", [1.0] * 8)]
    scores += [replace(s, subject=own) for s in scores]
    skip = Skip(own, EVIL, 1024, EVIL)
    results = of(
        *scores, skip, replace(fidelity(), subject=own), replace(cost("x", (0.1,)), subject=own), cost("full", (1,))
    )
    results.runs[0] |= {
        "command": EVIL,
        "started": EVIL,
        "settings": {"model": EVIL, EVIL: EVIL},
        "machine": {EVIL: EVIL},
    }
    return results


def test_page_of_almost_nothing(tmp_path: Path) -> None:
    for records in (
        [],
        answers("full", [1]),
        [fidelity()],
        [cost("snapkv", (0.1,))],
        [Skip(subject("x"), "all", None, "no")],
    ):
        page = report.report_html(of(*records), tmp_path / "page.html").read_text(encoding="utf-8")
        assert "How to reproduce" in page
        report.print_summary(of(*records), Console(file=io.StringIO()))
        assert report.to_md(of(*records)) and report.to_csv(of(*records)) and report.to_json(of(*records))


def test_matplotlib_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KVMLXError, match=r"kvmlx\[bench\]"):
        report.report_html(many(samples=1, families={}), tmp_path / "page.html")


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match=r"page\.html cannot be written: No such file or directory"):
        report.report_html(of(), tmp_path / "missing" / "page.html")
    (tmp_path / "file").touch()
    with pytest.raises(KVMLXError, match="file cannot be written"):
        report.report_plots(of(), tmp_path / "file")


def test_whole_config_is_shown() -> None:
    results = of(*answers("full", [1.0]))
    results.runs[0]["config"] = {"budgets": [0.25], "model": "demo"}
    assert "- budgets: 0.25" in report.to_md(results) and "- chunk: 512" in report.to_md(results)


def test_import_is_light() -> None:
    code = "import sys, kvmlx.bench.report; print(sorted({'matplotlib', 'rich', 'mlx', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- two files ------------------------------------------------------------------------------------------------


def test_a_file_compared_with_itself(results: Results) -> None:
    got = report.compare(results, results)
    assert not got.settings and not got.only_a and not got.only_b
    assert len({c.measure for c in got.changes}) == 7
    assert all(c.a == c.b for c in got.changes)
    assert {c.verdict for c in got.changes if c.measure == "score"} == {"same"}


def test_a_planted_change_is_found() -> None:
    ones, mostly = [1.0] * 10, [1.0] * 9 + [0.0]
    before = of(*answers("full", ones), *answers("snapkv", ones), *answers("keydiff", mostly), *answers("old", ones))
    after = of(*answers("full", ones), *answers("snapkv", [0.0] * 5 + [1.0] * 5), *answers("keydiff", ones))
    after.runs[0]["settings"]["dtype"] = "bfloat16"
    got = report.compare(before, after)
    assert got.settings == (("dtype", "float32", "bfloat16"),)
    assert {c.name.family: c.verdict for c in got.changes} == {"full": "same", "snapkv": "worse", "keydiff": "same"}
    assert got.only_a == (Name("old", 4.0),)
    first = report.comparison_md(got).split("## ")[1]
    assert first.startswith("Settings") and "bfloat16" in first
    lines = list(csv.DictReader(io.StringIO(report.comparison_csv(got))))
    assert [n["difference"] for n in lines if n["family"] == "snapkv"] == ["-0.5"]
    assert json.loads(report.comparison_json(got))["only_a"] == [{"family": "old", "target": 4.0}]
    out = io.StringIO()
    report.print_comparison(got, Console(file=out, width=120))
    assert "worse" in out.getvalue()


def test_other_questions_are_not_paired() -> None:
    before, after = of(*answers("full", [1.0] * 8)), of(*answers("full", [1.0] * 8))
    after.records = [replace(s, answers=("8",)) for s in after.of(Score)]
    assert not report.compare(before, after).changes


def test_more_drift_is_worse() -> None:
    before = of(*(fidelity(number=i) for i in range(8)))
    after = of(*(fidelity(kl=(0.9, 0.5, 0.3, 0.1), number=i) for i in range(8)))
    (kl,) = [c for c in report.compare(before, after).changes if c.measure == "kl_mean"]
    assert kl.verdict == "worse" and kl.b - kl.a == pytest.approx(0.1)
