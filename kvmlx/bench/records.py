"""The results file: one JSON document a line, appended as soon as it is known, so that an interrupted run goes on.

The first line of each session is a ``run`` (config, model, machine); all others are of the kinds below, each with a
key that says what was measured. A line that was cut off by a crash is dropped on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvmlx.bench.types import Cost
from kvmlx.types import KVMLXError, suggest

FORMAT_VERSION = 1
FULL = "full"
"""The method that every other one is paired with."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Which method was measured."""

    method: str
    """As it ran: a strategy, or a baseline such as ``mlx-lm: affine(bits=4)`` or ``kvpress: snapkv(ratio=0.75)``."""
    family: str
    """The same with its budget left open: what the user listed."""
    target: float | None
    """The compression that its budget was tuned to, e.g. 4.0; None: it ran as it was written."""
    ratio: float
    """Bytes that it keeps of this context / bytes of the full 16-bit cache, exact rows counted in 16 bits."""


@dataclass(frozen=True, slots=True)
class Score:
    """One answer."""

    kind: ClassVar[str] = "score"
    subject: Subject
    mode: str
    task: str
    length: int
    sample: int
    question: int
    depth: float | None
    score: float
    response: str
    answers: tuple[str, ...]

    @property
    def place(self) -> tuple[Any, ...]:
        """What was asked: equal for the same question under different methods."""
        return (self.mode, self.task, self.length, self.sample, self.question)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One text, teacher-forced through the cache; a number for each scored token, in order."""

    kind: ClassVar[str] = "fidelity"
    subject: Subject
    length: int
    """Tokens of the compressed prefix."""
    text: int
    kl: tuple[float, ...]
    """KL(full || compressed) of the next token's distribution, nats."""
    flips: tuple[bool, ...]
    """Whether the likeliest next token is another one."""
    nll: tuple[float, ...]
    """Negative log-likelihood of the text's next token under the compressed cache, nats."""
    full_nll: tuple[float, ...]

    @property
    def place(self) -> tuple[Any, ...]:
        return (self.length, self.text)


@dataclass(frozen=True, slots=True)
class Costs(Cost):
    """Bytes and times of one method at one length and batch size."""

    kind: ClassVar[str] = "cost"
    subject: Subject
    length: int
    batch: int

    @property
    def place(self) -> tuple[Any, ...]:
        return (self.length, self.batch)


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that could not be run, and why."""

    kind: ClassVar[str] = "skip"
    subject: Subject
    what: str
    """``score``, ``fidelity``, ``cost`` or ``all``; ``score agnostic vt`` where one task of a mode was left out."""
    length: int | None
    reason: str

    @property
    def place(self) -> tuple[Any, ...]:
        return (self.what, self.length)


Record = Score | Fidelity | Costs | Skip
KINDS: dict[str, type[Any]] = {cls.kind: cls for cls in (Score, Fidelity, Costs, Skip)}


def key(kind: type[Any], subject: Subject, *place: Any) -> str:
    """Return what a record of this kind is of: the same in every run with the same settings."""
    text = json.dumps([kind.kind, subject.family, subject.target, subject.method, *place])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_of(record: Record) -> str:
    """Return the key of a record."""
    return key(type(record), record.subject, *record.place)


@dataclass(slots=True)
class Results:
    """Everything in a results file."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    """The sessions that wrote it, first to last: ``config``, ``model``, ``machine``, ``started``, ``command``."""
    records: list[Record] = field(default_factory=list)

    def of(self, kind: type[Any]) -> list[Any]:
        return [r for r in self.records if type(r) is kind]

    def only(self, families: Collection[str]) -> Results:
        """Return the results of these families and of the full cache; of all where none is named.

        Raises:
            KVMLXError: there is nothing of one of them.
        """
        known = {r.subject.family for r in self.records}
        for family in families:
            if family not in known:
                raise KVMLXError(
                    f"no results of {family!r}.{suggest(family, known)} There are: {', '.join(sorted(known))}"
                )
        if not families:
            return self
        return Results(self.runs, [r for r in self.records if r.subject.family in {FULL, *families}])


class ResultsFile:
    """A results file that is being written."""

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self.records: list[Record] = []
        earlier = read(self.path) if self.path.exists() else None
        if earlier is not None and earlier.runs:
            theirs, ours = earlier.runs[0]["settings"], run["settings"]
            differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
            if differing:
                name = differing[0]
                raise KVMLXError(
                    f"{self.path} holds results with other settings ({name}: {theirs.get(name)!r} there, "
                    f"{ours.get(name)!r} now): give another file with --out, or the settings that it has"
                )
            self.records = earlier.records
            self.done = {key_of(r) for r in earlier.records}
        _mend(self.path)
        self._append({"kind": "run", "format": FORMAT_VERSION, **run})

    def add(self, record: Record) -> None:
        """Append a record; it is on the disk when this returns."""
        self.done.add(key_of(record))
        self.records.append(record)
        self._append({"kind": record.kind, **asdict(record)})

    def _append(self, document: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(document, ensure_ascii=False, default=list) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left without its end."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def read(path: str | os.PathLike[str]) -> Results:
    """Read a results file.

    Raises:
        KVMLXError: it is not one, or a newer one; the message says which line.
    """
    out = Results()
    for number, document in _documents(Path(path)):
        kind = document.pop("kind", None)
        if kind == "run":
            if document.get("format") != FORMAT_VERSION:
                raise KVMLXError(
                    f"{path} has format {document.get('format')!r}, this version reads {FORMAT_VERSION}: "
                    "use the version of kvmlx that wrote it"
                )
            out.runs.append(document)
        elif kind in KINDS:
            try:
                out.records.append(_record(KINDS[kind], document))
            except (KeyError, TypeError) as error:
                raise KVMLXError(f"{path}, line {number}: not a {kind}: {error}") from error
        else:
            raise KVMLXError(f"{path}, line {number}: a {kind!r} is no result of kvmlx bench")
    if not out.runs:
        raise KVMLXError(f"{path} is no results file of kvmlx bench: it does not begin with a run")
    return out


def _documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise KVMLXError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise KVMLXError(f"{path} cannot be read as a results file: {error}") from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            document = json.loads(line)
        except ValueError as error:
            raise KVMLXError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise KVMLXError(f"{path}, line {number}: not a JSON object")
        yield number, document


def _record(cls: type[Any], document: dict[str, Any]) -> Any:
    subject = Subject(**document.pop("subject"))
    return cls(subject=subject, **{k: tuple(v) if isinstance(v, list) else v for k, v in document.items()})
