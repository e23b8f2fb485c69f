"""What a control says of itself, and the registry of all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedmerge.registry import Entry, Registry
from server.records import Climb, Row
from strategies import Failure


@dataclass(frozen=True)
class Control(Entry):
    """A control: ``make(world, results, stage)`` gives its rows, computed after the last round.

    ``world`` is what the server has (:class:`server.World`), ``results`` the usable answers of the clients of the last
    round, and ``stage`` the key of the row; how a merge climbed, and answers that could not be used, may be given
    beside rows.

    Attributes:
        stage: The key of its row.
        note: What its row means.
        of_clients: Whether it is made of the clients' networks, before the strategy aggregates them.
        retrains: Whether it reads how a run retrains.
    """

    make: Callable[[Any, Any, str], Iterator[Row | Climb | Failure]]
    stage: str = ""
    note: str = ""
    of_clients: bool = False
    retrains: bool = False

    def problem(self) -> str:
        """Why this entry cannot be used; empty if it can."""
        missing = "stage" if not self.stage else "note" if not self.note else ""
        return super().problem() or (f"it has no {missing}; give what its row in the table needs" if missing else "")


CONTROLS: Registry[Control] = Registry("control")
