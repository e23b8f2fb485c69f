"""The terminal: what a command prints, live progress, and the signals that end it."""

import codecs
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Output(Console):
    """A console whose reader may leave: what is printed after that is lost, and nothing else."""

    def on_broken_pipe(self) -> None:
        """Go on without output; Rich would end the program."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = Output()
errors = Output(stderr=True)
_PLAIN = {"±": "+/-", "–": "-", "—": "-", "−": "-", "Δ": "Delta", "×": "x", "→": "->", "…": "..."}
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


@contextmanager
def watch() -> Iterator[Any]:
    """A live display of a simulation: a bar of the clients asked, a line for each stage and failure."""
    from server import Callback
    from server.records import Row
    from strategies import Failure

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=console, transient=True)

    class Display(Callback):
        def __init__(self) -> None:
            self.task = progress.add_task("starting Flower and Ray", total=None)

        def say(self, text: str) -> None:
            progress.console.print(f"[dim]{escape(text)}[/]", highlight=False)
            progress.update(self.task, description=escape(text))

        def waiting(self, what: str, total: int) -> None:
            progress.reset(self.task, description=f"{what} clients", total=total)

        def replied(self, client: int | None, error: bool) -> None:
            progress.advance(self.task)

        def row(self, row: Row) -> None:
            if row.split == "test" and row.client is None:
                line = f"  round {row.round}  {row.stage:<24} accuracy {row.accuracy:.4f}"
                progress.console.print(line, highlight=False)
                progress.update(self.task, description="server: align, merge, retrain")

        def failure(self, failure: Failure) -> None:
            where = f"round {failure.server_round}: client {failure.client}"
            progress.console.print(f"  [yellow]{where} left out:[/] {one_line(failure.reason)}", highlight=False)

    with _interruptible(), progress:
        yield Display()


def _interrupted(number: int, _: object) -> None:
    """Ctrl-C and its kind end the process on purpose: Flower's threads would wait for all clients.

    Ray ends with its driver, as it does after SIGKILL. ``ray.shutdown`` beside Flower's threads may end the process
    itself, with code 1.
    """
    for again in _ENDING:
        signal.signal(again, lambda *_: os._exit(128 + number))
    with suppress(OSError):  # the terminal may be gone
        errors.print("[bold red]interrupted[/]; what was finished is in the output folder, --resume continues it")
    os._exit(128 + number)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, a closed terminal and ``kill`` end the block in the same way; ``nohup`` is respected."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if number in (signal.SIGINT, signal.SIGTERM) or handler is not signal.SIG_IGN:
            signal.signal(number, _interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
