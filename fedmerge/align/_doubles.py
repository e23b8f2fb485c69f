"""A state dict read in float64, a tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fedmerge.spec._spec import Params


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
