"""What a control says of itself, and the registry of all."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedmerge.registry import Entry, Registry, summary_of


@dataclass(frozen=True)
class Control(Entry):
    """A control: ``make(world, results, stage)`` gives its rows, computed after the last round.

    ``world`` is what the server has (:class:`server.World`), ``results`` the usable answers of the clients of the last
    round, and ``stage`` the key of the row. What it yields is :class:`server.Measured`, how a merge climbed, or an
    answer that could not be used (:class:`fedmerge.flower.replies.Failure`).

    Attributes:
        stage: The key of its row.
        note: What its row means.
        of_clients: Whether it is made of the clients' networks, before the strategy aggregates them.
        retrains: Whether it reads how a run retrains.
        applies: Whether it says anything of a run of that configuration.
        usual: Whether a run computes it that does not say which controls it wants,
        most_clients: unless it has more clients than this: with them it would take longer than the rest of the run.
        seconds: ``seconds(world, results)`` is about how long it takes, from what the run has taken so far.
        asks: Whether it asks the clients anew, and reads their networks.
        pools: Whether it trains on the clients' images, brought together.
        follows: Whether its network goes through all that the merged one goes through, retraining and head.
    """

    make: Callable[[Any, Any, str], Iterator[Any]]
    stage: str = ""
    note: str = ""
    of_clients: bool = False
    retrains: bool = False
    applies: Callable[[Any], bool] = lambda config: True
    usual: bool = False
    most_clients: float = math.inf
    seconds: Callable[[Any, Any], float] = lambda world, results: 0.0
    asks: bool = False
    pools: bool = False
    follows: bool = False

    called = ("world results stage", "")

    @property
    def reads_networks(self) -> bool:
        """Whether it needs the networks of single clients."""
        return self.of_clients or self.asks

    def problem(self) -> str:
        """Why this entry cannot be used; empty if it can."""
        missing = "stage" if not self.stage else "note" if not self.note else ""
        return super().problem() or (f"it has no {missing}; give what its row in the table needs" if missing else "")


def _of_function(name: str, make: Any) -> Control:
    summary = summary_of(make, name)
    return Control(name, make, summary, stage=name.rpartition(":")[2], note=summary)


CONTROLS: Registry[Control] = Registry("control", Control, "controls", _of_function)
