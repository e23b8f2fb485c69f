"""Alignment of networks of which nobody sees another: to a public anchor, then to the mean of the others, from sums."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_params
from fedmerge.align import align, weight_matching
from fedmerge.errors import RoundError
from fedmerge.merge import Merge
from fedmerge.secure._fixed import Total, Words, check_counts, decode, encode
from fedmerge.secure._masks import Party, check_threshold, unmask
from fedmerge.spec import PermSpec, permute
from fedmerge.types import Params, Perms


def to_anchor(
    params: Params,
    anchor: Params,
    *,
    spec: PermSpec,
    rng: np.random.Generator,
    aligner: str = "weight-matching",
    restarts: int = 5,
    aligner_options: Mapping[str, Any] | None = None,
) -> Perms:
    """What a client does first: the order of units that resembles the public ``anchor``, the best of ``restarts``."""
    options = {"restarts": restarts, **(aligner_options or {})}
    return align(params, anchor, spec=spec, method=aligner, rng=rng, **options).perms


def to_others(params: Params, total: Total, weight: int, *, spec: PermSpec, rng: np.random.Generator) -> Perms:
    """What it does next: from the order that it sent, weight matching to the mean of the others.

    That is the sum less its own network: ``total`` as everyone gets it, ``weight`` what this one counted in it.
    """
    own = weight / total.weight
    others = {
        name: mean.double() - own * params[name].double() if name in spec.parameters else params[name]
        for name, mean in total.mean.items()
    }
    return weight_matching(params, to=others, spec=spec, rng=rng, start="identity").perms


def objective(total: Total, spec: PermSpec) -> float:
    """What MergeMany climbs, of a sum: the squared norm of the mean, over all parameters."""
    return sum(float(total.mean[name].double().square().sum()) for name in spec.parameters)


def masked_sum(vectors: Mapping[int, Words], threshold: int, *, gone: Collection[int] = ()) -> Words:
    """All parties and the server of one masked sum in this process, with the messages that they would send.

    Args:
        vectors: Party -> its words.
        threshold: So many parties must stay to the end.
        gone: Who ends after sending its shares and before sending its words.

    Raises:
        ConfigError: A threshold below 2 or above the number of parties.
        RoundError: Fewer than the threshold stay.
    """
    check_threshold(threshold, len(vectors))
    parties = {i: Party(i, threshold) for i in sorted(vectors)}
    roster = {i: party.keys for i, party in parties.items()}
    sealed: dict[int, dict[int, bytes]] = {i: {} for i in parties}
    for i, party in parties.items():
        parties[i], sent = party.share(roster)
        for other, part in sent.items():
            sealed[other][i] = part
    masked, opened = {}, {}
    staying = [i for i in parties if i not in gone]
    if len(staying) < threshold:
        raise RoundError(f"{len(staying)} of {len(parties)} parties stayed, the threshold is {threshold}")
    for i in staying:
        parties[i], masked[i] = parties[i].mask(vectors[i], sealed[i])
    for i in staying:
        _, opened[i] = parties[i].open(masked)
    return unmask(masked, opened, roster=roster, sent=parties, threshold=threshold)


@checked
def merge_by_sums(
    models: Sequence[Params],
    *,
    anchor: Params,
    spec: PermSpec,
    weights: Sequence[int] | None = None,
    rng: np.random.Generator | None = None,
    sums: int = 2,
    aligner: str = "weight-matching",
    restarts: int = 5,
    aligner_options: Mapping[str, Any] | None = None,
) -> Merge:
    r"""Merge networks as their owners can do it between them, the server seeing masked sums only; all in one process.

    Each owner i aligns its network to ``anchor``, and :math:`S = \sum_i w_i \pi_i(\theta_i)` is taken under masks
    (:func:`masked_sum`). Everyone is told S and aligns itself to S less its own, all at one time, and S is taken again.
    Where a sum is no better than the one before, by the squared norm of its mean, that one stays. MergeMany instead
    moves one model after the other, for which each would have to be a sum of its own.

    Args:
        models: State dicts of one architecture.
        anchor: A public network of it, for example one trained on public images.
        spec: The symmetries.
        weights: A positive integer a model; equal if None.
        rng: Randomness of the alignments; by default a generator seeded with 0.
        sums: How many sums are taken; all but the first cost an alignment to the mean of the others.
        aligner: The method that aligns to the anchor.
        restarts: Climbs of an alignment to the anchor.
        aligner_options: Further arguments of that method.

    Returns:
        The merge; its history is the objective of each sum.

    Raises:
        ParamsError: Models, an anchor or weights that do not fit, or numbers too large for a sum.
        ConfigError: A single model, or less than one sum.
    """
    check_params(models, spec)
    check_params([models[0], anchor], spec)
    check_number("sums", sums, 1)
    counts = [1] * len(models) if weights is None else list(weights)
    check_counts(counts, len(models))
    check_threshold(len(models), len(models))
    streams = (rng or np.random.default_rng(0)).spawn(len(models))
    how: dict[str, Any] = {"aligner": aligner, "restarts": restarts, "aligner_options": aligner_options}
    orders = [to_anchor(m, anchor, spec=spec, rng=r, **how) for m, r in zip(models, streams, strict=True)]
    best, history, total = orders, list[float](), None
    for taken in range(sums):
        now = [permute(m, order, spec=spec) for m, order in zip(models, orders, strict=True)]
        vectors = {i: encode(m, w, len(now)) for i, (m, w) in enumerate(zip(now, counts, strict=True))}
        latest = decode(masked_sum(vectors, len(now)), anchor)
        history.append(objective(latest, spec))
        if total is None or history[-1] > objective(total, spec):
            total, best = latest, orders
        if taken + 1 < sums:
            steps = [to_others(m, latest, w, spec=spec, rng=r) for m, w, r in zip(now, counts, streams, strict=True)]
            orders = [{g: order[g][step[g]] for g in step} for order, step in zip(orders, steps, strict=True)]
    assert total is not None
    converged = sums > 1 and history[-1] <= max(history[:-1])
    return Merge(total.mean, tuple(map(dict, best)), max(history), tuple(history), sums, converged)
