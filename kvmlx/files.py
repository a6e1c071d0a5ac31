"""The container of cache files: safetensors with a version and a checksum. docs/format.md describes it.

Nothing here knows an array framework: an array is a dtype name, a shape and its bytes. A file is written
beside its target and renamed; its data is read only once the header is found to describe exactly the bytes
that are there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, NoReturn

from kvmlx import __version__
from kvmlx.types import CacheFileError

FORMAT = "kvmlx"
FORMAT_VERSION = 1
"""Counts changes of the container, of the JSON in it and of the planes' bytes together."""
MAX_HEADER_BYTES = 32 << 20
MAX_DIMS = 8
BLOCK_BYTES = 1 << 20
"""Read at a time of data that is only verified."""
SMALL_BYTES = 1 << 16
"""An array of up to so many is kept even then: mlx-lm's files have texts and numbers as arrays."""

_SAFETENSORS = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
}
_DTYPES = {code: name for name, (code, _) in _SAFETENSORS.items()}

_METADATA = "__metadata__"
# The digest is the first field, so that its place is known: 64 hex digits that count as zeros when hashed.
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_DIGEST = slice(len(_BEFORE_DIGEST), len(_BEFORE_DIGEST) + 64)
_RESERVED = ("sha256", "format", "format_version", "kvmlx_version")

_READS = "kvmlx reads what save_prompt_cache wrote, its own or mlx-lm's"

_MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, such as a PyTorch or NumPy file",
    b"\x93NUMPY": "a NumPy file",
    b"\x1f\x8b": "a gzip file",
    b"\x80": "a pickle",
}


class Stored(NamedTuple):
    """One array of a file."""

    dtype: str
    """A NumPy name, or ``bfloat16``."""
    shape: tuple[int, ...]
    data: Any
    """Its bytes in C order, little-endian: any object with a contiguous buffer. None where they were only verified."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SAFETENSORS[self.dtype][1]


class Contents(NamedTuple):
    """What a file holds."""

    header: dict[str, str]
    arrays: dict[str, Stored]

    @property
    def is_kvmlx(self) -> bool:
        """Whether kvmlx wrote the file; else it is one of mlx-lm's own."""
        return self.header.get("format") == FORMAT


class _Entry(NamedTuple):
    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def write(path: str | os.PathLike[str], arrays: Mapping[str, Stored], header: Mapping[str, str]) -> None:
    """Write a file: all of it, or nothing, and then what was there before stays as it was.

    Args:
        path: where to; its folder must exist, a file there is replaced.
        arrays: by name.
        header: text fields, beside those that every file has.

    Raises:
        CacheFileError: it cannot be written; the message says why.
    """
    name = os.fspath(path)
    target = os.path.realpath(name)
    _check_target(name, target)
    head, parts = _compose(name, arrays, header)
    folder, base = os.path.split(target)
    temporary = os.path.join(folder, f".{base[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with _create(temporary) as file:
                for part in (head, *parts):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        needed = len(head) + sum(p.nbytes for p in parts)
        raise CacheFileError(
            f"{name} cannot be written: {error.strerror or error}. It needs {needed} bytes in a folder that "
            "can be written to; nothing was changed"
        ) from error
    _sync_folder(folder)


def read(path: str | os.PathLike[str], *, stock: bool = False, data: bool = True) -> Contents:
    """Read a file and verify all of it.

    Args:
        path: the file.
        stock: also accept a file of mlx-lm's ``save_prompt_cache``, which has no version and no checksum.
        data: whether arrays of more than SMALL_BYTES are kept; else their bytes are verified and let go.

    Raises:
        CacheFileError: it is missing, truncated, damaged, foreign or newer; the message says which.
    """
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            _refuse(name, f"is {_kind(mode)}, not a cache file")
        with open(name, "rb") as file:
            return _read(name, file, stock, data)
    except FileNotFoundError as error:
        raise CacheFileError(f"{name}: there is no such file") from error
    except OSError as error:
        raise CacheFileError(f"{name} cannot be read: {error.strerror or error}") from error


def parse_json(text: str | bytes, what: str) -> Any:
    """Return strict JSON data: no NaN, no key twice, no nesting that would exhaust the stack.

    Raises:
        CacheFileError: it is not that.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            raise ValueError("a key is there twice")
        return out

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"{what} is not valid JSON ({error})") from error


def _refuse(name: str, what: str) -> NoReturn:
    raise CacheFileError(f"{name} {what}")


def _damaged(name: str, what: str) -> NoReturn:
    raise CacheFileError(f"{name} is damaged: {what}. Copy it again, or make the cache again")


def _truncated(name: str, size: int, needed: int, least: str = "") -> NoReturn:
    how_much = f"{size} of {least}{needed} bytes"
    raise CacheFileError(f"{name} is truncated: {how_much}. Copy it again, or make the cache again")


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


# -- writing ------------------------------------------------------------------------------------------------


def _check_target(name: str, target: str) -> None:
    try:
        mode = os.stat(target).st_mode
    except OSError:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise CacheFileError(f"{name} cannot be written: there is no folder {folder}; make it first") from None
        return
    if not stat.S_ISREG(mode):
        raise CacheFileError(f"{name} cannot be written: it is {_kind(mode)}; give the name of a file")


def _create(path: str) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _sync_folder(folder: str) -> None:
    """Make the rename durable where the system can; the file itself is complete either way."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _compose(name: str, arrays: Mapping[str, Stored], header: Mapping[str, str]) -> tuple[bytes, list[memoryview]]:
    """Return the bytes before the data, and the data in order: wide elements first, so each is aligned."""
    if taken := [key for key in _RESERVED if key in header]:
        raise ValueError(f"header fields {taken} are the container's own")
    if _METADATA in arrays:
        raise ValueError(f"no array may be named {_METADATA!r}")
    order = sorted(arrays, key=lambda key: -_SAFETENSORS[arrays[key].dtype][1])
    fields = ("0" * 64, FORMAT, str(FORMAT_VERSION), __version__)
    tree: dict[str, Any] = {_METADATA: dict(zip(_RESERVED, fields, strict=True)) | dict(header)}
    parts, at = [], 0
    for key in order:
        array = arrays[key]
        code, _ = _SAFETENSORS[array.dtype]
        view = memoryview(array.data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if view.nbytes != array.nbytes:
            raise ValueError(f"array {key!r} has {view.nbytes} bytes, its shape {array.shape} says otherwise")
        tree[key] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + view.nbytes]}
        parts.append(view)
        at += view.nbytes
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        _refuse(name, f"cannot be written: its header has {len(text)} bytes, {MAX_HEADER_BYTES} are allowed")
    length = len(text).to_bytes(8, "little")
    hasher = hashlib.sha256(length + text)
    for view in parts:
        hasher.update(view)
    digest = hasher.hexdigest().encode("ascii")
    return length + text[: _DIGEST.start] + digest + text[_DIGEST.stop :], parts


# -- reading ------------------------------------------------------------------------------------------------


def _read(name: str, file: BinaryIO, stock: bool, keep: bool) -> Contents:
    size = os.fstat(file.fileno()).st_size
    raw = _read_header(name, file, size)
    try:
        tree = parse_json(raw, "its header")
    except CacheFileError as error:
        _damaged(name, str(error))
    header = tree.pop(_METADATA, {}) if isinstance(tree, dict) else None
    if not isinstance(header, dict) or not all(isinstance(v, str) for v in header.values()):
        _damaged(name, "its header is not that of a safetensors file")
    checked = _check_format(name, header, stock)
    entries = _entries(name, tree)
    start, end = 8 + len(raw), entries[-1].end if entries else 0
    if start + end > size:
        _truncated(name, size, start + end)
    if start + end < size:
        _damaged(name, f"it has {size - start - end} bytes more than its header says")
    hasher = None
    if checked:
        if raw[: _DIGEST.start] != _BEFORE_DIGEST:
            _damaged(name, "its checksum is not where it belongs")
        hasher = hashlib.sha256(len(raw).to_bytes(8, "little") + raw[: _DIGEST.start] + b"0" * 64)
        hasher.update(raw[_DIGEST.stop :])
    arrays = {}
    for entry in entries:
        nbytes = entry.end - entry.begin
        kept = keep or nbytes <= SMALL_BYTES
        data, got = _take(file, nbytes, nbytes if kept else BLOCK_BYTES, hasher)
        if got < nbytes:
            _truncated(name, start + entry.begin + got, start + end)
        arrays[entry.name] = Stored(entry.dtype, entry.shape, data if kept else None)
    if hasher is not None and hasher.hexdigest() != header["sha256"]:
        _damaged(name, "its bytes do not match its checksum")
    return Contents(header, arrays)


def _take(file: BinaryIO, nbytes: int, block: int, hasher: Any) -> tuple[bytes, int]:
    """Read on, ``block`` bytes at a time, and hash them; return the last block, and how many bytes were there."""
    data, got = b"", 0
    while got < nbytes and (data := file.read(min(block, nbytes - got))):
        got += len(data)
        if hasher is not None:
            hasher.update(data)
    return data, got


def _read_header(name: str, file: BinaryIO, size: int) -> bytes:
    """Return the JSON bytes, after making sure that the file can hold as many."""
    if size == 0:
        _refuse(name, "is empty: nothing was ever written to it")
    start = file.read(16)
    length = int.from_bytes(start[:8], "little")
    like = next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)
    plausible = 2 <= length <= MAX_HEADER_BYTES and start[8:9] in (b"{", b"")
    if not plausible or (like is not None and 8 + length > size):
        if size < 8 and like is None:
            _truncated(name, size, 8, "at least ")
        _refuse(name, f"is not a cache file{f' but {like}' if like else ''}: {_READS}")
    if 8 + length > size:
        _truncated(name, size, 8 + length, "at least ")
    file.seek(8)
    return file.read(length)


def _check_format(name: str, header: dict[str, str], stock: bool) -> bool:
    """Return whether the file is kvmlx's own; raise unless this version can read it."""
    if header.get("format") != FORMAT:
        if "1.0" not in header or "2.0" not in header:
            _refuse(name, f"is a safetensors file, but not a cache: {_READS}")
        if not stock:
            _refuse(name, "was made by mlx-lm itself: load it with mlx_lm.models.cache.load_prompt_cache")
        return False
    text = header.get("format_version", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= 1):
        _damaged(name, f"its format version is {text[:20]!r}")
    if int(text) > FORMAT_VERSION:
        made_by = header.get("kvmlx_version", "?")
        _refuse(
            name,
            f"was made by a newer kvmlx ({made_by[:20]}, format {text}); this is kvmlx {__version__}, which "
            f"reads format {FORMAT_VERSION}: update kvmlx, or make the cache again",
        )
    return True


def _entries(name: str, tree: dict[str, Any]) -> list[_Entry]:
    """Return the arrays in the order of their bytes; raise unless they follow each other without gap."""
    entries = sorted(_entry(name, key, value) for key, value in tree.items())
    at = 0
    for entry in entries:
        if entry.begin != at:
            _damaged(name, f"array {entry.name[:80]!r} starts at byte {entry.begin} of the data, not at {at}")
        at = entry.end
    return entries


def _entry(name: str, key: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _damaged(name, f"array {key[:80]!r} is not described by dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _damaged(name, f"array {key[:80]!r} has an unknown dtype")
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMS):
        _damaged(name, f"array {key[:80]!r} has an impossible shape or place")
    begin, end = offsets
    if end - begin != math.prod(shape) * _SAFETENSORS[dtype][1]:
        _damaged(name, f"array {key[:80]!r} has {end - begin} bytes, its shape says otherwise")
    return _Entry(begin, end, key, dtype, tuple(shape))


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
