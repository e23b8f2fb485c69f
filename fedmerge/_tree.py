"""Arguments and results of a network as trees: containers of any kind, tensors, and whatever else is in them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, str, type(None), Tensor, nn.Parameter)

Rebuild = Callable[[Sequence[Any]], Any]


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in ``tree`` that is no container, in order."""
    inner = _open(tree)
    if inner is None:
        yield tree
    else:
        for child in inner[0]:
            yield from leaves(child)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def replace(tree: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """``tree`` with ``by(x)`` in place of every x of type ``kind``, in containers of their own."""
    if isinstance(tree, kind):
        return by(tree)
    inner = _open(tree)
    return tree if inner is None else inner[1]([replace(child, kind, by) for child in inner[0]])


def _open(tree: Any) -> tuple[list[Any], Rebuild] | None:
    """What is in a container, and how to make one like it of other things; None for what is none."""
    if type(tree) in _PLAIN:
        return None
    if isinstance(tree, (tuple, list)):
        named = hasattr(tree, "_fields")
        return list(tree), lambda values: type(tree)(*values) if named else type(tree)(values)
    if isinstance(tree, Mapping):
        return list(tree.values()), lambda values: _filled(tree, dict(zip(tree, values, strict=True)))
    if isinstance(tree, (Tensor, nn.Module, type)):
        return None
    inner, made = pytree.tree_flatten(tree, is_leaf=lambda node: node is not tree)  # one level of a registered class
    if not (len(inner) == 1 and inner[0] is tree):
        return inner, lambda values: pytree.tree_unflatten(values, made)
    fields = getattr(tree, "__dict__", {})
    if not dataclasses.is_dataclass(tree) and not any(map(_holds, fields.values())):
        return None
    if dataclasses.is_dataclass(tree):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return list(fields.values()), lambda values: _with_fields(tree, dict(zip(fields, values, strict=True)))


def _holds(value: Any) -> bool:
    """Whether ``value`` is a tensor or a plain container of some."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(entry, Tensor) for entry in inner)


def _filled(tree: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(tree) is dict:
        return entries
    new: Any = copy.copy(tree)
    for key, value in entries.items():
        new[key] = value
    return new  # type: ignore[no-any-return]


def _with_fields(tree: Any, fields: dict[str, Any]) -> Any:
    new = copy.copy(tree)
    for name, value in fields.items():
        object.__setattr__(new, name, value)  # frozen dataclasses too
    return new
