"""Methods that describe themselves: every name that a user may write is an entry of one of these registries."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Generic, TypeVar

from fedmerge.errors import UnknownNameError


@dataclass(frozen=True)
class Entry:
    """One method, and all that others have to know about it. Each kind of method has a subclass.

    Attributes:
        name: What users write.
        make: The function or class behind the name.
        summary: One line for lists of methods.
        title: What tables call it; the name if it is not given.
        needs: Arguments of ``make`` that whoever calls it must supply, out of those that its kind knows.
        options: Further arguments of ``make`` that a caller may set.
    """

    name: str
    make: Callable[..., Any]
    summary: str
    _: KW_ONLY
    title: str = ""
    needs: frozenset[str] = frozenset()
    options: Collection[str] = ()

    can_need: ClassVar[frozenset[str]] = frozenset()
    """What methods of this kind can be supplied with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    def problem(self) -> str:
        """Why this entry cannot be used; empty if it can."""
        if not self.summary or "\n" in self.summary:
            return f"its summary is {self.summary!r}; give one line for lists of methods"
        if not callable(self.make):
            return f"its make is {self.make!r}; give the function or class behind the name"
        if unknown := self.needs - self.can_need:
            return f"it needs {listed(unknown)}; it can be supplied with {listed(self.can_need)}"
        if twice := self.needs & set(self.options):
            return f"it both needs and may be given {listed(twice)}; name them once"
        return ""


def listed(names: Iterable[str]) -> str:
    """Names in alphabetical order, as in ``"base, model"``."""
    return ", ".join(sorted(names)) or "nothing"


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """The methods of one kind (``"model"``, ``"aligner"`` ...) by name, in the order in which they were added."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}

    def add(self, *entries: E) -> None:
        """Register methods.

        Raises:
            ValueError: An entry is incomplete or contradicts itself, or its name is taken; says which and why.
        """
        for entry in entries:
            problem = "" if entry.name else "it has no name"
            if problem := problem or ("this name is taken" if entry.name in self else entry.problem()):
                raise ValueError(f"{self.kind} {entry.name!r} cannot be registered: {problem}")
            self._entries[entry.name] = entry

    def check_options(self, name: str, given: Iterable[str]) -> None:
        """Refuse an option that the method called ``name`` does not have.

        Raises:
            UnknownNameError: Names the option and those that there are.
        """
        known = self[name].options
        for option in given:
            if option not in known:
                raise UnknownNameError(f"option of {self.kind} {name}", option, known or ("(none)",))

    def __getitem__(self, name: str) -> E:
        """The entry called ``name``; :class:`UnknownNameError` names the nearest spelling."""
        if name not in self:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry called ``name``, or ``default``."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def summaries(self) -> dict[str, str]:
        """Name -> one-line summary."""
        return {name: entry.summary for name, entry in self._entries.items()}
