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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmerge.errors import ConfigError, FedmergeError, UnknownNameError
from fedmerge.files import read_text
from server import LABELS, RunConfig, read_toml

_TABLES = ("base", "cells", "exclude", "extends", "grid", "quick")
_KEYS = tuple(name.replace("_", "-") for name in RunConfig.model_fields)
_LONGEST = 120


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name says how it differs from the base."""

    name: str
    config: RunConfig


@dataclass
class _Group:
    """A cell of the file: fixed keys, and lists over which it is repeated."""

    name: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class _Plan:
    """A grid file, each key and value of it checked."""

    base: dict[str, Any]
    grid: dict[str, list[Any]]
    groups: list[_Group]
    exclude: list[dict[str, Any]]
    quick: dict[str, Any]


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


def _runs(plan: _Plan) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A short name, a long name and the keys of every combination."""
    for group in plan.groups:
        axes = {key: values for key, values in {**plan.grid, **group.grid}.items() if key not in group.fixed}
        for combination in itertools.product(*axes.values()):
            varied = dict(zip(axes, combination, strict=True))
            changes = {**group.fixed, **varied}
            called = {"name": group.name} if group.name else {}
            named = {"": group.name, **varied} if group.name else {k: v for k, v in changes.items() if k not in LABELS}
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


def _apply_quick(plan: _Plan, path: Path) -> None:
    if not plan.quick:
        raise ConfigError(f"{path}: has no [quick] table; run it without --quick")
    grids = [plan.grid, *(group.grid for group in plan.groups)]
    for key, value in plan.quick.items():
        varying = [grid for grid in grids if key in grid]
        if isinstance(value, list):
            for grid in varying or [plan.grid]:
                grid[key] = value
            continue
        for table in [*varying, *(group.fixed for group in plan.groups)]:
            table.pop(key, None)
        plan.base[key] = value


# -- reading ------------------------------------------------------------------------------------------------


def _load(path: Path, above: tuple[Path, ...] = ()) -> _Plan:
    """The plan of ``path``, put over the one it extends."""
    given = read_toml(path)
    for table in given:
        if table not in _TABLES:
            raise ConfigError(f"{path}: {UnknownNameError('table', table, _TABLES)}")
    base, grid, quick = given.get("base", {}), given.get("grid"), given.get("quick", {})
    groups, exclude = _tables(path, given, "cells"), _tables(path, given, "exclude")
    plan = _Plan(
        _checked(f"{path}: base", base),
        {} if grid is None else _axes(f"{path}: grid", grid),
        [_group(f"{path}: cells {i}", cell) for i, cell in enumerate(groups or [], 1)],
        [_checked(f"{path}: exclude {i}", e, lists=True) for i, e in enumerate(exclude or [], 1)],
        _checked(f"{path}: quick", quick, lists=True),
    )
    if "extends" in given:
        _extend(plan, path, given["extends"], (*above, path.resolve()))
    if not (plan.base or plan.grid or plan.groups):
        raise ConfigError(f"{path}: holds no runs; give it [base], [grid] or [[cells]]")
    if not plan.groups and not above:
        plan.groups = [_Group()]
    return plan


def _extend(plan: _Plan, path: Path, other: Any, above: tuple[Path, ...]) -> None:
    """Tables are completed key by key from the file ``other``; cells and exclusions only where there are none."""
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends = {other!r}: expected the name of a file, relative to this one")
    file = path.parent / other
    if file.resolve() in above:
        raise ConfigError(f"{path}: extends {other}, which extends this file again; break the circle")
    parent = _load(file, above)
    # A key that is fixed here is not varied any more, whatever the other file says.
    plan.grid = {k: v for k, v in parent.grid.items() if k not in plan.base} | plan.grid
    plan.base = parent.base | plan.base
    plan.quick = parent.quick | plan.quick
    plan.groups = plan.groups or parent.groups
    plan.exclude = plan.exclude or parent.exclude


def _tables(path: Path, given: Mapping[str, Any], name: str) -> list[Any] | None:
    found = given.get(name)
    if found is not None and (not isinstance(found, list) or not found):
        raise ConfigError(f"{path}: {name} = {found!r}: expected tables [[{name}]], at least one")
    return found


def _group(where: str, given: Any) -> _Group:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} = {given!r}: expected a table")
    name, grid = given.get("name", ""), given.get("grid")
    if not isinstance(name, str):
        raise ConfigError(f"{where}.name = {name!r}: expected text")
    fixed = _checked(where, {k: v for k, v in given.items() if k not in ("name", "grid")})
    axes = {} if grid is None else _axes(f"{where}.grid", grid)
    both = [key for key in axes if key in fixed]
    if both:
        raise ConfigError(f"{where}: {both[0]} is both given and varied; remove one")
    return _Group(name, fixed, axes)


def _axes(where: str, given: Any) -> dict[str, list[Any]]:
    if given == {}:
        raise ConfigError(f"{where} is empty; give it keys with lists of values, or remove it")
    axes = _checked(where, given, lists=True)
    for key, values in axes.items():
        if not isinstance(values, list):
            raise ConfigError(f"{where}.{key} = {values!r}: expected a list of at least one value")
    return axes


def _checked(where: str, given: Any, *, lists: bool = False) -> dict[str, Any]:
    """Config keys, with dashes, each with a value it can have or, if ``lists``, a list of them."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} = {given!r}: expected a table")
    table = {}
    for written, value in given.items():
        key = written.replace("_", "-")
        if key not in _KEYS:
            raise ConfigError(f"{where}.{written}: {UnknownNameError('key', written, _KEYS)}")
        if lists and value == []:
            raise ConfigError(f"{where}.{written} = []: expected a list of at least one value")
        for one in value if lists and isinstance(value, list) else [value]:
            _check_value(f"{where}.{written}", key, one)
        table[key] = value
    return table


def _check_value(where: str, key: str, value: Any) -> None:
    """Alone: whether keys go together is known only when a run is complete."""
    try:
        RunConfig.model_validate({key: value})
    except ValidationError as error:
        raise ConfigError(f"{where} = {value!r}: {error.errors()[0]['msg']}") from error
    except FedmergeError as error:
        raise ConfigError(f"{where}: {error}") from error
