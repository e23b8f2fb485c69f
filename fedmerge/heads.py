"""The last layer of a network in closed form, from sums over private images."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._loading import load
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError
from fedmerge.progress import steps
from fedmerge.training import predict
from fedmerge.types import Params


@dataclass(frozen=True, eq=False)
class HeadSums:
    """What ridge regression of a last layer needs of a set of images; sums of several sets are those of their union.

    No image can be read off: features enter by their products, added up over all images. What the sums of very few
    images tell is another matter; a secure sum over owners hides each owner's.

    Attributes:
        gram: Sum of z z', float64 ``(d + 1, d + 1)``; z is the last layer's input and a 1.
        cross: Sum of z y', float64 ``(d + 1, classes)``; y is one at the label.
        examples: Number of images.

    Example:
        >>> digits = fm.data.load("digits").train
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> parts = [fm.head_sums(model, model.state_dict(), digits.select(range(i, 100, 2))) for i in (0, 1)]
        >>> (parts[0] + parts[1]).examples
        100
    """

    gram: Tensor
    cross: Tensor
    examples: int

    def __add__(self, other: "HeadSums") -> "HeadSums":
        if not isinstance(other, HeadSums):
            return NotImplemented
        if self.gram.shape != other.gram.shape or self.cross.shape != other.cross.shape:
            raise ParamsError(
                f"sums of {tuple(self.cross.shape)} and {tuple(other.cross.shape)} do not add up; give one network's"
            )
        return HeadSums(self.gram + other.gram, self.cross + other.cross, self.examples + other.examples)


@checked
def head_sums(
    model: nn.Module, params: Params, data: Images, *, batch_size: int = 500, device: str = "cpu"
) -> HeadSums:
    """Add up products of the last layer's inputs over ``data``, in eval mode and float64.

    Args:
        model: The architecture; its output must be that of a ``nn.Linear``.
        params: Its state dict.
        data: Labelled images.
        batch_size: Images of a forward pass; it changes nothing but the memory.
        device: Where the forward passes run.

    Raises:
        SpecError: The network does not end in a linear layer.
        DataError: There are no images, or a label names no class.

    Cost: one forward pass, and (d + 1) ** 2 numbers.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(100))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> fm.head_sums(model, model.state_dict(), digits).gram.shape
        torch.Size([129, 129])
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images; nothing to add up")
    data.check_labels()
    network, name = load(model, params, device), head_of(model, data)
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    gram = cross = None
    with hook, torch.inference_mode():
        for rows in steps("summing", torch.split(torch.arange(len(data)), batch_size)):
            part = data.select(rows).to(device)
            network(part.normalise(part.images))
            z = seen.pop().double().flatten(0, -2)
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
            y = nn.functional.one_hot(part.labels, len(params[f"{name}.weight"])).double()
            gram = z.T @ z if gram is None else gram + z.T @ z
            cross = z.T @ y if cross is None else cross + z.T @ y
    assert gram is not None and cross is not None  # noqa: PT018
    return HeadSums(gram.cpu(), cross.cpu(), len(data))


@checked
def analytic_head(
    model: nn.Module, params: Params, sums: HeadSums, data: Images, *, strength: float
) -> dict[str, Tensor]:
    r"""A copy of ``params`` whose last layer is the ridge regression of the labels behind ``sums``.

    .. math:: \arg\min_{W, b} \sum_x \|y - W z(x) - b\|^2 + \lambda \|W\|^2,
              \quad \lambda = \mathrm{strength} \cdot \mathrm{tr}(Z'Z) / d,

    solved from :math:`Z'Z` and :math:`Z'y` alone (analytic federated learning: He et al., "AFL: A Single-Round Analytic
    Approach for Federated Learning with Pre-trained Models", CVPR 2025, arXiv:2405.16240). The outputs estimate
    probabilities; to be read as logits they are scaled by the factor of the lowest cross-entropy on ``data``, which
    changes no answer.

    Args:
        model: The architecture.
        params: The network whose inputs to the last layer were added up.
        sums: From :func:`head_sums`, added up over all owners.
        data: Labelled images that choose the scale.
        strength: Of the penalty, above 0, relative to the mean square of a feature.

    Raises:
        ConfigError: A strength of 0 or below.
        ParamsError: Sums of another network.
        SpecError: The network does not end in a linear layer.

    Cost: one Cholesky factorisation of (d + 1) ** 2 numbers, one forward pass over ``data``.

    Example:
        >>> digits = fm.data.load("digits").train
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> sums = fm.head_sums(model, model.state_dict(), digits.select(range(1000)))
        >>> fixed = fm.analytic_head(model, model.state_dict(), sums, digits.select(range(1000, 1200)), strength=1e-3)
        >>> fm.evaluate(model, fixed, digits.select(range(1200, 1797))).accuracy > 0.85  # on random features
        True
    """
    if strength <= 0:
        raise ConfigError(f"strength is {strength!r}; expected a number above 0, for example 0.001")
    name = head_of(model, data)
    classes, d = params[f"{name}.weight"].shape
    biased = f"{name}.bias" in params
    if sums.cross.shape != (d + 1, classes):
        raise ParamsError(
            f"sums are {tuple(sums.cross.shape)}; the last layer of this network needs ({d + 1}, {classes})"
        )
    system = sums.gram.clone()
    if not biased:  # no place for what a constant would explain
        system[-1, :], system[:, -1], system[-1, -1] = 0, 0, 1
    penalty = torch.full((d + 1,), float(strength * sums.gram.diagonal()[:-1].mean()), dtype=torch.float64)
    penalty[-1] = 0
    factor, failed = torch.linalg.cholesky_ex(system + torch.diag(penalty))
    if failed:
        raise ConfigError(
            f"the sums are singular at strength {strength:g} (a feature that is always 0?); give a larger one"
        )
    cross = sums.cross.clone()
    if not biased:
        cross[-1] = 0
    solved = torch.cholesky_solve(cross, factor)
    found = dict(params)
    weight = params[f"{name}.weight"]
    tensors = {f"{name}.weight": solved[:-1].T}
    if biased:
        tensors[f"{name}.bias"] = solved[-1]
    scale = _scale(model, {**found, **{k: v.to(weight.dtype) for k, v in tensors.items()}}, data)
    return {**found, **{k: (scale * v).to(weight.dtype).contiguous() for k, v in tensors.items()}}


def head_of(model: nn.Module, data: Images) -> str:
    """The name of the ``nn.Linear`` whose output is the network's.

    Raises:
        SpecError: There is none, or it shares its weight.
    """
    network = load(model, model.state_dict(), "cpu")
    outputs: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    part = data.select([0]).to("cpu")
    with torch.no_grad():
        answer = network(part.normalise(part.images))
    for name, output in outputs.items():
        if output is answer:
            weight = network.get_submodule(name).weight
            names = [n for n, p in network.named_parameters(remove_duplicate=False) if p is weight]
            if len(names) > 1:
                raise SpecError(
                    f"the last layer {name!r} shares its weight ({', '.join(names)}); it cannot be set alone"
                )
            return name
    raise SpecError(
        f"{type(model).__name__} does not end in a linear layer (nn.Linear), so its head has no closed form; leave the "
        "analytic head out"
    )


def _scale(model: nn.Module, params: Params, data: Images) -> float:
    """The factor of the outputs with the lowest cross-entropy on ``data``; convex in it."""
    data.check_labels()
    logits = predict(model, params, data).double()

    def loss(log_scale: float) -> float:
        return float(nn.functional.cross_entropy(logits * math.exp(log_scale), data.labels.cpu()))

    return math.exp(float(minimize_scalar(loss, bounds=(-3, 7), method="bounded").x))
