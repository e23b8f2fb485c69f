"""Local training shared between the runs of a grid: what a client was asked before is answered from a file.

A client keeps no state, so its answer is a function of its partition id and of the message it gets. Runs that differ
only in what the server makes of the answers send equal messages, in a one-shot comparison all of them. The file of an
answer is named by a hash of everything in the message; whatever makes a difference to a client makes another file.
The seconds in an answer are those of the training that made it.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  (before Flower, which converts arrays only if torch is loaded)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clients.app import partition_id

_KINDS = {kind.__name__: kind for kind in (ConfigRecord, MetricRecord)}


class SharedTraining(ClientApp):
    """The ClientApp ``app`` with its answers to training messages kept in ``folder``.

    On several machines the folder is shared where their file system is; elsewhere each machine keeps its own.
    """

    def __init__(self, app: ClientApp, folder: Path) -> None:
        super().__init__()
        self.app, self.folder = app, folder.resolve()

    def __call__(self, message: Message, context: Context) -> Message:
        """As Flower's."""
        if message.metadata.message_type.split(".")[0] != "train":
            return self.app(message, context)
        file = self.folder / f"{_key(message.content, partition_id(context))}.safetensors"
        known = _read(file)
        if known is not None:
            return Message(content=known, reply_to=message)
        reply = self.app(message, context)
        if not reply.has_error():
            _write(file, reply.content)
        return reply


def _key(content: RecordDict, client: int) -> str:
    digest = hashlib.blake2b(f"client {client}".encode(), digest_size=20)
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


def _write(file: Path, content: RecordDict) -> None:
    """Keep an answer. One that is not worth keeping, or cannot be kept, is simply computed again."""
    tensors: dict[str, np.ndarray] = {}
    records: list[tuple[str, str, Any]] = []
    for i, (name, record) in enumerate(content.items()):
        if isinstance(record, ArrayRecord):
            tensors |= {f"{i}/{key}": np.asarray(array.numpy(), order="C") for key, array in record.items()}
            records.append((name, "ArrayRecord", list(record)))
        else:
            records.append((name, type(record).__name__, dict(record)))
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        return  # the server will refuse it; another try may fare better
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(tensors, {"records": json.dumps(records)}))
        temporary.replace(file)
    except (OSError, TypeError):  # a full disk is reported by the run itself; bytes in a config are not for JSON
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
