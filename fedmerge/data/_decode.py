"""From files to arrays: parquet in the hub's layout, folders of images by class, encoded bytes."""

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from fedmerge.data._cache import Decoded, Part, Source
from fedmerge.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEST_FOLDERS = ("test", "val", "valid", "validation")


def parquet_source(folder: Path) -> Source | None:
    """The parquet files ``train*`` and ``test*`` of ``folder`` or ``folder/data``; None where there are none.

    Where no file is called ``train*``, all that is not called ``test*`` or ``val*`` is the training part.
    """
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet"))
        test = [file for file in files if file.name.startswith("test")]
        train = [file for file in files if file.name.startswith("train")]
        train = train or [file for file in files if not file.name.startswith(("test", "val"))]
        if train:
            named = {"train": train, "test": test} if test else {"train": train}
            return Source(folder, [*train, *test], partial(_read_parquet, named))
    return None


def folder_source(folder: Path) -> Source | None:
    """Torchvision's ImageFolder layout, ``CLASS/any.png``; None where ``folder`` holds no such images.

    With a folder ``train`` inside, that is the training part, and ``test`` (or ``val``, ``valid``,
    ``validation``) beside it the test part.
    """
    roots = {"train": folder}
    if (folder / "train").is_dir():
        roots = {"train": folder / "train"}
        if tests := [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]:
            roots["test"] = tests[0]
    found = {part: _images_by_class(root) for part, root in roots.items()}
    if not any(found["train"].values()):
        return None
    files = [file for classes in found.values() for names in classes.values() for file in names]
    return Source(folder, files, partial(_read_folder, found))


def decode_table(table: Any, where: str) -> tuple[Part, tuple[str, ...]]:
    """Images and labels of a ``pyarrow.Table`` with a column ``img`` or ``image``, and ``label``.

    Images are structs with encoded ``bytes``, as the hub stores them. Labels are integers, named by the
    ``ClassLabel`` feature in the table's metadata where it is there, or strings, numbered in sorted order.
    """
    columns = table.column_names
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise DataError(
            f"{where} has columns {', '.join(columns)}; expected {' or '.join(IMAGE_COLUMNS)} "
            f"and {' or '.join(LABEL_COLUMNS)}"
        )
    if not len(table):
        raise DataError(f"{where} holds no images")
    labels, classes = _labels(table, label, where)
    encoded = table.column(image).to_pylist()
    if any(not isinstance(cell, dict) or not cell.get("bytes") for cell in encoded):
        raise DataError(f"{where}: column {image} must hold encoded images (a struct with 'bytes') in every row")
    return Part(decode_images([cell["bytes"] for cell in encoded], where), labels), classes


def decode_images(encoded: Sequence[bytes | Path], where: str) -> npt.NDArray[np.uint8]:
    """Image files, or their bytes, to uint8 ``(N, C, H, W)``: one channel where every image is grey, else three.

    Raises:
        DataError: An image that cannot be read, differs in size, or has more than 8 bits a channel.
    """
    if not encoded:
        raise DataError(f"{where} holds no images")
    sizes, modes = [], set()
    try:
        for given in encoded:
            with _open(given) as image:  # reads the header only
                sizes.append(image.size)
                modes.add(image.mode)
        if len(set(sizes)) > 1:
            first, odd = sizes[0], next(i for i, size in enumerate(sizes) if size != sizes[0])
            raise DataError(
                f"{where}: image {odd} is {sizes[odd][0]}x{sizes[odd][1]} pixels, image 0 is "
                f"{first[0]}x{first[1]}; resize all images to one size"
            )
        if deep := [mode for mode in modes if mode[0] in "IF"]:
            raise DataError(f"{where} holds images of mode {deep[0]}; expected 8 bits a channel")
        grey = modes <= {"1", "L"}
        width, height = sizes[0]
        pixels = np.empty((len(encoded), 1 if grey else 3, height, width), np.uint8)
        for row, given in zip(pixels, encoded, strict=True):
            with _open(given) as image:
                if grey:
                    row[0] = np.asarray(image.convert("L"))
                else:
                    row[:] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot decode an image: {error}") from error
    return pixels


def _read_parquet(files: Mapping[str, Sequence[Path]]) -> Decoded:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    parts, names = {}, {}
    for part, paths in files.items():
        where = f"{paths[0].parent} ({part})"
        try:
            table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in paths])
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{where}: cannot read parquet: {error}") from error
        parts[part], names[part] = decode_table(table, where)
    return Decoded(parts, _one_naming(names, str(files["train"][0].parent)))


def _read_folder(found: Mapping[str, Mapping[str, Sequence[Path]]]) -> Decoded:
    classes = tuple(found["train"])
    parts = {}
    for part, by_class in found.items():
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise DataError(f"class folder {unknown[0]} is in the {part} part only; train has {', '.join(classes)}")
        files = [file for names in by_class.values() for file in names]
        labels = [classes.index(name) for name, names in by_class.items() for _ in names]
        where = f"{files[0].parent.parent} ({part})" if files else part
        parts[part] = Part(decode_images(files, where), np.array(labels, np.int64))
    return Decoded(parts, classes)


def _images_by_class(root: Path) -> dict[str, list[Path]]:
    """Class folder name -> its image files at any depth, both sorted; classes without images are left out."""
    found = {
        folder.name: sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    return {name: files for name, files in found.items() if files}


def _open(given: bytes | Path) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(given) if isinstance(given, bytes) else given)


def _labels(table: Any, column: str, where: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    values = table.column(column)
    if values.null_count:
        raise DataError(f"{where}: column {column} lacks a value in {values.null_count} rows")
    labels = np.asarray(values.to_pylist())
    if labels.dtype.kind == "U":
        words, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), tuple(map(str, words))
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: column {column} holds {values.type}; expected integers or strings")
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(column, {}).get("names")
    classes = tuple(map(str, names or range(int(labels.max()) + 1)))
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(f"{where}: labels run from {labels.min()} to {labels.max()}; expected 0 to {len(classes) - 1}")
    return labels.astype(np.int64), classes


def _one_naming(names: Mapping[str, tuple[str, ...]], where: str) -> tuple[str, ...]:
    """The class names that all parts share; numbered classes may stop early in a part."""
    longest = max(names.values(), key=len)
    for part, given in names.items():
        if given != longest[: len(given)]:
            raise DataError(f"{where}: {part} names its classes {given}; the other part names them {longest}")
    return longest
