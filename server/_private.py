"""What runs refuse for the sake of privacy, and what one on masked sums leaves out unasked."""

from collections.abc import Mapping, Sequence
from typing import Any

import strategies
from fedmerge.errors import ConfigError
from fedmerge.pipeline import Pipeline
from fedmerge.retraining import RETRAININGS
from server._control import CONTROLS
from server._keys import Keys

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


def threshold(config: Keys) -> int:
    """So many clients of a round must stay until its sum is unmasked: more than half, and as many as a sum needs."""
    return max(least(config), cohort(config) // 2 + 1)


def least(config: Keys) -> int:
    """The fewest clients that a masked sum may be of."""
    return _LEAST if config.private else 2


def cohort(config: Keys) -> int:
    """How many clients a round asks."""
    return max(1, round(config.fraction_train * config.clients))


def check(config: Keys, pipeline: Pipeline, controls: Sequence[str]) -> None:
    """Refuse what a run on masked sums cannot have, and what a private one must not.

    Args:
        config: Of the run, resolved.
        pipeline: Its methods, those among them that its strategy fixes.
        controls: Those asked for, by name.

    Raises:
        ConfigError: Names the keys and what to choose.
    """
    if config.private and not config.secure:
        raise ConfigError("private = true goes with secure = true: else every client's network is seen by the server")
    if not config.secure:
        return
    reading = strategies.networks_read(config.strategy, pipeline)
    reading += [f"control {name!r}" for name in controls if CONTROLS[name].reads_networks]
    reading += ["keep-clients = true"] if config.keep_clients else []
    if reading:
        bare = Pipeline(repair="none", retrain="none")
        able = [name for name in strategies.STRATEGIES if not strategies.networks_read(name, bare)]
        ways = [name for name, entry in RETRAININGS.items() if not entry.reads_networks]
        raise ConfigError(
            f"secure = true shows the server no client's network, which {', '.join(reading)} would read; choose of "
            f"strategies {', '.join(able)}, the merger merge-many, the retraining {' or '.join(ways)}, a repair that "
            "needs no sources, and the control public-only"
        )
    why = "of two clients, each can tell the other's network" if config.private else "a sum of one is that network"
    key, fewest, asked = "private" if config.private else "secure", least(config), cohort(config)
    if asked < fewest:
        raise ConfigError(
            f"a round asks {asked} of {config.clients} clients, and with {key} = true a sum is of at least {fewest} "
            f"({why}); take more clients, or a larger fraction-train"
        )
    if not fewest <= config.min_replies <= asked:
        raise ConfigError(
            f"min-replies = {config.min_replies} of the {asked} clients of a round: with {key} = true expected "
            f"{fewest} ({why}) to {asked}"
        )
    if pooled := [name for name in controls if config.private and CONTROLS[name].pools]:
        raise ConfigError(
            f"private = true: control {pooled[0]!r} trains on the clients' own images; leave it out, or take "
            "secure = true alone"
        )
    if config.private and config.local_evaluation:
        raise ConfigError(
            "private = true: with local-evaluation each client tells its own accuracy, which is no sum; leave it out"
        )


def check_noise(config: Keys) -> None:
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


def check_told(config: Keys, *, counts: bool) -> None:
    """Refuse what clients would tell without any noise, beside what is private: ``counts`` of their labels, too.

    Raises:
        ConfigError: Names the keys and what to choose.
    """
    told = [f"head = {config.head!r}"] if config.head == "analytic" else []
    told += [f"teacher = {config.teacher!r}"] if counts else []
    if told:
        raise ConfigError(
            f"{' and '.join(told)} with differential privacy: clients would tell exact sums or counts of their images; "
            "leave it out, or train without differential privacy"
        )
