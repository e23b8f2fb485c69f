"""What a study is: a question, the configurations that it runs in, and the rows that answer it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from torch import Tensor

from fedmerge import data
from fedmerge.errors import ConfigError, DataError, UnknownNameError
from fedmerge.registry import Entry, Registry
from fedmerge.types import Params
from server import RunDirectory, read_model

SIZES = ("quick", "default", "full")


@dataclass(frozen=True)
class Config:
    """What a study runs; each study has a subclass with keys of its own, whose defaults are the default size.

    Attributes:
        seeds: Everything is measured once a seed; none for a study in which nothing is drawn.
        dataset: A data set by name, or a folder; ``""`` for a study without images.
    """

    seeds: tuple[int, ...] = (0,)
    dataset: str = ""


@dataclass(frozen=True)
class Cell:
    """One measurement: the columns that say which it is, and the function that makes its row, or its rows.

    The function runs only if the cell is not in the file of rows yet, and what it needs is best made within it.
    """

    key: Mapping[str, object]
    measure: Callable[[], Mapping[str, object] | Iterable[Mapping[str, object]]]


def each(measure: Callable[..., Any], **columns: Iterable[object]) -> Iterator[Cell]:
    """A cell for each combination of values, the last column changing fastest; ``measure`` is given them by name."""
    for values in product(*columns.values()):
        key = dict(zip(columns, values, strict=True))
        yield Cell(key, partial(measure, **key))


@dataclass(frozen=True)
class Work:
    """What a study works with.

    Attributes:
        folder: Where its files are; networks among them.
        needs: The data set of its configuration; ``""`` for none.
        device: Where to compute.
        say: Hears what is going on.
    """

    folder: Path
    needs: str = ""
    device: str = "cpu"
    say: Callable[[str], None] = print

    @cached_property
    def dataset(self) -> data.Dataset:
        """The data set of the configuration.

        Raises:
            DataError: It cannot be had: says which, where it was looked for, and how to give it.
        """
        try:
            return data.load(self.needs)
        except (DataError, UnknownNameError) as error:
            raise DataError(
                f"this study needs the data set {self.needs!r}: {error}. Nothing else takes its place; put it where it "
                "was looked for, or give --dataset NAME_OR_FOLDER, which the page will name"
            ) from error

    def kept(self, name: str, make: Callable[[], Params]) -> dict[str, Tensor]:
        """The network called ``name``, read from the folder, or made and written there."""
        path = self.folder / "networks" / f"{name}.safetensors"
        if not path.is_file():
            lock = path.with_suffix(".lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):  # of several processes that need it one makes it, the others wait
                if not path.is_file():
                    RunDirectory(path.parent).keep(path.name, make())
                lock.unlink(missing_ok=True)  # whoever waits for it finds the network
        return read_model(path)


@dataclass(frozen=True)
class Study(Entry):
    """A study: ``make(config, work)`` yields its cells in order. What pages and lists say of it stands here.

    Attributes:
        source: Whose experiment it is: authors, title, place, year.
        question: What it asks, in one or two sentences.
        cost: What the default size takes, on which machine.
        apart: Columns; cells that differ in one of them share no work, but for networks that are kept.
        sizes: ``"quick"`` (seconds, on ``digits``), ``"default"`` (two cores) and, if there is one, ``"full"`` (as
            published).
        answer: The rows in one to three sentences.
        theirs: The published numbers, typed from the source, as Markdown.
        ours: The rows as a Markdown table.
        explains: What explains a difference between both, as Markdown.
        draw: The rows as a picture.
    """

    _: KW_ONLY
    source: str
    question: str
    cost: str
    apart: tuple[str, ...] = ("seed",)
    sizes: Mapping[str, Config] = field(default_factory=dict)
    answer: Callable[[pd.DataFrame], str]
    theirs: str
    ours: Callable[[pd.DataFrame], str]
    explains: str
    draw: Callable[[pd.DataFrame], Figure]

    called = ("config work", "")

    def problem(self) -> str:
        """As of every entry; and it must say everything, in known sizes."""
        said = {name: getattr(self, name) for name in ("source", "question", "cost", "theirs", "explains")}
        if missing := [name for name, text in said.items() if not text]:
            return f"it does not say its {', '.join(missing)}"
        if not {"quick", "default"} <= set(self.sizes) <= set(SIZES):
            return f"it has the sizes {', '.join(self.sizes) or 'none'}; expected quick, default and at most full"
        return super().problem()

    def config(self, size: str, seeds: Sequence[int] = (), dataset: str = "") -> Config:
        """The configuration of one size, with other seeds or another data set where they are given.

        Raises:
            ConfigError: There is no such size, no data set or seeds to change, or a seed twice.
        """
        if size not in self.sizes:
            raise ConfigError(f"study {self.name} has no size {size!r}; it has {', '.join(self.sizes)}")
        config = self.sizes[size]
        if dataset and not config.dataset:
            raise ConfigError(f"study {self.name} looks at no images; leave --dataset {dataset} out")
        if seeds and not config.seeds:
            raise ConfigError(f"study {self.name} draws nothing; leave --seeds {','.join(map(str, seeds))} out")
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"--seeds {','.join(map(str, seeds))}: a seed is given twice")
        return replace(config, seeds=tuple(seeds) or config.seeds, dataset=dataset or config.dataset)


def _no_study(name: str, make: Any) -> Study:
    raise ConfigError(f"study {name!r} is a {type(make).__name__}; give an experiments.studies.Study")


STUDIES: Registry[Study] = Registry("study", Study, "studies", _no_study)
"""The studies; filled by ``experiments.studies``."""
