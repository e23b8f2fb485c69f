"""The entries of models: a network, what its options mean, and the recipe it is trained by."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from fedmerge.models._hlb import HLB
from fedmerge.models._plain import CNN, MLP, VGG11, LeNet5, ReducedVGG
from fedmerge.models._recipe import Recipe
from fedmerge.models._resnet import ResNet
from fedmerge.registry import Entry, Registry, listed, summary_of

_OPTIONS = frozenset({"width", "kernel_size", "bias"})


@dataclass(frozen=True)
class Model(Entry):
    """A network: ``make(classes, (C, H, W), **options)``.

    Attributes:
        recipe: How it is trained by default.
        options: Those of ``width``, ``kernel_size`` and ``bias`` that it has, with their defaults.
        counts: What one unit of its width is, where that is a count; else the width multiplies its layers.

    Example:
        >>> fm.models.MODELS["mlp"].counts
        'hidden units a layer'
    """

    make: Callable[..., nn.Module]
    _: KW_ONLY
    recipe: Recipe
    options: Mapping[str, float | bool] = field(default_factory=dict)
    counts: str = ""

    called = ("classes in_shape", "")

    def problem(self) -> str:
        """As of every entry; and its options must be those that a run can set."""
        if unknown := self.options.keys() - _OPTIONS:
            return f"it has options {listed(unknown)}; models may have {listed(_OPTIONS)}"
        if self.counts and "width" not in self.options:
            return f"its width counts {self.counts}, and it has no width; give the option its default"
        return super().problem()

    def unit(self) -> str:
        """What its width means, for whoever has to give one."""
        if "width" not in self.options:
            return "no width"
        if self.counts:
            return f"width counts {self.counts}, {self.options['width']} by default"
        return "width multiplies all layers, 1 by default"


_RESIDUAL = Recipe(
    lr=0.1, nesterov=True, weight_decay=5e-4, batch_size=128, schedule="cosine", warmup=0.1, augment=True
)
_LAYER_NORM = Recipe(optimizer="adam", lr=0.003, batch_size=64, schedule="cosine", warmup=0.1, augment=True)
_PLAIN_VGG = Recipe(lr=0.05, weight_decay=5e-4, batch_size=128, schedule="cosine", warmup=0.1, augment=True)
_ONE_CYCLE = Recipe(
    lr=1.0,
    momentum=0.85,
    nesterov=True,
    weight_decay=5e-4,
    batch_size=128,
    schedule="one-cycle",
    warmup=0.23,
    label_smoothing=0.2,
    augment=True,
    epochs=12,
)


def _of_factory(name: str, make: Any) -> Model:
    """A network of a user: what ``make`` returns when it is called without arguments, or with those of a model."""
    try:
        arguments = inspect.signature(make)
        arguments.bind()
    except TypeError:  # no function; or it needs arguments, and these are looked at as those of any entry
        return Model(name, make, summary_of(make, name), recipe=Recipe())
    return Model(name, lambda classes, in_shape: make(), summary_of(make, name), recipe=Recipe())


MODELS: Registry[Model] = Registry("model", Model, "models", _of_factory)
"""The networks of this package."""

MODELS.add(
    Model(
        "mlp",
        MLP,
        "two hidden layers of 128 units",
        recipe=Recipe(lr=0.05, batch_size=32, schedule="cosine", epochs=20),
        options={"width": 128},
        counts="hidden units a layer",
    ),
    Model(
        "lenet5",
        LeNet5,
        "LeNet-5 for images of at least 12x12, with tanh",
        recipe=Recipe(optimizer="adam", lr=0.001, batch_size=1024, epochs=10),
        options={"width": 1},
    ),
    Model(
        "cnn",
        CNN,
        "NIID-Bench's simple CNN, 5x5 convolutions of 6 and 16 channels",
        recipe=Recipe(lr=0.01, weight_decay=1e-5, batch_size=64),
        options={"width": 1, "kernel_size": 5},
    ),
    Model(
        "reduced-vgg",
        ReducedVGG,
        "a VGG of two convolutions and two linear layers, 855 thousand parameters",
        recipe=Recipe(optimizer="adam", lr=0.001, batch_size=128, epochs=29),
        options={"width": 1},
    ),
    Model(
        "vgg11",
        VGG11,
        "VGG11 for images of 32x32, no normalisation; biases can be left out",
        recipe=_PLAIN_VGG,
        options={"width": 1, "bias": True},
    ),
    Model(
        "resnet20",
        partial(ResNet, channels=(16, 32, 64), blocks=3, norm="batch"),
        "ResNet-20 for small images, with BatchNorm",
        recipe=_RESIDUAL,
        options={"width": 1},
    ),
    Model(
        "resnet20-layernorm",
        partial(ResNet, channels=(16, 32, 64), blocks=3, norm="layer"),
        "ResNet-20 with LayerNorm over the channels of each pixel",
        recipe=_LAYER_NORM,
        options={"width": 1},
    ),
    Model(
        "resnet18",
        partial(ResNet, channels=(64, 128, 256, 512), blocks=2, norm="batch"),
        "ResNet-18 with the 3x3 stem of small images",
        recipe=_RESIDUAL,
        options={"width": 1},
    ),
    Model(
        "resnet18-plain",
        partial(ResNet, channels=(64, 128, 256, 512), blocks=2, norm="none"),
        "the same without normalisation and biases, as OT fusion merges it",
        recipe=replace(_PLAIN_VGG, lr=0.1),
        options={"width": 1},
    ),
    Model(
        "hlb",
        HLB,
        "the hlb-CIFAR10 ResNet: whitening, dirac initialisation, channels of 1/2, 1, 4 and 8 times the base",
        recipe=_ONE_CYCLE,
        options={"width": 64, "kernel_size": 3},
        counts="base channels",
    ),
)
