"""Curves of low loss between two networks, and simplexes of low loss, found by training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._loading import check_names, load, with_versions
from fedmerge._ties import first_names
from fedmerge.adversarial import PGD
from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.merge import average
from fedmerge.models import Recipe
from fedmerge.training import train
from fedmerge.types import Params

KINDS = ("bezier", "chain")
_SLASH = "/"  # stands for the dots of names, which torch does not allow in the name of a parameter


@dataclass(frozen=True)
class LearnedCurve:
    r"""A curve in the space of weights: its control points, of which the first and the last are its ends.

    A ``"bezier"`` curve is :math:`\sum_j \binom{m}{j} (1-t)^{m-j} t^j \theta_j`; a ``"chain"`` goes straight from each
    point to the next, in equal shares of t.

    Attributes:
        kind: ``"bezier"`` or ``"chain"``.
        points: State dicts :math:`\theta_0 \dots \theta_m`.
        losses: Mean training loss of each epoch, at random points of the curve.

    Example:
        >>> ends = {"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}
        >>> bend = fm.LearnedCurve("bezier", (ends[0], {"w": torch.tensor([4.0])}, ends[1]))
        >>> bend.at(0.5)["w"]  # a quarter of each end, half of the middle point
        tensor([2.5000])
    """

    kind: str
    points: tuple[Params, ...]
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        several = isinstance(self.points, Sequence) and all(isinstance(point, Mapping) for point in self.points)
        if self.kind not in KINDS or not several or len(self.points) < 2:
            given = f"{len(self.points)} points" if several else f"the points {self.points!r:.80}"
            raise ConfigError(
                f"a curve of kind {self.kind!r} with {given}; expected 'bezier' or 'chain', and state dicts, at least "
                "the two ends"
            )

    @checked
    def at(self, t: float) -> dict[str, Tensor]:
        """The state dict at t in [0, 1]. Buffers are mixed like parameters, so BatchNorm needs a repair there."""
        if not 0 <= t <= 1:
            raise ConfigError(f"t is {t!r}; expected a number in [0, 1]")
        return average(self.points, mixture(self.kind, len(self.points), t))


def mixture(kind: str, points: int, t: float) -> list[float]:
    """The weight of each control point at ``t``; they are not negative and add up to 1."""
    last = points - 1
    if kind == "bezier":
        return [math.comb(last, j) * (1 - t) ** (last - j) * t**j for j in range(points)]
    return [max(0.0, 1 - abs(t * last - j)) for j in range(points)]


@checked
def curve(
    model: nn.Module,
    a: Params,
    b: Params,
    data: Images,
    *,
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
    kind: str = "bezier",
    bends: int = 1,
    attack: PGD | None = None,
    device: str = "cpu",
) -> LearnedCurve:
    r"""Train a curve from ``a`` to ``b`` along which the loss on ``data`` stays low.

    The points between the ends begin on the straight line and follow the gradient of the mean loss over the curve,

    .. math:: \mathrm{E}_{t \sim U(0, 1)} \; L(\theta(t)),

    with one t drawn a batch (Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS
    2018, arXiv:1802.10026, eq. 2 and §3.2). :func:`fedmerge.interpolate` evaluates it, by its argument ``along``.

    With an ``attack`` the loss is that of the images which the attack makes of ``data`` against the network at t,

    .. math:: \mathrm{E}_{t \sim U(0, 1)} \max_{\|\delta\|_\infty \le \epsilon} L(\theta(t); x + \delta),

    robust mode connectivity (Wang et al., "Robust Mode Connectivity-Oriented Adversarial Defense", 2023,
    arXiv:2303.10225, who also mix norms; curves and attacks: Zhao et al., "Bridging Mode Connectivity in Loss
    Landscapes and Adversarial Robustness", ICLR 2020, arXiv:2005.00060). The ends stay as they are.

    Args:
        model: The architecture; not modified.
        a: State dict at t = 0.
        b: State dict at t = 1.
        data: The images and labels that it is trained on.
        recipe: Optimiser, batch size, schedule. Its weight decay acts on the points between the ends.
        epochs: Passes over ``data``.
        generator: It drives the order of the images and t.
        kind: ``"bezier"`` or ``"chain"`` (straight pieces).
        bends: How many points between the ends are trained.
        attack: What the images of each batch are attacked by; None for images as they are.
        device: Where to compute.

    Raises:
        ConfigError: No such kind, less than one bend, or an attack on what has no pixels.
        ParamsError: State dicts that do not fit the network or each other, or a network of which nothing is trained.
        DivergedError: The loss was not finite.

    Cost: ``epochs`` of training, with ``bends + 2`` networks in memory; with an attack ``attack.steps + 1`` times that.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(200))
        >>> a, b = (fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in (0, 1))
        >>> found = fm.curve(
        ...     a, a.state_dict(), b.state_dict(), digits, recipe=fm.models.recipe("mlp"), epochs=3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> torch.equal(found.at(0.0)["fc1.weight"], a.state_dict()["fc1.weight"]), len(found.points)
        (True, 3)
    """
    check_params([a, b])
    if kind not in KINDS or bends < 1:
        raise ConfigError(f"a curve of kind {kind!r} with {bends} bends; expected 'bezier' or 'chain', and at least 1")
    straight = [average([a, b], [1 - t, t]) for t in np.linspace(0, 1, bends + 2)[1:-1]]
    seed = int(torch.randint(2**62, (), generator=generator))
    path = _Path(model, (a, *straight, b), kind, seed, passes=1 if attack is None else attack.steps + 1)
    done = train(
        path, path.state_dict(), replace(data, forward=None), recipe=recipe, epochs=epochs, generator=generator,
        attack=attack, device=device,
    )  # fmt: skip
    learned = [path.point(point, i, done.params) for i, point in enumerate(straight, start=1)]
    first, last = (with_versions({name: tensor.clone() for name, tensor in p.items()}, p) for p in (a, b))
    return LearnedCurve(kind, (first, *learned, last), done.losses)


@dataclass(frozen=True)
class Subspace:
    r"""A simplex in the space of weights, all of which has a low loss: every mixture of its vertices is a network.

    Attributes:
        vertices: State dicts :math:`\theta_1 \dots \theta_n`.
        losses: Mean training loss of each epoch, at random points of the simplex.

    Example:
        >>> corners = ({"w": torch.tensor([0.0])}, {"w": torch.tensor([3.0])}, {"w": torch.tensor([6.0])})
        >>> fm.Subspace(corners).at([0.5, 0.5, 0.0])["w"], fm.Subspace(corners).at()["w"]
        (tensor([1.5000]), tensor([3.]))
    """

    vertices: tuple[Params, ...]
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.vertices) < 2:
            raise ConfigError(f"a subspace of {len(self.vertices)} vertices; expected at least 2")

    @checked
    def at(self, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """The mixture of the vertices by ``weights``, which are normalised; the middle of the simplex if None."""
        return average(self.vertices, weights)


@checked
def subspace(
    model: nn.Module,
    starts: Sequence[Params],
    data: Images,
    *,
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
    device: str = "cpu",
) -> Subspace:
    r"""Train the vertices of a simplex so that the loss on ``data`` is low all over it.

    From ``starts`` on the vertices follow the gradient of the mean loss over the simplex,

    .. math:: \mathrm{E}_{w \sim \mathrm{Dirichlet}(1, \dots, 1)} \; L\big(\textstyle\sum_i w_i \theta_i\big),

    with one w drawn a batch (Wortsman et al., "Learning Neural Network Subspaces", ICML 2021, arXiv:2102.10472, without
    its term that keeps vertices apart; Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast
    Ensembling", ICML 2021, arXiv:2102.13042, where vertices are found one after the other). Unlike a :func:`curve`,
    its ends move too.

    Args:
        model: The architecture; not modified.
        starts: Where the vertices begin, state dicts; aligned ones begin nearer.
        data: The images and labels that it is trained on.
        recipe: Optimiser, batch size, schedule. Its weight decay acts on every vertex.
        epochs: Passes over ``data``.
        generator: It drives the order of the images and w.
        device: Where to compute.

    Raises:
        ConfigError: Fewer than two starts.
        ParamsError: State dicts that do not fit the network or each other, or a network of which nothing is trained.
        DivergedError: The loss was not finite.

    Cost: ``epochs`` of training, with ``len(starts)`` networks and their optimiser in memory.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(200))
        >>> a, b = (fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=seed) for seed in (0, 1))
        >>> found = fm.subspace(
        ...     a, [a.state_dict(), b.state_dict()], digits, recipe=fm.models.recipe("mlp"), epochs=10,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> fm.evaluate(a, found.at(), digits).accuracy > 0.8
        True
    """
    if len(starts) < 2:
        raise ConfigError(f"a subspace begins at 2 networks or more; {len(starts)} were given")
    check_params(starts)
    seed = int(torch.randint(2**62, (), generator=generator))
    path = _Path(model, tuple(starts), "simplex", seed)
    done = train(
        path, path.state_dict(), replace(data, forward=None), recipe=recipe, epochs=epochs, generator=generator,
        device=device,
    )  # fmt: skip
    vertices = [path.point(start, i, done.params) for i, start in enumerate(starts)]
    return Subspace(tuple(vertices), done.losses)


def _named(point: int, name: str) -> str:
    return f"{point}{_SLASH}{name.replace('.', _SLASH)}"


class _Path(nn.Module):
    """A network whose weights are those of a random point of a curve or simplex.

    The point is drawn anew every ``passes`` forward passes: once a batch, which is attacked at the point it is used at.
    Where data have a ``forward``, ``model`` calls it already: they are to come without.
    """

    def __init__(self, model: nn.Module, points: tuple[Params, ...], kind: str, seed: int, passes: int = 1) -> None:
        super().__init__()
        self.goes_by = type(model).__name__
        check_names(model, points[0])
        self.passes, self.passed, self.shares = passes, 0, [0.0]
        self.network, self.kind, self.count = load(model, points[0], "cpu"), kind, len(points)
        own = {n: parameter.dtype for n, parameter in self.network.named_parameters()}
        self.mixed = [name for name in own if points[0][name].is_floating_point()]
        self.first = {name: first for name, first in first_names(self.network).items() if first in self.mixed}
        self.draw = np.random.default_rng(seed)
        learned = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for i, point in enumerate(points):
            for name in self.mixed:
                tensor = point[name].detach().to(own[name], copy=True)
                if name in learned and (kind == "simplex" or 0 < i < self.count - 1):
                    self.register_parameter(_named(i, name), nn.Parameter(tensor))
                else:
                    self.register_buffer(_named(i, name), tensor)

    def point(self, start: Params, i: int, learned: Params) -> dict[str, Tensor]:
        """Point i, which began at ``start``, in a state dict of this network: a tensor of several names under each."""
        found = {n: learned[_named(i, first)].to(start[n], copy=True) for n, first in self.first.items() if n in start}
        return with_versions({**{n: t.clone() for n, t in start.items()}, **found}, start)

    def forward(self, x: Any) -> Tensor:
        if self.passed % self.passes == 0:
            if self.kind == "simplex":
                self.shares = self.draw.dirichlet(np.ones(self.count)).tolist()
            else:
                self.shares = mixture(self.kind, self.count, float(self.draw.uniform()))
        self.passed += 1
        weights: Mapping[str, Tensor] = {
            name: sum(share * getattr(self, _named(i, name)) for i, share in enumerate(self.shares))
            for name in self.mixed
        }
        found: Tensor = functional_call(self.network, dict(weights), (x,))
        return found
