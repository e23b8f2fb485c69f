"""The Flower ServerApp: configuration, the federated run, central evaluation, the run directory."""

from server._grid import WatchedGrid
from server._run import Observer, Run
from server.app import server_app
from server.config import LABELS, RunConfig, changed, choices, chosen, read_toml
from server.controls import CONTROLS, Control
from server.directory import RunDirectory, read_model

__all__ = [
    "CONTROLS",
    "LABELS",
    "Control",
    "Observer",
    "Run",
    "RunConfig",
    "RunDirectory",
    "WatchedGrid",
    "changed",
    "choices",
    "chosen",
    "read_model",
    "read_toml",
    "server_app",
]
