"""Two networks compared, by their weights and by what they answer; the plane through three."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._loading import on_one_device
from fedmerge._ties import first_names
from fedmerge.data import Images
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.merge import average
from fedmerge.progress import steps
from fedmerge.training import evaluate, predict
from fedmerge.types import Params


@dataclass(frozen=True)
class Distance:
    """How far two networks are from each other in the space of weights.

    Attributes:
        l2: The Euclidean distance over all floating-point tensors but statistics of norms.
        relative: It, over the root mean square of both norms; sqrt(2) for unrelated networks of one size.
        cosine: Cosine of the angle between them, from the origin.
        by_tensor: Name -> Euclidean distance of that tensor.

    Example:
        >>> fm.distance({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.0])}).relative
        0.0
    """

    l2: float
    relative: float
    cosine: float
    by_tensor: Mapping[str, float]


@checked
def distance(a: Params, b: Params, *, model: nn.Module | None = None) -> Distance:
    """Compare the weights of two state dicts of one architecture, in float64.

    Args:
        a: State dict of the first.
        b: State dict of the second.
        model: The architecture, if tensors of it are tied: each counts once then, under its first name. State dicts do
            not say so themselves.

    Raises:
        ParamsError: They do not fit each other.

    Cost: one pass over both.

    Example:
        >>> found = fm.distance({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])})
        >>> found.l2, found.cosine
        (5.0, 0.0)
    """
    check_params([a, b])
    a, b = on_one_device([a, b])
    squares, products, sizes = {}, 0.0, [0.0, 0.0]
    for name in _weights(a, model):
        x, y = a[name].detach().double().flatten(), b[name].detach().double().flatten()
        squares[name] = float((x - y).square().sum())
        products += float(x @ y)
        sizes = [sizes[0] + float(x @ x), sizes[1] + float(y @ y)]
    if not squares:
        raise ParamsError("these state dicts hold no floating-point weights; nothing to compare")
    l2, norm = math.sqrt(sum(squares.values())), math.sqrt(sizes[0] * sizes[1])
    mean = math.sqrt((sizes[0] + sizes[1]) / 2)
    return Distance(
        l2, l2 / mean if mean else 0.0, products / norm if norm else 0.0, {n: math.sqrt(s) for n, s in squares.items()}
    )


@dataclass(frozen=True)
class Agreement:
    """How alike two networks answer.

    Attributes:
        same: Share of the images to which both give the same class.
        both_right: Share that both classify as labelled.
        both_wrong: Share that neither does.
        same_error: Share to which both give the same wrong class.
        divergence: Mean Jensen-Shannon divergence of their predicted probabilities, in nats, in [0, log 2].
        examples: Number of images.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(100))
        >>> a, b = (fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in (0, 1))
        >>> found = fm.agreement(a, a.state_dict(), b.state_dict(), digits)
        >>> found.same >= found.both_right + found.same_error - 1e-9
        True
    """

    same: float
    both_right: float
    both_wrong: float
    same_error: float
    divergence: float
    examples: int


@checked
def agreement(model: nn.Module, a: Params, b: Params, data: Images, *, device: str = "cpu") -> Agreement:
    """Compare what two networks of one architecture answer to the same images.

    Args:
        model: The architecture; not modified.
        a: State dict of the first.
        b: State dict of the second.
        data: Labelled images.
        device: Where the forward passes run.

    Raises:
        DataError: There are no images, or a label names no class.
        ParamsError: State dicts that do not fit the network, or hold NaN.

    Cost: one forward pass each.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(100))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> found = fm.agreement(model, model.state_dict(), model.state_dict(), digits)
        >>> found.same, found.divergence
        (1.0, 0.0)
    """
    check_params([a, b])
    data.check_labels()
    logits = [predict(model, params, data, device=device).double() for params in (a, b)]
    first, second = (found.argmax(1) for found in logits)
    labels = data.labels.cpu()
    right = [first == labels, second == labels]
    p, q = (found.softmax(1) for found in logits)
    middle = (p + q) / 2
    divergence = sum(
        float((torch.special.xlogy(x, x) - torch.special.xlogy(x, middle)).sum(1).mean()) / 2 for x in (p, q)
    )

    def share(which: Tensor) -> float:
        return float(which.double().mean())

    return Agreement(
        same=share(first == second),
        both_right=share(right[0] & right[1]),
        both_wrong=share(~right[0] & ~right[1]),
        same_error=share((first == second) & ~right[0]),
        divergence=max(divergence, 0.0),  # NaN stays NaN
        examples=len(data),
    )


@dataclass(frozen=True, eq=False)
class Plane:
    """Loss and accuracy on the plane through three networks.

    Attributes:
        xs: Coordinates along the first axis, from network 0 towards network 1, in units of L2 distance ``(p,)``.
        ys: Coordinates along the second, at a right angle to it, towards network 2 ``(p,)``.
        losses: ``(p, p)``, by ``[y, x]``.
        accuracies: ``(p, p)``, by ``[y, x]``.
        corners: ``(3, 2)``: where the three networks lie.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(50))
        >>> a, b, c = (fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in range(3))
        >>> found = fm.plane(a, a.state_dict(), b.state_dict(), c.state_dict(), digits, points=3, margin=0)
        >>> bool(found.losses[0, 0] == fm.evaluate(a, a.state_dict(), digits).loss)
        True
    """

    xs: np.ndarray
    ys: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray
    corners: np.ndarray


@checked
def plane(
    model: nn.Module,
    a: Params,
    b: Params,
    c: Params,
    data: Images,
    *,
    points: int = 11,
    margin: float = 0.2,
    correct: Callable[[Params], dict[str, Tensor]] | None = None,
    device: str = "cpu",
) -> Plane:
    """Evaluate ``model`` on a grid of the plane that three state dicts span.

    (The pictures of Garipov et al., NeurIPS 2018, arXiv:1802.10026: the axes are orthonormal in the space of weights.)
    Statistics of norms are mixed like weights, variances no lower than 0, and count in no distance; tied tensors count
    once.

    Args:
        model: The architecture; not modified.
        a: The state dict at the origin.
        b: That on the first axis.
        c: The third; the second axis points to its side.
        data: The images on which loss (cross-entropy, nats) and accuracy are taken.
        points: Points of the grid along each axis, at least 2.
        margin: How far the grid reaches beyond the three, as a share of their extent.
        correct: Applied to every point before evaluation, for example a :func:`fedmerge.repair`.
        device: Where the forward passes run.

    Raises:
        ParamsError: State dicts that do not fit, or that lie on one line.
        ConfigError: Fewer than 2 points, or a negative margin.

    Cost: ``points ** 2`` evaluations.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(50))
        >>> models = [fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in range(3)]
        >>> found = fm.plane(models[0], *(m.state_dict() for m in models), digits, points=2)
        >>> found.losses.shape, found.corners[0].tolist()
        ((2, 2), [0.0, 0.0])
    """
    check_params([a, b, c])
    a, b, c = on_one_device([a, b, c])
    if points < 2 or margin < 0:
        raise ConfigError(f"points is {points} and margin {margin}; expected at least 2, and 0 or above")
    names = _weights(a, model)
    if not names:
        raise ParamsError("these state dicts hold no floating-point weights; there is no plane to look at")
    u, v = (torch.cat([(p[n].double() - a[n].double()).flatten() for n in names]) for p in (b, c))
    width = float(u.norm())
    along = float(v @ u) / width if width else 0.0
    height = math.sqrt(max(0.0, float(v @ v) - along**2))
    if not width or height <= 1e-6 * float(v.norm()):
        raise ParamsError("the three networks lie on one line and span no plane; give three that do not")
    corners = np.array([[0.0, 0.0], [width, 0.0], [along, height]])
    low, high = corners.min(0), corners.max(0)
    extent = margin * (high - low)
    xs, ys = (np.linspace(low[i] - extent[i], high[i] + extent[i], points) for i in (0, 1))
    losses, accuracies = np.empty((points, points)), np.empty((points, points))
    for i, y in enumerate(steps("evaluating the plane", ys.tolist())):
        for j, x in enumerate(xs):
            third = y / height
            second = (x - third * along) / width
            mixed = _mixed((a, b, c), (1 - second - third, second, third))
            found = evaluate(model, mixed if correct is None else correct(mixed), data, device=device)
            losses[i, j], accuracies[i, j] = found.loss, found.accuracy
    return Plane(xs, ys, losses, accuracies, corners)


def _mixed(models: tuple[Params, ...], shares: tuple[float, ...]) -> dict[str, Tensor]:
    """The affine combination of ``models``: shares may be negative, and add up to 1."""
    base = average(models)  # integers, versions and dtypes
    for name, tensor in base.items():
        if tensor.is_floating_point():
            total = sum(share * m[name].double() for share, m in zip(shares, models, strict=True))
            if name.endswith("running_var"):
                total = total.clamp(min=0)  # type: ignore[union-attr]
            base[name] = total.to(tensor.dtype)  # type: ignore[union-attr]
    return base


def _weights(params: Params, model: nn.Module | None) -> list[str]:
    """The tensors that count in distances: floating-point, no statistic of a norm, and of those that are tied one."""
    first = {} if model is None else first_names(model)
    return [
        name
        for name, tensor in params.items()
        if tensor.is_floating_point()
        and not name.endswith(("running_mean", "running_var"))
        and first.get(name, name) == name
    ]
