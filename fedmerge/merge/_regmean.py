"""RegMean (Jin et al., "Dataless Knowledge Fusion by Merging Weights", ICLR 2023, arXiv:2212.09849)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_weights
from fedmerge._forward import need_images
from fedmerge._ties import first_names
from fedmerge.data import Images
from fedmerge.merge._grams import Block, gram_blocks, solve
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def regmean(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    scale: float = 0.9,
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Average the models in a common order so that every layer answers its inputs as the models' own layers do.

    For each linear layer, embedding and convolution (transposed, in groups and in any padding too), with
    :math:`X_i` the inputs that model i's layer sees on ``data`` (for a convolution, its padded patches; for an
    embedding, one-hot rows; where the layer has a bias, with a column of ones) and :math:`G_i = X_i^\top X_i`, solves

    .. math:: \min_W \sum_i w_i \| X_i W - X_i W_i \|^2 \;\Rightarrow\;
              W = \Big(\sum_i w_i \tilde G_i\Big)^{-1} \sum_i w_i \tilde G_i W_i ,

    where :math:`\tilde G` has its off-diagonal entries multiplied by ``scale`` (eq. 2 and section 3.3). Directions
    that no input spans fall to the minimum-norm correction of the weighted mean. The paper averages biases; here they
    are part of the regression. Layers that share a weight or a bias are one regression, in which the squared errors
    of all their uses add up; a tensor has one result under all its names. A weight that is shared by a convolution
    and a transposed one, and everything that is none of these layers, is averaged.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignment.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        model: The network.
        data: Public images; their labels are not read.
        scale: In [0, 1]; 1 is the exact regression, 0 weighs each input by its power alone.
        device: Where to compute.
        options: Further options of the alignment.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images.
        ConfigError: ``scale`` outside [0, 1].

    Cost: per model one forward pass over ``data`` and a d x d product a layer with d inputs; one O(d^3) solution a
    layer. Memory: two d x d matrices a layer.
    """
    model, data = need_images("regmean", model, data)
    check_number("scale of regmean", scale, 0, 1)
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    shares = check_weights(weights, len(models)).tolist()
    moved = ordered(models, start, spec=spec)
    blocks: list[Block] = []
    left: list[Tensor] = []
    right: list[Tensor] = []
    counts: list[Tensor | None] = []
    for i, params in enumerate(steps("measuring inputs", moved)):
        blocks = gram_blocks(model, params, data, device=device)
        for k, block in enumerate(blocks):
            diagonal = torch.diag_embed(block.gram.diagonal(dim1=1, dim2=2))
            scaled = shares[i] * (scale * block.gram + (1 - scale) * diagonal)
            # The mean is the unknown's origin, so that unseen directions keep it.
            offset = block.matrix(params) - block.matrix(start.params)
            pull = (offset.reshape(block.groups, -1, offset.shape[1]) @ scaled).reshape(offset.shape)
            seen = None if block.counts is None else shares[i] * block.counts
            if seen is not None:
                pull += seen[:, None] * block.embeds * offset
            if i == 0:
                left.append(scaled)
                right.append(pull)
                counts.append(seen)
            else:
                before = counts[k]
                left[k] += scaled
                right[k] += pull
                counts[k] = seen if before is None else before if seen is None else before + seen
    merged = {name: tensor.clone() for name, tensor in start.params.items()}
    for block, gram, pull, seen in zip(blocks, left, right, counts, strict=True):
        found = solve(gram, seen, block.embeds, pull, block.groups) + block.matrix(start.params)
        merged |= block.tensors(found, start.params)
    for name, first in first_names(model).items():
        if name in merged:
            merged[name] = merged[first].clone()
    return replace(start, params=merged)
