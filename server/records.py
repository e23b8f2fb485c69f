"""What the files of a run hold: written by the server, read by reports, made up by tests, described in the docs.

Each class is one JSON object, with its keys in the order in which they are written.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError


def _whole(value: Any) -> Any:
    """A float without a fraction as an integer."""
    if isinstance(value, float):
        if not value.is_integer():
            raise PydanticCustomError("whole", "expected a whole number")
        return int(value)
    return value


Text = Annotated[str, Strict()]
_Integer = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]  # as tables hold them
Whole = Annotated[_Integer, BeforeValidator(_whole)]
Count = _Integer
"""As :data:`Whole`, for what is read by the thousand: checked without Python."""
Real = Annotated[float, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(lambda value: float("nan") if value is None else value)]
"""A null is NaN: it was not measured."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of ``metrics.jsonl``: one network measured on one split.

    Attributes:
        round: From 1; 0 is before training.
        stage: Which network, for example ``"merged"``.
        client: Whose it is, or None for one of the server's.
        split: ``"test"``, ``"val"``, or ``"local"`` for the client's own images: of the stage ``"client"`` its
            training, of ``"global"`` how it evaluated the round's network.
        loss: Mean cross-entropy.
        accuracy: Share of correct predictions in ``[0, 1]``.
        examples: Number of images measured on.
        seconds: What the measurement took, or the training of a client.
    """

    round: Whole
    stage: Text
    client: Whole | None = None
    split: Text
    loss: Number = float("nan")
    accuracy: Number = float("nan")
    examples: Whole | None = None
    seconds: Number = float("nan")


@dataclass(frozen=True)
class Stage:
    """One row of a stage table: a network (or an ensemble) measured on the test split in the last round.

    Attributes:
        stage: Key, the same in every run, for example ``"merged"``.
        title: What a reader sees, for example ``"Merged"``.
        accuracy: Share of correct predictions in ``[0, 1]``; NaN when it was not measured.
        loss: Mean cross-entropy; NaN when it was not measured.
        sd: Standard deviation over clients where the row is a mean of clients, else None.
        note: What the row means, or ``""``.
    """

    stage: Text
    title: Text
    accuracy: Number
    loss: Number
    sd: float | None = None
    note: Annotated[str, Strict(), BeforeValidator(lambda value: value or "")] = ""


@dataclass(frozen=True)
class Failure:
    """A client whose reply was not used in one round, and why."""

    round: Whole
    client: Whole | None
    reason: Text


@dataclass(frozen=True)
class Climb:
    """The objective of one merge after each sweep."""

    round: Whole
    name: Text
    objective: tuple[Number, ...]
    converged: bool


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at each ``alpha`` on the straight line between two networks."""

    loss: tuple[Number, ...]
    accuracy: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The line between two clients' networks, as they came (``naive``) and after alignment (``aligned``)."""

    clients: tuple[Whole, Whole]
    split: Text = "test"
    alphas: tuple[Number, ...]
    naive: Curve
    aligned: Curve

    def __post_init__(self) -> None:
        if {len(v) for c in (self.naive, self.aligned) for v in (c.loss, c.accuracy)} != {len(self.alphas)}:
            raise ValueError(f"interpolation has {len(self.alphas)} alphas but a curve of another length")


@dataclass(frozen=True)
class Confusion:
    """How often the network of a stage took images of one class for another, in the last round.

    ``confusion[i][j]`` counts the images of class i that it took for class j.
    """

    stage: Text
    split: Text
    confusion: tuple[tuple[Count, ...], ...]


@dataclass(frozen=True)
class Bin:
    """Images of nearly the same confidence: their number, mean confidence and share of right answers."""

    confidence: float
    accuracy: float
    examples: Count


@dataclass(frozen=True)
class Calibration:
    """Whether the network of a stage is right as often as it is sure, in the last round.

    Attributes:
        stage: Which network.
        split: On which images.
        ece: Expected calibration error: mean of ``|accuracy - confidence|`` over ``bins``, weighted by examples.
        bins: By the probability of the predicted class, in rising order; see :mod:`server._predictions`.
    """

    stage: Text
    split: Text
    ece: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class ClientClasses:
    """A client's own network in the last round: its accuracy on the test images of each class, None of no image."""

    client: Count
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class Sizes:
    """Size of the network, and bytes between server and clients; None where an older version did not say.

    Attributes:
        parameters: Number of trained weights.
        aligned_share: Share of them that a permutation of units can move.
        log10_symmetries: Logarithm of the number of networks that compute the same.
        bytes_up: Sent by clients.
        bytes_down: Sent to clients, for local evaluation too.
    """

    parameters: Whole | None = None
    aligned_share: Real | None = None
    log10_symmetries: Real | None = None
    bytes_up: Whole | None = None
    bytes_down: Whole | None = None


@dataclass(frozen=True)
class Spent:
    """What a client's training has spent of its privacy, by its accountant, over all rounds that asked it.

    Attributes:
        client: Which client.
        noise_multiplier: Of its DP-SGD, or of the noise on the mean.
        epsilon: An upper bound at the delta of the run; None where there was no noise, and no bound.
    """

    client: Whole
    noise_multiplier: Real
    epsilon: float | None


@dataclass(frozen=True)
class Privacy:
    """How differential privacy was kept.

    Attributes:
        delta: Probability with which epsilon does not bound what is spent.
        clip: Norm to which the gradient of an image was clipped, or what a client changed.
        clients: What each has spent.
        unit: What is protected: ``"image"``, one image of a client, by everything that leaves it (DP-SGD); or
            ``"client"``, all of its images, by the global networks alone (central, on the server).
    """

    delta: Real
    clip: Real
    clients: tuple[Spent, ...]
    unit: Literal["image", "client"] = "image"


@dataclass(frozen=True)
class HandedOut:
    """Which network a run handed out because it is the best on val, and how it does there.

    Attributes:
        round: The round that made it.
        stage: Which of that round's networks it is.
        loss: On val.
        accuracy: On val.
    """

    round: Whole
    stage: Text
    loss: Number
    accuracy: Number


@dataclass(frozen=True)
class Summary:
    """``summary.json``.

    Attributes:
        status: ``"finished"`` or ``"failed: <reason>"``.
        classes: Names of the classes.
        labels: Holder (``"public"``, ``"val"``, ``"test"``, ``"client 0"`` ...) -> images of each class.
        stages: The stage table, in its order.
        failures: Replies that were not used.
        asked: Number of training requests sent to clients, over all rounds.
        answered: Number of those that came back usable.
        merges: How each merge climbed.
        notes: What else a reader has to know: how the teacher and the head came about, and what they fell back to.
        interpolation: The line between two clients, or None.
        sizes: What the network and the traffic came to.
        per_class: Which classes each network of the last round takes for which.
        calibration: Whether each of them is as often right as it is sure.
        client_classes: How well each client's network knows each class.
        privacy: What clients have spent of their privacy; None where they trained without differential privacy.
        handed_out: Which network was handed out; None where that is the last.
    """

    status: Text
    classes: tuple[Text, ...] = ()
    labels: Mapping[str, tuple[Whole, ...]] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    failures: tuple[Failure, ...] = ()
    asked: Whole | None = None
    answered: Whole | None = None
    merges: tuple[Climb, ...] = ()
    notes: tuple[Text, ...] = ()
    interpolation: Interpolation | None = None
    sizes: Sizes | None = None
    per_class: tuple[Confusion, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    client_classes: tuple[ClientClasses, ...] = ()
    privacy: Privacy | None = None
    handed_out: HandedOut | None = None

    def __post_init__(self) -> None:
        for holder, counts in self.labels.items():
            if len(counts) != len(self.classes):
                raise ValueError(f"{holder} counts {len(counts)} classes of {len(self.classes)}")
        for matrix in self.per_class:
            if {len(matrix.confusion), *map(len, matrix.confusion)} != {len(self.classes)}:
                raise ValueError(f"the confusion matrix of {matrix.stage} is not of {len(self.classes)} classes")
        for row in self.client_classes:
            if len(row.accuracy) != len(self.classes):
                raise ValueError(
                    f"client {row.client} has {len(row.accuracy)} accuracies of {len(self.classes)} classes"
                )


@dataclass(frozen=True)
class Env:
    """``env.json``: where a run went on and what it took; None where an older version did not say."""

    versions: Mapping[str, str | None] = Field(default_factory=dict)
    device: Text | None = None
    cpus: Count | None = None
    threads: Count | None = None
    commit: str | None = None
    started: Text | None = None
    seconds: Real | None = None
    server_seconds: Real | None = None
    peak_memory: Count | None = None
    command: str | tuple[str, ...] | None = None
    made_of: Mapping[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """What a checkpoint keeps beside networks and arrays: the summary so far, and running totals.

    ``rounds_of`` is client -> the rounds that have asked it, as far as they are over.
    """

    stages: tuple[Stage, ...]
    failures: tuple[Failure, ...]
    asked: int
    answered: int
    merges: tuple[Climb, ...]
    corrections: int
    evaluations: int = 0
    masked: int = 0
    rounds_of: Mapping[int, int] = Field(default_factory=dict)
    server_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    handed_out: HandedOut | None = None
