"""Correction of the statistics of a merged network: BatchNorm recomputation and REPAIR."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._check import check_params, check_weights
from fedmerge._registry import Registry
from fedmerge.data import Images
from fedmerge.errors import ParamsError
from fedmerge.spec._spec import Params

_BATCH = 500
_EPS = 1e-5

Norm = nn.BatchNorm1d | nn.BatchNorm2d
Layer = nn.Linear | nn.Conv2d
Repairer = Callable[..., dict[str, Tensor]]
_REPAIRS: Registry[Repairer] = Registry("repair")


def repairs() -> dict[str, str]:
    """Name -> one-line summary of every correction of a merged network's statistics."""
    return _REPAIRS.summaries()


def repair(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    method: str = "recompute",
    sources: Sequence[Params] = (),
    weights: Sequence[float] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """A copy of ``params`` whose normalisation statistics fit the merged network itself.

    Averaged weights shrink the variance of activations, and averaged running statistics do not describe the
    averaged network. ``"recompute"`` measures the statistics of every BatchNorm layer anew on ``data``
    (parameters stay). ``"repair"`` (Jordan et al., "REPAIR", ICLR 2023, arXiv:2211.08403) also rescales and
    shifts every unit of the layers without BatchNorm, so that its mean and standard deviation on ``data``
    become the weighted means of those in ``sources``; the correction is folded into weight and bias. Layers
    without a bias, and the output layer, are left as they are. ``"none"`` returns a copy.

    Args:
        model: The architecture; not modified.
        params: The merged network.
        data: Images from the public split, never from a client's partition.
        method: A name from :func:`repairs`.
        sources: The aligned networks that were merged (needed by ``"repair"``).
        weights: One averaging weight a source; equal if None.
        device: Where the forward passes run.

    Raises:
        UnknownNameError: No such method.
        ParamsError: ``"repair"`` without sources, or sources that do not fit.

    Cost: one forward pass over ``data``, for ``"repair"`` one more a source.
    """
    return _REPAIRS[method](model, params, data=data, sources=sources, weights=weights, device=device)


@_REPAIRS.register("none", "statistics stay as the merge left them")
def _none(model: nn.Module, params: Params, **_: object) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in params.items()}


@_REPAIRS.register("recompute", "BatchNorm statistics measured anew on the public split")
def _recompute(model: nn.Module, params: Params, *, data: Images, device: str, **_: object) -> dict[str, Tensor]:
    network = _load(model, params, device)
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if layers:
        with _measuring(layers):
            _forward(network, data, device)
    return _state(network, params)


@_REPAIRS.register("repair", "REPAIR: every unit's mean and deviation set to the clients' weighted mean")
def _repair(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    sources: Sequence[Params],
    weights: Sequence[float] | None,
    device: str,
) -> dict[str, Tensor]:
    if not sources:
        raise ParamsError("repair needs the aligned networks that were merged; pass them as sources=")
    check_params([params, *sources])
    shares = check_weights(weights, len(sources)).tolist()
    goals: dict[str, tuple[Tensor, Tensor]] = {}
    for share, source in zip(shares, sources, strict=True):
        for name, (mean, deviation) in _moments(_load(model, source, device), data, device).items():
            known = goals.get(name, (torch.zeros_like(mean), torch.zeros_like(deviation)))
            goals[name] = (known[0] + share * mean, known[1] + share * deviation)

    # In train mode an inserted BatchNorm brings each unit to its goal before the next layer sees it, so
    # one pass measures every layer under the corrected inputs; folding then makes the correction permanent.
    network = _load(model, params, device)
    inserted: dict[str, Norm] = {}
    handles = []
    for name, layer in _correctable(network, data, device).items():
        norm = _norm_after(layer).to(device)
        with torch.no_grad():
            norm.bias.copy_(goals[name][0])
            norm.weight.copy_(goals[name][1])
        inserted[name] = norm
        handles.append(layer.register_forward_hook(lambda _layer, _in, out, norm=norm: norm(out)))
    own = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    with _measuring([*own, *inserted.values()]):
        _forward(network, data, device)
    for handle in handles:
        handle.remove()
    for name, layer in _correctable(network, data, device).items():
        norm = inserted[name]
        mean, variance = _statistics(norm)
        scale = norm.weight / torch.sqrt(variance + _EPS)
        with torch.no_grad():
            layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.sub_(mean).mul_(scale).add_(norm.bias)  # type: ignore[union-attr]
    return _state(network, params)


def _load(model: nn.Module, params: Params, device: str) -> nn.Module:
    network = copy.deepcopy(model)
    network.load_state_dict(dict(params))
    return network.to(device).eval()


def _state(network: nn.Module, like: Params) -> dict[str, Tensor]:
    return {name: tensor.detach().to(like[name].device).clone() for name, tensor in network.state_dict().items()}


def _forward(network: nn.Module, data: Images, device: str) -> None:
    with torch.no_grad():
        for start in range(0, len(data), _BATCH):
            network(data.normalise(data.images[start : start + _BATCH].to(device)))


@contextmanager
def _measuring(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorm layers in train mode, their statistics the plain mean over all batches."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative
        layer.train()
    yield
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _correctable(network: nn.Module, data: Images, device: str) -> dict[str, Layer]:
    """Linear and convolution layers with a bias whose output is not normalised at once and is not the output."""
    order: list[tuple[str, nn.Module]] = []
    kinds = (nn.Linear, nn.Conv2d, _BatchNorm)
    handles = [
        layer.register_forward_hook(lambda _l, _i, _o, name=name, layer=layer: order.append((name, layer)))
        for name, layer in network.named_modules()
        if isinstance(layer, kinds)
    ]
    with torch.no_grad():
        network(data.normalise(data.images[:2].to(device)))
    for handle in handles:
        handle.remove()
    found: dict[str, Layer] = {}
    for (name, layer), (_, after) in pairwise(order):
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None and not isinstance(after, _BatchNorm):
            found[name] = layer
    return found


def _norm_after(layer: Layer) -> Norm:
    if isinstance(layer, nn.Linear):
        return nn.BatchNorm1d(layer.out_features, eps=_EPS)
    return nn.BatchNorm2d(layer.out_channels, eps=_EPS)


def _moments(network: nn.Module, data: Images, device: str) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Layer name -> mean and standard deviation of every unit's pre-activation on ``data``."""
    norms: dict[str, Norm] = {}
    handles = []
    for name, layer in _correctable(network, data, device).items():
        norms[name] = norm = _norm_after(layer).to(device)

        def measure(_layer: nn.Module, _in: object, out: Tensor, norm: nn.Module = norm) -> None:
            norm(out)

        handles.append(layer.register_forward_hook(measure))
    with _measuring(list(norms.values())):
        _forward(network, data, device)
    for handle in handles:
        handle.remove()
    return {name: (mean, variance.sqrt()) for name, norm in norms.items() for mean, variance in [_statistics(norm)]}


def _statistics(norm: Norm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
