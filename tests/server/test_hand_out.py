"""Which network a run hands out: with `best-on-val` the best on val of all stages and rounds, for controls too."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message
from local_grid import LocalGrid
from safetensors.torch import load_file
from short_run import rows, run

from fedmerge import data, evaluate, models
from server import Callback, RunConfig
from server._best import Best

SHORT: dict[str, Any] = {
    "rounds": 3,
    "local_epochs": 1,
    "retrain_epochs": 1,
    "restarts": 1,
    "local_evaluation": False,
    "head": "none",
}
CHOOSING = {**SHORT, "hand_out": "best-on-val"}


def of(path: Path, stage: str, split: str = "test") -> list[dict[str, Any]]:
    return [row for row in rows(path) if (row["stage"], row["split"], row["client"]) == (stage, split, None)]


def fading(rounds: int) -> Any:
    """Clients whose networks are of zeros after so many trainings of the federation."""
    trainings: list[int] = []

    def spoil(client: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            trainings.append(client)
            if len(trainings) > 4 * rounds:
                arrays = reply.content["arrays"].to_torch_state_dict()
                reply.content["arrays"] = ArrayRecord({k: torch.zeros_like(v) for k, v in arrays.items()})
        return reply

    return LocalGrid(4, spoil=spoil)


def test_the_network_handed_out_is_the_first_of_the_best_on_val_and_no_test_image_chooses(tmp_path: Path) -> None:
    found = run(tmp_path, **{**CHOOSING, "rounds": 2}, controls="none", init="pretrained")
    offered = [row for row in rows(tmp_path) if row["split"] == "val"]
    assert [(row["round"], row["stage"]) for row in offered] == [
        (r, stage) for r in (1, 2) for stage in ("merged", "repaired", "retrained")
    ]
    best = max(offered, key=lambda row: row["accuracy"])  # the first of equals
    assert found["handed_out"] == {key: best[key] for key in ("round", "stage", "loss", "accuracy")}
    setup = RunConfig.read(tmp_path / "config.toml").setup()
    params, split = load_file(tmp_path / "model.safetensors"), setup.split()
    on_val, on_test = (evaluate(setup.network(), params, of) for of in (split.val_images, split.test_images))
    assert (on_val.accuracy, on_val.loss) == (best["accuracy"], best["loss"])
    chosen = of(tmp_path, "chosen")
    assert [row["round"] for row in chosen] == [1, 2]
    assert (chosen[-1]["accuracy"], chosen[-1]["loss"]) == (on_test.accuracy, on_test.loss)
    for row, r in zip(chosen, (1, 2), strict=True):  # after each round the best so far
        so_far = max((o for o in offered if o["round"] <= r), key=lambda o: o["accuracy"])
        same = [
            o
            for o in rows(tmp_path)
            if o["split"] == "test" and (o["round"], o["stage"]) == (so_far["round"], so_far["stage"])
        ]
        assert [(o["accuracy"], o["loss"]) for o in same] == [(row["accuracy"], row["loss"])]
    assert "chosen" in [one["stage"] for one in found["per_class"]]


def test_without_the_key_nothing_is_chosen_and_the_last_network_stays(tmp_path: Path) -> None:
    settings = {"rounds": 2, "controls": "none", "merger": "average"}
    found = run(tmp_path / "last", **{**SHORT, **settings})
    assert found["handed_out"] is None
    assert not [row for row in rows(tmp_path / "last") if row["split"] == "val" or row["stage"] == "chosen"]
    run(tmp_path / "best", **{**CHOOSING, **settings})
    kept = [row for row in rows(tmp_path / "best") if row["split"] != "val" and row["stage"] != "chosen"]
    assert kept == rows(tmp_path / "last")  # choosing changes no round


class Copies(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def after_round(self, server_round: int, *given: Any) -> None:
        shutil.copytree(self.path, self.path.with_name(f"cut-{server_round}"))


def test_a_choice_of_an_early_round_survives_that_the_run_is_cut_off(tmp_path: Path) -> None:
    settings = {**CHOOSING, "strategy": "fedavg", "init": "shared", "controls": "none", "head": "analytic"}
    whole = tmp_path / "whole"
    found = run(whole, fading(1), callbacks=[Copies(whole)], **settings)
    assert (found["handed_out"]["round"], found["handed_out"]["stage"]) == (1, "aggregated")
    assert [row["accuracy"] for row in of(whole, "chosen")] == [of(whole, "aggregated")[0]["accuracy"]] * 3
    assert of(whole, "aggregated")[-1]["accuracy"] < 0.2
    assert of(whole, "head")[-1]["accuracy"] > of(whole, "chosen")[-1]["accuracy"]  # the head is put on what was chosen
    for cut in (1, 2):
        run(tmp_path / f"cut-{cut}", fading(0), resume=True, **settings)
        for name in ("model.safetensors", "summary.json"):
            assert (tmp_path / f"cut-{cut}" / name).read_bytes() == (whole / name).read_bytes(), (cut, name)
        assert rows(tmp_path / f"cut-{cut}") == rows(whole)


def test_fedavg_as_a_control_chooses_among_its_rounds(tmp_path: Path) -> None:
    settings = {**CHOOSING, "lr": 0.5, "partition": "dirichlet", "partition_alpha": 0.1}
    run(tmp_path / "own", controls="fedavg", retrain="none", **settings)
    alone = run(tmp_path / "alone", strategy="fedavg", init="shared", controls="none", **settings)
    own, chosen = (
        [(row["round"], row["accuracy"], row["loss"]) for row in of(tmp_path / path, stage)]
        for path, stage in (("own", "fedavg"), ("alone", "chosen"))
    )
    assert own == chosen
    assert alone["handed_out"]["round"] < 3  # so that this tells the choice from the last round
    titles = [s["title"] for s in json.loads((tmp_path / "own" / "summary.json").read_text())["stages"]]
    assert "FedAvg, 3 rounds, best on val" in titles


def test_a_control_whose_retraining_harms_goes_without_it(tmp_path: Path) -> None:
    few = {
        "rounds": 1,
        "public_fraction": 0.02,
        "retrain": "labels",
        "retrain_epochs": 30,
        "local_epochs": 8,
        "clients": 3,
    }
    for name, how in (("last", {}), ("best", {"hand_out": "best-on-val"})):
        run(tmp_path / name, controls="best-client-retrain", **{**SHORT, **few, **how})
    retrained, unretrained = of(tmp_path / "last", "client-best-retrained"), of(tmp_path / "last", "client-best")
    (one,), (other,), (found,) = retrained, unretrained, of(tmp_path / "best", "client-best-retrained")
    assert one["accuracy"] < other["accuracy"]
    assert (found["accuracy"], found["loss"]) == (other["accuracy"], other["loss"])


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_of_equals_the_first_is_taken_and_where_there_is_no_accuracy_the_lower_loss(
    kind: str, digits: data.Images
) -> None:
    model = models.build("mlp", classes=10, in_shape=digits.shape, width=8, seed=0)
    first, other = (
        model.state_dict(),
        models.build("mlp", classes=10, in_shape=digits.shape, width=8, seed=1).state_dict(),
    )
    val = digits.select(range(200))
    if kind == "loss":
        targets = F.one_hot(val.labels, 10).float()
        val = data.as_data((val.normalise(val.images), targets), model, loss=F.mse_loss)
    best = Best(SimpleNamespace(split=SimpleNamespace(val_images=val), model=model, device="cpu"))
    for server_round in (1, 2):
        best.offer(server_round, "merged", dict(first))
    assert best.chosen.round == 1
    row = best.offer(3, "merged", other)
    scores = [evaluate(model, params, val) for params in (first, other)]
    better = scores[1].merit > scores[0].merit
    assert (row.split, row.loss) == ("val", scores[1].loss)
    assert (best.chosen.round, best.params is other) == ((3, True) if better else (1, False))
    assert scores[0].merit != scores[1].merit
