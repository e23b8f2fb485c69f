"""Runs in MLflow, from their files: the configuration as parameters, stages over rounds as metrics, files as artifacts.

Where to is MLflow's own business (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and the others of its variables).
A folder of runs becomes a run with its report, and each of its runs one below it. What MLflow has already is not logged
again, so the same folder may be logged whenever it has grown.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.records.results import costs
from experiments.records.runs import Run, find
from fedmerge.errors import ConfigError, FedmergeError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_TAG = "fedmerge.run"  # what is logged under it is complete
_LEFT_OUT = ("clients", "checkpoint", "cells", "shared")


class Tracker:
    """MLflow, reached.

    Raises:
        ConfigError: MLflow is not installed.
        FedmergeError: Its store does not answer.
    """

    def __init__(self) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError('--mlflow needs MLflow, and there is none: pip install "fedmerge[mlflow]"') from error
        self._mlflow: Any = mlflow
        with self._named_errors():
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedmerge")
            self._experiment = mlflow.set_experiment(name).experiment_id
            self._client: Any = mlflow.MlflowClient()

    def log(self, path: Path, runs: Sequence[Run] | None = None) -> None:
        """Log the run at ``path``, or all runs of that folder, or those ``runs`` whose report is there.

        Raises:
            FedmergeError: The store refuses; what is in ``path`` stays as it is.
        """
        runs = find(path) if runs is None else runs
        with self._named_errors():
            if (path / "config.toml").is_file():
                self._log(runs[0])
                return
            key = _key(path)
            above = self._logged(key) or self._create(path, {_TAG: key})
            for run in runs:
                self._log(run, {"mlflow.parentRunId": above})
            self._files(above, path)
            self._client.set_terminated(above)

    def _log(self, run: Run, tags: dict[str, str] | None = None) -> None:
        env = run.env or {}
        key = _key(run.path, env.get("started"), run.status)
        if self._logged(key) is not None:
            return
        began = datetime.fromisoformat(env["started"]) if "started" in env else datetime.now(UTC)
        start = round(1000 * began.timestamp())
        end = start + round(1000 * env.get("seconds", 0))
        logged = self._create(run.path, {**(tags or {}), "fedmerge.status": run.status}, start)
        entities = self._mlflow.entities
        params = [entities.Param(name, str(value)) for name, value in run.config.items()]
        took = [entities.Metric(name, value, end, 0) for name, value in costs(run).items() if value is not None]
        self._client.log_batch(logged, metrics=took, params=params)
        m = run.metrics[run.metrics["client"].isna() | (run.metrics["split"] == "local")]
        means = m.groupby(["round", "split", "stage"], sort=False)[["accuracy", "loss"]].mean()
        for step, of_round in means.groupby("round"):
            metrics = [
                entities.Metric(f"{name}/{split}/{stage}", value, end, int(step))
                for (_, split, stage), row in of_round.iterrows()
                for name, value in row.dropna().items()
            ]
            self._client.log_batch(logged, metrics=metrics)
        self._files(logged, run.path)
        self._client.set_tag(logged, _TAG, key)
        self._client.set_terminated(logged, "FINISHED" if run.finished else "FAILED", end)

    def _create(self, path: Path, tags: dict[str, str], start: int | None = None) -> str:
        created = self._client.create_run(self._experiment, start, tags, path.resolve().name)
        return str(created.info.run_id)

    def _logged(self, key: str) -> str | None:
        """The run under that key."""
        found = self._client.search_runs([self._experiment], f"tags.`{_TAG}` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _files(self, logged: str, path: Path) -> None:
        """Log what lies in ``path``, without the networks of clients and without other runs."""
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") or part in _LEFT_OUT for part in inside.parts):
                self._client.log_artifact(logged, str(file), str(inside.parent) if inside.parent.parts else None)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except self._mlflow.exceptions.MlflowException as error:
            raise FedmergeError(f"MLflow ({self._mlflow.get_tracking_uri()}): {error}") from error


def _key(path: Path, *about: object) -> str:
    return hashlib.blake2b(repr((str(path.resolve()), *about)).encode(), digest_size=12).hexdigest()
