"""The rival of every run: FedAvg of the same clients from one network."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from flwr.app import ArrayRecord

import strategies
from fedmerge import repair
from fedmerge.errors import RoundError
from fedmerge.flower.replies import Failure
from fedmerge.pipeline import Params
from server._best import Best
from server._grid import WatchedGrid
from server._world import Measured, World
from strategies import Federation


def fedavg(world: World, stage: str) -> Iterator[Measured | Failure]:
    """Train the clients that the run has met once more, as :meth:`server.RunConfig.fedavg` says; a row a round.

    Each is asked as in a run of that configuration, so the rows are those of that run. Traffic and seconds are not
    counted as the run's. Where the network has statistics (BatchNorm), which the mean spoils, one row more says how the
    last network does with them measured anew. Where the run hands out what is best on val, FedAvg does too: the row of
    a round is then of the best network so far, of every round as averaged and with its statistics measured anew. A
    reply that cannot be used is left out and named; a round with too few usable ones ends the control, and not the run,
    of which everything else is there.
    """
    config = world.config.fedavg()
    nodes, found, failures = world.meeting.nodes, list[Measured](), list[Failure]()
    last, best = list[Params](), Best(world)

    def on_stage(server_round: int, _: str, params: Params) -> None:
        last[:] = [params]
        if world.config.hand_out == "best-on-val":
            for each in (params, *_recomputed(world, params)):
                best.offer(server_round, stage, each)
            params = best.params
        found.append(world.measure(stage, params, server_round=server_round))

    strategy = strategies.build(config.strategy, bench=world.bench, pipeline=config.pipeline(), on_stage=on_stage)
    strategy.fraction_evaluate = 0.0
    strategy.join(
        Federation(
            nodes=nodes,
            images=world.meeting.images,
            task=replace(config.client_task(), dataset_digest=world.task.dataset_digest),
            parameters=world.spec.parameters,
            fraction=config.fraction_train,
            min_replies=config.min_replies,
            on_failure=failures.append,
        )
    )
    grid = WatchedGrid(world.grid)
    grid.nodes = list(nodes.values())
    start = ArrayRecord(world.start)
    try:
        strategy.start(grid=grid, initial_arrays=start, num_rounds=config.rounds, timeout=config.timeout)
    except RoundError as error:
        failures.append(Failure(len(found) + 1, None, str(error)))
        found.clear()
        last.clear()
    yield from (Failure(f.server_round, f.client, f"control {stage}: {f.reason}") for f in failures)
    yield from found
    for measured in (each for params in last for each in _recomputed(world, params)):
        yield world.measure(f"{stage}-recomputed", measured)


def _recomputed(world: World, params: Params) -> list[Params]:
    """``params`` with its statistics measured on the public images; nothing where it has none."""
    measured = repair(world.model, params, data=world.split.public_images, method="recompute", device=world.device)
    return [measured] if any(not torch.equal(measured[name], tensor) for name, tensor in params.items()) else []
