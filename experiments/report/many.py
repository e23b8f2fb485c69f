"""The setups of a folder of runs as a report shows them: named, numbered, best outcome first."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from experiments.compare.points import finals
from experiments.compare.stages import compare, outcomes
from experiments.records.keys import differing_keys, setups, spelt, titles
from experiments.records.runs import Run


def short(setup: str) -> str:
    """A setup's name without keys whose values are words: ``"krum, clients=3"`` of ``"strategy=krum, clients=3"``."""
    return re.sub(r"(^|, )[\w-]+=(?!true\b|false\b|none\b|–)(?=[A-Za-z])", r"\1", setup)


@dataclass(frozen=True)
class Many:
    """The runs of a report, read once and compared once.

    Attributes:
        runs: All of them.
        table: :func:`experiments.compare.stages.compare` of them, best setup first.
        groups: Setup -> its runs that finished; best outcome first, then those without one.
        numbers: Setup -> its number on the page, unfinished ones too.
    """

    runs: Sequence[Run]
    table: pd.DataFrame
    groups: Mapping[str, Sequence[Run]]
    numbers: Mapping[str, int]
    _names: Mapping[str, str]
    _of_run: Mapping[int, str]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Many":
        """Compare ``runs``."""
        table = compare(runs)
        ends = outcomes(table).sort_values("accuracy", ascending=False, kind="stable", na_position="last")
        finished = [run for run in runs if run.finished]
        groups = setups(finished)
        keys = differing_keys(finished) if finished else []
        order = {setup: k for k, setup in enumerate(dict.fromkeys([*ends["setup"], *groups]))}
        groups = {setup: groups[setup] for setup in order}
        table = table.sort_values("setup", key=lambda c: c.map(order), kind="stable", ignore_index=True)
        long = titles(groups)
        names = {setup: ", ".join(dict.fromkeys(short(title).split(", "))) for setup, title in long.items()}
        if len(set(names.values())) < len(names):  # a word said twice tells two of them apart
            names = {setup: short(title) for setup, title in long.items()}
        of_run = {id(run): spelt(run.config, keys) for run in runs}
        for setup in of_run.values():
            order.setdefault(setup, len(order))
        return cls(runs, table, groups, order, names, of_run)

    def name(self, setup: str) -> str:
        """What ``setup`` is called: by its user, or by what it differs in; of a single one by its strategy."""
        if name := self._names.get(setup, short(setup)):
            return name
        return str(next((run.config.get("strategy") for run in self.runs), None) or "all runs")

    def setup(self, run: Run) -> str:
        """The setup of one of :attr:`runs`."""
        return self._of_run[id(run)]

    def of_names(self, members: Iterable[str]) -> list[int]:
        """The numbers of some setups."""
        return [self.numbers[setup] for setup in members if setup in self.numbers]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Where axes of outcomes begin and end, in percent: one scale for all pictures that show outcomes alone.

        Setups far below the others (under the lower quartile by more than three times the distance of the quartiles)
        do not stretch it; pictures mark them at its lower end.
        """
        found = finals(self.runs)
        lower, upper = np.percentile(found.means["accuracy"], (25, 75))
        near = found.means[found.means["accuracy"] >= lower - max(3 * (upper - lower), 0.02)]
        seeds = found.seeds[found.seeds["setup"].isin(near["setup"])]["accuracy"]
        spread = near["sd"].fillna(0)
        low = 100 * min(seeds.min(), (near["accuracy"] - spread).min())
        high = 100 * max(seeds.max(), (near["accuracy"] + spread).max())
        margin = max(0.06 * (high - low), 0.3)
        return float(low - margin), float(high + margin)
