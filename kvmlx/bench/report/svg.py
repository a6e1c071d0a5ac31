"""matplotlib's SVG made part of a page: its colours follow the page, ids are unique, points carry their words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from kvmlx.bench.report.plots import COLOURS, FAINT, INK

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
DEFINED = (f"{{{SVG}}}path", f"{{{SVG}}}clipPath")
VARIABLES = {INK: "var(--ink)", FAINT: "var(--grid)"} | {c: f"var(--c{i})" for i, c in enumerate(COLOURS)}
"""Names in page.css of the colours that plots are drawn in."""


def inline(text: str, prefix: str, label: str, marks: Mapping[str, Mapping[str, str]]) -> str:
    """Return an SVG document as an element of a page.

    Args:
        prefix: put before every id, unique in the page.
        label: what a screen reader says of it; empty for one that says nothing.
        marks: attributes for the elements of these ids.
    """
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", text))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "group", "aria-label": label} if label else {"aria-hidden": "true"}
    for parent, child in _pairs(root):
        if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
            parent.remove(child)
    _define_once(root)
    _mark(root, marks)
    for element in root.iter():
        _adapt(element, prefix)
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _pairs(root: ET.Element) -> list[tuple[ET.Element, ET.Element]]:
    return [(parent, child) for parent in root.iter() for child in parent]


def _define_once(root: ET.Element) -> None:
    """Gather definitions at the beginning: matplotlib defines a marker again for each point."""
    defined: dict[str, ET.Element] = {}
    for parent, child in _pairs(root):
        if child.tag == f"{{{SVG}}}defs":
            defined |= {element.get("id", ""): element for element in child}
            parent.remove(child)
    definitions = ET.Element(f"{{{SVG}}}defs")
    definitions.extend(defined.values())
    root.insert(0, definitions)


def _mark(root: ET.Element, marks: Mapping[str, Mapping[str, str]]) -> None:
    """Put attributes on the shapes of marked groups, which take the place of their groups."""
    for parent, child in _pairs(root):
        if child.get("id") in marks:
            (shape,) = [e for e in child.iter() if e.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path")]
            shape.attrib |= marks[str(child.get("id"))]
            parent[list(parent).index(child)] = shape


def _adapt(element: ET.Element, prefix: str) -> None:
    for name, value in list(element.attrib.items()):
        if name == "id":
            # Only what is defined is referred to.
            element.attrib.pop(name)
            if element.tag in DEFINED:
                element.set(name, prefix + value)
        elif name == f"{{{XLINK}}}href":
            element.attrib.pop(name)
            element.set("href", value.replace("#", f"#{prefix}", 1))
        elif name == "clip-path":
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
        elif name == "style":
            element.set(name, _style(value))
        elif name == "transform" and value.startswith("rotate(-0 "):
            element.attrib.pop(name)
        elif name in ("d", "x", "y", "transform", "points"):
            element.set(name, " ".join(re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value).split()))
    # White space of matplotlib's layout.
    if element.text is not None and not element.text.strip():
        element.text = None
    element.tail = None


def _style(value: str) -> str:
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, variable)
    # Sans-serif of the page instead of matplotlib's list.
    return re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)
