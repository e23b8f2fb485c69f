"""Local training shared between the runs of a grid: what a client was asked before is answered from a file.

A client keeps no state, so its answer is a function of its partition id and of the message it gets. Runs that differ
only in what the server makes of the answers send equal messages, in a one-shot comparison all of them. The file of an
answer is named by a hash of everything in the message; whatever makes a difference to a client makes another file.
The seconds in an answer are those of the training that made it. Only what can be asked again is kept, so the files
take less than those that the runs themselves keep of their clients.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  (before Flower, which converts arrays only if torch is loaded)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clients.app import partition_id
from fedmerge.beside import beside
from fedmerge.provenance import made_of
from fedmerge.secure import Terms
from fedmerge.tasks import CONFIG, ClientTask
from server import RunConfig

_KINDS = {kind.__name__: kind for kind in (ConfigRecord, MetricRecord)}


class SharedTraining(ClientApp):
    """The ClientApp ``app`` with its answers to training messages kept in ``folder``.

    On several machines the folder is shared where their file system is; elsewhere each machine keeps its own.

    Attributes:
        rounds: Task -> the last round whose answers are kept, see :func:`common_rounds`.
    """

    def __init__(self, app: ClientApp, folder: Path, rounds: Mapping[ClientTask, int]) -> None:
        super().__init__()
        self.app, self.folder, self.rounds = app, folder.resolve(), rounds

    def __reduce__(self) -> tuple[Any, ...]:
        """As fedmerge's ClientApp: a worker finds it, whatever lies in the user's directory."""
        return beside, ("experiments.launch.sharing:SharedTraining", self.app, self.folder, self.rounds)

    def __call__(self, message: Message, context: Context) -> Message:
        """As Flower's."""
        if not self._may_come_again(message):
            return self.app(message, context)
        told = message.content[CONFIG]
        made = made_of(ClientTask.from_config(told), told.values())
        file = self.folder / f"{_key(message.content, partition_id(context), made)}.safetensors"
        known = _read(file)
        if known is not None:
            return Message(content=known, reply_to=message)
        reply = self.app(message, context)
        if not reply.has_error():
            _write(file, reply)
        return reply

    def _may_come_again(self, message: Message) -> bool:
        if message.metadata.message_type.split(".")[0] != "train":
            return False
        content: Any = message.content
        if Terms.from_config(content[CONFIG]) is not None:  # its answer is a key for one sum
            return False
        task = ClientTask.from_config(content[CONFIG])
        return task.server_round <= self.rounds.get(replace(task, server_round=1), 0)


def common_rounds(configs: Iterable[RunConfig]) -> dict[ClientTask, int]:
    """The task of a run -> up to which round another of ``configs`` asks its clients the same.

    That is the first round where only the server does something else, and all rounds of the shorter run where
    two differ in nothing but their number. FedAvg as a control counts as a run of its own. Tasks of a single run are
    left out.
    """
    runs: dict[ClientTask, list[RunConfig]] = {}
    for config in chain.from_iterable(map(_asking, configs)):
        runs.setdefault(config.client_task(), []).append(config)
    found = {}
    for task, same in runs.items():
        if len(same) > 1:
            by_length: dict[RunConfig, list[int]] = {}
            for config in same:
                by_length.setdefault(config.model_copy(update={"rounds": 1}), []).append(config.rounds)
            found[task] = max([1, *(sorted(lengths)[-2] for lengths in by_length.values() if len(lengths) > 1)])
    return found


def _asking(config: RunConfig) -> list[RunConfig]:
    """The runs that ask a run's clients: itself, and FedAvg where that is another and its control."""
    if config.is_fedavg:
        return [config.fedavg()]
    return [config, config.fedavg()] if "fedavg" in config.control_names() else [config]


def _key(content: RecordDict, client: int, made: Mapping[str, str]) -> str:
    """What decides the answer of ``client``: all that it is told, its images, its code."""
    versions = [version(package) for package in ("fedmerge", "torch")]
    digest = hashlib.blake2b(f"client {client} {versions} {sorted(made.items())}".encode(), digest_size=20)
    for name, record in content.items():
        digest.update(f"\n{name}: {type(record).__name__}".encode())
        for key, value in record.items():
            if isinstance(value, Array):
                digest.update(f"\n{key}: {value.dtype} {value.shape} {value.stype} ".encode())
                digest.update(value.data)
            else:
                digest.update(f"\n{key}: {value!r}".encode())
    return digest.hexdigest()


def _read(file: Path) -> RecordDict | None:
    """The answer in ``file``; None where there is none, or none that can be read (a machine may have lost power)."""
    try:
        with safe_open(file, "numpy") as opened:
            records = json.loads(opened.metadata()["records"])
            content = RecordDict()
            for i, (name, kind, values) in enumerate(records):
                if kind in _KINDS:
                    content[name] = _KINDS[kind](values)
                else:
                    content[name] = ArrayRecord({key: Array(opened.get_tensor(f"{i}/{key}")) for key in values})
    except (OSError, SafetensorError):
        return None
    return content


def _write(file: Path, reply: Message) -> None:
    """Keep an answer. One that is not worth keeping, or does not read back as it was, is simply computed again."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    # A full disk is reported by the run itself; what is wrong with an answer of a faulty ClientApp, by the server.
    with contextlib.suppress(Exception):
        packed = _packed(reply.content)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(packed)
        if _read(temporary) == reply.content:
            temporary.replace(file)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _packed(content: RecordDict) -> bytes:
    """The bytes of a file that :func:`_read` reads; an exception of any kind for what does not fit into one."""
    tensors: dict[str, np.ndarray] = {}
    records: list[tuple[str, str, Any]] = []
    for i, (name, record) in enumerate(content.items()):
        if isinstance(record, ArrayRecord):
            tensors |= {f"{i}/{key}": np.asarray(array.numpy(), order="C") for key, array in record.items()}
            records.append((name, "ArrayRecord", list(record)))
        else:
            records.append((name, type(record).__name__, dict(record)))
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("the server will refuse it; another try may fare better")
    return save(tensors, {"records": json.dumps(records)})
