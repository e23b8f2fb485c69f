"""How far long work has come: told to whoever listens, and to nobody otherwise."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], object]

_LISTENER: ContextVar[Listener | None] = ContextVar("fedmerge.progress", default=None)
_SECONDS = 0.1
"""The listener is told no more often, but for the beginning and the end: a step of training takes less."""
_PAUSE = 10.0


@contextmanager
def progress(tell: Listener) -> Iterator[None]:
    """While the block runs, tell how far the work in it has come; without this nothing is told, and nothing printed.

    Work within work is told of too: the sweeps of an alignment between two of its models. What other threads than the
    caller's do is not.

    Args:
        tell: Called with the name of the work, how many of its steps are over, and of how many. The first call says 0,
            the last all of them, also where the work ended early. What it raises ends the work. ``Lines(print)`` of
            this module prints a line now and then.

    Example:
        >>> a, b, c = ({"w": torch.full((2,), i)} for i in (0.0, 1.0, 2.0))
        >>> spec = fm.PermSpec(axes={"w": ((),)}, shapes={"w": (2,)}, parameters=frozenset({"w"}))
        >>> with fm.progress(lambda name, done, total: print(f"{name}: {done} of {total}")):
        ...     merged = fm.merge_many([a, b, c], spec=spec, workers=1)
        aligning models: 0 of 2
        aligning models: 2 of 2
        merging, sweep 1: 0 of 3
        merging, sweep 1: 3 of 3
    """
    token = _LISTENER.set(tell)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def counted(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Work of ``total`` steps: what the block is given says by its argument how many more of them are over."""
    tell = _LISTENER.get()
    if tell is None:
        yield lambda count: None
        return
    done, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done, now = done + count, time.monotonic()
        if done < total and now - told >= _SECONDS:
            told = now
            tell(name, done, total)

    tell(name, 0, total)
    try:
        yield advance
    finally:
        tell(name, total, total)


def steps(name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """``items``, each of them a step, which is over when the next is asked for; a single one is not worth telling.

    Args:
        name: What the work is called.
        items: Given back in their order.
        total: How many there are, where ``items`` has no length.
    """
    total = len(items) if total is None and isinstance(items, Sequence) else total or 0
    if total < 2:
        yield from items
        return
    with counted(name, total) as advance:
        for item in items:
            yield item
            advance(1)


class Lines:
    """A listener that says in a line of text how far all work has come, seldom enough to be read.

    A line comes ten seconds after the last one or after the work began, and the later the work is the longer it waits:
    an hour of it is some fifty lines.

    Args:
        say: Called with each line.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._works: dict[str, tuple[float, int, int]] = {}  # name -> when it began, steps done, all steps
        self._last = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        """As :func:`progress` tells it."""
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
            self._say("; ".join(_said(name, now - began, *of) for name, (began, *of) in self._works.items()))


def _said(name: str, seconds: float, done: int, total: int) -> str:
    if total == 1:
        return name
    left = f", about {duration(seconds / done * (total - done))} left" if done else ""
    return f"{name}: {done} of {total}{left}"


def duration(seconds: float) -> str:
    """A time that is only estimated: ``"50 s"``, ``"7 min"``, ``"3 h"``."""
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"
