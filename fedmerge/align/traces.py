"""Traced networks that several alignments share."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Traces:
    """What copies of one model were traced to. Meanwhile nobody changes the model or the spec.

    Attributes:
        found: Key -> what was traced, and the objects whose ``id`` is in the key and who so stay alive.
    """

    found: dict[Hashable, tuple[Any, tuple[object, ...]]] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    def once(self, key: Hashable, of: tuple[object, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives for ``key`` and the objects ``of``, called the first time only."""
        key = key, *map(id, of)
        with self.lock:
            if key not in self.found:
                self.found[key] = make(), of
            made: T = self.found[key][0]
            return made


_SHARED: ContextVar[Traces | None] = ContextVar("fedmerge.align.traces", default=None)


@contextmanager
def sharing(traces: Traces) -> Iterator[None]:
    """Within, in this thread, alignments take their traces from ``traces`` and leave theirs there."""
    token = _SHARED.set(traces)
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared() -> Traces:
    """The traces that are shared at this moment; new ones if none are."""
    return _SHARED.get() or Traces()
