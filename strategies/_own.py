"""What strategies share whose clients go on with networks of their own."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmerge.merge import Merge
from fedmerge.normalisation import repair
from fedmerge.pipeline import Params
from strategies._federated import Served
from strategies._replies import ClientResult


class OwnNetworks(Served):
    """The server keeps a network a client and sends each its own: clients keep nothing between rounds.

    Attributes:
        own: ``"client/tensor"`` -> array; kept and resumed as any strategy's arrays.
    """

    keeps = ("own",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.own: dict[str, np.ndarray] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's cohort to train, each from its own network."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            client = self._asked[message.metadata.dst_node_id]
            if f"{client}/{next(iter(arrays))}" in self.own:
                own = ArrayRecord({name: Array(self.own[f"{client}/{name}"]) for name in arrays})
                # Flower hands all messages one record.
                message.content = RecordDict({**message.content, self.arrayrecord_key: own})
        return messages

    def keep(self, result: ClientResult, params: Mapping[str, Tensor]) -> None:
        """``params`` is what that client begins with the next time it is asked."""
        self.own |= {f"{result.client}/{name}": tensor.numpy() for name, tensor in params.items()}

    def repaired(self, server_round: int, merged: Merge, sources: list[Params], weights: list[float]) -> Params:
        """The global network with its statistics corrected, as the pipeline says; reports the stage."""
        if self.pipeline.repair == "none":
            return merged.params
        bench = self.bench
        params = repair(
            bench.model, merged.params, data=bench.public, method=self.pipeline.repair,
            sources=sources, weights=weights, device=bench.device,
        )  # fmt: skip
        self.on_stage(server_round, "repaired", params)
        return params
