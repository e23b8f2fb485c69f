"""The runs of a grid on one Ray runtime: each once, finished ones never again, failed ones reported at the end."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clients.app import app as fedmerge_client_app
from experiments.grids.files import Cell
from experiments.launch.sharing import SharedTraining, common_rounds
from experiments.launch.simulation import Resources, simulate
from experiments.records.runs import is_run
from fedmerge.errors import RunDirectoryError
from server import Callback, RunConfig, RunDirectory, held

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    resources: Resources | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    client_app: "ClientApp | None" = None,
    verbose: bool = False,
) -> dict[str, str]:
    """Run every cell that is not finished, each into ``out/cells/NAME``; Ray starts once.

    Cells whose clients are asked the same train them once: the answers are kept in ``out/shared`` until every cell
    is finished.

    Returns:
        The cells that failed, by name, and why. When resumed, they are tried again.

    Raises:
        RunDirectoryError: Another process is at work in ``out``; it holds runs already and ``resume`` is false, or
            runs of another grid, or is itself a run or a file.
        FedmergeError: A cell cannot run (said before the first begins), or the disk is full.
    """
    with held(out):
        return _run(cells, out, resources, callbacks, resume=resume, client_app=client_app, verbose=verbose)


def _run(
    cells: Sequence[Cell], out: Path, resources: Resources | None, callbacks: Sequence[Callback], *, resume: bool,
    client_app: "ClientApp | None", verbose: bool,
) -> dict[str, str]:  # fmt: skip
    folder = out / "cells"
    _same_grid(cells, out, resume=resume)
    waiting = [(cell.config, folder / cell.name) for cell in cells if not RunDirectory(folder / cell.name).finished]
    failed: dict[str, str] = {}

    def on_end(path: Path, error: Exception | None) -> None:
        if error is None:
            return
        failed[path.name] = str(error) or type(error).__name__
        RunDirectory(path).failed(error)

    if waiting:
        # Of all cells, also finished ones: what they asked may still be there for one that failed.
        rounds = common_rounds([cell.config for cell in cells])
        simulate(
            waiting,
            resources=resources,
            callbacks=callbacks,
            resume=resume,
            client_app=SharedTraining(client_app or fedmerge_client_app, out / "shared", rounds),
            on_end=on_end,
            verbose=verbose,
        )
    if not failed:
        shutil.rmtree(out / "shared", ignore_errors=True)
    return failed


def _same_grid(cells: Sequence[Cell], out: Path, *, resume: bool) -> None:
    """Refuse a folder with runs that are not of this grid; runs that the grid has beyond them are welcome."""
    if out.exists() and not out.is_dir():
        raise RunDirectoryError(f"{out} is a file; give a folder with --out")
    if is_run(out):
        raise RunDirectoryError(f"{out} is a run, whose folder has no room for a grid; choose another --out")
    configs = {cell.name: cell.config for cell in cells}
    present = sorted(path for path in (out / "cells").glob("*") if path.is_dir())
    if present and not resume:
        raise RunDirectoryError(f"{out} already holds runs; choose another --out, or --resume to finish them")
    for path in present:
        if path.name not in configs:
            raise RunDirectoryError(
                f"{out} holds runs of another grid: {path.name} is there and not in this one; choose another --out"
            )
        if not (path / "config.toml").exists():  # killed while it was written: nothing else is there yet
            (path / ".config.toml.tmp").unlink(missing_ok=True)
            continue
        for key, (there, here) in RunConfig.read(path / "config.toml").differences(configs[path.name]).items():
            raise RunDirectoryError(
                f"{out} holds runs of another grid: {path.name} has {key} = {there!r} there, {here!r} here; "
                "choose another --out"
            )
