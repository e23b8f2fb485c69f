"""The statistics that normalisation layers have on a whole data set, measured piece by piece.

Norms see each other's output, so their statistics on a data set are those of one batch of all images, in which every
norm normalises by what it sees. Here the images pass in pieces that wait for each other at every norm, until it is
known what all of them together show it. The result does not depend on how the images divide.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fedmerge._forward import answer
from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError
from fedmerge.memory import usable_memory
from fedmerge.progress import steps


@dataclass(frozen=True)
class _Seen:
    """What one call of a norm sees: of one piece, or of all.

    Attributes:
        key: Identity of its running mean; None if it keeps no statistics.
        count: Values a channel; for an instance norm, images.
        mean: Float64, a number a channel.
        variance: The same; BatchNorm's is that around ``mean``, an instance norm's the images' mean of their own.
        instances: Whether it is an instance norm.
    """

    key: int | None
    count: int
    mean: Tensor
    variance: Tensor
    instances: bool


class _Dropped(BaseException):
    """Ends a piece that waits."""


def measure_norms(network: nn.Module, data: Images, *, batch_size: int, device: torch.device | str) -> None:
    """Set the running statistics of all norms of ``network``, which is in eval mode, to those on all of ``data``.

    They are what one batch of all images leaves in training mode with cumulative statistics (``momentum=None``): for
    BatchNorm the mean and the unbiased variance over all values of a channel, for InstanceNorm the mean over images of
    either; of a norm that is called several times, the mean over its calls. All else rests as in eval mode. A norm
    that is not called keeps what it has.

    Args:
        network: Modified in place.
        data: The images.
        batch_size: Images a piece; it changes nothing but round-off.
        device: Where ``network`` is.

    Raises:
        DataError: No images, so few that a variance does not exist, or images that the network does not take.
        ParamsError: The norms that are called, or their order, depend on the images; or a norm of the network's own
            does not normalise by torch's functions.

    Cost: one forward pass, which holds what waits at a norm: a piece of all images. Pieces that do not fit into half
    of the free memory run again, up to the next norm each time.
    """
    norms = _tracked(network)
    if not norms and not any(isinstance(layer, _NormBase) for layer in network.modules()):
        return
    if not len(data):
        raise DataError(f"{data.name} holds no images; normalisation statistics are measured on at least one")
    known: list[_Seen] = []
    crowded = _crowded(device)
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for layers in norms.values()
        for name, layer in layers.items()
    ]
    pieces = [
        _Piece(partial(_pass, network, data, part, device), known, set(norms))
        for part in torch.split(data.images, batch_size)
    ]
    try:
        while True:
            seen = []
            for piece in steps(f"measuring norm {len(known) + 1}", pieces):
                seen.append(piece.step())
                if seen[0] is None:
                    break
                if crowded():
                    piece.drop()
            if seen[0] is None:
                break
            known.append(_together(seen, norms, data))
    finally:
        for piece in pieces:
            piece.drop()
        for hook in hooks:
            hook.remove()
    calls = Counter(seen.key for seen in known)
    for key, layers in norms.items():
        if not calls[key]:
            if alone := sorted(called & layers.keys()):
                raise ParamsError(
                    f"norm {alone[0]!r}, a {type(layers[alone[0]]).__name__}, does not normalise by torch's batch_norm "
                    "or instance_norm, so what statistics it should have cannot be seen; let it call F.batch_norm, or "
                    "repair by 'none'"
                )
            continue
        mine = [seen for seen in known if seen.key == key]
        mean = torch.stack([seen.mean for seen in mine]).mean(0)
        variance = torch.stack(
            [seen.variance if seen.instances else seen.variance * (seen.count / (seen.count - 1)) for seen in mine]
        ).mean(0)
        for layer in layers.values():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
            if layer.num_batches_tracked is not None and not mine[0].instances:
                layer.num_batches_tracked.fill_(len(mine))


def _pass(network: nn.Module, data: Images, part: Tensor, device: torch.device | str) -> None:
    answer(network, data, part.to(device))


def _tracked(network: nn.Module) -> dict[int, dict[str, _NormBase]]:
    """Identity of a running mean -> the layers that keep it, by name: several where it is tied."""
    found: dict[int, dict[str, _NormBase]] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            found.setdefault(id(layer.running_mean), {})[name] = layer
    return found


def _together(seen: Sequence[_Seen | None], norms: dict[int, dict[str, _NormBase]], data: Images) -> _Seen:
    """What all pieces together show a norm."""
    parts = [part for part in seen if part is not None]
    first = parts[0]
    if len(parts) < len(seen) or any((p.key, p.instances) != (first.key, first.instances) for p in parts):
        raise ParamsError(
            "which norms this network calls depends on the images, so their statistics cannot be measured in parts; "
            "repair it by 'none', or on at most as many images as one batch holds"
        )
    shares = torch.tensor([p.count for p in parts], dtype=torch.float64, device=first.mean.device)
    count = int(shares.sum())
    if count < 2 and not first.instances:
        name = f"norm {next(iter(norms[first.key]))!r}" if first.key in norms else "a norm without running statistics"
        raise DataError(
            f"{name} sees one value a channel on the {len(data)} images of {data.name}, which has no variance; "
            "give more images"
        )
    shares = (shares / count)[:, None]
    means = torch.stack([p.mean for p in parts])
    mean = (shares * means).sum(0)
    spread = 0.0 if first.instances else (means - mean).square()
    variance = (shares * (torch.stack([p.variance for p in parts]) + spread)).sum(0)
    return _Seen(first.key, count, mean, variance, first.instances)


def _crowded(device: torch.device | str) -> Callable[[], bool]:
    """Whether less than half of the memory is free that is free now."""

    def free() -> int:
        if torch.device(device).type != "cuda":
            return usable_memory()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused

    least = free() // 2
    return lambda: free() < least


class _Piece:
    """The forward pass of some of the images, in a thread of its own that runs only while :meth:`step` waits for it."""

    def __init__(self, run: Callable[[], None], known: Sequence[_Seen], tracked: set[int]) -> None:
        self.run, self.known, self.tracked = run, known, tracked
        self.thread: threading.Thread | None = None

    def step(self) -> _Seen | None:
        """Run, from the start if need be, to the first call that is not known yet; None if there is none."""
        if self.thread is None:
            self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
            self.calls, self.dropped = 0, False
            self.seen: _Seen | None = None
            self.error: BaseException | None = None
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        else:
            self.turn.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error
        return self.seen

    def drop(self) -> None:
        """Forget where the pass is, and free what it holds."""
        if self.thread is not None:
            self.dropped = True
            self.turn.release()
            self.thread.join()
            self.thread = None

    def wait(self, seen: Callable[[], _Seen]) -> _Seen:
        """Called at each norm: what all pieces together show it."""
        if self.calls == len(self.known):
            self.seen = seen()
            self.back.release()
            self.turn.acquire()
            if self.dropped:
                raise _Dropped
        self.calls += 1
        return self.known[self.calls - 1]

    def _run(self) -> None:
        try:
            with torch.no_grad(), _Norms(self):
                self.run()
            self.seen = None
        except _Dropped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.back.release()


class _Norms(TorchFunctionMode):
    """Where a norm of the network is computed, its piece waits for the others, and normalises by what all have shown.

    It stands at the functions of torch and not at the layers, so that layers derived from them keep what they add.
    """

    def __init__(self, piece: _Piece) -> None:
        super().__init__()
        self.piece = piece

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.batch_norm:
            return self.batch_norm(*args, **given)
        if func is F.instance_norm:
            return self.instance_norm(*args, **given)
        if func in (torch.batch_norm, torch.instance_norm):
            return self._lower(func, *args, **given)
        return func(*args, **given)

    def _lower(
        self, func: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, own: bool, momentum: float, eps: float, cudnn_enabled: bool,
    ) -> Tensor:  # fmt: skip
        """The functions that those of ``F`` call."""
        norm = self.batch_norm if func is torch.batch_norm else self.instance_norm
        return norm(input, running_mean, running_var, weight, bias, own, eps=eps)

    def batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """``F.batch_norm`` by the biased variance of all pieces, as in training."""
        key = id(running_mean) if id(running_mean) in self.piece.tracked else None
        if key is None and not training:  # frozen on purpose
            return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)

        def moments() -> _Seen:
            values = input if input.dtype in (torch.float32, torch.float64) else input.float()
            mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
            return _Seen(key, input.numel() // max(1, input.shape[1]), mean.double(), variance.double(), False)

        seen = self.piece.wait(moments)
        like = running_mean if running_mean is not None else input
        return F.batch_norm(input, seen.mean.to(like), seen.variance.to(like), weight, bias, eps=eps)

    def instance_norm(
        self, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
        weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """``F.instance_norm`` by each image's own statistics, as in training."""
        if id(running_mean) not in self.piece.tracked:
            return F.instance_norm(
                input, running_mean, running_var, weight, bias, use_input_stats=use_input_stats, eps=eps
            )

        def moments() -> _Seen:
            variance, mean = torch.var_mean(input.flatten(2).double(), 2)
            return _Seen(id(running_mean), len(input), mean.mean(0), variance.mean(0), True)

        if input[0, 0].numel() < 2:
            raise DataError(
                "an instance norm with running statistics sees one value a channel and image, which has no variance; "
                "give larger images"
            )
        out = F.instance_norm(input, weight=weight, bias=bias, eps=eps)
        self.piece.wait(moments)
        return out
