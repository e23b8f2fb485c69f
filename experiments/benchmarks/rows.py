"""Rows of a measurement in a CSV file that grows: what is there is not measured again."""

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedmerge.errors import ConfigError


class Rows:
    """The rows measured so far.

    Attributes:
        path: The CSV file; its folder is made.
        keys: The columns that say which row it is.

    Raises:
        ConfigError: The file is no such table, or ends within a row.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self.read() if self._begun() else pd.DataFrame(columns=list(keys))
        if missing := [key for key in keys if key not in found]:
            raise ConfigError(f"{path} has no column {', '.join(missing)}; mend it, or begin another folder")
        self.done = {self._key(row) for row in found.to_dict("records")}

    def read(self) -> pd.DataFrame:
        """All rows, text that was empty as ``""``."""
        try:
            if not self.path.read_bytes().endswith(b"\n"):
                raise ValueError("it ends within a row")
            return pd.read_csv(self.path, keep_default_na=False)
        except ValueError as error:  # those of pandas, too
            raise ConfigError(
                f"{self.path} is damaged ({' '.join(str(error).split())}); take that line off, or begin another folder"
            ) from error

    def has(self, **row: Any) -> bool:
        """Whether a row with these keys has been measured."""
        return self._key(row) in self.done

    def first(self, **values: Any) -> dict[str, Any] | None:
        """The first row with these values."""
        rows = self.read() if self._begun() else pd.DataFrame(columns=list(values))
        for name, value in values.items():
            rows = rows[rows[name] == value]
        return None if rows.empty else dict(rows.iloc[0])

    def add(self, **row: Any) -> None:
        """Keep a row at once, and print it."""
        self.extend([row])

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows that belong together, all or none of them, and print the last.

        Raises:
            ConfigError: They have other columns than the file.
            OSError: The disk is full; the file is as it was.
        """
        frame, there = pd.DataFrame(rows), self._begun()
        if there and list(frame.columns) != (columns := list(pd.read_csv(self.path, nrows=0).columns)):
            raise ConfigError(f"{self.path} has the columns {', '.join(columns)}; a new row has {', '.join(frame)}")
        text = frame.to_csv(header=not there, index=False).encode()
        with self.path.open("ab", buffering=0) as file:  # one write: a process that is killed leaves no part of it
            size = file.tell()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, "no space for a whole row", str(self.path))
            except OSError:
                file.truncate(size)
                raise
        self.done.update(self._key(row) for row in rows)
        print("  ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)

    def sort(self, keys: Sequence[Mapping[str, Any]]) -> None:
        """Bring the rows into the order of their ``keys``; those of no key follow as they are."""
        place = {self._key(key): i for i, key in enumerate(keys)}
        rows = pd.read_csv(self.path, keep_default_na=False, dtype=str)
        places = [place.get(self._key(row), len(place)) for row in rows.to_dict("records")]
        part = self.path.with_suffix(".part")
        rows.iloc[np.argsort(places, kind="stable")].to_csv(part, index=False)
        part.replace(self.path)

    def _begun(self) -> bool:
        """Whether there is anything in the file."""
        return self.path.is_file() and self.path.stat().st_size > 0

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)
