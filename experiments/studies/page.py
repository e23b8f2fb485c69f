"""The page of a study, as Markdown: everything in it is typed in its entry or computed from its rows."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from experiments.compare.paired import paired
from experiments.studies.study import Study


def page(study: Study, record: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """What ``docs/results/NAME.md`` says; ``record`` is what ``study.json`` holds."""
    size = record["size"]
    config = record["config"]  # where several widths are given, the one width of other studies is not read
    used = {name: value for name, value in config.items() if f"{name}s" not in config}
    keys = {name: _shown(value) for name, value in used.items() if value not in ("", [], None)}
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    spent = f"{rows['cpu_seconds'].sum() / 60:.1f} CPU minutes, {record['device']}, {threads}, {versions}"
    command = f"fedmerge study {study.name}" + ("" if size == "default" else f" --{size}")
    parts = [
        f"# {study.title}",
        study.answer(rows),
        f"`{command}`: {study.source}.",
        f"**Question.** {inspect.cleandoc(study.question)}",
        "## Set-up",
        table(["key", "value"], keys.items()),
        f"{len(rows)} rows; {spent}.",
        "## Theirs",
        study.theirs,
        "## Ours",
        f"![{study.title}]({study.name}.png)",
        study.ours(rows),
        "## What explains the difference",
        study.explains,
    ]
    return "\n\n".join(map(inspect.cleandoc, parts)) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells as a Markdown table; a column is right-aligned if all its cells are numbers."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    numeric = [all(row[i].lstrip("+-−.").replace(".", "")[:1].isdigit() for row in cells) for i in range(len(head))]
    rule = ["--:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *cells])


def mean_sd(values: pd.Series, digits: int = 1, factor: float = 100) -> str:
    """The mean of numbers times ``factor``, by default in percent, with the deviation where there are several."""
    numbers = pd.to_numeric(values)
    spread = f" ± {factor * numbers.std():.{digits}f}" if len(numbers) > 1 else ""
    return f"{factor * numbers.mean():.{digits}f}{spread}"


def mean_ci(values: Iterable[float], digits: int = 1, factor: float = 100) -> str:
    """The mean of differences times ``factor``, one a seed, with the interval of a paired t-test where it has one."""
    found = paired([factor * float(value) for value in values])
    ends = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if isfinite(found.low) else ""
    return f"{found.mean:+.{digits}f}{ends}"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
