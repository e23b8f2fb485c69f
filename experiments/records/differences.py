"""In which keys the configurations of a few runs differ, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records.keys import unused, written
from experiments.records.runs import Run
from fedmerge.errors import FedmergeError
from server import RunConfig

MOST_COMPARED = 8
"""Of more runs than this no table stands side by side."""


def differences(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Every key in which two of ``runs`` differ -> its effective value in each, a dash where a run does not use it.

    The seed, what is measured and what a run is called are among the keys. A run whose configuration is lost has
    dashes everywhere.
    """
    configs = [effective(run.config) for run in runs]
    idle = [unused(config) for config in configs]
    rows = {
        key: tuple(
            written(None if key in no_use else config.get(key)) for config, no_use in zip(configs, idle, strict=True)
        )
        for key in dict.fromkeys(key for config in configs for key in config)
    }
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what its values stand for in their place, as far as this version can tell."""
    try:
        resolved = RunConfig.parse(config).flat()
    except FedmergeError:  # of another version, or its data is not here
        return dict(config)
    return {key: resolved[key.replace("_", "-")] for key in config}
