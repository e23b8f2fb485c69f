"""What studies of trained networks share: images by purpose, one network, its symmetries, its trainings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

import fedmerge as fm
from experiments.studies.study import Config, Work
from fedmerge.align import needs_images
from fedmerge.data import Images, split
from fedmerge.models import Recipe
from fedmerge.streams import numpy_stream, stream_seed, torch_stream
from fedmerge.types import Params


@dataclass(frozen=True)
class Trained(Config):
    """A study of trained networks.

    Attributes:
        model: A network by name.
        width: In its own unit; 0 for its own.
        images: How many images it is trained on; 0 for nine tenths of the training part, the tenth being val.
        evaluated: How many images of the test part, and of the training images, a curve is evaluated on.
        epochs: Of the training.
        points: Points of each line or curve.
    """

    dataset: str = "mnist"
    model: str = "mlp"
    width: float = 0
    images: int = 0
    evaluated: int = 1000
    epochs: int = 10
    points: int = 25


class Networks:
    """The networks of a study.

    Args:
        config: What is trained.
        work: Where they are kept.
        width: Another than that of the configuration; 0 for it.
        share: What share of the images an epoch of :meth:`stage` sees, drawn anew each time.
        recipe: What is changed of the recipe of the model.
    """

    def __init__(self, config: Trained, work: Work, *, width: float = 0, share: float = 1.0, **recipe: object) -> None:
        self.config, self.work, self.share = config, work, share
        self.width = width or config.width
        self.recipe: Recipe = replace(fm.models.recipe(config.model), **recipe)  # type: ignore[arg-type]

    @cached_property
    def _split(self) -> fm.data.Split:
        return split(
            self.work.dataset, clients=1, rng=numpy_stream(0, "split"), public_fraction=0.0, val_fraction=0.1,
            client_images=self.config.images,
        )  # fmt: skip

    @cached_property
    def train(self) -> Images:
        """What networks are trained on."""
        return self._split.client(0)

    @cached_property
    def val(self) -> Images:
        """What early stopping and alignment look at."""
        return self._split.val_images.first(self.config.evaluated)

    @cached_property
    def test(self) -> Images:
        """All test images."""
        return self._split.test_images

    @cached_property
    def seen(self) -> dict[str, Images]:
        """The images that curves are evaluated on, ``"train"`` and ``"test"``."""
        return {name: of.first(self.config.evaluated) for name, of in (("train", self.train), ("test", self.test))}

    def build(self, seed: int) -> nn.Module:
        """The network, freshly initialised."""
        data = self.work.dataset.train
        return fm.models.build(
            self.config.model, classes=len(data.classes), in_shape=data.shape, seed=stream_seed(seed, "init"),
            width=self.width,
        )  # fmt: skip

    @cached_property
    def model(self) -> nn.Module:
        """The architecture."""
        return self.build(0)

    @cached_property
    def spec(self) -> fm.PermSpec:
        """Its symmetries."""
        return fm.perm_spec(self.model, self.val.normalise(self.val.images[:2]))

    def trained(self, seed: int) -> Params:
        """The network of ``seed``: initialisation and order of images are its own."""

        def make() -> Params:
            start, generator = self.build(seed).state_dict(), torch_stream(seed, "order")
            return fm.train(
                self.model, start, self.train, recipe=self.recipe, epochs=self.config.epochs, generator=generator,
                device=self.work.device,
            ).params  # fmt: skip

        return self.work.kept(f"w{self.width:g}-s{seed}", make)

    def stage(self, seed: int, epoch: int, branch: int = -1) -> Params:
        """The network of ``seed`` after so many epochs, the optimiser going on from one to the next.

        A ``branch`` is a training that left the main one after that epoch, with network and optimiser as they were
        then, and saw the images in another order from there. Its schedule must be constant.
        """
        return {k.removeprefix("params/"): t for k, t in self._stage(seed, epoch, branch).items() if k[0] == "p"}

    def _stage(self, seed: int, epoch: int, branch: int) -> Params:
        branch = -1 if epoch <= branch else branch

        def make() -> Params:
            if not epoch:
                return {f"params/{name}": tensor for name, tensor in self.build(seed).state_dict().items()}
            before = self._stage(seed, epoch - 1, branch)
            params = {k.removeprefix("params/"): t for k, t in before.items() if k.startswith("params/")}
            state = {k.removeprefix("memory/"): t for k, t in before.items() if k.startswith("memory/")}
            generator = torch_stream(seed, "order", branch, epoch)
            drawn = torch.randperm(len(self.train), generator=generator)[: round(self.share * len(self.train))]
            done = fm.train(
                self.model, params, self.train.select(drawn), recipe=self.recipe, epochs=1, optimizer_state=state,
                generator=generator, device=self.work.device,
            )  # fmt: skip
            return {
                **{f"params/{name}": tensor for name, tensor in done.params.items()},
                **{f"memory/{name}": tensor for name, tensor in done.optimizer_state.items()},
            }

        return self.work.kept(f"w{self.width:g}-s{seed}-e{epoch}" + f"-from{branch}" * (branch >= 0), make)

    def aligned(self, b: Params, a: Params, method: str, seed: int = 0) -> Params:
        """``b`` with its units in the order that ``method`` finds to resemble ``a``; ``"none"`` leaves it."""
        if method == "none":
            return b
        looks = {"model": self.model, "data": self.val} if needs_images(method) else {}
        rng = numpy_stream(seed, "align")
        return fm.permute(b, fm.align(b, to=a, spec=self.spec, method=method, rng=rng, **looks).perms, spec=self.spec)

    def line(
        self, a: Params, b: Params, along: Callable[[float], Params] | None = None, **options: object
    ) -> list[dict[str, float]]:
        """Loss and error on training and test images at points between two networks, in six digits, a row a point."""
        curves = {
            name: fm.interpolate(
                self.model, a, b, images, points=self.config.points, along=along, device=self.work.device,
                **options,  # type: ignore[arg-type]
            )
            for name, images in self.seen.items()
        }  # fmt: skip
        rows = []
        for i, alpha in enumerate(curves["train"].alphas):
            row = {"alpha": float(f"{alpha:.6g}")}
            for name, curve in curves.items():
                row |= {
                    f"{name}_loss": float(f"{curve.losses[i]:.6g}"),
                    f"{name}_error": float(f"{1 - curve.accuracies[i]:.6g}"),
                }
            rows.append(row)
        return rows
