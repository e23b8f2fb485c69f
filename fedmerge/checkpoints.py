"""State dicts that stay on the disk: a memory-mapped safetensors file, read a tensor at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge.errors import RunDirectoryError
from fedmerge.files import mistaken, read_text

_WRAPPER, _AVERAGED = "module.", "n_averaged"
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".tar")
_OTHERS = (".gguf", ".h5", ".hdf5", ".index", ".keras", ".mlmodel", ".msgpack", ".onnx", ".pb", ".tflite")
_FROM_TORCH = (
    "import torch; from safetensors.torch import save_file; "
    "d = torch.load({old!r}, map_location='cpu', weights_only=True); "
    "d = next((d[k] for k in ('state_dict', 'model_state_dict', 'model') if k in d), d); "
    "save_file({{k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}}, {new!r})"
)
_FROM_NUMPY = (
    "import numpy as np; from safetensors.numpy import save_file; "
    "save_file({{k: np.ascontiguousarray(v) for k, v in np.load({old!r}).items()}}, {new!r})"
)
_FROM_PARTS = (
    "from safetensors.torch import load_file, save_file; "
    "save_file({{k: v for f in {old!r} for k, v in load_file(f).items()}}, {new!r})"
)


class LazyParams(Mapping[str, Tensor]):
    """A state dict whose tensors are read when they are asked for, and not kept.

    Where ``unwrap``, names are those of the plain network: without the ``module.`` that ``DataParallel`` and
    ``DistributedDataParallel`` put before every name, and without the ``_orig_mod.`` of ``torch.compile``. A tensor
    that ``safetensors.torch.save_model`` left out because another one is the same has its name back.
    """

    def __init__(self, path: Path, *, unwrap: bool = True) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            stored = list(self._file.keys())  # type: ignore[no-untyped-call]
            about = self._file.metadata() or {}  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, ValueError) as error:
            raise RunDirectoryError(f"{path} cannot be read as safetensors: {_reason(path, error)}") from error
        names = {name: name for name in stored}
        names |= {other: kept for other, kept in about.items() if kept in names and other not in names}
        self._names = _plain(names, path) if unwrap else names
        for name in stored:
            kind = self._file.get_slice(name).get_dtype()  # type: ignore[no-untyped-call]
            if kind.startswith(("F8_", "F6_", "F4", "C")):
                raise RunDirectoryError(
                    f"{path}: tensor {name!r} is {kind}, in which nothing can be averaged; convert it to float32"
                )

    def tie(self, name: str, other: str) -> None:
        """Give the tensor ``other`` the second name ``name``: many tools write a shared tensor once only."""
        self._names[name] = self._names[other]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name])  # type: ignore[no-untyped-call]
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@checked
def open_params(path: str | Path, *, unwrap: bool = True) -> LazyParams:
    """The state dict in a safetensors file, left on the disk: any function here takes it as it takes a dict.

    Args:
        path: The file. No pickle is ever read: of a ``.pt`` file the error says how it is converted.
        unwrap: Whether ``module.`` before every name and ``_orig_mod.`` anywhere are taken off; see
            :class:`LazyParams`.

    Raises:
        RunDirectoryError: A file that is not there or is no safetensors; says what it is and what to do.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> safetensors.torch.save_file({"module.w": torch.zeros(2)}, path)  # as DataParallel names it
        >>> list(fm.open_params(path))
        ['w']
    """
    return LazyParams(Path(path), unwrap=unwrap)


def _plain(names: Mapping[str, str], path: Path) -> dict[str, str]:
    """Plain name -> stored name."""
    plain = {name: _COMPILED.sub(r"\1", name) for name in names}
    while plain and all(name.startswith(_WRAPPER) or name == _AVERAGED for name in plain.values()):
        plain = {name: new.removeprefix(_WRAPPER) for name, new in plain.items() if new != _AVERAGED}
    found: dict[str, str] = {}
    for name, new in plain.items():
        if new in found:
            raise RunDirectoryError(f"{path}: {name!r} and {found[new]!r} are both {new!r}; take one of them out")
        found[new] = names[name]
    return found


def _reason(path: Path, error: Exception) -> str:
    """What ``path`` is instead, and how it becomes a safetensors file."""
    if wrong := mistaken(path):
        return wrong
    with path.open("rb") as file:
        head = file.read(16)
    new = str(path.with_suffix(".safetensors"))
    if path.suffix == ".json":
        return _parts(path, new)
    size, header = path.stat().st_size, int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 10**8:
        return f"it is cut short or damaged, {size} bytes are left ({error}); copy or download it again"
    if path.suffix in (".npz", ".npy") or head.startswith(b"\x93NUMPY"):
        return _do("it holds NumPy arrays", _FROM_NUMPY.format(old=str(path), new=new))
    if path.suffix in _PICKLES or head.startswith((b"PK", b"\x80")):
        said = "it is a pickle, which can run any code and is never read here"
        return _do(said, _FROM_TORCH.format(old=str(path), new=new))
    if head.startswith(b"\x89HDF") or path.suffix in _OTHERS:
        return (
            f"it is another format ({path.suffix or 'HDF5'}), with names of its own; load it into the PyTorch network "
            "and write that with safetensors.torch.save_file(network.state_dict(), ...)"
        )
    return f"{error}; write it with safetensors.torch.save_file(network.state_dict(), ...)"


def _do(what: str, code: str) -> str:
    return f'{what}; convert it: python -c "{code}"'


def _parts(index: Path, new: str) -> str:
    try:
        parts = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        files = [str(index.with_name(part)) for part in parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it is JSON text; give the file with the tensors"
    return _do(f"it is the index of {len(parts)} parts, to be one file", _FROM_PARTS.format(old=files, new=new))
