"""Methods that describe themselves: every name that a user may write is an entry of one of these registries.

A name is that of an entry that was added here, that of an entry point of an installed package (``fedmerge.models``,
``fedmerge.aligners`` ...), or ``module:name``, where the module is in the current folder or installed. What stands
behind the latter two is a whole entry, or the function or class alone, of which an entry is made.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain, count
from typing import Any, ClassVar, Generic, TypeVar

from fedmerge._plugins import Plugin, is_reference, offered, referred
from fedmerge.errors import ConfigError, UnknownNameError


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
    called: ClassVar[tuple[str, str]] = ("", "")
    """With what ``make`` is called beside needs and options: names of positional arguments, and of keywords."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    @property
    def reads_networks(self) -> bool:
        """Whether a single client's network is among what it needs, and not only sums of all and public data."""
        return bool(self.needs & {"sources", "teachers"})

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
        return self.uncallable()

    def uncallable(self, further: str = "") -> str:
        """Why ``make`` cannot be called as others of its kind, with ``further`` keywords; empty if it can."""
        first, keywords = self.called[0].split(), f"{self.called[1]} {further}".split()
        keywords += sorted(self.needs | set(self.options) - {*first, *keywords})
        try:
            inspect.signature(self.make).bind(*first, **dict.fromkeys(keywords))
        except TypeError as error:
            call = ", ".join([*first, *(f"{name}=" for name in keywords)])
            return f"it is called with ({call}), which it does not take: {error}"
        except ValueError:  # of a function written in C nothing is known
            pass
        return ""


def listed(names: Iterable[str]) -> str:
    """Names in alphabetical order, as in ``"base, model"``."""
    return ", ".join(sorted(names)) or "nothing"


def summary_of(make: object, name: str) -> str:
    """The first line of the docstring of ``make``, or what is known of it."""
    return next(iter((inspect.getdoc(make) or "").splitlines()), "") or f"{name}, which has no docstring"


def keywords_of(make: Callable[..., Any], entry: type[Entry]) -> list[inspect.Parameter]:
    """The parameters of ``make`` that only a caller can set: with a default, and none that its kind is called with."""
    called = set(" ".join(entry.called).split()) | entry.can_need
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # no function, which is refused later, or one written in C
        return []
    return [p for p in parameters if p.default is not p.empty and p.name not in called]


T = TypeVar("T")


def returned(what: str, found: object, expected: type[T]) -> T:
    """``found``, which ``what`` returned.

    Raises:
        ConfigError: It is no ``expected``.
    """
    if not isinstance(found, expected):
        raise ConfigError(f"{what} returned a {type(found).__name__}; expected a {expected.__name__}")
    return found


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """The methods of one kind (``"model"``, ``"aligner"`` ...) by name, in the order in which they were added.

    As a mapping it holds what was added. ``registry[name]`` also finds what installed packages offer, and
    ``module:name``.

    Args:
        kind: What one is called.
        entry: The class of its entries.
        group: The name of all: packages offer theirs as entry points ``fedmerge.GROUP``.
        made_of: The entry for a function or class given alone, from a name and what was given;
            :class:`ConfigError` says why it is none.
    """

    def __init__(self, kind: str, entry: type[E], group: str, made_of: Callable[[str, Any], E] | None = None) -> None:
        self.kind, self.entry, self.group = kind, entry, group
        self._made_of = made_of or (lambda name, make: entry(name, make, summary_of(make, name)))
        self._entries: dict[str, E] = {}
        self._brought: dict[str, E] = {}  # by module:name
        self._own: set[str] = set()  # what `register` added, and may replace
        REGISTRIES[kind] = self

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

    def find(self, method: "str | E | Callable[..., Any]") -> E:
        """The entry of a method by its name, given itself, or made of the function or class alone.

        Raises:
            UnknownNameError: No such name.
            ConfigError: What was given is no method of this kind.
        """
        return self[method] if isinstance(method, str) else self._entry(getattr(method, "__name__", "given"), method)

    def named(self, method: "str | E | Callable[..., Any]") -> str:
        """The name of a method; one that was given itself has one from now on, in this process.

        Raises:
            ConfigError: What was given is no method of this kind.
        """
        if isinstance(method, str):
            return method
        entry = self.find(method)
        names = chain([entry.name], (f"{entry.name} ({n})" for n in count(2)))
        name = next(n for n in names if self._entries.get(n, self._brought.get(n, entry)) == entry)
        if name not in self:
            self._brought[name] = entry
        return name

    def seen(self) -> list[E]:
        """What was added, and what was brought so far."""
        return [*self._entries.values(), *self._brought.values()]

    def knows(self, name: str) -> bool:
        """Whether ``name`` was added, is offered by a package or reads ``module:name``; nothing is imported."""
        return name in self or is_reference(name) or any(plugin.name == name for plugin in self.plugins())

    def brought(self, name: str) -> bool:
        """Whether ``name`` is known and a user's, not fedmerge's."""
        return self.knows(name) and (name not in self or name in self._own)

    def plugins(self) -> tuple[Plugin, ...]:
        """What installed packages offer; two may offer one name."""
        return offered(f"fedmerge.{self.group}")

    def offers(self) -> list[tuple[Plugin, str, str]]:
        """What installed packages offer, each with its summary, or with why it cannot be used; imports all of it."""
        found = []
        for plugin in self.plugins():
            try:
                if plugin.name in self:
                    raise ConfigError(f"{plugin.name!r} is fedmerge's own; write {plugin.value}")
                found.append((plugin, self[plugin.name].summary, ""))
            except (ConfigError, UnknownNameError) as error:
                found.append((plugin, "", str(error)))
        return found

    def _outside(self, name: str) -> E:
        if is_reference(name):
            return self._entry(name, referred(f"{self.kind} {name!r}", name))
        plugins = self.plugins()
        named = [plugin for plugin in plugins if plugin.name == name]
        if not named:
            raise UnknownNameError(self.kind, name, {*self._entries, *(plugin.name for plugin in plugins)})
        if len(named) > 1:
            who = " and ".join(f"{plugin.package} ({plugin.value})" for plugin in named)
            raise ConfigError(f"{self.kind} {name!r} is offered by {who}; write the one that you mean as module:name")
        what = f"{self.kind} {name!r} of {named[0].package}"
        return self._entry(name, referred(what, named[0].value))

    def _entry(self, name: str, given: Any) -> E:
        if isinstance(given, Entry):
            if not isinstance(given, self.entry):
                raise ConfigError(
                    f"{self.kind} {name!r} is a {type(given).__name__}; expected a {self.entry.__name__}, or the "
                    "function or class alone"
                )
            entry = given
        else:
            entry = self._made_of(name, given)
        if problem := entry.problem():
            entries = f"{self.entry.__module__.partition('._')[0]}.{self.entry.__name__}"
            raise ConfigError(f"{self.kind} {name!r} cannot be used: {problem} ({entries} says what one must be)")
        return entry

    def __getitem__(self, name: str) -> E:
        """The entry called ``name``; :class:`UnknownNameError` names the nearest spelling."""
        if name in self._entries:
            return self._entries[name]
        if name not in self._brought:
            self._brought[name] = self._outside(str(name))
        return self._brought[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry that was added under ``name``, or ``default``."""
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

    def replace(self, name: str, make: Callable[..., Any], **facts: Any) -> None:
        """Add the entry of ``make``, changed by ``facts``; of what was added in this way before, the latest counts.

        Raises:
            ValueError: As :meth:`add`.
            ConfigError: ``make`` is no method of this kind.
        """
        entry = replace(self._made_of(name, make), **facts)
        before = self._entries.pop(name, None) if name in self._own else None
        try:
            self.add(entry)
        except ValueError:
            if before is not None:
                self._entries[name] = before
            raise
        self._own.add(name)


REGISTRIES: dict[str, Registry[Any]] = {}
"""Kind -> its registry. Those of strategies, retrainings and controls are there once their packages are imported."""


def register(kind: str, name: str, make: Callable[..., Any], **facts: Any) -> None:
    """Give a method of your own a name, for this process: from then on it works like those that fedmerge has.

    Registered again, as by a notebook cell that is run twice, the latest counts. Ray's workers are other processes:
    name what they need (models, data sets) ``module:name`` instead.

    Args:
        kind: ``"aligner"``, ``"merger"``, ``"repair"``, ``"model"``, ``"data set"``, ``"partition"``, or
            ``"running average"``; once their module is imported also ``"retrain"`` (``fedmerge.retraining``),
            ``"teacher"`` (``fedmerge.teachers``), ``"strategy"`` (``strategies``) and ``"control"`` (``server``).
        name: What it shall be called.
        make: The function or class.
        facts: What its entry says besides, for example ``summary``, ``needs``, or ``recipe`` of a model; see
            ``fedmerge.align.Aligner``, ``fedmerge.merge.Merger``, ``fedmerge.models.Model`` ...

    Raises:
        UnknownNameError: No such kind.
        ValueError: The name is one of fedmerge's, or the entry contradicts itself; says why.
        ConfigError: ``make`` is no such method; says what is expected.

    Example:
        >>> import fedmerge as fm
        >>> def first(models, *, spec, weights, rng, **options):
        ...     "The first of the networks."
        ...     return fm.Merge(dict(models[0]), tuple(spec.identity(m) for m in models), 0.0, (), 0, True)
        >>> fm.register("merger", "first", first)
        >>> fm.mergers()["first"]
        'The first of the networks.'
    """
    if kind not in REGISTRIES:
        raise UnknownNameError("kind of method", kind, REGISTRIES)
    REGISTRIES[kind].replace(name, make, **facts)
