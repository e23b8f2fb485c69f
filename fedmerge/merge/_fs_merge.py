"""FS-Merge (Kinderman et al., "Foldable SuperNets: Scalable Merging of Transformers with Different Initializations and
Tasks", TMLR 2025, arXiv:2410.01483)."""  # noqa: D205, D209

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_weights
from fedmerge._forward import need_images
from fedmerge._loading import check_names, load
from fedmerge._loss import divergence
from fedmerge._ties import first_names
from fedmerge.align.maps import mix
from fedmerge.data import Images
from fedmerge.errors import SpecError
from fedmerge.merge._distillation import ROUND_OFF, target_of
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import Axis
from fedmerge.types import Params

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Read = tuple[tuple[Axis, ...], Tensor]


@checked
def fs_merge(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    target: Tensor | None = None,
    max_steps: int = 100,
    lr: float = 1e-3,
    batch_size: int = 100,
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Fold all models into one by matrices that are learned to rebuild the models' features from the merged ones.

    Every group of units has for each model i a matrix :math:`M_i` that makes merged units of the model's, and one,
    :math:`U_i`, that makes the model's of merged ones. A layer with weight W and bias b becomes

    .. math:: W = \sum_i M_i W_i U_i, \qquad b = \sum_i M_i b_i,

    with M of the units it makes and U of those it reads; a layer that makes the answer has the model's weight
    :math:`w_i` for :math:`M_i`. The matrices begin at the plain merge, :math:`M_i = w_i P_i, U_i = P_i^\top` with the
    permutations P of ``order``. Then Adam lowers, over batches of images x of ``data``,

    .. math:: L = \sum_\ell \sum_i w_i \,
              \frac{\mathbb E_x \| U_i z_\ell(x) - z_{\ell i}(x) \|^2}{\mathbb E_x \| z_{\ell i}(x) \|^2}
              + \mathbb E_x \, \mathrm{KL}\big( q(x) \,\big\|\, p(x) \big),

    where :math:`z_\ell` and :math:`z_{\ell i}` are what layer l reads in the merged network and in model i, p is what
    the merged network says and q what the ensemble does. No label is read.

    After every pass over ``data`` L is measured on all of it, and the matrices of the lowest L are taken; where none is
    lower than that of the plain merge, the result is the plain merge.

    Where this is not the paper: its models have tasks and heads of their own, and what is rebuilt are the features
    before the heads. Here all answer one question, so the features of every layer count, and the answers. Its matrices
    for wide networks are of low rank; here they are whole.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignment, and of the order of the images.
        order: The merger that makes the start; ``"average"`` leaves the models as they are.
        model: The network: its parameters are those of linear layers and convolutions (without groups), and it has no
            buffers.
        data: Public images.
        target: q, float ``(N, classes)``; the mean of the models' predictions, all counting alike, if None.
        max_steps: Steps of Adam.
        lr: Its learning rate.
        batch_size: Images of a step.
        device: Where to compute.
        options: Further options of the alignment.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        SpecError: The network has parameters or buffers of other layers.
        DataError: There are no images, or the network does not take them.
        ConfigError: A number out of its range.

    Cost: a step runs all models on a batch and multiplies each weight by the matrices of its groups, O(n^2 m) a weight
    of n units on m inputs. Memory: two matrices a group and model.
    """
    model, data = need_images("fs-merge", model, data, reads="answers")
    check_number("lr of fs-merge", lr, 0)
    rng = rng if rng is not None else np.random.default_rng(0)
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    taught = target_of(model, models, data, target, device)
    net = _SuperNet(model, models, start, check_weights(weights, len(models)).tolist(), spec, device)
    if not net.make:  # no units that could be folded
        return start
    optimizer = torch.optim.Adam([*net.make.values(), *net.read.values()], lr)
    rows = torch.arange(len(data))
    batches = math.ceil(len(data) / batch_size)
    order_of = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def whole() -> float:
        with torch.no_grad():
            return sum(
                float(net.loss(data, part, taught)) * len(part) / len(data) for part in rows.tensor_split(batches)
            )

    lowest, best = whole() if max_steps else 0.0, None
    for step in steps("learning to fold", range(max_steps)):
        if step % batches == 0:
            drawn = torch.randperm(len(data), generator=order_of).tensor_split(batches)
        loss = net.loss(data, drawn[step % batches], taught)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % batches == 0 or step + 1 == max_steps:
            if (found := whole()) < lowest - ROUND_OFF:
                lowest, best = found, {k: v.detach().cpu() for k, v in net.params().items()}
            elif not math.isfinite(found):
                break
    if best is None:
        return start
    folded = {name: best[first].to(start.params[name]) for name, first in net.first.items()}
    return replace(start, params={**start.params, **folded})


class _SuperNet:
    """All models as one network, folded by matrices.

    Attributes:
        make: Group -> M, ``(models, n, n)``.
        read: Group -> U, ``(models, n, n)``.
        first: Name of a parameter -> the first name of that tensor.
    """

    def __init__(
        self, model: nn.Module, models: Sequence[Params], start: Merge, shares: list[float], spec: PermSpec, device: str
    ) -> None:
        check_names(model, start.params)
        self.spec, self.shares = spec, shares
        self.network = load(model, start.params, device)
        self.layers = foldable(self.network)
        self.first = first_names(model)
        kinds = {name: p.dtype for name, p in self.network.named_parameters()}
        self.each = [
            {name: params[name].to(device, kinds[name]) for name in dict.fromkeys(self.first.values())}
            for params in models
        ]
        self.make, self.read = {}, {}
        for group, n in spec.sizes(start.params).items():
            perms = torch.stack([torch.eye(n)[own[group]] for own in start.perms]).to(device)
            self.make[group] = (torch.tensor(shares).to(perms)[:, None, None] * perms).requires_grad_()
            self.read[group] = perms.transpose(1, 2).clone().requires_grad_()

    def params(self) -> dict[str, Tensor]:
        """First name -> tensor of the folded network."""
        return {name: sum(self._folded(name, i) for i in range(len(self.each))) for name in self.each[0]}  # type: ignore[misc]

    def _folded(self, name: str, i: int) -> Tensor:
        """What model i adds to a tensor."""
        axes, tensor = self.spec.axes[name], self.each[i][name]
        made = tuple(axis if self.spec.makes(name, a) else () for a, axis in enumerate(axes))
        reads = tuple(() if self.spec.makes(name, a) else axis for a, axis in enumerate(axes))
        if any(factor.group is not None for axis in made for segment in axis for factor in segment):
            tensor = mix(tensor, made, {group: m[i] for group, m in self.make.items()})
        else:
            tensor = self.shares[i] * tensor
        return mix(tensor, reads, {group: u[i].T for group, u in self.read.items()})

    def loss(self, data: Images, rows: Tensor, target: Tensor) -> Tensor:
        """L on those rows of ``data``."""
        images = data.images[rows].to(next(iter(self.each[0].values())).device)
        answers, merged = self._run(self.params(), data, images)
        total = divergence(answers, target[rows].to(answers))
        for i, (share, params) in enumerate(zip(self.shares, self.each, strict=True)):
            with torch.no_grad():
                _, own = self._run(params, data, images)
            maps = {group: u[i] for group, u in self.read.items()}
            for (axes, z), (_, z_i) in zip(merged, own, strict=True):
                apart = (mix(z, axes, maps) - z_i).square().mean() / z_i.square().mean().clamp_min(1e-12)
                total = total + share * apart
        return total

    def _run(self, params: Mapping[str, Tensor], data: Images, images: Tensor) -> tuple[Tensor, list[_Read]]:
        """The answers, and what each layer reads that reads units, with its axes."""
        seen: list[_Read] = []

        def watch(axis: Axis, where: int) -> Any:
            def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                dim = where % given[0].dim()
                seen.append((tuple(axis if d == dim else () for d in range(given[0].dim())), given[0]))

            return hook

        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                axis = self.spec.axes[f"{name}.weight"][1]
                if any(factor.group is not None for segment in axis for factor in segment):
                    where = -1 if isinstance(layer, nn.Linear) else 1
                    hooks.enter_context(layer.register_forward_pre_hook(watch(axis, where)))
            every = {name: params[first] for name, first in self.first.items()}
            answers = functional_call(self.network, every, (data.normalise(images),), tie_weights=False)
        return answers, seen


def foldable(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of a network whose parameters and buffers are all those of layers that can be folded.

    Raises:
        SpecError: A parameter or buffer is of something else.
    """
    layers: dict[str, nn.Module] = {
        name: m for name, m in network.named_modules() if isinstance(m, _LAYERS) and getattr(m, "groups", 1) == 1
    }
    known = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    tensors = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    if other := next((name for name in tensors if name not in known), None):
        raise SpecError(
            f"fs-merge folds linear layers and convolutions without groups, and {other!r} of {type(network).__name__} "
            "belongs to another layer; take another merger, such as 'merge-many'"
        )
    return layers
