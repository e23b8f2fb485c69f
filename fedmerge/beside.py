"""The packages that lie beside this one, found whatever else has their names where a process runs.

fedmerge is five packages, and four of them are called what packages of other projects are called too: ``clients``,
``strategies``, ``server``, ``experiments``. Python takes the first on its path. That is somebody else's where
``PYTHONPATH`` names their folder, and in Ray's workers, which look in the current directory before all others.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from fedmerge.errors import ConfigError

HOME = Path(__file__).resolve().parents[1]
_NAMES = frozenset({"clients", "strategies", "server", "experiments"})


class _Beside(MetaPathFinder):
    """Looks for them here, and leaves all other names to the path."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(HOME)]) if name in _NAMES else None


def beside(what: str, *arguments: Any) -> Any:
    """What ``what``, as ``"clients.app:app"``, names among those packages; called with ``arguments`` if there are any.

    From then on this process takes the four names for these packages. An object whose pickle is a call of this function
    arrives in every process that finds ``fedmerge``.

    Raises:
        ConfigError: The process has imported another package of that name.
    """
    module, _, attribute = what.partition(":")
    if not any(isinstance(finder, _Beside) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Beside())
    for name in _NAMES & sys.modules.keys():
        file = getattr(sys.modules[name], "__file__", None) or "another folder"
        if Path(file).resolve().parent.parent != HOME:
            raise ConfigError(
                f"the package {name!r} of {file} was imported in place of the one in {HOME}, which fedmerge needs; "
                "rename it, or start in another folder"
            )
    found = getattr(importlib.import_module(module), attribute)
    return found(*arguments) if arguments else found
