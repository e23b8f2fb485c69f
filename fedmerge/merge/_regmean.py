"""RegMean (Jin et al., "Dataless Knowledge Fusion by Merging Weights", ICLR 2023, arXiv:2212.09849)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._check import check_weights
from fedmerge.align._finish import load, need_images
from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params

_BATCH = 100


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
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Merge:
    r"""Average the models in a common order so that every layer answers its inputs as the models' own layers do.

    For each linear layer and each convolution, with :math:`X_i` the inputs that model i's layer sees on ``data``
    (for a convolution, its unfolded patches; where the layer has a bias, with a column of ones) and
    :math:`G_i = X_i^\top X_i`, solves

    .. math:: \min_W \sum_i w_i \| X_i W - X_i W_i \|^2 \;\Rightarrow\;
              W = \Big(\sum_i w_i \tilde G_i\Big)^{-1} \sum_i w_i \tilde G_i W_i ,

    where :math:`\tilde G` has its off-diagonal entries multiplied by ``scale`` (eq. 2 and section 3.3). Directions
    that no input spans fall to the minimum-norm correction of the weighted mean. Convolutions in more than one
    group, and everything that is neither, are averaged.

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
        progress: Called with a line of text after each model.
        options: Further options of the alignment.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images.
        ConfigError: ``scale`` outside [0, 1].

    Cost: per model one forward pass over ``data`` and a d x d product a layer with d inputs; one O(d^3) solution a
    layer. Memory: two d x d matrices a layer.
    """
    model, data = need_images("regmean", model, data)
    if not 0 <= scale <= 1:
        raise ConfigError(f"scale of regmean is {scale}; expected a number in [0, 1]")
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, progress=progress, **options)
    shares = check_weights(weights, len(models)).tolist()
    moved = ordered(models, start, spec=spec)
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for i, (share, params) in enumerate(zip(shares, moved, strict=True)):
        for name, gram in gram_matrices(model, params, data, device=device).items():
            scaled = scale * gram + (1 - scale) * torch.diag(gram.diagonal())
            # The mean is the unknown's origin, so that unseen directions keep it.
            offset = _matrix(params, name) - _matrix(start.params, name)
            left[name] = left.get(name, 0) + share * scaled
            right[name] = right.get(name, 0) + share * scaled @ offset.T
        if progress is not None:
            progress(f"inputs of model {i}")
    merged = {name: tensor.clone() for name, tensor in start.params.items()}
    for name, gram in left.items():
        found = torch.linalg.lstsq(gram, right[name], driver="gelsd").solution.T + _matrix(start.params, name)
        weight = merged[f"{name}.weight"]
        columns = weight[0].numel()
        merged[f"{name}.weight"] = found[:, :columns].reshape(weight.shape).to(weight)
        if f"{name}.bias" in merged:
            merged[f"{name}.bias"] = found[:, columns].to(merged[f"{name}.bias"])
    return replace(start, params=merged)


def gram_matrices(model: nn.Module, params: Params, data: Images, *, device: str = "cpu") -> dict[str, Tensor]:
    """Layer -> mean over images of X^T X, float64 ``(d, d)`` on the CPU; d counts the bias where there is one."""
    network = load(model, params, device)
    found: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice) if layer.padding != (0, 0) else x
            x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).movedim(1, 2)
        x = x.flatten(0, -2).double()
        if layer.bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        found[name] = found.get(name, 0) + (x.T @ x).cpu() / len(data)

    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: add(name, layer, inputs))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    with torch.no_grad():
        for batch in torch.split(data.images, _BATCH):
            network(data.normalise(batch.to(device)))
    for handle in handles:
        handle.remove()
    return found


def _matrix(params: Params, name: str) -> Tensor:
    """Weight, and bias as the last column, float64 ``(out, d)``."""
    weight = params[f"{name}.weight"].detach().double().cpu().flatten(1)
    bias = params.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias.detach().double().cpu()[:, None]], 1)
