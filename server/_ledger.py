"""What has happened in a run: the rows of its last round, how merges climbed, failures, what went over the net."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from fedmerge import interpolate
from fedmerge.data import label_counts
from fedmerge.flower import replies
from fedmerge.merge import Merge, ordered
from fedmerge.tasks import state_of
from server._predictions import Predictions
from server._stages import in_order, title
from server._world import Measured, World
from server.records import Climb, Curve, Failure, HandedOut, Interpolation, Kept, Privacy, Sizes, Stage, Summary
from strategies import ClientResult


class Ledger:
    """The record of one run; whatever is added is told on.

    Attributes:
        asked: Requests to train.
        answered: Those of them whose answer could be used.
        corrections: Bytes sent to clients beside the networks.
        masked: Bytes that clients sent for masked sums, which are all that they send where there are such.
        head_down: Bytes sent to clients for the head, after the last round.
        head_up: Bytes that came back for it.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = self.answered = self.evaluations = 0
        self.corrections = self.masked = self.head_down = self.head_up = 0
        self._notes: list[str] = []
        self._failures: list[Failure] = []
        self._merges: list[Climb] = []
        self._final: dict[str, Stage] = {}

    @cached_property
    def predictions(self) -> Predictions:
        """What the networks of the last round answer."""
        return Predictions(self.world.split.test_images)

    def add(self, found: Measured | Climb | replies.Failure) -> None:
        """Add what was measured, how a merge climbed, or an answer that could not be used.

        The last row of a stage on the test split goes into the table.
        """
        if isinstance(found, Climb):
            self._merges.append(found)
            return
        if isinstance(found, replies.Failure):
            self.fail(found)
            return
        row, c = found.row, self.world.config
        self.predictions.add(row.stage if row.client is None else row.client, found.answers)
        self.world.tell.row(row)
        if row.client is None and row.split == "test":
            name, note = title(
                row.stage, strategy=c.strategy, merger=self.world.pipeline.merger, init=c.init, rounds=c.rounds,
                secure=c.secure, headed=c.head == "analytic", chosen=c.hand_out == "best-on-val",
            )  # fmt: skip
            self._final.pop(row.stage, None)
            self._final[row.stage] = Stage(row.stage, name, row.accuracy, row.loss, found.sd, note)

    def fail(self, failure: replies.Failure) -> None:
        """Add an answer that could not be used."""
        self._failures.append(_recorded(failure))
        self.world.tell.failure(failure)

    def note(self, text: str) -> None:
        """Add what a reader of the record has to know."""
        self._notes.append(text)
        self.world.tell.say(text)

    def knows(self, failure: replies.Failure) -> bool:
        """Whether that failure was added before."""
        return _recorded(failure) in self._failures

    def kept(self, server_seconds: float, rounds_of: Mapping[int, int], handed_out: HandedOut | None = None) -> Kept:
        """What a checkpoint keeps of this."""
        return Kept(
            stages=self._stages(),
            failures=tuple(self._failures),
            asked=self.asked,
            answered=self.answered,
            evaluations=self.evaluations,
            merges=tuple(self._merges),
            corrections=self.corrections,
            masked=self.masked,
            rounds_of=dict(rounds_of),
            notes=tuple(self._notes),
            server_seconds=server_seconds,
            handed_out=handed_out,
        )

    def restore(self, kept: Kept) -> None:
        """Go on from a checkpoint."""
        self._failures, self._merges, self._notes = list(kept.failures), list(kept.merges), list(kept.notes)
        self._final = {s.stage: s for s in kept.stages}
        self.asked, self.answered, self.evaluations = kept.asked, kept.answered, kept.evaluations
        self.corrections, self.masked = kept.corrections, kept.masked

    def summary(
        self, status: str, interpolation: Interpolation | None, privacy: Privacy | None, handed_out: HandedOut | None
    ) -> Summary:
        """The contents of ``summary.json``."""
        model, spec, split = self.world.model, self.world.spec, self.world.split
        bytes_of_model = sum(t.numel() * t.element_size() for t in state_of(model).values())
        return Summary(
            status=status,
            classes=tuple(split.dataset.classes),
            labels={holder: tuple(counts) for holder, counts in label_counts(split).items()},
            stages=self._stages(),
            failures=tuple(self._failures),
            asked=self.asked,
            answered=self.answered,
            merges=tuple(self._merges),
            notes=tuple(self._notes),
            interpolation=interpolation,
            privacy=privacy,
            handed_out=handed_out,
            sizes=Sizes(
                parameters=sum(p.numel() for p in model.parameters()),
                aligned_share=spec.permutable_share(),
                log10_symmetries=spec.log10_symmetries(),
                bytes_up=self.masked if self.world.config.secure else self.answered * bytes_of_model + self.head_up,
                bytes_down=(self.asked + self.evaluations) * bytes_of_model + self.corrections + self.head_down,
            ),
            **self.predictions.summed([s.stage for s in self._stages()]),
        )

    def _stages(self) -> tuple[Stage, ...]:
        return tuple(self._final[stage] for stage in in_order(self._final) if stage in self._final)


def climbs(server_round: int, name: str, merged: Merge) -> list[Climb]:
    """How the objective of a merge rose; nothing of a merge that has none."""
    return [Climb(server_round, name, tuple(merged.history), merged.converged)] if merged.history else []


def line(world: World, results: Sequence[ClientResult], merged: Merge | None) -> Interpolation | None:
    """Loss and accuracy on val between the first two clients, as they are and as they were aligned."""
    if merged is None or not merged.history or len(results) < 2:
        return None
    a, b = (r.params for r in results[:2])
    pair = replace(merged, perms=merged.perms[:2], maps=merged.maps[:2])
    left, right = ordered((a, b), pair, spec=world.spec)
    val, device = world.split.val_images, world.device
    naive = interpolate(world.model, a, b, val, points=11, device=device)
    aligned = interpolate(world.model, left, right, val, points=11, device=device)
    return Interpolation(
        clients=(results[0].client, results[1].client),
        split="val",
        alphas=tuple(naive.alphas.tolist()),
        naive=Curve(tuple(naive.losses.tolist()), tuple(naive.accuracies.tolist())),
        aligned=Curve(tuple(aligned.losses.tolist()), tuple(aligned.accuracies.tolist())),
    )


def _recorded(failure: replies.Failure) -> Failure:
    return Failure(failure.server_round, failure.client, failure.reason)
