"""Answers of clients that are kept for other runs: those that are sound, and as they were."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from reply_kinds import COUNTER, HARMLESS, TRAINING, VARIANCE, WEIGHT, Kind

from experiments.benchmarks.in_process import InProcess
from experiments.launch.sharing import SharedTraining
from fedmerge.secure import Terms
from fedmerge.tasks import ARRAYS, CONFIG, METRICS, ClientTask, read_anew

KINDS = {**TRAINING, **HARMLESS}
CONTEXT = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})


class Answers:
    """A ClientApp of one kind of answer, which remembers those that it gave."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.given = kind, []

    def __call__(self, message: Message, context: Context) -> Message:
        arrays = {WEIGHT: np.ones((6, 16), np.float32), VARIANCE: np.ones(6, np.float32), COUNTER: np.array(7)}
        metrics = {"client": 0, "num-examples": 20, "seconds": 0.5, "train-loss": 1.0, "reach": 1.0}
        content = {ARRAYS: ArrayRecord({k: Array(v) for k, v in arrays.items()}), METRICS: MetricRecord(metrics)}
        content[METRICS]["train-accuracy"] = 0.5
        found = self.kind.change(Message(RecordDict(content), reply_to=message))
        self.given.append(found[0] if isinstance(found, list) else found)
        return self.given[-1]


def asked_twice(what: str, folder: Path, **told: Any) -> tuple[list[Message], list[Message]]:
    """The answers that a ClientApp gave, and those that came of two equal questions."""
    InProcess(1)  # sets who asks
    app, replies = Answers(KINDS[what]), []
    shared = SharedTraining(app, folder, {ClientTask.from_config(ClientTask().to_config()): 1})  # type: ignore[arg-type]
    for _ in range(2):
        content = RecordDict({CONFIG: ConfigRecord({**ClientTask().to_config(), **told})})
        replies.append(shared(Message(content, dst_node_id=1, message_type="train"), CONTEXT))
    return app.given, replies


def test_an_answer_of_any_kind_reaches_the_server_as_it_is_and_so_does_what_is_kept_of_it(tmp_path: Path) -> None:
    for i, what in enumerate(KINDS.keys() - {"silence"}):
        given, replies = asked_twice(what, tmp_path / str(i))
        assert replies[0] is given[0], what
        if len(given) == 2:
            assert replies[1] is given[1], what
            assert not [*(tmp_path / str(i)).glob("*")], what
        else:
            assert replies[1].content == replies[0].content, what
            kinds = [[type(record) for record in reply.content.values()] for reply in replies]
            assert kinds[0] == kinds[1], what


def test_an_answer_that_is_a_key_of_one_masked_sum_is_asked_for_again(tmp_path: Path) -> None:
    assert len(asked_twice("as it should be", tmp_path, **Terms(2).to_config())[0]) == 2


@pytest.mark.parametrize("what", ["as it should be", "float64", "an unknown metric"])
def test_a_good_answer_is_asked_for_once(what: str, tmp_path: Path) -> None:
    assert len(asked_twice(what, tmp_path)[0]) == 1


@pytest.mark.parametrize(
    "what",
    [
        "bytes that are garbage", "strings for weights", "NaN", "more bytes than numbers", "num-examples as text",
        "no content", "a header of 3.6 TiB", "a tensor that is no array", "a pickle", "an error",
    ],
)  # fmt: skip
def test_an_answer_that_no_file_gives_back_is_asked_for_again(what: str, tmp_path: Path) -> None:
    assert len(asked_twice(what, tmp_path)[0]) == 2


def test_an_answer_from_other_images_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    app = Answers(KINDS["as it should be"])
    task = ClientTask.from_config(ClientTask(partition="halves:part").to_config())
    InProcess(1)
    shared = SharedTraining(app, tmp_path / "kept", {task: 1})  # type: ignore[arg-type]
    text = "import numpy as np\n\ndef part(labels, clients, rng):\n    return np.array_split(np.roll(np.arange(len(labels)), {}), clients)\n"
    for turn, asked in ((0, 1), (0, 1), (7, 2), (7, 2), (0, 2)):
        (tmp_path / "halves.py").write_text(text.format(turn))
        sys.modules.pop("halves", None)
        read_anew()
        content = RecordDict({CONFIG: ConfigRecord(task.to_config())})
        shared(Message(content, dst_node_id=1, message_type="train"), CONTEXT)
        assert len(app.given) == asked
