"""Errors a user can act on: each message names what was given, what was expected and what to do."""

import difflib
from collections.abc import Iterable
from typing import Self


class FedmergeError(Exception):
    """Base of every error that fedmerge raises on purpose; the command line prints it as one line.

    Example:
        >>> try:
        ...     fm.average([])
        ... except fm.FedmergeError as error:
        ...     print(type(error).__name__)
        ParamsError
    """


class UnknownNameError(FedmergeError):
    """A name that no registry, config or table knows; lists the known ones and the nearest spelling."""

    def __init__(self, kind: str, given: object, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {str(given)!r}: known are {', '.join(known)}{hint}")
        self.kind, self.given, self.known, self.nearest = kind, given, tuple(known), near[0] if near else None

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, tuple[str, ...]]]:
        """As it crosses from one process to another."""
        return type(self), (self.kind, str(self.given), self.known)


class ConfigError(FedmergeError):
    """A configuration value, or a combination of values, that cannot be run."""


class DataError(FedmergeError):
    """A data set that cannot be had or read."""


class PartitionError(DataError):
    """A split of the images between public, val, test and clients that cannot be made."""


class SpecError(FedmergeError):
    """A network whose permutation symmetries cannot be traced, or a spec that does not fit its parameters."""


class ParamsError(FedmergeError):
    """State dicts that cannot be aligned or merged: a missing, extra, misshapen or non-finite tensor."""


class RoundError(FedmergeError):
    """A federated round with too few usable client replies."""


class RunDirectoryError(FedmergeError):
    """An output directory that is occupied, incomplete or unreadable."""


class ResourceError(FedmergeError):
    """A computation that this machine's memory does not hold."""
