"""Many federations of one configuration, each the target of all others: what the studies of leakage measure.

A federation is dealt to its clients once, and these are trained once. Every number of owners is then made of the very
same networks: n neighbours at a time are merged, so each image is in as many networks of n owners as of one, and only
the merging differs. Whatever is measured of a federation is a *part*, kept in a file, so that a study that was
interrupted goes on where it was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.audit.attacking import in_turn, rows
from experiments.audit.federations import Arena, local, start, taken
from experiments.audit.gauge import Gauge, read, write
from experiments.records.audits import AttackRow, Curve
from experiments.records.runs import natural
from fedmerge.merge import average
from fedmerge.pipeline import align_merge_retrain, retrain_on_public
from fedmerge.privacy import others
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.training import train
from server import RunConfig, RunDirectory, read_model
from strategies import ClientResult

SINGLE = "n=1 client"
Part = Callable[["Leakage", int, Gauge], None]


class Leakage:
    """The federations of one configuration.

    Attributes:
        arena: Their images and their server.
        folder: Where networks and measurements are kept.
        federations: How many.
        sizes: Numbers of owners that are merged.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, federations: int, images: int, sizes: Sequence[int] = ()
    ) -> None:
        self.arena, self.folder, self.federations = Arena(config, images=images), folder, federations
        self.sizes = sizes or (config.clients,)
        self.begin = start(self.arena.world)

    def clients(self, federation: int) -> Iterator[ClientResult]:
        """The clients of a federation after their local training, read from the folder or trained and kept there."""
        held = self.arena.dealt(federation)
        for i, indices in enumerate(held):
            path = self.folder / "clients" / f"{federation}-{i}.safetensors"
            if not path.is_file():
                made = local(self.arena, self.arena.first_client(federation), i, indices, self.begin)
                RunDirectory(path.parent).keep(path.name, made.params)
            yield ClientResult(i, read_model(path), len(indices))

    def part(self, name: str, federation: int) -> Path:
        """Where a part of a federation is kept."""
        return self.folder / "parts" / f"{name}-{federation}.safetensors"

    def measure(self, names: Iterable[str]) -> Iterator[str]:
        """Measure what is missing, and say after each step what it was."""
        for name in names:
            for k in range(self.federations):
                path = self.part(name, k)
                if path.is_file():
                    continue
                for result in self.clients(k) if name in NEEDS_CLIENTS else ():
                    yield f"federation {k}: client {result.client}"
                gauge = Gauge(self.arena, self.arena.dealt(k))
                PARTS[name](self, k, gauge)
                write(path, gauge.seen, gauge.accuracy)
                yield f"federation {k}: {name}"

    def rows(self, names: Iterable[str], setup: str = "") -> tuple[list[AttackRow], list[Curve]]:
        """Every attack on every stage of these parts, each federation the target of all others."""
        found = [[read(self.part(name, k)) for k in range(self.federations)] for name in names]
        trials = {
            stage: in_turn([seen[stage] for seen, _ in part], self.arena.labels)
            for part in found
            for stage in sorted(part[0][0], key=natural)
        }
        accuracy = {
            stage: float(np.mean([accuracies[stage] for _, accuracies in part]))
            for part in found
            for stage in part[0][1]
        }
        return rows(trials, {}, accuracy, setup)


def owners(study: Leakage, federation: int, gauge: Gauge) -> None:
    """Networks of one owner, and of each of the study's numbers of owners, which are neighbours.

    Of the fewest and the most owners also what needs no alignment, and what the last of them sees of the others.
    """
    world, results = study.arena.world, list(study.clients(federation))
    logits = [gauge.logits(r.params) for r in results]
    gauge.add(SINGLE, logits, [[r.client] for r in results])
    for n in study.sizes:
        for first in range(0, len(results) - n + 1, n):
            group = list(range(first, first + n))
            some = [replace(results[i], client=j) for j, i in enumerate(group)]
            models, weights = [r.params for r in some], [float(r.examples) for r in some]
            pipeline = replace(world.pipeline, repair="none", retrain="none")
            merged = align_merge_retrain(some, bench=world.bench, pipeline=pipeline).params
            gauge.network(f"n={n} aligned merge", merged, group)
            if n not in (min(study.sizes), max(study.sizes)):
                continue
            gauge.together(f"n={n} ensemble", [logits[i] for i in group], group)
            gauge.network(f"n={n} plain average", average(models, weights), group)
            rng = numpy_stream(world.config.seed, "less-own")
            rest = others(merged, models[-1], share=weights[-1] / sum(weights), spec=world.spec, rng=rng)
            gauge.network(f"n={n} aligned merge less own", rest, group[:-1], attacker=group[-1])


def stages(study: Leakage, federation: int, gauge: Gauge) -> None:
    """What the server makes of all clients: merged, repaired, and retrained in each way from there."""
    world, results = study.arena.world, list(study.clients(federation))
    made = {}
    pipeline = replace(world.pipeline, retrain="none")
    align_merge_retrain(
        results, bench=world.bench, pipeline=pipeline, on_stage=lambda _, stage, params: made.update({stage: params})
    )
    if "repaired" in made:
        gauge.network("repaired", made["repaired"])
    last = made.get("repaired", made["merged"])
    models = [r.params for r in results]
    for how, called in (("labels", "labels"), ("distill", "ensemble"), ("both", "both")):
        params = retrain_on_public(last, models, bench=world.bench, how=how, server_round=1)
        gauge.network(f"retrained on {called}", params)


ROUNDS = (1, 5, 10, 20)
"""After which FedAvg is attacked, each client passing once over its images in a round."""


def rounds(study: Leakage, federation: int, gauge: Gauge) -> None:
    """FedAvg from one shared network."""
    arena, held = study.arena, study.arena.dealt(federation)
    shared = Arena(arena.config.model_copy(update={"init": "shared", "local_epochs": 1}))
    params = start(shared.world)
    for r in range(1, ROUNDS[-1] + 1):
        first = arena.first_client(federation)
        found = [local(shared, first, i, part, params, server_round=r) for i, part in enumerate(held)]
        params = average([one.params for one in found], [float(one.examples) for one in found])
        if r in ROUNDS:
            gauge.network(f"FedAvg, {r} round{'s' if r > 1 else ''}", params)


def centralised(study: Leakage, federation: int, gauge: Gauge) -> None:
    """One network trained on all that the clients hold, as many passes as a client makes."""
    world = study.arena.world
    images = taken(world.split, np.sort(np.concatenate(study.arena.dealt(federation))))
    found = train(
        world.model, study.begin, images, recipe=world.bench.recipe, epochs=world.config.epochs(),
        generator=torch_stream(world.config.seed, "centralised", federation), device=world.device,
    )  # fmt: skip
    gauge.network("centralised", found.params)


PARTS: dict[str, Part] = {"owners": owners, "stages": stages, "rounds": rounds, "centralised": centralised}
NEEDS_CLIENTS = ("owners", "stages")
