"""Flower's simulation runtime replaced by a grid in this process: everything of `fedmerge run` and `bench` but Ray."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from flwr.app import Context, RecordDict
from local_grid import LocalGrid

from experiments import cli
from experiments.launch import simulation


def simulate_here(patch: Callable[[Any, str, Any], None] = setattr, grid: type[LocalGrid] = LocalGrid) -> None:
    """From now on clients live in this process; ``patch`` may be ``monkeypatch.setattr``."""

    def run_simulation(*, server_app, client_app, num_supernodes, backend_config) -> None:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        server_app(grid(num_supernodes, app=client_app), context)

    patch(simulation, "run_simulation", run_simulation)
    patch(simulation, "running", lambda init, client: nullcontext())


def command(*arguments: object) -> None:
    """`fedmerge ARGUMENTS` without Ray, pictures and output: the target of a process that a test kills."""
    from experiments.report import page  # brings matplotlib, which others that import this module do without

    simulate_here()
    page.of_one = page.of_many = lambda *_: []
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    sys.argv = ["fedmerge", *map(str, arguments)]
    cli.main()
