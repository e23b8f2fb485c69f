"""OT fusion (Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653, Alg. 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_dicts, check_tensor, check_weights, position
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge.align.transport import Transport, activation_distances, check_ground
from fedmerge.align.turns import Compared, Turn, between, length, supports, turns
from fedmerge.data import Images
from fedmerge.errors import ParamsError, SpecError
from fedmerge.merge._average import average
from fedmerge.merge._carry import Carrying, Plans
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import ordered
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
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
    same where both masses are uniform and widths equal, and changes the scale of every layer where they are not;
    ``"none"`` leaves T as it is, times the number of the reference's units.

    Inputs are carried, for comparing as for merging, by the matrix that the correction gives to those that read.
    Masses are of a model's own weights, before anything is carried. Heads of attention and the units within them
    wait for each other: two heads are as far apart as their units when these are paired up as well as can be.

    The options against the flags of the authors' code (``sidak/otfusion``; its last layer is never transported here):

    =============================================  ===========================================================
    ``correction="paper"``                         ``--correction --proper-marginals``
    ``correction="none"``                          ``--correction`` on weights, with equal widths
    ``correction="function"``                      has none
    ``past_correction``                            ``--past-correction``
    ``mass="norm"``, ``"norm-l1"``                 ``--importance l2``, ``l1``
    ``squared=True`` / ``False``                   the default / ``--not-squared``
    ``normalise``                                  ``--normalize-wts``
    ``metric``, ``cost_scale``                     ``--ground-metric``, ``--ground-metric-normalize``
    ``clip``                                       ``--clip-gm --clip-min --clip-max``
    ``solver="exact"``, else ``regularisation``    ``--exact``, ``--reg``
    ``solver="unbalanced"``                        ``--unbalanced --reg-m``, whose masses are 1 a unit
    ``weights``                                    ``--ensemble-step``
    (the last layer is averaged)                   ``--skip-last-layer``
    =============================================  ===========================================================

    Not offered: Gromov-Wasserstein costs, masses by activations, activations measured again after each layer
    (``--update-acts``), and ``--correction`` alone on activations, which divides by the masses of the wrong side.

    Equal widths, uniform mass and the exact solver make every plan a permutation (Birkhoff), found by the
    assignment solver and returned as ``perms``. Otherwise ``maps`` holds the plans, ``perms`` is empty, and
    ``carrying`` says what became of the plans. Groups that nothing describes keep their order and are ``left``.

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
            :class:`fedmerge.align.transport.Transport`.
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
        past_correction: If false, as in the authors' code without that flag, only the outputs of a layer are carried,
            the last layer excepted: its inputs stay as they are, which needs equal widths and keeps no function.
        batch_size: Images a batch.
        device: Where the forward passes run.

    Raises:
        ParamsError: Models that are not one architecture, weights or reference that do not fit, activations without
            ``model`` or ``data`` or with networks that do not fit the models, or activations that are not finite.
        DataError: There are no images.
        SpecError: Widths that differ in a group that nothing describes, or a network that cannot be traced on the
            images. A weight that makes units in one place and reads them in another, an embedding tied to the last
            layer, is carried as one that reads: the function is kept for equal widths only.
        UnknownNameError: No such ground, solver, mass, metric, scale or correction.
        ConfigError: A regularisation, relaxation or clip out of range.

    Cost: per model and group of n units of d incoming weights O(n^2 d), and O(n^3) for the exact plan.
    """
    check_ground(ground)
    transport = Transport(
        solver, regularisation, marginal_relaxation, mass, metric, normalise, squared, centre, cost_scale, clip
    )
    carrying = Carrying(correction, past_correction)
    check_architecture(models, spec)
    shares = check_weights(weights, len(models)).tolist()
    reference = position(reference, len(models))
    to = models[reference]
    sizes = [spec.sizes(m) for m in models]
    same = all(n == sizes[reference] for n in sizes)
    if not past_correction and not same:
        raise ParamsError(
            "the models have different widths, which need past_correction=True: weights that read units of one width "
            "do not fit those of another"
        )
    hard = solver == "exact" and mass == "uniform" and past_correction and same
    run = _networks(model, data, sizes, reference) if ground == "activations" else None
    order = turns(spec, incoming=True)
    plans: list[dict[str, Tensor]] = []
    left: set[str] = set()
    for i, params in enumerate(steps("carrying models", models)):
        found: dict[str, Tensor] = {}
        seen: Compared | None = None
        if i != reference and run is not None:
            networks, images = run
            pair = load(networks[reference], to, device), load(networks[i], params, device)
            seen = activation_distances(
                pair, transport, spec, (sizes[reference], sizes[i]), images, batch_size=batch_size, device=device
            )
        if i != reference:
            for turn in _in_turn(order, seen):
                of_group = _plan(
                    turn, (to, params), (sizes[reference], sizes[i]), found, spec, transport, carrying, seen
                )
                found = {**found, turn.group: of_group}
        rest = {group: n for group, n in sizes[i].items() if group not in found}
        if i != reference:
            left |= {group for group, n in rest.items() if n > 1}
            odd = next((group for group, n in rest.items() if n != sizes[reference][group]), None)
            if odd is not None:
                raise SpecError(
                    f"nothing shows which units of group {odd!r} of model {i} are those of the reference; "
                    "such a group needs one width"
                )
        plans.append({**found, **{g: torch.eye(n, dtype=torch.float64) / n for g, n in rest.items()}})
    perms = tuple({g: plan.argmax(1) for g, plan in p.items()} for p in plans) if hard else ()
    merge = Merge(
        {}, perms, 0.0, (), 1, True, () if hard else tuple(plans), left=tuple(g for g in spec.groups if g in left),
        carrying=carrying,
    )  # fmt: skip
    merged = average(ordered(models, merge, spec=spec), shares)
    value = sum(float(merged[name].double().square().sum()) for name in sorted(spec.parameters))
    return replace(merge, params=merged, objective=value, history=(value,))


def check_architecture(models: Sequence[Params], spec: PermSpec) -> None:
    """Refuse models that are not the spec's architecture at some width.

    Raises:
        ParamsError: Names the model, the tensor, what was given and what was expected.
    """
    check_dicts(models)
    for i, params in enumerate(models):
        for name in spec.axes:
            if name not in params:
                raise ParamsError(f"model {i} lacks tensor {name!r}; all models must have the same tensors")
            check_tensor(params[name], f"{name!r} of model {i}")
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
                length(axis, sizes) if axis else n for axis, n in zip(axes, spec.shapes[name], strict=True)
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


def _in_turn(order: Sequence[Turn], seen: Compared | None) -> list[Turn]:
    """The turns of the groups that can be compared: by weights if nothing was ``seen``."""
    if seen is None:
        return [turn for turn in order if turn.places]
    at = {turn.group: turn for turn in order}
    return [at[group] for group in seen.order([turn.group for turn in order])]


def _plan(
    turn: Turn,
    models: tuple[Params, Params],
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    before: Plans,
    spec: PermSpec,
    transport: Transport,
    carrying: Carrying,
    seen: Compared | None,
) -> Tensor:
    """The plan of a group, its inputs carried by the plans ``before`` as the result will be.

    Units weigh by their own weights, before anything is carried, as in the paper's code.
    """
    to, own = (
        supports([params[o.name].detach().double() for o in turn.places], turn, spec, n)
        for params, n in zip(models, sizes, strict=True)
    )
    if seen is not None:
        costs = seen.of(turn.group, before)
    else:
        tensors = [carrying.inputs(models[1][o.name], o.name, before, spec, sizes[1]) for o in turn.places]
        carried = supports(tensors, turn, spec, {**sizes[1], **{group: sizes[0][group] for group in before}})
        costs = between(to, carried, transport.distances)
    masses = (transport.masses(s.own(n[turn.group])) for s, n in zip((to, own), sizes, strict=True))
    return transport.plan(costs, *masses)
