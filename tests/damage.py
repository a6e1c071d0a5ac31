"""Cache files whose checksum is right and whose contents are not: what a loader must refuse, or survive."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvmlx import files

VALUES = (-1, 0, 1, 7, 2**31, 2**62, 2**70, 1.5, 1e300, "x", None, [], {}, [1], [[0, 0]], [[5000, 5000]])

NAMES: list[dict[str, str]] = [
    {"strategy": "__import__('os').system('x')"},
    {"strategy": "newmethod(budget=0.1)"},
    {"strategy": "int2"},
    {"strategy": "int4(group_size=24)"},
    {"caches": "[" * 100_000},
    {"caches": '[{"class":"os","state":[]}]'},
    {"caches": '[{"class":"_BaseCache","state":[]}]'},
    {"caches": '[{"class":"save_prompt_cache","state":[]}]'},
    {"caches": '[{"class":["KVCache"],"state":[]}]'},
    {"caches": '[{"class":"CacheList","caches":[{"class":"mx","state":[]}]}]'},
    {"caches": '[{"class":"KVCache","state":[{"array":"../x"},null,0]}]'},
    {"caches": '[{"class":"DynamicLayer","state":[{"array":"../x"},null]}]'},
    {"caches": "[]"},
    {"caches": "{}"},
    {"model": "{}"},
]
"""Header fields for a file of strategy int4: every loader must refuse each of them."""

Change = Callable[[files.Stored], files.Stored]
SHAPES: dict[str, Change] = {
    "shorter": lambda a: files.Stored(a.dtype, (0, *a.shape[1:]), b""),
    "flat": lambda a: a._replace(shape=(int(np.prod(a.shape)),)),
    "turned": lambda a: a._replace(shape=a.shape[::-1]),
    "bytes": lambda a: files.Stored(
        "uint8", (*a.shape[:-1], len(a.data) // max(1, int(np.prod(a.shape[:-1])))), a.data
    ),
}


def header_of(contents: files.Contents) -> dict[str, str]:
    """Return the fields of a header that are not the container's own."""
    own = ("sha256", "format", "format_version", "kvmlx_version")
    return {key: value for key, value in contents.header.items() if key not in own}


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of a JSON tree, of its lists the first two parts."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def replaced(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    """Return the tree with another value at a path."""
    if not at:
        return value
    tree = copy.deepcopy(tree)
    part = tree
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    return tree


def numbers(contents: files.Contents, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield headers that say something else in one place; a loader must refuse most of them."""
    rng = np.random.default_rng(seed)
    for field in ("caches", "model"):
        tree = json.loads(contents.header[field])
        for at in places(tree):
            for value in rng.choice(np.array(VALUES, object), 4, replace=False):
                yield header_of(contents) | {field: json.dumps(replaced(tree, at, value))}


def arrays(contents: files.Contents) -> Iterator[tuple[str, dict[str, files.Stored]]]:
    """Yield arrays of which one has another shape, is missing, is there twice or stands for another.

    A loader must refuse all of them. The first part says what was done.
    """
    for key, array in contents.arrays.items():
        for what, change in SHAPES.items():
            new = change(array)
            if new[:2] != array[:2]:
                yield f"{key} {what}", contents.arrays | {key: new}
        yield f"no {key}", {k: v for k, v in contents.arrays.items() if k != key}
        yield f"{key} twice", contents.arrays | {key + "x": array}
        yield f"{key} for none", contents.arrays | {"9.tail.keys": array}
        for other in contents.arrays:
            if contents.arrays[other][:2] != array[:2]:
                yield f"{key} for {other}", contents.arrays | {key: contents.arrays[other], other: array}
