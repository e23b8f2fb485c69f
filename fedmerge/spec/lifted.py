"""A network run in float64, whatever precision it casts to, makes new tensors in or was given its constants in."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128} | {
    dtype: torch.float64 for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
}


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in double precision if it is of floating-point or complex numbers; else itself."""
    dtype = _WIDE.get(tensor.dtype, tensor.dtype)
    return tensor if dtype is tensor.dtype else tensor.to(dtype)


class Lifted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, every operator takes and gives float64 for all floating-point numbers, complex128 for complex.

    A cast to a lower precision then loses nothing, so that two orders of one sum agree as well behind it as
    without it, and tensors of different precision meet without an error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on what it was given, widened."""
        if func is torch.ops.aten.view.dtype and (args[0].is_floating_point() or args[0].is_complex()):
            raise TypeError("the bits of floating-point numbers are read, which differ between precisions")
        result = func(*_widened(args), **{key: _widened(value) for key, value in (kwargs or {}).items()})
        return result if _keeps(result) else _widened(result)


def _widened(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_widened(entry) for entry in value)
    if isinstance(value, Tensor):
        return wide(value)
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _keeps(result: Any) -> bool:
    """Whether ``result`` is what it should be already: it is then passed on as the same object."""
    entries = result if isinstance(result, (tuple, list)) else (result,)
    return all(_WIDE.get(entry.dtype, entry.dtype) is entry.dtype for entry in entries if isinstance(entry, Tensor))
