"""The terminal: what a command prints, live progress, and the signals that end it."""

import codecs
import io
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.progress_bar import ProgressBar
from rich.text import Text

from fedmerge.progress import Lines, progress


class Output(Console):
    """A console whose reader may leave: what is printed after that is lost, and nothing else."""

    def on_broken_pipe(self) -> None:
        """Go on without output; Rich would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = Output()
errors = Output(stderr=True)
_PLAIN = {"±": "+/-", "–": "-", "—": "-", "−": "-", "Δ": "Delta", "×": "x", "→": "->", "…": "..."}
_READABLE = 0.2
"""Seconds."""
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def print_anything() -> None:
    """Let no character end the program where the output takes ASCII or another small set only."""
    codecs.register_error("fedmerge", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fedmerge")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """The nearest characters of ASCII for those that cannot be written."""
    assert isinstance(error, UnicodeEncodeError)
    given = error.object[error.start : error.end]
    plain = "".join(
        _PLAIN.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?" for c in given
    )
    return plain, error.end


def one_line(error: object) -> str:
    """What an error says, on one line, without markup."""
    return escape(" ".join(str(error).split()))


def _say(text: str) -> None:
    console.print(f"[dim]{escape(text)}[/]", highlight=False)


class _Bar(BarColumn):
    """A bar that runs to and fro while nothing is known of how long it will take."""

    def render(self, task: Task) -> ProgressBar:
        """As Rich's."""
        bar = super().render(task)
        bar.pulse = bar.pulse or not task.completed
        return bar


class _Count(MofNCompleteColumn):
    """Steps that are over, of work that has more than one."""

    def render(self, task: Task) -> Text:
        """As Rich's."""
        return super().render(task) if task.total else Text()


class _Drawn(Progress):
    """Rich's bars, of works that last: drawing one that is over before it could be read would take longer than it."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        self._works: dict[str, _Work] = {}
        self._adding = False
        super().__init__(*columns, **options)

    def step(self, name: str, done: int, total: int) -> None:
        """How far a work has come."""
        with self._lock:
            work = self._works.setdefault(name, _Work(time.monotonic(), total))
            work.done = done
            if done >= total:
                del self._works[name]
            if work.task is None:
                return
            if done >= total:
                self.remove_task(work.task)
            else:
                self.update(work.task, completed=done)

    def get_renderables(self) -> Iterable[RenderableType]:
        """As Rich's, which asks for them ten times a second."""
        with self._lock:
            self._adding = True
            for name, work in self._works.items():
                if work.task is None and time.monotonic() - work.began >= _READABLE:
                    work.task = self.add_task(name, total=work.total if work.total > 1 else None, completed=work.done)
            self._adding = False
        yield from super().get_renderables()

    def refresh(self) -> None:
        """As Rich's, which would also draw while a drawing is made."""
        if not self._adding:
            super().refresh()


@dataclass
class _Work:
    """When it began, its steps, those that are over, and what Rich calls it once it is drawn."""

    began: float
    total: int
    done: int = 0
    task: TaskID | None = None


class Bars:
    """What goes on, drawn live: a bar with the time left for each work, the work within it below.

    Where the output is no terminal it is a line now and then.
    """

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), _Bar(), _Count(), TimeElapsedColumn())
        # Rich would otherwise forget a step that takes long before the next one is over.
        self.drawn = _Drawn(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_interactive,
            speed_estimate_period=1e9,
        )
        self.step = self.drawn.step if console.is_interactive else Lines(_say)
        """How far a work has come, see :func:`fedmerge.progress`."""

    def callback(self) -> Any:
        """For runs: the same, and a line for each stage and failure."""
        from fedmerge.flower.replies import Failure
        from server import Callback
        from server.records import Row

        bars = self

        class Display(Callback):
            def say(self, text: str) -> None:
                _say(text)

            def step(self, name: str, done: int, total: int) -> None:
                bars.step(name, done, total)

            def row(self, row: Row) -> None:
                if row.split == "test" and row.client is None:
                    line = f"  round {row.round}  {row.stage:<24} accuracy {row.accuracy:.4f}"
                    console.print(line, highlight=False)

            def failure(self, failure: Failure) -> None:
                where = f"round {failure.server_round}: client {failure.client}"
                console.print(f"  [yellow]{where} left out:[/] {one_line(failure.reason)}", highlight=False)

        return Display()


@contextmanager
def watch(*, resumes: bool = True) -> Iterator[Bars]:
    """Bars for all that goes on in the block, which every ending signal ends at once.

    Args:
        resumes: Whether the command can go on with ``--resume``, which is then said.
    """
    bars = Bars()
    with _interruptible(resumes), bars.drawn, progress(bars.step):
        yield bars


def _interrupted(resumes: bool, number: int, _: object) -> None:
    """Ctrl-C and its kind end the process on purpose: Flower's threads would wait for all clients.

    Ray ends with its driver, as it does after SIGKILL. ``ray.shutdown`` beside Flower's threads may end the process
    itself, with code 1.
    """
    for again in _ENDING:
        signal.signal(again, lambda *_: os._exit(128 + number))
    if sys.__stderr__ is not None:
        errors.file = sys.__stderr__  # the signal may come while a network is traced, whose complaints go nowhere
    with suppress(OSError):  # the terminal may be gone
        kept = "; what was finished is in the output folder, --resume continues it" if resumes else ""
        errors.print(f"[bold red]interrupted[/]{kept}")
    os._exit(128 + number)


@contextmanager
def _interruptible(resumes: bool) -> Iterator[None]:
    """Ctrl-C, a closed terminal and ``kill`` end the block in the same way; ``nohup`` is respected."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if number in (signal.SIGINT, signal.SIGTERM) or handler is not signal.SIG_IGN:
            signal.signal(number, partial(_interrupted, resumes))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
