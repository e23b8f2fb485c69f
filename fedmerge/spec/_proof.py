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

    Cost: two forward passes on at most two rows of the input, three copies of each tensor that moves, one
    double-precision copy of the weights at a time.
    """
    generator = torch.Generator().manual_seed(0)
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    state = _randomised(model, spec)
    expected, args = _first_rows(model, state, args)
    wrong: list[str] = []
    if not _error(expected, _outputs(model, _moved(state, spec.random(generator), spec), args)) <= _TOLERANCE:
        for group, n in spec.sizes().items():
            perm = {group: torch.randperm(n, generator=generator)}
            state = _randomised(model, spec)
            if not _error(expected, _outputs(model, _moved(state, perm, spec), args)) <= _TOLERANCE:
                wrong.append(group)
        if not wrong:  # each is right alone, not together: trust none
            wrong = list(spec.groups)
    return _without(spec, wrong) if wrong else spec


def _randomised(model: nn.Module, spec: PermSpec) -> State:
    """The tensors of ``model`` in float64, those that move with noise; tied names stay one tensor."""
    pool = torch.rand(2, _PERIOD, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pool = torch.stack((pool[0] + 0.5, 0.02 * pool[1]))
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}  # the first name of each
    state: State = {}
    for name, tensor in tensors.items():
        first = names[id(tensor)]
        if first != name:
            state[name] = state[first]
        elif any(any(axis) for axis in spec.axes.get(name, ())) and tensor.is_floating_point():
            state[name] = _noisy(tensor.detach(), pool, sum(map(ord, name)) % _PERIOD)
        else:
            state[name] = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    return state


def _noisy(tensor: Tensor, pool: Tensor, offset: int) -> Tensor:
    """``tensor * u + v`` with u, v read round and round from ``pool``, whose prime length fits no axis."""
    factors, terms = pool.roll(offset, 1)
    flat = torch.empty(tensor.numel(), dtype=torch.float64)
    source = tensor.reshape(-1)
    whole = tensor.numel() // _PERIOD * _PERIOD
    if whole:
        rows = flat[:whole].view(-1, _PERIOD)
        torch.addcmul(terms, source[:whole].view(-1, _PERIOD).double(), factors, out=rows)
    rest = tensor.numel() - whole
    torch.addcmul(terms[:rest], source[whole:].double(), factors[:rest], out=flat[whole:])
    return flat.view(tensor.shape)


def _moved(state: State, perms: Perms, spec: PermSpec) -> State:
    """``state`` permuted; it is emptied on the way, so that the weights are held about once."""
    moved: State = {}
    done: dict[int, Tensor] = {}  # tied names stay one tensor
    while state:
        name, tensor = state.popitem()
        if id(tensor) not in done:
            result = tensor
            for a, axis in enumerate(spec.axes.get(name, ())):
                if any(f.group in perms for segment in axis for f in segment):
                    result = result.index_select(a, axis_index(axis, perms))
            done[id(tensor)] = result
        moved[name] = done[id(tensor)]
    return moved


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
