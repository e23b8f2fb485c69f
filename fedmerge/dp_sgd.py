r"""Training under differential privacy: DP-SGD and what it has spent, both by Opacus.

A step takes each image with the same probability (Poisson sampling), clips the gradient of each image to a norm, adds
them up and adds Gaussian noise: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133.
Two training sets that differ in one image then give networks that nobody can tell apart beyond :math:`(\epsilon,
\delta)`, whatever is done with the networks afterwards: aligning, merging, repairing and retraining on public data
spend nothing.

Opacus (Yousefpour et al., 2021, arXiv:2109.12298) computes the gradients and the accounts; ``pip install
"fedmerge[privacy]"``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from fedmerge.clipping import Blurred, Once, blurred, load_opacus, quiet
from fedmerge.errors import ConfigError

_ACCOUNTANT = "rdp"
_LARGEST_NOISE = 1e3


@dataclass(frozen=True)
class DPSGD:
    r"""How gradients are clipped and blurred.

    Attributes:
        noise_multiplier: Standard deviation of the noise on the sum of the clipped gradients, in units of
            ``max_grad_norm``. 0 clips only, and protects nothing.
        max_grad_norm: The L2 norm, over all trained parameters, to which the gradient of one image is clipped.

    Raises:
        ConfigError: A number outside its range.

    Example:
        >>> private = fm.DPSGD.for_epsilon(4.0, images=1000, batch_size=50, epochs=10, delta=1e-4)
        >>> 0.8 < private.noise_multiplier < 1.2
        True
        >>> private.epsilon(images=1000, batch_size=50, epochs=10, delta=1e-4) <= 4.0
        True
    """

    noise_multiplier: float
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier}; expected 0 or a positive number")
        if not 0 < self.max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm is {self.max_grad_norm}; expected a positive number")

    @classmethod
    def for_epsilon(
        cls, epsilon: float, *, images: int, batch_size: int, epochs: int, delta: float, max_grad_norm: float = 1.0
    ) -> "DPSGD":
        r"""The least noise with which all of that training stays within :math:`(\epsilon, \delta)`.

        Args:
            epsilon: What may be spent in all.
            images: Size of the training set.
            batch_size: Images of a step on average; as :func:`fedmerge.train` cuts an epoch, at most.
            epochs: Passes over the training set in all, in every round together.
            delta: Probability with which the promise may fail; below 1 / ``images``.
            max_grad_norm: As above.

        Raises:
            ConfigError: A number outside its range, or an epsilon that no noise up to 1,000 reaches.
        """
        if not 0 < epsilon < math.inf:
            raise ConfigError(f"epsilon is {epsilon}; expected a positive number (1 protects well, 8 hardly)")
        rate, steps = _schedule(images, batch_size, epochs, delta)
        if not steps:
            return cls(0.0, max_grad_norm)
        return cls(_least_noise(epsilon, rate, steps, delta), max_grad_norm)

    def epsilon(self, *, images: int, batch_size: int, epochs: int, delta: float) -> float:
        r"""What ``epochs`` passes over ``images`` images have spent: :math:`\epsilon` at ``delta``, an upper bound.

        By Rényi differential privacy of the subsampled Gaussian mechanism (Mironov, Talwar, Zhang, 2019,
        arXiv:1908.10530). Infinite without noise, 0 without a step. Costs some milliseconds.

        Raises:
            ConfigError: A number outside its range.
        """
        rate, steps = _schedule(images, batch_size, epochs, delta)
        if not steps:
            return 0.0
        return _spent(self.noise_multiplier, rate, steps, delta) if self.noise_multiplier else math.inf

    def attach(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        expected: float,
        generator: torch.Generator,
        once: Once,
    ) -> Blurred:
        """``module`` and ``optimizer`` as what clips the gradient of each image, adds up and blurs.

        Where layers allow it, without gradients of single images: by ghost clipping, which asks of each layer the
        norms alone and goes back once more (Li, Tramèr, Liang, Hashimoto, "Large Language Models Can Be Strong
        Differentially Private Learners", ICLR 2022, arXiv:2110.05679, section 4). That takes linear layers that hold
        most of the weights, and no layer used twice.

        Args:
            module: In training mode; hooks are set on it.
            optimizer: Of its parameters.
            expected: Images of a step on average.
            generator: A CPU generator; the noise is seeded from it.
            once: By which it is seen which layers are used how often, whether images of a batch answer as alone, and
                whether the gradient of an image is what layers say of it.

        Raises:
            ParamsError: It holds layers that mix the images of a batch, or whose gradients Opacus cannot tell apart,
                or uses a parameter outside the layer that holds it.
        """
        return blurred(
            module, optimizer, noise=self.noise_multiplier, clip=self.max_grad_norm, expected=expected,
            generator=generator, once=once,
        )  # fmt: skip


def poisson(count: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """``steps`` batches of positions below ``count``, each of which holds each position with probability 1 / steps."""
    for _ in range(steps):
        yield (torch.rand(count, generator=generator) < 1 / steps).nonzero().flatten()


def check_delta(delta: float, count: int, what: str = "images") -> None:
    """Refuse a delta with which publishing one of ``count`` images (or clients) at random would pass for private.

    Raises:
        ConfigError: Says what was given and what is possible.
    """
    if not 0 < delta < 1 / count:
        raise ConfigError(
            f"delta is {delta:g} with {count} {what}; expected a positive number below 1 / {what} = {1 / count:.2g}, "
            "for example a tenth of that"
        )


def _schedule(images: int, batch_size: int, epochs: int, delta: float) -> tuple[float, int]:
    """Probability with which a step takes an image, and the number of steps."""
    if images < 1 or batch_size < 1 or epochs < 0:
        raise ConfigError(f"images {images}, batch_size {batch_size}, epochs {epochs}: expected at least 1, 1 and 0")
    check_delta(delta, images)
    batches = math.ceil(images / batch_size)
    return 1 / batches, batches * epochs


@lru_cache(maxsize=256)
def _spent(noise: float, rate: float, steps: int, delta: float) -> float:
    accountant = load_opacus().accountants.create_accountant(_ACCOUNTANT)
    accountant.history = [(noise, rate, steps)]
    with quiet():
        return max(0.0, float(accountant.get_epsilon(delta)))  # a bound may lie below what there can be


@lru_cache(maxsize=256)
def _least_noise(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """By bisection, in steps of a thousandth: what it returns keeps the promise."""
    low, high = 0.0, 1.0
    while _spent(high, rate, steps, delta) > epsilon:
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise ConfigError(
                f"epsilon {epsilon:g} at delta {delta:g} asks for a noise_multiplier above {_LARGEST_NOISE:g} with "
                f"{steps} steps; allow a larger epsilon, more images or fewer epochs"
            )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _spent(middle, rate, steps, delta) <= epsilon else (middle, high)
    return high
