"""Who is told what happens in a run: the terminal, TensorBoard's file, the run directory, anything of one's own."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from server._costs import Costs
from server.records import Kept, Row, Summary
from strategies import Failure


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


class Lines(Callback):
    """Long work as lines of text, where no bar can be drawn.

    A line comes ten seconds after the last one or after the work began, and the later the work is the longer it waits:
    an hour of it is some fifty lines.
    """

    def __init__(self) -> None:
        self._works: dict[str, tuple[float, int, int]] = {}  # name -> when it began, steps done, all steps
        self._last = 0.0

    def step(self, name: str, done: int, total: int) -> None:
        """As :meth:`Callback.step`."""
        now = time.monotonic()
        if not self._works:
            self._last = now
        began = self._works[name][0] if name in self._works else now
        self._works[name] = began, done, total
        if done >= total:
            del self._works[name]
            return
        first = next(iter(self._works.values()))[0]
        if now - self._last >= max(_PAUSE, (now - first) / 10):
            self._last = now
            self.say("; ".join(_said(name, now - began, *of) for name, (began, *of) in self._works.items()))


_PAUSE = 10.0


def _said(name: str, seconds: float, done: int, total: int) -> str:
    if total == 1:
        return name
    left = f", about {duration(seconds / done * (total - done))} left" if done else ""
    return f"{name}: {done} of {total}{left}"


def duration(seconds: float) -> str:
    """A time that is only estimated: ``"50 s"``, ``"7 min"``, ``"3 h"``."""
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"
