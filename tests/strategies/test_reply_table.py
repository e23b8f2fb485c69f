"""Every kind of reply to every strategy: a bad reply costs its client the round, and nobody else.

The kinds of :mod:`reply_kinds` come in one round, each from a client of its own, beside four good replies. What the
strategy makes of it must be, to the byte, what it makes of the four alone.
"""

import re
from functools import cache

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from local_grid import LocalGrid
from reply_kinds import EVALUATION, HARMLESS, TRAINING, Kind
from torch import nn

import strategies
from fedmerge import models, perm_spec
from fedmerge.data import Images
from fedmerge.errors import RoundError
from fedmerge.flower.replies import Failure
from fedmerge.pipeline import Pipeline, Workbench
from fedmerge.tasks import ARRAYS, METRICS, ClientTask
from strategies import Federation

GOOD = 4
OPTIONS = {"qfedavg": {"client_learning_rate": 0.1}}
PIPELINE = Pipeline(aligner="weight-matching", restarts=1, repair="none", retrain="labels")
SILENCE = TRAINING["silence"]

pytestmark = pytest.mark.usefixtures("no_collections")

every_strategy = pytest.mark.parametrize("name", strategies.STRATEGIES)


class Net(nn.Module):
    """A hidden layer, a BatchNorm with its counter, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.fc2(torch.relu(self.norm(self.fc1(x.flatten(1)))))


@cache
def bench() -> Workbench:
    torch.manual_seed(0)
    network, pixels = Net(), torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    images = Images(pixels, torch.arange(12) % 3, ("a", "b", "c"), (0.5,), (0.3,), "drawn")
    spec = perm_spec(network, images.normalise(pixels[:2]))
    return Workbench(network, spec, images, images, models.recipe("mlp"), retrain_epochs=1, seed=0)


@cache
def trained(client: int) -> dict[str, torch.Tensor]:
    """A network that a client might have trained."""
    draws = torch.Generator().manual_seed(client)
    start = bench().model.state_dict()
    return {
        k: v + 0.1 * torch.rand(v.shape, generator=draws) if v.is_floating_point() else v + 7 for k, v in start.items()
    }


@cache
def arrays(client: int) -> dict[str, Array]:
    return dict(ArrayRecord(trained(client)))


class Round:
    """Clients 0 to 3 answer well; each that follows answers in one of ``kinds``.

    Attributes:
        failures: What the strategy reports.
    """

    def __init__(self, name: str, kinds: dict[str, Kind], *, pipeline: Pipeline = PIPELINE, good: int = GOOD) -> None:
        clients = good + len(kinds)
        self.grid, self.kinds, self.good = LocalGrid(clients), kinds, good
        self.failures: list[Failure] = []
        self.strategy = strategies.build(name, bench=bench(), pipeline=pipeline, options=OPTIONS.get(name))
        nodes = {client: node for node, client in self.grid.partition.items()}
        self.strategy.join(
            Federation(
                nodes, ClientTask(), bench().spec.parameters,
                images=dict.fromkeys(nodes, 40), on_failure=self.failures.append,
            )
        )  # fmt: skip
        sent = ArrayRecord(bench().model.state_dict())
        self.asked = list(self.strategy.configure_train(1, sent, ConfigRecord(), self.grid))
        self.grid.push_messages(self.asked)  # which gives them their ids

    def replies(self, what: str = "train") -> list[Message]:
        """Of all clients, the last first."""
        found: list[Message] = []
        for question in reversed(self.asked):
            client = self.grid.partition[question.metadata.dst_node_id]
            metrics = {"client": client, "num-examples": 20 + 5 * (client % GOOD), "seconds": 0.5}
            if what == "train":
                reach = ClientTask().reach(metrics["num-examples"])
                metrics |= {"train-loss": 1.0 + client % GOOD, "train-accuracy": 0.5, "reach": reach}
                content = {ARRAYS: ArrayRecord(arrays(client % GOOD)), METRICS: MetricRecord(metrics)}
            else:
                content = {METRICS: MetricRecord(metrics | {"loss": 1.0 + client % GOOD, "accuracy": 0.5})}
            reply = Message(RecordDict(content), reply_to=question)
            if client >= self.good:
                changed = list(self.kinds.values())[client - self.good].change(reply)
                found += changed if isinstance(changed, list) else [changed]
            else:
                found.append(reply)
        return found

    def result(self) -> dict[str, bytes]:
        """The new global network, and what the strategy keeps of the round."""
        made, _ = self.strategy.aggregate_train(1, self.replies())
        network = {name: array.data for name, array in made.items()}
        return network | {key: value.tobytes() for key, value in self.strategy.server_state().items()}

    def check_named(self, prefix: str = "") -> None:
        """All bad clients are named, each once, with a reason that fits."""
        assert [f.client for f in self.failures] == list(range(self.good, self.good + len(self.kinds)))
        for (what, kind), failure in zip(self.kinds.items(), self.failures, strict=True):
            assert failure.server_round == 1
            assert re.search(kind.reason, failure.reason), f"{what}: {failure.reason}"
            assert failure.reason.startswith(prefix)
            assert len(failure.reason) <= 320, what
            assert failure.reason.isprintable(), what


def silent(kinds: dict[str, Kind]) -> dict[str, Kind]:
    return dict.fromkeys(kinds, SILENCE)


def wrong_for(name: str) -> dict[str, Kind]:
    by_reach = name in ("scaffold", "fednova")
    return {what: kind for what, kind in TRAINING.items() if by_reach or not kind.by_reach}


def test_there_are_many_kinds() -> None:
    assert len([kind for kind in TRAINING.values() if not kind.by_reach]) >= 150
    assert len(EVALUATION) >= 60


@every_strategy
def test_bad_replies_of_every_kind_cost_their_clients_the_round_and_nobody_else(name: str) -> None:
    kinds = wrong_for(name)
    tried = Round(name, kinds)
    assert tried.result() == Round(name, silent(kinds)).result()
    tried.check_named()


@every_strategy
def test_replies_of_which_all_are_bad_end_the_round_with_a_line_that_names_them(name: str) -> None:
    tried = Round(name, wrong_for(name), good=0)
    with pytest.raises(RoundError, match=r"^round 1 got 0 usable replies of \d+, expected at least .*: client 0: "):
        tried.strategy.aggregate_train(1, tried.replies())
    tried.check_named()


@every_strategy
def test_odd_replies_that_can_be_used_change_no_byte(name: str) -> None:
    odd = HARMLESS if name in ("scaffold", "fednova") else HARMLESS | {k: v for k, v in TRAINING.items() if v.by_reach}
    tried = Round(name, odd)
    assert tried.result() == Round(name, dict.fromkeys(odd, HARMLESS["as it should be"])).result()
    assert tried.failures == []


@every_strategy
def test_bad_evaluations_of_every_kind_cost_nothing(name: str) -> None:
    for good in (GOOD, 0):
        tried = Round(name, EVALUATION, good=good)
        sent = ArrayRecord(bench().model.state_dict())
        tried.asked = list(tried.strategy.configure_evaluate(1, sent, ConfigRecord(), tried.grid))
        tried.grid.push_messages(tried.asked)
        found = tried.strategy.aggregate_evaluate(1, tried.replies("evaluate"))
        if good:
            assert found["loss"] == pytest.approx((20 * 1 + 25 * 2 + 30 * 3 + 35 * 4) / 110)
        else:
            assert found is None
        tried.check_named("evaluation: ")


@pytest.mark.parametrize("repair", ["recompute", "repair"])
@pytest.mark.parametrize("aligner", ["activation-matching", "optimal-transport"])
def test_what_overflows_where_the_server_measures_activations_is_left_out_before(aligner: str, repair: str) -> None:
    pipeline = Pipeline(aligner=aligner, restarts=1, repair=repair, retrain="both")
    kinds = {what: k for what, k in TRAINING.items() if re.search("1e38|times as large|overflow|variance", what)}
    tried = Round("merge-many", kinds, pipeline=pipeline)
    assert tried.result() == Round("merge-many", silent(kinds), pipeline=pipeline).result()
    tried.check_named()
