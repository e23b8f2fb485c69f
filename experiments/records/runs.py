"""Reading run directories: the only door from files to tables, pictures and reports.

The format is described under "A run directory" in ``docs/architecture.md``. A run that was cut off in the
middle is still worth reading: what it wrote before it ended is here, and its ``status`` says so.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from fedmerge.errors import RunDirectoryError
from fedmerge.files import read_text

METRICS: dict[str, str] = {
    "round": "int64",
    "stage": "string",
    "client": "Int64",
    "split": "string",
    "loss": "float64",
    "accuracy": "float64",
    "examples": "Int64",
    "seconds": "float64",
}
"""Columns of :attr:`Run.metrics` and their dtypes; ``client`` and ``examples`` may be missing (``<NA>``)."""

_NOT_A_METRIC = frozenset({"round", "stage", "split"})


@dataclass(frozen=True)
class Stage:
    """One row of a stage table: a network (or an ensemble) measured on the test split in the last round.

    Attributes:
        stage: Key, the same in every run, for example ``"merged"``.
        title: What a reader sees, for example ``"Merged"``.
        accuracy: Share of correct predictions in ``[0, 1]``; NaN when it was not measured.
        loss: Mean cross-entropy; NaN when it was not measured.
        sd: Standard deviation over clients where the row is a mean of clients, else None.
        note: What the row means, or ``""``.
    """

    stage: str
    title: str
    accuracy: float
    loss: float
    sd: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A client whose reply was not used in one round, and why."""

    round: int
    client: int | None
    reason: str


@dataclass(frozen=True)
class Climb:
    """The objective of one merge after each sweep."""

    round: int
    name: str
    objective: tuple[float, ...]
    converged: bool


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at each ``alpha`` on the straight line between two networks."""

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Interpolation:
    """The line between two clients' networks, as they came (``naive``) and after alignment (``aligned``)."""

    clients: tuple[int, int]
    split: str
    alphas: tuple[float, ...]
    naive: Curve
    aligned: Curve


@dataclass(frozen=True)
class Run:
    """What a run directory says.

    Attributes:
        path: The directory.
        config: Every key of ``config.toml``, resolved.
        env: ``env.json``, or None where the run ended before it was written.
        metrics: One row per line of ``metrics.jsonl``, in its order, with the columns of :data:`METRICS`.
        summary: ``summary.json``, or None where the run ended before it was written.
        status: ``"finished"``, ``"failed: <reason>"`` or ``"unfinished"``.
        classes: Names of the classes; empty while unknown.
        labels: Holder (``"public"``, ``"client 0"`` ...) -> images of each class; empty while unknown.
        stages: The rows of the stage table; of an unfinished run, the last round that left measurements.
        failures: Replies that were not used.
        merges: How each merge climbed.
        interpolation: The line between two clients, or None.
    """

    path: Path
    config: Mapping[str, Any]
    env: Mapping[str, Any] | None
    metrics: pd.DataFrame
    summary: Mapping[str, Any] | None
    status: str
    classes: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]
    stages: tuple[Stage, ...]
    failures: tuple[Failure, ...]
    merges: tuple[Climb, ...]
    interpolation: Interpolation | None

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Read the run directory ``path``.

        Raises:
            RunDirectoryError: no such folder, no ``config.toml`` in it, or a file of another format.
        """
        path = Path(path)
        if not path.is_dir():
            raise RunDirectoryError(f"{path} is no folder: expected a run directory, as `fedmerge run` makes")
        config = _config(path / "config.toml")
        summary = _json(path / "summary.json")
        metrics = _metrics(path / "metrics.jsonl", may_be_torn=summary is None)
        found = summary or {}
        try:
            return cls(
                path=path,
                config=config,
                env=_json(path / "env.json"),
                metrics=metrics,
                summary=summary,
                status="unfinished" if summary is None else str(found["status"]),
                classes=tuple(map(str, found.get("classes", ()))),
                labels=_labels(found),
                stages=_stages(found["stages"]) if "stages" in found else _measured(metrics),
                failures=tuple(
                    Failure(int(f["round"]), _optional_int(f["client"]), str(f["reason"]))
                    for f in found.get("failures", ())
                ),
                merges=tuple(
                    Climb(int(m["round"]), str(m["name"]), _floats(m["objective"]), bool(m["converged"]))
                    for m in found.get("merges", ())
                ),
                interpolation=_interpolation(found.get("interpolation")),
            )
        except KeyError as error:
            raise RunDirectoryError(f"{path / 'summary.json'} has no key {error}: {_SEE}") from error
        except (TypeError, ValueError) as error:
            raise RunDirectoryError(f"{path / 'summary.json'} makes no sense ({error}): {_SEE}") from error

    @property
    def seed(self) -> int:
        """``seed`` of the configuration (0 where it is not written)."""
        return int(self.config.get("seed", 0))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished"

    @property
    def rounds(self) -> int:
        """The last round that left a measurement; 0 when none did."""
        return 0 if self.metrics.empty else int(self.metrics["round"].max())

    @property
    def asked(self) -> int | None:
        """Number of training requests sent to clients, over all rounds."""
        return _optional_int((self.summary or {}).get("asked"))

    @property
    def answered(self) -> int | None:
        """Number of training requests that came back, over all rounds."""
        return _optional_int((self.summary or {}).get("answered"))

    def stage(self, name: str) -> Stage | None:
        """The row called ``name``, or None."""
        return next((s for s in self.stages if s.stage == name), None)


def find(path: str | Path) -> list[Run]:
    """Every run at ``path``: that run directory, those of a bench (``path/cells/*``), or those in a folder.

    Runs come in the natural order of their folders' names (``seed-2`` before ``seed-10``). Subfolders
    without a ``config.toml`` are not runs and are passed over.

    Raises:
        RunDirectoryError: there is no run at all, or one that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is no folder: expected a run directory or a folder of them")
    if (path / "config.toml").is_file():
        return [Run.load(path)]
    parent = path / "cells" if (path / "cells").is_dir() else path
    folders = sorted((f.parent for f in parent.glob("*/config.toml")), key=_natural)
    if not folders:
        raise RunDirectoryError(
            f"no run in {path}: expected config.toml in it, in {path / 'cells'}/*/ or in its subfolders; "
            "make one with `fedmerge run --out DIR`"
        )
    return [Run.load(folder) for folder in folders]


_SEE = 'see "A run directory" in docs/architecture.md'


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which runs of digits compare as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def _config(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file))
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{file.parent} is no run directory: it has no config.toml; give a folder `fedmerge run` wrote"
        ) from error
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} is not TOML: {error}") from error


def _json(file: Path) -> dict[str, Any] | None:
    """The object in ``file``, None where there is no such file."""
    try:
        value = json.loads(read_text(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{file} holds a {type(value).__name__}, expected an object: {_SEE}")
    return value


def _metrics(file: Path, *, may_be_torn: bool) -> pd.DataFrame:
    """Lines of ``file``; a last line without its newline was cut by a crash: dropped if ``may_be_torn``."""
    try:
        text = read_text(file)
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunDirectoryError(f"{file}: {error}") from error
    lines = text.split("\n")
    if may_be_torn:
        lines[-1] = ""
    rows = [_row(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return pd.DataFrame({c: pd.array([row[c] for row in rows], dtype=t) for c, t in METRICS.items()})


def _row(line: str, where: str) -> dict[str, Any]:
    """One measurement, every column of :data:`METRICS` present and of its type."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise RunDirectoryError(f"{where} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise RunDirectoryError(f"{where} holds a {type(given).__name__}, expected an object: {_SEE}")
    row: dict[str, Any] = {}
    for column, dtype in METRICS.items():
        value = given.get(column)
        kind, words = (str, "text") if dtype == "string" else (int | float, "a number")
        if value is None and column not in _NOT_A_METRIC:
            value = math.nan if dtype == "float64" else None
        elif isinstance(value, bool) or not isinstance(value, kind):
            raise RunDirectoryError(f"{where}: {column} is {value!r}, expected {words}")
        elif dtype in ("int64", "Int64") and not float(value).is_integer():
            raise RunDirectoryError(f"{where}: {column} is {value!r}, expected a whole number")
        row[column] = value
    return row


def _labels(summary: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    labels = {str(holder): tuple(map(int, counts)) for holder, counts in summary.get("labels", {}).items()}
    for holder, counts in labels.items():
        if len(counts) != len(summary["classes"]):
            raise ValueError(f"{holder} counts {len(counts)} classes of {len(summary['classes'])}")
    return labels


def _stages(given: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            stage=str(s["stage"]),
            title=str(s["title"]),
            accuracy=_float(s["accuracy"]),
            loss=_float(s["loss"]),
            sd=None if s.get("sd") is None else float(s["sd"]),
            note=str(s.get("note") or ""),
        )
        for s in given
    )


def _measured(metrics: pd.DataFrame) -> tuple[Stage, ...]:
    """Stages of the last round measured on the test split, without a summary; clients become their mean."""
    test = metrics[metrics["split"] == "test"]
    if test.empty:
        return ()
    test = test[test["round"] == test["round"].max()]
    stages = []
    for name, rows in test.groupby("stage", sort=False):
        of_clients = len(rows) > 1 and bool(rows["client"].notna().all())
        stages.append(
            Stage(
                stage=str(name),
                title=str(name).replace("-", " ").capitalize(),
                accuracy=float(rows["accuracy"].mean()),
                loss=float(rows["loss"].mean()),
                sd=float(rows["accuracy"].std()) if of_clients else None,
                note=f"mean of {len(rows)} clients" if of_clients else "",
            )
        )
    return tuple(stages)


def _interpolation(given: Mapping[str, Any] | None) -> Interpolation | None:
    if given is None:
        return None
    alphas = _floats(given["alphas"])
    naive, aligned = (
        Curve(_floats(given[name]["loss"]), _floats(given[name]["accuracy"])) for name in ("naive", "aligned")
    )
    if {len(values) for c in (naive, aligned) for values in (c.loss, c.accuracy)} != {len(alphas)}:
        raise ValueError(f"interpolation has {len(alphas)} alphas but a curve of another length")
    first, second = (int(client) for client in given["clients"])
    return Interpolation((first, second), str(given.get("split", "test")), alphas, naive, aligned)


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _floats(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(_float(value) for value in values)


def _optional_int(value: object) -> int | None:
    return None if value is None else int(cast(int, value))
