"""What this machine has, and how many clients train on it at once: measured on one real client."""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from fedmerge.memory import usable_cores, usable_memory

_GIB = 2**30
_SECONDS = 300


@dataclass(frozen=True)
class Finding:
    """One thing about this machine.

    Attributes:
        name: What was looked at.
        value: What was found.
        ok: True: as it should be. False: runs will fail. None: neither, good to know.
        hint: What to do about it, or ``""``.
    """

    name: str
    value: str
    ok: bool | None
    hint: str = ""


@dataclass(frozen=True)
class ClientCost:
    """What one client needs, in a process of its own as a Ray worker gives it.

    Attributes:
        work: What it trained.
        seconds: Wall time of that training once everything is loaded.
        memory: Most resident memory of the process, in bytes.
        gpu_memory: GPU memory it took, its context included, in bytes; 0 without a GPU.
    """

    work: str
    seconds: float
    memory: int
    gpu_memory: int = 0


def diagnose(*, measure: bool = True) -> list[Finding]:
    """Look at software, processors, memory and data; with ``measure``, train one client too (some seconds).

    Nothing is downloaded and nothing is left behind. A part that is missing or broken is a finding, not an error.
    """
    findings = [
        Finding(
            "Python",
            platform.python_version(),
            sys.version_info >= (3, 11),
            "" if sys.version_info >= (3, 11) else "fedmerge needs Python 3.11 or newer",
        ),
        *(_package(name, module, install) for name, module, install in _PACKAGES),
        *_processors(),
    ]
    if all(finding.ok is not False for finding in findings):
        findings += _data()
        if measure:
            findings += _clients()
    return findings


def measure_client(dataset: str = "digits", model: str = "mlp", *, device: str = "auto") -> ClientCost:
    """Train one client for one pass over its images in a fresh process with one thread, and see what it takes.

    Raises:
        RuntimeError: the client failed; the message is its own last line.
    """
    before = _free_gpu_memory() if device != "cpu" else 0
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from experiments.tools.doctor import train_here; train_here()",
                dataset,
                model,
                device,
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"one pass over one client's images took more than {_SECONDS} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1])
    said = json.loads(done.stdout.splitlines()[-1])
    free = said.pop("gpu_free")
    return ClientCost(**said, gpu_memory=max(0, before - free) if free else 0)


def train_here() -> None:
    """The process of :func:`measure_client`: train the client that the arguments name, print the cost as JSON."""
    import resource

    import torch

    from fedmerge.tasks import ClientTask, device_of

    dataset, model, device = sys.argv[1:4]
    torch.set_num_threads(1)
    task = ClientTask(dataset=dataset, model=model, device=device_of(device))
    images = task.split().client(0)
    task.train(0, {})  # what is loaded or compiled on first use is no part of the time
    started = time.perf_counter()
    task.train(0, {})
    cost = {
        "work": f"{model}, one pass over {len(images):,} images of {dataset}",
        "seconds": round(time.perf_counter() - started, 3),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "gpu_free": torch.cuda.mem_get_info()[0] if task.device == "cuda" else 0,
    }
    print(json.dumps(cost))


def clients_at_once(cost: ClientCost, *, cores: int, memory: int, gpu_memory: int = 0) -> int:
    """How many such clients fit: one per core, all of them and the server in memory, all on the GPU if used.

    Args:
        cost: What one client needs.
        cores: Cores for clients.
        memory: Free memory in bytes; the server is given as much of it as one client.
        gpu_memory: Free GPU memory in bytes.

    Returns:
        A number of clients, 0 where not even one fits.
    """
    limits = [cores, memory // max(cost.memory, 1) - 1]
    if cost.gpu_memory:
        limits.append(gpu_memory // cost.gpu_memory)
    return max(0, min(limits))


def gpu_share(cost: ClientCost, gpu_memory: int) -> float:
    """The fraction of a GPU to give each client (Ray's ``num_gpus``): its memory, rounded up to a thousandth."""
    return min(1.0, math.ceil(1000 * cost.gpu_memory / gpu_memory) / 1000) if gpu_memory else 0.0


def render(findings: Sequence[Finding]) -> Table:
    """The findings for the terminal: a mark, what, how, and under it what to do."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = {True: ("ok", "green"), False: ("no", "bold red"), None: ("--", "dim")}[finding.ok]
        value = Text(finding.value)
        if finding.hint:
            value.append(f"\n{finding.hint}", style="dim" if finding.ok is not False else "yellow")
        table.add_row(Text(mark, style=style), Text(finding.name), value)
    return table


_PACKAGES = (
    ("fedmerge", "fedmerge", "pip install fedmerge"),
    ("PyTorch", "torch", "pip install torch; https://pytorch.org says which build fits which GPU"),
    ("Ray", "ray", 'pip install "flwr[simulation]"'),
    ("Flower", "flwr", 'pip install "flwr[simulation]"'),
)


def _package(name: str, module: str, install: str) -> Finding:
    """Whether ``module`` is installed and can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        return Finding(name, f"cannot be imported: {type(error).__name__}: {error}", False, install)
    try:
        return Finding(name, importlib.metadata.version(module), True)
    except importlib.metadata.PackageNotFoundError:
        where = Path(found.__file__ or "").parent
        return Finding(name, f"imported from {where}", None, "not installed; pip install . makes it so")


def _processors() -> Iterator[Finding]:
    """Cores, threads, memory and GPUs."""
    cores, memory = usable_cores(), usable_memory()
    there = os.cpu_count() or cores
    yield Finding("Cores", f"{cores}" if cores == there else f"{cores} usable of {there}", True)
    yield Finding(
        "Memory",
        f"{memory / _GIB:.1f} GiB free",
        memory > 2 * _GIB,
        "" if memory > 2 * _GIB else "Ray and two clients need about 2 GiB",
    )
    try:
        import torch
    except Exception:  # reported with the packages
        return
    yield Finding("Threads of PyTorch", f"{torch.get_num_threads()} here, 1 in each client", None)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "" if torch.version.cuda else "; this build of PyTorch has no CUDA"
        yield Finding("GPU", f"none{built}", None, "clients train on processor cores, one each")
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding(f"GPU {i}", f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free", True)


def _data() -> Iterator[Finding]:
    """Where data sets are looked for, which are there, and where decoded images go."""
    from fedmerge import data
    from fedmerge.data import cache_folder, parquet_source

    given = os.environ.get("FEDMERGE_DATA")
    root = Path(given) if given else None
    if root is None:
        yield Finding("FEDMERGE_DATA", "not set", None, "set it to a folder with NAME/train-*.parquet to work offline")
    elif root.is_dir():
        yield Finding("FEDMERGE_DATA", str(root), True)
    else:
        yield Finding("FEDMERGE_DATA", f"{root} is no folder", False, "set it to an existing folder, or unset it")
    for name in data.names():
        if name == "digits":
            yield Finding(f"Data: {name}", "comes with scikit-learn", True)
        elif root is not None and (source := parquet_source(root / name)) is not None:
            size = sum(file.stat().st_size for file in source.files)
            yield Finding(f"Data: {name}", f"{len(source.files)} files, {size / 1e6:.0f} MB, in {root / name}", True)
        else:
            yield Finding(f"Data: {name}", "not on this machine; downloaded when it is asked for", None)
    folder = cache_folder()
    place = next(f for f in (folder, *folder.resolve().parents) if f.exists())
    free = f"{folder}, {shutil.disk_usage(place).free / _GIB:.1f} GiB free"
    if place.is_dir() and _writable(place):
        yield Finding("Cache", free, True)
    else:
        yield Finding("Cache", f"{free}, cannot be written", False, "set FEDMERGE_CACHE to a folder of your own")


def _clients() -> Iterator[Finding]:
    """One measured client, and how many of them fit."""
    try:
        cost = measure_client()
    except RuntimeError as error:
        yield Finding("One client", f"failed: {error}", False, "try `fedmerge run --clients 1` to see it whole")
        return
    took = f"{cost.seconds:.2f} s and {cost.memory / _GIB:.2f} GiB"
    if cost.gpu_memory:
        took += f", {cost.gpu_memory / _GIB:.2f} GiB of GPU memory"
    yield Finding("One client", f"{took} for {cost.work}", True)
    cores, memory, gpu = usable_cores(), usable_memory(), _free_gpu_memory()
    fit = clients_at_once(cost, cores=cores, memory=memory, gpu_memory=gpu)
    share = f", each with {gpu_share(cost, gpu):g} of a GPU" if cost.gpu_memory else ""
    yield Finding(
        "Clients at once",
        f"{fit}{share}",
        fit > 0,
        "larger networks and data sets take more; the rest waits its turn" if fit else "free some memory",
    )


def _free_gpu_memory() -> int:
    """Free bytes of the first GPU, 0 without one."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def _writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``; tried, because permissions alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
