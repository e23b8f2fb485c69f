"""A report, parsed as XML: its elements and its tables."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from experiments.report.page import write_report

WriteRun = Callable[..., Path]
WITHOUT_CURVES: dict[str, Any] = {
    "merges": [],
    "interpolation": None,
    "labels": {},
}  # draws less, where pictures do not matter
XHTML = "{http://www.w3.org/1999/xhtml}"


def page_of(path: Path) -> Element:
    return ElementTree.parse(write_report(path)).getroot()


def every(root: Element, tag: str, **attributes: str) -> list[Element]:
    return [e for e in root.iter(XHTML + tag) if all(e.get(k) == v for k, v in attributes.items())]


def text_of(element: Element) -> str:
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def shades_of(root: Element, title: str) -> list[list[str]]:
    """The cells of a table that is shaded, by a word of its caption."""
    (table,) = [t for t in every(root, "table", **{"class": "heat"}) if title in text_of(every(t, "caption")[0])]
    return [[cell.get("data-text") or text_of(cell) for cell in row] for row in every(table, "tr")]


def rows_of(root: Element, name: str) -> list[dict[str, str]]:
    """Rows of a table that can be sorted, by the names of its columns."""
    (table,) = every(root, "table", id=f"{name}-table")
    head, *rows = [[text_of(cell) for cell in row] for row in every(table, "tr")]
    return [dict(zip(head, row, strict=True)) for row in rows]
