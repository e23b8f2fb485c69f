import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from local_grid import LocalGrid

from strategies import sift

LIKE = ArrayRecord({"w": torch.ones(2, 3), "n": torch.tensor(1)})
ASKED = {70: 0, 50: 1, 60: 2}

LocalGrid(1)  # sets the identity that messages need


def reply(node: int, arrays=None, metrics=None, error: str | None = None) -> Message:
    question = Message(RecordDict(), dst_node_id=node, message_type="train")
    if error is not None:
        return Message(Error(code=0, reason=error), reply_to=question)
    content = RecordDict()
    if arrays is not None:
        content["arrays"] = ArrayRecord(arrays)
    if metrics is not None:
        content["metrics"] = MetricRecord(metrics)
    return Message(content, reply_to=question)


GOOD = {"w": torch.zeros(2, 3), "n": torch.tensor(5)}
METRICS = {"num-examples": 4, "client": 0}


def test_good_replies_come_in_the_order_of_clients_whatever_the_order_of_arrival() -> None:
    replies = [reply(node, GOOD, METRICS) for node in (50, 60, 70)]
    good, failures = sift(replies, server_round=1, asked=ASKED, like=LIKE)
    assert [ASKED[m.metadata.src_node_id] for m in good] == [0, 1, 2]
    assert failures == []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"error": "Traceback:\n  File x\nValueError: boom\n"}, "error: ValueError: boom"),
        ({"arrays": GOOD}, "lacks the metric 'num-examples'"),
        ({"arrays": GOOD, "metrics": {"num-examples": 2.5}}, "lacks the metric 'num-examples'"),
        ({"arrays": GOOD, "metrics": {**METRICS, "loss": float("nan")}}, "metric 'loss' is not finite"),
        ({"metrics": METRICS}, "lacks the record 'arrays'"),
        ({"arrays": {"w": GOOD["w"]}, "metrics": METRICS}, "tensor 'n' is missing"),
        ({"arrays": {**GOOD, "x": GOOD["w"]}, "metrics": METRICS}, "tensor 'x' is not known"),
        (
            {"arrays": {**GOOD, "w": torch.zeros(3, 2)}, "metrics": METRICS},
            r"tensor 'w' has shape \(3, 2\), expected \(2, 3\)",
        ),
        ({"arrays": {**GOOD, "n": torch.tensor(1.0)}, "metrics": METRICS}, "tensor 'n' is float32, expected int64"),
        ({"arrays": {**GOOD, "w": torch.full((2, 3), np.inf)}, "metrics": METRICS}, "tensor 'w' holds NaN or infinite"),
    ],
)
def test_each_way_a_reply_can_be_broken_is_named(broken: dict, reason: str) -> None:
    good, failures = sift(
        [reply(70, GOOD, METRICS), reply(50, **broken)], server_round=3, asked={70: 0, 50: 1}, like=LIKE
    )
    assert len(good) == 1
    ((failure),) = failures
    assert (failure.server_round, failure.client) == (3, 1)
    assert re.search(reason, failure.reason), failure.reason


def test_silence_is_a_failure_and_strangers_are_ignored() -> None:
    good, failures = sift([reply(70, GOOD, METRICS), reply(99, GOOD, METRICS)], server_round=1, asked=ASKED, like=LIKE)
    assert len(good) == 1
    assert [(f.client, f.reason) for f in failures] == [(1, "no reply in time"), (2, "no reply in time")]
