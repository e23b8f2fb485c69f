"""Where the images of a data set are: parquet in the hub's layout, folders of images by class."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge.data._cache import Decoded, Part, Source
from fedmerge.data._columns import columns, decode_tables
from fedmerge.data._pixels import decode_images
from fedmerge.errors import DataError
from fedmerge.files import mistaken

_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
_UNREADABLE = (
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),  # cameras
    *(".heic", ".heif", ".hif", ".jxl", ".psd", ".svg"),
)
_TRAIN_FOLDERS = ("train", "training")
_VAL_WORDS = ("val", "valid", "validation")
_TEST_FOLDERS = ("test", "testing", *_VAL_WORDS)


def parquet_source(folder: Path) -> Source | None:
    """The parquet files of ``folder`` or ``folder/data`` by the words in their names; None where there are none.

    A file is of the training or test part if a word of its name begins with ``train`` or ``test``, in any case:
    ``test-00000-of-00001`` and ``my_test`` are, ``latest`` is not. Where none is of the test part, files called
    ``val``, ``valid`` or ``validation`` are, as of folders (:func:`folder_source`); where none is of the training
    part, all that are of no other.

    Example:
        >>> fm.data.parquet_source(Path(tempfile.mkdtemp())) is None  # no parquet files there
        True
    """
    for place in (folder, folder / "data"):
        files = sorted(file for file in place.glob("*.parquet") if file.is_file() and not _left_behind(file.name))
        parts: dict[str, list[Path]] = {}
        for file in files:
            parts.setdefault(part_of(file), []).append(file)
        train, test = parts.get("train") or parts.get(""), parts.get("test") or parts.get("val")
        if train:
            named = {"train": train, "test": test} if test else {"train": train}
            return Source(folder, [*train, *(test or ())], partial(_read_parquet, folder, named))
    return None


def folder_source(folder: Path) -> Source | None:
    """Torchvision's ImageFolder layout, ``CLASS/any.png``; None where ``folder`` holds no such images.

    With a folder ``train`` (or ``training``) of class folders inside, that is the training part, and ``test`` (or
    ``testing``, ``val``, ``valid``, ``validation``) beside it the test part, in any case. A folder ``train`` with
    images right inside is a class.
    """
    roots = {"train": folder}
    by_name = {place.name.casefold(): place for place in sorted(folder.iterdir()) if place.is_dir()}
    train, test = (
        next((by_name[name] for name in names if name in by_name), None) for names in (_TRAIN_FOLDERS, _TEST_FOLDERS)
    )
    if train is not None and any(_images_by_class(train).values()):
        roots = {"train": train} if test is None else {"train": train, "test": test}
    found = {part: _images_by_class(root) for part, root in roots.items()}
    if not any(found["train"].values()):
        return None
    files = [file for classes in found.values() for names in classes.values() for file in names]
    return Source(folder, files, partial(_read_folder, folder, found))


def _read_parquet(folder: Path, files: Mapping[str, Sequence[Path]]) -> Decoded:
    return decode_tables({part: _tables(paths) for part, paths in files.items()}, str(folder)).in_colour()


def _tables(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """The images and labels in each file, read when it is their turn."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield str(path), file.read(columns=list(columns(file.schema_arrow.names, str(path))))
        except (OSError, pyarrow.ArrowException) as error:
            reason = mistaken(path) or " ".join(str(error).split())
            raise DataError(f"{path}: cannot read parquet: {reason}") from error


def _read_folder(root: Path, found: Mapping[str, Mapping[str, Sequence[Path]]]) -> Decoded:
    classes = tuple(found["train"])
    parts = {}
    for part, by_class in found.items():
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise DataError(f"class folder {unknown[0]} is in the {part} part only; train has {', '.join(classes)}")
        files = [file for names in by_class.values() for file in names]
        labels = [classes.index(name) for name, names in by_class.items() for _ in names]
        named = [file.relative_to(root).as_posix() for file in files]
        parts[part] = Part(decode_images(files, f"{root} ({part})", named.__getitem__), np.array(labels, np.int64))
    return Decoded(parts, classes).in_colour()


def _images_by_class(root: Path) -> dict[str, list[Path]]:
    """Class folder name -> its image files at any depth, both sorted; classes without images are left out.

    What a system leaves behind is passed over: hidden files and folders, and macOS's ``__MACOSX``. A name that macOS
    stores decomposed (e and an accent) is the same as the composed one.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not _left_behind(folder.name):
            found.setdefault(unicodedata.normalize("NFC", folder.name), []).extend(sorted(_images_below(folder)))
    return {name: files for name, files in sorted(found.items()) if files}


def _images_below(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not _left_behind(name) and os.path.realpath(os.path.join(place, name)) not in seen  # links in a circle
        ]
        for file in (Path(place, name) for name in files if not _left_behind(name)):
            if file.suffix.lower() in _UNREADABLE:
                raise DataError(f"{file}: images of the kind {file.suffix} are not read; save it as PNG or JPEG")
            if file.suffix.lower() in _SUFFIXES:
                if file.exists() and not file.is_file():
                    raise DataError(f"{file} is no ordinary file (a pipe, a socket or a device); take it out")
                yield file


def part_of(file: Path) -> str:
    """``"train"``, ``"test"`` or ``"val"``, by the first word of the file's name that says so, or nothing."""
    for word in re.split("[^a-z]+", file.stem.casefold()):
        if word.startswith(("train", "test")):
            return "train" if word.startswith("train") else "test"
        if word in _VAL_WORDS:
            return "val"
    return ""


def _left_behind(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
