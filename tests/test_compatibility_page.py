"""docs/compatibility.md says what the last runs of scripts/compatibility.py found, on both sides."""

from __future__ import annotations

import pytest

from scripts import compatibility as script


def test_page_is_that_of_the_results() -> None:
    known = {side: script.read(side) for side in script.SIDES}
    assert script.PAGE.read_text(encoding="utf-8") == script.page(known), "run python -m scripts.compatibility --render"


@pytest.mark.parametrize("side", script.SIDES)
def test_page_tells_why_a_model_is_refused(side: str) -> None:
    known = script.read(side)
    refused = [r for r in known["results"] if r.verdict == "refused"]
    assert refused and all(r.reason for r in refused)
