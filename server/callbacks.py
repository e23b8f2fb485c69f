"""Who is told what happens in a run: the terminal, TensorBoard's file, the run directory, anything of one's own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from fedmerge.flower.replies import Failure
from server._costs import Costs
from server.records import Kept, Row, Summary


class Callback:
    """What a run tells whoever is interested; every method may be overridden, none has to be.

    What a method raises ends the run. After ``pfl-research``'s ``TrainingProcessCallback`` (Apple, 2024).
    """

    def begin(self, path: Path) -> None:
        """The run whose files are in ``path`` begins, or goes on after what is written there."""

    def say(self, text: str) -> None:
        """A line about what happens now."""

    def step(self, name: str, done: int, total: int) -> None:
        """How far the work called ``name`` has come, of the server or of the clients; see :func:`fedmerge.progress`."""

    def row(self, row: Row) -> None:
        """A network was evaluated."""

    def failure(self, failure: Failure) -> None:
        """A client's answer could not be used."""

    def keep(self, name: str, params: Mapping[str, Tensor]) -> None:
        """A network of those that stay when the run is over, and the name of its file."""

    def after_round(
        self, server_round: int, params: Mapping[str, Tensor], state: Mapping[str, np.ndarray], kept: Kept
    ) -> None:
        """A round that is not the last is over: the global network, the strategy's arrays, and what happened so far."""

    def end(self, summary: Summary, costs: Costs) -> None:
        """The run is over, finished or not."""


class Callbacks(Callback):
    """Several as one, told in their order."""

    def __init__(self, *each: Callback) -> None:
        self.each = each

    def begin(self, path: Path) -> None:
        """As :meth:`Callback.begin`."""
        for one in self.each:
            one.begin(path)

    def say(self, text: str) -> None:
        """As :meth:`Callback.say`."""
        for one in self.each:
            one.say(text)

    def step(self, name: str, done: int, total: int) -> None:
        """As :meth:`Callback.step`."""
        for one in self.each:
            one.step(name, done, total)

    def row(self, row: Row) -> None:
        """As :meth:`Callback.row`."""
        for one in self.each:
            one.row(row)

    def failure(self, failure: Failure) -> None:
        """As :meth:`Callback.failure`."""
        for one in self.each:
            one.failure(failure)

    def keep(self, name: str, params: Mapping[str, Tensor]) -> None:
        """As :meth:`Callback.keep`."""
        for one in self.each:
            one.keep(name, params)

    def after_round(
        self, server_round: int, params: Mapping[str, Tensor], state: Mapping[str, np.ndarray], kept: Kept
    ) -> None:
        """As :meth:`Callback.after_round`."""
        for one in self.each:
            one.after_round(server_round, params, state, kept)

    def end(self, summary: Summary, costs: Costs) -> None:
        """As :meth:`Callback.end`."""
        for one in self.each:
            one.end(summary, costs)
