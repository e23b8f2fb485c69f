"""Whether clients can train in private, and what those of a run have spent."""

import math
from collections.abc import Mapping, Sequence

import torch

import strategies
from fedmerge.clipping import check_private
from fedmerge.dp_sgd import DPSGD, check_delta
from fedmerge.tasks import state_of
from fedmerge.training import train
from server._world import World
from server.records import Privacy, Spent


def check_clients(world: World, held: Sequence[int]) -> None:
    """Refuse what clients with ``held`` images could not train in private, before anyone is asked.

    Raises:
        ConfigError: A delta, or an epsilon, that is not possible with so few images.
        ParamsError: A network that mixes the images of a batch, or whose gradients clipping would not see.
    """
    task = world.config.client_task()
    central = strategies.STRATEGIES[world.config.strategy].central
    if task.is_private or central:
        check_private(world.model)
    if central:
        check_delta(task.dp_delta, len(held), "clients")
    if task.is_private:
        for images in held:
            task.private(images)
        # A step on public images, so that what clipping would get wrong is said here and not by each client.
        few = world.bench.public.first(4)
        train(
            world.model, state_of(world.model), few, recipe=task.recipe(), epochs=1, generator=torch.Generator(),
            device=world.device, private=DPSGD(0.0, task.dp_clip),
        )  # fmt: skip


def spent(world: World, asked: Mapping[int, int], central: DPSGD | None = None) -> Privacy | None:
    """What clients have spent, from the number of rounds that ``asked`` each; None without differential privacy.

    With ``central`` it is what all global networks tell of a client, all of its images together: each round that asks
    it is one Gaussian mechanism, without the gain that a secret draw of the cohort would bring.
    """
    task = world.config.client_task()
    if central is not None:
        clients = len(world.split.clients)
        bounds = {
            client: central.epsilon(images=clients, batch_size=clients, epochs=rounds, delta=task.dp_delta)
            for client, rounds in sorted(asked.items())
        }
        of_clients = tuple(Spent(client, central.noise_multiplier, _bound(e)) for client, e in bounds.items())
        return Privacy(task.dp_delta, central.max_grad_norm, of_clients, "client")
    found = []
    for client, rounds in sorted(asked.items()):
        images = len(world.split.clients[client])
        private, epsilon = task.private(images), task.spent(images, rounds)
        if private is not None:
            found.append(Spent(client, private.noise_multiplier, _bound(epsilon)))
    return Privacy(task.dp_delta, task.dp_clip, tuple(found)) if found else None


def _bound(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
