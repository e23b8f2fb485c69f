"""PAPA (Jolicoeur-Martineau et al., "PopulAtion Parameter Averaging", TMLR 2024, arXiv:2304.03094)."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import merge_many
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_OPTIONS = sorted(inspect.signature(merge_many).parameters.keys() - {"models", "spec", "weights", "rng"})


@checked
def papa(
    models: Sequence[Params],
    *,
    alpha: float = 0.99,
    weights: Sequence[float] | None = None,
    order: str = "average",
    spec: PermSpec | None = None,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    r"""Pull every network of a population towards the mean of all; the population stays one.

    .. math:: \theta_i \leftarrow \alpha\, \theta_i + (1 - \alpha)\, \bar\theta,
              \qquad \bar\theta = \sum_j w_j \theta_j .

    The mean stays where it is and the distances to it shrink by :math:`\alpha`. The paper does this every 10 steps of
    training with ``alpha=0.99``; a pull after K steps is as strong as those together with
    :math:`\alpha = 0.99^{K / 10}`. ``alpha=0`` puts the mean in place of everyone, which is PAPA-all where it is done
    rarely. At the end the networks are averaged. The paper's mean is the equal one; ``weights`` are ours.

    Networks from different initialisations do not average well as they are. With ``order="merge-many"`` they are first
    brought into one order, in which they compute what they did, and are returned in that order.

    Args:
        models: State dicts of one architecture.
        alpha: How much of itself each network keeps, in [0, 1].
        weights: Of the mean, one non-negative number a model; equal if None.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        spec: The symmetries, from :func:`fedmerge.perm_spec`; not needed with ``order="average"``.
        rng: Randomness of the alignment.
        options: Further options of the alignment.

    Returns:
        One state dict a model. Buffers are pulled like parameters; integers (``num_batches_tracked``) take the
        population's largest value.

    Raises:
        ConfigError: ``alpha`` outside [0, 1].
        UnknownNameError: No such order or option.
        ParamsError: Models or weights that do not fit, or no spec to align with.

    Cost: two passes over the models, and the alignment.

    Example:
        >>> population = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}]
        >>> [p["w"].item() for p in fm.papa(population, alpha=0.5, order="average")]  # halfway to their mean
        [1.0, 3.0]
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha of papa is {alpha}; expected a number in [0, 1]")
    for option in options:
        if option not in _OPTIONS:
            raise UnknownNameError("option of papa", option, _OPTIONS)
    if order != "average":
        if spec is None:
            raise ParamsError(f"papa needs the symmetries to align by {order!r}; pass spec=, from perm_spec")
        found = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
        models = ordered(models, found, spec=spec)
    mean = average(models, weights)
    return [average([params, mean], [alpha, 1 - alpha]) for params in models]
