"""Weights of single layers: which tensor takes how much of which network."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fedmerge import PermSpec, average, merge
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.merge import MERGERS, ORDERS, Merge, Merger, ordered
from fedmerge.tasks import state_of
from fedmerge.types import Params


def weighed(
    models: Sequence[Params],
    found: Merge,
    layers: Sequence[Mapping[str, float]],
    model: nn.Module,
    *,
    spec: PermSpec,
    method: str,
    weights: Sequence[float] | None,
    **options: Any,
) -> Merge:
    """``found`` with tensors that are merged anew by weights of their own, the units where ``found`` put them.

    Args:
        models: The state dicts that were merged.
        found: Their merge with ``weights``.
        layers: Model -> pattern of names (``"features.*"``) -> its weight there, in place of that in ``weights``; the
            first pattern that fits counts.
        model: The network, which says what names are one tensor; the pattern of its first name counts for all.
        spec: The symmetries.
        method: The merger.
        weights: One number a model; equal if None.
        options: Those that the merge was made with.

    Raises:
        ParamsError: Weights of a tensor that are negative or all 0.
    """
    entry = MERGERS[method]
    moved = ordered(models, found, spec=spec)
    own = list(weights or [1.0] * len(models))
    shares: dict[tuple[float, ...], list[str]] = {}
    for name, first in _first_names(model, found.params).items():
        shares.setdefault(tuple(_weight(first, p, w) for p, w in zip(layers, own, strict=True)), []).append(name)
    merged = dict(found.params)
    for share, names in shares.items():
        if list(share) == own:
            continue
        if method in ORDERS:
            again: Params = average(moved, share)
        else:
            fixed = {**options, "order": "average"} if "order" in entry.options else options
            again = merge(moved, spec=spec, method=method, weights=share, **fixed).params
        merged |= {name: again[name] for name in names}
    return replace(found, params=merged)


def check_layers(layers: Sequence[Mapping[str, float]], names: Collection[str], method: str) -> None:
    """Refuse weights of single layers that cannot be, before anything is merged.

    Raises:
        UnknownNameError: A pattern that fits no tensor of these ``names``.
        ConfigError: A merger that does not merge tensor by tensor, once units are in one order.
    """
    for pattern in (pattern for patterns in layers for pattern in patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnknownNameError("layer (a tensor, or a pattern as 'features.*')", pattern, names)
    if any(layers) and not _by_tensor(method, MERGERS.find(method)):
        able = ", ".join(name for name, one in MERGERS.items() if _by_tensor(name, one))
        raise ConfigError(f"merger {method} has no weights of single layers; {able} have")


def _by_tensor(method: str, entry: Merger) -> bool:
    """Whether units that are in one order stay there, and what a tensor becomes depends on its own weights."""
    return (method in ORDERS or "order" in entry.options or not entry.reads) and "epochs" not in entry.needs


def _weight(name: str, patterns: Mapping[str, float], otherwise: float) -> float:
    return next((weight for pattern, weight in patterns.items() if fnmatchcase(name, pattern)), otherwise)


def _first_names(model: nn.Module, params: Params) -> dict[str, str]:
    """Name in ``params`` -> the first name of the same tensor."""
    state = state_of(model)
    seen: dict[object, str] = {}
    places = {name: (t.data_ptr(), t.shape, t.stride()) if t.numel() else name for name, t in state.items()}
    return {name: seen.setdefault(places.get(name, name), name) for name in params}
