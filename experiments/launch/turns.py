"""Several runs over the same clients: while the clients of one train, the server computes for another.

A run that computes holds the turn, and gives it away only while it waits for replies. So the server never computes
for two runs at once: the global random generators, the number of threads and whatever is cached have one user at a
time, and a run writes the same bytes whatever runs beside it.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from experiments.launch.sharing import common_rounds
from fedmerge.errors import FedmergeError
from fedmerge.tasks import ClientTask
from server import Observer, RunConfig
from strategies import Failure

_POLL = 0.05


class Turns:
    """The runs that wait, those that go on, and whose turn it is.

    Attributes:
        ended: The errors that end all runs, the first first.
    """

    def __init__(self, runs: Sequence[tuple[RunConfig, Path]], observer: Observer) -> None:
        self.ended: list[BaseException] = []
        self._outside: FedmergeError | None = None
        self._over = threading.Event()
        self._turn = threading.Condition()
        self._waiting = list(runs)
        self._headlines = {
            path: f"run {i} of {len(runs)}: {path.name}" if len(runs) > 1 else "" for i, (_, path) in enumerate(runs, 1)
        }
        self._common = common_rounds(config for config, _ in runs)
        self._asking: dict[Path, ClientTask] = {}
        self._observer, self._speaker = observer, ""
        self._bars: dict[Path, tuple[int, int]] = {}

    def execute(self, one: Callable[[RunConfig, Path, Observer], None], *, at_once: int) -> None:
        """Call ``one`` for every run, ``at_once`` of them side by side. What it raises ends all."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                wait([pool.submit(self._work, one) for _ in range(at_once)])
            except BaseException as error:
                self.ended.append(error)
        self._over.set()
        if self.ended:
            raise self.ended[0]

    def end(self, error: FedmergeError, *, wait: float = 10.0) -> None:
        """End all runs because of ``error``, from outside; they have ``wait`` seconds to write what they have."""
        self._outside = error
        self.ended.append(error)
        self._over.wait(wait)

    def pause(self) -> None:
        """Give the turn away for a moment.

        Raises:
            FedmergeError: Another run, or something outside, has ended all of them meanwhile.
        """
        self._turn.wait(_POLL)
        if self.ended:
            raise self._outside or FedmergeError("ended with another run of the same grid; --resume continues it")

    def _work(self, one: Callable[[RunConfig, Path, Observer], None]) -> None:
        with self._turn:
            try:
                while (found := self._next()) is not None:
                    config, path = found
                    one(config, path, _Voice(self, path))
                    self._asking.pop(path, None)
                    self._bars.pop(path, None)
            except BaseException as error:
                self.ended.append(error)

    def _next(self) -> tuple[RunConfig, Path] | None:
        """The first run whose clients are not being asked the same for another: they would train twice."""
        while self._waiting:
            for config, path in self._waiting:
                task = config.client_task()
                if task not in self._asking.values():
                    self._waiting.remove((config, path))
                    if task in self._common:
                        self._asking[path] = task
                    return config, path
            self.pause()
        return None

    def _speak(self, path: Path) -> Observer:
        """Whom run ``path`` tells something, after its headline if another run spoke before."""
        if self._speaker != self._headlines[path]:
            self._speaker = self._headlines[path]
            self._observer.say(self._speaker)
        return self._observer


class _Voice(Observer):
    """What one of the runs tells."""

    def __init__(self, turns: Turns, path: Path) -> None:
        self.turns, self.path = turns, path

    def say(self, text: str) -> None:
        self.turns._speak(self.path).say(text)

    def waiting(self, what: str, total: int) -> None:
        """One bar for the clients of all runs that wait."""
        turns = self.turns
        turns._bars = {path: bar for path, bar in turns._bars.items() if bar[0] > bar[1]} | {self.path: (total, 0)}
        turns._observer.waiting(what, sum(asked for asked, _ in turns._bars.values()))
        for _ in range(sum(came for _, came in turns._bars.values())):
            turns._observer.replied(None, False)

    def replied(self, client: int | None, error: bool) -> None:
        asked, came = self.turns._bars.get(self.path, (0, 0))
        self.turns._bars[self.path] = (asked, came + 1)
        self.turns._observer.replied(client, error)

    def stage(self, row: Mapping[str, Any]) -> None:
        turns = self.turns
        task = turns._asking.get(self.path)
        if task is not None and row["split"] == "local" and row["round"] >= turns._common[task]:
            del turns._asking[self.path]  # all that another run will ask is answered and kept
        shown = row["split"] == "test" and row["client"] is None
        (turns._speak(self.path) if shown else turns._observer).stage(row)

    def failure(self, failure: Failure) -> None:
        self.turns._speak(self.path).failure(failure)
