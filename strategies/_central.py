"""Central differential privacy: what one client's images change in the global network, bounded and blurred."""

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedmerge.dp_sgd import DPSGD
from fedmerge.streams import stream_seed
from fedmerge.tasks import EXAMPLES, METRICS


class DPFedAvg(FedAvg):
    r"""The mean of the clients, each clipped to a distance from the global network, with Gaussian noise on it.

    With the global network w, k replies :math:`w_i`, C = ``clipping_norm`` and z = ``noise_multiplier``

    .. math:: w' = w + \frac1k \Big(\sum_i \min\big(1, \tfrac{C}{\|w_i - w\|}\big) (w_i - w) + z C \, N(0, I)\Big),

    computed by Flower's ``DifferentialPrivacyServerSideFixedClipping`` around its FedAvg (McMahan, Ramage, Talwar,
    Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv:1710.06963). Clients weigh the
    same, whatever they hold, and the noise is that of the replies that came: both so that one client moves the sum by C
    at most. What all global networks together tell of one client, with or without its images, is then bounded by the
    Gaussian mechanism, composed over the rounds that ask it.

    The server is trusted: it sees every client's network. The noise is drawn from the seed of the run, which clients
    are told, unless the run has ``secret-noise``.

    Args:
        noise_multiplier: Deviation of the noise on the sum, in units of ``clipping_norm``.
        clipping_norm: How far a client may move the network.
        options: Of Flower's FedAvg.
    """

    passes: ClassVar[tuple[str, ...]] = ("_origin", "_secret", "_seed")

    def __init__(self, *, noise_multiplier: float = 1.0, clipping_norm: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.central = DPSGD(noise_multiplier, clipping_norm)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; what is sent is where changes are measured from."""
        self._origin, self._seed = arrays, int(config["seed"])  # type: ignore[arg-type]
        self._secret = bool(config["secret-noise"])
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip, average and blur."""
        given = list(replies)
        for reply in given:
            reply.content[METRICS] = MetricRecord({EXAMPLES: 1})
        private = DifferentialPrivacyServerSideFixedClipping(
            FedAvg(), self.central.noise_multiplier, self.central.max_grad_norm, len(given)
        )
        private.current_arrays = self._origin
        seed = secrets.randbits(32) if self._secret else stream_seed(self._seed, "central-noise", server_round)
        with _numpy_seeded(seed):
            return private.aggregate_train(server_round, given)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Flower draws its noise from NumPy's global generator, which is as before afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.set_state(np.random.RandomState(np.random.MT19937(seed)).get_state())  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
