"""The last layer of a network in closed form, from sums over private images."""

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._forward import answer, scores
from fedmerge._loading import load, with_versions
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError
from fedmerge.progress import steps
from fedmerge.types import Params

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the penalty among which :func:`best_head` chooses."""

_PARTS = ("weight", "bias")


class SingularError(ConfigError):
    """Sums from which no last layer follows."""


@dataclass(frozen=True)
class LastLayer:
    """A network's last layer: the name of the ``nn.Linear``, and by which number its output is multiplied after it."""

    name: str
    factor: float

    @property
    def weight(self) -> str:
        """Its weight, in a state dict."""
        return f"{self.name}.weight".removeprefix(".")

    @property
    def bias(self) -> str:
        """Its bias, where it has one."""
        return f"{self.name}.bias".removeprefix(".")


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


@dataclass(frozen=True, eq=False)
class Head:
    """A network whose last layer was chosen.

    Attributes:
        params: Its state dict.
        strength: Of the ridge regression that its last layer comes from; None if it has kept its own.
        accuracy: On the images that chose.
        singular: Strengths that were passed over.

    Example:
        >>> digits = fm.data.load("digits").train
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> params, val = model.state_dict(), digits.select(range(1000, 1200))
        >>> sums = fm.head_sums(model, params, digits.select(range(1000)))
        >>> fm.best_head(model, params, sums, val).strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        True
    """

    params: dict[str, Tensor]
    strength: float | None
    accuracy: float
    singular: tuple[float, ...] = ()


@checked
def head_sums(
    model: nn.Module, params: Params, data: Images, *, batch_size: int = 500, device: str = "cpu"
) -> HeadSums:
    """Add up products of the last layer's inputs over ``data``, in eval mode and float64.

    Args:
        model: The architecture; its output must be that of a ``nn.Linear``, as it is or times one number.
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
    head = head_of(model, data)
    classes = len(params[head.weight])
    gram = cross = None
    for z, labels in _features(model, params, data, head.name, batch_size, device):
        y = nn.functional.one_hot(labels, classes).double()
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
    changes no answer. Labels are smoothed by one in ``len(data) + 1`` for that, after Platt ("Probabilistic Outputs for
    Support Vector Machines", 1999): the factor stays finite where every image is answered right.

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
    head = head_of(model, data)
    seen, labels = _seen(model, params, data, head.name, "cpu")
    return _fitted(params, head, sums, _solved(params, head, sums, strength), seen, labels)[0]


@checked
def best_head(
    model: nn.Module,
    params: Params,
    sums: HeadSums,
    val: Images,
    *,
    strengths: Sequence[float] = STRENGTHS,
    device: str = "cpu",
) -> Head:
    """The head of :func:`analytic_head` at the strength that is best on ``val``, or the one that ``params`` has.

    Best is the highest accuracy, of equals the first, in this order: the network's own head, then ``strengths``.
    Strengths at which the sums are singular are passed over.

    Args:
        model: The architecture.
        params: The network whose inputs to the last layer were added up.
        sums: From :func:`head_sums`, added up over all owners.
        val: Labelled images, which choose strength and scale.
        strengths: Of the penalty.
        device: Where the forward passes run.

    Raises:
        ConfigError: A strength that is no number above 0.
        DataError: There are no images, or a label names no class.
        ParamsError: Sums of another network.
        SpecError: The network does not end in a linear layer, or that computes its weight from others.

    Cost: one forward pass over ``val``, one Cholesky factorisation a strength.

    Example:
        >>> digits = fm.data.load("digits").train
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> params, val = model.state_dict(), digits.select(range(1000, 1200))
        >>> sums = fm.head_sums(model, params, digits.select(range(1000)))
        >>> fm.best_head(model, params, sums, val).accuracy > fm.evaluate(model, params, val).accuracy
        True
    """
    if not isinstance(strengths, Sequence):
        raise ConfigError(f"strengths is {strengths!r}; expected numbers above 0, for example [0.001, 0.1]")
    head = head_of(model, val)
    seen, labels = _seen(model, params, val, head.name, device)
    own = [params[head.weight].T.cpu()]
    own += [params[head.bias][None].cpu()] if head.bias in params else [torch.zeros(1, len(own[0].T))]
    right = (seen @ torch.cat(own).double()).argmax(1) == labels
    kept = with_versions({k: v.clone() for k, v in params.items()}, params)
    best, singular = Head(kept, None, float(right.double().mean())), []
    for strength in strengths:
        try:
            solved = _solved(params, head, sums, strength)
        except SingularError:
            singular.append(strength)
            continue
        found, accuracy = _fitted(params, head, sums, solved, seen, labels)
        if accuracy > best.accuracy:
            best = Head(found, strength, accuracy)
    return replace(best, singular=tuple(singular))


def _solved(params: Params, head: LastLayer, sums: HeadSums, strength: float) -> Tensor:
    """Weights and biases, float64 ``(d + 1, classes)``, of the ridge regression."""
    if not isinstance(strength, numbers.Real) or not 0 < strength < math.inf:  # not NaN
        raise ConfigError(f"strength is {strength!r}; expected a number above 0, for example 0.001")
    classes, d = params[head.weight].shape
    if sums.cross.shape != (d + 1, classes):
        raise ParamsError(
            f"sums are {tuple(sums.cross.shape)}; the last layer of this network needs ({d + 1}, {classes})"
        )
    system, cross = sums.gram.clone(), sums.cross.clone()
    if head.bias not in params:  # no place for what a constant would explain
        system[-1, :], system[:, -1], system[-1, -1], cross[-1] = 0, 0, 1, 0
    penalty = torch.full((d + 1,), float(strength * sums.gram.diagonal()[:-1].mean()), dtype=torch.float64)
    penalty[-1] = 0
    factor, failed = torch.linalg.cholesky_ex(system + torch.diag(penalty))
    if failed:
        raise SingularError(
            f"the sums are singular at strength {strength:g} (a feature that is always 0?); give a larger one"
        )
    return torch.cholesky_solve(cross, factor)


def _fitted(
    params: Params, head: LastLayer, sums: HeadSums, solved: Tensor, seen: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], float]:
    """``params`` with the layer that was solved, scaled to be read as logits, and its accuracy on what was ``seen``."""
    logits = seen @ solved
    solved = solved * (_scale(logits, labels) / head.factor)
    tensors = {head.weight: solved[:-1].T, head.bias: solved[-1]}
    own = {k: v.to(params[k]).contiguous() for k, v in tensors.items() if k in params}
    found = {k: own[k] if k in own else v.clone() for k, v in params.items()}
    return with_versions(found, params), float((logits.argmax(1) == labels).double().mean())


def _features(
    model: nn.Module, params: Params, data: Images, name: str, batch_size: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch the last layer's inputs and a 1, float64 ``(B, d + 1)``, and the labels, on ``device``."""
    network = load(model, params, device)
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs, named: seen.append((inputs[0] if inputs else named["input"]).detach()), with_kwargs=True
    )
    with hook, torch.inference_mode():
        for rows in steps("summing", torch.split(torch.arange(len(data)), batch_size)):
            part = data.select(rows).to(device)
            answer(network, part, part.images)
            z = seen.pop().double().flatten(0, -2)
            yield torch.cat([z, z.new_ones(len(z), 1)], dim=1), part.labels


def _seen(model: nn.Module, params: Params, data: Images, name: str, device: str) -> tuple[Tensor, Tensor]:
    """:func:`_features` of a whole set, on the CPU."""
    if not len(data):
        raise DataError(f"{data.name} holds no images; nothing to choose a head on")
    data.check_labels()
    parts = list(_features(model, params, data, name, 500, device))
    return torch.cat([z.cpu() for z, _ in parts]), torch.cat([y.cpu() for _, y in parts])


def head_of(model: nn.Module, data: Images) -> LastLayer:
    """The ``nn.Linear`` whose output is the network's, as it is or times one number.

    Raises:
        SpecError: There is none, or it shares its weight or computes it from others.
        ParamsError: It has fewer outputs than ``data`` classes.
    """
    network = load(model, model.state_dict(), "cpu")
    outputs: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            if "weight" in module._parameters and not bool(module.weight.any()):  # a head that begins at zero
                nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
            module.register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    part = data.first(8).to("cpu")
    with torch.no_grad():
        given = answer(network, part, part.images)
    for name, output in outputs.items():
        if (factor := _multiple(given, output)) > 0:
            layer = network.get_submodule(name)
            has = {f"{name}.{kind}".removeprefix(".") for kind in _PARTS if getattr(layer, kind) is not None}
            if computed := sorted(has - network.state_dict().keys()):
                raise SpecError(
                    f"the last layer {name!r} computes its {', '.join(computed)} from other tensors (weight_norm, for "
                    "example); it cannot be set"
                )
            names = [n for n, p in network.named_parameters(remove_duplicate=False) if p is layer.weight]
            if len(names) > 1:
                raise SpecError(
                    f"the last layer {name!r} shares its weight ({', '.join(names)}); it cannot be set alone"
                )
            with torch.no_grad():
                scores(network, part, part.images, labelled=True)  # refuses fewer outputs than classes
            return LastLayer(name, factor)
    raise SpecError(
        f"{type(model).__name__} does not end in a linear layer (nn.Linear), so its head has no closed form; leave the "
        "analytic head out"
    )


def _multiple(answer: Any, output: Tensor) -> float:
    """The number above 0 by which ``output`` was multiplied to become ``answer``; 0 if there is none."""
    if answer is output:
        return 1.0
    if not isinstance(answer, Tensor) or answer.shape != output.shape or not bool(output.any()):
        return 0.0
    factor = float((answer * output).sum() / output.square().sum())
    return factor if factor > 0 and torch.allclose(answer, factor * output, rtol=1e-5, atol=0) else 0.0


def _scale(logits: Tensor, labels: Tensor) -> float:
    """The factor of ``logits`` with the lowest cross-entropy; convex in it.

    As if one row more were there, of every class alike; else, where all are answered right, none is best.
    """
    smoothing = 1 / (len(labels) + 1)

    def loss(log_scale: float) -> float:
        scaled = logits * math.exp(log_scale)
        return float(nn.functional.cross_entropy(scaled, labels, label_smoothing=smoothing))

    return math.exp(float(minimize_scalar(loss, bounds=(-3, 7), method="bounded").x))
