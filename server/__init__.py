"""The Flower ServerApp: configuration, the federated run, central evaluation, the run directory."""

from server._control import CONTROLS, Control
from server._grid import WatchedGrid
from server._rounds import Run
from server._world import World
from server.app import server_app
from server.callbacks import Callback
from server.config import RunConfig, read_toml
from server.directory import RunDirectory, read_model

__all__ = [
    "CONTROLS",
    "Callback",
    "Control",
    "Run",
    "RunConfig",
    "RunDirectory",
    "WatchedGrid",
    "World",
    "read_model",
    "read_toml",
    "server_app",
]
