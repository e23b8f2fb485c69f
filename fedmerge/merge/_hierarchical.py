"""Hierarchical merging: pairs of models, then pairs of those, up to one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights
from fedmerge.align import Alignment, align
from fedmerge.align.traces import shared, sharing
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge, further
from fedmerge.progress import steps
from fedmerge.spec import PermSpec, permute
from fedmerge.types import Params


@checked
def hierarchical(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    restarts: int = 5,
    aligner: str | Callable[..., Alignment] = "weight-matching",
    aligner_options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Merge:
    r"""Average the models in a balanced binary tree, each pair aligned before it is averaged.

    At each level neighbours A and B become :math:`(w_A A + w_B\, \pi(B)) / (w_A + w_B)` with :math:`\pi` the
    alignment of B to A, and their weights add; an odd one out rises unchanged. Every alignment is between means of
    equally many models (but for the last), so none has to match a single network to a mean of many, and there are
    n - 1 alignments in log2(n) levels, which need each other's results only across levels. A level is not
    revisited, so the objective of MergeMany is not climbed to the end.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignments.
        restarts: Climbs per alignment.
        aligner: A name from :func:`fedmerge.aligners`.
        aligner_options: Further arguments of that method.

    Returns:
        The weighted mean of the models reordered by ``perms``, each the composition of its levels.

    Raises:
        ParamsError: Models or weights that do not fit.
        UnknownNameError: No such aligner.

    Cost: n - 1 alignments, and one mean of all models a level.
    """
    check_params(models, spec)
    shares = check_weights(weights, len(models)).tolist()
    rng = rng if rng is not None else np.random.default_rng(0)
    perms = [spec.identity(m) for m in models]
    options = {"restarts": restarts, **further(aligner_options)}

    def mean(members: Sequence[int]) -> dict[str, Any]:
        given = [shares[i] for i in members]
        moved = [permute(models[i], perms[i], spec=spec) for i in members]
        return average(moved, given if sum(given) > 0 else None)

    nodes = [[i] for i in range(len(models))]
    levels, converged = 0, True
    left: dict[str, None] = {}
    approximate: set[str] = set()
    traces = shared()
    while len(nodes) > 1:
        levels += 1
        above = []
        for k in steps(f"merging pairs, level {levels}", range(0, len(nodes) - 1, 2)):
            first, second = nodes[k : k + 2]
            with sharing(traces):
                found = align(mean(second), mean(first), spec=spec, method=aligner, rng=rng, **options)
            converged = converged and found.converged
            left |= dict.fromkeys(found.left)
            approximate.update(found.approximate)
            for i in second:
                perms[i] = {g: perm[found.perms[g]] for g, perm in perms[i].items()}
            above.append([*first, *second])
        nodes = above + nodes[len(above) * 2 :]
    merged = mean(nodes[0])
    value = sum(float(merged[name].double().square().sum()) for name in sorted(spec.parameters))
    groups = tuple(g for g in spec.groups if g in approximate)
    return Merge(merged, tuple(perms), value, (value,), levels, converged, approximate=groups, left=tuple(left))
