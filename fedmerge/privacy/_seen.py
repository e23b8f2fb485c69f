"""What an attacker sees: how sure networks are of the true class of each image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.errors import ParamsError

Vector = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]


def confidence(logits: Tensor, labels: Tensor) -> Vector:
    r"""How sure a network is of each image's true class: the logarithm of the odds that it gives it.

    .. math:: \phi = \log \frac{p_y}{1 - p_y} = z_y - \log \sum_{j \ne y} e^{z_j}

    for logits z and label y, computed from the logits, so that a probability that rounds to 1 stays apart from the next
    (Carlini et al. 2022, section V). Every attack here reads nothing else: the loss is :math:`\log(1 + e^{-\phi})`, the
    probability :math:`1 / (1 + e^{-\phi})`.

    Args:
        logits: Float ``(N, classes)``, of at least two classes. Logarithms of probabilities are logits too, so an
            ensemble is given by the logarithm of its mean prediction.
        labels: Int64 ``(N,)``.

    Returns:
        Float64 ``(N,)``, finite.

    Raises:
        ParamsError: Shapes that do not fit, logits that are NaN or leave the odds unknown (several infinite ones), or
            labels that name no class.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.75, 0.25]])
        >>> round(float(confidence(probabilities.log(), torch.tensor([0]))[0]), 4)  # log 3
        1.0986
    """
    exact = logits.detach().cpu().double()
    if exact.ndim != 2 or exact.shape[1] < 2 or labels.shape != exact.shape[:1]:
        raise ParamsError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (N, classes) of at least two "
            "classes, and (N,)"
        )
    if bool(unusable := exact.isnan().any(1).sum()):
        raise ParamsError(f"logits of {unusable} of {len(exact)} images are NaN; leave that network out")
    if labels.dtype != torch.int64:
        raise ParamsError(f"labels are {labels.dtype}; expected int64")
    if bool(((labels < 0) | (labels >= exact.shape[1])).any()):
        raise ParamsError(
            f"labels are from {labels.min()} to {labels.max()}; expected 0 to {exact.shape[1] - 1}, a class of the "
            "logits each"
        )
    labels = labels.cpu()[:, None]
    true = exact.gather(1, labels)[:, 0]
    others = exact.scatter(1, labels, -torch.inf).logsumexp(1)
    odds: Vector = (true - others).numpy()
    if unknown := int(np.isnan(odds).sum()):
        raise ParamsError(
            f"infinite logits of {unknown} of {len(odds)} images leave the odds unknown; give finite ones"
        )
    finite: Vector = np.where(np.isinf(odds), np.copysign(_SURE, odds), odds)
    return finite


_SURE = 745.0
"""Beyond it float64 has no odds: of a class whose probability is given as exactly 0 or 1."""


@dataclass(frozen=True, eq=False)
class Seen:
    """K networks on the same images, and which of these each was trained on.

    Attributes:
        confidence: Float ``(K, N)``, see :func:`confidence`, on the images that an attack is about.
        members: Bool ``(K, N)``: whether the network was trained on the image.
        population: Float ``(K, Z)``: on images that no network was trained on, as an attacker may have them.
        outsiders: Bool ``(K, N)``: whether neither the network nor what it began from was trained on the image; all
            that are no members if None. Images that are neither are left out of whatever is made of that network.

    Raises:
        ParamsError: Shapes that do not fit, or members that are no flags.
    """

    confidence: Vector
    members: Flags
    population: Vector
    outsiders: Flags | None = None

    def __post_init__(self) -> None:
        if self.members.dtype != bool:
            raise ParamsError(f"members are {self.members.dtype}; expected bool: give members.astype(bool)")
        shapes = self.confidence.shape, self.members.shape, self.population.shape
        if not (shapes[0] == shapes[1] and all(len(s) == 2 for s in shapes) and shapes[2][0] == shapes[0][0]):
            raise ParamsError(
                f"confidence is {shapes[0]}, members {shapes[1]}, population {shapes[2]}; expected (K, N), (K, N) and "
                "(K, Z)"
            )
        if self.outsiders is not None:
            if self.outsiders.dtype != bool or self.outsiders.shape != shapes[0]:
                raise ParamsError(
                    f"outsiders are {self.outsiders.dtype} {self.outsiders.shape}; expected bool {shapes[0]}, or None"
                )
            if both := int((self.outsiders & self.members).sum()):
                raise ParamsError(f"{both} of the outsiders are members; expected images of which neither is true")

    @property
    def outside(self) -> Flags:
        """Bool ``(K, N)``: the outsiders."""
        return ~self.members if self.outsiders is None else self.outsiders

    def __len__(self) -> int:
        return len(self.confidence)

    def take(self, rows: "Flags | Sequence[int] | slice") -> "Seen":
        """The networks in ``rows``."""
        return Seen(self.confidence[rows], self.members[rows], self.population[rows], self.outside[rows])

    @staticmethod
    def stack(parts: "Sequence[Seen]") -> "Seen":
        """The networks of all ``parts``, one after the other."""
        return Seen(
            np.concatenate([p.confidence for p in parts]),
            np.concatenate([p.members for p in parts]),
            np.concatenate([p.population for p in parts]),
            np.concatenate([p.outside for p in parts]),
        )
