"""Loss and accuracy along the straight line between two networks (linear mode connectivity)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge.adversarial import PGD, attacked
from fedmerge.data import Images
from fedmerge.errors import ParamsError
from fedmerge.merge import average
from fedmerge.progress import steps
from fedmerge.training import evaluate
from fedmerge.types import Params


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at ``(1 - alpha) a + alpha b``; three float64 arrays of one length.

    Example:
        >>> curve = fm.Curve(np.array([0, 0.5, 1]), np.array([1.0, 2.5, 2.0]), np.array([0.9, 0.5, 0.8]))
        >>> float(curve.losses.max())
        2.5
    """

    alphas: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray

    def __post_init__(self) -> None:
        shapes = {getattr(values, "shape", None) for values in (self.alphas, self.losses, self.accuracies)}
        if len(shapes) > 1 or not all(shape and len(shape) == 1 and shape[0] > 1 for shape in shapes):
            raise ParamsError(f"a curve has arrays of shapes {shapes}; expected three of one length of at least 2")


@dataclass(frozen=True)
class Barrier:
    """How far a curve rises above its chord.

    Attributes:
        loss: max over alpha of the loss minus the chord ``(1 - alpha) L(a) + alpha L(b)``
            (Frankle et al., ICML 2020, arXiv:1912.05671).
        error: The same for the error, 1 - accuracy.
        loss_above_mean: max over alpha of the loss minus ``(L(a) + L(b)) / 2`` (Git Re-Basin, Def. 2.1).
        error_above_mean: The same for the error.

    Example:
        >>> curve = fm.Curve(np.array([0, 0.5, 1]), np.array([1.0, 2.5, 2.0]), np.array([0.9, 0.5, 0.8]))
        >>> found = fm.barrier(curve)  # the chord is at 1.5 in the middle, and so is the mean of both ends
        >>> found.loss, found.loss_above_mean, round(found.error, 4)
        (1.0, 1.0, 0.35)
    """

    loss: float
    error: float
    loss_above_mean: float
    error_above_mean: float


@checked
def interpolate(
    model: nn.Module,
    a: Params,
    b: Params,
    data: Images,
    *,
    points: int = 25,
    correct: Callable[[Params], dict[str, Tensor]] | None = None,
    along: Callable[[float], Params] | None = None,
    attack: PGD | None = None,
    device: str = "cpu",
) -> Curve:
    """Evaluate ``model`` at equally spaced points of the line from ``a`` (alpha 0) to ``b`` (alpha 1).

    Args:
        model: The architecture; not modified.
        a: State dict at alpha = 0.
        b: State dict at alpha = 1.
        data: The images on which loss (cross-entropy, nats) and accuracy are taken.
        points: Number of values of alpha, at least 2.
        correct: Applied to every interior point before evaluation, for example :func:`fedmerge.repair` with
            ``method="recompute"``. A correction that depends on alpha belongs into ``along``: one to the statistics of
            both ends, whose weights are ``(1 - alpha, alpha)``.
        along: The way from ``a`` to ``b`` by alpha, for example ``fm.curve(...).at``; the straight line if None.
        attack: Each network is evaluated on what the attack makes of ``data`` against it, from the same start at all
            points: robust loss and accuracy. None for ``data`` as they are.
        device: Where the forward passes run.

    Raises:
        ParamsError: Fewer than 2 points, or state dicts that do not fit.
        ConfigError: An attack on what has no pixels.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(100))
        >>> a, b = (fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in (0, 1))
        >>> curve = fm.interpolate(a, a.state_dict(), b.state_dict(), digits, points=3)
        >>> curve.alphas.tolist(), bool(curve.losses[0] == fm.evaluate(a, a.state_dict(), digits).loss)
        ([0.0, 0.5, 1.0], True)
    """
    if points < 2:
        raise ParamsError(f"points={points} makes no line; give at least 2")
    alphas = np.linspace(0.0, 1.0, points)
    losses, accuracies = np.empty(points), np.empty(points)
    for i, alpha in enumerate(steps("interpolating", alphas.tolist())):
        between = average([a, b], [1.0 - alpha, alpha]) if along is None else along(alpha)
        if correct is not None and 0 < i < points - 1:
            between = correct(between)
        seen = data if attack is None else attacked(model, between, data, attack=attack, device=device)
        found = evaluate(model, between, seen, device=device)
        losses[i], accuracies[i] = found.loss, found.accuracy
    return Curve(alphas, losses, accuracies)


@checked
def barrier(curve: Curve) -> Barrier:
    """The loss and error barriers of ``curve``, against both chords in use; 0 if it is nowhere above them.

    Raises:
        ParamsError: A curve whose alphas do not rise from 0 to 1, so that its ends are not known.

    Example:
        >>> valley = fm.Curve(np.array([0, 0.5, 1]), np.array([1.0, 0.5, 1.0]), np.array([0.8, 0.9, 0.8]))
        >>> fm.barrier(valley).loss  # never above its chord, which it touches at the ends
        0.0
    """
    alphas = curve.alphas
    if alphas[0] != 0 or alphas[-1] != 1 or not bool((alphas[1:] >= alphas[:-1]).all()):
        raise ParamsError(
            f"alphas go from {alphas[0]:g} to {alphas[-1]:g}, lowest {alphas.min():g}, highest {alphas.max():g}; a "
            "barrier is over the chord between both ends: give them in order, from 0 to 1"
        )

    def above(values: np.ndarray) -> tuple[float, float]:
        first, last = values[0], values[-1]
        chord = (1.0 - alphas) * first + alphas * last
        return float((values - chord).max()), float((values - (first + last) / 2).max())

    loss, loss_above_mean = above(curve.losses)
    error, error_above_mean = above(1.0 - curve.accuracies)
    return Barrier(loss, error, loss_above_mean, error_above_mean)
