"""Correction of the statistics of a merged network: BatchNorm recomputation and REPAIR."""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._check import check_params, check_weights
from fedmerge._registry import Registry
from fedmerge.data import Images
from fedmerge.errors import ParamsError
from fedmerge.folding import fold_norms
from fedmerge.spec._spec import Params

_BATCH = 500
_EPS = 1e-5

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
    fold: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    r"""A copy of ``params`` whose normalisation statistics fit the merged network itself.

    Averaged weights shrink the variance of activations, and averaged running statistics do not describe the
    averaged network. ``"recompute"`` measures the statistics of every BatchNorm layer anew on ``data``
    (parameters stay). ``"repair"`` (Jordan et al., "REPAIR", ICLR 2023, arXiv:2211.08403) also rescales and
    shifts every unit of the layers without BatchNorm, so that its mean and standard deviation on ``data``
    become the weighted means of those in ``sources``; the correction is folded into weight and bias. Layers
    without a bias, and the output layer, are left as they are. ``"none"`` returns a copy.

    ``"repair-closed-form"`` looks at no image (of ``data`` it reads the shape): if the inputs of a unit were
    isotropic and alike in all networks, its deviation would be in proportion to the norm of its incoming weights,
    which averaging shrinks by :math:`s = \|\sum_i w_i W_i\| / \sum_i w_i \|W_i\|`. A layer without BatchNorm has
    its weights divided by s; a BatchNorm layer has its running variance set to :math:`(s \sum_i w_i \sigma_i)^2`,
    its running mean being the sources' mean already. The hypothesis is ours; it knows nothing of the activations.

    Args:
        model: The architecture; not modified.
        params: The merged network.
        data: Images from the public split, never from a client's partition.
        method: A name from :func:`repairs`.
        sources: The aligned networks that were merged (needed by ``"repair"``).
        weights: One averaging weight a source; equal if None.
        fold: Carry BatchNorm into the weights before it afterwards, for inference: see :func:`fedmerge.fold_norms`,
            which also says what could not be folded.
        device: Where the forward passes run.

    Raises:
        UnknownNameError: No such method.
        ParamsError: ``"repair"`` without sources, or sources that do not fit.
        SpecError: To be folded, and the model cannot be traced.

    Cost: one forward pass over ``data``; for ``"repair"`` one a source and one or two a layer, because each layer
    is measured under corrected inputs.
    """
    repaired = _REPAIRS[method](model, params, data=data, sources=sources, weights=weights, device=device)
    return fold_norms(model, repaired, data.normalise(data.images[:2])).params if fold else repaired


@_REPAIRS.register("none", "statistics stay as the merge left them")
def _none(model: nn.Module, params: Params, **_: object) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in params.items()}


@_REPAIRS.register("recompute", "BatchNorm statistics measured anew on the public split")
def _recompute(model: nn.Module, params: Params, *, data: Images, device: str, **_: object) -> dict[str, Tensor]:
    network = _load(model, params, device)
    _measure_norms(network, data, device)
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
    network = _load(model, params, device)
    _measure_norms(network, data, device)
    layers = _correctable(network, data, device)
    found = [_moments(_load(model, source, device), list(layers), data, device) for source in sources]
    for name, layer in layers.items():
        goal_mean, goal_deviation = (
            sum((share * moments[name][k] for share, moments in zip(shares, found, strict=True)), torch.tensor(0.0))
            for k in (0, 1)
        )
        mean, deviation = _moments(network, [name], data, device)[name]
        scale = goal_deviation / deviation
        with torch.no_grad():
            layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            assert layer.bias is not None
            layer.bias.copy_((layer.bias - mean) * scale + goal_mean)
        _measure_norms(network, data, device)
    return _state(network, params)


@_REPAIRS.register("repair-closed-form", "REPAIR from the weights alone: what averaging took from each unit's norm")
def _closed_form(
    model: nn.Module,
    params: Params,
    *,
    data: Images,
    sources: Sequence[Params],
    weights: Sequence[float] | None,
    device: str,
) -> dict[str, Tensor]:
    if not sources:
        raise ParamsError("repair-closed-form needs the aligned networks that were merged; pass them as sources=")
    check_params([params, *sources])
    shares = check_weights(weights, len(sources)).tolist()
    order = _call_order(_load(model, params, device), data, device)
    repaired = _none(model, params)
    for (name, layer), (after, norm) in pairwise([*order, ("", nn.Identity())]):
        if isinstance(layer, _BatchNorm) or not after:
            continue  # the output layer is left as it is
        norms = [s[f"{name}.weight"].double().flatten(1).norm(dim=1) for s in sources]
        goal = sum((w * n for w, n in zip(shares, norms, strict=True)), torch.zeros_like(norms[0]))
        left = params[f"{name}.weight"].double().flatten(1).norm(dim=1)
        scale = torch.where(left > _EPS * goal, goal / left.clamp_min(1e-300), 1.0)
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            deviations = [s[f"{after}.running_var"].double().sqrt() for s in sources]
            mean = sum((w * d for w, d in zip(shares, deviations, strict=True)), torch.zeros_like(scale))
            repaired[f"{after}.running_var"] = (mean / scale).square().to(params[f"{after}.running_var"])
        elif not isinstance(norm, _BatchNorm):
            weight = params[f"{name}.weight"]
            repaired[f"{name}.weight"] = (weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight)
    return repaired


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


def _measure_norms(network: nn.Module, data: Images, device: str) -> None:
    """Replace the running statistics of all BatchNorm layers by their plain mean over the batches of ``data``."""
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    _forward(network, data, device)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _correctable(network: nn.Module, data: Images, device: str) -> dict[str, Layer]:
    """Linear and convolution layers, in order, with a bias, without BatchNorm behind them, and not the output."""
    return {
        name: layer
        for (name, layer), (_, after) in pairwise(_call_order(network, data, device))
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None and not isinstance(after, _BatchNorm)
    }


def _call_order(network: nn.Module, data: Images, device: str) -> list[tuple[str, nn.Module]]:
    """Linear, convolution and BatchNorm layers in the order in which they are called."""
    order: list[tuple[str, nn.Module]] = []
    handles = [
        layer.register_forward_hook(lambda _l, _i, _o, name=name, layer=layer: order.append((name, layer)))
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, _BatchNorm))
    ]
    _forward(network, data.select(range(min(2, len(data)))), device)
    for handle in handles:
        handle.remove()
    return order


def _moments(
    network: nn.Module, names: Sequence[str], data: Images, device: str
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Layer name -> mean and standard deviation of every unit's pre-activation over all of ``data``, float32."""
    sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def add(name: str, out: Tensor) -> None:
        units = out.movedim(1, 0).flatten(1) if out.dim() == 4 else out.reshape(-1, out.shape[-1]).T
        units = units.double()
        sums[name].append(
            torch.stack([units.sum(1), units.square().sum(1), torch.full_like(units[:, 0], units.shape[1])])
        )

    handles = [
        network.get_submodule(name).register_forward_hook(lambda _l, _i, out, name=name: add(name, out))
        for name in names
    ]
    _forward(network, data, device)
    for handle in handles:
        handle.remove()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in sums.items():
        total, squares, count = torch.stack(parts).sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        moments[name] = (mean.float(), torch.sqrt(variance + _EPS).float())
    return moments
