"""The Flower ``ServerApp``, as ``flwr run`` and a SuperLink find it."""

from collections.abc import Sequence
from contextlib import suppress
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from fedmerge.errors import FedmergeError, RunDirectoryError
from fedmerge.flower.replies import Failure
from fedmerge.progress import Lines
from server._grid import connected
from server._rounds import Run
from server.callbacks import Callback
from server.config import STANDS, RunConfig
from server.directory import RunDirectory, held
from server.records import Row


class Log(Callback):
    """Writes to Flower's log, which ``flwr run --stream`` shows."""

    def __init__(self) -> None:
        self._lines = Lines(self.say)

    def say(self, text: str) -> None:
        """As :meth:`Callback.say`."""
        log(INFO, "fedmerge: %s", text)

    def step(self, name: str, done: int, total: int) -> None:
        """As :meth:`Callback.step`, in a line now and then."""
        self._lines(name, done, total)

    def row(self, row: Row) -> None:
        """As :meth:`Callback.row`."""
        if row.split == "test" and row.client is None:
            log(INFO, "fedmerge: round %s  %-24s accuracy %.4f", row.round, row.stage, row.accuracy)

    def failure(self, failure: Failure) -> None:
        """As :meth:`Callback.failure`."""
        log(
            INFO,
            "fedmerge: round %s: client %s failed: %s",
            failure.server_round,
            failure.client,
            failure.reason,
        )


def server_app(runs: Sequence[tuple[RunConfig, Path]], *callbacks: Callback, resume: bool = False) -> ServerApp:
    """A ServerApp that executes ``runs`` one after the other.

    Flower hands no run config to a simulation that a script starts, so it is given here.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for config, path in runs:
            Run(config, RunDirectory.open(path, config, resume=resume), *callbacks).execute(grid)

    return app


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run of the configuration in ``pyproject.toml``, changed by ``flwr run --run-config``."""
    try:
        _run(grid, context)
    except FedmergeError as error:  # in a line, above the traceback that Flower makes of it
        log(ERROR, "fedmerge: %s", " ".join(str(error).split()))
        raise


def _run(grid: Grid, context: Context) -> None:
    values = dict(context.run_config)
    out = Path(str(values.pop("out", "") or f"runs/flwr-{context.run_id}")).expanduser().resolve()
    resume = bool(values.pop("resume", False))
    # Flower gives every key of pyproject.toml: one that is as it stands there was not chosen, so others may fix it.
    values = {key: value for key, value in values.items() if value != STANDS.get(key)}
    tell = Log()
    if values.get("clients") == 0:
        values["clients"] = connected(grid)
        tell.say(f"{values['clients']} nodes are connected: as many clients")
    config = RunConfig.parse(values, "run config")
    try:
        with held(out):
            directory = RunDirectory.open(out, config, resume=resume)
            try:
                summary = Run(config, directory, tell).execute(grid)
            except BaseException as error:
                with suppress(OSError):
                    directory.failed(error)
                raise
    except RunDirectoryError as error:  # these are no options here
        raise RunDirectoryError(str(error).replace("--out", "out").replace("--resume", "resume=true")) from error
    tell.say("")
    for row in summary.stages:
        tell.say(f"{row.title:<32} {row.accuracy:.4f}")
    tell.say(f"files of this run: {out}")
