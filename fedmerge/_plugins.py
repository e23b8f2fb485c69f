"""Methods from outside: what ``module:name`` means, and what installed packages offer."""

import importlib
import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedmerge.errors import ConfigError

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Plugin:
    """A method that an installed package declares as an entry point; nothing of it is imported yet.

    Attributes:
        name: What users write.
        value: Where it is, ``module:name``.
        package: Name and version of the package.
    """

    name: str
    value: str
    package: str


def is_reference(name: str) -> bool:
    """Whether ``name`` reads ``module:name``."""
    return _REFERENCE.fullmatch(name) is not None


def referred(what: str, reference: str) -> Any:
    """The object behind ``reference``, ``module:name``; ``what`` says in messages who asks for it.

    The current folder is searched too, behind all that is installed: it is appended to the path, and stays there for
    what that module imports when it is used.

    Raises:
        ConfigError: There is no such module or name, or the module raises an error; says which and what to do.
    """
    module, _, name = reference.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise ConfigError(
            f"{what}: importing {module} failed with {type(error).__name__}: {error}; expected module:name of a module "
            "in this folder or installed"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            where = getattr(sys.modules[module], "__file__", None) or "no file"
            raise ConfigError(f"{what}: there is no {name!r} in {module} ({where}); expected module:name")
        found = getattr(found, part)
    return found


def offered(group: str) -> tuple[Plugin, ...]:
    """What installed packages declare in the entry-point group ``group``, by name."""
    return _offered(group, tuple(sys.path))


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    found = {_plugin(point) for point in entry_points(group=group)}  # of all that is installed: some ten milliseconds
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.package)))


def _plugin(point: EntryPoint) -> Plugin:
    package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a package without a name"
    return Plugin(point.name, point.value, package)
