"""Weights that trainings of one start leave where they are, so that units keep their places (TNA-PFN).

Li et al., "Training-time Neuron Alignment through Permutation Subspace for Improving Linear Mode Connectivity and Model
Fusion", 2024, arXiv:2402.01342.
"""

import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_number


@checked
def frozen_weights(model: nn.Module, share: float, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Which weights of ``model`` a training is to leave as they are, drawn at random: name -> bool, of its shape.

    Trainings that begin at one network and leave the same weights alone cannot exchange their units: a unit is known by
    its frozen weights. They end nearer to each other, at the price of weights that learn nothing; whether their plain
    average is better for it has to be measured. Give it to :func:`fedmerge.train` as ``frozen``.

    Each weight of a layer is drawn by itself, with probability ``share``. Biases, scales of norms and other parameters
    of one axis, and parameters that are not trained, are left out.

    Args:
        model: The network.
        share: In [0, 1].
        generator: The same for all trainings whose networks shall be merged.

    Raises:
        ConfigError: A share outside [0, 1].

    Example:
        >>> model = fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
        >>> frozen = frozen_weights(model, 0.4, generator=torch.Generator().manual_seed(0))
        >>> round(float(torch.cat([where.flatten() for where in frozen.values()]).float().mean()), 2)
        0.4
    """
    check_number("share", share, 0, 1)
    return {
        name: torch.rand(weight.shape, generator=generator) < share
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dim() > 1
    }
