"""Two checkpoints side by side: how far apart they are, how alike they answer, and the line between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich import box
from rich.table import Table
from torch import Tensor

import fedmerge as fm
from experiments.tools.checkpoints import Architecture, load
from fedmerge.align import needs_images
from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.streams import numpy_stream


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` finds; both mappings have the keys ``"as they came"`` and ``"aligned"``.

    Attributes:
        distances: In the space of weights.
        agreement: Of what both answer, which alignment does not change; None without images.
        lines: From the first to the second; none without images.
        moved: How many units alignment moves.
        units: How many there are.
        images: How many images were looked at, of which set; ``""`` without.
    """

    distances: Mapping[str, fm.Distance]
    agreement: fm.Agreement | None
    lines: Mapping[str, fm.Curve]
    moved: int
    units: int
    images: str


def compare(
    a: Path,
    b: Path,
    network: Architecture,
    *,
    seen: Images | None = None,
    aligner: str = "weight-matching",
    repairing: str = "none",
    points: int = 25,
    seed: int = 0,
) -> Comparison:
    """Compare two checkpoints of one architecture, and ``b`` aligned to ``a``.

    Args:
        a: The file of the first, which stays.
        b: That of the second, which is aligned to it.
        network: Their architecture; its images are those that an aligner and ``repairing`` may look at.
        seen: Images on which they answer; without, their weights alone are compared.
        aligner: How the second is aligned.
        repairing: The correction of statistics at each point between the ends.
        points: Of the lines, at least 2.
        seed: Of the alignment.

    Raises:
        ParamsError: A checkpoint that does not fit.
        ConfigError: An aligner or a correction that needs images, without any.
    """
    if needs_images(aligner) and network.images is None:
        raise ConfigError(f"--aligner {aligner} needs images; name a data set with --dataset")
    if repairing != "none" and (seen is None or network.images is None):
        raise ConfigError(
            f"--repair {repairing} corrects points of the line, which needs images; name a data set with --dataset"
        )
    first, second = load([a, b], network.model)
    spec = fm.perm_spec(network.model, network.example)
    few = network.images.first(2000) if network.images is not None else None
    looking = {"model": network.model, "data": few} if needs_images(aligner) else {}
    found = fm.align(second, to=first, spec=spec, method=aligner, rng=numpy_stream(seed, "compare"), **looking)
    moved = fm.permute(second, found.perms, spec=spec)
    pairs = {"as they came": second, "aligned": moved}
    lines: dict[str, fm.Curve] = {}
    if seen is not None:
        for name, other in pairs.items():
            along = None
            if few is not None and repairing != "none":
                along = partial(_between, network, few, repairing, (first, other))
            lines[name] = fm.interpolate(network.model, first, other, seen, points=points, along=along)
    return Comparison(
        distances={name: fm.distance(first, other, model=network.model) for name, other in pairs.items()},
        agreement=fm.agreement(network.model, first, second, seen) if seen is not None else None,
        lines=lines,
        moved=sum(int((perm != perm.sort().values).sum()) for perm in found.perms.values()),
        units=sum(len(perm) for perm in found.perms.values()),
        images=f"{len(seen)} images of {seen.name}" if seen is not None else "",
    )


def _between(
    network: Architecture, data: Images, method: str, ends: tuple[fm.types.Params, ...], alpha: float
) -> dict[str, Tensor]:
    """The network at ``alpha``; between the ends with statistics corrected to those that the ends have there."""
    weights = (1 - alpha, alpha)
    params = fm.average(ends, weights)
    if not 0 < alpha < 1:
        return params
    return fm.repair(network.model, params, data=data, method=method, sources=ends, weights=weights)


def render(found: Comparison) -> Table:
    """A comparison for the terminal: a row a number, a column before and one after alignment."""
    table = Table("", *found.distances, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    numbers: dict[str, list[str]] = {
        "L2 distance": [f"{d.l2:.4g}" for d in found.distances.values()],
        "relative to their norms (unrelated: 1.414)": [f"{d.relative:.4f}" for d in found.distances.values()],
        "cosine": [f"{d.cosine:+.4f}" for d in found.distances.values()],
    }
    if found.agreement is not None:
        barriers = [fm.barrier(line) for line in found.lines.values()]
        numbers |= {
            "loss of the first, of the second": [_ends(line.losses, "{:.4f}") for line in found.lines.values()],
            "accuracy of both, %": [_ends(100 * line.accuracies, "{:.2f}") for line in found.lines.values()],
            "lowest accuracy on the line, %": [f"{100 * line.accuracies.min():.2f}" for line in found.lines.values()],
            "barrier of the loss, over the chord": [f"{b.loss:.4f}" for b in barriers],
            "barrier of the loss, over the mean of the ends": [f"{b.loss_above_mean:.4f}" for b in barriers],
            "barrier of the error, points": [f"{100 * b.error:.2f}" for b in barriers],
        }
    for name, cells in numbers.items():
        table.add_row(name, *cells)
    said = [f"{found.moved} of {found.units} units change places when the second is aligned to the first."]
    if found.agreement is not None:
        of = found.agreement
        said.append(
            f"On {found.images} both give the same answer to {100 * of.same:.2f} %, are both right on "
            f"{100 * of.both_right:.2f} %, give the same wrong answer to {100 * of.same_error:.2f} %; Jensen-Shannon "
            f"divergence {of.divergence:.4f} nats."
        )
    table.caption, table.caption_justify = "\n".join(said), "left"
    return table


def _ends(values: object, shown: str) -> str:
    return f"{shown.format(values[0])}, {shown.format(values[-1])}"  # type: ignore[index]
