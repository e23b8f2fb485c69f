"""Tracing of permutation symmetries from the network itself (``torch.export``), with a proof by running it."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from fedmerge.errors import SpecError
from fedmerge.spec._operators import Interpreter
from fedmerge.spec._spec import Axis, Factor, Frozen, PermSpec, permute
from fedmerge.spec._symbols import Label, Symbols

_STAYS = ("a position in an image or a kernel", "a single unit")
_TOLERANCE = 1e-9


def perm_spec(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> PermSpec:
    """Find which axes of the tensors of ``model`` can be permuted without changing its function.

    The network is exported (``torch.export``) in eval mode; every axis of every parameter and buffer
    begins as an unknown, each operator ties, cuts or freezes the unknowns that it touches, and the
    network's inputs and outputs stay. The result then proves itself: with randomised weights, in
    float64, a random permutation of all groups must leave the output on ``example_input`` unchanged to
    1e-9 of its norm. A group that fails is frozen and reported.

    Args:
        model: Any module that ``torch.export`` can trace; it is not modified.
        example_input: A tensor, or a tuple of positional arguments, of the shapes that the model takes.

    Returns:
        The symmetries, for the names of ``model.state_dict()``.

    Raises:
        SpecError: The model cannot be exported with this input.

    Cost: one export (linear in the number of operators) and two or more forward passes.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    model = copy.deepcopy(model).cpu().eval()
    args = tuple(a.detach().cpu() if isinstance(a, Tensor) else a for a in args)
    labels, symbols = _label(model, args)
    spec = _collect(model, labels, symbols)
    return _prove(spec, model, args)


def _label(model: nn.Module, args: tuple[Any, ...]) -> tuple[dict[str, tuple[Label, ...]], Symbols]:
    """Labels of every tensor of the state dict, after the whole graph has spoken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, strict=False)
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        reason = str(error).strip().split("\n")[0]
        raise SpecError(
            f"{type(model).__name__} cannot be traced with an example input of shape {shapes}: {reason}; "
            "give an input of the shape that the network takes"
        ) from error
    symbols = Symbols()
    run = Interpreter(symbols)
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = model.state_dict(keep_vars=True)
    labels: dict[str, tuple[Label, ...]] = {}
    shared: dict[int, tuple[Label, ...]] = {}  # tied weights are one tensor under several names
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec, value = inputs[node.name], node.meta.get("val")
            if not isinstance(value, Tensor):
                run.env[node] = ()
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                name = str(spec.target)
                key = id(tensors.get(name, name))
                if key not in shared:
                    shared[key] = tuple(symbols.fresh(int(n)) for n in value.shape)
                run.env[node] = labels[name] = shared[key]
            else:
                run.env[node] = run.fixed(value, "an input of the network")
        elif node.op == "output":
            for result in node.all_input_nodes:
                for label in run.env[result]:
                    symbols.freeze(label, "an output of the network")
        else:
            run.env[node] = run.run(node)
    return labels, symbols


def _collect(model: nn.Module, labels: Mapping[str, tuple[Label, ...]], symbols: Symbols) -> PermSpec:
    """Turn solved unknowns into a spec with readable group names."""
    state = model.state_dict(keep_vars=True)
    by_identity = {id(state[name]): name for name in labels if name in state}
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    frozen: list[Frozen] = []
    # A group is named after the first tensor that produces it (axis 0).
    for name in state:
        if name in labels and labels[name] and name in parameters:
            for part in symbols.parts(labels[name][0]):
                if symbols.reason(part.symbol) is None:
                    stem = name.removesuffix(".weight")
                    taken = sum(g == stem or g.startswith(f"{stem}#") for g in names.values())
                    names.setdefault(symbols.root(part.symbol), stem if not taken else f"{stem}#{taken}")
    for name, tensor in state.items():
        source = name if name in labels else by_identity.get(id(tensor))
        if source is None:
            axes[name] = ((),) * tensor.dim()
            if name in parameters:
                frozen += [Frozen(name, a, "not used in eval mode") for a in range(tensor.dim())]
            continue
        entry: list[Axis] = []
        for a, label in enumerate(labels[source]):
            axis, reasons = _axis(label, symbols, names, f"{name}[{a}]")
            entry.append(axis)
            reason = next((r for r in reasons if r not in _STAYS), None)
            if not axis and reason is not None:
                frozen.append(Frozen(name, a, reason))
        axes[name] = tuple(entry)
    operators = {group: symbols.ties(symbol) for symbol, group in names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return PermSpec(axes, shapes, parameters, tuple(frozen), operators)


def _axis(label: Label, symbols: Symbols, names: dict[int, str], fallback: str) -> tuple[Axis, list[str]]:
    axis: list[tuple[Factor, ...]] = []
    reasons: list[str] = []
    for product in symbols.resolve(label):
        segment: list[Factor] = []
        for symbol, size in product:
            reason = symbols.reason(symbol)
            if reason is not None:
                reasons.append(reason)
                if segment and segment[-1].group is None:
                    segment[-1] = Factor(None, segment[-1].size * size)
                else:
                    segment.append(Factor(None, size))
            else:
                segment.append(Factor(names.setdefault(symbols.root(symbol), fallback), size))
        axis.append(tuple(segment))
    moves = any(f.group is not None for segment in axis for f in segment)
    return (tuple(axis) if moves else ()), reasons


def _prove(spec: PermSpec, model: nn.Module, args: tuple[Any, ...]) -> PermSpec:
    """Run the network permuted; freeze what changes its output."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    # Fresh networks hide mistakes (zero biases, unit statistics), so the proof runs on randomised weights.
    state: dict[str, Tensor] = {}
    by_identity: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in by_identity:
            by_identity[id(tensor)] = _randomised(tensor.detach(), spec.axes[name], generator)
        state[name] = by_identity[id(tensor)]
    expected = _outputs(model, state, args)
    wrong: list[str] = []
    if _error(expected, _outputs(model, permute(state, spec.random(generator), spec=spec), args)) > _TOLERANCE:
        for group, n in spec.sizes().items():
            perm = {group: torch.randperm(n, generator=generator)}
            if not _error(expected, _outputs(model, permute(state, perm, spec=spec), args)) <= _TOLERANCE:
                wrong.append(group)
        if not wrong:  # each is right alone, not together: trust none
            wrong = list(spec.groups)
    return _without(spec, wrong) if wrong else spec


def _randomised(tensor: Tensor, axes: tuple[Axis, ...], generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or not any(axes):
        return tensor
    noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5
    small = 0.02 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return tensor * noise + small


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
