"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv:1910.06378, Alg. 1, option II): control variates against drift."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import ConfigError
from fedmerge.merge import average
from fedmerge.pipeline import Aggregate
from fedmerge.tasks import CORRECTION
from strategies._federated import Served
from strategies._replies import ClientResult

Variate = dict[str, np.ndarray]


class Scaffold(Served):
    r"""Flower strategy: each client's gradients are corrected by how they differed from everyone's before.

    Client i begins at the global network x and takes steps on :math:`g_i(y) + c - c_i`. Afterwards

    .. math:: c_i^+ = c_i - c + \frac{x - y_i}{h_i}, \qquad c^+ = \frac{|C|}{N} \sum_{i \in C} p_i c_i^+,
              \qquad x^+ = x + \eta_g \sum_{i \in S} p_i (y_i - x),

    with the clients S of the round, the clients C that ever answered, N clients in all, and :math:`p_i` the shares of
    the images of the clients summed over. All c begin at 0, so round 1 is FedAvg. :math:`h_i` is how far the client's
    steps reach (``Training.reach``): number of steps times learning rate for plain SGD, as in the paper.

    Where this is not the paper:

    * Clients here keep nothing between rounds. The :math:`c_i`, which in a deployment stay with their clients, are part
      of the server's state, and a client is sent :math:`c - c_i`: as many bytes down as the paper's c. Up it sends no
      :math:`c_i^+`, for the server has all that this is made of.
    * Clients count by their images, in x and in c, as in the other strategies. The paper's objective counts them
      equally, which is the same where all have as many.
    * With momentum, decay or a schedule :math:`(x - y_i) / h_i` is still the mean of the corrected gradients, weighed
      by what each did to the weights, because the correction goes through the momentum like a gradient. NIID-Bench
      subtracts it after the optimiser's step, in units of steps.

    A client that is not asked or whose answer was broken keeps its :math:`c_i`. Statistics of normalisation layers are
    averaged and not corrected. Needs SGD and a shared initialisation. Memory: a network a client.

    Args:
        server_lr: :math:`\eta_g`.
        options: Of :class:`Served`; the pipeline is not used.

    Raises:
        ConfigError: ``server_lr`` is not positive.
    """

    by_reach = True
    keeps = ("images", "variates")
    passes = ("_corrections",)

    def __init__(self, *, server_lr: float = 1.0, **options: Any) -> None:
        if not server_lr > 0:
            raise ConfigError(f"scaffold: server_lr is {server_lr}; expected a positive number")
        super().__init__(**options)
        self.server_lr = server_lr
        self.variates: dict[str, np.ndarray] = {}  # "client/tensor", float32: c_i
        self.images: dict[str, np.ndarray] = {}  # "client i" -> number of its images, for those that have a c_i

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's cohort to train, each with its own correction."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        trained = [name for name in arrays if name in self.federation.parameters]
        self._corrections = self._differences(trained)
        if self.images:
            for message in messages:
                given = self._corrections[self._asked[message.metadata.dst_node_id]]
                record = ArrayRecord({name: Array(value) for name, value in given.items()})
                # Flower hands all messages one record.
                message.content = RecordDict({**message.content, CORRECTION: record})
        return messages

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """The mean, and what each client's way from the global network says about its gradients."""
        sent = self._sent.to_torch_state_dict()
        params = average([r.params for r in results], [r.examples for r in results])
        for r in results:
            for name, correction in self._corrections[r.client].items():
                way = (sent[name].double() - r.params[name].double()).numpy()
                self.variates[f"{r.client}/{name}"] = (way / r.reach - correction).astype(np.float32)
            self.images[f"client {r.client}"] = np.array(r.examples)
        if self.server_lr != 1:
            params |= {k: sent[k] + self.server_lr * (params[k] - sent[k]) for k in self.federation.parameters}
        self.on_stage(server_round, "aggregated", params)
        return Aggregate(params)

    def _differences(self, names: list[str]) -> dict[int, Variate]:
        """Client -> c - c_i."""
        clients, zero = self.federation.nodes, np.float32(0)
        counts = {i: int(self.images[f"client {i}"]) for i in clients if f"client {i}" in self.images}
        share = len(counts) / (len(clients) * max(1, sum(counts.values())))
        found: dict[int, Variate] = {i: {} for i in clients}
        for name in names:
            own = {i: self.variates.get(f"{i}/{name}", zero) for i in clients}
            everyone = sum(n * share * own[i].astype(np.float64) for i, n in counts.items())
            for i in clients:
                found[i][name] = np.asarray(everyone - own[i], dtype=np.float32)
        return found
