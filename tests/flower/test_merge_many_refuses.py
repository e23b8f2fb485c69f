"""Bad replies, bad data and bad options under `fedmerge.flower.MergeMany`: each costs itself and nobody else."""

import importlib
import re
import sys

import pytest
import torch
from flower_round import Plain, Round, net, reordered, rows, trained
from flwr.app import ArrayRecord, Message, MetricRecord
from local_grid import LocalGrid
from reply_kinds import EVALUATION, TRAINING, Kind
from torch.utils.data import DataLoader

from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError, UnknownNameError
from fedmerge.flower import MergeMany

OTHERS = ("client", "seconds", "train-", "reach", "loss", "accuracy", "an unknown metric")
OTHERS += ("num-examples a fraction", "num-examples a whole float", "num-examples one too many")


def bad(table: dict[str, Kind]) -> dict[str, Kind]:
    """Kinds that any client can send: without those of metrics that fedmerge's own clients have."""
    return {name: kind for name, kind in table.items() if not name.startswith(OTHERS)}


def log_of(caplog: pytest.LogCaptureFixture, step: str) -> list[str]:
    return [line for line in caplog.messages if re.match(f"{step}: the answer of node .* is left out: ", line)]


@pytest.fixture
def flowers_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr("flwr.common.logger.FLOWER_LOGGER.propagate", True)
    caplog.set_level("INFO", logger="flwr")
    return caplog


def test_bad_replies_of_every_kind_cost_their_clients_the_round_and_nobody_else(
    flowers_log: pytest.LogCaptureFixture,
) -> None:
    kinds = dict(enumerate(bad(TRAINING).values(), 4))
    assert len(kinds) > 90
    networks = [reordered(seed) for seed in range(4)] * (1 + len(kinds) // 4 + 1)
    networks = networks[: 4 + len(kinds)]
    silent = dict.fromkeys(kinds, TRAINING["silence"])
    made = []
    for changes in (kinds, silent):
        flowers_log.clear()
        strategy = MergeMany(model=net(), public=rows(), retrain="none", restarts=1)
        merged, metrics = Round(strategy, networks, changes).train()
        assert len(log_of(flowers_log, "aggregate_train")) == len(kinds)
        made.append(({k: t.numpy().tobytes() for k, t in merged.items()}, dict(metrics)))
    assert made[0] == made[1]


def test_bad_evaluations_of_every_kind_cost_nothing(flowers_log: pytest.LogCaptureFixture) -> None:
    kinds = dict(enumerate(bad(EVALUATION).values(), 4))
    strategy = MergeMany(model=net(), example=rows()[0])
    found = strategy.aggregate_evaluate(1, Round(strategy, [{}] * (4 + len(kinds)), kinds).answered("evaluate"))
    assert found["loss"] == pytest.approx((20 * 0 + 21 * 1 + 22 * 2 + 23 * 3) / 86)
    assert len(log_of(flowers_log, "aggregate_evaluate")) == len(kinds)
    nobody = Round(strategy, [{}] * 3, dict.fromkeys(range(3), EVALUATION["an error"]))
    assert strategy.aggregate_evaluate(1, nobody.answered("evaluate")) is None


def test_a_round_without_any_usable_answer_keeps_the_network_and_one_of_odd_metrics_keeps_the_others() -> None:
    strategy = MergeMany(model=net(), example=rows()[0])
    nobody = Round(strategy, [trained()] * 3, dict.fromkeys(range(3), TRAINING["an error"]))
    assert strategy.aggregate_train(1, nobody.answered()) == (None, None)

    def renamed(reply: Message) -> Message:
        reply.content["metrics"] = MetricRecord({"num-examples": 1000, "mood": 1.0})
        return reply

    merged, metrics = Round(strategy, [trained(), trained(), net().state_dict()], {2: Kind(renamed)}).train()
    assert metrics["loss"] == pytest.approx(21 / 41)
    assert "mood" not in metrics
    start = net().state_dict()["fc2.bias"]  # a layer whose order is fixed: the third network counts, and most
    torch.testing.assert_close(merged["fc2.bias"], (41 * trained()["fc2.bias"] + 1000 * start) / 1041)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield rows()[0][0], rows()[1][0]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, ConfigError, "neither example nor public; give example=x"),
        ({"example": rows()[0], "alinger": "ste"}, UnknownNameError, "option of MergeMany 'alinger'.*aligner"),
        ({"example": rows()[0], "merger": "meen"}, UnknownNameError, "merger 'meen'"),
        ({"example": rows()[0], "aligner": "activation-matching"}, ConfigError, "aligner 'activation-matching' looks at public data, and there are none; give public=data"),
        ({"example": rows()[0], "retrain": "labels"}, ConfigError, "retrain 'labels' looks at public data"),
        ({"public": rows(), "teacher": "median"}, UnknownNameError, "teacher 'median'"),
        ({"public": rows(), "teacher": "by-class"}, ConfigError, "asks how many images of each class a client has"),
        ({"public": rows()[0], "teacher": "stacked"}, DataError, "of the 40 public images 0 have a label; give more"),
        ({"public": rows()[0], "retrain": "both"}, ConfigError, "reads labels, and not all rows of public have one"),
        ({"public": rows()[0], "reference": "best"}, ConfigError, r"chooses by labels, and not all rows of public have one; give val=\(x, y\)"),
        ({"public": rows(), "val": rows()[0], "reference": "best"}, ConfigError, "chooses by labels, and not all rows of val have one"),
        ({"example": rows()[0], "reference": "²"}, ConfigError, "reference is '²'; expected 'largest'"),
        ({"public": (rows()[0], rows()[1].float())}, DataError, r"labels are torch.float32 \(40,\) for 40 rows; expected int64"),
        ({"public": (rows()[0], rows()[1][:3])}, DataError, r"labels are torch.int64 \(3,\) for 40 rows"),
        ({"public": torch.zeros(4, 5)}, DataError, r"Net does not take the rows of public, torch.float32 \(5,\) each"),
        ({"public": DataLoader(Endless(), batch_size=2)}, DataError, "a loader that does not know its length"),
        ({"public": DataLoader([]), }, DataError, "a loader without batches"),
        ({"public": "cifar10"}, DataError, "public gives a 'cifar10'; expected Images"),
        ({"example": rows()[0], "reference": "lagest"}, ConfigError, "reference is 'lagest'; expected 'largest', 'best' or a node id"),
        ({"example": rows()[0], "restarts": 0}, ConfigError, "restarts is 0; expected a whole number of at least 1"),
        ({"public": rows(), "retrain_epochs": -1}, ConfigError, "retrain_epochs is -1; expected a number of 0 or above"),
        ({"public": rows(), "recipe": "sgd"}, ConfigError, "recipe is 'sgd'; expected a Recipe"),
        ({"public": rows(), "merger": "fs-merge"}, SpecError, "fs-merge folds linear layers .* take another merger"),
        ({"example": torch.zeros(1, 5)}, (SpecError, DataError), "Net"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_before_anybody_trains(given: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        MergeMany(model=net(), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            torch.full((3, 3), -torch.inf).triu(1),
            "tensor 'mask' holds NaN or infinite values, as no answer may; keep what",
        ),
        (
            torch.ones(3, dtype=torch.complex64),
            "tensor 'mask' is torch.complex64, and numbers in messages are real; ke",
        ),
    ],
)
def test_a_network_whose_answers_nobody_could_take_is_refused(value: torch.Tensor, said: str) -> None:
    model = net()
    model.register_buffer("mask", value)
    with pytest.raises(ConfigError, match=f"^Net: {said}"):
        MergeMany(model=model, example=rows()[0])
    model.register_buffer("mask", value, persistent=False)
    MergeMany(model=model, example=rows()[0])


def test_arrays_that_are_not_of_the_network_are_refused_before_anybody_trains() -> None:
    strategy = MergeMany(model=net(), example=rows()[0])
    with pytest.raises(
        ParamsError, match=r"tensor '0.bias' is \(8,\) in the arrays to begin from and missing in Net; start with"
    ):
        strategy.start(grid=LocalGrid(2), initial_arrays=ArrayRecord(net(Plain).state_dict()), num_rounds=1)


def test_without_flower_installed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fedmerge.flower", "flwr"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(
        ImportError, match=r"^fedmerge.flower needs Flower, which is not installed: pip install 'flwr>=1.41"
    ):
        importlib.import_module("fedmerge.flower")
