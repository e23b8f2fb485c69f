"""What decides results beside a configuration, as digests: who keeps something for later keeps these with it."""

import hashlib
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from fedmerge._plugins import is_reference, referred
from fedmerge._tree import tensors
from fedmerge.data import Dataset, Split
from fedmerge.errors import ConfigError
from fedmerge.tasks import Setup

DATA, PARTITION = "data set", "partition"
_ROWS = 1000
"""So many inputs of each part are looked at, spread over it."""


def made_of(setup: Setup, values: Iterable[object] = ()) -> dict[str, str]:
    """What a run is made of that its configuration only names -> a digest.

    Args:
        setup: The data set, and how it is dealt.
        values: Of which those that name an object of a user's module, ``module:name``, are looked up.

    Returns:
        The data set (classes, labels, a thousand inputs), who holds which row, and the file of each module named.

    Raises:
        DataError: The data set cannot be had.

    Cost: one pass over the labels, and a thousand inputs.

    Example:
        >>> import dataclasses, fedmerge as fm
        >>> setup = fm.tasks.Setup()
        >>> list(made_of(setup)), made_of(setup) == made_of(dataclasses.replace(setup, seed=1))
        (['data set', 'partition'], False)
    """
    split = setup.split()
    found = {DATA: of_data(split.dataset), PARTITION: _of_split(split)}
    names = [name.strip() for value in values if isinstance(value, str) for name in value.split(",")]
    for name in dict.fromkeys(filter(is_reference, names)):
        with suppress(ConfigError):  # of what only looks like one
            referred(name, name)
        file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        if file is not None and Path(file).is_file():
            found[name] = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
    return found


def of_data(dataset: Dataset) -> str:
    """A digest of classes, all labels, and inputs that are spread over each part."""
    found = hashlib.blake2b(repr(tuple(dataset.classes)).encode(), digest_size=16)
    for part in (dataset.train, dataset.test):
        if part is not None:
            rows = np.linspace(0, len(part) - 1, min(_ROWS, len(part))).round().astype(np.int64)
            some = part.select(rows)
            for one in (part.labels, *tensors(some.normalise(some.images))):
                found.update(f"{one.dtype} {tuple(one.shape)}".encode())
                found.update(one.cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def _of_split(split: Split) -> str:
    found = hashlib.blake2b(digest_size=16)
    for rows in (split.public, split.unlabelled, split.val, split.test, *split.clients):
        found.update(f"{len(rows)} ".encode())
        found.update(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
    return found.hexdigest()
