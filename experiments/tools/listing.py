"""What can be named in a configuration, with what comes from outside and from where."""

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.table import Table

import strategies
from experiments.terminal import one_line
from fedmerge import aligners, data, mergers, models, repairs, running_averages
from fedmerge.errors import UnknownNameError
from fedmerge.privacy import attacks
from fedmerge.registry import REGISTRIES
from fedmerge.retraining import retrainings
from fedmerge.teachers import TEACHERS
from server import CONTROLS


def tables(kind: str | None, further: Mapping[str, Mapping[str, str]]) -> Iterator[Table]:
    """A table of names and summaries for each kind, or for ``kind`` alone; ``further`` are kinds of rooms above.

    Raises:
        UnknownNameError: There is no such kind.
    """
    kinds: dict[str, Mapping[str, str]] = {
        "datasets": data.summaries(),
        "models": models.summaries(),
        "partitions": data.partition_summaries(),
        "aligners": aligners(),
        "mergers": mergers(),
        "repairs": repairs(),
        "retrainings": retrainings(),
        "teachers": TEACHERS.summaries(),
        "running-averages": running_averages(),
        "strategies": strategies.summaries(),
        "controls": {n: f"{c.summary}{' (default)' if c.usual else ''}" for n, c in CONTROLS.items()},
        "attacks": attacks(),
        **further,
    }
    if kind is not None and kind not in kinds:
        raise UnknownNameError("kind", kind, kinds)
    brought = {registry.group: registry.offers() for registry in REGISTRIES.values()}
    for name in [kind] if kind else kinds:
        table = Table(
            title=name, box=None, show_header=False, title_justify="left", title_style="bold", padding=(0, 2, 0, 0)
        )
        for entry, summary in kinds[name].items():
            table.add_row(f"[cyan]{entry}[/]", summary)
        for plugin, summary, problem in brought.get(name, []):
            said = f"[yellow]cannot be used:[/] {one_line(problem)}" if problem else escape(summary)
            table.add_row(f"[cyan]{escape(plugin.name)}[/]", f"{said} [dim](from {escape(plugin.package)})[/]")
        yield table
