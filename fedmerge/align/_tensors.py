"""How weight matching reads the tensors of two networks: in float64 as they are needed, and products that it keeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedmerge.types import Params

SLICE = 2**18
"""Weights of a tensor that are turned to float64 at one time."""


class Doubles(Mapping[str, Tensor]):
    """Tensors of a state dict that become float64, on the device of ``like``, whenever they are read."""

    def __init__(self, params: Params, like: Params, names: Sequence[str]) -> None:
        self.params, self.like, self.names = params, like, dict.fromkeys(names)

    def given(self, name: str) -> Tensor:
        """The tensor in its own precision."""
        tensor = self.params[name].detach()
        return tensor if self.like is self.params else tensor.to(self.like[name].device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.given(name).double()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Product:
    """Inner products of units, and the order of B's other axes, and of its axis' other factors, that they are of."""

    total: Tensor
    order: dict[int, Tensor]
    inner: tuple[Tensor, ...]


def ordered(tensor: Tensor, order: Mapping[int, Tensor]) -> Tensor:
    """``tensor`` with the positions ``order[i]`` of axis i."""
    for i, index in order.items():
        tensor = tensor.index_select(i, index.to(tensor.device))
    return tensor
