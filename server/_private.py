"""What runs refuse for the sake of privacy, what one on masked sums leaves out unasked, and what clients have spent."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import strategies
from fedmerge.dp_sgd import DPSGD, check_delta, check_private
from fedmerge.errors import ConfigError
from fedmerge.retraining import RETRAININGS
from server._control import CONTROLS
from server.records import Privacy, Spent

if TYPE_CHECKING:
    from server._world import World
    from server.config import RunConfig

_LEAST = 3  # of two, each would have the other's network in its hands: the sum less its own


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` (keys with dashes) of a run, with what masked sums allow for keys that are not given.

    A private run is on masked sums. There retraining is on labels, controls are those by default that need no client's
    network, no client's network is kept, and nobody is asked for a local evaluation.
    """
    values = {key.replace("_", "-"): value for key, value in values.items()}
    if values.get("private"):
        values = {"secure": True, **values}
    if not values.get("secure"):
        return values
    return {"retrain": "labels", "controls": "public-only", "keep-clients": False, "local-evaluation": False, **values}


def threshold(config: "RunConfig") -> int:
    """So many clients of a round must stay until its sum is unmasked: more than half, and never one alone."""
    return max(2, cohort(config) // 2 + 1)


def cohort(config: "RunConfig") -> int:
    """How many clients a round asks."""
    return max(1, round(config.fraction_train * config.clients))


def check(config: "RunConfig") -> None:
    """Refuse what a run on masked sums cannot have, and what a private one must not.

    Raises:
        ConfigError: Names the keys and what to choose.
    """
    if config.private and not config.secure:
        raise ConfigError("private = true goes with secure = true: else every client's network is seen by the server")
    if not config.secure:
        return
    reading = strategies.networks_read(config.strategy, config.pipeline())
    reading += [f"control {name!r}" for name in config.control_names() if CONTROLS[name].reads_networks]
    reading += ["keep-clients = true"] if config.keep_clients else []
    reading += [f"head = {config.head!r} (sums of single clients)"] if config.head != "none" else []
    if reading:
        able = [name for name, entry in strategies.STRATEGIES.items() if entry.sums]
        ways = [name for name, entry in RETRAININGS.items() if not entry.reads_networks]
        raise ConfigError(
            f"secure = true shows the server no client's network, which {', '.join(reading)} would read; choose of "
            f"strategies {', '.join(able)}, the merger merge-many, the retraining {' or '.join(ways)}, a repair that "
            "needs no sources, and the control public-only"
        )
    least = _LEAST if config.private else 2
    if not least <= config.min_replies <= cohort(config):
        why = "of two clients, each can tell the other's network" if config.private else "a sum of one is that network"
        raise ConfigError(
            f"min-replies = {config.min_replies} of the {cohort(config)} clients of a round: with "
            f"{'private' if config.private else 'secure'} = true expected {least} ({why}) to {cohort(config)}"
        )
    if config.private and config.local_evaluation:
        raise ConfigError(
            "private = true: with local-evaluation each client tells its own accuracy, which is no sum; leave it out"
        )


def check_noise(config: "RunConfig") -> None:
    """Refuse differential privacy of no noise, or of two.

    Raises:
        ConfigError: Names the keys and what to choose.
    """
    epsilon, noise = config.dp_epsilon, config.dp_noise
    if epsilon != -1 and noise != -1:
        raise ConfigError(
            f"dp-epsilon = {epsilon:g} and dp-noise = {noise:g} both say how much noise; give one of them"
        )
    if noise == -1 and epsilon <= 0:
        raise ConfigError(
            f"dp-epsilon = {epsilon:g}: nothing can be learned without spending any; give a positive number "
            "(1 protects well, 8 hardly), or -1 to train without differential privacy"
        )
    if epsilon == -1 and noise < 0:
        raise ConfigError(f"dp-noise = {noise:g}; expected 0 (clips only), a positive number, or -1")


def check_told(config: "RunConfig") -> None:
    """Refuse what clients would tell without any noise, beside what is private.

    Raises:
        ConfigError: Names the keys and what to choose.
    """
    told = [f"head = {config.head!r}"] if config.head != "none" else []
    told += [f"teacher = {config.teacher!r}"] if config.client_task().label_counts else []
    if told:
        raise ConfigError(
            f"{' and '.join(told)} with differential privacy: clients would tell exact sums or counts of their images; "
            "leave it out, or train without differential privacy"
        )


def check_clients(world: "World", held: Sequence[int]) -> None:
    """Refuse what clients with ``held`` images could not train in private, before anyone is asked.

    Raises:
        ConfigError: A delta, or an epsilon, that is not possible with so few images.
        ParamsError: A network that mixes the images of a batch.
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


def spent(world: "World", asked: Mapping[int, int], central: DPSGD | None = None) -> Privacy | None:
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
