"""One reply, read: what is used, what is refused before it costs memory, and that no bytes get past the reader."""

import random
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from local_grid import LocalGrid
from reply_kinds import copied, headed
from torch import nn

from fedmerge import models
from fedmerge.data import Images
from fedmerge.flower.replies import Failure, sift
from fedmerge.flower.sanity import Expected, Probe
from fedmerge.tasks import ClientTask
from strategies import ClientResult, read_training

LIKE = ArrayRecord({"w": torch.ones(2, 3), "n": torch.tensor(1)})
EXPECTED = Expected(LIKE, frozenset({"w"}))
ASKED = {70: 0, 50: 1, 60: 2}
GOOD = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(5)}

LocalGrid(1)  # sets the identity that messages need


def question(node: int, name: str = "") -> Message:
    message = Message(RecordDict(), dst_node_id=node, message_type="train")
    message.metadata.__dict__["_message_id"] = name
    return message


def reply(node: int, arrays=GOOD, metrics=None, *, error: str | None = None, to: Message | None = None) -> Message:
    to = to or question(node)
    if error is not None:
        return Message(Error(code=0, reason=error), reply_to=to)
    said = {"client": ASKED.get(node, 9), "num-examples": 4, "train-loss": 1.0, "train-accuracy": 0.5, "seconds": 0.1}
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(said | (metrics or {}))})
    return Message(content, reply_to=to)


def read(client: int, content: RecordDict) -> ClientResult:
    return read_training(client, content, expected=EXPECTED, most=10)


def sifted(*replies: Message, asked=ASKED, questions=()) -> tuple[list[ClientResult], list[Failure]]:
    return sift(replies, read, server_round=3, asked=asked, questions=questions)


def test_good_replies_come_in_the_order_of_clients_whatever_the_order_of_arrival() -> None:
    good, failures = sifted(*[reply(node) for node in (50, 60, 70)])
    assert [r.client for r in good] == [0, 1, 2]
    assert failures == []
    torch.testing.assert_close(good[0].params, GOOD, rtol=0, atol=0)
    assert (good[0].examples, good[0].loss, good[0].accuracy, good[0].seconds) == (4, 1.0, 0.5, 0.1)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"error": "Traceback:\n  File x\nValueError: boom\n"}, "^error: ValueError: boom$"),
        ({"metrics": {"num-examples": 2.5}}, "metric 'num-examples' is 2.5, expected a whole number in"),
        ({"metrics": {"loss": float("nan")}}, "metric 'loss' is not finite"),
        ({"arrays": {"w": GOOD["w"]}}, "tensor 'n' is missing"),
        ({"arrays": {**GOOD, "w": torch.zeros(3, 2)}}, r"tensor 'w' has shape \(3, 2\), expected \(2, 3\)"),
        ({"arrays": {**GOOD, "n": torch.tensor(1.0)}}, "tensor 'n' is float32, expected int64"),
        ({"arrays": {**GOOD, "w": torch.full((2, 3), np.inf)}}, "tensor 'w' holds NaN or infinite values"),
    ],
)
def test_a_failure_names_round_client_and_reason(broken: dict, reason: str) -> None:
    good, ((failure),) = sifted(reply(70), reply(50, **broken), asked={70: 0, 50: 1})
    assert [r.client for r in good] == [0]
    assert (failure.server_round, failure.client) == (3, 1)
    assert re.search(reason, failure.reason), failure.reason


def test_silence_is_a_failure_and_strangers_are_ignored() -> None:
    good, failures = sifted(reply(70), reply(99))
    assert len(good) == 1
    assert [(f.client, f.reason) for f in failures] == [(1, "no reply in time"), (2, "no reply in time")]


def test_a_reply_belongs_to_the_client_whose_message_it_answers_and_replaces_no_other() -> None:
    questions = [question(node, f"to {node}") for node in ASKED]
    mine, others = question(70, "to 70"), question(50, "to 50")
    forged = reply(70, metrics={"client": 1}, to=others)  # what was asked of node 50, answered ...
    forged.metadata.__dict__["_src_node_id"] = 70  # ... by node 70
    late = reply(60, to=question(60, "of another round"))
    good, failures = sifted(forged, reply(70, to=mine), late, questions=questions)
    assert [r.client for r in good] == [0]
    assert [(f.client, f.reason) for f in failures] == [
        (1, "the reply to its message comes from another node, 70"),
        (2, "the reply is to a message of another time"),
    ]
    good, failures = sifted(forged, reply(50, to=others), reply(70, to=mine), questions=questions)
    assert [r.client for r in good] == [0, 1]
    assert [f.client for f in failures] == [2]


def test_what_flower_could_not_deliver_is_named_although_it_comes_from_flower() -> None:
    undelivered = reply(50, error="the node is gone", to=question(50, "to 50"))
    undelivered.metadata.__dict__["_src_node_id"] = 1
    _, failures = sifted(undelivered, asked={50: 1}, questions=[question(50, "to 50")])
    assert [(f.client, f.reason) for f in failures] == [(1, "error: the node is gone")]


def test_a_header_of_terabytes_costs_no_memory() -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    bomb = {"w": Array("float32", (2, 3), "numpy.ndarray", headed(header)), "n": Array(np.array(5))}
    tracemalloc.start()
    _, ((failure),) = sifted(reply(70, bomb), asked={70: 0})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "has shape (1000000, 1000000), expected (2, 3)" in failure.reason
    assert peak < 2**20


def test_no_header_makes_the_reader_allocate_more_than_came() -> None:
    """Whatever the shape says, in bytes that are as many as expected."""
    for shape in ("(2, 3)", "(-2, -3)", "(2, 3, 0, 99999999999)", "(99999999999, 0)", "()"):
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }" % shape  # noqa: UP031
        given = {"w": Array("float32", (2, 3), "numpy.ndarray", headed(header, bytes(24))), "n": Array(np.array(5))}
        tracemalloc.start()
        good, failures = sifted(reply(70, given), asked={70: 0})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(good) == (shape == "(2, 3)")
        assert len(failures) == (shape != "(2, 3)")
        assert peak < 2**20


def test_flipped_bytes_end_in_a_result_or_a_named_failure() -> None:
    draws = random.Random(5)
    original = reply(70)
    results = refusals = 0
    for _ in range(1500):
        spoilt = copied(original)
        name = draws.choice(["w", "w", "n"])
        array = spoilt.content["arrays"][name]
        data = bytearray(array.data)
        for _ in range(draws.choice([1, 1, 2, 8])):
            at = draws.randrange(len(data))
            what = draws.randrange(3)
            if what == 0:
                data[at] = draws.randrange(256)
            elif what == 1:
                del data[at : at + draws.randrange(1, 9)]
            else:
                data[at:at] = draws.randbytes(draws.randrange(1, 9))
            if not data:
                break
        array.__dict__["data"] = bytes(data)
        good, failures = sifted(spoilt, asked={70: 0})
        assert len(good) + len(failures) == 1
        for r in good:
            assert all(torch.isfinite(v).all() and v.shape == GOOD[k].shape for k, v in r.params.items())
            assert float(r.params["w"].abs().max()) <= 1000
        results, refusals = results + len(good), refusals + len(failures)
        assert all(f.reason and f.reason.isprintable() for f in failures)
    assert min(results, refusals) > 20


def test_metrics_of_any_make_end_in_a_result_or_a_named_failure() -> None:
    draws = random.Random(6)
    odd = [
        None, True, -1, 0, 3, 10**30, -(10**4999), 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "3", b"3", [], [1],
        [[1]], {"a": 1}, {1, 2}, object(), ..., 1j, np.float32(2), np.int64(3), np.array([1.0]), np.ma.masked, lambda: 1,
    ]  # fmt: skip
    for _ in range(600):
        spoilt = reply(70)
        data = spoilt.content["metrics"].__dict__["_data"]
        for _ in range(draws.randrange(1, 4)):
            data[draws.choice([*data, "more", 7, None])] = draws.choice(odd)
        good, failures = sifted(spoilt, asked={70: 0})
        assert len(good) + len(failures) == 1
        for r in good:
            assert type(r.examples) is int
            assert 1 <= r.examples <= 10
            assert 0 <= r.accuracy <= 1


def test_bounds_are_those_of_the_network_that_was_sent() -> None:
    """A thousand times its largest number, a hundred times its size, whatever its scale."""
    for scale in (1e-3, 1.0, 1e3):
        sent = ArrayRecord({"w": scale * torch.ones(100, 100), "b": torch.zeros(4)})
        expected = Expected(sent, frozenset({"w", "b"}))
        size = 100 * max(scale * (10000 / 10004) ** 0.5, 0.01)
        for factor, fine in ((0.99, True), (1.01, False)):
            given = {"w": torch.full((100, 100), factor * size * (10004 / 10000) ** 0.5), "b": torch.zeros(4)}
            assert usable(expected, given) is fine, (scale, factor)
            one = {"w": scale * torch.ones(100, 100), "b": torch.tensor([factor * 1e3 * max(scale, 1), 0, 0, 0])}
            assert usable(expected, one) is (fine and scale >= 1), (scale, factor)  # of small networks the size says no


def usable(expected: Expected, given: dict[str, torch.Tensor]) -> bool:
    content = reply(70, given).content
    good, _ = sift(
        [Message(content, reply_to=question(70))], lambda c, r: read_training(c, r, expected=expected),
        server_round=1, asked={70: 0},
    )  # fmt: skip
    return bool(good)


def test_a_network_is_run_before_it_is_used() -> None:
    class Looking(nn.Module):
        """Takes as many numbers as a counter says."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("at", torch.tensor([0, 1]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Logits."""
            return torch.exp(self.fc(x.flatten(1)))[:, self.at]

    network = Looking()
    images = Images(
        torch.full((3, 1, 2, 2), 200, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.long),
        ("a",),
        (0.5,),
        (0.5,),
        "drawn",
    )
    sent = network.state_dict()
    expected = Expected(ArrayRecord(sent), frozenset({"fc.weight", "fc.bias"}), Probe(network, images))
    assert usable(expected, sent)
    assert not usable(expected, {**sent, "at": torch.tensor([0, 9])})
    assert not usable(expected, {**sent, "fc.bias": torch.full((4,), 25.0)})  # e^25 > 1e9, within all other bounds
    assert usable(expected, {**sent, "fc.bias": torch.full((4,), 15.0)})


class Steep(nn.Module):
    """Its own statistics decide whether its output overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return torch.exp(self.norm(self.fc(x.flatten(1))))


def test_statistics_that_lag_behind_are_no_fault_unless_the_server_measures_by_them() -> None:
    """After a few steps an honest network may overflow with its own statistics; their mean is measured anew."""
    network, pixels = Steep(), torch.arange(32, dtype=torch.uint8).view(8, 1, 2, 2)
    images = Images(pixels, torch.zeros(8, dtype=torch.long), ("a",), (0.5,), (0.5,), "drawn")
    lagging = {**network.state_dict(), "norm.running_mean": torch.full((4,), -200.0)}
    for measured in (False, True):
        expected = Expected(
            ArrayRecord(network.state_dict()), frozenset(dict(network.named_parameters())),
            Probe(network, images, measured=measured),
        )  # fmt: skip
        assert usable(expected, network.state_dict())
        assert usable(expected, lagging) is not measured


@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_the_server_knows_how_far_the_steps_of_its_task_reach(model: str) -> None:
    task = ClientTask(
        model=model,
        width=0.25 if model == "resnet20" else 4,
        client_images=40,
        local_epochs=2,
        training=replace(models.recipe(model), batch_size=16),
    )
    result, examples = task.train(1, task.network().state_dict())
    assert result.reach == task.reach(examples) > 0
