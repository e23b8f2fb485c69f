"""Carrying a network onto other units by transport plans (Singh, Jaggi, arXiv:1910.05653, Alg. 1)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.align.maps import mix
from fedmerge.errors import UnknownNameError
from fedmerge.spec import PermSpec
from fedmerge.types import Params

CORRECTIONS = ("function", "paper", "none")

Plans = Mapping[str, Tensor]
"""Group -> transport plan, float64 ``(n_reference, n_model)``: mass that unit j of the model sends to unit i."""


@dataclass(frozen=True)
class Carrying:
    r"""What a plan T with marginals :math:`\mu = T 1`, :math:`\nu = T^\top 1` makes of a network's units.

    Attributes:
        correction: By which matrices the axes are carried that make the units of a group, and those that read them:

            * ``"function"``: :math:`\mathrm{diag}(1/\mu)\, T`, the mean of the units that come together, and
              :math:`T\, \mathrm{diag}(1/\nu)`, which deals each unit's outgoing weight out whole;
            * ``"paper"``: the first matrix for both;
            * ``"none"``: :math:`n T` for both, with n the number of the reference's units.
        past_correction: Whether a weight that makes units is carried where it reads others, too.

    Raises:
        UnknownNameError: No such correction.
    """

    correction: str = "function"
    past_correction: bool = True

    def __post_init__(self) -> None:
        if self.correction not in CORRECTIONS:
            raise UnknownNameError("correction of OT fusion", self.correction, CORRECTIONS)

    def matrices(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices for axes that make units, and for those that read them. Units without mass become 0."""
        if self.correction == "none":
            return plan * len(plan), plan * len(plan)
        make = _quotient(plan, plan.sum(1, keepdim=True))
        return make, _quotient(plan, plan.sum(0, keepdim=True)) if self.correction == "function" else make

    def tensor(self, tensor: Tensor, name: str, plans: Plans, spec: PermSpec, sizes: Mapping[str, int]) -> Tensor:
        """A tensor of the network in float64, carried where ``plans`` say; ``sizes`` are its numbers of units."""
        makes = any(spec.makes(name, a) and axis for a, axis in enumerate(spec.axes[name]))
        if makes and not self.past_correction:
            return self._on(tensor, name, plans, spec, sizes, makes=True)
        return self.inputs(tensor, name, plans, spec, sizes)

    def inputs(self, tensor: Tensor, name: str, plans: Plans, spec: PermSpec, sizes: Mapping[str, int]) -> Tensor:
        """The same whatever ``past_correction`` says: what units are compared by."""
        values = self._on(tensor, name, plans, spec, sizes, makes=True)
        sizes = {**sizes, **{group: len(plan) for group, plan in plans.items()}}
        return self._on(values, name, plans, spec, sizes, makes=False)

    def _on(
        self, tensor: Tensor, name: str, plans: Plans, spec: PermSpec, sizes: Mapping[str, int], *, makes: bool
    ) -> Tensor:
        """``tensor`` carried on the axes that make units, or on those that read them."""
        axes = tuple(axis if spec.makes(name, a) == makes else () for a, axis in enumerate(spec.axes[name]))
        groups = {f.group for axis in axes for segment in axis for f in segment if f.group is not None}
        maps = {g: self.matrices(plans[g].to(tensor.device))[0 if makes else 1] for g in groups if g in plans}
        return mix(tensor.detach().double(), axes, maps, sizes)


def carry(params: Params, plans: Plans, *, spec: PermSpec, carrying: Carrying | None = None) -> dict[str, Tensor]:
    """A copy of ``params`` whose units are those that ``plans`` sends them to; see :func:`fedmerge.merge.ot_fusion`.

    Integers (``num_batches_tracked``) stay. Cost: a product of each tensor with the plan of each of its groups.
    """
    sizes, carrying = spec.sizes(params), carrying or Carrying()
    return {
        name: carrying.tensor(tensor, name, plans, spec, sizes).to(tensor.dtype)
        if tensor.is_floating_point() and any(spec.axes.get(name, ()))
        else tensor.clone()
        for name, tensor in params.items()
    }


def _quotient(plan: Tensor, marginal: Tensor) -> Tensor:
    return plan / torch.where(marginal > 0, marginal, 1.0)
