"""Event files as TensorBoard itself reads them, against ``metrics.jsonl``."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from short_run import rows, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server import Callback
from server._costs import Costs
from server._events import Events
from server.records import Row, Summary


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(path: Path) -> dict[str, list[tuple[int, float]]]:
    by_hand: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(path):
        if row["client"] is None or row["split"] == "local":
            for name in ("accuracy", "loss"):
                by_hand[f"{name}/{row['split']}/{row['stage']}"][row["round"]].append(row[name])
    return {
        tag: [(r, pytest.approx(fmean(values), rel=1e-6)) for r, values in found.items()]
        for tag, found in by_hand.items()
    }


def test_every_stage_is_a_curve_over_rounds_and_the_clients_are_their_mean(tmp_path: Path) -> None:
    run(tmp_path / "a", rounds=2)
    found = curves(tmp_path / "a")
    assert found == expected(tmp_path / "a")
    assert {"accuracy/test/merged", "loss/test/retrained", "accuracy/local/client", "accuracy/test/client-mean"} <= set(
        found
    )
    assert [step for step, _ in found["accuracy/test/merged"]] == [1, 2]


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_cut_off_and_resumed_shows_each_point_once(at: int, tmp_path: Path) -> None:
    class Cut(Callback):
        trainings = stages = 0

        def step(self, name: str, done: int, total: int) -> None:
            self.trainings += (name, done) == ("clients train", 0)

        def row(self, row) -> None:
            if self.trainings == at and row.stage == "merged":  # the round has left points that do not count
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Cut()], rounds=3)
    assert len(curves(tmp_path / "a")["accuracy/test/merged"]) == at
    (torn,) = (tmp_path / "a").glob("events.*")  # as a kill leaves it
    torn.write_bytes(torn.read_bytes()[:-7])
    run(tmp_path / "a", resume=True, rounds=3)
    assert curves(tmp_path / "a") == expected(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("events.*"))) == 1


def test_a_failed_run_leaves_what_it_measured(tmp_path: Path) -> None:
    events = Events()
    events.begin(tmp_path)
    events.row(Row(round=1, stage="client", client=0, split="local", accuracy=0.25, loss=2.0))
    events.row(Row(round=1, stage="client", client=1, split="local", accuracy=0.75, loss=1.0))
    events.end(Summary("failed: no replies"), Costs("cpu", 0.0))
    assert curves(tmp_path) == {"accuracy/local/client": [(1, 0.5)], "loss/local/client": [(1, 1.5)]}
