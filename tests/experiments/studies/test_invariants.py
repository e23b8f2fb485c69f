"""What each study promises of its rows, at toy size: ends are networks, alignment and curves lower what they should."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import fedmerge as fm
from experiments.studies import STUDIES, counterexample, lmc
from experiments.studies.dp_networks import DPMerge, Setting
from experiments.studies.lines import MEASURES, barriers, gap
from experiments.studies.networks import Networks, Trained
from experiments.studies.study import Config, Work
from fedmerge.privacy import one_run


def measured(name: str, folder: Path, **changes: object) -> tuple[pd.DataFrame, Config, Work]:
    """The rows of a study in its quick size, changed."""
    config = replace(STUDIES[name].sizes["quick"], **changes)
    work = Work(folder, config.dataset)
    rows = []
    for cell in STUDIES[name].make(config, work):
        found = cell.measure()
        rows += [{**cell.key, **row} for row in ([found] if isinstance(found, dict) else found)]
    return pd.DataFrame(rows), config, work


def evaluated(nets: Networks, params: dict[str, torch.Tensor]) -> list[float]:
    found = [fm.evaluate(nets.model, params, images) for images in nets.seen.values()]
    return [value for of in found for value in (of.loss, 1 - of.accuracy)]


def test_the_counterexample_is_three_quarters_half_way_to_four_digits(tmp_path: Path) -> None:
    rows, _, _ = measured("counterexample", tmp_path, side=256)
    half = rows[rows["alpha"] == 0.5].set_index(["first", "second"])["accuracy"]
    expected = {("stays", "stays"): 0.75, ("stays", "swapped"): 0.75}
    expected |= {("swapped", second): 0.75 - 1 / 512 for second in ("stays", "swapped")}  # the diagonal
    assert half.to_dict() == pytest.approx(expected, abs=1e-12)
    assert set(rows[rows["alpha"].isin([0.0, 1.0])]["accuracy"]) == {1.0}
    x, _ = counterexample.square(64)
    b = counterexample.permuted("swapped", "swapped")
    assert torch.equal(counterexample.answers(b, x), counterexample.answers(counterexample.B, x))


def test_a_branch_is_the_main_training_until_it_leaves_it_and_the_ends_of_its_lines_are_both(tmp_path: Path) -> None:
    rows, config, work = measured("lmc", tmp_path)
    nets = Networks(config, work, batch_size=config.batch_size, schedule="constant")
    assert all(torch.equal(t, nets.stage(0, 3)[n]) for n, t in nets.stage(0, 3, branch=3).items())
    main, branch = nets.stage(0, 4), nets.stage(0, 4, branch=3)
    assert fm.distance(main, branch).l2 > 0
    others = nets.stage(0, 1), nets.stage(lmc.APART, 1)
    apart = rows[rows["k1"] == lmc.OTHER].iloc[0]
    assert apart["l2"] == pytest.approx(fm.distance(*others).l2, abs=1e-3)
    assert apart["l2"] > 2 * rows.loc[rows["k1"] == 0, "l2"].max()
    for aligner in ("none", config.aligner):
        line = rows[(rows["k1"] == 3) & (rows["aligner"] == aligner)].set_index("alpha")
        for alpha, params in ((0.0, main), (1.0, branch)):
            assert line.loc[alpha, list(MEASURES)].tolist() == pytest.approx(evaluated(nets, params), rel=1e-4)
        assert line["l2"].iloc[0] <= fm.distance(main, branch).l2 + 1e-3
    assert rows["agreement"].iloc[-1] == pytest.approx(fm.agreement(nets.model, main, branch, nets.seen["test"]).same)


def test_a_main_training_that_gets_no_better_is_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(fm, "evaluate", lambda *_, **__: SimpleNamespace(loss=next(losses)))
    config = replace(STUDIES["lmc"].sizes["quick"], epochs=5, k1=(0, 3, 4), patience=2)
    found = [cell.key for cell in STUDIES["lmc"].make(config, Work(tmp_path, "digits", say=heard.append))]
    assert heard == ["seed 0: stopped early after 4 epochs"]
    assert found == [{"seed": 0, "k1": 0, "k2": 1}, {"seed": 0, "k1": 3, "k2": 1}]


@pytest.mark.parametrize("name", ["barrier-training", "barrier-width"])
def test_alignment_lowers_the_barrier(name: str, tmp_path: Path) -> None:
    axis = {"barrier-training": "epoch", "barrier-width": "width"}[name]
    longer = {"epochs": 8, "at": (8,)} if axis == "epoch" else {"epochs": 8, "widths": (16,)}
    rows, config, _ = measured(name, tmp_path, points=3, **longer)
    found = barriers(rows, ["seed", axis, "aligner"]).set_index("aligner")["train_loss"]
    assert all(found[aligner] < found["none"] for aligner in config.aligners[1:])
    assert found["ste"] <= found["weight-matching"] + 0.1  # it begins there
    assert rows.groupby("aligner")["seconds"].first()["none"] < 0.01


def test_a_planted_pair_has_no_barrier_once_it_is_aligned(tmp_path: Path) -> None:
    config = Trained(dataset="digits", width=16, images=400, evaluated=200, epochs=5, points=5)
    nets = Networks(config, Work(tmp_path, "digits"))
    a = nets.trained(0)
    b = fm.permute(a, nets.spec.random(torch.Generator().manual_seed(1)), spec=nets.spec)
    raw, moved = (pd.DataFrame(nets.line(a, nets.aligned(b, a, how))) for how in ("none", "weight-matching"))
    assert gap(raw, "train_loss").max() > 0.3
    assert np.abs(gap(moved, "train_loss")).max() < 1e-5


def test_a_barrier_counts_points_between_the_ends_only_and_may_be_negative() -> None:
    line = {"alpha": [0.0, 0.5, 1.0], "train_loss": [1.0, 0.5, 2.0], "train_error": [0.1, 0.4, 0.3]}
    rows = pd.DataFrame({"seed": 0, "of": "a", **line, "test_loss": 1.0, "test_error": 0.0, "l2": 7.0})
    (found,) = barriers(rows, ["seed", "of"]).to_dict("records")
    assert found["train_loss"] == -1.0
    assert found["train_error"] == pytest.approx(0.2)
    assert (found["test_loss"], found["l2"], found["train_loss_ends"]) == (0.0, 7.0, 1.5)


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The rows of the line and of three curves between two networks."""
    kinds = ("line", "chain", "bezier", "robust")
    return measured("curves", tmp_path_factory.mktemp("curves"), kinds=kinds)[0]


def test_a_curve_is_lower_than_the_line_that_it_began_at_and_ends_at_both_networks(connected: pd.DataFrame) -> None:
    raw = connected[connected["aligner"] == "none"]
    ways = {kind: way.set_index("alpha") for kind, way in raw.groupby("kind")}
    assert ways["line"]["train_loss"].max() > 0.5 + ways["line"]["train_loss"].iloc[[0, -1]].max()
    for kind in ("chain", "bezier"):
        assert ways[kind]["train_loss"].max() < ways["line"]["train_loss"].max()
        assert ways[kind].iloc[[0, -1]].drop(columns="kind").equals(ways["line"].iloc[[0, -1]].drop(columns="kind"))


def test_a_curve_trained_on_attacked_images_withstands_them_at_its_bend(connected: pd.DataFrame) -> None:
    errors = connected[connected["alpha"] == 0.5].groupby(["aligner", "kind"])["attacked_error"].first()
    for aligner in ("none", "weight-matching"):
        assert errors[aligner, "robust"] <= errors[aligner, "bezier"]
    assert errors["none", "robust"] < errors["none", "bezier"] - 0.05
    assert (connected["attacked_loss"] > connected["test_loss"]).all()


def test_statistics_of_norms_are_measured_anew_between_the_ends(tmp_path: Path) -> None:
    changes = {"model": "resnet20", "width": 0.125, "images": 200, "evaluated": 100, "epochs": 1, "points": 3}
    rows, config, work = measured("curves", tmp_path, kinds=("line",), measured=100, **changes)
    nets = Networks(config, work, augment=False)
    a, b = nets.trained(0), nets.trained(1)
    middle, few = fm.average([a, b]), nets.train.select(range(100))
    anew = fm.repair(nets.model, middle, data=few, method="recompute")
    found = rows[(rows["aligner"] == "none") & (rows["alpha"] == 0.5)]["train_loss"].iloc[0]
    assert found == pytest.approx(fm.evaluate(nets.model, anew, nets.seen["train"]).loss, rel=1e-4)
    assert found != pytest.approx(fm.evaluate(nets.model, middle, nets.seen["train"]).loss, rel=1e-4)


def test_the_corners_of_a_surface_are_the_three_networks_and_alignment_lowers_their_mean(tmp_path: Path) -> None:
    rows, config, work = measured("loss-surface", tmp_path, epochs=8, points=3, margin=0.0)
    nets = Networks(config, work)
    for aligner in ("none", config.aligner):
        at = rows[(rows["aligner"] == aligner) & (rows["point"] != "grid")].set_index("point")
        for seed, name in enumerate("abc"):  # aligned or not, each computes what it did
            expected = fm.evaluate(nets.model, nets.trained(seed), nets.seen["test"])
            assert at.loc[name, ["loss", "accuracy"]].tolist() == pytest.approx(
                [expected.loss, expected.accuracy], 1e-4
            )
    grid = rows[(rows["aligner"] == "none") & (rows["point"] == "grid")]
    corner = grid[(grid["x"] == 0) & (grid["y"] == 0)]["loss"].iloc[0]
    assert corner == rows[(rows["aligner"] == "none") & (rows["point"] == "a")]["loss"].iloc[0]
    mean = rows[rows["point"] == "mean"].set_index("aligner")["loss"]
    assert mean[config.aligner] < 0.7 * mean["none"]


def test_the_published_numbers_of_permutations_follow_from_a_rule_by_layer(tmp_path: Path) -> None:
    rows, _, _ = measured("symmetries", tmp_path)
    (row,) = rows.to_dict("records")
    assert (row["published"], row["by_layer"], row["layers"], row["groups"]) == (3498, 3498, 3, 3)
    assert row["log10"] == pytest.approx(3 * sum(np.log10(range(1, 513))), abs=0.01)


def test_canaries_give_a_training_without_noise_away_and_one_with_noise_no_more_than_its_account(
    tmp_path: Path,
) -> None:
    config = DPMerge(
        dataset="digits", clients=2, client_images=400, batch_size=20, lr=0.05, canaries=200, delta=1e-3,
        public=0.1,
    )  # fmt: skip
    bounds = {}
    for epsilon, epochs in ((1.0, 2), (math.inf, 60)):
        one = Setting(replace(config, epochs=epochs), Work(tmp_path, "digits"), 0, epsilon)
        wrong, kept = one.canaries
        assert (wrong.labels != one.split.client(0).labels[:200]).all()
        assert len(one.images(0)) == 200 + kept.sum()
        params = one.task.train(0, {}, images=one.images(0))[0].params
        bounds[epsilon] = one_run(one.sure(params, wrong), kept, delta=1e-3).epsilon
        assert 0.9 < one.accounted() <= 1.0 or math.isinf(epsilon)
    assert bounds[1.0] <= 1.0 < 1.5 < bounds[math.inf]


def test_members_are_their_owners_and_nobodys_images_are_with_no_client(tmp_path: Path) -> None:
    config = replace(STUDIES["dp-merge"].sizes["quick"], clients=3)
    one = Setting(config, Work(tmp_path, "digits"), 0, math.inf)
    images, owners = one.asked
    held = [{image.numpy().tobytes() for image in one.images(i).images} for i in range(3)]
    for image, owner in zip(images.images, owners, strict=True):
        assert [i for i in range(3) if image.numpy().tobytes() in held[i]] == ([owner] if owner >= 0 else [])
    assert [int((owners == i).sum()) for i in (-1, 0, 1, 2)] == [120, 40, 40, 40]
