"""Images attacked by projected gradient descent (Madry et al., ICLR 2018, arXiv:1706.06083)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge._arguments import checked
from fedmerge._check import check_number
from fedmerge._fit import check_labels
from fedmerge._forward import scores
from fedmerge._loading import load
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError
from fedmerge.progress import steps


@dataclass(frozen=True)
class PGD:
    r"""An attack that moves no pixel by more than ``epsilon``.

    From a random place in the box of :math:`\|\delta\|_\infty \le \epsilon` it climbs the loss of a network by

    .. math:: \delta \leftarrow \Pi\big(\delta + \eta \, \mathrm{sign} \nabla_\delta \mathrm{CE}(y, f(x + \delta))\big),

    where :math:`\Pi` goes back to the nearest image in the box (Madry et al., "Towards Deep Learning Models Resistant
    to Adversarial Attacks", ICLR 2018, arXiv:1706.06083). What it ends at is rounded to whole values: an image like
    any other. A toolbox of attacks would be one more dependency for these ten lines.

    Attributes:
        epsilon: In values of a pixel, 0 to 255.
        steps: How many.
        step: :math:`\eta`, in the same units; 2.5 ``epsilon / steps`` if 0.

    Raises:
        ConfigError: A number outside its range.

    Example:
        >>> fm.PGD(epsilon=8, steps=10).size
        2.0
    """

    epsilon: int
    steps: int = 10
    step: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (("epsilon", 1, 255), ("steps", 1, 10**6)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or not least <= given <= most:
                raise ConfigError(f"{name} of PGD is {given!r}; expected a whole number from {least} to {most}")
        check_number("step of PGD", self.step, 0, 255)

    @property
    def size(self) -> float:
        """Of a step."""
        return self.step or 2.5 * self.epsilon / self.steps

    def check(self, data: Images, *, private: bool = False) -> None:
        """Refuse what cannot be attacked.

        Raises:
            ConfigError: Rows without pixels, answers that are no classes, or a private training.
            DataError: An image without a label.
        """
        if private:
            raise ConfigError("attack= with private=: gradients in an image's pixels have no part in the account")
        if type(data) is not Images or data.loss is not None:
            raise ConfigError(f"PGD moves pixels of images against their class, and {data.name} has other rows")
        check_labels(data)

    def moved(
        self, network: nn.Module, data: Images, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """``images``, uint8 ``(B, C, H, W)`` of ``data``, attacked against ``network`` in the mode that it is in."""
        base, pixels = data.normalise(images), images.float()
        unit = 1 / (255 * torch.tensor(data.std, device=images.device)).view(-1, 1, 1)

        def nearest(delta: Tensor) -> Tensor:
            return (pixels + delta.clamp(-self.epsilon, self.epsilon)).clamp(0, 255) - pixels

        begun = (2 * torch.rand(images.shape, generator=generator) - 1) * self.epsilon
        delta = nearest(begun.to(images.device))
        for _ in range(self.steps):
            delta.requires_grad_()
            logits = scores(network, data, images, labelled=True, batch=base + unit * delta)
            (slope,) = torch.autograd.grad(functional.cross_entropy(logits, labels), delta)
            delta = nearest(delta.detach() + self.size * slope.sign())
        return (pixels + delta).round().to(torch.uint8)


@checked
@torch.inference_mode(False)
@torch.enable_grad()
def attacked(
    model: nn.Module,
    params: Mapping[str, Tensor],
    data: Images,
    *,
    attack: PGD,
    generator: torch.Generator | None = None,
    batch_size: int = 500,
    device: str = "cpu",
) -> Images:
    """What ``attack`` makes of ``data`` against the state dict ``params``, in eval mode; evaluate it for robustness.

    Args:
        model: The architecture; not modified.
        params: What is attacked.
        data: Images and labels.
        attack: How.
        generator: A CPU generator, of the start; the same start in every call if None.
        batch_size: Images of a pass.
        device: Where to compute.

    Raises:
        ConfigError: Rows without pixels.
        DataError: There are no images, one has no label, or the network does not take them.
        ParamsError: ``params`` is not a state dict of ``model``.

    Cost: ``attack.steps`` forward and backward passes over ``data``.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(200))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> moved = fm.attacked(model, model.state_dict(), digits, attack=fm.PGD(epsilon=8))
        >>> (moved.images.int() - digits.images.int()).abs().max().item()
        8
    """
    attack.check(data)
    if not len(data):
        raise DataError(f"{data.name} holds no images; nothing to attack")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    module, given = load(model, params, device).requires_grad_(False), data.to(device)
    parts = zip(torch.split(given.images, batch_size), torch.split(given.labels, batch_size), strict=True)
    told = steps("attacking", parts, -(-len(data) // batch_size))
    moved = [attack.moved(module, data, images, labels, generator) for images, labels in told]
    return replace(data, images=torch.cat(moved).to(data.images.device))
