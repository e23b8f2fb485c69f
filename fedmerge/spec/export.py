"""The graph of a network (``torch.export``), and what to say where there is none."""

import contextlib
import inspect
import io
import logging
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fedmerge._copies import every_tensor, instead
from fedmerge._tree import tensors
from fedmerge.errors import FedmergeError, SpecError
from fedmerge.spec.network import Example, evaluated, first_line, frozen_copy

_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
_BASIC = (Tensor, int, float, bool, str, type(None))
_REGIONS = (
    "wrap",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "wrap_activation_checkpoint",
    "tag_activation_checkpoint",
)
"""Operators that run a part of the graph in some mode, and change no value in exact arithmetic."""


def export(model: nn.Module, given: Example, *, where_it_is: bool = False) -> tuple[ExportedProgram, nn.Module]:
    """The graph of ``model`` in eval mode on the CPU, or where it is, and the copy of it that was traced.

    The results of the graph are the tensors in what ``model`` returns, whatever containers they are in. Parts of it
    that run without gradients, under autocast or checkpointed are laid open.

    Raises:
        SpecError: It cannot be traced with this input.
    """
    network = frozen_copy(model, where_it_is=where_it_is)
    args, kwargs = given.arguments(given.tensors)
    try:
        network.register_forward_hook(lambda module, inputs, result: _results(module, result))
        if not all(isinstance(leaf, _BASIC) for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = _bare(network, given), {}
        with _quiet():
            program = torch.export.export(network, args, kwargs, strict=False)
    except FedmergeError:
        raise
    except Exception as error:
        raise refused(model, given, error) from error
    _lay_open(program.graph_module)
    return program, network


def _bare(network: nn.Module, given: Example) -> tuple[Tensor, ...]:
    """The tensors of the example alone, which ``network`` then takes: ``torch.export`` knows no other objects."""
    forward = network.forward
    network.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # its signature is checked
    network.register_forward_pre_hook(
        lambda module, bare, kwargs: given.arguments(bare), prepend=True, with_kwargs=True
    )
    return given.tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch writes about a failure before it raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _results(model: nn.Module, result: Any) -> list[Tensor]:
    found = tensors(result)
    if not found:
        raise SpecError(
            f"{type(model).__name__} returns no tensor but {type(result).__name__}: without an output of it nothing "
            "says which permutations keep its function; give a network that returns its output"
        )
    return found


def _lay_open(module: fx.GraphModule) -> None:
    """Put the nodes of every region in the place of its one node."""
    for node in list(module.graph.nodes):
        if getattr(node.target, "__name__", "") not in _REGIONS or node.op != "call_function":
            continue
        if any(user.target is not operator.getitem for user in node.users):
            continue
        at, held = next((i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        region = getattr(module, str(held.target))
        _lay_open(region)
        entries = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(region.graph, dict(zip(entries, node.args[at + 1 :], strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def refused(model: nn.Module, given: Example, error: Exception) -> SpecError:
    """Why ``model`` cannot be traced, and what to do: the example input is wrong, or the network is of another kind."""
    name = type(model).__name__
    shapes = [*map(_short, given.args), *(f"{key}={_short(value)}" for key, value in given.kwargs.items())]
    start = f"{name} cannot be traced with an example input of shape {shapes}"
    raised = _raised(model, given)
    if raised is not None:
        return SpecError(f"{start}: the model raised {first_line(raised)}; {_about_input(model, given, raised)}")
    return SpecError(f"{start}: {first_line(error)}; {_about_network(model, error)}")


def _raised(model: nn.Module, given: Example) -> Exception | None:
    """What ``model`` itself raises on the example input, if anything."""
    try:
        network = frozen_copy(model)
        args, kwargs = given.arguments([tensor.clone() for tensor in given.tensors])
        evaluated(network, {id(tensor): instead(tensor, tensor.clone()) for tensor in every_tensor(network)})(
            *args, **kwargs
        )
    except Exception as error:
        return error
    return None


def _about_input(model: nn.Module, given: Example, error: Exception) -> str:
    """What to change in the example input, or in the network, so that ``model`` runs."""
    said = str(error).lower()

    def says(*words: str) -> bool:
        return any(re.search(rf"\b{word}", said) for word in words)

    if says("cuda", "nvidia", "device", "meta tensor"):
        return "it is traced on the CPU: its forward must make new tensors where the input is (device=x.device)"
    if isinstance(error, TypeError) and says("argument"):
        return f"give the arguments that its forward takes, {_signature(model)}: a tuple, or a dict of names"
    if says("dtype", "scalar type", "same type"):
        dtypes = sorted({str(tensor.dtype) for tensor in model.parameters() if tensor.is_floating_point()})
        return (
            f"give an input of the type that it takes (its weights: {', '.join(dtypes) or 'none'}; tokens: torch.long)"
        )
    if any(0 in tensor.shape for tensor in given.tensors):
        return "the input is empty: give a batch of at least one"
    if isinstance(error, IndexError) and says("out of range in self"):
        return "give numbers that its embeddings have rows for"
    if isinstance(error, (RuntimeError, ValueError, IndexError)) and says("shape", "size", "dim", "1d", "channel"):
        return "give an input of the shape that the network takes"
    return "give an input on which model(*example) runs in eval mode on the CPU"


def _about_network(model: nn.Module, error: Exception) -> str:
    """What to change in a network that runs, but cannot be traced."""
    said = f"{type(error).__name__} {error}".lower()
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "give the module as it was before torch.jit.script or torch.jit.trace"
    if "quantized" in said or any("quantized" in type(module).__module__ for module in model.modules()):
        return "give the network as it was before quantisation"
    if "data-dependent" in said or "datadependent" in said:
        return (
            "its forward decides by the values of tensors (if, while, int() or float() of one), which no graph can "
            "hold: trace the part of it that does not, or compute both branches and choose with torch.where"
        )
    if any(isinstance(module, nn.RNNBase) for module in model.modules()) and "faketensor" in said:
        return (
            "its recurrent layer reads a packed sequence, whose lengths no graph can hold: trace the network on "
            "sequences of one length, without pack_padded_sequence"
        )
    if "numpy" in said:
        return "its forward leaves torch for NumPy; compute in torch"
    return "the model runs, but torch.export does not follow its forward: write that part in plain operators of torch"


def _signature(model: nn.Module) -> str:
    try:
        return str(inspect.signature(model.forward))
    except (TypeError, ValueError):
        return "(...)"


def _short(value: Any) -> Any:
    """An argument in short: shapes of tensors, types of other things."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return [_short(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return type(value).__name__
