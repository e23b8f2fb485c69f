"""Correction of the statistics of a merged network: BatchNorm recomputation and REPAIR."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._called import lies
from fedmerge._check import check_params, check_weights
from fedmerge._deviations import Deviations, shrinkage
from fedmerge._forward import answer
from fedmerge._graph import Graph, argument
from fedmerge._loading import load, with_versions
from fedmerge._statistics import measure_norms
from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError
from fedmerge.folding import fold_norms
from fedmerge.progress import steps
from fedmerge.registry import Entry, Registry, returned
from fedmerge.types import Params

_BATCH = 500
_EPS = 1e-5

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Repair(Entry):
    """A correction: ``make(model, params, *, data, sources, weights, device) -> state dict``.

    One that needs both ``data`` and ``sources`` runs the networks that were merged on images.
    """

    make: Callable[..., dict[str, Tensor]]

    can_need = frozenset({"data", "sources"})
    called = ("model params", "data sources weights device")


REPAIRS: Registry[Repair] = Registry("repair", Repair, "repairs")
"""The corrections; filled at the end of this file."""


def repairs() -> dict[str, str]:
    """Name -> one-line summary of every correction of a merged network's statistics.

    Example:
        >>> fm.repairs()["recompute"]
        'BatchNorm statistics measured anew on the public split'
    """
    return REPAIRS.summaries()


@checked
def repair(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    method: str | Callable[..., dict[str, Tensor]] = "recompute",
    sources: Sequence[Params] = (),
    weights: Sequence[float] | None = None,
    fold: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    r"""A copy of ``params`` whose normalisation statistics fit the merged network itself.

    Averaged weights shrink the variance of activations, and averaged running statistics do not describe the
    averaged network. ``"recompute"`` measures the statistics of every BatchNorm anew on ``data``, and of every
    InstanceNorm that keeps some (parameters stay): those that one batch of all of ``data`` leaves in training mode
    with ``momentum=None``, however many images there are. ``"repair"`` (Jordan et al., "REPAIR", ICLR 2023,
    arXiv:2211.08403) also rescales and shifts every unit of the layers without such a norm behind them, so that its
    mean and standard deviation on ``data`` become the weighted means of those in ``sources``; the correction is folded
    into weight and bias. Layers without a bias, output layers, and layers whose tensors are used elsewhere too, are
    left as they are; one that is called several times is corrected by all its calls together. ``"none"`` returns a
    copy.

    ``"repair-closed-form"`` looks at no image (of ``data`` it reads the shape): if the inputs of a unit were
    isotropic and alike in all networks, its deviation would be in proportion to the norm of its incoming weights,
    which averaging shrinks by :math:`s = \|\sum_i w_i W_i\| / \sum_i w_i \|W_i\|`. A norm of such units has its
    running variance set to :math:`(s \sum_i w_i \sigma_i)^2`, its running mean being the sources' mean already. A
    layer without a norm behind it has its weights divided by s. Norms and layers are paired by the traced graph: a norm
    may see sums (then W holds the weights of all terms) and concatenations of layers and other norms, pooled or
    reshaped; what it sees from behind an activation function keeps the statistics of ``params``. The hypothesis is
    ours; it knows nothing of the activations.

    Args:
        model: The architecture; not modified.
        params: The merged network.
        data: Images from the public split, never from a client's partition.
        method: A name from :func:`repairs`, ``module:function``, or a function with the arguments of :class:`Repair`.
        sources: The aligned networks that were merged (needed by ``"repair"``).
        weights: One averaging weight a source; equal if None.
        fold: Carry BatchNorm into the weights before it afterwards, for inference: see :func:`fedmerge.fold_norms`,
            which also says what could not be folded.
        device: Where the forward passes run.

    Raises:
        UnknownNameError: No such method.
        ConfigError: A method of your own that does not take what it is called with, or returns no state dict.
        ParamsError: ``"repair"`` without sources, or networks that do not fit.
        DataError: No images, or too few to measure a variance.
        SpecError: The model cannot be traced, to be folded or for REPAIR.

    Cost: one forward pass over ``data`` (more where half of the free memory does not hold the activations of all
    images at one norm); for ``"repair"`` one a source and one or two a layer, because each layer is measured under
    corrected inputs.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(64))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
        >>> fixed = fm.repair(model, model.state_dict(), data=digits)  # BatchNorm's statistics measured on these images
        >>> torch.allclose(fixed["1.running_mean"], digits.normalise(digits.images).flatten(1).mean(0), atol=1e-5)
        True
    """
    check_params([params])
    chosen = REPAIRS.find(method)
    repaired = chosen.make(model, params, data=data, sources=sources, weights=weights, device=device)
    repaired = returned(f"repair {chosen.name!r}", repaired, dict)
    return fold_norms(model, repaired, _example(data)).params if fold else repaired


def _none(model: nn.Module, params: Params, **_: object) -> dict[str, Tensor]:
    return with_versions({name: tensor.clone() for name, tensor in params.items()}, params)


def _recompute(model: nn.Module, params: Params, *, data: Images, device: str, **_: object) -> dict[str, Tensor]:
    network = load(model, params, device)
    measure_norms(network, data, batch_size=_BATCH, device=device)
    return _state(network, params)


def _repair(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    sources: Sequence[Params],
    weights: Sequence[float] | None,
    device: str,
) -> dict[str, Tensor]:
    shares = _shares("repair", params, sources, weights)
    if not len(data):
        raise DataError(f"{data.name} holds no images; repair measures activations on at least one")
    network = load(model, params, device)
    measure_norms(network, data, batch_size=_BATCH, device=device)
    layers = _correctable(network, params, data)
    found = [_moments(load(model, source, device), layers, data, device) for source in sources]
    for name, calls in layers.items():
        layer = network.get_submodule(calls[0])
        assert isinstance(layer, Layer)
        assert layer.bias is not None
        goal_mean, goal_deviation = (
            sum((share * moments[name][k] for share, moments in zip(shares, found, strict=True)), torch.tensor(0.0))
            for k in (0, 1)
        )
        mean, deviation = _moments(network, {name: calls}, data, device)[name]
        scale = goal_deviation / deviation
        with torch.no_grad():
            layer.weight.mul_(_column(scale, layer.weight))
            layer.bias.copy_((layer.bias - mean) * scale + goal_mean)
        measure_norms(network, data, batch_size=_BATCH, device=device)
    return _state(network, params)


def _closed_form(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    sources: Sequence[Params],
    weights: Sequence[float] | None,
    **_: object,
) -> dict[str, Tensor]:
    shares = torch.tensor(_shares("repair-closed-form", params, sources, weights), dtype=torch.float64)
    load(model, params, "cpu")  # refuses what is no state dict of it
    found = Deviations(Graph(model, _example(data)), [*sources, params])
    repaired = _none(model, params)
    for names, shrunk in found.statistics(shares).items():
        deviations = torch.stack([s[names[-1]].detach().cpu().double().sqrt() for s in sources])
        variance = ((shares[:, None] * deviations).sum(0) * shrunk).square()
        kept = params[names[-1]].detach()
        variance = torch.where(variance.isfinite(), variance, kept.cpu().double()).to(kept)
        repaired |= {name: variance.clone() for name in names}
    for names in found.layers():
        weight = params[names[-1]].detach()
        squares = torch.stack(
            [m[names[-1]].detach().cpu().double().flatten(1).square().sum(1) for m in [*sources, params]]
        )
        scaled = weight.double() / _column(shrinkage(squares, shares), weight)
        repaired |= {name: scaled.to(weight, copy=True) for name in names}
    return repaired


def _shares(method: str, params: Params, sources: Sequence[Params], weights: Sequence[float] | None) -> list[float]:
    """The averaging weights of ``sources``, which must fit ``params``."""
    if not sources:
        raise ParamsError(f"{method} needs the aligned networks that were merged; pass them as sources=")
    check_params([params], besides={f"source {i}": source for i, source in enumerate(sources)})
    shares: list[float] = check_weights(weights, len(sources)).tolist()
    return shares


def _example(data: Images) -> tuple[Any]:
    """Two black images of the shape of ``data``, or its first row twice, as the network's one argument."""
    return (data.normalise(torch.zeros(2, *data.shape, dtype=torch.uint8)),)


def _column(units: Tensor, weight: Tensor) -> Tensor:
    """A number a unit, in the shape that multiplies the rows of ``weight``."""
    return units.to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))


def _state(network: nn.Module, like: Params) -> dict[str, Tensor]:
    state = network.state_dict()
    return with_versions({name: state[name].detach().to(old, copy=True) for name, old in like.items()}, state)


def _correctable(network: nn.Module, params: Params, data: Images) -> dict[str, list[str]]:
    """Name of a weight -> the linear or convolution layers that have it; of those that can be corrected, in order.

    They have a bias, weight and bias have no other use, and neither a norm with running statistics nor the output of
    the network is right behind them. All their uses are calls of the layers, for those are what is measured: attention
    takes the weights of its projection without calling it.
    """
    graph = Graph(network, _example(data))
    modules = {name: m for name, m in network.named_modules() if isinstance(m, Layer)}
    found: dict[str, list[str]] = {}
    uses: dict[str, int] = {}
    for names, nodes in Deviations(graph, [params]).layers().items():
        biases = {graph.names(argument(node, 2)) for node in nodes}
        layers = [name for name in modules if f"{name}.weight" in names]
        bias = biases.pop()
        if layers and bias and not biases and len(graph.uses(bias)) == len(nodes):
            found[names[0]] = layers
            uses[names[0]] = len(nodes)
    called: Counter[str] = Counter()
    device = str(lies(network))
    _watch(network, found, replace(data, images=data.images[:2], labels=data.labels[:2]), device,
           lambda name, *_: called.update([name]))  # fmt: skip
    return {name: layers for name, layers in found.items() if called[name] == uses[name]}


def _watch(
    network: nn.Module,
    layers: Mapping[str, Sequence[str]],
    data: Images,
    device: str,
    see: Callable[[str, Layer, Tensor], None],
) -> None:
    """Hand ``see`` the key, the layer and the output of each call of ``layers`` while ``network`` runs on ``data``."""
    handles = [
        network.get_submodule(name).register_forward_hook(lambda layer, _i, out, key=key: see(key, layer, out))
        for key, names in layers.items()
        for name in names
    ]
    with torch.no_grad():
        for batch in steps("measuring units", torch.split(data.images, _BATCH)):
            answer(network, data, batch.to(device))
    for handle in handles:
        handle.remove()


def _moments(
    network: nn.Module, layers: Mapping[str, Sequence[str]], data: Images, device: str
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Key -> mean and standard deviation of every unit's pre-activation in its layers on all of ``data``, float32."""
    sums: dict[str, list[Tensor]] = {key: [] for key in layers}

    def add(key: str, layer: Layer, out: Tensor) -> None:
        units = out.movedim(1 - layer.weight.dim(), 0).flatten(1).double()
        sums[key].append(
            torch.stack([units.sum(1), units.square().sum(1), torch.full_like(units[:, 0], units.shape[1])])
        )

    _watch(network, layers, data, device, add)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in sums.items():
        total, squares, count = torch.stack(parts).sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        moments[name] = (mean.float(), torch.sqrt(variance + _EPS).float())
    return moments


REPAIRS.add(
    Repair("none", _none, "statistics stay as the merge left them"),
    Repair(
        "recompute", _recompute, "BatchNorm statistics measured anew on the public split", needs=frozenset({"data"})
    ),
    Repair(
        "repair",
        _repair,
        "REPAIR: every unit's mean and deviation set to the clients' weighted mean",
        needs=frozenset({"data", "sources"}),
    ),
    Repair(
        "repair-closed-form",
        _closed_form,
        "REPAIR from the weights alone: what averaging took from each unit's norm",
        needs=frozenset({"sources"}),
    ),
)
