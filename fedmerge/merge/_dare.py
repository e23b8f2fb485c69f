"""DARE (Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmerge._arguments import checked
from fedmerge._check import check_weights
from fedmerge.errors import ConfigError
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._task_vectors import agreed, need_base, steps_from
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def dare(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    base: Params | None = None,
    model: nn.Module | None = None,
    density: float = 0.5,
    elect: bool = False,
    scale: float = 1.0,
    **_: Any,
) -> Merge:
    r"""Drop numbers of the models' steps from a common base at random, rescale the others, and add their mean.

    With :math:`\tau_i = \theta_i - \theta_0` and :math:`m_i` of independent draws that are 1 with probability
    :math:`d` = ``density`` (the paper's :math:`1 - p`), eq. 3:

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \, m_i \odot \tau_i / d

    Each step keeps its mean over the draws. ``elect`` lets the dropped steps elect a sign for each parameter and
    averages those that agree, as TIES does in place of the sum ("DARE-TIES"). Weights are ours; the paper's task
    arithmetic is ``scale`` = number of models. Buffers are averaged.

    Args:
        models: State dicts of one architecture, trained from ``base``.
        spec: The symmetries, which say what is a parameter.
        weights: One non-negative number a model; equal if None.
        rng: What is dropped; by default a generator seeded with 0.
        base: Where all models began, in a federation the round's global network.
        model: The network, which says what names are one tensor, of which one draw is made.
        density: Probability that a number is kept, in (0, 1]; 1 is task arithmetic, or TIES without its trimming.
        elect: Whether signs are elected.
        scale: Lambda above.

    Raises:
        ParamsError: No base, models that do not fit, or that give one tensor of ``model`` two values.
        ConfigError: ``density`` outside (0, 1].
    """
    base = need_base("dare", base, models, spec)
    if not 0 < density <= 1:
        raise ConfigError(f"density of dare is {density:g}; expected a probability in (0, 1]")
    rng = rng or np.random.default_rng(0)
    shares = check_weights(weights, len(models)).tolist()
    way = steps_from(base, models, spec, model)
    drawn = [torch.from_numpy(rng.random(len(step)) < density) for step in way.steps]
    kept = [chosen.to(step.device) * step / density for chosen, step in zip(drawn, way.steps, strict=True)]
    total = sum((w * step for w, step in zip(shares, kept, strict=True)), torch.zeros_like(kept[0]))
    return way.merged(scale * (agreed(kept, shares) if elect else total), weights)
