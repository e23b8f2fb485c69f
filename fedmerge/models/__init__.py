"""Networks by name, and how each is trained."""

from fedmerge.models._entries import MODELS, Model
from fedmerge.models._recipe import OPTIMIZERS, SCHEDULES, Recipe
from fedmerge.models._zoo import (
    build,
    check_options,
    initialise_from,
    names,
    recipe,
    summaries,
    width_units,
)

__all__ = [
    "MODELS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Model",
    "Recipe",
    "build",
    "check_options",
    "initialise_from",
    "names",
    "recipe",
    "summaries",
    "width_units",
]
