"""What ``metrics.jsonl`` says, for TensorBoard: a curve per stage and split, clients as their mean."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any


class Events:
    """The event file of a run, ``events.out.tfevents.*``; steps are rounds, tags are as ``accuracy/test/merged``.

    It replaces the ones before and begins with what ``metrics.jsonl`` holds, so a resumed run has each point once.
    """

    def __init__(self, path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for before in path.glob("events.out.tfevents.*"):
            before.unlink()
        self._writer = SummaryWriter(str(path), flush_secs=10)
        self._clients: list[Mapping[str, Any]] = []  # of the round that is on
        metrics = path / "metrics.jsonl"
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
            self.add(json.loads(line))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line of ``metrics.jsonl``; clients' own test results are left to ``client-mean``."""
        if row["client"] is None:
            self._settle()
            self._write(row, row)
        elif row["split"] == "local":
            self._clients.append(row)

    def close(self) -> None:
        """Write what is left."""
        self._settle()
        self._writer.close()

    def _settle(self) -> None:
        if self._clients:
            self._write(self._clients[0], {k: fmean(r[k] for r in self._clients) for k in ("accuracy", "loss")})
            self._clients = []

    def _write(self, row: Mapping[str, Any], found: Mapping[str, float]) -> None:
        for name in ("accuracy", "loss"):
            self._writer.add_scalar(f"{name}/{row['split']}/{row['stage']}", found[name], row["round"])
