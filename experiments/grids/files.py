"""Grid files: what all runs share, what is varied, and every run that follows from it, laid out before any begins.

    extends = "other.toml"              # all tables of that file, changed by the ones below
    [base]                              # what all runs share
    clients = 5
    [grid]                              # every combination, for every cell
    seed = [0, 1, 2]
    [[cells]]                           # a difference from the base, perhaps with a name and a grid of its own
    name = "transport"              # what its runs are called
    aligner = "optimal-transport"
    grid = { merger = ["average", "merge-many"] }
    [[exclude]]                         # runs with these values are left out; a list is any of them
    merger = "average"
    seed = [1, 2]
    [quick]                             # with --quick: a value for all runs, or another list to vary over
    clients = 3
    seed = [0]

What stands nearer to a run wins: a cell's own keys over [grid], and [grid] over [base]. Of an extended file, tables
are completed key by key; its cells and exclusions hold only where this file has none.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from fedmerge.errors import ConfigError, FedmergeError, UnknownNameError
from fedmerge.files import read_text
from server import LABELS, RunConfig, read_toml

_KEYS = tuple(name.replace("_", "-") for name in RunConfig.model_fields)
_LONGEST = 120
_LIST = "expected a list of at least one value"


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name says how it differs from the base."""

    name: str
    config: RunConfig


def _own(given: dict[str, Any], *, lists: bool = False) -> dict[str, Any]:
    """Keys of a run, with dashes, each with a value it can have or, if ``lists``, a list of them.

    A value is checked alone: whether keys go together is known only when a run is complete.
    """
    table = {}
    for written, value in given.items():
        key = written.replace("_", "-")
        if key not in _KEYS:
            raise ValueError(f".{written}: {UnknownNameError('key', written, _KEYS)}")
        if lists and value == []:
            raise ValueError(f".{written} = []: {_LIST}")
        for one in value if lists and isinstance(value, list) else [value]:
            try:
                RunConfig.model_validate({key: one})
            except ValidationError as error:
                raise ValueError(f".{written} = {one!r}: {error.errors()[0]['msg']}") from error
            except FedmergeError as error:
                raise ValueError(f".{written}: {error}") from error
        table[key] = value
    return table


def _axes(given: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run, each with a list of values; at least one of both."""
    if not given:
        raise ValueError(" is empty; give it keys with lists of values, or remove it")
    axes = _own(given, lists=True)
    for key, values in axes.items():
        if not isinstance(values, list):
            raise ValueError(f".{key} = {values!r}: {_LIST}")
    return axes


_Own = Annotated[dict[str, Any], AfterValidator(_own)]
_Lists = Annotated[dict[str, Any], AfterValidator(partial(_own, lists=True))]
_Axes = Annotated[dict[str, Any], AfterValidator(_axes)]


class _Cell(BaseModel):
    """A cell of the file: fixed keys, and lists over which it is repeated."""

    name: str = ""
    fixed: _Own = {}
    grid: _Axes = {}

    @model_validator(mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: given[key] for key in ("name", "grid") if key in given}
        return {**said, "fixed": {key: value for key, value in given.items() if key not in said}}

    @model_validator(mode="after")
    def _once(self) -> Self:
        for key in self.grid:
            if key in self.fixed:
                raise ValueError(f": {key} is both given and varied; remove one")
        return self


class _File(BaseModel, extra="forbid"):
    """A grid file, each key and value of it checked."""

    extends: str | None = None
    base: _Own = {}
    grid: _Axes = {}
    cells: Annotated[list[_Cell], Field(min_length=1)] = []
    exclude: Annotated[list[_Lists], Field(min_length=1)] = []
    quick: _Lists = {}


_SHIPPED = Path(__file__).parents[1] / "configs"


def shipped() -> dict[str, str]:
    """The grids that are part of the package: name -> the question that each asks."""

    def question(file: Path) -> str:
        lines = (line.removeprefix("#") for line in read_text(file).splitlines() if line.startswith("#"))
        return " ".join(" ".join(lines).split()).removeprefix("Question: ").partition(" Counterpart")[0]

    return {file.stem: question(file) for file in sorted(_SHIPPED.glob("*.toml"))}


def found(given: Path) -> Path:
    """The grid file ``given``; of a bare name that is no file here, the grid of that name that is shipped.

    Raises:
        UnknownNameError: A bare name, and neither is there.
    """
    if given.suffix or len(given.parts) != 1 or (given.exists() and given.name not in shipped()) or given.is_file():
        return given
    if given.name not in shipped():
        raise UnknownNameError("grid (and no file of that name is here)", given.name, shipped())
    return _SHIPPED / f"{given.name}.toml"


def read(path: Path, *, quick: bool = False, check: Callable[[RunConfig], object] = lambda config: None) -> list[Cell]:
    """The runs of a grid file, in its order.

    Args:
        path: The file.
        quick: Whether its ``[quick]`` table is applied; runs that become equal by it are one.
        check: Called with each configuration; a FedmergeError that it raises says why that run is impossible.

    Raises:
        ConfigError: An unknown table, key or value (with its dotted key), nothing to run, two cells that are the
            same run, or runs that are impossible: all of them, in one message.
    """
    plan = _load(path)
    if quick:
        _apply_quick(plan, path)
    refused: dict[str, list[str]] = {}
    names: dict[RunConfig, tuple[str, str]] = {}
    for short, long, values in _runs(plan):
        config = RunConfig.model_validate(values)
        if any(_matches(config, pattern) for pattern in plan.exclude):
            continue
        problem = None
        try:
            config = RunConfig.parse(values, str(path))
            if config not in names:
                check(config)
        except FedmergeError as error:
            problem = str(error).removeprefix(f"{path}: ")
        if config in names:
            if quick:
                continue
            raise ConfigError(f"{path}: two cells are the same run, {names[config][0]} and {short}; remove one")
        names[config] = (short, long)
        if problem is not None:
            refused.setdefault(problem, []).append(short)
    if refused:
        reasons = "; ".join(f"{', '.join(cells)}: {reason}" for reason, cells in refused.items())
        count = sum(map(len, refused.values()))
        raise ConfigError(
            f"{path}: {count} of {len(names)} runs cannot be made (change them or leave them out with [[exclude]]): "
            + reasons
        )
    if not names:
        raise ConfigError(f"{path}: every run is excluded; nothing is left to run")
    return _named(names, path)


def _runs(plan: _File) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A short name, a long name and the keys of every combination."""
    for cell in plan.cells:
        axes = {key: values for key, values in {**plan.grid, **cell.grid}.items() if key not in cell.fixed}
        for combination in itertools.product(*axes.values()):
            varied = dict(zip(axes, combination, strict=True))
            changes = {**cell.fixed, **varied}
            called = {"name": cell.name} if cell.name else {}
            named = {"": cell.name, **varied} if cell.name else {k: v for k, v in changes.items() if k not in LABELS}
            short = "-".join(_slug(key, value) for key, value in named.items()) or "run"
            long = "-".join(f"{key}={value}" for key, value in changes.items())
            yield _safe(short), _safe(long), {**plan.base, **called, **changes}


def _named(names: Mapping[RunConfig, tuple[str, str]], path: Path) -> list[Cell]:
    """Cells under their short names; under the long ones where values of two keys read the same."""
    times = Counter(short for short, _ in names.values())
    cells = [Cell(short if times[short] == 1 else long, config) for config, (short, long) in names.items()]
    twice = [name for name, times in Counter(cell.name for cell in cells).items() if times > 1]
    if twice:
        raise ConfigError(f"{path}: two different runs are called {twice[0]}; give their cells a `name`")
    return cells


def _slug(key: str, value: Any) -> str:
    return f"{key}={value}" if not isinstance(value, str) else value or key


def _safe(name: str) -> str:
    """``name`` as the name of a folder."""
    text = "".join(c if c.isalnum() or c in "._=+" else "-" for c in name).lstrip(".")
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _matches(config: RunConfig, pattern: Mapping[str, Any]) -> bool:
    values = config.flat()
    return all(values[k] in v if isinstance(v, list) else values[k] == v for k, v in pattern.items())


def _apply_quick(plan: _File, path: Path) -> None:
    if not plan.quick:
        raise ConfigError(f"{path}: has no [quick] table; run it without --quick")
    grids = [plan.grid, *(cell.grid for cell in plan.cells)]
    for key, value in plan.quick.items():
        varying = [grid for grid in grids if key in grid]
        if isinstance(value, list):
            for grid in varying or [plan.grid]:
                grid[key] = value
            continue
        for table in [*varying, *(cell.fixed for cell in plan.cells)]:
            table.pop(key, None)
        plan.base[key] = value


# -- reading ------------------------------------------------------------------------------------------------


def _load(path: Path, above: tuple[Path, ...] = ()) -> _File:
    """The file ``path``, put over the one it extends."""
    try:
        file = _File.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_said(error)}") from error
    if file.extends is not None:
        _extend(file, path, (*above, path.resolve()))
    if not (file.base or file.grid or file.cells):
        raise ConfigError(f"{path}: holds no runs; give it [base], [grid] or [[cells]]")
    if not file.cells and not above:
        file.cells = [_Cell()]
    return file


def _extend(file: _File, path: Path, above: tuple[Path, ...]) -> None:
    """Tables are completed key by key from the file it extends; cells and exclusions only where there are none."""
    other = path.parent / str(file.extends)
    if other.resolve() in above:
        raise ConfigError(f"{path}: extends {file.extends}, which extends this file again; break the circle")
    parent = _load(other, above)
    # A key that is fixed here is not varied any more, whatever the other file says.
    file.grid = {k: v for k, v in parent.grid.items() if k not in file.base} | file.grid
    file.base = parent.base | file.base
    file.quick = parent.quick | file.quick
    file.cells = file.cells or parent.cells
    file.exclude = file.exclude or parent.exclude


def _said(error: ValidationError) -> str:
    """What is wrong, unknown tables first: where, what was given, and what was expected."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = [f" {part + 1}" if isinstance(part, int) else f".{part}" for part in first["loc"] if part != "fixed"]
    where = "".join(place).removeprefix(".")
    if first["type"] == "extra_forbidden":
        return str(UnknownNameError("table", where, _File.model_fields))
    if first["type"] == "value_error":
        return f"{where}{first['ctx']['error']}"
    expected = {
        "cells": "tables [[cells]], at least one",
        "exclude": "tables [[exclude]], at least one",
        "extends": "the name of a file, relative to this one",
    }.get(where, "text" if first["type"] == "string_type" else "a table")
    return f"{where} = {first['input']!r}: expected {expected}"
