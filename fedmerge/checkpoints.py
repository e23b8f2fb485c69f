"""State dicts that stay on the disk: a memory-mapped safetensors file, read a tensor at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge.errors import RunDirectoryError


class LazyParams(Mapping[str, Tensor]):
    """A state dict whose tensors are read when they are asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._names = tuple(self._file.keys())  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise RunDirectoryError(f"{path} cannot be read as safetensors: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_params(path: str | Path) -> LazyParams:
    """The state dict in a safetensors file, left on the disk: any function here takes it as it takes a dict.

    Raises:
        RunDirectoryError: A file that is not there or is no safetensors.
    """
    return LazyParams(Path(path))
