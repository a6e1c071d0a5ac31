"""A tokenizer that needs no files."""

from __future__ import annotations

import re
from typing import Any

BOS = 0


class Pieces:
    """A tokenizer of words, signs and line breaks; decoding gives the text back. It writes BOS before a text."""

    def __init__(self, *, chat: bool = True, strips: bool = False) -> None:
        self.chat_template = "theirs" if chat else None
        self.strips = strips
        self._ids: dict[str, int] = {"<bos>": BOS}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall(r"<\w+>| ?\w+| ?[^\w\s]|\s", text)
        ids = [self._ids.setdefault(piece, len(self._ids)) for piece in pieces]
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids: Any) -> str:
        pieces = list(self._ids)
        return "".join(pieces[i] for i in ids)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, **_: Any) -> str:
        assert not tokenize and add_generation_prompt
        said = [m["content"].strip() if self.strips else m["content"] for m in messages]
        roles = [m["role"] for m in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        return "<bos>" + "".join(f"<{r}>{s}<end>\n" for r, s in zip(roles, said, strict=True)) + "<assistant>"
