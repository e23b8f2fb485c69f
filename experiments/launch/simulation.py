"""Runs on this machine: Flower's simulation runtime, on Ray, started once for any number of runs."""

import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import ray
import torch  # before Flower, which converts arrays only if torch is loaded
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.simulation.ray_transport.ray_actor import BasicActorPool

from clients.app import app as fedmerge_client_app
from experiments.launch.runtime import existing_cluster, root_cause, running
from fedmerge import data
from fedmerge.errors import ConfigError, FedmergeError
from fedmerge.memory import usable_cores
from fedmerge.progress import counted, progress, steps
from fedmerge.tasks import Setup, device_of, read_anew
from server import Callback, Callbacks, RunConfig, RunDirectory, WatchedGrid, server_app

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

_POLL, _WRITING_SECONDS = 0.05, 10.0


def _end_actors(pool: BasicActorPool) -> None:
    """End the actors of a finished simulation without Ray taking that for a failure to be retried."""
    for actor in pool.pool:
        ray.kill(actor)  # type: ignore[arg-type]


# Flower lets its actors exit by themselves; those that may restart (see `Resources`) are then reported as failed.
BasicActorPool.terminate_all_actors = _end_actors  # type: ignore[method-assign,assignment]


@dataclass(frozen=True)
class Resources:
    """What a simulation may use.

    Attributes:
        cpus: Cores for all clients together; 0 is every core that this process may use.
        client_cpus: Cores of one client; ``cpus / client_cpus`` clients train at once.
        client_gpus: Share of a GPU of one client; negative is an equal share for all that train at once, spread over
            all GPUs.
    """

    cpus: int = 0
    client_cpus: float = 1.0
    client_gpus: float = -1.0

    def backend(self, *, gpus: int, clients: int, verbose: bool) -> dict[str, dict[str, Any]]:
        """The ``backend_config`` of Flower's simulation runtime on so many GPUs.

        A client process that dies (``os._exit``, out of memory) would leave a dead actor in Flower's pool;
        ``max_restarts`` brings it back, as often as a long grid needs, ``max_task_retries`` gives its message one
        more try.
        """
        if self.cpus < 0:
            raise ConfigError(f"--cpus {self.cpus}: expected a number of cores, or 0 for all of them")
        cpus = self.cpus or usable_cores()
        if not self.client_cpus > 0:
            raise ConfigError(f"--client-cpus {self.client_cpus:g}: expected more than 0 cores")
        if self.client_cpus > cpus:
            raise ConfigError(f"{self.client_cpus:g} cores a client do not fit {cpus} cores; lower --client-cpus")
        at_once = max(1, min(clients, int(cpus / self.client_cpus)))
        # Ray fills one GPU before the next, and puts no client on two.
        share = round(1 / math.ceil(at_once / gpus) - 5e-4, 3) if gpus else 0.0
        if gpus and self.client_gpus >= 0:
            share = self.client_gpus
        init: dict[str, object] = {
            "log_to_driver": verbose,
            "logging_level": logging.WARNING if verbose else logging.ERROR,
        }
        if not existing_cluster():  # it knows its own cores
            init["num_cpus"] = cpus
        resources: dict[str, object] = {
            "num_cpus": self.client_cpus,
            "num_gpus": share,
            "max_restarts": -1,
            "max_task_retries": 1,
        }
        return {"client_resources": resources, "init_args": init}


def try_out(config: RunConfig) -> None:
    """What can be known of a run before it starts: its device, its data and their split, a network that takes them.

    Raises:
        FedmergeError: The run is impossible.
    """
    device_of(config.device)
    setup = replace(config.setup(), init="shared")  # the server's network is the same with each
    refused = _refused_data(setup.dataset) or _refused_setup(setup)
    if refused is not None:
        raise refused
    if config.recipe().augment:
        data.augment(setup.split().dataset.train.images[:1], torch.Generator())


# Kept, refusals too: hundreds of cells would look for the same missing data on the net.
@cache
def _refused_data(dataset: str) -> FedmergeError | None:
    return _refusal(lambda: data.load(dataset))


@cache
def _refused_setup(setup: Setup) -> FedmergeError | None:
    return _refusal(setup.network)


def _refusal(attempt: Callable[[], object]) -> FedmergeError | None:
    try:
        attempt()
    except FedmergeError as error:
        return error.with_traceback(None)
    return None


def simulate(
    runs: Sequence[tuple[RunConfig, Path]],
    *,
    resources: Resources | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    client_app: "ClientApp | None" = None,
    on_end: Callable[[Path, Exception | None], None] | None = None,
    verbose: bool = False,
) -> None:
    """Execute ``runs`` on one Ray runtime, one after the other; results are in their directories.

    Everything that can be refused is refused before Ray starts: data, splits, networks, devices, directories.

    Args:
        runs: Configurations, each with the directory it writes.
        resources: What the clients may use.
        callbacks: Told of everything that happens; of several runs the name of each first.
        resume: Whether directories that hold the same run are continued.
        client_app: Another ClientApp than fedmerge's.
        on_end: Called after each run with its directory and the error that ended it, or None. With it, the others
            go on after an error; without it the first error is raised.
        verbose: Whether Flower's and Ray's own logs are shown.

    Raises:
        FedmergeError: Something asked for is impossible, Ray cannot be had, the disk is full, or a run failed.
    """
    for forget in (_refused_data.cache_clear, _refused_setup.cache_clear, read_anew):
        forget()
    for config, _ in runs:
        try_out(config)
    clients = max(config.clients for config, _ in runs)
    gpu = "cuda" in [device_of(config.device) for config, _ in runs]
    resources = resources or Resources()
    backend = resources.backend(gpus=torch.cuda.device_count() if gpu else 0, clients=clients, verbose=verbose)
    if resources.client_gpus > 0 and not gpu:
        Callbacks(*callbacks).say(
            f"not used, for nothing is computed on a GPU: --client-gpus {resources.client_gpus:g}"
        )
    for config, path in runs:
        with full_disk_named(path):
            RunDirectory.open(path, config, resume=resume)
    end = _End()
    try:
        with _flowers_log(verbose), running(backend["init_args"], backend["client_resources"]):
            try:
                with counted("simulation", 1):
                    run_simulation(
                        server_app=_one_by_one(runs, callbacks, on_end, end),
                        client_app=client_app or fedmerge_client_app,
                        num_supernodes=clients,
                        backend_config=backend,
                    )
            except FedmergeError:
                raise
            except Exception as error:
                end.reason = FedmergeError(f"the simulation ended early: {_named(root_cause(error))}")
                end.came.wait(_WRITING_SECONDS)
                raise end.reason from error
    except FedmergeError as error:
        with suppress(OSError):  # what never began says why, and does not block its folder
            for _, path in runs:
                RunDirectory(path).failed(error)
        raise


@contextmanager
def _flowers_log(shown: bool) -> Iterator[None]:
    """Flower's own log, shown or silenced, and afterwards as it was."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.INFO if shown else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _End:
    """The end of a simulation that Flower gives up while its server goes on, in a thread of its own.

    Attributes:
        reason: Set from outside; the server raises it instead of waiting for clients that never come.
        came: Set once the server has written what it has.
    """

    def __init__(self) -> None:
        self.reason: FedmergeError | None = None
        self.came = threading.Event()

    def pause(self) -> None:
        """Wait a moment for replies."""
        if self.reason is not None:
            raise self.reason
        time.sleep(_POLL)


def _one_by_one(
    runs: Sequence[tuple[RunConfig, Path]],
    callbacks: Sequence[Callback],
    on_end: Callable[[Path, Exception | None], None] | None,
    end: _End,
) -> ServerApp:
    """A ServerApp that executes ``runs`` over the same clients, each of which says once who it is."""
    app = ServerApp()

    def one(config: RunConfig, path: Path, grid: Grid, context: Context) -> None:
        failed: Exception | None = None
        try:
            server_app([(config, path)], *callbacks, resume=True)(grid, context)
        except Exception as error:
            if on_end is None or end.reason is not None or _disk_full(error):
                raise
            failed = error
        if on_end is not None:
            on_end(path, failed)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(usable_cores())
        watched = WatchedGrid(grid, pause=end.pause)
        tell = Callbacks(*callbacks)
        try:
            with progress(tell.step):
                for i, (config, path) in enumerate(steps("runs", runs), 1):
                    if len(runs) > 1:
                        tell.say(f"run {i} of {len(runs)}: {path.name}")
                    with full_disk_named(path):
                        one(config, path, watched, context)
        finally:
            end.came.set()

    return app


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the failure to write ``path`` because the disk is full into one clear message.

    Raises:
        FedmergeError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _disk_full(error):
            raise
        raise FedmergeError(
            f"the disk is full: {path} could not be written; what was finished before is complete. Free some space "
            "and run the same command with --resume"
        ) from error


def _disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one that led to it, is the disk's or the user's quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
