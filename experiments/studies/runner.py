"""Running a study: rows as they come, then its picture and its page. A study that was stopped goes on."""

import json
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from joblib import Parallel, delayed, parallel_config

from experiments.benchmarks.rows import Rows
from experiments.report.theme import png
from experiments.studies.page import page
from experiments.studies.study import Config, Study, Work
from fedmerge.errors import ConfigError, DataError, PartitionError
from fedmerge.progress import steps
from fedmerge.provenance import of_data
from fedmerge.tasks import device_of
from server import RunDirectory, held


def run(
    study: Study,
    config: Config,
    folder: Path,
    *,
    size: str,
    resume: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure the cells of ``study`` that ``folder`` does not hold yet, then draw and write its page.

    The folder then holds ``rows.csv``, ``study.json`` (what was run, with what), ``networks/``, ``NAME.png`` and
    ``NAME.md``. A cell is written at once, whole, with the CPU seconds that it took in ``cpu_seconds``.

    Args:
        study: What is asked.
        config: In which size, of which seeds and data.
        folder: Where everything is written.
        size: What the configuration is called.
        resume: Whether to go on with what the folder holds.
        jobs: How many processes share the cells, and the threads of this one: as many as the study has that are
            independent of each other (``study.apart``). The rows are the same, and in the same order.
        say: Hears what is going on.

    Returns:
        The page.

    Raises:
        ConfigError: ``jobs`` is below 1, or the folder is a file, or holds something else, or this study in another
            configuration than ``config`` with other seeds.
        DataError: The data set of the study cannot be had, or has too few images.
        RunDirectoryError: Another process is at work in ``folder``.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; give how many processes share the study, 1 or more")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder with --out")
    work = Work(folder, config.dataset, device_of("auto"), say)
    if config.dataset:
        say(f"{study.name}: {len(work.dataset.train)} images of {work.dataset.name}")
    if size == "default":
        say(f"cost: {study.cost}")
    with held(folder):
        record = _record(folder, study, config, size, resume, of_data(work.dataset) if config.dataset else "")
        try:
            _measure(study, config, work, jobs)
            (folder / "rows.lock").unlink(missing_ok=True)
        except PartitionError as error:
            raise DataError(
                f"study {study.name} at size {size} does not fit the {len(work.dataset.train)} images of "
                f"{config.dataset!r} ({error}); give another --dataset or size, and another --out"
            ) from error
        return write(study, record, folder)


def _measure(study: Study, config: Config, work: Work, jobs: int) -> None:
    """The cells that the folder does not hold yet; those that share work are measured by one of the processes."""
    keys = [cell.key for cell in study.make(config, work)]
    if not keys:
        raise ConfigError(f"study {study.name} has nothing to measure in this configuration: {config}")
    rows = Rows(work.folder / "rows.csv", tuple(keys[0]))
    missing = [i for i, key in enumerate(keys) if not rows.has(**key)]
    if jobs == 1:
        _cells(study, config, work, missing)
        return
    parts: dict[tuple[object, ...], list[int]] = {}
    for i in missing:
        parts.setdefault(tuple(keys[i].get(column) for column in study.apart), []).append(i)
    each = delayed(partial(_cells, study, config, replace(work, say=print)))
    with parallel_config("loky", inner_max_num_threads=max(1, torch.get_num_threads() // jobs)):
        done = Parallel(jobs, return_as="generator_unordered")(each(part) for part in parts.values())
        for _ in steps(study.name, done, len(parts)):
            pass
    rows.sort(keys)


def _cells(study: Study, config: Config, work: Work, chosen: Collection[int]) -> None:
    """Measure the chosen ones, each kept at once; none is held longer than that takes."""
    cells, path = iter(study.make(config, work)), work.folder / "rows.csv"
    lock, rows, at = FileLock(path.with_suffix(".lock")), None, -1
    for i in steps(study.name, sorted(chosen)):
        cell = next(islice(cells, i - at - 1, None))
        at, began = i, time.process_time()
        found = cell.measure()
        made = [found] if isinstance(found, Mapping) else list(found)
        spent = round((time.process_time() - began) / len(made), 3)
        with lock:
            rows = rows or Rows(path, tuple(cell.key))
            rows.extend([{**cell.key, **row, "cpu_seconds": spent} for row in made])


def write(study: Study, record: Mapping[str, Any], folder: Path) -> Path:
    """The picture and the page of the rows in ``folder``."""
    rows = Rows(folder / "rows.csv", ()).read()
    try:
        picture, text = png(study.draw(rows)), page(study, record, rows)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'rows.csv'} or study.json beside it does not hold what study {study.name} writes "
            f"({type(error).__name__}: {error}); mend it, or give another --out"
        ) from error
    (folder / f"{study.name}.png").write_bytes(picture)
    path = folder / f"{study.name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def as_begun(config: Config, folder: Path) -> Config:
    """``config`` with the seeds that the study in ``folder`` was begun and gone on with, if there is one.

    Raises:
        ConfigError: What says so is damaged.
    """
    found = _begun(folder / "study.json")
    return replace(config, seeds=tuple(found["config"]["seeds"])) if found else config


def _begun(path: Path) -> dict[str, Any]:
    """What ``study.json`` holds, if it is there; its seeds are whole numbers."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["config"]["seeds"] = [int(seed) for seed in found["config"]["seeds"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}); give another --out") from error
    return found


def _record(folder: Path, study: Study, config: Config, size: str, resume: bool, images: str) -> dict[str, Any]:
    """What stands in ``study.json``: as it was begun, with the seeds that came since; ``images`` is their digest."""
    path = folder / "study.json"
    begun = _begun(path)
    if begun:
        seeds = begun["config"]["seeds"]
        if not resume:
            raise ConfigError(f"{folder} holds study {begun.get('study')}; --resume goes on with it, --out begins anew")
        both = replace(config, seeds=tuple(dict.fromkeys([*seeds, *config.seeds])))
        now = json.loads(json.dumps(asdict(replace(both, seeds=tuple(seeds)))))
        if begun.get("study") != study.name or begun["config"] != now:
            differs = [key for key, value in now.items() if begun["config"].get(key) != value]
            raise ConfigError(
                f"{folder} holds study {begun.get('study')} at size {begun.get('size')}, not {study.name} at {size}"
                + (f" (they differ in {', '.join(differs)})" if differs else "")
                + "; give another --out"
            )
        if begun.get("data", images) != images:
            raise ConfigError(
                f"{folder} was begun on other images of {config.dataset!r} than there are now; put those back, or give "
                "another --out"
            )
        config = both
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no study; give another --out")
    found = begun or {
        "study": study.name,
        "size": size,
        "versions": {"python": platform.python_version(), "torch": version("torch"), "fedmerge": version("fedmerge")},
        "device": torch.cuda.get_device_name() if device_of("auto") == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "data": images,
    }
    found["config"] = json.loads(json.dumps(asdict(config)))
    RunDirectory(folder).write_text(path.name, json.dumps(found, indent=1) + "\n")
    return found
