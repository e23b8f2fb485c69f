"""MergeMany (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, Alg. 3)."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights, position
from fedmerge._loading import versions
from fedmerge.align import Alignment, align, weight_matching
from fedmerge.align.traces import shared, sharing
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.memory import give_back
from fedmerge.merge._average import average
from fedmerge.merge._carry import Carrying
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import permute_tensor
from fedmerge.types import Params, Perms

_RTOL = 1e-12
_STARTS = ("anchored", "paper")
_WORKERS = 4
_LARGE = 2**21
"""Parameters from which on freed memory is given back after each alignment, which costs some milliseconds."""


@dataclass(frozen=True)
class Merge:
    """Several networks combined into one.

    Attributes:
        params: State dict of the merged network.
        perms: One dict of permutations a model: how each was reordered before the mean was taken.
        objective: Value of what was climbed, at the end.
        history: The objective at the start and after each sweep.
        sweeps: Passes over the models.
        converged: Whether the method ended by its own rule and not at a bound on its sweeps. After MergeMany: weight
            matching to the mean of the others moves no model on (see :class:`fedmerge.Alignment` for what that means).
            Methods that solve everything once have nothing to repeat, and say True if each alignment did.
        maps: One dict a model, group -> float64 matrix ``(n_merged, n_model)``, from methods whose maps of units are
            not permutations (``perms`` is then empty); empty from all others.
        carrying: How the weights were carried by ``maps``.
        approximate: Groups of units that were too wide for exact assignments (see :class:`fedmerge.Alignment`).
        left: Groups that the method had nothing to compare by, so that they keep their order.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> merged = fm.merge([model.state_dict()] * 2, spec=fm.perm_spec(model, torch.zeros(1, 2)), method="average")
        >>> torch.equal(merged.params["weight"], model.weight.detach())
        True
    """

    params: dict[str, Tensor]
    perms: tuple[dict[str, Tensor], ...]
    objective: float
    history: tuple[float, ...]
    sweeps: int
    converged: bool
    maps: tuple[dict[str, Tensor], ...] = ()
    approximate: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    carrying: Carrying = field(default_factory=Carrying)


@checked
def merge_many(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    start: str = "anchored",
    reference: int = 0,
    restarts: int = 5,
    aligner: str | Callable[..., Alignment] = "weight-matching",
    aligner_options: Mapping[str, Any] | None = None,
    max_sweeps: int = 50,
    workers: int = 0,
) -> Merge:
    r"""Reorder all models at once so that they resemble each other, then average them.

    With one reordering :math:`\pi_i` and one weight :math:`w_i` a model, climbs

    .. math:: J(\pi) = \sum_k \Big\| \sum_i w_i\, \pi_i(\theta_i)_k \Big\|^2 ,

    which equals a constant plus all pairwise inner products. Aligning one model to the weighted mean of the
    others, starting from its present order, never lowers J; sweeps over the models in random order end when J
    stops rising (Alg. 3).

    ``start="paper"`` begins with every model as it is. With many unaligned models the mean of the others is
    noise, and so is what the first pass aligns to. ``start="anchored"`` (the default) first aligns every model
    to model ``reference``, taking the best of ``restarts`` climbs.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model (for example its number of examples); equal if None.
        rng: Randomness of the climb; by default a generator seeded with 0.
        start: ``"anchored"`` or ``"paper"``.
        reference: Position of the anchor; it keeps its own order at the start.
        restarts: Climbs per alignment to the anchor.
        aligner: The method that aligns to the anchor, a name from :func:`fedmerge.aligners`.
        aligner_options: Further arguments of that method, for example ``model`` and ``data`` where it looks at images.
        max_sweeps: Bound on the passes over the models.
        workers: Models that are aligned to the anchor at one time, each in a thread on one core; 0 for as many as
            torch uses cores, at most 4. The number changes no result, and each takes memory for its products.

    Raises:
        ParamsError: Models, weights or reference that do not fit.
        UnknownNameError: No such start or aligner.

    Cost: ``len(models) * (restarts + sweeps)`` weight matchings. Memory: about five copies of one model in float32
    (the sum and one model in float64, and the result), however many models there are: each is read tensor by
    tensor whenever it is needed, so models that lie on a disk (:func:`fedmerge.open_params`) stay there.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec, a = fm.perm_spec(model, torch.zeros(1, 4)), model.state_dict()
        >>> others = [fm.permute(a, spec.random(torch.Generator().manual_seed(i)), spec=spec) for i in range(2)]
        >>> merged = fm.merge_many([a, *others], spec=spec)  # three orders of one network: nothing is lost
        >>> torch.allclose(merged.params["2.weight"], a["2.weight"])
        True
    """
    if start not in _STARTS:
        raise UnknownNameError("start of MergeMany", start, _STARTS)
    check_params(models, spec)
    shares = check_weights(weights, len(models))
    rng = rng if rng is not None else np.random.default_rng(0)
    reference = position(reference, len(models))

    perms = [spec.identity(m) for m in models]
    approximate: set[str] = set()
    large = sum(models[0][name].numel() for name in spec.parameters) >= _LARGE
    if start == "anchored":
        options = {"restarts": restarts, **further(aligner_options)}
        traces = shared()

        def anchor(i: int, rng: np.random.Generator) -> None:
            with sharing(traces):
                found = align(models[i], models[reference], spec=spec, method=aligner, rng=rng, **options)
            if large:
                give_back()
            perms[i] = found.perms
            approximate.update(found.approximate)

        # A stream a model, so that the order in which they end changes nothing.
        streams = rng.spawn(len(models))
        in_parallel([partial(anchor, i, streams[i]) for i in range(len(models)) if i != reference], workers)
    total = _Total(models, perms, shares.tolist(), spec)
    tidy = give_back if large else lambda: None

    history = [total.objective()]
    # A model is aligned again only after another one moved.
    waiting = set(range(len(models))) if len(models) > 1 else set()
    sweeps = 0
    while waiting and sweeps < max_sweeps:
        sweeps += 1
        for i in steps(f"merging, sweep {sweeps}", rng.permutation(sorted(waiting)).tolist()):
            # Step 6 of Alg. 3: align model i to the mean of the others, from its present order.
            waiting.discard(i)
            total.add(i, -1)
            tidy()
            found = weight_matching(models[i], to=total.others(i), spec=spec, rng=rng, start=perms[i])
            approximate.update(found.approximate)
            if found.objective > found.history[0] + _RTOL * abs(found.history[0]):
                perms[i] = found.perms
                waiting |= set(range(len(models))) - {i}
            if not found.converged:
                waiting.add(i)
            tidy()
            total.add(i, 1)
        history.append(total.objective())
    del total
    tidy()
    merged = average([Reordered(m, p, spec) for m, p in zip(models, perms, strict=True)], shares.tolist())
    groups = tuple(g for g in spec.groups if g in approximate)
    return Merge(merged, tuple(perms), history[-1], tuple(history), sweeps, not waiting, approximate=groups)


def in_parallel(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Run independent tasks in threads, one core each: assignments and products both leave Python's lock alone."""
    threads = torch.get_num_threads()
    workers = min(workers or min(threads, _WORKERS), len(tasks))
    if workers < 2:
        for task in steps("aligning models", tasks):
            task()
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in steps("aligning models", [pool.submit(task) for task in tasks]):
                future.result()
    finally:
        torch.set_num_threads(threads)


def further(aligner_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """``aligner_options`` as a dict, without what the merger itself says to the aligner.

    Raises:
        ConfigError: Names the options that are none.
    """
    given = dict(aligner_options or {})
    if wrong := [
        name for name in given if name in ("params", "to", "spec", "method", "rng") or not isinstance(name, str)
    ]:
        raise ConfigError(
            f"aligner_options hold {wrong}, which the merger itself says; give options of the aligner only"
        )
    return given


class Reordered(Mapping[str, Tensor]):
    """A state dict with its units reordered, one tensor at a time as it is asked for."""

    def __init__(self, params: Params, perms: Perms, spec: PermSpec) -> None:
        self.params, self.perms, self.axes = params, perms, spec.axes
        self._metadata = versions(params)  # where torch looks for them

    def __getitem__(self, name: str) -> Tensor:
        return permute_tensor(self.params[name], self.axes.get(name, ()), self.perms)

    def __contains__(self, name: object) -> bool:
        return name in self.params

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


class _Total:
    """The weighted sum of the reordered models' parameters, in float64; ``perms`` is read anew at each use."""

    def __init__(
        self, models: Sequence[Params], perms: Sequence[Perms], shares: Sequence[float], spec: PermSpec
    ) -> None:
        self.models, self.perms, self.shares, self.spec = models, perms, shares, spec
        self.names = [name for name in spec.axes if name in spec.parameters]
        self.sum = {name: torch.zeros_like(models[0][name], dtype=torch.float64) for name in self.names}
        for i in range(len(models)):
            self.add(i, 1)

    def add(self, i: int, sign: int) -> None:
        """Put model ``i`` in, as it is ordered now, or take it out."""
        moved = Reordered(self.models[i], self.perms[i], self.spec)
        for name, total in self.sum.items():
            total.add_(moved[name].to(total.device), alpha=sign * self.shares[i])

    def others(self, i: int) -> Params:
        """The sum as a state dict; the buffers of ``i`` stand in for nobody's, because they do not vote."""
        return ChainMap(self.sum, self.models[i])  # type: ignore[arg-type]

    def objective(self) -> float:
        """J."""
        return float(sum((t * t).sum() for t in self.sum.values()))
