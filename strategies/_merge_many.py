"""The strategy of fedmerge, and its fair control."""

from fedmerge.merge import average
from fedmerge.pipeline import Aggregate, align_merge_retrain, retrained
from strategies._federated import Served
from strategies._replies import ClientResult


class MergeMany(Served):
    """Flower strategy: the clients are asked as by FedAvg; the server aligns, merges, repairs, retrains."""

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """The pipeline instead of a mean."""
        return align_merge_retrain(
            results,
            bench=self.bench,
            pipeline=self.pipeline,
            server_round=server_round,
            base=self._sent.to_torch_state_dict(),
            on_stage=self.on_stage,
        )


class FedAvgRetrain(Served):
    """The fair control: the plain weighted mean, then the same retraining on the public split."""

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """Average, then retrain."""
        params = average([r.params for r in results], [r.examples for r in results])
        self.on_stage(server_round, "aggregated", params)
        note = ""
        if self.pipeline.retrain != "none":
            params, note = retrained(
                results, params, bench=self.bench, pipeline=self.pipeline, server_round=server_round
            )
            self.on_stage(server_round, "retrained", params)
        return Aggregate(params, note=note)
