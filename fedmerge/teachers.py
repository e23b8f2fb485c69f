"""What a merged network is taught on public images: the clients' predictions made one, by name."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError
from fedmerge.progress import steps
from fedmerge.registry import Entry, Registry
from fedmerge.stacking import STRENGTHS, stack
from fedmerge.training import predict
from fedmerge.types import Params

MOST_WORK = 5e8
"""Up to this product of members, labels and classes squared teacher ``auto`` stacks: some ten seconds on one core."""

Rule = Callable[[Sequence[Tensor]], Tensor]
"""Each member's probabilities ``(N, classes)`` -> one, float32 ``(N, classes)``."""


@dataclass(frozen=True, eq=False)
class Teaching:
    """A teacher that has seen the public split.

    Attributes:
        on_public: What it says of each public image, float32 ``(N, classes)``. Where the teacher was fitted on the
            label of an image, what a fit without that image says.
        rule: What it makes of the members' predictions on other images.
        note: What a reader of the record has to know about how it came to be; empty if nothing.
    """

    on_public: Tensor
    rule: Rule
    note: str = ""


@dataclass(frozen=True)
class Teacher(Entry):
    """A teacher: ``make(predictions, public, **needs) -> Teaching``.

    ``predictions`` are the members' probabilities on the images of ``public``, float64 ``(N, classes)`` each.
    It can need ``counts``: how many images of each class each member was trained on.

    Attributes:
        labelled: Whether it is fitted on labels of the public split; it needs two images of one class then.
    """

    make: Callable[..., Teaching]
    _: KW_ONLY
    labelled: bool = False

    can_need = frozenset({"counts"})
    called = ("predictions public", "")

    def check(self, public: Images) -> None:
        """Refuse public images with too few labels for this teacher, before anything is trained.

        Raises:
            DataError: No class has two labelled images.
        """
        labelled = public.labelled
        if self.labelled and max(labelled.counts(), default=0) < 2:
            raise DataError(
                f"teacher {self.name!r} needs two labelled images of one class; of the {len(public)} public images "
                f"{len(labelled)} have a label; give more public labels, or teacher = 'mean'"
            )


def _mean(predictions: Sequence[Tensor], public: Images) -> Teaching:
    def rule(given: Sequence[Tensor]) -> Tensor:
        return (sum(given[1:], given[0]) / len(given)).float()

    return Teaching(rule(predictions), rule)


def _by_class(predictions: Sequence[Tensor], public: Images, *, counts: Sequence[Sequence[int]]) -> Teaching:
    held = torch.tensor([list(one) for one in counts], dtype=torch.float64)
    if held.shape != (len(predictions), predictions[0].shape[1]):
        raise ConfigError(
            f"label counts are {tuple(held.shape)}; expected one of each class for each of {len(predictions)} members: "
            "teacher 'by-class' is for clients that say how many images of each class they hold"
        )
    shares = held / held.sum(0).clamp_min(1)
    shares[:, held.sum(0) == 0] = 1 / len(held)  # of a class that nobody holds all know alike

    def rule(given: Sequence[Tensor]) -> Tensor:
        total = sum((share * one.double() for share, one in zip(shares, given, strict=True)), torch.zeros(()))
        return (total / total.sum(1, keepdim=True).clamp_min(1e-30)).float()

    return Teaching(rule(predictions), rule)


def _stacked(predictions: Sequence[Tensor], public: Images, *, strengths: Sequence[float] = STRENGTHS) -> Teaching:
    labels = public.labels.cpu()
    known = labels >= 0
    found = stack([one[known] for one in predictions], labels[known], strengths=strengths)
    answers = found.predict(predictions)
    answers[known] = found.out_of_fold
    missing = [public.classes[c] for c, n in enumerate(public.labelled.counts()) if not n]
    note = f"stacked at strength {found.strength:g}"
    return Teaching(answers, found.predict, note + (f"; as the mean for {', '.join(missing)}" if missing else ""))


def _auto(predictions: Sequence[Tensor], public: Images) -> Teaching:
    if why := _no_stack(predictions, public):
        return replace(_mean(predictions, public), note=f"taught by the clients' mean: {why}")
    return _stacked(predictions, public)


def _no_stack(predictions: Sequence[Tensor], public: Images) -> str:
    """What speaks against a stack of these members on these images; empty if nothing."""
    labels, shape = public.labelled.labels, tuple(predictions[0].shape)
    if len(shape) != 2 or labels.dim() != 1 or labels.is_floating_point() or not _name_classes(labels, shape[1]):
        return "stacking needs one label an image, the number of its class"
    if len(predictions) * len(labels) * shape[1] ** 2 > MOST_WORK:
        return (
            f"stacking {len(predictions)} members on {len(labels)} labels of {shape[1]} classes takes long (teacher "
            "'stacked' asks for it)"
        )
    if not len(labels) or int(torch.bincount(labels).max()) < 2:
        return f"stacking needs two labels of one class; of {len(public)} public images {len(labels)} have a label"
    return ""


def _name_classes(labels: Tensor, classes: int) -> bool:
    return not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes


TEACHERS: Registry[Teacher] = Registry("teacher", Teacher, "teachers")
"""The ways to make one teacher of many networks."""

TEACHERS.add(
    Teacher("auto", _auto, "stacked; the mean without two labels of a class, or where a stack takes long"),
    Teacher("mean", _mean, "the mean of the clients' predictions"),
    Teacher(
        "by-class",
        _by_class,
        "each client counts for a class by how many of its images all clients have of it; clients send these numbers",
        needs=frozenset({"counts"}),
    ),
    Teacher(
        "stacked",
        _stacked,
        "how much each client counts for each class, learned on the public labels (stacking)",
        labelled=True,
    ),
)


def probabilities(model: nn.Module, members: Sequence[Params], images: Images, *, device: str = "cpu") -> list[Tensor]:
    """What each member predicts: float64 ``(N, classes)``, or ``(N, T, classes)`` of positions; rows add up to 1.

    Cost: one forward pass a member.
    """
    told = steps("asking the ensemble", members)
    return [predict(model, params, images, device=device).double().softmax(-1).cpu() for params in told]


def teach(
    name: str,
    model: nn.Module,
    members: Sequence[Params],
    public: Images,
    *,
    counts: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> Teaching:
    """The teacher called ``name``, made of ``members`` and the public split.

    Args:
        name: A name from :data:`TEACHERS`.
        model: The architecture.
        members: The clients' networks.
        public: The public split; images that were given no label have -1.
        counts: For each member, how many images of each class it was trained on; for a teacher that needs it.
        device: Where the members run.

    Raises:
        ConfigError: Counts that do not fit the members.
        DataError: Too few labels, or no members.
    """
    entry = TEACHERS[name]
    if not len(members):
        raise DataError(f"the teacher {name!r} was given no members; expected the networks that teach")
    entry.check(public)
    supplies: dict[str, Any] = {"counts": counts}
    given = {need: supplies[need] for need in entry.needs}
    return entry.make(probabilities(model, members, public, device=device), public, **given)
