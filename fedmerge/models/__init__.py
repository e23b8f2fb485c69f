"""Networks by name, and how each is trained."""

from fedmerge.models._recipe import Recipe
from fedmerge.models._zoo import build, initialise_from, names, recipe, summaries

__all__ = ["Recipe", "build", "initialise_from", "names", "recipe", "summaries"]
