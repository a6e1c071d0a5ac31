"""The results file and the config of `kvmlx bench`: nothing is lost, nothing is run twice, wrong input is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvmlx.bench.config import QUICK, Config, read_config
from kvmlx.bench.records import Costs, Fidelity, Record, ResultsFile, Score, Skip, Subject, key_of, read
from kvmlx.types import KVMLXError

RUN = {"settings": {"model": "demo", "seed": 0}, "machine": {}, "started": "2026-01-01", "command": "kvmlx bench"}
SUBJECT = Subject("snapkv(budget=256) | small", "snapkv | small", 4.0, 0.2481)
RECORDS: list[Record] = [
    Score(SUBJECT, "agnostic", "vt", 1024, 3, 1, None, 0.5, 'said "A", ü\n', ("A", "B")),
    Fidelity(SUBJECT, 1024, 0, (0.0, 0.25), (False, True), (1.5, 2.5), (1.0, 2.0)),
    Costs(100, None, 400, None, (0.5,), (0.1, 0.2), SUBJECT, 1024, 2),
    Skip(SUBJECT, "all", None, "needs more bytes"),
]


def written(path: Path, records: list[Record]) -> Path:
    file = ResultsFile(path, RUN)
    for record in records:
        file.add(record)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results = read(written(tmp_path / "r.jsonl", RECORDS))
    assert results.records == RECORDS and len(results.runs) == 1
    assert results.of(Score) == RECORDS[:1]


def test_a_second_run_appends_and_knows_what_is_there(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", RECORDS[:2])
    again = ResultsFile(path, RUN)
    assert again.done == {key_of(r) for r in RECORDS[:2]} and again.records == RECORDS[:2]
    again.add(RECORDS[2])
    results = read(path)
    assert results.records == RECORDS[:3] and len(results.runs) == 2


def test_keys_tell_every_place_apart_and_no_value() -> None:
    assert len({key_of(r) for r in RECORDS}) == len(RECORDS)
    score = RECORDS[0]
    assert isinstance(score, Score)
    other = Score(SUBJECT, "agnostic", "vt", 1024, 3, 1, 0.2, 1.0, "x", ("A",))
    assert key_of(score) == key_of(other)
    for changed in ({"mode": "aware"}, {"length": 4096}, {"question": 2}, {"subject": replace(SUBJECT, target=8.0)}):
        assert key_of(replace(score, **changed)) != key_of(score)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_off_by_a_crash_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "r.jsonl", RECORDS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path).records == RECORDS[:-1]
    written(path, RECORDS[-1:])
    assert read(path).records == RECORDS


def test_other_settings_are_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", RECORDS)
    before = path.read_bytes()
    with pytest.raises(KVMLXError, match=r"seed: 0 there, 1 now.*--out"):
        ResultsFile(path, RUN | {"settings": {"model": "demo", "seed": 1}})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "does not begin with a run"),
        ("hello\n", "line 1: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"kind": "run", "format": 99}\n', "has format 99"),
        ('{"kind": "run", "format": 1}\n{"kind": "cake"}\n', "line 2: a 'cake' is no result"),
        ('{"kind": "run", "format": 1}\n{"kind": "skip", "subject": {"method": 1}}\n', "line 2: not a skip"),
        ('{"kind": "run", "format": 1}\n{"kind": "skip"}\n', "line 2: not a skip"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(KVMLXError, match=message):
        read(path)


def test_a_missing_results_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match="no such file"):
        read(tmp_path / "none.jsonl")


# Config


def test_a_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'model = "m"\nstrategies = ["snapkv | int4"]\nmatch_bytes = [2, 4]\nlengths = 2048\nbudgets = [0.5, 64]\n'
    )
    config = read_config(path, Config())
    assert config.strategies == ("snapkv | int4",) and config.match_bytes == (2.0, 4.0) and config.lengths == (2048,)
    assert config.budgets == (0.5, 64) and config.samples == Config().samples


@pytest.mark.parametrize(
    "text, message",
    [
        ("modell = 'x'", "c.toml: unknown key 'modell'; Did you mean 'model'"),
        ("samples = 'many'", "samples must be an int, got 'many'"),
        ("samples = true", "samples must be an int, got True"),
        ("samples = 0", "samples must be at least 1, got 0"),
        ("max_tokens = 0", "max_tokens must be at least 1, got 0"),
        ("everything = 1", "everything must be a bool, got 1"),
        ("match_bytes = [0.5]", "compressions above 1"),
        ("modes = ['blind']", "modes must be of agnostic, aware, got 'blind'"),
        ("tasks = ['vt', 'vt']", "tasks has 'vt' twice"),
        ("lengths = [10]", "lengths must be at least 128"),
        ("text = 'a.txt'", "needs questions"),
        ("presses = ['kvpress: snapkv']", "presses need kvpress"),
        ("model =", "is no TOML file"),
    ],
)
def test_wrong_configs_name_the_value_and_what_works(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(KVMLXError, match=message):
        read_config(path, Config())


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match="cannot be read"):
        read_config(tmp_path / "none.toml", Config())


def test_what_may_grow_is_no_setting() -> None:
    config = Config()
    more = config.but({"strategies": ["knorm"], "lengths": [2048], "samples": 9, "match_bytes": [8]})
    assert more.settings == config.settings
    assert config.but({"seed": 1}).settings != config.settings
    assert json.loads(json.dumps(config.settings)) == config.settings


def test_quick_is_a_config() -> None:
    assert Config().but(QUICK).lengths == (512,)
