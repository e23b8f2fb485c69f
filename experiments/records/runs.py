"""Reading run directories: the only door from files to tables, pictures and reports.

What is in the files is said by :mod:`server.records`. A run that was cut off in the
middle is still worth reading: what it wrote before it ended is here, and its ``status`` says so.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from fedmerge.errors import RunDirectoryError
from fedmerge.files import read_text
from server.records import (
    Calibration,
    ClientClasses,
    Climb,
    Confusion,
    Curve,
    Failure,
    Interpolation,
    Row,
    Stage,
    Summary,
)

__all__ = ["METRICS", "Climb", "Curve", "Failure", "Interpolation", "Run", "Stage", "find"]

_DTYPES = {int: "int64", str: "string", float: "float64"}
METRICS: dict[str, str] = {f.name: _DTYPES.get(get_type_hints(Row)[f.name], "Int64") for f in fields(Row)}
"""Columns of :attr:`Run.metrics` and their dtypes; ``client`` and ``examples`` may be missing (``<NA>``)."""

_row_of = TypeAdapter(Row).validate_python
_summary_of = TypeAdapter(Summary).validate_python


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
        per_class: Which classes each network of the last round takes for which; empty where an older version wrote.
        calibration: Whether each of them is as often right as it is sure.
        client_classes: How well each client's network knows each class.
        asked: Number of training requests sent to clients, over all rounds.
        answered: Number of training requests that came back, over all rounds.
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
    per_class: tuple[Confusion, ...]
    calibration: tuple[Calibration, ...]
    client_classes: tuple[ClientClasses, ...]
    asked: int | None
    answered: int | None

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
        found = _summary(path / "summary.json", summary or {"status": "unfinished"})
        return cls(
            path=path,
            config=config,
            env=_json(path / "env.json"),
            metrics=metrics,
            summary=summary,
            status=found.status,
            classes=found.classes,
            labels=found.labels,
            stages=found.stages if summary and "stages" in summary else _measured(metrics),
            failures=found.failures,
            merges=found.merges,
            interpolation=found.interpolation,
            per_class=found.per_class,
            calibration=found.calibration,
            client_classes=found.client_classes,
            asked=found.asked,
            answered=found.answered,
        )

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
    try:
        return asdict(_row_of({column: given.get(column) for column in METRICS}))
    except ValidationError as error:
        first = error.errors()[0]
        words = {"string_type": "text", "whole": "a whole number"}.get(first["type"], "a number")
        raise RunDirectoryError(f"{where}: {first['loc'][0]} is {first['input']!r}, expected {words}") from error


def _summary(file: Path, given: Mapping[str, Any]) -> Summary:
    try:
        return _summary_of(given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise RunDirectoryError(f"{file} has no key {first['loc'][-1]!r}: {_SEE}") from error
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise RunDirectoryError(f"{file} makes no sense ({where}{first['msg']}): {_SEE}") from error


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
