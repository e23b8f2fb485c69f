"""Weights and permutations under which a spec is proved: drawn anew, and moved where they lie."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fedmerge.spec.axes import PermSpec, axis_index
from fedmerge.spec.lifted import wide
from fedmerge.spec.network import drawn
from fedmerge.types import Perms

State = dict[str, Tensor]
"""The tensors of a network by name; those with several names are one tensor."""

Draw = Callable[[Tensor, Tensor], Tensor]
"""A new tensor, of one tensor of the network and two rows of numbers in [0, 1]."""

_PERIOD = 65_537
_FEW = 5  # units of a group of which another may easily be permuted alike


def draws() -> list[Draw]:
    """Ways to draw weights, in the order in which they are tried: the first depends on every tensor most freely."""
    return [
        _noisy,
        lambda tensor, pool: _noisy(drawn(tensor), pool),  # in the stead of weights that are not finite
        lambda tensor, pool: _positive(_noisy(tensor, pool)),
        lambda tensor, pool: _noisy(tensor, pool, term=0.0),  # zeros and signs stay
        lambda tensor, pool: 0.1 * _noisy(tensor, pool),
    ]


def as_it_is(tensor: Tensor, pool: Tensor) -> Tensor:
    """The network's own numbers."""
    return wide(tensor).clone()


def _positive(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.abs() + 0.01


def draw_state(model: nn.Module, spec: PermSpec, draw: Draw, seed: int = 0) -> State:
    """The parameters of ``model`` in double precision, and what else moves, drawn anew; other buffers as they are."""
    pool = torch.rand(2, _PERIOD, generator=torch.Generator().manual_seed(1 + seed), dtype=torch.float64).repeat(1, 2)
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}  # the first name of each
    state: State = {}
    for name, tensor in tensors.items():
        first, free = names[id(tensor)], isinstance(tensor, nn.Parameter) or any(spec.axes.get(name, ()))
        if first != name:
            state[name] = state[first]
        elif free and (tensor.is_floating_point() or tensor.is_complex()):
            start = -sum(map(ord, name)) % _PERIOD
            state[name] = draw(tensor.detach(), pool[:, start : start + _PERIOD])
        else:
            state[name] = wide(tensor.detach()).clone()
    return state


def _noisy(tensor: Tensor, pool: Tensor, term: float = 1.0) -> Tensor:
    """``tensor * u + v`` with u, v read round and round from ``pool``, whose prime length fits no axis.

    u is in [0.5, 1.5]; v is positive for vectors (a variance must stay one) and has mean 0 and the scale of
    1 / sqrt(inputs) for weights, so that outputs of deep networks neither vanish nor overflow.
    """
    if tensor.is_complex():
        return torch.view_as_complex(_noisy(torch.view_as_real(tensor.resolve_conj()), pool, term))
    pool = pool[:, : tensor.numel()]
    factors = pool[0] + 0.5
    inputs = tensor.numel() // max(1, tensor.shape[0]) if tensor.dim() else 1
    terms = 0.02 * pool[1] if tensor.dim() < 2 else (pool[1] - 0.5) * (0.5 / max(1, inputs)) ** 0.5
    terms *= term
    source, flat = tensor.reshape(-1), torch.empty(tensor.numel(), dtype=torch.float64)
    if source.element_size() < 2:  # eight bits take part in no arithmetic
        source = source.double()
    whole = tensor.numel() // _PERIOD * _PERIOD
    if whole:
        torch.addcmul(terms, source[:whole].view(-1, _PERIOD), factors, out=flat[:whole].view(-1, _PERIOD))
    rest = tensor.numel() - whole
    torch.addcmul(terms[:rest], source[whole:], factors[:rest], out=flat[whole:])
    return flat.view(tensor.shape)


def rounded(state: State, step: float, generator: torch.Generator) -> State:
    """``state`` with every number off by a factor of 1 - ``step`` to 1 + ``step``; tied names stay one tensor."""
    off: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in off:
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            exact = not (tensor.is_floating_point() or tensor.is_complex())
            off[id(tensor)] = tensor if exact else tensor * (1 + step * (2 * noise - 1))
    return {name: off[id(tensor)] for name, tensor in state.items()}


def permutations(sizes: Mapping[str, int], generator: torch.Generator, least: int = 1) -> Iterator[Perms]:
    """Permutations of all groups at once, to be applied one after the other: ``least``, or more for small groups.

    Every group is moved by one of them, and no two small groups are permuted alike by all: two that should move
    together would otherwise pass as free of each other. So the k-th group of n units is permuted by the digits of k
    in base n!, one after the other.
    """
    digits: dict[str, list[int]] = {}
    taken: Counter[int] = Counter()
    for group, n in sizes.items():
        if n <= _FEW:
            taken[n] += 1
            digits[group] = _digits(taken[n], math.factorial(n))
    longest = max(map(len, digits.values()), default=1)
    for trial in range(max(least, longest)):
        perms: dict[str, Tensor] = {}
        for group, n in sizes.items():
            if group in digits:
                digit = (digits[group] + [0] * longest)[trial % longest]
                perms[group] = torch.tensor(next(itertools.islice(itertools.permutations(range(n)), digit, None)))
            else:
                perms.update(moving(group, n, generator))
        yield perms


def _digits(number: int, base: int) -> list[int]:
    found = []
    while number and base > 1:
        number, digit = divmod(number, base)
        found.append(digit)
    return found


def moving(group: str, n: int, generator: torch.Generator) -> Perms:
    """A permutation of one group that moves something."""
    perm = torch.randperm(n, generator=generator)
    return {group: perm.roll(1) if torch.equal(perm, torch.arange(n)) else perm}


def move(state: State, perms: Perms, spec: PermSpec) -> None:
    """Permute ``state`` where it lies, through one scratch buffer: fresh memory costs more than the copies."""
    moved = {
        id(tensor): (name, tensor)  # tied names are one tensor
        for name, tensor in state.items()
        if any(f.group in perms for axis in spec.axes.get(name, ()) for segment in axis for f in segment)
    }
    whole = [t.numel() for _, t in moved.values() if t.dtype is torch.float64]
    scratch = torch.empty(max(whole, default=0), dtype=torch.float64)
    for name, tensor in moved.values():
        here = tensor
        there = scratch[: tensor.numel()].view(tensor.shape) if tensor.dtype is torch.float64 else tensor.clone()
        for a, axis in enumerate(spec.axes[name]):
            if any(f.group in perms for segment in axis for f in segment):
                torch.index_select(here, a, axis_index(axis, perms), out=there)
                here, there = there, here
        if here is not tensor:
            tensor.copy_(here)
