"""The Metal kernels: `.metal` sources and what puts their includes together. Imported as `kvmlx.metal_kernels`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r'^#include "([a-z_]+\.metal)"\n', re.MULTILINE)


@cache
def source(name: str) -> str:
    """Return the text of ``name.metal`` with its includes put in, each once: Metal resolves none at run time."""
    seen: set[str] = set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (files("kvmlx.metal_kernels") / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: expand(match[1]), text)

    return expand(f"{name}.metal")
