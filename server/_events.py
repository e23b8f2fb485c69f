"""What ``metrics.jsonl`` says, for TensorBoard: a curve per stage and split, clients as their mean."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from server._costs import Costs
from server.callbacks import Callback
from server.records import Row, Summary


class Events(Callback):
    """The event file of a run, ``events.out.tfevents.*``; steps are rounds, tags are as ``accuracy/test/merged``.

    It replaces the ones before and begins with what ``metrics.jsonl`` holds, so a resumed run has each point once.
    """

    _writer: Any = None

    def begin(self, path: Path) -> None:
        """Write anew what stands in ``metrics.jsonl``."""
        from torch.utils.tensorboard import SummaryWriter

        for before in path.glob("events.out.tfevents.*"):
            before.unlink()
        self._writer = SummaryWriter(str(path), flush_secs=10)
        self._clients: list[Row] = []  # of the round that is on
        metrics = path / "metrics.jsonl"
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
            self.row(Row(**json.loads(line)))

    def row(self, row: Row) -> None:
        """Add a row; clients' own test results are left to ``client-mean``."""
        if row.client is None:
            self._settle()
            self._write(row, row.loss, row.accuracy)
        elif row.split == "local":
            if self._clients and (row.round, row.stage) != (self._clients[0].round, self._clients[0].stage):
                self._settle()
            self._clients.append(row)

    def end(self, summary: Summary, costs: Costs) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._settle()
            self._writer.close()

    def _settle(self) -> None:
        if self._clients:
            loss, accuracy = fmean(r.loss for r in self._clients), fmean(r.accuracy for r in self._clients)
            self._write(self._clients[0], loss, accuracy)
            self._clients = []

    def _write(self, row: Row, loss: float, accuracy: float) -> None:
        for name, value in (("accuracy", accuracy), ("loss", loss)):
            if not math.isnan(value):
                self._writer.add_scalar(f"{name}/{row.split}/{row.stage}", value, row.round)
