"""Named choices: every string that a user may write resolves through one of these tables."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fedmerge.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind (``"model"``, ``"aligner"`` ...) with an entry and a one-line summary each."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[T, str]] = {}

    def add(self, name: str, entry: T, summary: str) -> None:
        """Register ``entry`` under ``name``; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self._entries[name] = (entry, summary)

    def register(self, name: str, summary: str) -> Callable[[T], T]:
        """Register the decorated object under ``name``."""

        def decorate(entry: T) -> T:
            self.add(name, entry, summary)
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        """The entry called ``name``; :class:`UnknownNameError` names the nearest spelling."""
        if name not in self:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name][0]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def names(self) -> tuple[str, ...]:
        """Known names in the order of registration."""
        return tuple(self._entries)

    def summaries(self) -> dict[str, str]:
        """Name -> one-line summary."""
        return {name: summary for name, (_, summary) in self._entries.items()}
