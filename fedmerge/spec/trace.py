"""Tracing of permutation symmetries from the network itself (``torch.export``), with a proof by running it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fedmerge._tree import tensors
from fedmerge.errors import FedmergeError, SpecError
from fedmerge.spec._proof import prove
from fedmerge.spec._reads import reads
from fedmerge.spec.axes import Axis, Factor, Frozen, PermSpec
from fedmerge.spec.export import export
from fedmerge.spec.network import Example, example, first_line, release, untouched
from fedmerge.spec.operators import Interpreter, statistics
from fedmerge.spec.symbols import Label, Symbols
from fedmerge.spec.traced import Traced

_STAYS = ("a position in an image or a kernel", "a single unit")
_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER)


def perm_spec(model: nn.Module, example_input: Any) -> PermSpec:
    """Find which axes of the tensors of ``model`` can be permuted without changing its function.

    The network is exported (``torch.export``) in eval mode; every axis of every parameter and buffer
    begins as an unknown, each operator ties, cuts or freezes the unknowns that it touches, and the
    network's inputs and outputs stay. The result then proves itself: with randomised weights, in
    float64, a random permutation of all groups must leave the output on ``example_input`` unchanged to
    1e-9 of its norm. A group that fails is frozen and reported.

    Args:
        model: Any module that ``torch.export`` can trace, on any device; it is not modified, nor is any setting or
            random state of the process.
        example_input: What the model takes: a tensor, a tuple of positional arguments, or a dict of arguments by
            name. They may hold tensors in lists, dicts and objects. What is not one of these, and a dict whose keys
            are no names of arguments, is the one argument.

    Returns:
        The symmetries, for the names of ``model.state_dict()``.

    Raises:
        SpecError: The model cannot be run or traced with this input; the message says what to change.

    Cost: one export (linear in the number of operators) and two or more forward passes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec = fm.perm_spec(model, torch.zeros(1, 4))
        >>> spec.sizes()
        {'0': 8}
        >>> [(place.name, place.axis) for place in spec.occurrences("0")]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"cannot trace a {type(model).__name__}, expected a network: give a torch.nn.Module")
    try:
        with untouched():
            return _perm_spec(model, example_input)
    except FedmergeError:
        raise
    except Exception as error:
        raise SpecError(
            f"{type(model).__name__} cannot be traced: {first_line(error)}; it is of a kind that is not understood, "
            "give a network of plain modules and tensors"
        ) from error


def _perm_spec(model: nn.Module, example_input: Any) -> PermSpec:
    given = example(model, example_input)
    program, network = export(model, given)
    try:
        traced = _solve(network, program)
        spec = _collect(network, traced.labels, traced.symbols)
        readers = reads(traced, network.state_dict(keep_vars=True))
    finally:
        # The export ends as cyclic garbage, which would keep the caller's numbers until Python next collects it.
        release(network)
    return replace(prove(spec, model, given, _step(program)), reads=readers)


def trace(model: nn.Module, args: tuple[Any, ...]) -> Traced:
    """The graph of ``model``, on the device where it is, with the labels of all that it computes on ``args``.

    Raises:
        SpecError: The model cannot be exported with this input.
    """
    with untouched():
        program, network = export(model, Example(args, {}, tuple(tensors(args))), where_it_is=True)
        try:
            return _solve(network, program)
        finally:
            release(network)


def _solve(network: nn.Module, program: ExportedProgram) -> Traced:
    stacks: dict[str, int] = {}
    while True:  # a second time where parts of a packed tensor were found to be picked one by one
        labels, run = _label(network, program, stacks)
        if run.picked.keys() <= stacks.keys():
            return Traced(program, labels, run.env, run.symbols)
        stacks = {**run.picked, **stacks}


def _step(program: ExportedProgram) -> float:
    """Relative distance of neighbouring numbers in the lowest precision of the graph."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _label(
    model: nn.Module, program: ExportedProgram, stacks: Mapping[str, int]
) -> tuple[dict[str, tuple[Label, ...]], Interpreter]:
    """Labels of every tensor of the state dict, after the whole graph has spoken."""
    symbols = Symbols()
    run = Interpreter(symbols, stacks)
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    own = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    labels: dict[str, tuple[Label, ...]] = {}
    shared: dict[Any, tuple[Label, ...]] = {}  # tied weights are one tensor under several names
    entries = [node for node in program.graph.nodes if node.op == "placeholder"]
    targets = {node.name: str(inputs[node.name].target) for node in entries}
    keys = {name: id(own.get(target, target)) for name, target in targets.items()}
    used = {keys[node.name] for node in entries if node.users}
    buffers = [node for node in entries if inputs[node.name].kind is InputKind.BUFFER and node.users]
    constants = {keys[node.name] for node in buffers if not statistics(node)}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec, value = inputs[node.name], node.meta.get("val")
            if not isinstance(value, Tensor):
                run.env[node] = ()
            elif spec.kind in _TENSORS:
                name, key = targets[node.name], keys[node.name]
                stays = "a constant of the network" if key in constants else None
                stays = stays if key in used else "not used in eval mode"
                shared.setdefault(key, tuple(symbols.fresh(int(n), stays) for n in value.shape))
                run.env[node] = labels[name] = shared[key]
            else:
                given = spec.kind is InputKind.USER_INPUT
                run.env[node] = run.fixed(value, "an input of the network" if given else "a constant of the network")
        elif node.op == "output":
            for result in node.all_input_nodes:
                run.freeze(run.env[result], "an output of the network")
        else:
            run.env[node] = _applied(run, node)
    run.freeze_unread()
    for entry in labels.values():  # resolving may freeze, so all of it comes before anything is read
        for label in entry:
            symbols.resolve(label)
    return labels, run


def _applied(run: Interpreter, node: fx.Node) -> Any:
    """Labels of the result of ``node``; if it cannot be followed, all that enters it stays, and so does the result."""
    reason = _obstacle(node)
    if reason is None:
        try:
            return run.run(node)
        except Exception as error:  # what a handler did not foresee; the ties that it made only make fewer groups
            reason = f"operator {node.name} is not understood ({first_line(error)})"
    for argument in node.all_input_nodes:
        run.freeze(run.env[argument], reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [_still(run, v, reason) for v in value]
    return _still(run, value, reason)


def _still(run: Interpreter, value: Any, reason: str) -> tuple[Label, ...]:
    """Frozen labels for a tensor; none for other things."""
    return run.fixed(value, reason) if isinstance(value, Tensor) else ()


def _obstacle(node: fx.Node) -> str | None:
    """Why the axes that enter ``node`` cannot move, whatever operator it is."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return f"{node.name} draws random numbers, also in eval mode" if _draws(node) else None
    return None


def _draws(node: fx.Node) -> bool:
    """Whether an operator that may draw random numbers does."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if "train" in names or "training" in names:
        return bool(given.get("train", given.get("training", False)) and given.get("p", 1.0))
    return bool(given.get("dropout_p", 0.0)) if "dropout_p" in names else True


def _collect(model: nn.Module, labels: Mapping[str, tuple[Label, ...]], symbols: Symbols) -> PermSpec:
    """Turn solved unknowns into a spec with readable group names."""
    # The names of the state dict may be others than those of the tensors, and more, and it may hold other things.
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    parameters = frozenset(name for name, tensor in state.items() if isinstance(tensor, nn.Parameter))
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = {id(tensor): labels[name] for name, tensor in reversed(own) if name in labels}
    names: dict[int, str] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    frozen: list[Frozen] = []
    # A group is named after the first tensor that produces it (axis 0).
    for name in state:
        label = known.get(id(state[name]))
        if label and name in parameters:
            for part in symbols.parts(label[0]):
                if symbols.reason(part.symbol) is None:
                    stem = name.removesuffix(".weight")
                    taken = sum(g == stem or g.startswith(f"{stem}#") for g in names.values())
                    names.setdefault(symbols.root(part.symbol), stem if not taken else f"{stem}#{taken}")
    for name, tensor in state.items():
        label = known.get(id(tensor))
        if label is None:
            axes[name] = ((),) * tensor.dim()
            if name in parameters:
                frozen += [Frozen(name, a, "not used in eval mode") for a in range(tensor.dim())]
            continue
        entry: list[Axis] = []
        for a, positions in enumerate(label):
            axis, reasons = _axis(positions, symbols, names, f"{name}[{a}]")
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
        axis.append(tuple(segment) or (Factor(None, 1),))
    moves = any(f.group is not None for segment in axis for f in segment)
    return (tuple(axis) if moves else ()), reasons
