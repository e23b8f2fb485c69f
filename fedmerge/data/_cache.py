"""Decoded images on disk: decoded once per machine, then memory-mapped by every process that needs them.

An entry is a folder of ``.npy`` files and an ``entry.json`` that holds their digests. It is named after the
content of its source files, so a changed source is another entry. An entry is moved into place whole, under a
lock; a reader that finds it missing, cut short or altered rebuilds it.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt
import platformdirs

from fedmerge.errors import DataError

_FORMAT = 3  # part of every key: raise it when decoding or the layout of an entry changes
_ENTRY = "entry.json"


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a data set: images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)``."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a source decodes to: its parts (``train``, perhaps ``test``) and the names of its classes."""

    parts: dict[str, Part]
    classes: tuple[str, ...]

    def in_colour(self) -> "Decoded":
        """The same with grey parts in three channels where another part has three."""
        grey = {name for name, part in self.parts.items() if part.images.shape[1] == 1}
        if not grey or grey == self.parts.keys():
            return self
        parts = {
            name: Part(np.repeat(part.images, 3, axis=1), part.labels) if name in grey else part
            for name, part in self.parts.items()
        }
        return Decoded(parts, self.classes)


@dataclass(frozen=True, eq=False)
class Source:
    """Files under ``folder`` and how to decode them; their names and bytes are the source's identity."""

    folder: Path
    files: Sequence[Path]
    decode: Callable[[], Decoded]

    def key(self) -> str:
        """A name for the content: BLAKE2b over the names, sizes and bytes of the files."""
        text = [f"format {_FORMAT}"]
        for file in sorted(self.files):
            text += [file.relative_to(self.folder).as_posix(), str(file.stat().st_size), _digest(file)]
        return hashlib.blake2b("\n".join(text).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """``$FEDMERGE_CACHE``, else ``fedmerge`` in the user's cache folder on this platform.

    Example:
        >>> fm.data.cache_folder().is_absolute()
        True
    """
    if given := os.environ.get("FEDMERGE_CACHE"):
        return Path(given)
    return platformdirs.user_cache_path("fedmerge", appauthor=False, opinion=False)


def cached(source: Source) -> Decoded:
    """The decoded ``source``, memory-mapped; decodes it first where no sound entry exists.

    The arrays are mapped copy-on-write: pages are read when touched and shared between processes, and no
    write can reach the file.

    Raises:
        DataError: The source cannot be read or decoded, or the cache folder cannot be written.
    """
    root = cache_folder()
    try:
        entry = root / source.key()
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; repair it or take it out") from error
    if (found := _open(entry)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f"{entry.name}.lock"):
            if (found := _open(entry)) is not None:  # another process was faster
                return found
            decoded = source.decode()
            _write(entry, decoded)
    except OSError as error:
        raise DataError(
            f"cannot write decoded images to {root}: {error}; set FEDMERGE_CACHE to a folder with free space"
        ) from error
    found = _open(entry)
    if found is None:
        raise DataError(f"decoded images under {entry} changed while they were written; set FEDMERGE_CACHE")
    return found


def _write(entry: Path, decoded: Decoded) -> None:
    """Write ``decoded`` beside ``entry``, then move it there in one step."""
    aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))  # for its user alone
    draft = aside / entry.name
    try:
        draft.mkdir()  # for whom the umask says
        for name, part in decoded.parts.items():
            np.save(draft / f"{name}-images.npy", part.images)
            np.save(draft / f"{name}-labels.npy", part.labels)
        about = {
            "classes": decoded.classes,
            "parts": list(decoded.parts),
            "files": {file.name: _digest(file) for file in sorted(draft.glob("*.npy"))},
        }
        (draft / _ENTRY).write_text(json.dumps(about), encoding="utf-8")
        if entry.exists():
            shutil.rmtree(entry)
        draft.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open(entry: Path) -> Decoded | None:
    """The entry, memory-mapped; None where it is missing or its bytes are not the ones written."""
    try:
        about = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if any(_digest(entry / name) != digest for name, digest in about["files"].items()):
            return None
        parts = {
            name: Part(
                np.load(entry / f"{name}-images.npy", mmap_mode="c"),
                np.load(entry / f"{name}-labels.npy", mmap_mode="c"),
            )
            for name in about["parts"]
        }
        return Decoded(parts, tuple(about["classes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(file: Path) -> str:
    """BLAKE2b of the bytes of ``file``; read once per process as long as its size and time stay."""
    stat = file.stat()
    return _digest_of_version(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _digest_of_version(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()
