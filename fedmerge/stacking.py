"""An ensemble whose members count by class: stacked on a few labelled images."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge.errors import ConfigError, DataError, ParamsError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, math.inf)
"""Strengths of the penalty among which :func:`stack` chooses; infinity is the plain mean."""

FLOORS = (1e-4, 1e-9)
"""Floors of a probability among which :func:`stack` chooses: networks that are very sure say more below the first."""

_WHOLE: dict[str, float] = {"maxiter": 500}
_ROUGH: dict[str, float] = {"maxiter": 100, "ftol": 1e-5, "gtol": 1e-4}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stack:
    r"""Members' predictions made one, by :math:`\mathrm{softmax}(\log \bar p + W^T z + b)`.

    :math:`\bar p` is the members' mean probability, and z their clipped log-probabilities, one after the other. The
    softmax shares out among the classes that had an image what :math:`\bar p` gives all of these together; the others
    keep :math:`\bar p`.

    Attributes:
        weights: W, float64 ``(members * classes, classes)``.
        bias: b, float64 ``(classes,)``.
        strength: Of the L2 penalty (:func:`stack`); at infinity they are 0, and the stack is the mean.
        floor: Probabilities below it count as it.
        seen: Which classes had an image, bool ``(classes,)``.
        out_of_fold: For the images that it was fitted on, float32 ``(N, classes)``: what stacks say that were fitted
            on the other folds, so that no image is answered by what has read its label.

    Example:
        >>> even = torch.full((20, 2), 0.5)
        >>> mean = fm.stack([even, even], torch.arange(20) % 2, strengths=[math.inf])
        >>> torch.equal(mean.predict([even, even]), even)
        True
    """

    weights: Array
    bias: Array
    strength: float
    floor: float
    seen: npt.NDArray[np.bool_]
    out_of_fold: Tensor

    def predict(self, predictions: Sequence[Tensor]) -> Tensor:
        """Probabilities, float32 ``(N, classes)``, from those of each member, in the order of the fit.

        Raises:
            ParamsError: Another number of members or classes than it was fitted on.
        """
        offset, z = _inputs(predictions, self.floor)
        if z.shape[1] != len(self.weights) or offset.shape[1] != len(self.bias):
            raise ParamsError(
                f"{len(predictions)} members of {offset.shape[1]} classes were given; the stack was fitted on "
                f"{len(self.weights) // len(self.bias)} of {len(self.bias)}"
            )
        answers = _joint(offset, offset + z @ self.weights + self.bias, self.seen)
        return torch.from_numpy(np.exp(answers)).float()


@checked
def stack(
    predictions: Sequence[Tensor],
    labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    floors: Sequence[float] = FLOORS,
    seed: int = 0,
) -> Stack:
    r"""Learn how much each member of an ensemble counts for each class, from labelled public images.

    Members that saw few images of a class should not be asked about it, which their mean ignores. A multinomial
    logistic regression on their log-probabilities learns whom to believe; its L2 penalty pulls it towards the mean,
    so that few labels cannot do harm. It lowers

    .. math:: \tfrac1N \sum_x \mathrm{CE}\big(y, \mathrm{softmax}(\log \bar p(x) + W^T z(x) + b)\big)
              + \tfrac{\lambda}{2} (\|W\|^2 + \|b + W^T \bar z\|^2),

    :math:`\bar z` the mean of z over the images, so that the penalty does not depend on how low probabilities are, with
    the :math:`\lambda` of the lowest loss on left-out folds (stacked generalisation: Wolpert, 1992; one shot in a
    federation: FENS, Allouah et al., "Revisiting Ensembling in One-Shot Federated Learning", NeurIPS 2024,
    arXiv:2411.07182). So is the floor chosen at which probabilities are clipped: the first, unless another lowers that
    loss by more than the standard error of the difference. Networks that are very sure say much below 1e-4.
    Of classes without an image nothing can be learned: they keep the mean's probability, and what is learned is learned
    of the others among themselves.

    Args:
        predictions: For each member, probabilities ``(N, classes)``.
        labels: Int64 ``(N,)``.
        strengths: Values of :math:`\lambda` to choose from.
        folds: Into how many parts the images are cut; classes with fewer images lower it.
        floors: Probabilities below it count as it; those to choose from, the one to keep in doubt first.
        seed: Of the cut.

    Raises:
        ParamsError: Predictions that do not fit each other, or are no probabilities.
        DataError: Labels that do not fit them, or no class with two images.
        ConfigError: A strength that is negative, a floor that is no small probability, fewer than two folds, a seed
            out of its range.

    Cost: ``len(floors) * len(strengths) * folds`` logistic regressions of ``members * classes ** 2`` numbers, where no
    probability is below the first floor those of one floor; no network is run.

    Example:
        >>> labels = torch.arange(40) % 2
        >>> good = torch.nn.functional.one_hot(labels, 2) * 0.8 + 0.1
        >>> found = fm.stack([good, 1 - good], labels)  # one member is always wrong: their mean knows nothing
        >>> (found.predict([good, 1 - good]).argmax(1) == labels).float().mean().item()
        1.0
    """
    from sklearn.model_selection import StratifiedKFold  # slow to import

    if not floors:
        raise ConfigError("floors is empty; expected probabilities above 0 and below 0.5, for example 1e-4")
    inputs = {floor: _inputs(predictions, floor) for floor in floors}
    offset, _ = inputs[floors[0]]
    y = _checked_labels(labels, offset.shape)
    numbered = isinstance(strengths, Sequence) and all(isinstance(s, numbers.Real) and s >= 0 for s in strengths)
    if folds < 2 or not numbered or not strengths:  # NaN is no number from 0
        raise ConfigError(f"folds is {folds} and strengths {strengths!r}; expected at least 2, and numbers from 0")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; expected a whole number from 0, below 2**32")
    counts = np.bincount(y, minlength=offset.shape[1])
    least = int(counts.max(initial=0)) and int(np.min(counts[counts > 1], initial=counts.max()))
    if least < 2:
        raise DataError(f"no class has two of the {len(y)} labelled images; stacking needs at least that")
    cuts = StratifiedKFold(min(folds, least), shuffle=True, random_state=seed)
    parts = list(cuts.split(offset, _merged_rare(y, counts)))
    chosen = floors[0]
    strength, answers = _best(*inputs[chosen], y, parts, strengths)
    for floor in floors[1:]:
        if np.array_equal(inputs[floor][1], inputs[chosen][1]):
            continue
        best, found = _best(*inputs[floor], y, parts, strengths)
        gain = (found - answers)[np.arange(len(y)), y]
        if gain.mean() > gain.std(ddof=1) / math.sqrt(len(y)):
            chosen, strength, answers = floor, best, found
    offset, z = inputs[chosen]
    for fit, held in parts:
        w, b = _fit(offset[fit], z[fit], y[fit], strength)
        answers[held] = _joint(offset[held], offset[held] + z[held] @ w + b, _seen(y[fit], offset.shape[1]))
    w, b = _fit(offset, z, y, strength)
    return Stack(w, b, strength, chosen, counts > 0, torch.from_numpy(np.exp(answers)).float())


def _best(
    offset: Array, z: Array, y: npt.NDArray[np.int64], parts: Sequence[tuple[Any, Any]], strengths: Sequence[float]
) -> tuple[float, Array]:
    """The strength that is best on the parts left out, of equals the largest, and log-probabilities of these parts.

    Fits are rough, each begun at that of the strength above it: they choose, and nothing else is made of them.
    """
    left_out = {strength: np.empty_like(offset) for strength in strengths}
    for fit, held in parts:
        begun = np.zeros((z.shape[1], offset.shape[1])), np.zeros(offset.shape[1])
        seen = _seen(y[fit], offset.shape[1])
        for strength in sorted(left_out, reverse=True):
            w, b = begun = _fit(offset[fit], z[fit], y[fit], strength, begun)
            left_out[strength][held] = _joint(offset[held], offset[held] + z[held] @ w + b, seen)
    best = min(strengths, key=lambda s: (-left_out[s][np.arange(len(y)), y].mean(), -s))
    return best, left_out[best]


def _seen(y: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.bool_]:
    """Which classes have an image."""
    return np.isin(np.arange(classes), y)


def _joint(offset: Array, logits: Array, seen: npt.NDArray[np.bool_]) -> Array:
    """Log-probabilities: of seen classes by ``logits``, sharing what the mean gives them together; else the mean's."""
    if seen.all():
        return np.asarray(log_softmax(logits, axis=1))
    mean = log_softmax(offset, axis=1)
    together = logsumexp(mean[:, seen], axis=1, keepdims=True)
    mean[:, seen] = log_softmax(logits[:, seen], axis=1) + together
    return np.asarray(mean)


def _inputs(predictions: Sequence[Tensor], floor: float) -> tuple[Array, Array]:
    """Log of the mean ``(N, classes)``, and the members' clipped log-probabilities side by side."""
    if not 0 < floor < 0.5:
        raise ConfigError(f"floor is {floor!r}; expected a probability above 0 and below 0.5")
    if not predictions or len({tuple(p.shape) for p in predictions}) > 1 or predictions[0].dim() != 2:
        shapes = [tuple(p.shape) for p in predictions]
        raise ParamsError(f"predictions have shapes {shapes}; expected one (N, classes), the same for every member")
    each = np.stack([p.detach().cpu().double().numpy() for p in predictions])
    if not np.isfinite(each).all() or each.min(initial=0) < 0 or not np.allclose(each.sum(2), 1, atol=1e-3):
        raise ParamsError(
            "predictions are no probabilities: rows of each must be 0 or above and add up to 1; give softmax"
        )
    mean = np.log(np.maximum(each.mean(0), 1e-30))
    return mean, np.concatenate(np.log(np.maximum(each, floor)), axis=1)


def _checked_labels(labels: Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    if labels.dtype != torch.int64 or tuple(labels.shape) != shape[:1]:
        raise DataError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({shape[0]},)")
    y: npt.NDArray[np.int64] = labels.cpu().numpy()
    if len(y) and not 0 <= y.min() <= y.max() < shape[1]:
        raise DataError(f"labels run from {y.min()} to {y.max()}; expected 0 to {shape[1] - 1}")
    return y


def _merged_rare(y: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Classes with one image cannot be cut evenly: they are cut with the largest class."""
    return np.where(counts[y] > 1, y, counts.argmax())


def _fit(
    offset: Array, z: Array, y: npt.NDArray[np.int64], strength: float, begun: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Weights and biases; roughly, from those of another strength, if these are given."""
    n, classes, inputs = len(y), offset.shape[1], z.shape[1]
    if math.isinf(strength):
        return np.zeros((inputs, classes)), np.zeros(classes)
    centre = z.mean(0)
    x = z - centre  # the same penalty, whatever the mean log-probability; the bias takes it up
    hot, seen = np.eye(classes)[y], _seen(y, classes)
    known: Any = slice(None) if seen.all() else seen
    rows, places, residual = np.arange(n), (seen.cumsum() - 1)[y], np.zeros_like(hot)

    def loss(flat: Array) -> tuple[float, Array]:
        w, b = flat[: inputs * classes].reshape(inputs, classes), flat[inputs * classes :]
        # Only seen classes are among the labels, so what they have together adds a constant and is left out.
        logits = (offset + x @ w + b)[:, known]  # by hand: calling SciPy's log_softmax takes longer than computing it
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        p /= total
        residual[:, known] = (p - hot[:, known]) / n
        gradient = np.concatenate([(x.T @ residual + strength * w).ravel(), residual.sum(0) + strength * b])
        log_p = logits[rows, places] - np.log(total[:, 0])
        return float(-log_p.sum() / n + strength / 2 * (flat @ flat)), gradient

    start, how = np.zeros((inputs + 1) * classes), _WHOLE
    if begun is not None:
        w, b = begun
        start, how = np.concatenate([w.ravel(), b + centre @ w]), _ROUGH
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=how)
    w, b = found.x[: inputs * classes].reshape(inputs, classes), found.x[inputs * classes :]
    return w, b - centre @ w
