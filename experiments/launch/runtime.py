"""Ray, started or reached before Flower asks for it, so that what goes wrong there is said at once and with its cause.

Flower starts Ray itself where it must, but beside a server that already waits for its clients: a failure then shows
minutes later, as "Simulation Runtime crashed".
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# How long Ray's agents look for a server that is gone (Ray's own 60 s): they outlive a killed run by as much.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")

import ray

from fedmerge.beside import HOME
from fedmerge.errors import ResourceError
from fedmerge.progress import counted

_CONNECT_SECONDS, _ANSWER_SECONDS = 2.0, 8.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def existing_cluster() -> str:
    """The address of the Ray cluster that ``RAY_ADDRESS`` names; ``""`` where Ray starts on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


@contextmanager
def running(init: dict[str, Any], client: dict[str, float]) -> Iterator[None]:
    """Start Ray, or connect to the cluster of ``RAY_ADDRESS``, for the time of the block.

    Ray that the caller has started already is used as it is.

    Args:
        init: Arguments of ``ray.init``.
        client: What one client asks for: ``num_cpus`` and ``num_gpus``.

    Raises:
        ResourceError: Ray does not start here, no cluster answers there, or none of its machines has room for a
            client; the message says why and what to do.
    """
    if not ray.is_initialized():
        with counted("starting Ray", 1):
            _start(init)
    try:
        _has_room(client)
        yield
    finally:
        ray.shutdown()


def root_cause(error: BaseException) -> BaseException:
    """The error that led to ``error``."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    return error


def _start(init: dict[str, Any]) -> None:
    other = PathFinder.find_spec("fedmerge", [str(Path.cwd())])  # Ray's workers look there first
    if other is not None and other.origin is not None and Path(other.origin).resolve().parents[1] != HOME:
        raise ResourceError(f"Ray would take {other.origin} for fedmerge, which is in {HOME}; start in another folder")
    address = existing_cluster()
    if address:
        _reach(address)
    # Workers import what this process imports; as in Flower's own call.
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    optimised = os.environ.get("PYTHONOPTIMIZE")
    if optimised not in (None, "", "0"):
        os.environ["PYTHONOPTIMIZE"] = "1"  # without docstrings Ray's agents do not start
    here = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in _SIGNALS}
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **{"include_dashboard": False, **init})
    except (Exception, SystemExit) as error:
        ray.shutdown()
        cause = root_cause(error)
        if "AF_UNIX" in str(cause):
            raise ResourceError(
                f"Ray cannot start: the path of the temporary folder {_temporary_folder()} is too long for its "
                "sockets; set RAY_TMPDIR to a folder with a short path, for example RAY_TMPDIR=/tmp"
            ) from error
        where = f"the Ray cluster at RAY_ADDRESS={address} cannot be used" if address else "Ray cannot start"
        hint = "" if address else f"; its own log is below {_temporary_folder()}/ray, RAY_TMPDIR chooses another folder"
        raise ResourceError(f"{where}: {type(cause).__name__}: {cause}{hint}") from error
    finally:
        if optimised is not None:
            os.environ["PYTHONOPTIMIZE"] = optimised
        if here:  # Ray ends the process on SIGTERM in its own way, which waits for threads
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _has_room(client: dict[str, float]) -> None:
    """Flower would find out later, while its server waits for clients."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    rooms = [(machine.get("CPU", 0.0), machine.get("GPU", 0.0)) for machine in machines]
    if not any(cpus >= client["num_cpus"] and gpus >= client["num_gpus"] for cpus, gpus in rooms):
        found = ", ".join(f"{cpus:g} cores and {gpus:g} GPUs" for cpus, gpus in rooms) or "nothing"
        raise ResourceError(
            f"no machine of this Ray cluster has room for a client, which asks for {client['num_cpus']:g} cores and "
            f"{client['num_gpus']:g} GPUs: they have {found}; lower --client-cpus or --client-gpus, or add machines"
        )


def _temporary_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def _reach(address: str) -> None:
    """Ask whether a Ray cluster answers at ``address``: Ray itself would try for minutes.

    Raises:
        ResourceError: None does.
    """
    advice = "start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ResourceError(f"RAY_ADDRESS={address} is no address: {error}; expected host:port, or auto") from None
    if host and port:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise ResourceError(f"no Ray cluster answers at RAY_ADDRESS={address}: {reason}; {advice}") from None
    try:
        # In a process of its own: a call into Ray that waits cannot be ended from outside.
        tried = subprocess.run(
            [sys.executable, "-c", "import ray; ray.init(log_to_driver=False, logging_level='ERROR')"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"what listens at RAY_ADDRESS={address} did not answer as a Ray cluster within {_ANSWER_SECONDS:.0f} s; "
            f"{advice}"
        ) from None
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
        raise ResourceError(f"no Ray cluster can be used at RAY_ADDRESS={address}: {last}; {advice}")
