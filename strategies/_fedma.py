"""FedMA's schedule (Wang et al., ICLR 2020, arXiv:2002.06440, Alg. 1): one layer is matched and frozen a round."""

from typing import Any

from flwr.app import ConfigRecord

from fedmerge.merge import layer_wise, ordered, stages
from fedmerge.pipeline import Aggregate, reference_client, stand_in
from fedmerge.spec import permute
from fedmerge.tasks import state_of
from strategies._own import OwnNetworks
from strategies._replies import ClientResult


class FedMA(OwnNetworks):
    """Flower strategy: layers are matched from the input on, each is fixed, and clients retrain what comes after it.

    A cycle has a round for each group of units, in graph order, and one for the classifier. In round k of it clients
    train with the layers before the k-th frozen; the server matches the units of the k-th between all clients
    (:func:`fedmerge.merge.layer_wise`), reorders each client's network by that, and puts the mean of the layer into all
    of them. A client goes on from its own network so changed, until after the last round of the cycle all are one;
    the next cycle begins there, as in the paper's FedMA with communication.

    After every round the global network, which is evaluated and written, is what layer-wise matching of all layers
    makes of the clients as they are. One round alone is so the matching without any retraining. A run has the paper's
    form where its rounds are a multiple of the cycle: 3 for a perceptron of two hidden layers, 5 for the ``cnn``.

    Where this is not the paper:

    * Layers keep their width. FedMA's grow by its Beta-Bernoulli process where clients have units unlike all others.
    * The clients' own networks are kept by the server and sent to them, for clients keep nothing between rounds. The
      paper sends up and down one layer a round; here whole networks travel.
    * A residual stream is one group, whose units all of its layers write to, so it is fixed with the first of them; the
      paper has networks without such streams.
    * Statistics of normalisation layers stay each client's own, also in frozen layers, until the cycle ends; those of
      the global network are averaged and repaired as the run says. The paper's networks have none.

    A client that was not asked in a round, or whose answer was broken, goes on from the global network.

    Of the pipeline it reads ``reference``, whose order the units get, and ``repair``; its stages are the global network
    and the repaired one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._stages = stages(self.bench.spec, state_of(self.bench.model))

    def _config(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        """As every strategy's, with the layers that are fixed by now."""
        record = super()._config(config, server_round)
        record["frozen"] = ",".join(sorted(self._fixed(self._place(server_round))))
        return record

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """Match all layers for the global network; fix the one whose turn it is in the clients' own."""
        bench, place = self.bench, self._place(server_round)
        models, weights = [r.params for r in results], [float(r.examples) for r in results]
        merged = layer_wise(
            models, spec=bench.spec, weights=weights,
            reference=reference_client(self.pipeline.reference, results, bench),
            settled=[group for group, _ in self._stages[:place]],
        )  # fmt: skip
        self.on_stage(server_round, "aggregated", merged.params)
        group, _ = self._stages[place]
        fixed = {name: merged.params[name] for name in self._fixed(place + 1)}
        self.own = {}
        if place + 1 < len(self._stages):
            for r, perms in zip(results, merged.perms, strict=True):
                self.keep(r, permute(r.params, {group: perms[group]}, spec=bench.spec) | fixed)
        sources = ordered(models, merged, spec=bench.spec)
        note = stand_in(self.pipeline.reference, results)
        return Aggregate(self.repaired(server_round, merged, sources, weights), merged, note)

    def _place(self, server_round: int) -> int:
        """Position of the round in its cycle, from 0."""
        return (server_round - 1) % len(self._stages)

    def _fixed(self, count: int) -> set[str]:
        """Parameters of the first ``count`` layers."""
        return set().union(*(names for _, names in self._stages[:count]))
