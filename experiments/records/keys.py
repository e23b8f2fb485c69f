"""Which runs are of one setup: the config keys that a run uses, those in which runs differ, groups of equal runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import strategies
from experiments.records.runs import Run
from fedmerge import data
from fedmerge.errors import FedmergeError
from fedmerge.pipeline import Pipeline
from server import CONTROLS, LABELS, chosen

METHOD_KEYS = frozenset(
    {
        "aligner",
        "hand-out",
        "head",
        "init",
        "merger",
        "pretrain-epochs",
        "reference",
        "repair",
        "restarts",
        "retrain",
        "retrain-epochs",
        "secure",
        "secure-sums",
        "server-average",
        "server-average-options",
        "strategy",
        "strategy-options",
        "teacher",
    }
)
"""Config keys that choose what the server does. Runs that agree on all others solve the same problem."""

_NO_MATTER = frozenset(
    {
        "controls",
        "device",
        "keep-clients",
        "local-evaluation",
        "min-replies",
        "private",
        "secret-noise",
        "seed",
        "timeout",
        *LABELS,
    }
)
"""Config keys that make no setup: which measurements are made, where, what is kept, and what a run is called."""

_SWITCHES = frozenset({"dp-epsilon", "dp-noise"})
"""Keys that say whether a run has what they are about: one that has not does not use them, and differs by that."""

_STEPS = frozenset({"aligner", "merger", "reference", "repair", "restarts", "retrain", "retrain-epochs", "teacher"})


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Config keys that tell setups apart: those on which ``runs`` do not all agree, in the configs' order.

    The seed is none of them, nor is what does not change a result (``controls``, ``keep-clients`` ...), nor what
    follows from the model (its learning rate, where that was not chosen), and a run has no say on a key that it does
    not use, but for whether clients train under differential privacy.
    """
    given = [(chosen(run.config), unused(run.config)) for run in runs if run.config]
    keys = dict.fromkeys(key for config, _ in given for key in config if key not in _NO_MATTER)

    written_out = [run.config for run in runs if run.config]

    def differs(key: str) -> bool:
        values = [config.get(key) for config, idle in given if key not in idle]
        if key in _SWITCHES and 0 < len(values) < len(given):
            return True
        # One that is a choice in one run may follow from another key in the next, and be the same.
        same = len({repr(config.get(key)) for config in written_out}) == 1
        return not same and any(value != values[0] for value in values)

    return [key for key in keys if differs(key)]


def unused(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of ``config`` whose values change nothing in its run: of steps that its strategy or merger does not take."""
    idle = set[str]()
    partition = data.PARTITIONS.get(str(config.get("partition")))
    if partition is not None and "partition_alpha" not in partition.needs:
        idle.add("partition-alpha")
    strategy, secure = str(config.get("strategy")), bool(config.get("secure"))
    entry = strategies.STRATEGIES.get(strategy)
    aligned = secure and (entry is None or entry.aligns)
    if config.get("init") != "pretrained" and not (aligned and config.get("init") == "independent"):
        idle.add("pretrain-epochs")
    idle |= {key for key in _SWITCHES if config.get(key, -1) == -1}
    if idle >= _SWITCHES:
        idle |= {"dp-clip"} if entry is not None and entry.central else {"dp-clip", "dp-delta"}
        if entry is None or not entry.central:
            idle.add("secret-noise")
    if not aligned:
        idle.add("secure-sums")
    if secure:  # clients align themselves to a public network
        idle.add("reference")
    if config.get("optimizer") == "adam":
        idle |= {"momentum", "nesterov"}
    steps = {key: config[key] for key in _STEPS - {"retrain-epochs"} if key in config}
    try:
        used = strategies.uses(strategy, Pipeline(**steps))
    except FedmergeError:  # of another version, or of a module that is not here: nothing is known of it
        return frozenset(idle)
    idle |= _STEPS - {name.replace("_", "-") for name in used}
    asked = {name.strip() for name in str(config.get("controls")).split(",")} - {"none", "None", ""}
    if any(name not in CONTROLS or CONTROLS[name].retrains for name in asked):  # all, or one from outside
        idle -= {"retrain", "retrain-epochs"} | ({"teacher"} if config.get("retrain") != "labels" else set())
    return frozenset(idle)


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without the keys that its run does not use."""
    idle = unused(config)
    return {key: value for key, value in config.items() if key not in idle}


def setups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in nothing but their seed.

    The names of the groups spell out the config keys that differ between groups, for example
    ``"strategy=fedavg, init=shared"``; a single group is called ``""``. Within a group runs are ordered by
    seed; of two runs with one seed the later one counts, so that a repetition is not taken for a new seed.
    """
    keys = differing_keys(runs)
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        groups.setdefault(spelt(run.config, keys), {})[run.seed] = run
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in groups.items()}


def titles(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """Setup of :func:`setups` -> what to call it: the ``name`` on which its runs agree, else as it is spelt.

    Behind a name that several setups have stands in what these differ. Names that would confuse two are not used.
    """
    called = {setup: _called(members) for setup, members in groups.items()}
    keys = {
        name: differing_keys([run for setup, members in groups.items() if called[setup] == name for run in members])
        for name in set(called.values())
    }
    found = {
        setup: ", ".join(filter(None, (name, spelt(groups[setup][0].config, keys[name])))) if name else setup
        for setup, name in called.items()
    }
    return found if len(set(found.values())) == len(found) else {setup: setup for setup in groups}


def _called(runs: Sequence[Run]) -> str:
    """The name on which ``runs`` agree, or ``""``."""
    names = {str(run.config.get("name", "")) for run in runs}
    return names.pop() if len(names) == 1 else ""


def spelt(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Those of ``keys`` that are used, with their values, as in ``"strategy=fedavg, init=shared"``."""
    idle = unused(config)
    shown = {key: None if key in idle else config.get(key) for key in keys if key not in idle or key in _SWITCHES}
    return ", ".join(f"{key}={written(value)}" for key, value in shown.items())


def written(given: Any) -> str:
    """A config value as it is written in TOML, near enough; an absent one as a dash."""
    if given is None:
        return "–"
    return str(given).lower() if isinstance(given, bool) else str(given)


def problem(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is asked to solve, its seed included: all keys but :data:`METHOD_KEYS` and what does not matter."""
    ignored = METHOD_KEYS | _NO_MATTER - {"seed"}
    if unused(config) >= _SWITCHES:
        ignored |= {"dp-delta"}  # then it is of a strategy that blurs what the server aggregates
    return {key: value for key, value in chosen(used(config)).items() if key not in ignored}
