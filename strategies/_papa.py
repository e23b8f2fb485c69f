"""PAPA as a strategy: every client goes on with its own network, pulled towards the mean of all between rounds."""

from typing import Any

from fedmerge.align.traces import sharing
from fedmerge.errors import ConfigError
from fedmerge.merge import in_common_order, ordered, papa
from fedmerge.pipeline import Aggregate, how_to_align, stand_in
from fedmerge.streams import numpy_stream
from strategies._own import OwnNetworks
from strategies._replies import ClientResult


class Papa(OwnNetworks):
    """Flower strategy around :func:`fedmerge.papa`: the global network is the repaired mean of the population.

    The pipeline's merger says how the clients' networks are brought into one order first; with ``average`` they are
    taken as they are, as in the paper. A client that is not asked, or whose answer was broken, keeps the network
    that it had; one that has none yet begins from the global network. The networks are part of the server's state,
    so a run that is resumed goes on from the same ones.

    Args:
        alpha: How much of itself a network keeps in a pull. Pulls between rounds are rare, so the default is stronger
            than the paper's 0.99 for every 10 steps: it is that of a round of some 100 steps.
        every: Rounds from one pull to the next; with ``alpha=0`` that is PAPA-all.
        options: Of :class:`Served`; the mean and the repaired mean are its stages.

    Raises:
        ConfigError: ``alpha`` outside [0, 1], or ``every`` no whole number from 1.
    """

    def __init__(self, *, alpha: float = 0.9, every: int = 1, **options: Any) -> None:
        if not 0 <= alpha <= 1 or not every >= 1 or every % 1:
            raise ConfigError(f"papa: alpha is {alpha} and every {every}; expected a number in [0, 1], and from 1")
        super().__init__(**options)
        self.alpha, self.every = alpha, every

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """Bring the population into one order, take its mean, pull it towards that."""
        bench, pipeline = self.bench, self.pipeline
        models, weights = [r.params for r in results], [float(r.examples) for r in results]
        with sharing(bench.traces):
            merged = in_common_order(
                models, order=pipeline.merger, spec=bench.spec, weights=weights,
                rng=numpy_stream(bench.seed, "merge", server_round), **how_to_align(results, bench, pipeline),
            )  # fmt: skip
        population = ordered(models, merged, spec=bench.spec)
        self.on_stage(server_round, "aggregated", merged.params)
        pulled = population if server_round % self.every else papa(population, alpha=self.alpha, weights=weights)
        for result, params in zip(results, pulled, strict=True):
            self.keep(result, params)
        note = stand_in(pipeline.reference, results)
        return Aggregate(self.repaired(server_round, merged, population, weights), merged, note)
