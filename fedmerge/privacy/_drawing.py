"""Images that are drawn for a network: from noise, by the gradient of an objective, in the box of valid pixels."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge._check import check_number
from fedmerge._forward import scores
from fedmerge._loading import load
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError
from fedmerge.progress import counted


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an inversion gives; what it is worth says :func:`quality`.

    Attributes:
        images: Float32 ``(n, C, H, W)``, pixels in [0, 1], on the CPU.
        labels: Int64 ``(n,)``, the class of each.
        objective: What was lowered, of these images.

    Example:
        >>> from fedmerge.privacy import Reconstruction
        >>> found = Reconstruction(torch.zeros(1, 3, 8, 8), torch.tensor([4]), objective=0.01)
        >>> found.images.shape, found.labels.tolist()
        (torch.Size([1, 3, 8, 8]), [4])
    """

    images: Tensor
    labels: Tensor
    objective: float


class Canvas:
    """Images that are being drawn for a network.

    Attributes:
        network: A copy that holds the parameters, in eval mode and float32.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], data: Images, device: torch.device | str
    ) -> None:
        if type(data) is not Images or data.loss is not None:
            raise DataError(f"{data.name} holds no labelled images of uint8 pixels; give fm.data.Images")
        self.data, self.device = data, torch.device(device)
        self.network = load(model, params, device).float()
        blank = torch.zeros(1, *data.shape, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            scores(self.network, data, blank, labelled=True)
        self.low, self.high = (
            data.normalise(torch.full_like(blank, value)).expand(1, *data.shape) for value in (0, 255)
        )

    def labels(self, given: Tensor, count: int) -> Tensor:
        """``given`` on the device, refused where they are not ``count`` classes."""
        if given.dtype != torch.int64 or given.shape != (count,) or not count:
            raise DataError(
                f"labels are {given.dtype} {tuple(given.shape)}; expected int64 ({count or 'n'},), a class an image"
            )
        wrong = (given < 0) | (given >= len(self.data.classes))
        if bool(wrong.any()):
            raise DataError(
                f"label {int(given[wrong][0])} names none of the {len(self.data.classes)} classes of {self.data.name}"
            )
        return given.to(self.device)

    def drawn(
        self, objective: Callable[[Tensor], Tensor], labels: Tensor, *, total_variation: float, iterations: int,
        rate: float, restarts: int, generator: torch.Generator,
    ) -> Reconstruction:  # fmt: skip
        """The images that make ``objective`` of normalised pixels low, and the prior."""
        for what, given, least in (
            ("iterations", iterations, 1), ("rate", rate, 0), ("total_variation", total_variation, 0),
        ):  # fmt: skip
            check_number(what, given, least)

        def lowered(x: Tensor) -> Tensor:
            return objective(x) + total_variation * _variation(x)

        best, lowest = None, torch.inf
        with counted("inverting", restarts * iterations) as advance:
            for _ in range(restarts):
                x = torch.randn(len(labels), *self.data.shape, generator=generator).to(self.device).requires_grad_()
                optimizer = torch.optim.Adam([x], lr=rate)
                falls = [int(share * iterations) for share in (3 / 8, 5 / 8, 7 / 8)]
                schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
                for _ in range(iterations):
                    x.grad = gradient(lowered(x), [x], again=False)[0].sign()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        x.copy_(torch.maximum(torch.minimum(x, self.high), self.low))
                    advance(1)
                if (reached := float(lowered(x).detach())) < lowest:
                    best, lowest = x.detach(), reached
        if best is None:
            raise ConfigError(
                "the objective of the inversion is not a finite number; give a recipe by which this network learns, "
                "or parameters that training left finite"
            )
        shares = (best - self.low) / (self.high - self.low)
        return Reconstruction(shares.clamp(0, 1).cpu(), labels.cpu(), lowest)


def gradient(value: Tensor, of: Iterable[Tensor], *, again: bool) -> list[Tensor]:
    """The gradient of ``value``; ``again`` if it is itself to be differentiated."""
    try:
        return list(torch.autograd.grad(value, list(of), create_graph=again, materialize_grads=True))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ParamsError(
            f"this network has no {'gradient' if again else 'second derivative'}, which inversion needs: "
            f"{' '.join(str(error).split())}"
        ) from error


def _variation(x: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels; of one pixel, 0."""
    across, down = (x[..., 1:] - x[..., :-1]).abs(), (x[..., 1:, :] - x[..., :-1, :]).abs()
    return (across.sum() + down.sum()) / max(1, across.numel() + down.numel())
