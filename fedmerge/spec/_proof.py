"""The proof that a spec is right: the network, permuted, computes what it computed before."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmerge.errors import SpecError
from fedmerge.spec._run import Outputs, changes, run
from fedmerge.spec._weights import Draw, State, as_it_is, draw_state, draws, move, moving, permutations, rounded
from fedmerge.spec.axes import Axis, Factor, Frozen, PermSpec
from fedmerge.spec.export import refused
from fedmerge.spec.network import Example, first_line, frozen_copy
from fedmerge.types import Perms

_ROWS = 2
_ALONE = "group {group} changed the output when permuted (tied by {ties})"
_TOGETHER = "group {group} changed the output when permuted with all others, though not alone (tied by {ties})"
_SMALL = 10_000  # parameters
_DISCRETE = 8  # permutations tried where the output is whole numbers, which may agree by chance


class Precision(NamedTuple):
    """How far round-off may move an output, when numbers are kept to ``step``.

    Attributes:
        step: Relative distance of neighbouring numbers.
        factor: So many times as far as it moves when every weight is off by ``step``.
        most: An output that may move farther than this says nothing.
        always: So far it may move in any case.
    """

    step: float
    factor: float
    most: float
    always: float = 0.0


_DOUBLE = Precision(2**-52, factor=1000.0, most=1e-3, always=1e-9)


class Unproved(Exception):
    """Why a way to run the network proves nothing; ``partly``: only because some of its output is not finite."""

    def __init__(self, reason: str, partly: bool = False) -> None:
        super().__init__(reason)
        self.partly = partly


class _Way(NamedTuple):
    """A way to run the network: how its weights are drawn, its input, in float64 or not, and what round-off does."""

    draw: Draw
    inputs: tuple[Tensor, ...]
    lifted: bool
    precision: Precision


def prove(spec: PermSpec, model: nn.Module, given: Example, step: float) -> PermSpec:
    """``spec`` without the groups whose permutation changes the output of ``model``.

    With randomised weights (fresh networks hide mistakes behind zero biases and unit statistics), a random
    permutation of all groups must keep the output to 1e-9 of its norm. The network runs in float64 whatever it casts
    to; only one that does not run so runs in its own precision, and the bound is then what round-off does to it.
    Where the output is not finite, zero or lost in round-off, weights are drawn in other ways, and inputs too. If it
    changes, each group is tried alone; the ones that fail are frozen and reported. If no way to run the network
    proves anything, all groups are frozen, with the reason.

    Args:
        spec: What was found.
        model: The network; it is not modified.
        given: Its arguments.
        step: Relative distance of neighbouring numbers in the lowest precision that the network uses.

    Raises:
        SpecError: The network cannot be run on its example input.

    Cost: two forward passes on the first two rows of the input (all of it where the network takes no fewer), one
    copy of the weights in float64.
    """
    if not spec.groups:
        return spec
    network = frozen_copy(model)
    moved = _by_own_names(spec, network)
    reasons: list[str] = []
    partly: list[_Way] = []
    for way in _ways(given, step):
        try:
            return _without(spec, _wrong(network, moved, given, way, partly=False))
        except Unproved as unproved:
            reasons.append(str(unproved))
            if unproved.partly:
                partly.append(way)
    for way in partly:
        try:
            return _without(spec, _wrong(network, moved, given, way, partly=True))
        except Unproved as unproved:
            reasons.append(str(unproved))
    try:
        run(network, draw_state(network, moved, as_it_is), given, given.tensors, lifted=False)
    except Exception as error:
        raise refused(model, given, error) from error
    why = "; ".join(dict.fromkeys(reasons)).replace("{", "{{").replace("}", "}}")
    return _without(spec, dict.fromkeys(spec.groups, f"could not be proved with any weights tried: {why}"))


def _by_own_names(spec: PermSpec, network: nn.Module) -> PermSpec:
    """``spec`` for the names that the tensors have in ``network``; a state dict may call them otherwise."""
    own = dict((*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)))
    stored = {id(t): name for name, t in network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    known = {name: stored[id(tensor)] for name, tensor in own.items() if stored.get(id(tensor)) in spec.axes}
    axes = {name: spec.axes[known[name]] for name in known}
    if axes == spec.axes:
        return spec
    shapes = {name: spec.shapes[known[name]] for name in known}
    return PermSpec(
        axes, shapes, frozenset(name for name in known if known[name] in spec.parameters), (), spec.operators
    )


def _ways(given: Example, step: float) -> Iterator[_Way]:
    """Ways to run the network, the one that depends on everything most freely first."""
    first, *others = _inputs(given)
    ways = draws()
    for draw in ways:
        yield _Way(draw, first, True, _DOUBLE)
    for inputs in others:
        for draw in (ways[0], ways[2]):
            yield _Way(draw, inputs, True, _DOUBLE)
    own = Precision(step, factor=100.0, most=1e-2) if step < 1e-5 else Precision(step, factor=8.0, most=0.1)
    for draw in (ways[0], as_it_is):
        yield _Way(draw, given.tensors, False, own)


def _inputs(given: Example) -> list[tuple[Tensor, ...]]:
    """The example input, varied first where it is one number everywhere, and positive numbers of its shapes."""
    generator = torch.Generator().manual_seed(2)
    varied, positive = list(given.tensors), list(given.tensors)
    for i, tensor in enumerate(given.tensors):
        if tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel():
            positive[i] = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.numel() > 1 and (tensor == tensor.reshape(-1)[0]).all():
                varied[i] = tensor + torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    ways = (tuple(varied), given.tensors, tuple(positive))
    return list({tuple(map(id, way)): way for way in ways}.values())


def _wrong(network: nn.Module, spec: PermSpec, given: Example, way: _Way, partly: bool) -> dict[str, str]:
    """The groups whose permutation changes the output; few units may all be dead by chance, so they are drawn twice."""
    found = _Experiment(network, spec, given, way, partly).wrong()
    if not found and sum(parameter.numel() for parameter in network.parameters()) < _SMALL:
        with contextlib.suppress(Unproved):
            return _Experiment(network, spec, given, way, partly, seed=1).wrong()
    return found


class _Experiment:
    """A network run in one way: what it gives, and whether it gives it still when permuted.

    Raises:
        Unproved: Nothing can be seen in its output.
    """

    def __init__(
        self, network: nn.Module, spec: PermSpec, given: Example, way: _Way, partly: bool, seed: int = 0
    ) -> None:
        self.network, self.spec, self.given, self.way, self.seed = network, spec, given, way, seed
        self.state: State | None = self.drawn()
        self.expected, self.inputs = self.first_rows(self.state)
        _judge(self.expected, partly)
        self.bounds = [way.precision.always] * len(self.expected.values)

    def drawn(self) -> State:
        """The weights."""
        return draw_state(self.network, self.spec, self.way.draw, self.seed)

    def run(self, state: State, inputs: tuple[Tensor, ...]) -> Outputs:
        """What the network gives with weights ``state``."""
        return run(self.network, state, self.given, inputs, self.way.lifted)

    def first_rows(self, state: State) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Outputs on the first rows of a batch, and that input; on all of it where the network takes no fewer."""
        inputs = self.way.inputs
        given = {x.shape[0] for x in inputs if x.dim() > 1}
        if len(given) == 1 and max(given) > _ROWS:
            few = tuple(x[:_ROWS] if x.dim() > 1 else x for x in inputs)
            try:
                found = self.run(state, few)
            except Exception:  # whatever a network raises on a batch of another size
                found = Outputs([], True)
            if found.values and all(value.dim() and value.shape[0] == _ROWS for value in found.values):
                return found, few
        try:
            return self.run(state, inputs), inputs
        except Exception as error:
            raise Unproved(f"the network raised {first_line(error)}") from error

    def wrong(self) -> dict[str, str]:
        """The groups whose permutation changes the output, and how that was found."""
        generator = torch.Generator().manual_seed(self.seed)
        together = list(permutations(self.spec.sizes(), generator, _DISCRETE if self.expected.discrete else 1))
        if self.keeps(together):
            return {}
        self.measure_bounds()
        if self.keeps(together):
            return {}
        sizes = self.spec.sizes()
        found = {g: _ALONE for g, n in sizes.items() if not self.keeps([moving(g, n, generator)])}
        rest = {group: n for group, n in sizes.items() if group not in found}
        if rest and not self.keeps(permutations(rest, generator)):
            found |= dict.fromkeys(rest, _TOGETHER)
        return found

    def keeps(self, trials: Iterable[Perms]) -> bool:
        """Whether the output stays when the weights are permuted by one of ``trials`` after the other."""
        state, self.state = self.state or self.drawn(), None
        for perms in trials:
            move(state, perms, self.spec)
            try:
                moved = self.run(state, self.inputs)
            except Exception:  # it did not without the permutation
                return False
            if any(change > bound for change, bound in zip(changes(self.expected, moved), self.bounds, strict=True)):
                return False
        return True

    def measure_bounds(self) -> None:
        """Set how far each output may move from what round-off alone does to it."""
        step, factor, most, always = self.way.precision
        if max(changes(self.expected, self.run(self.drawn(), self.inputs))) > 16 * step:
            raise Unproved("the output is another at every call")
        generator = torch.Generator().manual_seed(3)
        noise = [
            changes(self.expected, self.run(rounded(self.drawn(), step, generator), self.inputs)) for _ in range(3)
        ]
        worst = [max(found) for found in zip(*noise, strict=True)]
        self.bounds = [max(always, factor * w) if factor * w <= most else float("inf") for w in worst]
        if min(self.bounds) == float("inf"):
            raise Unproved("round-off alone moves the output as far")


def _judge(outputs: Outputs, partly: bool) -> None:
    """Raise where nothing can be seen in ``outputs``, or, unless ``partly``, not in all of them."""
    numbers = torch.cat([value.flatten() for value in outputs.values]) if outputs.values else torch.empty(0)
    if not numbers.numel():
        raise SpecError("the network gives no numbers on the example input: give a batch that is not empty")
    finite = numbers.isfinite()
    if not finite.any():
        raise Unproved("the output is NaN or infinite")
    if not finite.all() and not partly:
        raise Unproved("a part of the output is NaN or infinite", partly=True)
    if not numbers[finite].any():
        raise Unproved("the output is zero")


def _without(spec: PermSpec, wrong: Mapping[str, str]) -> PermSpec:
    """``spec`` with the groups ``wrong`` frozen, each for its reason."""
    if not wrong:
        return spec
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
                frozen.append(Frozen(name, a, wrong[group].format(group=group, ties=ties)))
        axes[name] = tuple(kept)
    return PermSpec(axes, spec.shapes, spec.parameters, tuple(frozen), spec.operators)
