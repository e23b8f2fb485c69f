"""The Flower ServerApp: configuration, the federated run, central evaluation, the run directory."""

from server._control import CONTROLS, Control
from server._grid import WatchedGrid
from server._rounds import Run
from server._text import read_toml
from server._world import Measured, World
from server.app import server_app
from server.callbacks import Callback, Callbacks
from server.config import LABELS, RunConfig, changed, choices, chosen
from server.directory import RunDirectory, held, read_model

__all__ = [
    "CONTROLS",
    "LABELS",
    "Callback",
    "Callbacks",
    "Control",
    "Measured",
    "Run",
    "RunConfig",
    "RunDirectory",
    "WatchedGrid",
    "World",
    "changed",
    "choices",
    "chosen",
    "held",
    "read_model",
    "read_toml",
    "server_app",
]
