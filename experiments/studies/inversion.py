"""What the images of a client look like to one who sees its update, a sum of updates, or a trained network."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fedmerge as fm
from experiments.report.theme import MARKS, SERIES, legend, rows, styled
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.page import mean_sd, table
from experiments.studies.study import Cell, Study, Work
from fedmerge.data import Images
from fedmerge.privacy import Reconstruction, invert_model, invert_update, quality
from fedmerge.streams import torch_stream

_ONE, _OTHER, _LATER = "one image, one step", "the same of {}", "the same of a trained network"
_STEP, _PASSES, _SUM = (
    "one step on {} images",
    "{} images, {} passes in steps of {}",
    "mean of {} clients, {} images each",
)
_NORMED, _READ = "{}, BatchNorm", "{}, BatchNorm and its statistics"
_SINGLE, _MERGED, _AVERAGE = "network of one client", "aligned merge of {}", "plain average of {}"
_KINDS = {"": "reconstruction", "_other": "another image of the class", "_mean": "mean image of the class"}
_NORMS = 0.1
"""Weight of BatchNorm's statistics where they are read: that of :func:`fedmerge.privacy.invert_model`."""
_SHOWN = 8
"""Images in a row of the pictures side by side."""


@dataclass(frozen=True)
class Inversion(Training):
    """What is run; ``images`` and ``epochs`` are those of the clients whose trained networks are inverted.

    Attributes:
        others: Networks of which also one step on one image is inverted.
        singles: How many images are sent alone.
        batches: Images of a client that takes one step on all of them.
        local: Images, passes, and images a step, of a client that takes several steps.
        sums: Numbers of clients whose updates are averaged; each takes one step on as many images as the first of
            ``batches``.
        clients: How many trained networks are merged.
        iterations: Of an attack on an update, and of one on a network.
        total_variation: Weight of the prior in these.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "cifar10"
    model: str = "lenet5"
    images: int = 4000
    epochs: int = 15
    batch_size: int = 32
    lr: float = 0.02
    optimizer: str = "sgd"
    others: tuple[str, ...] = ("mlp", "cnn")
    singles: int = 4
    batches: tuple[int, ...] = (4, 8)
    local: tuple[int, int, int] = (4, 5, 2)
    sums: tuple[int, ...] = (2, 4, 8)
    clients: int = 4
    iterations: tuple[int, int] = (300, 200)
    total_variation: tuple[float, float] = (0.003, 0.1)


def cells(config: Inversion, work: Work) -> Iterator[Cell]:
    """An attack is a cell: on updates that begin at a fresh network, then on trained networks."""
    (count, passes, step), each, n = config.local, config.batches[0], config.clients
    updates = {
        **{_STEP.format(held): (1, held, 1, held) for held in config.batches},
        _PASSES.format(count, passes, step): (1, count, passes, step),
        **{_SUM.format(clients, each): (clients, each, 1, each) for clients in config.sums},
    }
    for seed in config.seeds:
        attacks = _Attacks(config, work, seed, parts=n)
        measures: dict[str, Callable[[str], Mapping[str, object]]] = {
            _ONE: attacks.singles,
            **{_OTHER.format(m): _Attacks(config, work, seed, parts=n, model=m).singles for m in config.others},
            _LATER: partial(attacks.singles, start=attacks.trained),
            **{shown: partial(attacks.update, how=how) for shown, how in updates.items()},
            _SINGLE: partial(attacks.network, make=partial(attacks.trained, 0)),
            _MERGED.format(n): partial(attacks.network, make=attacks.merged),
            _AVERAGE.format(n): partial(attacks.network, make=attacks.average),
        }
        (first, how), normed = next(iter(updates.items())), _Normed(config, work, seed, parts=n)
        measures[_NORMED.format(first)] = partial(normed.update, how=how)
        measures[_READ.format(first)] = partial(normed.update, how=how, norms=_NORMS)
        for shown, measure in measures.items():
            yield Cell({"seed": seed, "shown": shown}, partial(measure, shown))


class _Attacks(Bench):
    """The attacks of one seed on one architecture. Updates are of val images, on which no network was trained."""

    config: Inversion

    def every(self) -> list[Params]:
        """The clients' trained networks."""
        return [self.trained(i, part) for i, part in enumerate(self.parts)]

    def merged(self) -> Params:
        """Their aligned merge."""
        return fm.merge_many(self.every(), spec=self.spec, rng=self.rng("merge")).params

    def average(self) -> Params:
        """Their mean as they are."""
        return fm.average(self.every())

    def singles(self, shown: str, start: Callable[[int], Params] | None = None) -> dict[str, object]:
        """Images that are sent alone, one after the other, by one step from ``start``."""
        few = self.val.first(self.config.singles)
        before, true = (start or self.fresh)(0), [few.select([i]) for i in range(self.config.singles)]
        found = [self._inverted(before, [one], 1, 1, key=i) for i, one in enumerate(true)]
        right = np.mean([f.labels.item() == one.labels.item() for f, one in zip(found, true, strict=True)])
        return {
            "clients": 1, "images": 1, "steps": 1, **self._compared(shown, [f.images for f in found], true),
            "labels": float(right), "psnr_outside": "", "accuracy": "",
        }  # fmt: skip

    def update(self, shown: str, how: tuple[int, int, int, int], norms: float = 0.0) -> dict[str, object]:
        """Images of clients of which each takes its steps, and whose mean is seen."""
        clients, each, passes, step = how
        true = self.val.first(clients * each)
        held = [true.select(range(i * each, (i + 1) * each)) for i in range(clients)]
        found = self._inverted(self.fresh(0), held, passes, step, key=0, norms=norms)
        guessed, labels = (torch.bincount(y, minlength=len(true.classes)) for y in (found.labels, true.labels))
        return {
            "clients": clients, "images": each, "steps": passes * -(-each // step),
            **self._compared(shown, [found.images], [true]),
            "labels": round(float(torch.minimum(guessed, labels).sum()) / len(true), 4),
            "psnr_outside": "", "accuracy": "",
        }  # fmt: skip

    def network(self, shown: str, make: Callable[[], Params]) -> dict[str, object]:
        """An image of each class out of a network, beside the nearest image that the first client has of the class."""
        params, labels = make(), torch.arange(len(self.public.classes))
        drawn = invert_model(
            self.model, params, self.public, labels=labels, total_variation=self.config.total_variation[1],
            iterations=self.config.iterations[1], generator=torch_stream(self.seed, "attack"), device=self.device,
        ).images  # fmt: skip
        held = {label: of_class(self.parts[0], label) for label in labels.tolist()}
        own = {label: images for label, images in held.items() if len(images)}
        strangers = [(of_class(self.test, label) or self.test).first(len(images)) for label, images in own.items()]
        found = [drawn[[label]] for label in own]
        return {
            "clients": 1, "images": len(self.parts[0]), "steps": "", **self._compared(shown, found, list(own.values())),
            "labels": "", "psnr_outside": near(found, strangers)["psnr"],
            "accuracy": round(self.score(params)["accuracy"], 4),
        }  # fmt: skip

    def _inverted(
        self, before: Params, held: list[Images], passes: int, step: int, *, key: int, norms: float = 0.0
    ) -> Reconstruction:
        """What the attacker makes of the mean of what clients with these images send."""
        recipe = replace(self.recipe, batch_size=step)
        sent = [
            fm.train(
                self.model, before, images, recipe=recipe, epochs=passes, device=self.device,
                generator=torch_stream(self.seed, "local", key, i),
            ).params
            for i, images in enumerate(held)
        ]  # fmt: skip
        return invert_update(
            self.model, before, fm.average(sent), self.public, count=sum(map(len, held)), epochs=passes,
            clients=len(held), recipe=recipe, total_variation=self.config.total_variation[0],
            norms=norms, iterations=self.config.iterations[0], generator=torch_stream(self.seed, "attack", key),
            device=self.device,
        )  # fmt: skip

    def _compared(self, shown: str, found: list[Tensor], true: list[Images]) -> dict[str, float]:
        """How near ``found`` are to the images at their place in ``true``, and public images of the classes are."""
        self._side_by_side(shown, found, true)
        rng, scores = self.rng("others"), near(found, true)
        classes = [
            [of_class(self.public, int(label)) or self.public for label in of.labels[: len(f)]]
            for f, of in zip(found, true, strict=True)
        ]
        others = [torch.stack([pixels(one)[rng.integers(len(one))] for one in group]) for group in classes]
        means = [torch.stack([pixels(one).mean(0) for one in group]) for group in classes]
        for kind, drawn in (("_other", others), ("_mean", means)):
            scores |= {name + kind: value for name, value in near(drawn, true).items()}
        return scores

    def _side_by_side(self, shown: str, found: list[Tensor], true: list[Images]) -> None:
        """True images over reconstructions, as a file of this folder alone: images of data sets are not published."""
        pairs = [quality(f, of) for f, of in zip(found, true, strict=True)]
        above = torch.cat([pixels(of)[q.true] for of, q in zip(true, pairs, strict=True)])[:_SHOWN]
        below = torch.cat([f[q.found] for f, q in zip(found, pairs, strict=True)])[:_SHOWN]
        path = self.work.folder / "pictures" / f"{shown.replace(',', '').replace(' ', '-')}-{self.seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        large = torch.cat([above, below]).repeat_interleave(4, 2).repeat_interleave(4, 3)
        from torchvision.utils import save_image  # slow to import

        save_image(large, path, nrow=len(above), padding=4)


class _Normed(_Attacks):
    """The same with BatchNorm behind each convolution; where there is none, behind linear layers but the last."""

    def _build(self, seed: int) -> nn.Module:
        network = super()._build(seed)
        modules = dict(network.named_modules())
        norms: dict[str, nn.Module] = {
            name: nn.BatchNorm2d(layer.out_channels) for name, layer in modules.items() if isinstance(layer, nn.Conv2d)
        }
        linear = [(name, layer) for name, layer in modules.items() if isinstance(layer, nn.Linear)][:-1]
        for name, norm in (norms or {name: nn.BatchNorm1d(layer.out_features) for name, layer in linear}).items():
            above, _, called = name.rpartition(".")
            setattr(network.get_submodule(above), called, nn.Sequential(modules[name], norm))
        return network


def pixels(images: Images) -> Tensor:
    """Float ``(N, C, H, W)`` in [0, 1]."""
    return (images.images / 255).float()


def of_class(images: Images, label: int) -> Images:
    """Those with this label."""
    return images.select((images.labels == label).nonzero().flatten())


def near(found: list[Tensor], true: list[Images]) -> dict[str, float]:
    """Means over all pairs; see :func:`fedmerge.privacy.quality`."""
    pairs = [quality(f, of) for f, of in zip(found, true, strict=True)]
    return {
        "psnr": round(float(np.concatenate([q.psnr for q in pairs]).mean()), 3),
        "ssim": round(float(np.concatenate([q.ssim for q in pairs]).mean()), 4),
    }


def _means(found: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of what was measured, a row a view."""
    numbers = found.drop(columns=["seed"]).set_index("shown").apply(pd.to_numeric)
    return numbers.groupby(level=0, sort=False).mean()


def _ours(found: pd.DataFrame) -> str:
    updates, networks = [], []
    for shown, part in found.groupby("shown", sort=False):
        near_to = [f"{mean_sd(part['psnr' + kind], 1, 1)}; {mean_sd(part['ssim' + kind], 2, 1)}" for kind in _KINDS]
        if (part["labels"] != "").all():
            right = f"{100 * pd.to_numeric(part['labels']).mean():.0f}"
            updates.append([shown, int(part["clients"].iloc[0] * part["images"].iloc[0]), *near_to, right])
        else:
            outside = mean_sd(part["psnr_outside"], 1, 1)
            accuracy = f"{100 * pd.to_numeric(part['accuracy']).mean():.1f}"
            networks.append([shown, *near_to, outside, accuracy])
    return "\n\n".join(
        [
            "PSNR in dB; SSIM. Mean ± deviation over seeds. Of an update, against the true images:",
            table(["what is seen", "images in it", *_KINDS.values(), "labels right, %"], updates),
            "Of a trained network, one reconstruction a class, against the nearest image that the first client has of "
            "the class, and against the nearest of as many images that nobody has:",
            table(["what is seen", *_KINDS.values(), "reconstruction, nobody's", "accuracy, %"], networks),
        ]
    )


def _answer(found: pd.DataFrame) -> str:
    means = _means(found)

    def ahead(views: Iterable[str]) -> str:
        gains = means["psnr"] - means["psnr_mean"]
        return ", ".join(f"{shown.replace(',', '')} {gains[shown]:+.1f}" for shown in views)

    one, trained = means.loc[_ONE], means[means["accuracy"].notna()]
    updates = means.index[means["accuracy"].isna()]
    single = trained.iloc[0]
    return (
        f"From what a client sends after one step on one image the attack draws that image at {one['psnr']:.1f} dB "
        f"(SSIM {one['ssim']:.2f}); the mean image of its class, which is there without any attack, is at "
        f"{one['psnr_mean']:.1f} dB (SSIM {one['ssim_mean']:.2f}). In dB above that mean image: "
        f"{ahead(updates[1:])}. Out of trained networks, likewise: {ahead(trained.index)}; what is "
        f"drawn from that of one client is at {single['psnr']:.1f} dB from the nearest of its own images, and at "
        f"{single['psnr_outside']:.1f} dB from the nearest of as many that nobody has."
    )


@styled
def _draw(found: pd.DataFrame) -> Figure:
    """Every view, its reconstructions and what could be shown without it."""
    means = _means(found)
    deviations = found.set_index("shown")[["psnr", "ssim"]].apply(pd.to_numeric).groupby(level=0).std().fillna(0)
    fig = Figure(figsize=(8.2, 1.6 + 0.34 * len(means)), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    handles: list[Any] = []
    for ax, measure, label in zip(axes, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
        handles = []
        for k, (kind, title) in enumerate(_KINDS.items()):
            spread = deviations.loc[means.index, measure] if not kind else None
            handles.append(
                ax.errorbar(
                    means[measure + kind], range(len(means)), xerr=spread, fmt=MARKS[k], color=SERIES[k], label=title,
                    capsize=2.5, linewidth=1.2,
                )
            )  # fmt: skip
        ax.set_xlabel(label)
    rows(axes[0], list(means.index))
    axes[1].tick_params(axis="y", length=0)
    legend(fig, handles, columns=3)
    return fig


STUDY = Study(
    "inversion",
    cells,
    "images reconstructed from an update, a sum of updates, a client's network and a merge",
    title="Images out of updates and networks",
    source="""J. Geiping, H. Bauermeister, H. Dröge, M. Moeller, Inverting Gradients, NeurIPS 2020, arXiv:2003.14053;
H. Yin et al., DeepInversion, CVPR 2020, arXiv:1912.08795""",
    question="""
What do a client's images look like to one who sees its update, a sum of such updates, its trained network, or the
aligned merge of several, and how does that compare with what could be shown without seeing any of it?""",
    cost="5 CPU minutes",
    sizes={
        "quick": Inversion(
            seeds=(0,), dataset="digits", model="mlp", width=32, images=200, public_images=100, val_images=50,
            test_images=200, epochs=20, lr=0.1, others=(), singles=1, batches=(2,), local=(2, 2, 1), sums=(2,),
            clients=2, iterations=(80, 40),
        ),
        "default": Inversion(),
        "full": Inversion(
            seeds=(0, 1, 2, 3, 4), images=45000, epochs=30, others=("mlp", "cnn", "reduced-vgg", "resnet20"),
            singles=20, iterations=(4000, 2000),
        ),
    },
    answer=_answer,
    theirs="""
Geiping et al. find such a break of privacy "possible even for trained deep networks" on CIFAR-10 and ImageNet, by
architecture and parameters, and say that "even averaging gradients over several iterations or several images does
not protect the user's privacy". D. Dimitrov et al. (Data Leakage in Federated Averaging, TMLR 2022) recover more than
45 % of the images of FEMNIST from clients that take 10 passes over 10 batches of 5 images. Nobody that we know of has
held aligned merges against single networks.""",
    ours=_ours,
    explains="""
The attacker is a curious server: it knows the network before and after, how clients train and how many images they
have. It does not know labels, which it reads off the last layer, or the order of the images, which it takes to be the
same in each pass. It begins once and takes few steps, where the code of Geiping et al. by default takes 8,000 steps
from each of 128 starts, so the rows are a lower bound on what an update gives away, and a network from which nothing
comes here is not thereby safe.

A BatchNorm in training normalises by the batch, so the gradient of each image depends on the others. A client with it
also sends what tells the mean and variance of its batch, which the last row of updates reads. Both rows are
of BatchNorm behind the convolutions. We tried some settings of the attack on a few images before: behind linear layers
too it drew less, other weights of the statistics changed little or harmed, and a stronger total variation, which the
other rows do not have, drew somewhat more. So these rows, too, say what at least is given away.

The mean of n clients' single steps is exactly the step of one client with all their images (a test holds that), so a
sum hides an image as a batch does, by the number of images in it, and masks add nothing to that. Clients here have few
images and take few steps; those of a real run have hundreds, and their update is a sum over far more.

What comes out of a trained network is what it takes for a class. That this is no one's image is what the last columns
measure. Merging reorders units before it averages, which changes no answer, so aligned networks give the same images.

The pictures, true images over reconstructions, are in the folder of the study under `pictures/`, and not on this page:
images of data sets are not published here.""",
    draw=_draw,
)  # fmt: skip
