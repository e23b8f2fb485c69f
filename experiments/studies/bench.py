"""What the studies that train networks share: images by purpose, networks trained once, and their scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

import fedmerge as fm
from experiments.studies.study import Config, Work
from fedmerge import models
from fedmerge.data import Dataset, Images
from fedmerge.streams import numpy_stream, stream_seed, torch_stream
from fedmerge.training import predict

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Training(Config):
    """A study that trains networks of one kind.

    Attributes:
        dataset: Where all images are from.
        model: Which network.
        width: Its width, in its own unit; 0 for its default.
        images: How many are trained on, by all parts together.
        public_images: On these statistics are measured, and alignment looks at them.
        val_images: On these choices are made.
        test_images: On these everything is reported.
        epochs: Of each training.
        batch_size: Images a step; 0 for the model's own.
        lr: Peak learning rate; 0 for the model's own.
        optimizer: ``"sgd"`` or ``"adam"``; the model's own if empty.
    """

    dataset: str = "cifar10"
    model: str = "hlb"
    width: float = 0
    images: int = 4000
    public_images: int = 500
    val_images: int = 500
    test_images: int = 2000
    epochs: int = 6
    batch_size: int = 0
    lr: float = 0
    optimizer: str = ""

    @classmethod
    def quick(cls, **keys: Any) -> Self:
        """The quick size: a narrow network, few digits, and ``keys``."""
        few: dict[str, Any] = {"images": 300, "public_images": 60, "val_images": 60, "test_images": 100}
        return cls(**{"seeds": (0,), "dataset": "digits", "model": "mlp", "width": 8, **few, **keys})

    @classmethod
    def full(cls, **keys: Any) -> Self:
        """The full size: all of CIFAR-10, and ``keys``."""
        everything = {"images": 45000, "public_images": 2500, "val_images": 2500, "test_images": 10000}
        return cls(**{**everything, **keys})


def pool(dataset: Dataset) -> int:
    """How many images :func:`fedmerge.data.split` deals: all but its test images."""
    total = len(dataset.train)
    return total - (round(0.2 * total) if dataset.test is None else 0)


class Bench:
    """One architecture, and the images of one seed.

    Attributes:
        model: The architecture, a template.
        spec: Its symmetries.
        parts: The training images, dealt in equal parts.
        public: See :class:`Training`; val and test likewise.
        recipe: How networks are trained.
    """

    def __init__(
        self, config: Training, work: Work, seed: int, *, parts: int = 1, model: str = "", width: float = 0,
        kernel_size: int = 0, weight_decay: float | None = None, bias: bool | None = None,
    ) -> None:  # fmt: skip
        self.config, self.work, self.seed, self.device = config, work, seed, work.device
        self.name = f"{model or config.model}-w{width or config.width:g}-k{kernel_size}-d{weight_decay}-{parts}-s{seed}"
        self._options: dict[str, Any] = {
            "name": model or config.model, "width": width or config.width, "kernel_size": kernel_size, "bias": bias,
        }  # fmt: skip
        total = pool(work.dataset)
        split = fm.data.split(
            work.dataset, clients=parts, client_images=config.images // parts, rng=numpy_stream(seed, "split"),
            public_fraction=config.public_images / total, val_fraction=config.val_images / total,
        )  # fmt: skip
        self.public, self.val = split.public_images, split.val_images
        self.test = split.test_images.first(config.test_images)
        self.parts: Sequence[Images] = [split.client(i) for i in range(parts)]
        self.model = self._build(0)
        self.spec = fm.perm_spec(self.model, self.public.normalise(self.public.images[:2]))
        own = models.recipe(str(self._options["name"]))
        self.recipe = replace(
            own, batch_size=config.batch_size or own.batch_size, lr=config.lr or own.lr,
            optimizer=config.optimizer or own.optimizer,
            weight_decay=own.weight_decay if weight_decay is None else weight_decay,
        )  # fmt: skip

    def _build(self, seed: int) -> nn.Module:
        network = models.build(**self._options, classes=len(self.public.classes), in_shape=self.public.shape, seed=seed)
        models.initialise_from(network, self.public)
        return network

    def fresh(self, which: int) -> Params:
        """A freshly initialised network, one a number."""
        return dict(self._build(stream_seed(self.seed, "init", which)).state_dict())

    def trained(
        self, which: int, images: Images | None = None, *, name: str = "", start: Callable[[], Params] | None = None,
        epochs: int = 0, rate: float = 1.0, attack: fm.PGD | None = None,
    ) -> Params:  # fmt: skip
        """Network ``which``, trained and kept under its number and ``name``.

        Args:
            which: Gives it its initialisation and the order of its images.
            images: The first part if None.
            name: What it is called, where it is not a network trained from its own initialisation.
            start: Makes what it begins at; its own initialisation if None.
            epochs: Passes; those of the configuration if 0.
            rate: Factor of the learning rate.
            attack: Of every batch before its step; none if None.
        """
        return self.work.kept(
            f"{self.name}-{name}{which}",
            lambda: fm.train(
                self.model, self.fresh(which) if start is None else start(), images or self.parts[0],
                recipe=replace(self.recipe, lr=rate * self.recipe.lr), epochs=epochs or self.config.epochs,
                generator=torch_stream(self.seed, "training", which), device=self.device, attack=attack,
            ).params,
        )  # fmt: skip

    def recomputed(self, params: Mapping[str, Tensor]) -> Params:
        """Statistics of norms measured anew on the public images."""
        return fm.repair(self.model, params, data=self.public, device=self.device)

    def score(self, params: Params, images: Images | None = None) -> dict[str, float]:
        """Loss and accuracy, on test."""
        found = fm.evaluate(self.model, params, images or self.test, device=self.device)
        return {"loss": found.loss, "accuracy": found.accuracy}

    def probabilities(self, params: Params) -> Tensor:
        """Of each class, for the images of test; float64."""
        return predict(self.model, params, self.test, device=self.device).double().softmax(1)

    def rng(self, purpose: str, *key: int) -> np.random.Generator:
        """A stream of the seed."""
        return numpy_stream(self.seed, purpose, *key)
