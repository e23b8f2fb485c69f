"""Recipes: a merge of checkpoint files written down, carried out, and judged before and after.

model = "mlp"                       # a network by name, or module:factory
out = "merged.safetensors"          # paths are relative to the recipe
merger = "slerp"                    # fedmerge list mergers
options = { order = "average" }     # the merger's own
dataset = "digits"                  # for repair, and to judge: shape and classes too
repair = "recompute"
dtype = "float16"
[[models]]
path = "a.safetensors"
weight = 2.0
layers = { "fc1.*" = 0.5 }          # in these tensors another weight; the first pattern that fits counts
[[models]]
path = "b.safetensors"
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich.markup import escape
from rich.table import Table

from experiments.tools.checkpoints import Architecture, architecture, load, merge_checkpoints
from fedmerge import average, data, evaluate, open_params
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.streams import numpy_stream
from server import read_toml

_JUDGED = 0.2
"""Share of the images that is kept for judging where a data set has no test set."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, alias_generator=lambda name: name.replace("_", "-")
    )


class Ingredient(_Part):
    """One network of a merge."""

    path: Path
    weight: float = Field(1.0, ge=0)
    layers: dict[str, Annotated[float, Field(ge=0)]] = {}


def _named(given: Any) -> Any:
    """A path alone is a network with the weight 1."""
    return {"path": given} if isinstance(given, str) else given


class MergeRecipe(_Part):
    """Every key of a recipe, as ``fedmerge merge`` has them."""

    model: str
    models: list[Annotated[Ingredient, BeforeValidator(_named)]] = Field(min_length=2)
    out: Path
    base: Path | None = None
    merger: str = "merge-many"
    options: dict[str, float | int | bool | str] = {}
    aligner: str = "weight-matching"
    repair: str = "none"
    fold: bool = False
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    dataset: str = ""
    classes: int = Field(10, ge=1)
    input_shape: tuple[int, int, int] = (3, 32, 32)
    width: float = Field(0, ge=0)
    kernel_size: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)

    @classmethod
    def read(cls, path: Path) -> "MergeRecipe":
        """Read a recipe; its paths are relative to it.

        Raises:
            ConfigError: It cannot be read, is no TOML, or holds a wrong key or value, which is named.
        """
        given = read_toml(path)
        try:
            recipe = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            place, key = ".".join(map(str, first["loc"])), str(first["loc"][-1])
            if first["type"] == "extra_forbidden":
                known = (Ingredient if first["loc"][0] == "models" else cls).model_fields
                unknown = UnknownNameError("key", key, (name.replace("_", "-") for name in known))
                raise ConfigError(f"{path}: {unknown}") from error
            shown = "" if first["type"] == "missing" else f" = {first['input']!r}"
            raise ConfigError(f"{path}: {place}{shown}: {first['msg']}") from error
        here = path.parent
        return recipe.model_copy(
            update={
                "out": here / recipe.out,
                "base": here / recipe.base if recipe.base is not None else None,
                "models": [one.model_copy(update={"path": here / one.path}) for one in recipe.models],
            }
        )


def carry_out(recipe: MergeRecipe, say: Callable[[str], None] = lambda line: None) -> Table:
    """Merge as ``recipe`` says, into its ``out``.

    Where it names a data set, all networks are judged on images that the merge did not see: the test set, or a fifth
    of the images where there is none.

    Returns:
        A row for each network before, the plain average, and the merged network.

    Raises:
        FedmergeError: As :func:`experiments.tools.checkpoints.merge_checkpoints`.
    """
    network = architecture(
        recipe.model, dataset=recipe.dataset, classes=recipe.classes, input_shape=recipe.input_shape,
        width=recipe.width, kernel_size=recipe.kernel_size,
    )  # fmt: skip
    network, judged = _judged(network, recipe)
    paths, weights = [one.path for one in recipe.models], [one.weight for one in recipe.models]
    merge_checkpoints(
        paths,
        recipe.out,
        network,
        weights=weights,
        merger=recipe.merger,
        aligner=recipe.aligner,
        repairing=recipe.repair,
        fold=recipe.fold,
        base=recipe.base,
        seed=recipe.seed,
        layers=[one.layers for one in recipe.models],
        options=recipe.options,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
        say=say,
    )
    before = load(paths, network.model)
    rows = [(escape(one.path.name), f"{one.weight:g}", p) for one, p in zip(recipe.models, before, strict=True)]
    rows.append(("plain average", "", average(before, weights)))
    how = recipe.merger + (f", {recipe.repair}" if recipe.repair != "none" else "")
    rows.append((f"[bold]{escape(recipe.out.name)}[/] ({how})", "", open_params(recipe.out)))
    table = Table("Network", "Weight", box=None, pad_edge=False)
    if judged is None:
        for name, weight, _ in rows:
            table.add_row(name, weight)
        return table
    table.add_column("Accuracy %", justify="right")
    table.add_column("Loss", justify="right")
    table.caption = f"{len(judged)} images of {judged.name}, which the merge did not see"
    for name, weight, params in rows:
        found = evaluate(network.model, params, judged)
        table.add_row(name, weight, f"{100 * found.accuracy:.2f}", f"{found.loss:.4f}")
    return table


def _judged(network: Architecture, recipe: MergeRecipe) -> tuple[Architecture, data.Images | None]:
    """The network with the images that a merge may look at, and those on which it is judged."""
    if network.images is None:
        return network, None
    test = data.load(recipe.dataset).test
    if test is not None:
        return network, test
    order = numpy_stream(recipe.seed, "judged").permutation(len(network.images))
    kept = round(_JUDGED * len(order))
    return (
        Architecture(network.model, network.example, network.images.select(sorted(order[kept:]))),
        network.images.select(sorted(order[:kept])),
    )
