"""Permutation symmetries of a network: which axes of which tensors move together, and how to move them."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedmerge._arguments import checked, shown
from fedmerge._loading import with_versions
from fedmerge.errors import ParamsError, SpecError, UnknownNameError
from fedmerge.types import Params, Perms


class Factor(NamedTuple):
    """``size`` positions that move with ``group`` (or stay, when ``group`` is None)."""

    group: str | None
    size: int


Segment = tuple[Factor, ...]
"""A mixed-radix product of factors, slowest first: flattening (C, H*W) gives ``((g, C), (None, H*W))``."""

Axis = tuple[Segment, ...]
"""Segments laid end to end, as concatenation does. The empty tuple is an axis that never moves."""


class Frozen(NamedTuple):
    """Axis ``axis`` of tensor ``name`` stays where it is, and why."""

    name: str
    axis: int
    reason: str


class Occurrence(NamedTuple):
    """One place at which a group indexes a tensor: a factor of a segment of an axis."""

    name: str
    axis: int
    segment: int
    factor: int


@dataclass(frozen=True)
class PermSpec:
    """The permutation symmetries of one architecture, traced by :func:`fedmerge.perm_spec`.

    ``print(spec)`` shows them as a table, :meth:`draw` as a picture.

    A *group* is a set of axes that must be permuted together for the network to compute the same
    function; a *unit* is one position of it (a neuron or a channel).

    Attributes:
        axes: State-dict name -> one :data:`Axis` per dimension of that tensor.
        shapes: State-dict name -> shape of the traced network.
        parameters: Names that vote in an alignment; the other names are buffers, which only move.
        frozen: Axes that hold units but cannot be permuted, each with its reason.
        operators: Group -> the operators that tie it, in graph order.
        reads: Name -> the axes that read units, for an operator sums over them; of names that are left out, all but
            the first.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec = fm.perm_spec(model, torch.zeros(1, 4))
        >>> round(10 ** spec.log10_symmetries())  # the orders in which 8 units may stand: 8!
        40320
    """

    axes: Mapping[str, tuple[Axis, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    frozen: tuple[Frozen, ...] = ()
    operators: Mapping[str, tuple[str, ...]] = None  # type: ignore[assignment]
    reads: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.operators is None:
            object.__setattr__(self, "operators", {})
        sizes: dict[str, int] = {}
        occurrences: dict[str, list[Occurrence]] = {}
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                for s, segment in enumerate(axis):
                    for f, factor in enumerate(segment):
                        if factor.group is None:
                            continue
                        if sizes.setdefault(factor.group, factor.size) != factor.size:
                            raise SpecError(
                                f"group {factor.group!r} has {sizes[factor.group]} units, but axis {a} of "
                                f"{name!r} gives it {factor.size}; write one size for all axes of a group"
                            )
                        occurrences.setdefault(factor.group, []).append(Occurrence(name, a, s, f))
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_occurrences", {g: tuple(o) for g, o in occurrences.items()})

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in the order in which the tensors first mention them."""
        return tuple(self._sizes)  # type: ignore[attr-defined]

    def occurrences(self, group: str) -> tuple[Occurrence, ...]:
        """Every place at which ``group`` indexes a tensor; :class:`UnknownNameError` if there is no such group."""
        try:
            return self._occurrences[group]  # type: ignore[attr-defined,no-any-return]
        except (KeyError, TypeError):
            raise UnknownNameError("group", shown(group), self.groups) from None

    @checked
    def makes(self, name: str, axis: int) -> bool:
        """Whether the tensor makes the units on this axis, as the rows of a linear map do, and does not read them."""
        return axis not in self.reads[name] if name in self.reads else axis == 0

    @checked
    def sizes(self, params: Params | None = None) -> dict[str, int]:
        """Group -> number of units, in ``params`` if given (widths may differ from the traced network's).

        Raises:
            ParamsError: ``params`` does not fit this spec.
        """
        traced: dict[str, int] = dict(self._sizes)  # type: ignore[attr-defined]
        if params is None:
            return traced
        found: dict[str, int] = {}
        for name, axes in self.axes.items():
            if name not in params:
                raise ParamsError(f"tensor {name!r} is missing; the spec has {len(self.axes)} tensors")
            shape = getattr(params[name], "shape", None)
            if shape is None or len(shape) != len(axes):
                given = type(params[name]).__name__ if shape is None else f"tensor of shape {tuple(shape)}"
                raise ParamsError(f"{name!r} is a {given}; expected a tensor of {len(axes)} dimensions")
            for a, axis in enumerate(axes):
                groups = [f.group for segment in axis for f in segment if f.group is not None]
                if len(axis) != 1 or len(groups) != 1:
                    continue
                rest = math.prod(f.size for f in axis[0] if f.group is None)
                n, odd = divmod(params[name].shape[a], rest)
                if odd or found.setdefault(groups[0], n) != n:
                    raise ParamsError(
                        f"axis {a} of {name!r} has length {params[name].shape[a]}, expected "
                        f"{found.get(groups[0], n) * rest} for group {groups[0]!r}"
                    )
        return {g: found.get(g, n) for g, n in traced.items()}

    @checked
    def identity(self, params: Params | None = None) -> dict[str, Tensor]:
        """Group -> ``arange(n)``: the permutation that moves nothing."""
        return {g: torch.arange(n) for g, n in self.sizes(params).items()}

    @checked
    def random(self, generator: torch.Generator, params: Params | None = None) -> dict[str, Tensor]:
        """Group -> a uniformly random permutation drawn from ``generator``."""
        return {g: torch.randperm(n, generator=generator) for g, n in self.sizes(params).items()}

    def log10_symmetries(self) -> float:
        r"""log10 of the number of permutations of units that keep the function.

        .. math:: \log_{10} \prod_g n_g! = \sum_g \log_{10} n_g!

        over the groups g of :math:`n_g` units: one symmetric group for each set of axes that must move
        together, so a residual stream counts once, however many layers write to it. Permutations that move
        axes of different groups into each other (swapped twin branches, say), signs and scales are not counted.

        Table 1 of Ainsworth et al., "Git Re-Basin" (ICLR 2023, arXiv:2209.04836) counts layers instead: the sum of
        log10(n!), rounded down for every layer, over all hidden layers but the projections of shortcuts. That is
        3498 for their perceptron and 35160 for VGG16, where layers are groups (here 3499.6 and 35168.5), and 55109
        for ResNet50, where they are not: it lets the 16 layers that write to the four residual streams permute
        each on its own, which changes the function. With one permutation a stream ResNet50 has 25638.3.
        """
        return sum(math.lgamma(n + 1) for n in self.sizes().values()) / math.log(10)

    def permutable_share(self) -> float:
        """Share of the parameters (by count) that lie on at least one permutable axis."""
        counts = {name: math.prod(self.shapes[name]) for name in self.parameters}
        moved = sum(n for name, n in counts.items() if any(self.axes[name]))
        return moved / max(1, sum(counts.values()))

    @checked
    def draw(self, path: Path | str, *, title: str = "") -> None:
        """Draw the groups as lanes and every weight as an arrow from the lane that it reads to the one that it writes.

        A residual stream is a long lane with many arrows; what stays is grey. ``print(spec)`` is the same as text.

        Args:
            path: A ``.png``, ``.svg`` or ``.pdf`` file; its folder is made, a file there is replaced.
            title: The network's name, before the counts.

        Raises:
            ConfigError: A name that ends in none of these, or a file that cannot be written.
        """
        from fedmerge import pictures  # matplotlib, which nothing else in the library needs
        from fedmerge.spec import _picture

        path = Path(path)
        pictures.check_format(path)
        pictures.save(_picture.picture(self, title), path)

    def __str__(self) -> str:
        from fedmerge.spec._table import table

        return table(self)


def axis_index(axis: Axis, perms: Perms, device: torch.device | str = "cpu") -> Tensor:
    """Positions ``index`` such that ``tensor.index_select(dim, index)`` applies ``perms`` to that axis.

    A segment is a mixed-radix number whose digits are permuted by their groups; segments lie end to end.
    """
    parts, offset = [], 0
    for segment in axis:
        index = torch.zeros(1, dtype=torch.int64)
        for group, size in segment:
            if group is None or group not in perms:
                digit = torch.arange(size)
            else:
                digit, size = perms[group].cpu(), len(perms[group])
            index = (index[:, None] * size + digit[None, :]).reshape(-1)
        parts.append(index + offset)
        offset += len(index)
    return torch.cat(parts).to(device)


def permute(params: Params, perms: Perms, *, spec: PermSpec) -> dict[str, Tensor]:
    """A copy of ``params`` with its units reordered, which computes the same function in eval mode.

    ``perms[g][i] = j`` says that unit i of the result is unit j of the source, for every axis of
    group ``g``, buffers included. Groups that ``perms`` leaves out stay in place. Cost: one copy.

    Args:
        params: State dict of the traced architecture.
        perms: Group -> int64 permutation of shape ``(n,)``.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.

    Raises:
        ParamsError: A permutation of an unknown group, of the wrong length, or that is none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec = fm.perm_spec(model, torch.zeros(1, 4))
        >>> moved = fm.permute(model.state_dict(), {"0": torch.arange(7, -1, -1)}, spec=spec)
        >>> x = torch.randn(3, 4)
        >>> before = model(x)
        >>> _ = model.load_state_dict(moved)
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """
    if not isinstance(params, Mapping) or not isinstance(spec, PermSpec):
        raise ParamsError(
            f"permute was given a {type(params).__name__} and, as spec, a {type(spec).__name__}; expected a state dict "
            "and what perm_spec returns"
        )
    sizes = spec.sizes(params)
    check_perms(perms, sizes)
    moved = {}
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) and name not in spec.axes:  # what a module stores beside its tensors
            moved[name] = copy.deepcopy(tensor)
            continue
        if not isinstance(tensor, Tensor):
            raise ParamsError(f"{name!r} is a {type(tensor).__name__}; expected a tensor")
        axes = spec.axes.get(name, ())
        for a, axis in enumerate(axes):
            expected = sum(math.prod(sizes.get(f.group or "", f.size) for f in segment) for segment in axis)
            if axis and tensor.shape[a] != expected:
                raise ParamsError(f"axis {a} of {name!r} has length {tensor.shape[a]}, expected {expected}")
        own = tensor.detach()
        found = permute_tensor(own, axes, perms)
        moved[name] = own.clone() if found is own else found
    return with_versions(moved, params)


def check_perms(perms: Perms, sizes: Mapping[str, int]) -> None:
    """Refuse what is no permutation of groups of these sizes.

    Raises:
        ParamsError: A permutation of an unknown group, of the wrong length, or that is none.
    """
    if not isinstance(perms, Mapping):
        raise ParamsError(f"perms is a {type(perms).__name__}; expected group -> permutation, as Alignment.perms")
    for group, perm in perms.items():
        if group not in sizes:
            raise ParamsError(f"no group {group!r} in this spec: known are {', '.join(sizes)}")
        if not isinstance(perm, Tensor) or perm.is_floating_point() or perm.is_complex() or perm.dtype == torch.bool:
            given = perm.dtype if isinstance(perm, Tensor) else type(perm).__name__
            raise ParamsError(f"perms[{group!r}] is a {given}; expected an int64 tensor ({sizes[group]},)")
        if not torch.equal(torch.sort(perm.cpu().to(torch.int64).flatten()).values, torch.arange(sizes[group])):
            raise ParamsError(
                f"perms[{group!r}] is not a permutation of 0..{sizes[group] - 1} (shape {tuple(perm.shape)})"
            )
        if perm.dim() != 1:
            raise ParamsError(f"perms[{group!r}] has shape {tuple(perm.shape)}; expected ({sizes[group]},)")


def permute_tensor(tensor: Tensor, axes: tuple[Axis, ...], perms: Perms) -> Tensor:
    """``tensor`` with every axis reordered; itself if nothing moves."""
    for a, axis in enumerate(axes):
        if any(f.group in perms for segment in axis for f in segment):
            tensor = tensor.index_select(a, axis_index(axis, perms, tensor.device))
    return tensor
