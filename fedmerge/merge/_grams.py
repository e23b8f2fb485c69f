"""Second moments of what the layers of a network see: the normal equations of a regression onto its layers.

Layers that share a weight or a bias answer with the same unknowns, so they make one block of equations. The unknowns
of a block are one matrix, a row an output and a column an input, with the weights and biases of the block beside each
other.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedmerge._loading import check_names, load
from fedmerge._ties import first_names
from fedmerge.data import Images
from fedmerge.progress import steps
from fedmerge.types import Params

_BATCH = 100
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)


@dataclass
class Block:
    """One regression: tensors that occur in it together.

    Attributes:
        columns: First name of each tensor -> its number of columns, in the order of the columns.
        groups: Groups of the rows, each with inputs of its own.
        transposed: Tensor -> groups of the transposed convolution whose weight it is, which holds its rows on axis 1.
        gram: Mean over images of X^T X for each group of rows, float64 ``(groups, d, d)``.
        counts: Mean number of times that an image looks up each row, float64 ``(rows,)``; 0 for all but embeddings.
        embeds: The columns that embeddings look up.
    """

    columns: dict[str, int]
    groups: int
    transposed: dict[str, int]
    gram: Tensor
    counts: Tensor | None = None
    embeds: Tensor = field(default_factory=lambda: torch.zeros(0))

    def matrix(self, params: Params) -> Tensor:
        """The unknowns' values in ``params``, float64 ``(rows, d)``."""
        return torch.cat([self._rows(name, params[name].detach().double().cpu()) for name in self.columns], 1)

    def tensors(self, matrix: Tensor, like: Params) -> dict[str, Tensor]:
        """The inverse of :meth:`matrix`, with the shapes and types of ``like``."""
        found = {}
        for name, part in zip(self.columns, torch.split(matrix, list(self.columns.values()), 1), strict=True):
            shape = like[name].shape
            if name in self.transposed:
                g = self.transposed[name]
                part = part.reshape(g, shape[1], shape[0] // g, *shape[2:]).transpose(1, 2)
            found[name] = part.reshape(shape).to(like[name])
        return found

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.transposed:
            g = self.transposed[name]
            tensor = tensor.reshape(g, tensor.shape[0] // g, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1)
        return tensor[:, None] if tensor.dim() == 1 else tensor.flatten(1)


def gram_blocks(model: nn.Module, params: Params, data: Images, *, device: str = "cpu") -> list[Block]:
    """The blocks of ``model``, with what its layers see on ``data`` where it holds ``params``."""
    check_names(model, params)
    first = first_names(model)
    network = load(model, params, device)
    layers = {name: layer for name, layer in network.named_modules() if _known(name, layer, first)}
    blocks, place = [], {}
    for members in _together(layers, first):
        block = _empty(members, layers, first)
        if block is not None:
            blocks.append(block)
            place.update(dict.fromkeys(members, block))

    def add(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block, weight = place[name], first[f"{name}.weight" if name else "weight"]
        starts = dict(zip(block.columns, _starts(block.columns.values()), strict=True))
        if isinstance(layer, nn.Embedding):
            indices = args[0] if args else kwargs["input"]
            seen = torch.bincount(indices.flatten(), minlength=layer.num_embeddings).double().cpu() / len(data)
            block.counts = seen if block.counts is None else block.counts + seen
            block.embeds = torch.zeros(block.gram.shape[1], dtype=torch.float64)
            block.embeds[starts[weight] :][: block.columns[weight]] = 1
            return
        x = _inputs(layer, args, kwargs)
        parts = [(starts[weight], x)]
        if layer.bias is not None:
            parts.append((starts[first[f"{name}.bias" if name else "bias"]], torch.ones_like(x[..., :1])))
        for at, a in parts:
            for other, b in parts:
                found = torch.einsum("ngi,ngj->gij", a, b).cpu() / len(data)
                found = found.repeat_interleave(block.groups // len(found), 0)
                block.gram[:, at : at + a.shape[-1], other : other + b.shape[-1]] += found

    handles = [
        layers[name].register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: add(name, layer, args, kwargs), with_kwargs=True
        )
        for name in place
    ]
    try:
        with torch.no_grad():
            for batch in steps("measuring inputs of a model", torch.split(data.images, _BATCH)):
                network(data.normalise(batch.to(device)))
    finally:
        for handle in handles:
            handle.remove()
    return blocks


def solve(left: Tensor, counts: Tensor | None, embeds: Tensor, right: Tensor, groups: int) -> Tensor:
    """Minimum-norm M, ``(rows, d)``, with M_r (left_g + counts_r diag(embeds)) = right_r for each row r of group g."""
    rows = right.reshape(groups, -1, right.shape[1])
    if counts is None:
        solution: Tensor = torch.linalg.lstsq(left, rows.mT, driver="gelsd").solution
        return solution.mT.reshape(right.shape)
    # Rows that were looked up alike often share their equations.
    found: Tensor = torch.empty_like(rows)
    often = counts.reshape(groups, -1)
    for g in range(groups):
        for count in torch.unique(often[g]):
            alike = often[g] == count
            system = left[g] + count * torch.diag(embeds)
            found[g, alike] = torch.linalg.lstsq(system, rows[g, alike].T, driver="gelsd").solution.T
    return found.reshape(right.shape)


def _known(name: str, layer: nn.Module, first: Mapping[str, str]) -> bool:
    """Whether the layer answers by a weight that is a parameter: a reparametrised one is made anew at each call."""
    return isinstance(layer, _LAYERS) and (f"{name}.weight" if name else "weight") in first


def _names(name: str, layer: nn.Module, first: Mapping[str, str]) -> list[str]:
    dot = f"{name}." if name else ""
    return [first[dot + part] for part in ("weight", "bias") if getattr(layer, part, None) is not None]


def _together(layers: Mapping[str, nn.Module], first: Mapping[str, str]) -> list[list[str]]:
    """The layers, those beside each other that share tensors, directly or through others."""
    parts: list[tuple[set[str], list[str]]] = []
    for name, layer in layers.items():
        tensors, members = set(_names(name, layer, first)), [name]
        for part in [p for p in parts if p[0] & tensors]:
            parts.remove(part)
            tensors, members = tensors | part[0], part[1] + members
        parts.append((tensors, members))
    return [members for _, members in parts]


def _empty(members: Sequence[str], layers: Mapping[str, nn.Module], first: Mapping[str, str]) -> Block | None:
    """The block of these layers before anything was seen; None where their rows are not the same."""
    columns: dict[str, int] = {}
    kinds: dict[str, int] = {}
    rows = set()
    groups = 1
    for name in members:
        layer = layers[name]
        weight, *bias = _names(name, layer, first)
        assert isinstance(layer.weight, Tensor)
        shape = layer.weight.shape
        g = int(layer.groups) if isinstance(layer, _ConvNd) else 1
        if isinstance(layer, _ConvTransposeNd):
            kind, height, width = g, shape[1] * g, shape[0] // g * prod(shape[2:])
        else:
            kind, height, width = 0, shape[0], prod(shape[1:])
        if kinds.setdefault(weight, kind) != kind:
            return None  # one use's rows are another's columns
        columns[weight] = width
        columns.update(dict.fromkeys(bias, 1))
        rows.add(height)
        groups = lcm(groups, g)
    if len(rows) != 1:
        return None
    d = sum(columns.values())
    gram = torch.zeros(groups, d, d, dtype=torch.float64)
    return Block(columns, groups, {name: g for name, g in kinds.items() if g}, gram)


def _inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What each output of the layer is a linear map of, float64 ``(n, groups, d)``."""
    if not isinstance(layer, _ConvNd):
        x = args[0] if args else kwargs["input"]
        rows: Tensor = x.reshape(-1, 1, x.shape[-1])
        return rows.double()
    # The layer itself, with one output for each weight of an output, shows its patches: padded, dilated and strided.
    weight, g = layer.weight, layer.groups
    if isinstance(layer, _ConvTransposeNd):
        inside, kernel = weight.shape[0] // g, weight.shape[2:]
    else:
        inside, kernel = weight.shape[1], weight.shape[2:]
    d = inside * prod(kernel)
    eye = torch.eye(d, dtype=weight.dtype, device=weight.device).reshape(d, inside, *kernel)
    if isinstance(layer, _ConvTransposeNd):
        eye = eye.transpose(0, 1)
    probe = copy.copy(layer)
    probe._parameters = {"weight": nn.Parameter(eye.repeat(g, *(1,) * (eye.dim() - 1)), False), "bias": None}
    base = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
    out: Tensor = base.forward(probe, *args, **kwargs)  # type: ignore[arg-type]
    return out.movedim(-len(kernel) - 1, -1).reshape(-1, g, d).double()


def _starts(sizes: Iterable[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
