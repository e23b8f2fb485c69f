"""Rows of a measurement in a CSV file that grows: what is there is not measured again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedmerge.errors import ConfigError


class Rows:
    """The rows measured so far.

    Attributes:
        path: The CSV file; its folder is made.
        keys: The columns that say which row it is.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.read().to_dict("records") if path.is_file() else []
        self.done = {self._key(row) for row in rows}

    def read(self) -> pd.DataFrame:
        """All rows, text that was empty as ``""``."""
        return pd.read_csv(self.path, keep_default_na=False)

    def has(self, **row: Any) -> bool:
        """Whether a row with these keys has been measured."""
        return self._key(row) in self.done

    def add(self, **row: Any) -> None:
        """Keep a row at once, and print it."""
        self.extend([row])

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows that belong together, all or none of them, and print the last.

        Raises:
            ConfigError: They have other columns than the file.
        """
        frame, there = pd.DataFrame(rows), self.path.is_file()
        if there and list(frame.columns) != (columns := list(pd.read_csv(self.path, nrows=0).columns)):
            raise ConfigError(f"{self.path} has the columns {', '.join(columns)}; a new row has {', '.join(frame)}")
        with self.path.open("ab", buffering=0) as file:  # one write: a process that is killed leaves no part of it
            file.write(frame.to_csv(header=not there, index=False).encode())
        self.done.update(self._key(row) for row in rows)
        print("  ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)
