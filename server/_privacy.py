"""Differential privacy in a run: which clients can train so, what they have spent."""

import math
from collections.abc import Mapping, Sequence

from fedmerge.dp_sgd import check_private
from server._world import World
from server.records import Privacy, Spent


def check_clients(world: World, held: Sequence[int]) -> None:
    """Refuse what clients with ``held`` images could not train in private, before anyone is asked.

    Raises:
        ConfigError: A delta, or an epsilon, that is not possible with so few images.
        ParamsError: A network that mixes the images of a batch.
    """
    task = world.config.client_task()
    if task.is_private:
        check_private(world.model)
        for images in held:
            task.private(images)


def spent(world: World, asked: Mapping[int, int]) -> Privacy | None:
    """What clients have spent, from the number of rounds that ``asked`` each; None without differential privacy."""
    task = world.config.client_task()
    found = []
    for client, rounds in sorted(asked.items()):
        images = len(world.split.clients[client])
        private, epsilon = task.private(images), task.spent(images, rounds)
        if private is not None:
            found.append(Spent(client, private.noise_multiplier, epsilon if math.isfinite(epsilon) else None))
    return Privacy(task.dp_delta, task.dp_clip, tuple(found)) if found else None
