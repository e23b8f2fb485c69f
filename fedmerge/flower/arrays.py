"""An array of a reply, read without believing its header: nothing is unpickled, or allocated on its word."""

import io
import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.lib import format as npy
from torch import Tensor

_STYPE = "numpy.ndarray"
_HEADER = 10_000
"""The longest header, in bytes, that numpy itself would parse."""
_WIDEST = 8
"""Bytes of the widest number that is read: float64 and int64. Extended precision is nobody's exchange format."""


class UnusableError(Exception):
    """What is wrong with a reply. It becomes a failure of that client and leaves this package never."""


def read_array(name: str, given: Any, *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """The tensor in ``given``, which came from a client, as ``dtype`` and contiguous.

    The header must announce exactly ``shape``, and the bytes must be exactly as many as it announces, so a header of
    terabytes is refused by comparing numbers. Numbers of another width or byte order than ``dtype`` are converted if
    they are of its kind: float16 and float64 where float32 was sent, int32 where int64 was. Where a value does not fit
    into ``dtype``, the array is refused, as are long double, complex, booleans, objects and records.

    Raises:
        UnusableError: Says what is wrong.
    """
    if not isinstance(given, Array):
        raise UnusableError(f"tensor {name!r} is a {type(given).__name__}, expected an array")
    if given.stype != _STYPE:
        raise UnusableError(f"tensor {name!r} is serialised as {str(given.stype)[:40]!r}, expected {_STYPE!r}")
    data = given.data
    if not isinstance(data, bytes):
        raise UnusableError(f"tensor {name!r} holds a {type(data).__name__}, expected bytes")
    count = math.prod(shape)
    if len(data) > _HEADER + count * _WIDEST:
        raise UnusableError(f"tensor {name!r} takes {len(data)} bytes, too many for shape {shape}")
    try:
        announced, fortran, found, start = _header(data)
    except Exception as error:
        raise UnusableError(f"tensor {name!r} is no array in numpy's format: {error}") from error
    if announced != shape or tuple(given.shape) != shape:
        raise UnusableError(
            f"tensor {name!r} has shape {announced if announced != shape else given.shape}, expected {shape}"
        )
    if found.kind != dtype.kind or found.itemsize > _WIDEST or found.shape:
        raise UnusableError(f"tensor {name!r} is {found}, expected {dtype}")
    if len(data) - start != count * found.itemsize:
        raise UnusableError(f"tensor {name!r} holds {len(data) - start} bytes, expected {count * found.itemsize}")
    values = np.frombuffer(data, found, count, start).reshape(shape, order="F" if fortran else "C")
    with np.errstate(all="ignore"):  # what does not fit is named below
        converted = values.astype(dtype, order="C")
    if dtype.kind in "fc" and not np.isfinite(converted).all():
        infinite = "holds NaN or infinite values" if not np.isfinite(values).all() else f"does not fit {dtype}"
        raise UnusableError(f"tensor {name!r} {infinite}")
    if dtype.kind not in "fc" and not np.array_equal(converted, values):
        raise UnusableError(f"tensor {name!r} does not fit {dtype}")
    return torch.from_numpy(converted)


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, dtype, and where the numbers begin."""
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version}")
    shape, fortran, dtype = readers[version](stream, max_header_size=_HEADER)
    return shape, fortran, dtype, stream.tell()
