"""Which network a run hands out where that is chosen on val: of all that the server made, the best."""

from typing import TYPE_CHECKING

from torch import Tensor

from fedmerge.training import Evaluation, evaluate
from server.records import HandedOut, Row

if TYPE_CHECKING:
    from server._world import World


class Best:
    """The best on val of the networks offered so far, by accuracy, or by loss where there is none; of equals the first.

    Attributes:
        chosen: Which it is; None before the first.
        params: The network.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.chosen: HandedOut | None = None
        self.params: dict[str, Tensor] = {}

    def offer(self, server_round: int, stage: str, params: dict[str, Tensor]) -> Row:
        """Take ``params`` if it is better than all before; how it does on val."""
        val = self.world.split.val_images
        found = evaluate(self.world.model, params, val, device=self.world.device)
        if self.chosen is None or found.merit > _merit(self.chosen):
            self.chosen = HandedOut(server_round, stage, found.loss, found.accuracy)
            self.params = params
        return Row(
            round=server_round, stage=stage, split="val", loss=found.loss, accuracy=found.accuracy,
            examples=found.examples,
        )  # fmt: skip


def _merit(chosen: HandedOut) -> float:
    return Evaluation(chosen.loss, chosen.accuracy, 0).merit
