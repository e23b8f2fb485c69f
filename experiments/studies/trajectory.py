"""Averages over one training, and coefficients learned in the span of networks: what the study of averaging needs."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fedmerge as fm
from experiments.studies.bench import Bench, Params
from fedmerge.data import Images
from fedmerge.streams import torch_stream

SEGMENTS = 4
"""Networks that are kept of each epoch."""


def path(bench: Bench, start: Params, epochs: int, purpose: str) -> list[Params]:
    """One training at a constant rate, a quarter of the peak: a network every :data:`SEGMENTS`-th of an epoch.

    Momentum begins anew with each of them.
    """
    recipe = replace(bench.recipe, schedule="constant", warmup=0.0, lr=bench.recipe.lr / 4)
    generator, params, found = torch_stream(bench.seed, purpose), start, []
    images = bench.parts[0]
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).chunk(SEGMENTS):
            params = fm.train(
                bench.model, params, images.select(rows), recipe=recipe, epochs=1, generator=generator,
                device=bench.device,
            ).params  # fmt: skip
            found.append(params)
    return found


def swad(bench: Bench, networks: Sequence[Params], tolerance: float = 1.3) -> Params:
    """SWAD (Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, arXiv:2102.08604).

    The mean of all networks from the lowest validation loss so far that three in a row do not undercut, until the loss
    exceeds ``tolerance`` times the mean of those three; to the end where there is no such time.
    """
    losses = [bench.score(params, bench.val)["loss"] for params in networks]
    first = next((t for t in range(len(losses) - 2) if losses[t] == min(losses[t : t + 3])), len(losses) - 1)
    bound = tolerance * sum(losses[first : first + 3]) / len(losses[first : first + 3])
    last = next((t for t in range(first, len(losses)) if losses[t] > bound), len(losses))
    return fm.average(networks[first : max(last, first + 1)])


def swag(bench: Bench, networks: Sequence[Params], samples: int = 10) -> Tensor:
    r"""SWAG, a sample of networks around the mean of a trajectory.

    (Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019, arXiv:1902.02476.)
    Probabilities averaged over draws from :math:`N(\bar w, (\mathrm{diag}\,\sigma^2 + D D^T / (K - 1)) / 2)`, with D
    the deviations of the K networks from their mean.
    """
    mean = fm.average(networks)
    generator = torch_stream(bench.seed, "swag")
    deviations = [{name: p[name].double() - mean[name].double() for name in mean} for p in networks]
    total = torch.zeros(len(bench.test), len(bench.test.classes), dtype=torch.float64)
    for _ in range(samples):
        low = torch.randn(len(networks), generator=generator, dtype=torch.float64) / math.sqrt(2 * (len(networks) - 1))
        drawn = {}
        for name, tensor in mean.items():
            variance = sum(d[name].square() for d in deviations) / len(deviations)
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            shift = sum(z * d[name] for z, d in zip(low, deviations, strict=True))
            drawn[name] = (tensor.double() + (variance / 2).sqrt() * noise + shift).to(tensor.dtype)  # type: ignore[union-attr]
        total += bench.probabilities(drawn)
    return total / samples


def learned(bench: Bench, networks: Sequence[Params], *, steps: int = 40, rate: float = 0.05) -> Params:
    """The combination of ``networks`` whose coefficients lower the loss on val, by Adam from equal ones.

    The best of all steps: it is never above the loss of the plain mean. A step moves the sum of coefficients by at most
    ``rate``, for networks of one training are nearly one, and their sum is its scale.
    Of networks from one start that is learned averaging in their subspace; of those of one training it is TWA (Li et
    al., "Trainable Weight Averaging", ICLR 2023, arXiv:2205.13104), who learn on training images.
    """
    shares = torch.full((len(networks),), 1 / len(networks), requires_grad=True)
    stacked = {name: torch.stack([params[name] for params in networks]) for name in networks[0]}
    inputs, labels = bench.val.normalise(bench.val.images), bench.val.labels
    optimizer = torch.optim.Adam([shares], rate / len(networks))
    model = deepcopy(bench.model).eval()

    def mixed() -> dict[str, Tensor]:
        return {name: torch.tensordot(shares, tensors, dims=1) for name, tensors in stacked.items()}

    lowest, best = math.inf, dict[str, Tensor]()
    for _ in range(steps + 1):
        params = mixed()
        loss = F.cross_entropy(torch.func.functional_call(model, params, (inputs,)), labels)
        if loss.item() < lowest:
            lowest, best = loss.item(), {name: tensor.detach() for name, tensor in params.items()}
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return best


def stitched(bench: Bench, lower: Params, upper: Params, at: str) -> Tensor:
    """Probabilities of the layers of ``lower`` up to ``at`` and of ``upper`` from there, an affine map fitted between.

    (Model stitching: Lenc, Vedaldi, CVPR 2015.) The map is the least-squares one between the outputs of that layer on
    the public images; no label is read.
    """
    model = deepcopy(bench.model).eval()
    layer = model.get_submodule(at)

    def outputs(params: Params, images: Images) -> Tensor:
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, given, answer: seen.append(answer))
        with torch.no_grad():
            torch.func.functional_call(model, dict(params), (images.normalise(images.images),))
        hook.remove()
        return seen[0].double()

    a, b = (outputs(params, bench.public) for params in (lower, upper))
    ones = torch.ones(len(a), 1, dtype=torch.float64)
    design = torch.cat([a, ones], 1)
    ridge = 1e-3 * design.square().mean() * len(a) * torch.eye(design.shape[1], dtype=torch.float64)
    carried = torch.linalg.solve(design.T @ design + ridge, design.T @ b)
    given = torch.cat([outputs(lower, bench.test), torch.ones(len(bench.test), 1, dtype=torch.float64)], 1) @ carried
    hook = layer.register_forward_hook(lambda module, inputs, answer: given.to(answer.dtype))
    with torch.no_grad():
        images = bench.test
        logits = torch.func.functional_call(model, dict(upper), (images.normalise(images.images),))
    hook.remove()
    answered: Tensor = logits.double().softmax(1)
    return answered
