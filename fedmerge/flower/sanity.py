"""What a network that came back must look like beside the one that was sent, so that one client cannot spoil the rest.

A reply may be well formed, finite and absurd: 1e38 in one weight makes the mean of all clients useless, and overflows
where a server squares or correlates. Against clients that are wrong on purpose and by less there are robust strategies
(Krum, Bulyan, medians); these are the bounds that no training reaches:

* a trained number is at most 1e3 times as large as the largest that was sent, or as 1; one of a buffer, such as a
  running variance, 1e12 times;
* the root mean square of the trained numbers is at most 100 times that of the network sent, or of the initial network
  (or of 0.01), whichever is largest: a mean of unlike networks is smaller than each of them;
* a counter lies between 0, or what was sent, and 2**40 above what was sent;
* a running variance is not negative;
* on some public images, with the statistics of those images in the normalisation layers, as in training, every layer
  gives finite values below 1e9. With its own statistics an honest network may give far more after a few steps, for they
  lag behind; so those values need only be finite, and only where the server measures activations.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedmerge._copies import duplicate
from fedmerge.data import Images
from fedmerge.errors import RoundError
from fedmerge.flower.arrays import UnusableError, read_array

_TRAINED, _BUFFER, _COUNT = 1e3, 1e12, 2**40
_SPREAD, _SMALLEST = 100.0, 0.01
_ACTIVATION = 1e9
_IMAGES = 8


class Probe:
    """Runs networks of one architecture on a few images, to see whether they compute anything.

    Args:
        model: The architecture with its initial weights; not modified.
        images: The public split, of which the first are taken.
        device: Where to compute.
        measured: Whether the server measures activations with the networks' own statistics.
    """

    def __init__(self, model: nn.Module, images: Images, device: str = "cpu", *, measured: bool = False) -> None:
        self._module = duplicate(model).to(device).eval()
        shown = images.images[:_IMAGES]
        self._input, self._count = images.normalise(shown.to(device)), len(shown)
        self._measured = measured
        self.size = _rms(p.detach() for p in model.parameters())
        self._most, self._worst = _ACTIVATION, ("", 0.0)
        named = dict(self._module.named_modules())
        self._norms = {name: layer for name, layer in named.items() if isinstance(layer, _NormBase)}
        for name, layer in named.items():
            if not list(layer.children()):
                layer.register_forward_hook(self._looking_at(name))

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Refuse the network ``params`` if it cannot be run, or gives values that nobody can compute with.

        Raises:
            UnusableError: Names the layer.
        """
        for name in self._norms:
            variance = params.get(f"{name}.running_var")
            if variance is not None and bool((variance < 0).any()):
                raise UnusableError(f"layer {name!r} of its network has a negative variance")
        if self._count > 1 or not self._norms:  # one image has no statistics
            self._run(params, as_trained=True)
        if self._measured:
            self._run(params, as_trained=False)

    def _run(self, params: Mapping[str, Tensor], *, as_trained: bool) -> None:
        """One pass, with the statistics of the images or with the network's own."""
        self._most, self._worst = _ACTIVATION if as_trained else float("inf"), ("", 0.0)
        try:
            for name, tensor in self._module.state_dict().items():
                if isinstance(tensor, Tensor):
                    tensor.copy_(params[name])  # unlike load_state_dict, which asks some modules for their version
            for norm in self._norms.values():
                norm.train(as_trained)
            with torch.inference_mode():
                self._look("", self._module(self._input))
        except Exception as error:
            raise UnusableError(f"its network does not run ({type(error).__name__}: {error})") from error
        layer, value = self._worst
        if not value < self._most:
            where = f"layer {layer!r} of its network" if layer else "its network"
            raise UnusableError(f"{where} gives {value:.3g} on public images; expected below {self._most:g}")

    def _looking_at(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, output: self._look(name, output)

    def _look(self, name: str, output: Any) -> None:
        """Note the first layer whose output is too large; layers come in the order of the computation."""
        for value in output if isinstance(output, (tuple, list)) else [output]:
            if (
                self._worst[1] < self._most
                and isinstance(value, Tensor)
                and value.is_floating_point()
                and value.numel()
            ):
                largest = float(value.abs().max())  # NaN if one is
                if not largest < self._most:
                    self._worst = (name, largest)


class Expected:
    """What a usable answer to ``sent`` consists of.

    Args:
        sent: The global network that clients were sent.
        parameters: Names of its trained tensors; the others are buffers.
        probe: Runs the answer; without it only its numbers are looked at.
    """

    def __init__(self, sent: ArrayRecord, parameters: frozenset[str], probe: Probe | None = None) -> None:
        self._like = {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in sent.items()}
        self._parameters, self._probe = parameters, probe
        self._counts: dict[str, tuple[int, int]] = {}
        largest = {True: 1.0, False: 1.0}
        network = {name: array.numpy() for name, array in sent.items()}
        for name, values in network.items():
            if values.dtype.kind == "f":
                trained = name in parameters
                largest[trained] = max(largest[trained], float(np.abs(values).max(initial=0.0)))
            elif values.dtype.kind in "iu" and values.size:
                self._counts[name] = min(0, int(values.min())), int(values.max()) + _COUNT
        self._largest = {True: _TRAINED * largest[True], False: _BUFFER * largest[False]}
        size = _rms(torch.from_numpy(values) for name, values in network.items() if name in parameters)
        self._size = _SPREAD * max(_SMALLEST, size, probe.size if probe is not None else 0.0)

    def network(self, given: ArrayRecord) -> dict[str, Tensor]:
        """The network in ``given``, in the order in which the tensors were sent.

        Raises:
            UnusableError: Says what is wrong with it.
        """
        missing, extra = sorted(set(self._like) - set(given)), sorted(set(given) - set(self._like))
        if missing or extra:
            raise UnusableError(f"tensor {missing[0]!r} is missing" if missing else f"tensor {extra[0]!r} is not known")
        params = {}
        for name, (shape, dtype) in self._like.items():
            params[name] = read_array(name, given[name], shape=shape, dtype=dtype)
            self._bounded(name, params[name])
        size = _rms(tensor for name, tensor in params.items() if name in self._parameters)
        if not size <= self._size:
            raise UnusableError(
                f"the root mean square of its weights is {size:.3g}; expected at most {self._size:.3g}, {_SPREAD:g} "
                "times that of the network it was sent or of the initial one"
            )
        if self._probe is not None:
            self._probe.check(params)
        return params

    def _bounded(self, name: str, tensor: Tensor) -> None:
        """Refuse numbers that no training reaches."""
        if not tensor.numel():
            return
        values = tensor.numpy()
        if tensor.is_floating_point():
            largest, most = float(np.abs(values).max()), self._largest[name in self._parameters]
            if largest > most:
                raise UnusableError(f"tensor {name!r} holds {largest:.3g}; expected at most {most:.3g}")
        elif name in self._counts:
            low, high = self._counts[name]
            for value in (int(values.min()), int(values.max())):
                if not low <= value <= high:
                    raise UnusableError(f"tensor {name!r} holds {value}; expected {low} to {high}")


def check_made(params: Mapping[str, Tensor], what: str, *, of: int) -> None:
    """Refuse a network that ``what`` made ``of`` so many finite ones, if it is not finite itself.

    Raises:
        RoundError: Names the tensor.
    """
    for name, tensor in params.items():
        if not bool(tensor.isfinite().all()):
            raise RoundError(
                f"{what} made NaN or infinite values in tensor {name!r} of {of} finite networks; choose smaller steps "
                "of the server"
            )


def _rms(tensors: Iterable[Tensor]) -> float:
    """Root mean square over all numbers of the floating tensors."""
    total, count = 0.0, 0
    for tensor in tensors:
        if tensor.is_floating_point():
            total, count = total + float(tensor.double().square().sum()), count + tensor.numel()
    return math.sqrt(total / count) if count else 0.0
