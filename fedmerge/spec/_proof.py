"""The proof that a spec is right: the network, permuted, computes what it computed before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.spec._spec import Axis, Factor, Frozen, Perms, PermSpec, axis_index

_TOLERANCE = 1e-9
_PERIOD = 65_537
_ROWS = 2

State = dict[str, Tensor]


def prove(spec: PermSpec, model: nn.Module, args: tuple[Any, ...]) -> PermSpec:
    """``spec`` without the groups whose permutation changes the output of ``model`` on ``args``.

    In float64, with randomised weights (fresh networks hide mistakes behind zero biases and unit statistics),
    a random permutation of all groups must keep the output to 1e-9 of its norm. If it does not, each group is
    tried alone; the ones that fail are frozen and reported.

    Cost: two forward passes on the first two rows of the input (all of it where the network takes no fewer),
    one copy of the weights in float64.
    """
    generator = torch.Generator().manual_seed(0)
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    state = _randomised(model, spec)
    expected, args = _first_rows(model, state, args)
    wrong: list[str] = []
    if not _keeps(model, state, spec.random(generator), spec, args, expected):
        for group, n in spec.sizes().items():
            perm = {group: torch.randperm(n, generator=generator)}
            if not _keeps(model, _randomised(model, spec), perm, spec, args, expected):
                wrong.append(group)
        if not wrong:  # each is right alone, not together: trust none
            wrong = list(spec.groups)
    return _without(spec, wrong) if wrong else spec


def _keeps(
    model: nn.Module, state: State, perms: Perms, spec: PermSpec, args: tuple[Any, ...], expected: list[Tensor]
) -> bool:
    """Whether ``state``, which is used up, gives the ``expected`` outputs after ``perms``."""
    _move(state, perms, spec)
    return _error(expected, _outputs(model, state, args)) <= _TOLERANCE


def _randomised(model: nn.Module, spec: PermSpec) -> State:
    """The tensors of ``model`` in float64, those that move with noise; tied names stay one tensor."""
    pool = torch.rand(2, _PERIOD, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}  # the first name of each
    state: State = {}
    for name, tensor in tensors.items():
        first = names[id(tensor)]
        if first != name:
            state[name] = state[first]
        elif any(spec.axes.get(name, ())) and tensor.is_floating_point():
            state[name] = _noisy(tensor.detach(), pool.roll(sum(map(ord, name)), 1))
        else:
            state[name] = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return state


def _noisy(tensor: Tensor, pool: Tensor) -> Tensor:
    """``tensor * u + v`` with u, v read round and round from ``pool``, whose prime length fits no axis.

    u is in [0.5, 1.5]; v is positive for vectors (a variance must stay one) and has mean 0 and the scale of
    1 / sqrt(inputs) for weights, so that outputs of deep networks neither vanish nor overflow.
    """
    factors = pool[0] + 0.5
    inputs = tensor.numel() // max(1, tensor.shape[0])
    terms = 0.02 * pool[1] if tensor.dim() < 2 else (pool[1] - 0.5) * (0.5 / max(1, inputs)) ** 0.5
    source, flat = tensor.reshape(-1), torch.empty(tensor.numel(), dtype=torch.float64)
    whole = tensor.numel() // _PERIOD * _PERIOD
    if whole:
        torch.addcmul(terms, source[:whole].view(-1, _PERIOD), factors, out=flat[:whole].view(-1, _PERIOD))
    rest = tensor.numel() - whole
    torch.addcmul(terms[:rest], source[whole:], factors[:rest], out=flat[whole:])
    return flat.view(tensor.shape)


def _move(state: State, perms: Perms, spec: PermSpec) -> None:
    """Permute ``state`` where it lies, through one scratch buffer: fresh memory costs more than the copies."""
    moving = {
        id(tensor): (name, tensor)  # tied names are one tensor
        for name, tensor in state.items()
        if any(f.group in perms for axis in spec.axes.get(name, ()) for segment in axis for f in segment)
    }
    scratch = torch.empty(max((t.numel() for _, t in moving.values()), default=0), dtype=torch.float64)
    for name, tensor in moving.values():
        here, there = tensor, scratch[: tensor.numel()].view(tensor.shape)
        for a, axis in enumerate(spec.axes[name]):
            if any(f.group in perms for segment in axis for f in segment):
                torch.index_select(here, a, axis_index(axis, perms), out=there)
                here, there = there, here
        if here is not tensor:
            tensor.copy_(here)


def _first_rows(model: nn.Module, state: State, args: tuple[Any, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Outputs on the first rows of a batch, and that input; on all of it where the network takes no fewer."""
    given = {a.shape[0] for a in args if isinstance(a, Tensor) and a.dim() > 1}
    if len(given) == 1 and max(given) > _ROWS:
        few = tuple(a[:_ROWS] if isinstance(a, Tensor) and a.dim() > 1 else a for a in args)
        try:
            found = _outputs(model, state, few)
        except Exception:  # whatever a network raises on a batch of another size
            found = []
        if found and all(leaf.dim() and leaf.shape[0] == _ROWS for leaf in found):
            return found, few
    return _outputs(model, state, args), args


def _outputs(model: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        result = torch.func.functional_call(model, dict(state), args, tie_weights=False)
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative distance over the outputs; NaN counts as infinite."""
    norm = torch.linalg.vector_norm
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    errors = [float(norm(a - b) / (norm(a) + 1e-300)) for a, b in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _without(spec: PermSpec, wrong: list[str]) -> PermSpec:
    """``spec`` with the groups ``wrong`` frozen."""
    frozen = list(spec.frozen)
    axes: dict[str, tuple[Axis, ...]] = {}
    for name, entry in spec.axes.items():
        kept: list[Axis] = []
        for a, axis in enumerate(entry):
            groups = {f.group for segment in axis for f in segment if f.group is not None}
            still = tuple(
                tuple(Factor(None if f.group in wrong else f.group, f.size) for f in segment) for segment in axis
            )
            kept.append(still if groups - set(wrong) else ())
            for group in sorted(groups & set(wrong)):
                ties = ", ".join(spec.operators.get(group, ())[:3])
                frozen.append(Frozen(name, a, f"group {group} changed the output when permuted (tied by {ties})"))
        axes[name] = tuple(kept)
    return PermSpec(axes, spec.shapes, spec.parameters, tuple(frozen), spec.operators)
