"""Reading run directories: the only door from files to tables, pictures and reports.

What is in the files is said by :mod:`server.records`. A run that was cut off in the
middle is still worth reading: what it wrote before it ended is here, and its ``status`` says so.
"""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from fedmerge.errors import RunDirectoryError
from fedmerge.files import read_text
from fedmerge.progress import steps
from server import LABELS, RunConfig
from server.records import Climb, Curve, Env, Failure, Interpolation, Row, Stage, Summary

__all__ = ["METRICS", "Climb", "Curve", "Failure", "Interpolation", "Run", "Stage", "find"]

_DTYPES = {int: "int64", str: "string", float: "float64"}
METRICS: dict[str, str] = {f.name: _DTYPES.get(get_type_hints(Row)[f.name], "Int64") for f in fields(Row)}
"""Columns of :attr:`Run.metrics` and their dtypes; ``client`` and ``examples`` may be missing (``<NA>``)."""

_FILES = ("config.toml", "metrics.jsonl", "summary.json")
"""What makes a folder a run, though the others be lost."""

T = TypeVar("T")
_row_of = TypeAdapter(Row).validate_python


@dataclass(frozen=True, kw_only=True)
class Run(Summary):
    """What a run directory says: all that its summary does, as far as that was written, and what is beside it.

    ``status`` is that of the summary, or ``"unfinished"`` (still running, or cut off), or ``"unreadable: <reason>"`` of
    a run whose files are damaged or of another version (:func:`find` alone). The ``stages`` of an unfinished run are
    those of the last round that left measurements.

    Attributes:
        path: The directory.
        name: What tables call it: the name of its folder, below those above it where another run's is the same.
        config: Every key of ``config.toml``, resolved.
        env: ``env.json``, or None where the run ended before it was written.
        metrics: One row per line of ``metrics.jsonl``, in its order, with the columns of :data:`METRICS`.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    env: Mapping[str, Any] | None
    metrics: pd.DataFrame

    @classmethod
    def load(cls, path: str | Path, *, damaged: bool = False) -> "Run":
        """Read the run directory ``path``.

        Args:
            path: The folder.
            damaged: Whether a run that cannot be read whole is welcome: its ``status`` is then what is wrong with it,
                and what is in its other files is there.

        Raises:
            RunDirectoryError: no such folder, no ``config.toml`` in it, or a file of another format.
        """
        path = Path(path)
        if not path.is_dir():
            raise RunDirectoryError(f"{path} is no folder: expected a run directory, as `fedmerge run` makes")
        wrong: list[str] = []

        def part(read: Callable[[], T], otherwise: T) -> T:
            try:
                return read()
            except RunDirectoryError as error:
                if not damaged:
                    raise
                wrong.append(str(error).replace(f"{path}{os.sep}", ""))
                return otherwise

        config: dict[str, Any] = part(lambda: _config(path / "config.toml"), {})
        summary = part(lambda: _json(path / "summary.json"), None)
        metrics = part(lambda: _metrics(path / "metrics.jsonl", may_be_torn=summary is None), _frame([]))
        found = unknown = Summary("unfinished")
        if summary is not None:
            found = part(lambda: _valid(path / "summary.json", Summary, summary), unknown)
        env = part(lambda: _env(path / "env.json"), None)
        said = {field.name: getattr(found, field.name) for field in fields(Summary)}
        if found is unknown or "stages" not in (summary or ()):
            said["stages"] = _measured(metrics)
        if wrong:
            said["status"] = f"unreadable: {wrong[0]}"
        return cls(**said, path=path, name=path.resolve().name, config=config, env=env, metrics=metrics)

    @property
    def seed(self) -> int:
        """``seed`` of the configuration (0 where it is not written)."""
        return int(self.config.get("seed", 0))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished"

    @cached_property
    def client_seconds(self) -> float | None:
        """Seconds of local training, summed over clients and rounds; None where none were measured."""
        m = self.metrics
        local = m["seconds"][(m["stage"] == "client") & (m["split"] == "local")].dropna()
        return float(local.sum()) if len(local) else None

    @property
    def epsilon(self) -> float | None:
        """The most that a client spent of its privacy; None without differential privacy, or without noise."""
        spent = [client.epsilon for client in self.privacy.clients] if self.privacy else []
        bounds = [epsilon for epsilon in spent if epsilon is not None]
        return max(bounds) if bounds and len(bounds) == len(spent) else None

    @property
    def label(self) -> str:
        """What the user called it, with tags: ``"transport (thesis, slow)"``; ``""`` of a run without a name."""
        name, tags = (str(self.config.get(key, "")) for key in LABELS)
        return f"{name} ({tags})".strip() if tags else name

    @property
    def problem(self) -> str:
        """Why the run did not come to its end, as the rest of a sentence that names it; ``""`` of a finished run."""
        kind, _, reason = self.status.partition(": ")
        left = f"; what it left reaches round {self.rounds}" if self.rounds else ""
        if kind == "unfinished":
            reason = "it is still running, or was cut off"
        return "" if self.finished else f"{_PROBLEMS.get(kind, 'did not finish')} ({reason or self.status}){left}"

    @property
    def rounds(self) -> int:
        """The last round that left a measurement; 0 when none did."""
        return 0 if self.metrics.empty else int(self.metrics["round"].max())

    def stage(self, name: str) -> Stage | None:
        """The row called ``name``, or None."""
        return next((s for s in self.stages if s.stage == name), None)


def find(*paths: str | Path) -> list[Run]:
    """Every run at each of ``paths``: that run directory, those of a bench (``path/cells/*``), or those in a folder.

    Runs come in the order of ``paths``, then in the natural order of their folders' names (``seed-2`` before
    ``seed-10``), each once. Subfolders without a file of a run are not runs and are passed over. Among several runs one
    that cannot be read is there too, and its status says why; by itself it is an error.

    Raises:
        RunDirectoryError: there is no run at one of ``paths``, or a single one that cannot be read.
    """
    folders = list({folder.resolve(): folder for path in paths for folder in _folders(Path(path))}.values())
    runs = [Run.load(folder, damaged=len(folders) > 1) for folder in steps("reading runs", folders)]
    return [replace(run, name=name) for run, name in zip(runs, _names(folders), strict=True)]


def is_run(path: Path) -> bool:
    """Whether the folder ``path`` holds a file of a run."""
    return any((path / name).is_file() for name in _FILES)


def _folders(path: Path) -> list[Path]:
    """The run directories at ``path``."""
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is no folder: expected a run directory or a folder of them")
    if is_run(path):
        return [path]
    parent = path / "cells" if (path / "cells").is_dir() else path
    folders = {file.parent for name in _FILES for file in parent.glob(f"*/{name}")}
    if not folders:
        raise RunDirectoryError(
            f"no run in {path}: expected config.toml in it, in {path / 'cells'}/*/ or in its subfolders; "
            "make one with `fedmerge run --out DIR`"
        )
    return sorted(folders, key=lambda folder: natural(folder.name))


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with so many of those above it that no two are called the same."""
    parts = [folder.resolve().parts for folder in folders]
    alike = Counter(part[-depth:] for part in parts for depth in range(1, len(part) + 1))
    return ["/".join(next(part[-d:] for d in range(1, len(part) + 1) if alike[part[-d:]] == 1)) for part in parts]


_PROBLEMS = {"failed": "failed", "unreadable": "cannot be read", "unfinished": "has not finished"}
_SEE = 'see "A run directory" in docs/architecture.md'


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which runs of digits compare as numbers: ``n=2`` stands before ``n=12``."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _text(file: Path) -> str | None:
    """What is in ``file``, None where there is no such file."""
    try:
        return read_text(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}") from error


def _config(file: Path) -> dict[str, Any]:
    try:
        text = _text(file)
        config = tomllib.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} is not TOML: {error}") from error
    if text is None:
        raise RunDirectoryError(
            f"{file.parent} is no run directory: it has no config.toml; give a folder `fedmerge run` wrote"
        )
    for key, value in config.items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise RunDirectoryError(f"{file}: {key} is {value}, expected a number of 64 bits")
        if key.replace("-", "_") in RunConfig.model_fields and not isinstance(value, str | int | float):
            raise RunDirectoryError(f"{file}: {key} is {value!r}, expected text or a number")
    if not isinstance(config.get("seed", 0), int):
        raise RunDirectoryError(f"{file}: seed is {config['seed']!r}, expected a whole number")
    return config


def _json(file: Path) -> dict[str, Any] | None:
    """The object in ``file``, None where there is no such file."""
    try:
        text = _text(file)
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{file} holds a {type(value).__name__}, expected an object: {_SEE}")
    return None if text is None else value


def _metrics(file: Path, *, may_be_torn: bool) -> pd.DataFrame:
    """Lines of ``file``; a last line without its newline was cut by a crash: dropped if ``may_be_torn``."""
    try:
        text = _text(file) or ""
    except ValueError as error:
        raise RunDirectoryError(f"{file}: {error}") from error
    lines = text.split("\n")
    if may_be_torn:
        lines[-1] = ""
    rows = [_row(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return _frame(rows)


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
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
        return vars(_row_of({column: given.get(column) for column in METRICS}))
    except ValidationError as error:
        first = error.errors()[0]
        words = {"string_type": "text", "whole": "a whole number"}.get(first["type"], "a number")
        raise RunDirectoryError(f"{where}: {first['loc'][0]} is {first['input']!r}, expected {words}") from error


def _env(file: Path) -> dict[str, Any] | None:
    given = _json(file)
    if given is not None:
        _valid(file, Env, given)
    return given


def _valid(file: Path, record: type[T], given: Mapping[str, Any]) -> T:
    """The object ``given`` in ``file`` as a ``record``; keys that it does not know are left alone."""
    try:
        return TypeAdapter(record).validate_python(given)
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
