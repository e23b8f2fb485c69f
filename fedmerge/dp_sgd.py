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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedmerge.errors import ConfigError, ParamsError

_ACCOUNTANT = "rdp"
_LARGEST_NOISE = 1e3
_ROWS = "each layer has to take and give a row an image, first axis first"
Once = Callable[[nn.Module, int], Tensor]
"""What a network answers to so many images, the first of those that it trains on."""


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
    ) -> "Blurred":
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
        check_private(module)
        opacus = _opacus()
        device = next(module.parameters()).device
        noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        ghost, how = _norms_alone(module, once), {"max_grad_norm": self.max_grad_norm}
        if ghost:
            wrap, stepping = opacus.grad_sample.GradSampleModuleFastGradientClipping, "DPOptimizerFastGradientClipping"
        else:
            wrap, stepping = opacus.GradSampleModule, "DPOptimizer"
        private = getattr(opacus.optimizers, stepping)(
            optimizer, noise_multiplier=self.noise_multiplier, expected_batch_size=expected, generator=noise, **how
        )
        blurred = Blurred(wrap(module, loss_reduction="mean", **(how if ghost else {})), private, ghost)
        blurred.check(once)
        return blurred


@dataclass(frozen=True)
class Blurred:
    """A network in training whose gradients are clipped an image at a time, added up and blurred.

    Attributes:
        network: To be called in place of the network.
        ghost: Whether it asks for the norms of gradients alone.
    """

    network: Any
    _optimizer: Any
    ghost: bool

    def check(self, once: Once) -> None:
        """Refuse a network in which the gradient of one image is not what the hooks of its layers make of it.

        Clipping goes by what hooks see, so what they do not see would leave a step unclipped, or out of it.

        Raises:
            ParamsError: Names the parameter, or what Opacus said.
        """
        module = self.network._module
        name, device = type(module).__name__, next(module.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet():
            with torch.no_grad():
                alone, beside = (once(module.eval(), count) for count in (1, 2))  # or it says why it takes none
            module.train()
            if not torch.allclose(alone, beside[:1], rtol=1e-2, atol=1e-2 * float(alone.abs().max()), equal_nan=True):
                raise ParamsError(
                    f"{name} cannot be trained under differential privacy: it answers to an image otherwise alone than "
                    "beside another one; take a network in which the images of a batch do not meet"
                )
            try:
                answers = once(self.network, 1)
                self._forget()
                torch.autograd.backward(answers, torch.randn_like(answers))
                self._complete(1)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever hooks do not expect
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ParamsError(
                    f"{name} cannot be trained under differential privacy: Opacus cannot tell the gradients of images "
                    f"apart in its layers ({reason}); {_ROWS}"
                ) from error
        weights = [(key, w) for key, w in module.named_parameters() if w.requires_grad]
        whole = 1e-5 * torch.stack([w.grad.norm() for _, w in weights]).norm()
        for key, w in weights:
            true = w.grad.norm()
            apart = (w._norm_sample - true).abs() if self.ghost else (w.grad_sample - w.grad).norm()
            if bool((apart > 1e-3 * true + whole).any()):
                raise ParamsError(
                    f"{name} cannot be trained under differential privacy: the gradient of {key!r} is not what its "
                    "layer alone makes of an image, so clipping would not bound what an image changes. Use a parameter "
                    f"only by calling the layer that holds it (weights that are tied: one layer, called twice); {_ROWS}"
                )
        self._forget()

    def _forget(self) -> None:
        """What hooks found in the step before."""
        self._optimizer.zero_grad()
        for weight in self._optimizer.params:
            weight.grad_sample = weight._norm_sample = None

    def _complete(self, count: int) -> None:
        """The gradients of ``count`` images by parameters that they did not use, and by rows that are held: zero."""
        for weight in self._optimizer.params:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if weight.grad_sample is None and not self.ghost:
                weight.grad_sample = weight.new_zeros(count, *weight.shape)
            if weight._norm_sample is None:
                weight._norm_sample = weight.new_zeros(count)
        for weight, row in self._held:
            if not self.ghost:
                weight.grad_sample[:, row] = 0

    @property
    def _held(self) -> list[tuple[Any, int]]:
        """Rows of tables that stand for no word, which training leaves alone."""
        tables = [m for m in self.network.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad]
        return [(table.weight, table.padding_idx) for table in tables if table.padding_idx is not None]

    def backward(self, loss: Tensor, answers: Tensor) -> None:
        """Set the gradient of each parameter, from the mean ``loss`` over a batch of ``answers``, a row an image."""
        self._forget()
        if self.ghost:
            (slope,) = torch.autograd.grad(loss, answers)
            torch.autograd.backward(answers, slope, retain_graph=True)  # hooks take the norms
            self._complete(len(answers))
            shares = len(slope) * self.network.get_clipping_coef()  # the loss is a mean, what is clipped a sum
            self._optimizer.zero_grad()
            self.network.disable_hooks()
            torch.autograd.backward(answers, slope * shares.view(-1, *[1] * (slope.dim() - 1)))
            self.network.enable_hooks()
        else:
            torch.autograd.backward(loss)
        self._complete(len(answers))
        self._optimizer.pre_step()
        for weight, row in self._held:
            weight.grad[row] = 0


def _norms_alone(module: nn.Module, once: Once) -> bool:
    """Whether linear layers hold most weights of ``module`` and no layer is used twice, as ghost clipping asks."""
    if any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in module.modules()):
        return False  # norms alone would count the row that is not trained
    layers = [m for m in module.modules() if any(w.requires_grad for w in m.parameters(recurse=False))]
    held = [sum(w.numel() for w in m.parameters(recurse=False) if w.requires_grad) for m in layers]
    linear = sum(n for m, n in zip(layers, held, strict=True) if type(m) is nn.Linear)
    shared = sum(held) > sum(w.numel() for w in module.parameters() if w.requires_grad)
    if shared or 2 * linear < sum(held):
        return False
    uses = dict.fromkeys(layers, 0)

    def used(layer: nn.Module, _: object, answer: object) -> None:
        uses[layer] += 2 if isinstance(layer, nn.Linear) and isinstance(answer, Tensor) and answer.dim() > 3 else 1

    hooks = [layer.register_forward_hook(used) for layer in layers]
    training = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            once(module, 1)
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in training.items():
            m.training = mode
    return set(uses.values()) <= {0, 1}


def check_private(module: nn.Module) -> None:
    """Refuse a network whose images of a batch are not apart.

    Raises:
        ParamsError: Says why, and what to take instead.
        ConfigError: Opacus is not installed.
    """
    training = module.training
    found = _opacus().validators.ModuleValidator.validate(module.train(), strict=False)
    module.train(training)
    refused = f"{type(module).__name__} cannot be trained under differential privacy"
    if found:
        reason = str(found[0]).split(". ")[0]
        instead = (
            "Take a network without normalisation over the batch, such as mlp, cnn or resnet20-layernorm, or one of "
            "your own with GroupNorm or LayerNorm"
            if "Norm" in reason
            else "Take the layer of opacus.layers in its place"
        )
        raise ParamsError(f"{refused}: {reason}. {instead}")
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):  # of a kind of its own, which Opacus does not know
            raise ParamsError(
                f"{refused}: {name!r} normalises over the batch. Take GroupNorm or LayerNorm in its place"
            )
        if isinstance(layer, _ConvNd) and layer.padding_mode != "zeros":
            raise ParamsError(
                f"{refused}: {name!r} pads by {layer.padding_mode!r}, and Opacus takes its gradients as if by zeros. "
                "Pad by torch.nn.functional.pad, before a convolution without padding"
            )


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
    accountant = _opacus().accountants.create_accountant(_ACCOUNTANT)
    accountant.history = [(noise, rate, steps)]
    with quiet():
        return float(accountant.get_epsilon(delta))


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


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings of what is meant to be so.

    Images ask for no gradient, at which torch wonders; and Opacus says where other orders would give a tighter bound.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _opacus() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import opacus
            import opacus.validators
    except ImportError as error:
        raise ConfigError(
            'training under differential privacy needs Opacus, and there is none: pip install "fedmerge[privacy]"'
        ) from error
    return opacus
