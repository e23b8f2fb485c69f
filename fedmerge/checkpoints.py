"""State dicts that stay on the disk: memory-mapped safetensors or PyTorch files, read a tensor at a time."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge.errors import RunDirectoryError
from fedmerge.files import mistaken, read_text

_WRAPPERS, _AVERAGED = ("module.", "_module."), "n_averaged"
_INNER = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".tar")
_OTHERS = (".gguf", ".h5", ".hdf5", ".index", ".keras", ".mlmodel", ".msgpack", ".onnx", ".pb", ".tflite")
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict
_Reads = dict[str, Callable[[], Tensor]]  # stored name -> what reads the tensor
_FROM_NUMPY = (
    "import numpy as np; from safetensors.numpy import save_file; "
    "save_file({{k: np.ascontiguousarray(v) for k, v in np.load({old!r}).items()}}, {new!r})"
)


class LazyParams(Mapping[str, Tensor]):
    """A state dict whose tensors are read when they are asked for, and not kept.

    Where ``unwrap``, names are those of the plain network: without the ``module.`` that ``DataParallel`` and
    ``DistributedDataParallel`` put before every name, or the ``_module.`` of Opacus, and without what
    ``torch.compile``, FSDP and checkpointed activations put into them (``_orig_mod.``, ``_fsdp_wrapped_module.``). A
    tensor that ``safetensors.torch.save_model`` left out because another one is the same has its name back.
    """

    def __init__(self, path: Path, *, unwrap: bool = True) -> None:
        self.path = path
        self._reads, about = _stored(path)
        names = {name: name for name in self._reads}
        names |= {other: kept for other, kept in about.items() if kept in names and other not in names}
        self._names = _plain(names, path) if unwrap else names

    def tie(self, name: str, other: str) -> None:
        """Give the tensor ``other`` the second name ``name``: many tools write a shared tensor once only."""
        self._names[name] = self._names[other]

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[self._names[name]]()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@checked
def open_params(path: str | Path, *, unwrap: bool = True) -> LazyParams:
    """The state dict in a file, left on the disk: any function here takes it as it takes a dict.

    Args:
        path: A safetensors file; the index of a sharded checkpoint (``model.safetensors.index.json``), as Hugging Face
            writes it beside its parts; or what ``torch.save`` wrote, the state dict itself or a dict with it under
            ``state_dict``, ``model_state_dict`` or ``model``. The latter is read with ``weights_only=True``: no code
            in a pickle is ever run.
        unwrap: Whether what wrappers put before names (``module.``, ``_orig_mod.``) is taken off; see
            :class:`LazyParams`.

    Raises:
        RunDirectoryError: A file that is not there or holds no state dict; says what it is and what to do.

    Example:
        >>> import tempfile, torch, fedmerge as fm
        >>> path = tempfile.mkdtemp() + "/net.pt"
        >>> torch.save({"state_dict": {"module.weight": torch.ones(2)}, "epoch": 3}, path)
        >>> dict(fm.open_params(path))
        {'weight': tensor([1., 1.])}
    """
    return LazyParams(Path(path), unwrap=unwrap)


def _stored(path: Path) -> tuple[_Reads, dict[str, str]]:
    """What reads each tensor of ``path``, by its stored name, and other names that its metadata give to them."""
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())  # type: ignore[no-untyped-call]
        about = file.metadata() or {}  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError, ValueError) as error:
        if _is_pickle(path):
            return _from_torch(path), {}
        if parts := _parts(path):
            return _from_parts(path, parts)
        raise RunDirectoryError(f"{path} cannot be read as safetensors: {_reason(path, error)}") from error
    for name in names:
        kind = file.get_slice(name).get_dtype()  # type: ignore[no-untyped-call]
        if kind.startswith(("F8_", "F6_", "F4", "C")):
            raise _unaveraged(path, name, kind)
    return {name: partial(file.get_tensor, name) for name in names}, about


def _is_pickle(path: Path) -> bool:
    if mistaken(path) or path.suffix in (".npz", ".npy", *_OTHERS):
        return False
    with path.open("rb") as file:
        return path.suffix in _PICKLES or file.read(3).startswith((b"PK", b"\x80\x02\x8a"))  # the latter before 1.6


def _from_torch(path: Path) -> _Reads:
    """The tensors that ``torch.save`` wrote; zip archives, which it writes since PyTorch 1.6, stay on the disk."""
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a pickle can be wrong in
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"would run code ({code[1]})" if code else f"is damaged or holds code ({type(error).__name__})"
        raise RunDirectoryError(
            f"{path} cannot be read: it is a pickle that {why}, and only tensors are read; where it was made, write "
            "torch.save(network.state_dict(), ...)"
        ) from error
    while isinstance(held, Mapping) and (key := next((k for k in _INSIDE if isinstance(held.get(k), Mapping)), None)):
        held = held[key]
    tensors = {k: v for k, v in held.items() if torch.is_tensor(v)} if isinstance(held, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        keys = f"a dict with {', '.join(map(repr, list(held)[:4]))}" if isinstance(held, Mapping) else "no dict"
        raise RunDirectoryError(
            f"{path} cannot be read: it holds {keys}; expected tensors by name, as torch.save(network.state_dict(), "
            f"...) writes them, or a dict with them under {', '.join(map(repr, _INSIDE))}"
        )
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() == 1):
            raise _unaveraged(path, name, str(tensor.dtype).removeprefix("torch."))
    # A copy, as safetensors gives one: what a caller does to it is not what the next caller reads.
    return {name: partial(_copy, tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _parts(index: Path) -> dict[str, str]:
    """Tensor name -> file beside ``index``; empty where that is no index of parts."""
    try:
        found = json.loads(read_text(index))["weight_map"] if index.suffix == ".json" else {}
        return {name: index.with_name(part).name for name, part in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _from_parts(index: Path, parts: Mapping[str, str]) -> tuple[_Reads, dict[str, str]]:
    """The tensors that ``index`` names, each out of its part."""
    if nested := [part for part in parts.values() if part.endswith(".json")]:
        raise RunDirectoryError(f"{index} names {nested[0]}, an index, as a part; download it again")
    opened = {part: _stored(index.with_name(part)) for part in sorted(set(parts.values()))}
    for name, part in parts.items():
        if name not in opened[part][0]:
            raise RunDirectoryError(
                f"{index} says that {name!r} is in {part}, which lacks it; copy or download both again"
            )
    about = {other: kept for _, more in opened.values() for other, kept in more.items()}
    return {name: opened[part][0][name] for name, part in parts.items()}, about


def _unaveraged(path: Path, name: str, kind: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path}: tensor {name!r} is {kind}, in which nothing can be averaged; convert it to float32"
    )


def _plain(names: Mapping[str, str], path: Path) -> dict[str, str]:
    """Plain name -> stored name."""
    plain = {name: _INNER.sub(r"\1", name) for name in names}
    while wrapper := next((w for w in _WRAPPERS if _before_all(w, plain.values())), None):
        plain = {name: new.removeprefix(wrapper) for name, new in plain.items() if new != _AVERAGED}
    found: dict[str, str] = {}
    for name, new in plain.items():
        if new in found:
            raise RunDirectoryError(f"{path}: {name!r} and {found[new]!r} are both {new!r}; take one of them out")
        found[new] = names[name]
    return found


def _before_all(wrapper: str, names: Collection[str]) -> bool:
    """Whether all tensors of a network are called so; a count of averages beside them is none of it."""
    return any(name.startswith(wrapper) for name in names) and all(
        name.startswith(wrapper) or name == _AVERAGED for name in names
    )


def _reason(path: Path, error: Exception) -> str:
    """What ``path`` is instead, and how it becomes a safetensors file."""
    if wrong := mistaken(path):
        return wrong
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix == ".json":
        return "it is JSON text; give the file with the tensors"
    size, header = path.stat().st_size, int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 10**8:
        return f"it is cut short or damaged, {size} bytes are left ({error}); copy or download it again"
    if path.suffix in (".npz", ".npy") or head.startswith(b"\x93NUMPY"):
        code = _FROM_NUMPY.format(old=str(path), new=str(path.with_suffix(".safetensors")))
        return f'it holds NumPy arrays; convert it: python -c "{code}"'
    if head.startswith(b"\x89HDF") or path.suffix in _OTHERS:
        return (
            f"it is another format ({path.suffix or 'HDF5'}), with names of its own; load it into the PyTorch network "
            "and write that with safetensors.torch.save_file(network.state_dict(), ...)"
        )
    return f"{error}; write it with safetensors.torch.save_file(network.state_dict(), ...)"
