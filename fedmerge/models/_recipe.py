"""How a network is trained unless a configuration says otherwise."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

from fedmerge.errors import ConfigError

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine", "one-cycle")


@dataclass(frozen=True)
class Recipe:
    """A training recipe; ``dataclasses.replace`` changes a part of it, and every copy is checked.

    Attributes:
        optimizer: ``"sgd"`` or ``"adam"``.
        lr: Peak learning rate of the loss averaged over a batch.
        momentum: Of SGD; ignored by Adam.
        nesterov: Nesterov's form of that momentum.
        weight_decay: Added to the gradient as ``weight_decay * w`` (the L2 form, also for Adam).
        batch_size: Largest number of images of a step.
        schedule: ``"constant"``, ``"cosine"`` (down to 0) or ``"one-cycle"`` (straight down to 0).
        warmup: Share of all steps over which the rate first rises from 0 in a straight line.
        label_smoothing: Share of the target spread evenly over all classes.
        augment: Whether training images are flipped and shifted at random.
        channels_last: Whether images and weights lie in memory channel by channel of a pixel while they train
            (``torch.channels_last``): the same training but for round-off. Convolutions of few channels take fewer
            seconds so, see ``experiments/benchmarks/channels_last.py``.
        epochs: Passes over the data where the caller has no wish.

    Example:
        >>> dataclasses.replace(fm.models.recipe("mlp"), lr=0.01).lr
        0.01
    """

    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_size: int = 64
    schedule: str = "constant"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = False
    channels_last: bool = False
    epochs: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            given, kind = getattr(self, field.name), type(getattr(type(self), field.name))
            fits = isinstance(given, Integral if kind is int else Real if kind is float else kind)
            if not fits or (isinstance(given, bool) and kind is not bool):
                raise ConfigError(f"{field.name} of a recipe is {given!r}; expected a {kind.__name__}")
        for name, given, fits, expected in (
            ("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            ("lr", self.lr, 0 < self.lr < math.inf, "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("nesterov", self.nesterov, not self.nesterov or self.momentum > 0, "false where momentum is 0"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or a positive number"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("schedule", self.schedule, self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            ("warmup", self.warmup, 0 <= self.warmup < 1, "a number in [0, 1)"),
            ("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            ("epochs", self.epochs, self.epochs >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(f"{name} of a recipe is {given!r}; expected {expected}")

    def rate(self, progress: float) -> float:
        """Learning rate after the share ``progress`` in [0, 1] of all steps."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * rest)) / 2
        return self.lr * (1 - rest) if self.schedule == "one-cycle" else self.lr
