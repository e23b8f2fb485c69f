"""Activation matching (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, Sec. 3.1)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge.align._activations import Activations
from fedmerge.align._finish import best_of, finish
from fedmerge.align.climb import Alignment, Climb, assign
from fedmerge.align.turns import Compared, Key
from fedmerge.data import Images
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError
from fedmerge.memory import check_room
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_DEAD = 1e-6
_CELLS = 2**23


@checked
def activation_matching(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    model: nn.Module | None = None,
    data: Images | None = None,
    metric: str = "correlation",
    bins: int = 8,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` so that they respond to images as those of ``to`` do.

    With :math:`z^A_i` the responses of unit i of ``to`` and :math:`z^B_j` those of unit j of ``params`` over all
    samples (images, and positions in them), solves for each group on its own the assignment

    .. math:: \max_{\pi} \sum_i s(z^A_i, z^B_{\pi(i)})

    where s is, by ``metric``,

    * ``"inner-product"``: :math:`\langle z^A_i, z^B_j \rangle` (Git Re-Basin, eq. 1);
    * ``"l2"``: :math:`-\|z^A_i - z^B_j\|^2`; its best permutation is that of the inner product, because each unit
      is used once and its norm counts once whatever the permutation;
    * ``"correlation"``: Pearson's (Li et al., "Convergent Learning", ICLR 2016, arXiv:1511.07543), 0 for a dead
      unit, one whose response does not vary;
    * ``"mutual-information"``: in nats, of responses sorted into ``bins`` bins (ibid.). The edges are the quantiles
      of a normal distribution of the unit's own mean and deviation. It does not see signs, and a unit is not to be
      merged with its negative, so pairs of negative correlation count with a minus (beyond the paper, which
      looks at responses after a ReLU).

    Responses are those before the activation function (see :func:`fedmerge.align._views.find_views`), wherever the
    network computes them: in a layer, inside attention, or by functions on raw parameters. Groups that only show as a
    product, as heads of attention do with the units within a head, are matched together: heads by the best order of
    their units, then the units, summed over the pairs of heads. A group that shows nowhere keeps its order and is named
    as ``left``. The solution is unique but for ties, so restarts matter to the polish only.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: Order of the groups in the polish.
        model: The architecture, run in eval mode; not modified.
        data: Images of the public split, never of a client's partition; labels are not used.
        metric: See above.
        bins: Bins a unit, for ``"mutual-information"``.
        batch_size: Images a batch.
        device: Where the forward passes run and statistics are kept.
        restarts: Number of polishes, each in its own order; the best objective wins.
        polish: Climb on by weight matching.

    Returns:
        The alignment; its objective is that of weight matching, so that methods compare.

    Raises:
        ParamsError: ``model`` or ``data`` is missing, state dicts do not fit, or activations are not finite.
        DataError: There are no images.
        SpecError: A network that cannot be traced on these images.
        UnknownNameError: No such metric.
        ConfigError: Fewer than two bins, or an empty batch.
        ResourceError: Groups too wide for this machine's memory.

    Cost: tracing the network once or twice, and one forward pass of each network (two for mutual information); a
    group of n units and m samples adds O(n^2 m), times ``bins``^2 for mutual information, and O(n^3); n is the product
    where groups only show as one. Sums are float64 and kept batch by batch.
    """
    model, data = need_images("activation matching", model, data)
    if metric not in _GAINS:
        raise UnknownNameError("metric of activation matching", metric, _GAINS)
    if bins < 2 or batch_size < 1:
        raise ConfigError(f"bins is {bins} and batch_size {batch_size}; at least 2 and 1 are needed")
    check_params([to, params], spec)
    networks = load(model, to, device), load(model, params, device)
    sizes = spec.sizes(params)
    matrices = bins**2 + 1 if metric == "mutual-information" else 2
    check_room(sizes, matrices, "activation-matching", device)
    activations = Activations(
        networks, spec, data, batch_size=batch_size, device=device, sizes=(sizes, sizes), model=model
    )
    moments: dict[Key, _Moments] = {}
    joints: dict[Key, _Joint] = {}

    def measure(key: Key, a: Tensor, b: Tensor) -> None:
        if key not in moments:
            if len(key) > 1:
                check_room({" x ".join(key): len(a)}, matrices, "activation-matching", device)
            moments[key] = _Moments(len(a), device)
        moments[key].add(a, b)

    def count(key: Key, a: Tensor, b: Tensor) -> None:
        joints[key].add(a, b)

    activations.stream(measure)
    for key, found in moments.items():
        if not bool(found.cross.isfinite().all()):
            group = " x ".join(map(repr, key))
            raise ParamsError(f"activations of group {group} on {data.name} are not finite; leave that model out")
    if metric == "mutual-information":
        joints |= {key: _Joint(found, bins) for key, found in moments.items()}
        activations.stream(count)
        gains = {key: joint.information() * moments[key].cross.sign() for key, joint in joints.items()}
    else:
        gains = {key: _GAINS[metric](found) for key, found in moments.items()}
    compared = Compared({key: -gain.cpu() for key, gain in gains.items()}, (sizes, sizes))
    perms = {group: torch.arange(n) for group, n in sizes.items()}
    plans: dict[str, Tensor] = {}
    for group in compared.order(list(perms)):
        perms[group] = assign(-compared.of(group, plans).numpy())
        plans[group] = torch.eye(sizes[group], dtype=torch.float64)[perms[group]]

    climb = Climb(params, to, spec)
    left = [group for group, n in sizes.items() if group not in plans and n > 1]
    return best_of(
        finish(climb, perms, rng=rng, polish=polish, left=left) for _ in range(max(1, restarts) if polish else 1)
    )


class _Moments:
    """Means and second central moments of n units of two networks, added up batch by batch.

    Batches are combined by the update of Chan, Golub, LeVeque ("Updating formulae and a pairwise algorithm for
    computing sample variances", 1979), which does not cancel when means are large.
    """

    def __init__(self, n: int, device: torch.device | str) -> None:
        self.count = 0
        self.mean = torch.zeros(2, n, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(2, n, dtype=torch.float64, device=device)
        self.cross = torch.zeros(n, n, dtype=torch.float64, device=device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples ``(n, m)`` of both networks."""
        new, old = a.shape[1], self.count
        mean = torch.stack([a.mean(1), b.mean(1)])
        a, b = a - mean[0, :, None], b - mean[1, :, None]
        step = mean - self.mean
        share = old * new / (old + new)
        self.cross += a @ b.T + share * torch.outer(step[0], step[1])
        self.scatter += torch.stack([a.square().sum(1), b.square().sum(1)]) + share * step.square()
        self.mean += step * (new / (old + new))
        self.count += new

    def deviation(self) -> Tensor:
        """Standard deviations (2, n), 0 where a unit does not vary beyond the round-off of float32."""
        deviation = (self.scatter / self.count).sqrt()
        return torch.where(deviation > _DEAD * self.mean.abs(), deviation, 0.0)

    def inner(self) -> Tensor:
        """Inner products (n, n)."""
        return self.cross + self.count * torch.outer(self.mean[0], self.mean[1])

    def l2(self) -> Tensor:
        """Squared distances (n, n), negated."""
        norms = self.scatter + self.count * self.mean.square()
        return 2 * self.inner() - norms[0][:, None] - norms[1][None, :]

    def correlation(self) -> Tensor:
        """Pearson correlations (n, n); those of dead units are 0."""
        deviation = self.deviation()
        scale = self.count * torch.outer(deviation[0], deviation[1])
        return torch.where(scale > 0, self.cross / torch.where(scale > 0, scale, 1.0), 0.0)


class _Joint:
    """Joint histograms of all pairs of n units, counts ``(n * bins, n * bins)``."""

    def __init__(self, moments: _Moments, bins: int) -> None:
        self.bins = bins
        inner = torch.arange(1, bins, dtype=torch.float64, device=moments.mean.device) / bins
        quantiles = torch.special.ndtri(inner)
        # (2, n, bins - 1), ascending; a dead unit has one edge, so it falls into one bin and says nothing.
        deviation = moments.deviation()
        self.edges = moments.mean[..., None] + deviation[..., None] * quantiles
        self.dead = deviation == 0
        n = moments.mean.shape[1]
        self.counts = torch.zeros(n * bins, n * bins, dtype=torch.float64, device=moments.mean.device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples ``(n, m)`` of both networks, as many at a time as fit."""
        size = max(1, _CELLS // len(self.counts))
        for left, right in zip(torch.split(a, size, 1), torch.split(b, size, 1), strict=True):
            # Float32 counts are exact: no cell of a chunk comes near 2^24.
            self.counts += (self._cells(left, 0) @ self._cells(right, 1).T).double()

    def _cells(self, units: Tensor, network: int) -> Tensor:
        """Which bin each sample is in, as 0 or 1, float32 ``(n * bins, m)``."""
        index = torch.searchsorted(self.edges[network].contiguous(), units.contiguous())
        index[self.dead[network]] = 0
        cells = units.new_zeros(len(units), self.bins, units.shape[1], dtype=torch.float32)
        return cells.scatter_(1, index[:, None], 1.0).flatten(0, 1)

    def information(self) -> Tensor:
        """Mutual information (n, n) in nats."""
        n = len(self.counts) // self.bins
        joint = self.counts / (self.counts.sum() / n**2)
        joint = joint.reshape(n, self.bins, n, self.bins)
        first, second = joint[:, :, 0].sum(-1), joint[0].sum(0)
        rows = []
        for p, left in zip(joint, first, strict=True):
            product = left[:, None, None] * second[None]
            rows.append(torch.special.xlogy(p, p / product.clamp_min(1e-300)).sum((0, 2)))
        return torch.stack(rows)


_GAINS: dict[str, Callable[[_Moments], Tensor]] = {
    "inner-product": _Moments.inner,
    "l2": _Moments.l2,
    "correlation": _Moments.correlation,
    "mutual-information": _Moments.correlation,
}
