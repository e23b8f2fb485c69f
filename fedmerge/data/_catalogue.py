"""The data sets by name, and where each is looked for."""

import inspect
import os
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmerge.data._cache import Decoded, Part, Source, cache_folder, cached
from fedmerge.data._columns import IMAGE_COLUMNS, decode_tables
from fedmerge.data._decode import folder_source, parquet_source, part_of
from fedmerge.data._given import as_dataset
from fedmerge.data._images import Dataset, Images
from fedmerge.errors import ConfigError, DataError, FedmergeError, UnknownNameError
from fedmerge.registry import Entry, Registry, returned, summary_of

_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class DataSet(Entry):
    """A data set by name: ``make(folder or None) -> Dataset``.

    Example:
        >>> fm.data.DATASETS["digits"].make(None).classes[:3]
        ('0', '1', '2')
    """

    make: Callable[..., Dataset]

    called = ("root", "")


def _of_factory(name: str, make: Any) -> DataSet:
    """A data set of a user: what ``make`` returns when it is called without arguments."""
    entry = DataSet(name, lambda root: as_dataset(name, make()), summary_of(make, name))
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ConfigError(
            f"data set {name!r} is called without arguments, which it does not take: {error}; expected a function that "
            "returns a Dataset, or (train, test)"
        ) from error
    return entry


DATASETS: Registry[DataSet] = Registry("data set", DataSet, "datasets", _of_factory)
"""The data sets."""


@dataclass(frozen=True)
class _Published:
    """A public data set: its places, and the channel statistics of its training images."""

    name: str
    hub: str
    torchvision: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, root: Path | None) -> Dataset:
        """From a local folder, else the hub, else torchvision; :class:`DataError` says why each failed."""
        places: dict[str, Callable[[], Source]] = {
            "local folder": lambda: self._local(root),
            "Hugging Face hub": self._from_hub,
            "torchvision": self._from_torchvision,
        }
        failed = []
        for place, find in places.items():
            try:
                source = find()
            except _NotFoundError as reason:
                failed.append(f"{place}: {reason}")
                continue
            return _dataset(self.name, cached(source), self.mean, self.std)
        raise DataError(f"data set {self.name!r} cannot be had; " + "; ".join(failed))

    def _local(self, root: Path | None) -> Source:
        if root is None:
            given = os.environ.get("FEDMERGE_DATA")
            if not given:
                raise _NotFoundError("FEDMERGE_DATA is not set")
            root = Path(given)
        source = parquet_source(root / self.name)
        if source is None:
            raise _NotFoundError(f"no train-*.parquet in {root / self.name}")
        if "test" not in map(part_of, source.files):
            raise DataError(f"{root / self.name} holds train-*.parquet without test-*.parquet; add the test part")
        return source

    def _from_hub(self) -> Source:
        import datasets
        import huggingface_hub.constants

        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            _reach(huggingface_hub.constants.ENDPOINT, "; HF_HUB_OFFLINE=1 uses what the hub has stored here")
        try:
            parts = datasets.load_dataset(self.hub)
            tables = {
                part: parts[part].cast_column(
                    next(name for name in IMAGE_COLUMNS if name in parts[part].column_names),
                    datasets.Image(decode=False),
                )
                for part in ("train", "test")
            }
        except Exception as error:  # the client raises errors of many libraries; the next place is tried
            raise _NotFoundError(f"{self.hub}: {_one_line(error)}") from error
        files = [Path(file["filename"]) for table in tables.values() for file in table.cache_files]
        return Source(files[0].parent, files, lambda: _decode_hub(tables, self.hub))

    def _from_torchvision(self) -> Source:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, self.torchvision)
        folder = cache_folder() / "torchvision" / self.name
        try:
            parts = {part: kind(folder, train=part == "train", download=False) for part in ("train", "test")}
        except RuntimeError:  # not downloaded yet
            _reach(kind.url if hasattr(kind, "url") else kind.mirrors[0])
            try:
                parts = {part: kind(folder, train=part == "train", download=True) for part in ("train", "test")}
            except (OSError, RuntimeError) as error:
                raise _NotFoundError(_one_line(error)) from error
        files = [file for file in folder.rglob("*") if file.is_file()]
        return Source(folder, files, lambda: _decode_torchvision(parts))


class _NotFoundError(Exception):
    """This place does not have the data set; the next one is asked."""


def names() -> tuple[str, ...]:
    """Names of the known data sets; :func:`load` takes a folder as well.

    Example:
        >>> {"digits", "mnist", "cifar10"} <= set(fm.data.names())
        True
    """
    return tuple(DATASETS)


def summaries() -> dict[str, str]:
    """Data set name -> one line about it.

    Example:
        >>> "<folder>" in fm.data.summaries()  # a path will do in place of a name
        True
    """
    return {**DATASETS.summaries(), "<folder>": "any folder of images by class, or of parquet files"}


def load(name: str, root: str | Path | None = None) -> Dataset:
    """The data set called ``name``, the one in the folder ``name``, or what ``module:factory`` returns.

    Args:
        name: One of :func:`names`; ``module:factory`` of your own, which returns a :class:`Dataset`, or
            ``(train, test)``, each :class:`Images`, uint8 images with their labels, or rows of any kind with theirs
            (float images, tokens, a table; see :func:`as_data`), which then need a model of your own; or a folder in
            torchvision's ImageFolder layout or of parquet files with the columns ``img`` or ``image``, and ``label``.
            Images of a folder come out as a viewer shows them: upright, in sRGB, transparency over white, of an
            animation the first frame.
        root: Where ``name/train-*.parquet`` is looked for first; ``$FEDMERGE_DATA`` unless given.

    Raises:
        UnknownNameError: ``name`` is neither a known name nor a folder.
        DataError: The images cannot be had or read.

    Example:
        >>> fm.data.load("digits").classes
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    if name in DATASETS:
        return DATASETS[name].make(Path(root) if root is not None else None)
    try:
        folder = Path(name).expanduser()
        if str(name) and folder.is_dir():
            return _from_folder(folder)
        if DATASETS.knows(name):
            return _brought(name, DATASETS[name])
        if folder.is_file():
            raise DataError(f"{name!r} is a file; give the folder that holds it, or one of {', '.join(names())}")
        if len(folder.parts) > 1:
            raise DataError(f"no folder {name!r}; give an existing folder, or one of {', '.join(names())}")
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # a folder or a file that may not be read; no name
        raise DataError(f"{name!r} cannot be read: {_one_line(error)}; give a folder that you may read") from error
    raise UnknownNameError("data set", name, names())


def _brought(name: str, entry: DataSet) -> Dataset:
    """A data set from outside, whose code may do anything."""
    try:
        return returned(f"data set {name!r}", entry.make(None), Dataset)
    except FedmergeError:
        raise
    except Exception as error:
        raise DataError(f"data set {name!r} failed with {type(error).__name__}: {_one_line(error)}") from error


def _from_folder(folder: Path) -> Dataset:
    source = parquet_source(folder) or folder_source(folder)
    if source is None:
        raise DataError(
            f"{folder} holds neither train-*.parquet files nor class folders of images; expected one of these layouts"
            + (" (to_parquet of `datasets` makes the first)" if any(folder.rglob("*.arrow")) else "")
        )
    decoded = cached(source)
    channels = decoded.parts["train"].images.shape[1]
    return _dataset(folder.name, decoded, (0.5,) * channels, (0.25,) * channels)


def _digits(root: Path | None) -> Dataset:
    """E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part)."""
    del root
    import sklearn.datasets

    found = sklearn.datasets.load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    part = Part(pixels, found.target.astype(np.int64))
    return _dataset("digits", Decoded({"train": part}, tuple("0123456789")), (0.3053,), (0.3761,))


DATASETS.add(DataSet("digits", _digits, "1,797 grey 8x8 digits that ship inside scikit-learn; no test set of its own"))
for _set, _summary in (
    (
        _Published("cifar10", "uoft-cs/cifar10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "60,000 colour 32x32 images of 10 kinds of things (Krizhevsky 2009)",
    ),
    (
        _Published("cifar100", "uoft-cs/cifar100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "60,000 colour 32x32 images of 100 kinds of things (Krizhevsky 2009)",
    ),
    (
        _Published("mnist", "ylecun/mnist", "MNIST", (0.1307,), (0.3081,)),
        "70,000 grey 28x28 handwritten digits (LeCun et al. 1998)",
    ),
    (
        _Published("fashion-mnist", "zalando-datasets/fashion_mnist", "FashionMNIST", (0.2860,), (0.3530,)),
        "70,000 grey 28x28 images of clothes (Xiao et al. 2017, arXiv:1708.07747)",
    ),
):
    DATASETS.add(DataSet(_set.name, _set.load, _summary))


def _dataset(name: str, decoded: Decoded, mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    parts = {
        part: Images(
            torch.from_numpy(arrays.images),
            torch.from_numpy(arrays.labels),
            decoded.classes,
            mean,
            std,
            f"{name} ({part})",
        )
        for part, arrays in decoded.parts.items()
    }
    return Dataset(name, parts["train"], parts.get("test"))


def _decode_hub(tables: Any, where: str) -> Decoded:
    return decode_tables({part: [(f"{where} ({part})", table.data.table)] for part, table in tables.items()}, where)


def _decode_torchvision(sets: Any) -> Decoded:
    parts = {}
    for part, found in sets.items():
        pixels = np.asarray(found.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        parts[part] = Part(np.ascontiguousarray(pixels), np.asarray(found.targets, np.int64))
    return Decoded(parts, tuple(map(str, sets["train"].classes)))


def _reach(url: str, hint: str = "") -> None:
    """Ask for ``url`` once and briefly: the clients behind it would retry for minutes without a network."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.build_opener().open(request, timeout=_PROBE_SECONDS):
            pass
    except urllib.error.HTTPError as answer:
        answer.close()  # whatever it says, it answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _NotFoundError(f"no connection to {url.split('/')[2]} ({_one_line(reason)}){hint}") from error


def _one_line(error: object) -> str:
    return textwrap.shorten(str(error), 200) or type(error).__name__
