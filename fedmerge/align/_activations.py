"""Where the units of a group show in a network's activations, and their values on images."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedmerge.data import Images
from fedmerge.errors import SpecError
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Axis

_CHANNEL_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
_TRAILING_NORMS = (nn.LayerNorm, nn.RMSNorm)

Sink = Callable[[str, Tensor, Tensor], None]
"""``sink(group, a, b)``: units of two networks on the same samples, both float64 ``(n, samples)``."""


class Channels(NamedTuple):
    """Which axis of an output holds the units: one counted from its end, or axis 1 as in ``(N, C, H, W)``.

    Attributes:
        from_end: 1 for the last axis; None for axis 1.
        images: Whether an output of four dimensions is an image after all, with its channels on axis 1.
    """

    from_end: int | None
    images: bool = False

    def axis(self, dims: int) -> int:
        """The axis in an output of ``dims`` dimensions."""
        return 1 if self.from_end is None or (self.images and dims == 4) else dims - self.from_end


@dataclass(frozen=True)
class View:
    """The units of a group in the output of a layer.

    Attributes:
        group: The group.
        module: Name of the layer.
        channels: Which axis of the output holds the units.
        axis: What that axis is made of.
        segment: The segment of ``axis`` that holds the group.
        factor: The factor of that segment which is the group; no other factor of it moves.
    """

    group: str
    module: str
    channels: Channels
    axis: Axis
    segment: int
    factor: int

    def units(self, out: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """``out`` as float64 ``(n, samples)``: every other axis, and every other factor of this one, is a sample.

        ``sizes`` are the numbers of units of the network that made it; those of the traced network if None.
        """
        dim = self.channels.axis(out.dim())
        lengths = [[f.size if f.group is None or not sizes else sizes[f.group] for f in s] for s in self.axis]
        if len(self.axis) > 1:
            parts = [math.prod(segment) for segment in lengths]
            out = out.narrow(dim, sum(parts[: self.segment]), parts[self.segment])
        segment = lengths[self.segment]
        if len(segment) > 1:
            out = out.reshape(*out.shape[:dim], *segment, *out.shape[dim + 1 :])
        return out.movedim(dim + self.factor, 0).flatten(1).double()


def views(model: nn.Module, spec: PermSpec, data: Images, device: torch.device | str) -> dict[str, list[View]]:
    """Group -> where its units show, before the activation function: the outputs of all layers that make them.

    A layer makes the units that lie on the output axis of its weight: axis 0 of linear maps, convolutions and
    norms. The layers that add to one residual stream all show its group, and all count. A layer whose output
    goes straight into a norm of the same group is seen after that norm.

    Raises:
        SpecError: A group that no layer shows alone: its remedy is a method that needs weights only.
    """
    found: dict[str, list[View]] = {group: [] for group in spec.groups}
    shared: dict[str, str] = {}
    shows: dict[str, set[str]] = {name: set() for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        axis, channels = _output(name, module, spec)
        for s, segment in enumerate(axis):
            for f, factor in enumerate(segment):
                if factor.group is None:
                    continue
                if sum(other.group is not None for other in segment) > 1:
                    shared[factor.group] = name
                    continue
                found[factor.group].append(View(factor.group, name, channels, axis, s, f))
                shows[name].add(factor.group)
    normed = {layer for layer, norm in _into_norms(model, data, device) if shows[layer] <= shows[norm]}
    for group, group_views in found.items():
        if not group_views:
            why = (
                f"the output of {shared[group]!r} interleaves it with another group"
                if group in shared
                else "no Linear, convolution, embedding or norm layer makes them as its output"
            )
            raise SpecError(
                f"the units of group {group!r} cannot be observed: {why}; "
                "align this network with 'weight-matching', which needs weights only"
            )
        found[group] = [view for view in group_views if view.module not in normed]
    return found


def stream(
    networks: tuple[nn.Module, nn.Module],
    where: Mapping[str, list[View]],
    data: Images,
    sink: Sink,
    *,
    batch_size: int,
    device: torch.device | str,
    sizes: tuple[Mapping[str, int], Mapping[str, int]] | None = None,
) -> None:
    """Hand ``sink`` the activations of both networks on ``data``, a batch and a layer at a time.

    ``sizes`` are the two networks' numbers of units, where they are not those of the traced network. Held at once:
    one batch of the first network's observed outputs, in the network's own precision.
    """
    first_sizes, second_sizes = sizes or (None, None)
    of_module: dict[str, list[View]] = {}
    for group_views in where.values():
        for view in group_views:
            of_module.setdefault(view.module, []).append(view)
    first: dict[str, list[Tensor]] = {name: [] for name in of_module}

    def keep(name: str, out: Tensor) -> None:
        # A copy, because an activation function may work in place.
        first[name].append(out.clone())

    def meet(name: str, out: Tensor) -> None:
        # A module that is called more than once is called in the same order by both networks.
        other = first[name].pop(0)
        for view in of_module[name]:
            sink(view.group, view.units(other, first_sizes), view.units(out, second_sizes))

    with ExitStack() as stack, torch.inference_mode():
        for network, use in zip(networks, (keep, meet), strict=True):
            for name in of_module:
                hook = network.get_submodule(name).register_forward_hook(
                    lambda _module, _inputs, out, name=name, use=use: use(name, out)
                )
                stack.callback(hook.remove)
        for batch in torch.split(data.images, batch_size):
            for network in networks:
                network(data.normalise(batch.to(device)))


def _output(name: str, module: nn.Module, spec: PermSpec) -> tuple[Axis, Channels]:
    """What the units of a layer's output are made of (nothing: not a layer that makes units), and where they lie."""
    if isinstance(module, nn.Linear | nn.Embedding):
        channels = Channels(1)
    elif isinstance(module, _ConvNd | _BatchNorm | _InstanceNorm | nn.GroupNorm):
        channels = Channels(None)
    elif isinstance(module, _TRAILING_NORMS):
        # Subclasses for images move the channels to the end and back.
        channels = Channels(len(module.normalized_shape), images=type(module) not in _TRAILING_NORMS)
    else:
        return (), Channels(None)
    of_weight = 1 if isinstance(module, nn.Embedding | _ConvTransposeNd) else 0
    for tensor, a in (("bias", 0), ("weight", of_weight), ("running_mean", 0)):
        axes = spec.axes.get(f"{name}.{tensor}" if name else tensor, ())
        if len(axes) > a and axes[a]:
            return axes[a], channels
    return (), channels


def _into_norms(model: nn.Module, data: Images, device: torch.device | str) -> list[tuple[str, str]]:
    """Pairs (layer, norm) in which the very output of the layer is the input of the norm."""
    made: list[tuple[str, Tensor]] = []  # holds the tensors, so that none takes another's place in memory
    pairs: list[tuple[str, str]] = []
    with ExitStack() as stack, torch.inference_mode():
        for name, module in model.named_modules():

            def record(module: nn.Module, inputs: tuple[Tensor, ...], out: object, name: str = name) -> None:
                if isinstance(module, _CHANNEL_NORMS + _TRAILING_NORMS):
                    pairs.extend((layer, name) for layer, tensor in made if tensor is inputs[0])
                elif isinstance(out, Tensor):
                    made.append((name, out))

            stack.callback(module.register_forward_hook(record).remove)
        model(data.normalise(data.images[:2].to(device)))
    return pairs
