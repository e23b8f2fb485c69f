"""fedmerge: align, merge, repair and compare networks trained on private data.

``import fedmerge as fm`` needs neither Flower nor Ray. State dicts go in and come out; nothing that is
passed in is modified.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmerge._public import *  # noqa: F403

try:
    __version__ = version("fedmerge")
except PackageNotFoundError:  # the source on a path, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """All public names at once, with torch: what needs none (``fedmerge --help``) does not wait for it."""
    public = importlib.import_module("fedmerge._public")
    if name == "__all__":
        return ["__version__", *public.__all__]
    if name not in getattr(public, "__all__", ()):
        raise AttributeError(f"module 'fedmerge' has no attribute {name!r}")
    globals().update({one: getattr(public, one) for one in public.__all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


class _Package(ModuleType):
    """``fedmerge.align`` and ``fedmerge.merge`` are packages, and functions in them: here they are the functions."""

    def __setattr__(self, name: str, value: object) -> None:
        own = getattr(value, name, None) if isinstance(value, ModuleType) else None
        super().__setattr__(name, own if callable(own) else value)


sys.modules[__name__].__class__ = _Package
