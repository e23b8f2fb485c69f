"""The run directory: complete, readable at any moment, written atomically; no pickle."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as numpy_bytes
from safetensors.torch import load_file, save
from torch import Tensor

from fedmerge.errors import RunDirectoryError
from fedmerge.files import read_text
from server._costs import Costs
from server.callbacks import Callback
from server.config import LABELS, RunConfig
from server.records import Env, Kept, Row, Summary

_ASKED = "checkpoint/asked.json"
_CHECKPOINT = "checkpoint/last.safetensors"
_PACKAGES = ("fedmerge", "flwr", "ray", "torch", "torchvision", "numpy", "scipy", "pandas")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """The folder ``path``, for this process alone while the block lasts; made if it is not there.

    The system's lock on the folder itself: no file of its own, and none is left when a process is killed. Where a file
    system knows no such lock, nobody is kept out.

    Raises:
        RunDirectoryError: Another process holds it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = -1
    with suppress(OSError):  # whoever writes there says why it cannot be
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if lock >= 0 and _taken(lock):
            raise RunDirectoryError(
                f"another process is at work in {path}; wait until it has ended, or choose another --out"
            )
        yield
    finally:
        if lock >= 0:
            os.close(lock)
        for folder in made:
            with suppress(OSError):  # something was written there
                folder.rmdir()


def _taken(lock: int) -> bool:
    """Lock an open folder, or say that another has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    return False


class RunDirectory(Callback):
    """The files of one run, written as it goes.

    Attributes:
        config: What is run; None of a folder that is only read.
        made_of: What the run is made of beside its configuration (:func:`fedmerge.provenance.made_of`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: RunConfig | None = None
        self.made_of: Mapping[str, str] = {}
        self.started = time.time()

    @classmethod
    def open(cls, path: Path, config: RunConfig, *, resume: bool = False) -> "RunDirectory":
        """Take an empty or new folder for a run, or the folder of the same run when resuming.

        A folder whose run failed before it measured anything is as good as an empty one.

        Raises:
            RunDirectoryError: The folder holds something else, of which nothing is touched, or cannot be written.
        """
        found, config = cls(path), config.resolved()
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file; give a folder with --out")
        try:
            if path.is_dir() and any(path.iterdir()):
                config = found._check(config, resume=resume)
            found.config = config
            path.mkdir(parents=True, exist_ok=True)
            found.write_text("config.toml", config.to_toml())
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
        return found

    def _check(self, config: RunConfig, *, resume: bool) -> RunConfig:
        """Refuse a folder that holds what ``config`` may not continue; leave nothing of a run that came to nothing.

        Returns:
            The configuration with what the run was called before, unless it is called something now.
        """
        path = self.path
        if not (path / "config.toml").is_file():
            raise RunDirectoryError(f"{path} holds files that are no run; choose another --out")
        told = self._told() if resume else None
        if self.status.startswith("failed") and not self._lines() and not (path / _CHECKPOINT).exists():
            for name in ("summary.json", "env.json", *(() if resume else (_ASKED,))):
                (path / name).unlink(missing_ok=True)
            if told is None:
                return config
        elif not resume:
            raise RunDirectoryError(f"{path} already holds a run; choose another --out, or --resume to continue it")
        written = RunConfig.read(path / "config.toml")
        before = told or written
        edited = before.differences(written)
        for key, (there, here) in before.differences(config).items():
            if key in edited and (key != "rounds" or before.dp_epsilon != -1):
                raise RunDirectoryError(
                    f"{path / 'config.toml'} was edited after clients had been asked: {key} = {there!r} then, "
                    f"{edited[key][1]!r} now; put that back, or choose another --out"
                )
            if key != "rounds" or self.finished:
                raise RunDirectoryError(
                    f"{path} holds another run: {key} = {there!r} there, {here!r} here; choose another --out, or "
                    "leave out all other options to continue it as it is"
                )
            if before.dp_epsilon != -1:
                raise RunDirectoryError(
                    f"{path} holds a run whose noise was chosen so that {there} rounds spend dp-epsilon = "
                    f"{before.dp_epsilon:g}, and rounds = {here} here; leave out rounds, or choose another --out"
                )
            if here <= (done := self._rounds_done()):
                raise RunDirectoryError(
                    f"{path} holds a run with {done} finished rounds, and rounds = {here} here; give more rounds than "
                    "that, or choose another --out"
                )
        return config.model_copy(update={key: getattr(config, key) or getattr(before, key) for key in LABELS})

    def write_text(self, name: str, text: str) -> None:
        """Write a file so that a reader sees the old or the new one, never half."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """As :meth:`write_text`."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def keep(self, name: str, params: Mapping[str, Tensor]) -> None:
        """Write a state dict as safetensors."""
        self.write_bytes(name, save({k: v.detach().cpu().contiguous() for k, v in params.items()}))

    def row(self, row: Row) -> None:
        """Append one line to ``metrics.jsonl``."""
        known = {key: None if value != value else value for key, value in asdict(row).items()}  # JSON has no NaN
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")

    def end(self, summary: Summary, costs: Costs) -> None:
        """Write ``env.json`` and, last of all, ``summary.json``."""
        env = Env(
            versions={"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
            device=torch.cuda.get_device_name() if costs.device == "cuda" else _cpu(),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            threads=torch.get_num_threads(),
            commit=_commit(),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            seconds=round(time.time() - self.started, 1),
            server_seconds=costs.server_seconds,
            peak_memory=costs.peak_memory,
            command=" ".join(["fedmerge", *sys.argv[1:]]) if Path(sys.argv[0]).name == "fedmerge" else None,
            made_of=self.made_of,
        )
        self._write_record("env.json", env)
        self._write_record("summary.json", summary)
        if summary.status == "finished":
            self.finish()

    def finish(self) -> None:
        """A finished run needs no checkpoint."""
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def after_round(
        self,
        server_round: int,
        params: Mapping[str, Tensor],
        state: Mapping[str, np.ndarray],
        kept: Kept,
    ) -> None:
        """Keep all that is needed to go on after ``server_round``; replaces the checkpoint before.

        One file holds everything, so a kill at any moment leaves the old or the new checkpoint.
        """
        tensors = {f"model/{k}": v.detach().cpu().contiguous().numpy() for k, v in params.items()}
        tensors |= {f"server/{k}": np.asarray(v, order="C") for k, v in state.items()}
        # Safetensors sorts names; strategies go by position, so the order is kept apart.
        header = {"round": server_round, "metrics": self._lines(), "order": list(tensors), "kept": asdict(kept)}
        header |= self._configured()
        self.write_bytes(_CHECKPOINT, numpy_bytes(tensors, {"fedmerge": json.dumps(header)}))

    def asked(self, server_round: int, clients: Mapping[int, int], ever: Mapping[int, int]) -> None:
        """Keep, before they are, whom a round asks and how often: a round that is cut off has told what it has told."""
        found = {"round": server_round, "clients": [*clients.items()], "ever": [*ever.items()], **self._configured()}
        self.write_text(_ASKED, json.dumps(found) + "\n")

    def asked_before(self, server_round: int) -> tuple[Counter[int], Counter[int]]:
        """Whom ``server_round`` has asked already, before it was cut off, and whom all rounds together have.

        Raises:
            RunDirectoryError: The file that says so cannot be read.
        """
        found = self._last_asked()
        now = found.get("clients", ()) if found.get("round") == server_round else ()
        return Counter(dict(now)), Counter(dict(found.get("ever", ())))

    def _last_asked(self) -> dict[str, Any]:
        """What was noted last before a round asked; empty if nothing was."""
        file = self.path / _ASKED
        if not file.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(read_text(file))
            int(found["round"]), dict(found["clients"]), dict(found.get("ever", ()))
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunDirectoryError(
                f"{file} cannot be read ({error}); remove it to begin again, whose account then lacks a round"
            ) from error

    def _configured(self) -> dict[str, Any]:
        return {} if self.config is None else {"config": self.config.flat(), "made of": dict(self.made_of)}

    def _told(self) -> RunConfig | None:
        """The configuration by which the rounds so far were run; None where nothing goes on or an old one does."""
        found = self._noted().get("config")
        return None if found is None else RunConfig.parse(found, str(self.path / "checkpoint"))

    def _noted(self) -> dict[str, Any]:
        """What the rounds so far have noted of themselves."""
        if (self.path / _CHECKPOINT).is_file():
            with self._checkpoint() as (_, header):
                return header
        return self._last_asked()

    def resume(self) -> tuple[int, dict[str, Tensor], dict[str, np.ndarray], Kept] | None:
        """The last checkpoint: round, global network, the strategy's arrays, what was kept; None if there is none.

        Lines that were written after the checkpoint are cut off, because those rounds run again; so are the networks of
        clients, which are those of the last round, and what a former end has written.

        Raises:
            RunDirectoryError: The checkpoint cannot be read, lines that it counts are gone, or its rounds were made of
                something else than :attr:`made_of`.
        """
        metrics = self.path / "metrics.jsonl"
        noted = self._noted().get("made of", {})
        for part, digest in self.made_of.items():
            if noted.get(part, digest) != digest:
                raise RunDirectoryError(
                    f"{self.path} was begun with another {part} than now; put that back, or choose another --out"
                )
        for name in ("summary.json", "env.json", "model.safetensors", "averaged.safetensors"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "clients", ignore_errors=True)
        if not (self.path / _CHECKPOINT).is_file():
            metrics.unlink(missing_ok=True)
            return None
        with self._checkpoint() as (opened, header):
            tensors = {name: opened.get_tensor(name) for name in header["order"]}
            kept = TypeAdapter(Kept).validate_python(header["kept"])
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
        if len(lines) < header["metrics"]:
            raise RunDirectoryError(
                f"{metrics} has {len(lines)} of the {header['metrics']} lines that the rounds before have written; put "
                f"it back, or remove {self.path / _CHECKPOINT} to begin again"
            )
        self.write_text("metrics.jsonl", "".join(lines[: header["metrics"]]))
        params = {k.removeprefix("model/"): torch.from_numpy(v) for k, v in tensors.items() if k.startswith("model/")}
        state = {k.removeprefix("server/"): v for k, v in tensors.items() if k.startswith("server/")}
        return int(header["round"]), params, state, kept

    @contextmanager
    def _checkpoint(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The checkpoint, opened, and its header; what does not fit while it is read is named."""
        file = self.path / _CHECKPOINT
        try:
            with safe_open(file, "numpy") as opened:
                yield opened, json.loads(opened.metadata()["fedmerge"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(f"{file} cannot be read ({error}); remove it to begin again") from error

    def _rounds_done(self) -> int:
        """How many rounds the checkpoint holds; 0 where there is none."""
        if not (self.path / _CHECKPOINT).is_file():
            return 0
        with self._checkpoint() as (_, header):
            return int(header["round"])

    @property
    def status(self) -> str:
        """What the summary says; empty where there is none that can be read."""
        try:
            return str(json.loads(read_text(self.path / "summary.json"))["status"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ""

    @property
    def finished(self) -> bool:
        """Whether all is there: the summary is written last, and a checkpoint goes after it."""
        return self.status == "finished" and not (self.path / _CHECKPOINT).exists()

    def failed(self, error: BaseException) -> None:
        """Say why a run ended so early that it wrote no summary itself."""
        if not (self.path / "summary.json").exists():
            status = f"failed: {str(error) or type(error).__name__}"
            self.write_text("summary.json", json.dumps({"status": status}) + "\n")

    def _write_record(self, name: str, record: Summary | Env) -> None:
        self.write_text(name, _spread(asdict(record)) + "\n")

    def _lines(self) -> int:
        file = self.path / "metrics.jsonl"
        return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def _spread(value: Any, depth: int = 1) -> str:
    """JSON on several lines; whatever holds no list or object is on one, as a row of a matrix."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(part, Mapping | list | tuple) for part in parts):
        return json.dumps(value)
    lines = [_spread(part, depth + 1) for part in parts]
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(key)}: {line}" for key, line in zip(value, lines, strict=True)]
    (first, last), gap = "{}" if isinstance(value, Mapping) else "[]", "\n" + " " * depth
    return f"{first}{gap}{f',{gap}'.join(lines)}{gap[:-1]}{last}"


def read_model(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file.

    Raises:
        RunDirectoryError: The file cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} cannot be read as safetensors: {error}") from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
