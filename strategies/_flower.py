"""Flower's own strategies, with fedmerge's checks around them."""

from collections.abc import Callable
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedmerge.errors import ConfigError
from fedmerge.pipeline import Aggregate, OnStage, Pipeline, Workbench
from strategies._federated import Federated
from strategies._registry import Strategy
from strategies._replies import ClientResult


def _flower(
    base: type[FedAvg], fewest: Callable[[int], int] = lambda wrong: 1, **defaults: Any
) -> Callable[..., Federated]:
    """Flower's strategy ``base`` with fedmerge's checks; reports the aggregate as a stage.

    ``fewest`` says how many replies it needs where so many clients may be wrong.
    """

    def aggregate(self: Any, server_round: int, results: list[ClientResult]) -> Aggregate:
        found = Federated.aggregate(self, server_round, results)
        self.on_stage(server_round, "aggregated", found.params)
        return found

    def needed(self: Any) -> int:
        return fewest(int(getattr(self, "num_malicious_nodes", 0)))

    checked = type(
        base.__name__, (Federated, base), {"aggregate": aggregate, "fewest": needed, "__doc__": base.__doc__}
    )

    def build(*, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> Federated:
        try:
            strategy: Any = checked(**{**defaults, **options})
        except ValueError as error:
            raise ConfigError(f"{base.__name__}: {error}") from error
        strategy.on_stage = on_stage
        return strategy  # type: ignore[no-any-return]

    return build


_ADAGRAD = {
    "eta": "learning rate of the server",
    "eta_l": "learning rate of the clients, which Flower only prints",
    "tau": "added to the root of the second moment",
}
_ADAM = {**_ADAGRAD, "beta_1": "decay of the first moment", "beta_2": "decay of the second moment"}
_WRONG = {"num_malicious_nodes": "how many clients may be wrong"}

FLOWER = (
    Strategy(
        "fedavg", _flower(flower.FedAvg), "the clients' mean weighted by examples (McMahan et al. 2017)", title="FedAvg"
    ),
    Strategy(
        "fedprox",
        _flower(flower.FedProx, proximal_mu=0.01),
        "FedAvg with a proximal term on the client (Li et al. 2020)",
        title="FedProx",
        options={"proximal_mu": "weight of that term"},
        told={"proximal_mu": 0.01},
    ),
    Strategy(
        "fedavgm",
        _flower(flower.FedAvgM, server_momentum=0.9),
        "FedAvg with server momentum (Hsu et al. 2019)",
        title="FedAvgM",
        options={"server_learning_rate": "factor of a step", "server_momentum": "share of the last step in it"},
    ),
    Strategy(
        "fedadam", _flower(flower.FedAdam), "Adam on the server (Reddi et al. 2021)", title="FedAdam", options=_ADAM
    ),
    Strategy(
        "fedyogi", _flower(flower.FedYogi), "Yogi on the server (Reddi et al. 2021)", title="FedYogi", options=_ADAM
    ),
    Strategy(
        "fedadagrad",
        _flower(flower.FedAdagrad),
        "Adagrad on the server (Reddi et al. 2021)",
        title="FedAdagrad",
        options=_ADAGRAD,
    ),
    Strategy("fedmedian", _flower(flower.FedMedian), "coordinate-wise median (Yin et al. 2018)", title="FedMedian"),
    Strategy(
        "fedtrimmedavg",
        _flower(flower.FedTrimmedAvg),
        "coordinate-wise trimmed mean (Yin et al. 2018)",
        title="FedTrimmedAvg",
        options={"beta": "share of the clients that is cut off at either end"},
    ),
    Strategy(
        "krum",
        _flower(flower.Krum, lambda wrong: 2 * wrong + 3 if wrong else 1),
        "the one client nearest to its neighbours (Blanchard et al. 2017)",
        title="Krum",
        options=_WRONG,
    ),
    Strategy(
        "multikrum",
        _flower(flower.MultiKrum, lambda wrong: 2 * wrong + 3 if wrong else 1, num_nodes_to_select=2),
        "mean of the clients that Krum scores best",
        title="MultiKrum",
        options={**_WRONG, "num_nodes_to_select": "how many clients are averaged"},
    ),
    Strategy(
        "qfedavg",
        _flower(flower.QFedAvg, client_learning_rate=0.01, train_loss_key="train-loss"),
        "weighs clients by their loss, for fairness (Li et al. 2020)",
        title="q-FedAvg",
        options={"client_learning_rate": "by which a client's way is divided", "q": "power of the loss; 0 is FedAvg"},
    ),
    Strategy(
        "bulyan",
        _flower(flower.Bulyan, lambda wrong: 4 * wrong + 3),
        "Krum selection and a trimmed mean (El Mhamdi et al. 2018)",
        title="Bulyan",
        options=_WRONG,
    ),
)
