"""Flower's own strategies, with fedmerge's checks around them."""

from flwr.serverapp import strategy as flower

from fedmerge.pipeline import Pipeline
from strategies._central import DPFedAvg
from strategies._registry import Range, Strategy, checked

_ADAGRAD = {
    "eta": "learning rate of the server",
    "eta_l": "learning rate of the clients, which Flower only prints",
    "tau": "added to the root of the second moment",
}
_ADAM = {**_ADAGRAD, "beta_1": "decay of the first moment", "beta_2": "decay of the second moment"}
_STEPS = {"eta": Range(0, open=True), "eta_l": Range(0), "tau": Range(0, open=True)}
_MOMENTS = {**_STEPS, "beta_1": Range(0, 1), "beta_2": Range(0, 1)}
_WRONG = {"num_malicious_nodes": "how many clients may be wrong"}
_COUNT = {"num_malicious_nodes": Range(0, whole=True)}


def _from_shared(pipeline: Pipeline, optimizer: str, init: str) -> str:
    """What rules out a strategy that clips a client's way from the global network."""
    if init != "independent":
        return ""
    return (
        f"clips a client's way from the global network, and with init = {init!r} clients begin round 1 elsewhere; use "
        "--init shared"
    )


FLOWER = (
    Strategy(
        "fedavg",
        checked(flower.FedAvg),
        "the clients' mean weighted by examples (McMahan et al. 2017)",
        title="FedAvg",
        sums=True,
    ),
    Strategy(
        "fedprox",
        checked(flower.FedProx, proximal_mu=0.01),
        "FedAvg with a proximal term on the client (Li et al. 2020)",
        title="FedProx",
        options={"proximal_mu": "weight of that term"},
        ranges={"proximal_mu": Range(0)},
        told={"proximal_mu": 0.01},
    ),
    Strategy(
        "fedavgm",
        checked(flower.FedAvgM, server_momentum=0.9),
        "FedAvg with server momentum (Hsu et al. 2019)",
        title="FedAvgM",
        options={"server_learning_rate": "factor of a step", "server_momentum": "share of the last step in it"},
        ranges={"server_learning_rate": Range(0, open=True), "server_momentum": Range(0, 1)},
    ),
    Strategy(
        "fedadam",
        checked(flower.FedAdam),
        "Adam on the server (Reddi et al. 2021)",
        title="FedAdam",
        options=_ADAM,
        ranges=_MOMENTS,
    ),
    Strategy(
        "fedyogi",
        checked(flower.FedYogi),
        "Yogi on the server (Reddi et al. 2021)",
        title="FedYogi",
        options=_ADAM,
        ranges=_MOMENTS,
    ),
    Strategy(
        "fedadagrad",
        checked(flower.FedAdagrad),
        "Adagrad on the server (Reddi et al. 2021)",
        title="FedAdagrad",
        options=_ADAGRAD,
        ranges=_STEPS,
    ),
    Strategy("fedmedian", checked(flower.FedMedian), "coordinate-wise median (Yin et al. 2018)", title="FedMedian"),
    Strategy(
        "fedtrimmedavg",
        checked(flower.FedTrimmedAvg),
        "coordinate-wise trimmed mean (Yin et al. 2018)",
        title="FedTrimmedAvg",
        options={"beta": "share of the clients that is cut off at either end"},
        ranges={"beta": Range(0, 0.499)},
    ),
    Strategy(
        "krum",
        checked(flower.Krum, lambda wrong: 2 * wrong + 3 if wrong else 1, by_distance=True),
        "the one client nearest to its neighbours (Blanchard et al. 2017)",
        title="Krum",
        options=_WRONG,
        ranges=_COUNT,
    ),
    Strategy(
        "multikrum",
        checked(flower.MultiKrum, lambda wrong: 2 * wrong + 3 if wrong else 1, by_distance=True, num_nodes_to_select=2),
        "mean of the clients that Krum scores best",
        title="MultiKrum",
        options={**_WRONG, "num_nodes_to_select": "how many clients are averaged"},
        ranges={**_COUNT, "num_nodes_to_select": Range(1, whole=True)},
    ),
    Strategy(
        "qfedavg",
        checked(flower.QFedAvg, client_learning_rate=0.01, train_loss_key="train-loss"),
        "weighs clients by their loss, for fairness (Li et al. 2020)",
        title="q-FedAvg",
        losses=True,
        options={
            "client_learning_rate": "by which a client's way is divided",
            "q": "power of the loss; 0 is the clients' plain mean",
        },
        ranges={"client_learning_rate": Range(0, open=True), "q": Range(0)},
    ),
    Strategy(
        "bulyan",
        checked(flower.Bulyan, lambda wrong: 4 * wrong + 3, by_distance=True),
        "Krum selection and a trimmed mean (El Mhamdi et al. 2018)",
        title="Bulyan",
        options=_WRONG,
        ranges=_COUNT,
    ),
    Strategy(
        "dp-fedavg",
        checked(DPFedAvg),
        "central differential privacy of clients: FedAvg of clipped changes, with noise (McMahan et al. 2018)",
        title="DP-FedAvg",
        options={
            "noise_multiplier": "deviation of the noise on the sum, in units of clipping_norm",
            "clipping_norm": "how far a client may move the network",
        },
        central=True,
        check=_from_shared,
    ),
)
