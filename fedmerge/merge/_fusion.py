"""OT fusion (Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653, Alg. 1)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._check import check_weights
from fedmerge.align._finish import load, need_images
from fedmerge.align._maps import mix
from fedmerge.align._transport import Transport, activation_distances, check_ground
from fedmerge.data import Images
from fedmerge.errors import ParamsError, SpecError, UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge
from fedmerge.spec import PermSpec, permute
from fedmerge.spec._spec import Axis, Occurrence, Params

_CORRECTIONS = ("function", "paper", "none")
_TINY = 1e-12
_REVERSED = "conv_transpose"
"""Operator whose weight makes its units on axis 1."""

Plans = dict[str, Tensor]
"""Group -> transport plan, float64 ``(n_reference, n_model)``: mass that unit j of the model sends to unit i."""


def ot_fusion(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    reference: int = 0,
    ground: str = "weights",
    model: nn.Module | Sequence[nn.Module] | None = None,
    data: Images | None = None,
    solver: str = "exact",
    regularisation: float = 0.01,
    marginal_relaxation: float = 1.0,
    mass: str = "uniform",
    metric: str = "euclidean",
    normalise: bool = False,
    squared: bool = False,
    centre: bool = False,
    cost_scale: str = "max",
    clip: tuple[float, float] | None = None,
    correction: str = "function",
    past_correction: bool = True,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
    **_: Any,
) -> Merge:
    r"""Carry the units of all models onto those of one of them, which may be wider or narrower, and average.

    Group by group in graph order, with :math:`D_{ij}` the distance between the supports of unit i of the reference
    and unit j of a model, solves

    .. math:: \min_{T \ge 0} \langle D, T \rangle \quad \text{s.t.} \quad T 1 = \mu,\; T^\top 1 = \nu .

    The support of a unit is, by ``ground``,

    * ``"weights"``: its incoming weights, bias included, the model's inputs already carried over;
    * ``"activations"``: its responses to ``data`` before the activation function, which need no carrying.

    A unit of the result is the mean of the units that T sends to it, :math:`\mathrm{diag}(1/\mu)\, T`. The layer
    that reads these units is carried by :math:`T\, \mathrm{diag}(1/\nu)` (``correction="function"``): each unit's
    outgoing weight is dealt out whole, so a network whose units were split in two computes the same after they are
    brought together again. The published algorithm uses the first matrix on both sides (``"paper"``), which is the
    same for equal widths, and changes the scale of every layer for others; ``"none"`` leaves T as it is, times the
    number of the reference's units.

    Equal widths, uniform mass and the exact solver make every plan a permutation (Birkhoff), found by the
    assignment solver and returned as ``perms``. Otherwise ``maps`` holds the plans and ``perms`` is empty.

    Args:
        models: State dicts of one architecture; the numbers of units may differ between them.
        spec: The symmetries, from :func:`fedmerge.perm_spec` of the architecture at any width.
        weights: One non-negative number a model; equal if None.
        rng: Not used; the method draws nothing.
        reference: Position of the model whose units, and width, the result has.
        ground: See above.
        model: The architecture, run in eval mode; not modified. Only for activations. Where widths differ, a sequence
            of one network a state dict.
        data: Images of the public split, never of a client's partition; labels are not used. Only for activations.
        solver: ``"exact"``, ``"sinkhorn"`` (entropy-regularised) or ``"unbalanced"`` (marginals penalised by their
            Kullback-Leibler divergence); this and all down to ``clip`` are described in
            :class:`fedmerge.align._transport.Transport`.
        regularisation: Of the entropy, in units of the scaled cost; not used by ``"exact"``.
        marginal_relaxation: Weight of the marginals in ``"unbalanced"``.
        mass: ``"uniform"``, or in proportion to the norm of a unit's incoming weights: ``"norm"`` or ``"norm-l1"``.
        metric: ``"euclidean"`` or ``"cosine"``.
        normalise: Divide each support by its norm, so that the distance is of direction.
        squared: Take the squared distance.
        centre: Subtract from the activations of a unit their mean.
        cost_scale: ``"max"``, ``"mean"``, ``"median"``, ``"log"`` or ``"none"``.
        clip: Bounds of the scaled cost, in units of ``regularisation``.
        correction: ``"function"``, ``"paper"`` or ``"none"``, above.
        past_correction: Compare incoming weights after the layers before were carried over; if false, as they are,
            which needs equal widths. Activations are compared as they are.
        batch_size: Images a batch.
        device: Where the forward passes run.
        progress: Called with a line of text after each model.

    Raises:
        ParamsError: Models that are not one architecture, weights or reference that do not fit, activations without
            ``model`` or ``data`` or with networks that do not fit the models, or activations that are not finite.
        DataError: There are no images.
        SpecError: Soft plans for a network with transposed convolutions, or with units that only an embedding makes.
            An embedding that adds to a stream which others feed is carried as if it read the stream: its scale is
            kept only for equal widths.
        UnknownNameError: No such ground, solver, mass, metric, scale or correction.
        ConfigError: A regularisation, relaxation or clip out of range.

    Cost: per model and group of n units of d incoming weights O(n^2 d), and O(n^3) for the exact plan.
    """
    check_ground(ground)
    transport = Transport(
        solver, regularisation, marginal_relaxation, mass, metric, normalise, squared, centre, cost_scale, clip
    )
    if correction not in _CORRECTIONS:
        raise UnknownNameError("correction of OT fusion", correction, _CORRECTIONS)
    check_architecture(models, spec)
    shares = check_weights(weights, len(models)).tolist()
    reference = range(len(models))[reference]
    to = models[reference]
    sizes = [spec.sizes(m) for m in models]
    hard = solver == "exact" and mass == "uniform" and all(s == sizes[0] for s in sizes)
    if not hard:
        for group in spec.groups:
            odd = [o for o in spec.operators.get(group, ()) if _REVERSED in o]
            if odd:
                raise SpecError(
                    f"group {group!r} passes through {odd[0]}, which OT fusion cannot carry by a soft plan; give "
                    "models of one width with solver='exact' and mass='uniform', or use 'merge-many'"
                )
    run = _networks(model, data, sizes, reference) if ground == "activations" else None
    order = _order(spec)
    plans: list[Plans] = []
    carried: list[dict[str, Tensor]] = []
    for i, params in enumerate(models):
        found: Plans = {g: torch.eye(n, dtype=torch.float64) / n for g, n in sizes[i].items()}
        if i != reference:
            seen: dict[str, Tensor] = {}
            if run is not None:
                networks, images = run
                pair = load(networks[reference], to, device), load(networks[i], params, device)
                seen = activation_distances(
                    pair, transport, spec, (sizes[reference], sizes[i]), images, batch_size=batch_size, device=device
                )
            found = {}
            for group, places in order:
                a = _support(to, group, places, spec, sizes[reference], {})
                b = _support(params, group, places, spec, sizes[i], found if past_correction and not seen else {})
                distances = seen[group] if seen else _distances(transport, a, b, group)
                found[group] = transport.plan(distances, transport.masses(a), transport.masses(b))
        plans.append(found)
        if progress is not None:
            progress(f"model {i} carried onto model {reference}")
        carried.append(dict(to) if i == reference else carry(params, found, spec=spec, correction=correction))
    merged = average(carried, shares)
    value = sum(float(merged[name].double().square().sum()) for name in sorted(spec.parameters))
    perms = tuple({g: plan.argmax(1) for g, plan in p.items()} for p in plans) if hard else ()
    if hard:  # reordered, not multiplied, so that nothing is rounded
        merged = average([permute(m, p, spec=spec) for m, p in zip(models, perms, strict=True)], shares)
    return Merge(merged, perms, value, (value,), 1, True, () if hard else tuple(plans))


def carry(
    params: Params, plans: Mapping[str, Tensor], *, spec: PermSpec, correction: str = "function"
) -> dict[str, Tensor]:
    """A copy of ``params`` whose units are those that ``plans`` sends them to; see :func:`ot_fusion`.

    Integers (``num_batches_tracked``) stay. Cost: a product of each tensor with the plan of each of its groups.
    """
    make, read = {}, {}
    for group, plan in plans.items():
        rows, columns = plan.sum(1, keepdim=True).clamp_min(_TINY), plan.sum(0, keepdim=True).clamp_min(_TINY)
        make[group] = plan * len(plan) if correction == "none" else plan / rows
        read[group] = plan / columns if correction == "function" else make[group]
    moved = {}
    for name, tensor in params.items():
        axes = spec.axes.get(name, ())
        if not tensor.is_floating_point() or not any(axes):
            moved[name] = tensor.clone()
            continue
        values = mix(tensor.double(), (axes[0], *((),) * (len(axes) - 1)), _on(make, tensor))
        values = mix(values, ((), *axes[1:]), _on(read, tensor))
        moved[name] = values.to(tensor.dtype)
    return moved


def check_architecture(models: Sequence[Params], spec: PermSpec) -> None:
    """Refuse models that are not the spec's architecture at some width.

    Raises:
        ParamsError: Names the model, the tensor, what was given and what was expected.
    """
    if not models:
        raise ParamsError("no model was given; give at least one state dict")
    for i, params in enumerate(models):
        for name in spec.axes:
            if name not in params:
                raise ParamsError(f"model {i} lacks tensor {name!r}; all models must have the same tensors")
            if params[name].dim() != len(spec.axes[name]):
                raise ParamsError(
                    f"tensor {name!r} of model {i} has shape {tuple(params[name].shape)}, expected "
                    f"{len(spec.axes[name])} dimensions; give models of one architecture"
                )
        for name in params:
            if name not in spec.axes:
                raise ParamsError(f"model {i} has an extra tensor {name!r}; all models must have the same tensors")
        try:
            sizes = spec.sizes(params)
        except ParamsError as error:
            raise ParamsError(f"model {i}: {error}; give models of one architecture") from error
        for name, axes in spec.axes.items():
            tensor = params[name]
            expected = tuple(
                _length(axis, sizes) if axis else n for axis, n in zip(axes, spec.shapes[name], strict=True)
            )
            if tuple(tensor.shape) != expected:
                raise ParamsError(
                    f"tensor {name!r} of model {i} has shape {tuple(tensor.shape)}, expected {expected}; "
                    "only hidden widths may differ between the models"
                )
            if name in spec.parameters and not tensor.is_floating_point():
                raise ParamsError(f"parameter {name!r} of model {i} is {tensor.dtype}; convert it to a float dtype")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ParamsError(
                    f"tensor {name!r} of model {i} holds {count} values that are NaN or infinite; leave that model out"
                )


def _length(axis: Axis, sizes: Mapping[str, int]) -> int:
    return sum(math.prod(f.size if f.group is None else sizes[f.group] for f in segment) for segment in axis)


def _on(maps: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    return {group: matrix.to(like.device) for group, matrix in maps.items()}


def _order(spec: PermSpec) -> list[tuple[str, list[Occurrence]]]:
    """The groups in graph order, each with the places on axis 0 whose other groups come before it."""
    groups_of = {
        name: {f.group for axis in axes for segment in axis for f in segment if f.group is not None}
        for name, axes in spec.axes.items()
    }
    order: list[tuple[str, list[Occurrence]]] = []
    settled: set[str] = set()
    waiting = list(spec.groups)
    while waiting:
        known = {
            g: [
                o for o in spec.occurrences(g)
                if o.axis == 0 and o.name in spec.parameters and groups_of[o.name] <= settled | {g}
                and sum(p.name == o.name for p in spec.occurrences(g)) == 1
            ]
            for g in waiting
        }  # fmt: skip
        group = next((g for g in waiting if known[g]), waiting[0])
        order.append((group, known[group]))
        settled.add(group)
        waiting.remove(group)
    return order


def _networks(
    model: nn.Module | Sequence[nn.Module] | None, data: Images | None, sizes: Sequence[object], reference: int
) -> tuple[list[nn.Module], Images]:
    """A network for each state dict, and the images.

    Raises:
        ParamsError: ``model`` or ``data`` is missing, or the networks are not one a state dict where they must be.
    """
    several = [] if model is None or isinstance(model, nn.Module) else list(model)
    one = model if isinstance(model, nn.Module) else next(iter(several), None)
    one, data = need_images("ot-fusion-activations", one, data)
    for i, n in enumerate(sizes):
        if not several and n != sizes[reference]:
            raise ParamsError(
                f"model {i} and model {reference} have different widths, so that no one network runs both; pass "
                "model= as a sequence of one network a state dict"
            )
    if several and len(several) != len(sizes):
        raise ParamsError(f"model= holds {len(several)} networks for {len(sizes)} models; give one network a model")
    return several or [one] * len(sizes), data


def _support(
    params: Params,
    group: str,
    places: Sequence[Occurrence],
    spec: PermSpec,
    sizes: Mapping[str, int],
    before: Plans,
) -> Tensor:
    """Incoming weights of each unit, float64 ``(n, d)``; inputs carried over by the plans ``before``."""
    read = {g: plan / plan.sum(0, keepdim=True).clamp_min(_TINY) for g, plan in before.items()}
    columns = []
    for place in places:
        axes = spec.axes[place.name]
        tensor = params[place.name].detach().double()
        if read:
            tensor = mix(tensor, ((), *axes[1:]), _on(read, tensor))
        axis = axes[0]
        offset = _length(axis[: place.segment], sizes)
        segment = axis[place.segment]
        tensor = tensor.narrow(0, offset, _length((segment,), sizes))
        factors = [f.size if f.group is None else sizes[f.group] for f in segment]
        tensor = tensor.reshape(*factors, *tensor.shape[1:])
        columns.append(tensor.movedim(place.factor, 0).reshape(factors[place.factor], -1))
    return torch.cat(columns, 1) if columns else torch.zeros(sizes[group], 0, dtype=torch.float64)


def _distances(transport: Transport, a: Tensor, b: Tensor, group: str) -> Tensor:
    """Costs between incoming weights."""
    if not a.shape[1]:
        raise SpecError(f"no weight makes the units of group {group!r} on axis 0; OT fusion of weights needs one")
    if a.shape[1] != b.shape[1]:
        raise ParamsError(
            f"the units of group {group!r} have {b.shape[1]} incoming weights in one model and {a.shape[1]} in the "
            "reference; widths that differ need past_correction=True"
        )
    return transport.distances(a, b)
