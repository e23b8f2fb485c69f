"""Flower's own strategies, with fedmerge's checks around them."""

from collections.abc import Callable
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedmerge.errors import ConfigError
from strategies._federated import Federated
from strategies._merge_many import OnStage, Pipeline, Workbench
from strategies._registry import Strategy
from strategies._replies import ClientResult, Params


def _flower(
    base: type[FedAvg], fewest: Callable[[int], int] = lambda wrong: 1, **defaults: Any
) -> Callable[..., Federated]:
    """Flower's strategy ``base`` with fedmerge's checks; reports the aggregate as a stage.

    ``fewest`` says how many replies it needs where so many clients may be wrong.
    """

    def aggregate(self: Any, server_round: int, results: list[ClientResult]) -> Params:
        params = Federated.aggregate(self, server_round, results)
        self.on_stage(server_round, "aggregated", params)
        return params

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
        name="fedavg",
        make=_flower(flower.FedAvg),
        title="FedAvg",
        summary="the clients' mean weighted by examples (McMahan et al. 2017)",
    ),
    Strategy(
        name="fedprox",
        make=_flower(flower.FedProx, proximal_mu=0.01),
        title="FedProx",
        summary="FedAvg with a proximal term on the client (Li et al. 2020)",
        options={"proximal_mu": "weight of that term"},
        told={"proximal_mu": 0.01},
    ),
    Strategy(
        name="fedavgm",
        make=_flower(flower.FedAvgM, server_momentum=0.9),
        title="FedAvgM",
        summary="FedAvg with server momentum (Hsu et al. 2019)",
        options={"server_learning_rate": "factor of a step", "server_momentum": "share of the last step in it"},
    ),
    Strategy(
        name="fedadam",
        make=_flower(flower.FedAdam),
        title="FedAdam",
        summary="Adam on the server (Reddi et al. 2021)",
        options=_ADAM,
    ),
    Strategy(
        name="fedyogi",
        make=_flower(flower.FedYogi),
        title="FedYogi",
        summary="Yogi on the server (Reddi et al. 2021)",
        options=_ADAM,
    ),
    Strategy(
        name="fedadagrad",
        make=_flower(flower.FedAdagrad),
        title="FedAdagrad",
        summary="Adagrad on the server (Reddi et al. 2021)",
        options=_ADAGRAD,
    ),
    Strategy(
        name="fedmedian",
        make=_flower(flower.FedMedian),
        title="FedMedian",
        summary="coordinate-wise median (Yin et al. 2018)",
    ),
    Strategy(
        name="fedtrimmedavg",
        make=_flower(flower.FedTrimmedAvg),
        title="FedTrimmedAvg",
        summary="coordinate-wise trimmed mean (Yin et al. 2018)",
        options={"beta": "share of the clients that is cut off at either end"},
    ),
    Strategy(
        name="krum",
        make=_flower(flower.Krum, lambda wrong: 2 * wrong + 3 if wrong else 1),
        title="Krum",
        summary="the one client nearest to its neighbours (Blanchard et al. 2017)",
        options=_WRONG,
    ),
    Strategy(
        name="multikrum",
        make=_flower(flower.MultiKrum, lambda wrong: 2 * wrong + 3 if wrong else 1, num_nodes_to_select=2),
        title="MultiKrum",
        summary="mean of the clients that Krum scores best",
        options={**_WRONG, "num_nodes_to_select": "how many clients are averaged"},
    ),
    Strategy(
        name="qfedavg",
        make=_flower(flower.QFedAvg, client_learning_rate=0.01, train_loss_key="train-loss"),
        title="q-FedAvg",
        summary="weighs clients by their loss, for fairness (Li et al. 2020)",
        options={"client_learning_rate": "by which a client's way is divided", "q": "power of the loss; 0 is FedAvg"},
    ),
    Strategy(
        name="bulyan",
        make=_flower(flower.Bulyan, lambda wrong: 4 * wrong + 3),
        title="Bulyan",
        summary="Krum selection and a trimmed mean (El Mhamdi et al. 2018)",
        options=_WRONG,
    ),
)
