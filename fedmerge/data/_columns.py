"""From tables, as pandas and ``datasets`` write them, to images and labels."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmerge.data._cache import Decoded, Part
from fedmerge.data._pixels import Cell, decode_images
from fedmerge.errors import DataError
from fedmerge.progress import steps

IMAGE_COLUMNS = ("img", "image", "images", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target", "targets", "class", "cls")
_MOST_CLASSES = 1_000_000


def decode_tables(parts: Mapping[str, Iterable[tuple[str, Any]]], where: str) -> Decoded:
    """The images and labels of ``pyarrow`` tables, by part; each table comes with its name for messages.

    Images are encoded bytes, structs with ``bytes`` as the hub stores them, or nested lists of pixels. Labels are
    whole numbers of any type, named by the ``ClassLabel`` feature in a table's metadata where it is there, or text,
    numbered in sorted order (that of numbers where all are numbers). Tables may differ in their types.

    Raises:
        DataError: Names the table, the row and what was expected.
    """
    images = {}
    labels: dict[str, list[Any]] = {}  # whole numbers, truth values or text
    names: dict[str, tuple[str, ...]] = {}
    rows: dict[str, list[str]] = {}
    for part, tables in parts.items():
        cells: list[Cell] = []
        labels[part], rows[part] = [], []
        for name, table in tables:
            image, label = columns(table.column_names, name)
            here = [f"row {row} of {name}" for row in range(len(table))]
            values = zip(steps(f"reading {name}", _values(table, image), len(here)), here, strict=True)
            cells += [_cell(value, image, row) for value, row in values]
            labels[part] += [_label(value, label, row) for value, row in zip(_values(table, label), here, strict=True)]
            rows[part] += here
            if (given := _class_names(table, label)) is not None:
                names[f"{part} in {name}"] = given
        images[part] = decode_images(cells, f"{where} ({part})", rows[part].__getitem__)
    kinds = {type(label): row for part in rows for label, row in zip(labels[part], rows[part], strict=True)}
    if str in kinds and len(kinds) > 1:
        said = " and ".join(f"that of {row} is {kind.__name__}" for kind, row in kinds.items())
        raise DataError(f"{where}: labels are of two kinds, {said}; give numbers everywhere, or text everywhere")
    if str in kinds:
        words = sorted(set(labels["train"]), key=_order)
    else:
        most = max(max(given) for given in labels.values())
        words = list(_one_naming(names, where)) or _numbered(most, bool in kinds and len(kinds) == 1, where)
    numbers = {word: number for number, word in enumerate(words)}
    return Decoded(
        {
            part: Part(images[part], _numbers(labels[part], rows[part], numbers if str in kinds else None, len(words)))
            for part in rows
        },
        tuple(words),
    )


def columns(found: Sequence[str], where: str) -> tuple[str, str]:
    """The names of the columns with the images and with the labels."""
    chosen = []
    for known in (IMAGE_COLUMNS, LABEL_COLUMNS):
        matches = [name for word in known for name in found if name == word]
        matches = matches or [name for word in known for name in found if name.lower() == word]
        if not matches:
            raise DataError(
                f"{where} has columns {', '.join(found)}; expected {' or '.join(IMAGE_COLUMNS)} "
                f"and {' or '.join(LABEL_COLUMNS)}"
            )
        if found.count(matches[0]) > 1:
            raise DataError(f"{where} has {found.count(matches[0])} columns {matches[0]}; remove all but one")
        chosen.append(matches[0])
    return chosen[0], chosen[1]


def _values(table: Any, column: str) -> Iterable[Any]:
    """The cells of a column as Python objects, one at a time: lists of pixels are large."""
    for chunk in table.column(column).chunks:
        yield from (value.as_py() for value in getattr(chunk, "storage", chunk))


def _cell(value: Any, column: str, row: str) -> Cell:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):  # not opened: the cache would not notice when that file changes
        raise DataError(
            f"{row}: column {column} holds {value[:80]!r} in place of an image; store the image's bytes "
            "(to_parquet and push_to_hub of `datasets` do), or give a folder of images by class"
        )
    if isinstance(value, list | np.ndarray):
        try:
            array = np.array(value)
            return (
                array.astype(np.uint8) if array.dtype.kind in "iu" and 0 <= array.min() <= array.max() < 256 else array
            )
        except ValueError as error:
            raise DataError(f"{row}: column {column} holds lists of different lengths; expected pixels") from error
    raise DataError(
        f"{row}: column {column} holds {'nothing' if value is None else repr(value)[:80]}; expected an image: encoded "
        "bytes, a struct with 'bytes', or nested lists of pixels"
    )


def _label(value: Any, column: str, row: str) -> int | bool | str:
    if value is None or value == "" or value != value:  # NaN, which pandas writes for none
        raise DataError(f"{row}: column {column} has no label; give it one, or leave the row out")
    if isinstance(value, bool | str):
        return value
    try:
        if value == (whole := int(value)):
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"{row}: column {column} holds {str(value)[:80]}; expected a whole number or text")


def _class_names(table: Any, column: str) -> tuple[str, ...] | None:
    """The names of the ``ClassLabel`` feature in the table's metadata; None where it says nothing."""
    try:
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about.get("info", {}).get("features", {}).get(column, {}).get("names")
        if isinstance(names, Mapping):  # as a card's YAML has them: {"0": "cat", ...}
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, names)) if names else None
    except (ValueError, AttributeError, TypeError):
        return None


def _one_naming(names: Mapping[str, tuple[str, ...]], where: str) -> tuple[str, ...]:
    """The class names that all tables share; some may stop early."""
    longest = max(names.values(), key=len, default=())
    for table, given in names.items():
        if given != longest[: len(given)]:
            raise DataError(f"{where}: {table} names its classes {given}; another part names them {longest}")
    return longest


def _numbered(most: int, truths: bool, where: str) -> list[str]:
    if most >= _MOST_CLASSES:
        raise DataError(f"{where}: labels run to {most}, which would be {most + 1} classes; number them from 0 upwards")
    return ["False", "True"] if truths else [str(number) for number in range(most + 1)]


def _order(word: str) -> tuple[int, int, str]:
    """Numbers by their value before other words."""
    return (0, int(word), word) if word.isdecimal() and len(word) < 19 else (1, 0, word)


def _numbers(
    labels: Sequence[int | str], rows: Sequence[str], words: Mapping[Any, int] | None, classes: int
) -> npt.NDArray[np.int64]:
    """Labels as int64, each below ``classes``; text by ``words``."""
    for label, row in zip(labels, rows, strict=True):
        if words is not None and label not in words:
            raise DataError(f"the label of {row} is {label!r}, which the train part does not have")
        if words is None and not 0 <= int(label) < classes:
            raise DataError(f"the label of {row} is {label}; expected 0 to {classes - 1}")
    return np.array([label if words is None else words[label] for label in labels], np.int64)
