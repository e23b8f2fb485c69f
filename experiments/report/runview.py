"""What a page shows of one run: its table, its pictures, its circumstances, how to repeat it."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.compare.stages import stage_table
from experiments.records.keys import used, written
from experiments.records.runs import Failure, Run
from experiments.report.heat import Heat, clients_by_class, confusion_tables
from experiments.report.illustrations import Illustration
from experiments.report.sortable import share_of
from experiments.report.tables import number, percent


@dataclass(frozen=True)
class Row:
    """A row of the stage table of one run as text; ``share`` is the length of its bar in percent."""

    title: str
    note: str
    share: str
    accuracy: str
    loss: str


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run; ``setup`` is the number of its setup, ``report`` where its own page is."""

    name: str
    remark: str
    setup: int
    seed: int
    rows: Sequence[Row]
    sd: bool
    failures: Sequence[Failure]
    asked: int | None
    pictures: Sequence[Illustration]
    clients: Heat | None
    confusions: Sequence[Heat]
    command: str
    again: str
    report: str
    config: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


def view(
    run: Run,
    *,
    config: Sequence[str],
    pictures: Iterable[Illustration],
    again: str,
    setup: int = 0,
    brief: bool = False,
    report: str = "",
) -> RunView:
    """What the page shows of ``run``.

    Args:
        run: The run.
        config: The keys of its configuration that are shown.
        pictures: Its pictures.
        again: The command that repeats it.
        setup: The number of its setup.
        brief: One of many: without what the page says once for all, without tables by class and its surroundings.
        report: Where a report of its own is; empty if there is none.
    """
    env = run.env or {}
    plain = [(key, env[key]) for key in _SURROUNDINGS if key in env and not brief]
    table = stage_table(run)
    return RunView(
        name=run.name,
        remark=", ".join(filter(None, [run.label, f"seed {run.seed}", run.status])),
        setup=setup,
        seed=run.seed,
        rows=[_row(row, brief=brief) for _, row in table.iterrows()],
        sd=bool(table["sd"].notna().any()),
        failures=run.failures,
        asked=run.asked,
        pictures=list(pictures),
        clients=None if brief else clients_by_class(run),
        confusions=() if brief else list(confusion_tables(run)),
        command=_command(env.get("command")),
        again=again,
        report=report,
        config=[(key, written(used(run.config).get(key))) for key in config],
        environment=[(key, written(value)) for key, value in plain],
        versions=[(str(name), str(version)) for name, version in (env.get("versions") or {}).items()],
    )


def _row(row: pd.Series, *, brief: bool) -> Row:
    """A row of the table of one run."""
    return Row(
        title=str(row["title"]),
        note="" if brief else str(row["note"]),
        share=share_of(row["accuracy"]),
        accuracy=percent(row["accuracy"], row["sd"]),
        loss=number(row["loss"]),
    )


_SURROUNDINGS = ("device", "cpus", "threads", "commit", "started", "seconds", "server_seconds", "peak_memory")


def _command(given: Any) -> str:
    """The command line that made the run, ``""`` where it was not kept."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return shlex.join(map(str, given))
    return str(given or "")
