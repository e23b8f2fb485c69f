"""Fisher merging (Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv:2111.09832)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_weights
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge._ties import first_names
from fedmerge.data import Images
from fedmerge.data.losses import loss_of
from fedmerge.errors import DataError
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_CHUNK = 50


@checked
def fisher(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    floor: float = 1e-6,
    normalise: bool = True,
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Average the models in a common order, each parameter weighed by how much the model's prediction depends on it.

    With the models in a common order, their weights :math:`w_i` and the diagonals :math:`F_i` of their Fisher
    information on ``data``,

    .. math:: \theta = \frac{\sum_i w_i c_i (F_i + \epsilon)\, \theta_i}{\sum_i w_i c_i (F_i + \epsilon)}, \qquad
              F_i = \frac1N \sum_x \sum_y p(y | x; \theta_i)\, \big(\nabla_\theta \log p(y | x; \theta_i)\big)^2,

    which with :math:`c_i = 1` maximises the sum of the models' posteriors, each a Gaussian around
    :math:`\theta_i` (eq. 3). The expectation over y is taken exactly, by one gradient a class. :math:`\epsilon` is
    ``floor`` times the mean of all models' Fisher information. With ``normalise``,
    :math:`c_i = 1 / (\|F_i\|_2 + \epsilon)`, the norm taken over all parameters together, so that a model that is
    unsure of its predictions, whose information is large everywhere, does not outvote the others. That is
    ``normalize_fisher_weight`` of Yu et al. ("Language Models are Super Mario", ICML 2024, arXiv:2311.03099;
    code MergeLM), on by default in their merging function; their floor is absolute. A
    tensor of several names is one parameter: its gradient is that of all its uses, and it counts once in norm and
    mean. Buffers and frozen parameters are averaged.

    Where the data have a loss of their own, or a class for each position of a row, :math:`F_i` is the empirical Fisher
    information: the mean over rows of the squared gradient of a row's loss at its own labels.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignment.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        model: The network.
        data: Public images; their labels are not read but for the empirical information.
        floor: Above.
        normalise: Above; off, a model counts by the size of its information.
        device: Where to compute.
        options: Further options of the alignment.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images, or the network does not take them.
        ConfigError: ``floor`` is not a finite number of 0 or above.

    Cost: per model, image and class one backward pass; of the empirical information one a row.
    """
    model, data = need_images("fisher", model, data, reads="answers")
    check_number("floor of fisher", floor, 0)
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    shares = check_weights(weights, len(models)).tolist()
    moved = ordered(models, start, spec=spec)
    told = steps("measuring Fisher information", moved)
    information = [fisher_information(model, params, data, device=device) for params in told]
    total = sum(float(f.sum()) for found in information for f in found.values())
    count = sum(f.numel() for found in information for f in found.values())
    epsilon = floor * total / max(1, count)
    if normalise:
        norms = [sum(float(f.square().sum()) for f in found.values()) ** 0.5 for found in information]
        shares = [share / (norm + epsilon or 1.0) for share, norm in zip(shares, norms, strict=True)]
    merged = dict(start.params)
    for name, first in first_names(model).items():
        if first not in information[0] or name not in merged:
            continue
        above, below = (torch.zeros_like(information[0][first]) for _ in range(2))
        for share, params, found in zip(shares, moved, information, strict=True):
            weight = share * (found[first] + epsilon)
            above += weight * params[name].double().cpu()
            below += weight
        # Without a floor, a parameter that matters to no model keeps the weighted mean.
        merged[name] = torch.where(below > 0, above / below, merged[name].double().cpu()).to(merged[name])
    return replace(start, params=merged)


def fisher_information(model: nn.Module, params: Params, data: Images, *, device: str = "cpu") -> dict[str, Tensor]:
    """Diagonal of the Fisher information of every trained tensor, under its first name; see :func:`fisher`.

    Float64, on the CPU, of the network in eval mode.
    """
    first = first_names(model)
    network = load(model, params, device)
    tensors = dict((*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)))
    trained = {n: tensors[n].detach() for n in dict.fromkeys(first.values()) if tensors[n].requires_grad}
    fixed = {name: tensor.detach() for name, tensor in tensors.items() if first[name] not in trained}

    def run(values: dict[str, Tensor], image: Any) -> Tensor:
        # Every name of a tensor is the same variable, so that its gradient is the sum over its uses.
        every = {name: values[first[name]] for name in tensors if first[name] in values}
        batch = pytree.tree_map(lambda t: t[None], image)
        return functional_call(network, {**every, **fixed}, (batch,), tie_weights=False)  # type: ignore[no-any-return]

    def log_probability(values: dict[str, Tensor], image: Any, label: Tensor) -> Tensor:
        return run(values, image).log_softmax(1)[0].gather(0, label[None]).squeeze(0)

    def loss(values: dict[str, Tensor], image: Any, label: Tensor) -> Tensor:
        return loss_of(data, run(values, image), label[None])

    exact = data.loss is None and data.labels.dim() == 1
    slope_of = grad(log_probability if exact else loss)

    def slopes(images: Any, labels: Tensor) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                at_once = vmap(slope_of, in_dims=(None, 0, 0 if labels.dim() else None))
                return at_once(trained, images, labels)  # type: ignore[no-any-return]
        except (RuntimeError, DataError):  # an operator that knows no images side by side, as in recurrent layers
            rows = range(len(pytree.tree_leaves(images)[0]))
            each = [
                slope_of(trained, pytree.tree_map(lambda t, i=i: t[i], images), labels[i] if labels.dim() else labels)
                for i in rows
            ]
            return {name: torch.stack([slope[name] for slope in each]) for name in trained}

    total = {name: torch.zeros(p.shape, dtype=torch.float64, device=device) for name, p in trained.items()}
    pieces = list(zip(torch.split(data.images, _CHUNK), torch.split(data.labels, _CHUNK), strict=True))
    for batch, labels in steps("differentiating", pieces):
        images = data.normalise(batch.to(device))
        if not exact:
            for name, slope in slopes(images, labels.to(device)).items():
                total[name] += slope.square().sum(0).double()
            continue
        with torch.no_grad():
            chance = network(images).softmax(1)
        for label in range(chance.shape[1]):
            for name, slope in slopes(images, torch.tensor(label, device=device)).items():
                total[name] += torch.einsum("b,b...->...", chance[:, label], slope.square()).double()
    return {name: (t / len(data)).cpu() for name, t in total.items()}
