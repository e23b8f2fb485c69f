"""Sinkhorn re-basin (Pena et al., "Re-basin via implicit Sinkhorn differentiation", CVPR 2023, arXiv:2212.04042)."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge.align._finish import finish
from fedmerge.align._straight_through import Midpoint
from fedmerge.align.climb import Alignment, Climb, assign
from fedmerge.align.maps import Maps, mix
from fedmerge.data import Images
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.memory import check_room
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params, Perms

_COSTS = ("inner-product", "l2", "midpoint", "random")
_ON_WEIGHTS = _COSTS[:2]
_STARTS = ("barycentre", "identity", "forward-greedy")
_TOLERANCE = 1e-6
_RIDGE = 1e-12


@checked
def sinkhorn_rebasin(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    cost: str = "inner-product",
    model: nn.Module | None = None,
    data: Images | None = None,
    start: str = "barycentre",
    steps: int = 200,
    lr: float = 0.1,
    temperature: float = 1.0,
    iterations: int = 20,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` by gradient descent on mixtures of permutations.

    With A = ``to``, B = ``params``, and for each group a real matrix :math:`Z_g` (n, n), learns by Adam

    .. math:: \min_Z C(A, S B), \qquad S_g = \operatorname*{argmax}_{S \ge 0,\; S 1 = 1,\; S^\top 1 = 1}
              \langle S, Z_g \rangle - \tau \langle S, \log S \rangle

    where S acts on every axis that a group indexes, :math:`\tau` is ``temperature``, and C is, by ``cost``,

    * ``"inner-product"``: :math:`-\sum_k \langle A_k, S B_k \rangle` over all parameters k, the objective of weight
      matching with its sign turned;
    * ``"l2"``: :math:`\sum_k \|A_k - S B_k\|^2`, the paper's. At a permutation it is a constant plus twice the
      inner product; between them the norm of the mixture counts too. It is small where units are blurred,
      so for networks that resemble each other little, such as independently trained ones, S blurs instead of
      deciding, and its permutation falls 5 to 9 % short of weight matching. Planted permutations it recovers;
    * ``"midpoint"``: the cross-entropy on a batch of ``data`` of the network :math:`\tfrac12 (A + S B)`;
    * ``"random"``: the same of :math:`(1 - t) A + t\, S B`, with t uniform in [0, 1] drawn for each step.

    S comes from Sinkhorn's iterations in the logarithmic domain. Its gradient is implicit: that of the fixed point,
    from one linear system a group, whatever the number of iterations; the row multipliers are eliminated, so it is
    of size n and positive definite. Each S is hardened to a permutation by an assignment, after every step for
    costs on weights and every pass over ``data`` for those on images; of those and the start the best is returned: of
    the highest objective on weights, of the lowest loss of the midpoint over all of ``data`` on images.

    Beyond the paper: the inner product, for the reason given; S begins at the barycentre, where it prefers nothing
    (the authors' code: Z at the identity, plus noise, which for wide layers is nearly that), or at half a permutation
    and half the barycentre, whatever the width; and BatchNorm layers normalise by the statistics of each batch, as in
    straight-through estimation. The learning rate is the authors' for perceptrons.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: The further starts, the order of the images, t, and the order of the polish.
        cost: See above.
        model: The architecture; not modified. Only for costs on images.
        data: Labelled images of the public split, never of a client's partition. Only for costs on images.
        start: ``"barycentre"`` (Z = 0: every unit alike), ``"identity"`` or ``"forward-greedy"``. The last is the start
            of weight matching, and descent often finds nothing better than it.
        steps: Steps of Adam; one on images takes a batch. Few steps need a larger ``lr``, and end lower.
        lr: Learning rate of Adam on Z.
        temperature: The lower, the closer S is to a permutation. The start scales with it, and Adam's steps do not
            see the scale of a gradient, so only ``lr / temperature`` matters.
        iterations: Bound on Sinkhorn's iterations, which end when all columns sum to 1 within 1e-6.
        batch_size: Images a step.
        device: Where the forward passes run.
        restarts: Number of trainings; the first begins at ``start``, of the others every second one forward-greedy in
            a random order of groups, the rest at random permutations. The best one wins.
        polish: Climb on by weight matching; the objective rises, but the loss on images may too.

    Returns:
        The alignment; its objective is that of weight matching, so that methods compare. ``history`` holds the
        objective of the start and of each hardened permutation, and ``best`` says which of them was returned: 0 is the
        start, and then descent has found nothing. ``sweeps`` counts steps.

    Raises:
        ParamsError: State dicts that do not fit, or a cost on images without ``model`` or ``data``.
        DataError: There are no images.
        UnknownNameError: No such cost or start.
        ConfigError: A negative number of steps, no iteration, an empty batch, or a learning rate or temperature that
            is not positive.
        ResourceError: Groups too wide for this machine's memory.

    Cost: per step and group of n units a few products of each tensor with the group's matrix, O(``iterations`` n^2)
    for S and O(n^3) for its gradient and its hardening, in float64; on images also a forward and a backward pass.
    """
    for kind, given, known in (("cost", cost, _COSTS), ("start", start, _STARTS)):
        if given not in known:
            raise UnknownNameError(f"{kind} of Sinkhorn re-basin", given, known)
    if steps < 0 or iterations < 1 or batch_size < 1 or not (lr > 0 and temperature > 0):
        raise ConfigError(
            f"steps is {steps}, iterations {iterations}, batch_size {batch_size}, lr {lr} and temperature "
            f"{temperature}; expected at least 0, at least 1, at least 1, above 0 and above 0"
        )
    images = None if cost in _ON_WEIGHTS else need_images("Sinkhorn re-basin on images", model, data, reads="labels")
    check_params([to, params], spec)
    check_room(spec.sizes(params), 10, "sinkhorn-rebasin", next(iter(to.values())).device)
    line = _Line(load(images[0], to, device), to, params, spec, images[1], batch_size) if images else None
    climb = Climb(params, to, spec)
    on_weights = _distance if cost == "l2" else _unlikeness
    loss = partial(on_weights, dict(climb.a), dict(climb.b), spec) if line is None else line.losses(cost, rng)
    every = 1 if line is None else math.ceil(len(line.data) / batch_size)
    tried: list[tuple[float, Perms, list[float], int]] = []
    for attempt in range(max(1, restarts)):
        begin = start if attempt == 0 else ("greedy-random", "random")[(attempt + 1) % 2]
        perms: Perms = climb.begin("identity" if begin == "barycentre" else begin, rng)
        z = {group: temperature * _scores(perm, climb) * (begin != "barycentre") for group, perm in perms.items()}
        seen = [perms, *_descend(z, loss, steps, every, lr, temperature, iterations)]
        history = [climb.objective(perms) for perms in seen]
        worth = [-value for value in history] if line is None else [line.loss(perms) for perms in seen]
        lowest = int(np.argmin(worth))
        tried.append((worth[lowest], seen[lowest], history, lowest))
    _, perms, history, best = min(tried, key=lambda each: each[0])
    return finish(climb, perms, rng=rng, polish=polish, history=history, sweeps=steps, converged=False, best=best)


def _descend(
    z: Mapping[str, Tensor],
    loss: Callable[[Maps], Tensor],
    count: int,
    every: int,
    lr: float,
    temperature: float,
    iterations: int,
) -> Iterator[dict[str, Tensor]]:
    """Lower ``loss`` of the maps of Z, and yield the nearest permutations each ``every`` steps and at the end."""
    leaves = {group: scores.requires_grad_() for group, scores in z.items()}
    if not leaves:
        return
    optimiser = torch.optim.Adam(leaves.values(), lr)
    for step in steps("descending", range(1, count + 1)):
        with torch.enable_grad():
            total = loss({group: sinkhorn(scores / temperature, iterations) for group, scores in leaves.items()})
            slopes = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        for scores, slope in zip(leaves.values(), slopes, strict=True):
            scores.grad = slope
        optimiser.step()
        if step % every == 0 or step == count:
            # Scaling rows and columns moves no assignment, so Z has the best permutation of S.
            yield {group: assign(scores.detach().cpu().numpy()) for group, scores in leaves.items()}


def sinkhorn(scores: Tensor, iterations: int = 20) -> Tensor:
    """The doubly stochastic matrix closest to ``scores`` (n, n) in the sense of :func:`sinkhorn_rebasin`, at tau = 1.

    Rows sum to 1 exactly, columns as near as ``iterations`` allow. The gradient is that of the fixed point with the
    sums that were reached.
    """
    return _Sinkhorn.apply(scores, iterations)  # type: ignore[no-any-return]


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn's iterations, differentiated implicitly (Sec. 3.2 of the paper)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        log = scores - scores.logsumexp(1, keepdim=True)
        for _ in range(iterations):
            excess = log.logsumexp(0, keepdim=True)
            if float(excess.abs().max()) <= _TOLERANCE:
                break
            log = log - excess
            log = log - log.logsumexp(1, keepdim=True)
        s = log.exp()
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        # S = exp(scores - f 1' - 1 g'), so dS = S * (dscores - df 1' - 1 dg') with f, g such that no sum changes. This
        # map is symmetric: the same one takes the slope by S to the slope by the scores.
        (s,) = ctx.saved_tensors
        weighed, rows, columns = s * slope, s.sum(1), s.sum(0)
        # The system in g, with f eliminated, is a graph's Laplacian: singular along 1, because f + c, g - c is the same
        # solution, and nearly so for an S that is nearly a permutation, whose slope vanishes anyhow.
        system = torch.diag(columns * (1 + _RIDGE)) - s.T @ (s / rows[:, None]) + 1 / len(s)
        right = weighed.sum(0) - s.T @ (weighed.sum(1) / rows)
        g = torch.linalg.solve(system, right)
        f = (weighed.sum(1) - s @ g) / rows
        return weighed - s * (f[:, None] + g[None, :]), None


def _distance(a: Params, b: Params, spec: PermSpec, maps: Maps) -> Tensor:
    """Squared distance of A from the mixture of B, over all parameters."""
    distances = [(a[name] - mix(b[name], spec.axes[name], maps)).square().sum() for name in a]
    return torch.stack(distances).sum()


def _unlikeness(a: Params, b: Params, spec: PermSpec, maps: Maps) -> Tensor:
    """Inner product of A with the mixture of B, over all parameters, negated."""
    products = [(a[name] * mix(b[name], spec.axes[name], maps)).sum() for name in a]
    return -torch.stack(products).sum()


class _Line(Midpoint):
    """The networks on the straight line from A to a mixture of B, on images."""

    def losses(self, cost: str, rng: np.random.Generator) -> Callable[[Maps], Tensor]:
        """Maps -> cross-entropy on the next batch, at the midpoint or at a random point."""

        def batches() -> Iterator[Tensor]:
            while True:
                yield from torch.split(torch.from_numpy(rng.permutation(len(self.data))), self.batch_size)

        rows = batches()

        def loss(maps: Maps) -> Tensor:
            t = 0.5 if cost == "midpoint" else float(rng.uniform())
            return self._loss(self._at(t, maps), next(rows))

        return loss

    def _at(self, t: float, maps: Maps) -> dict[str, Tensor]:
        device = next(self.network.parameters()).device
        state = {}
        for name, own in self.a.items():
            if not own.is_floating_point():
                state[name] = own.to(device, copy=True)
                continue
            theirs = mix(self.b[name].detach().double().to(own.device), self.spec.axes[name], maps)
            between = (1 - t) * own.detach().double() + t * theirs
            # Layers write into buffers, so those carry no gradient.
            state[name] = (between if name in self.spec.parameters else between.detach()).to(device, own.dtype)
        return state


def _scores(perm: Tensor, climb: Climb) -> Tensor:
    """Scores (n, n) whose doubly stochastic matrix gives ``perm`` half of each unit, and the others the rest alike."""
    device = next(iter(climb.a.values())).device
    matrix = torch.eye(len(perm), dtype=torch.float64, device=device)[perm.to(device)]
    return matrix * math.log(max(2, len(perm) - 1))
