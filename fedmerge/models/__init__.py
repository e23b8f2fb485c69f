"""Networks by name, and how each is trained."""

from fedmerge.models._recipe import Recipe
from fedmerge.models._zoo import (
    MODELS,
    Model,
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
