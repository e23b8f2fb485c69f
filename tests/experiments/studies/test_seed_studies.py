"""What must hold of the studies that train networks, whatever the training: ends of paths, copies, cuts of data."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedmerge as fm
from experiments.studies import (
    averaging,
    biased_split,
    different_widths,
    merge_many,
    otfusion,
    private_split,
    pruning,
    secure_alignment,
    skill_transfer,
    train_merge_train,
    trajectory,
    weight_decay,
)
from experiments.studies.averaging import ATTACK
from experiments.studies.bench import Bench, Training
from experiments.studies.interpolation import ALIGNED, OWN, RAW, held, normalised, paths
from experiments.studies.study import Study, Work
from fedmerge.errors import DataError

TINY: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "width": 12, "images": 200, "public_images": 60, "val_images": 60,
    "test_images": 100, "epochs": 20, "lr": 0.1, "batch_size": 16,
}  # fmt: skip


def bench(tmp_path: Path, **options: Any) -> Bench:
    return Bench(Training(**TINY), Work(tmp_path, "digits"), 0, **options)


def rows(study: Study, tmp_path: Path, **changes: Any) -> pd.DataFrame:
    """All rows of a study in its quick size, but for ``changes``."""
    work = Work(tmp_path, "digits", say=lambda line: None)
    cells = study.make(replace(study.sizes["quick"], **changes), work)
    return pd.DataFrame([{**cell.key, **row} for cell in cells for row in cell.measure()])


def test_paths_begin_and_end_at_the_networks_and_alignment_lowers_the_barrier_of_a_planted_pair(tmp_path: Path) -> None:
    found = bench(tmp_path)
    a = found.trained(0)
    b = weight_decay.shuffled(found, a)
    table = pd.DataFrame(paths(found, a, b, points=5))
    ends = table[table["alpha"].isin([0, 1])]
    assert ends["accuracy"].tolist() == pytest.approx([found.score(a)["accuracy"]] * 6)
    lowest = table.groupby("path")["accuracy"].min()
    assert lowest[ALIGNED] == pytest.approx(found.score(a)["accuracy"])
    assert lowest[RAW] < lowest[ALIGNED] - 0.2
    assert lowest[OWN] == pytest.approx(lowest[RAW])  # b (aligned) is a
    assert (table["distance"] > 0.5).all()
    assert (table["moved"] > 0.3).all()


def test_a_group_that_is_held_does_not_move_and_the_others_keep_the_function(tmp_path: Path) -> None:
    found = bench(tmp_path)
    a = found.trained(0)
    spec = held(found.spec, "fc1")
    assert spec.groups == tuple(group for group in found.spec.groups if group != "fc1")
    moved = fm.permute(a, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    assert torch.equal(moved["fc1.weight"], a["fc1.weight"])
    assert found.score(moved) == pytest.approx(found.score(a))


def test_start_points_that_are_moved_together_coincide_and_nothing_else_changes() -> None:
    table = pd.DataFrame(
        {"seed": 0, "kernel": [3, 3, 6, 6], "path": RAW, "alpha": [0, 1, 0, 1], "accuracy": [0.9, 0.8, 0.5, 0.3]}
    )
    assert normalised(table, "kernel", "accuracy").tolist() == pytest.approx([0.9, 0.8, 0.9, 0.7])


def test_their_schedule_ends_where_a_slice_does_and_never_leaves_its_warm_up_from_six_networks_on() -> None:
    own = fm.models.recipe("hlb")
    for n in (3, 6, 12):
        theirs = private_split.Slice(**vars(own), slices=n + 1)
        assert theirs.rate(1.0) == own.rate(1 / (n + 1))
        assert (theirs.rate(1.0) == max(theirs.rate(t / 100) for t in range(101))) == (n >= 6)
    assert private_split.Slice(**vars(own)).rate(0.7) == own.rate(0.7)


def test_the_fault_and_one_initialisation_change_training(tmp_path: Path) -> None:
    found = rows(private_split.STUDY, tmp_path).set_index(["fault", "init", "network"])["loss"].sort_index()
    assert found[False, "independent", "control 1"] != found[True, "independent", "control 1"]
    assert set(found[False, "shared"].index) == {private_split.SHARED, f"{private_split.SHARED}, retrained"}
    assert found[False, "shared", private_split.SHARED] != found[False, "independent", "plain average"]
    assert len(found[False, "independent"]) == len(found[True, "independent"]) == 12


def test_two_biased_halves_are_the_whole_and_hold_their_shares_of_every_class() -> None:
    images = fm.data.load("digits").train
    a, b = biased_split.biased(images, 0.2, np.random.default_rng(0))
    assert len(a) + len(b) == len(images)
    counts = np.array(images.counts())
    shares = np.array(a.counts()) / counts
    assert shares[:5] == pytest.approx([0.2] * 5, abs=0.01)
    assert shares[5:] == pytest.approx([0.8] * 5, abs=0.01)


def test_calibration_is_exact_where_confidence_is_accuracy_and_the_gap_where_it_is_not() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    sure = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64)
    assert biased_split.said(sure, labels)["calibration"] == pytest.approx(0)
    loud = torch.tensor([[0.95, 0.05]] * 4, dtype=torch.float64)
    found = biased_split.said(loud, labels)
    assert found["calibration"] == pytest.approx(0.2)
    assert found["loss"] == pytest.approx(-(3 * math.log(0.95) + math.log(0.05)) / 4)


def test_every_merge_of_a_network_with_its_copies_is_that_network(tmp_path: Path) -> None:
    found = bench(tmp_path)
    a = found.trained(0)
    copies = [a, *(weight_decay.shuffled(found, a) for _ in range(2))]
    right = found.score(a)
    for how in (merge_many.ANCHORED, merge_many.ACTIVATIONS):
        assert found.score(merge_many.merged(found, copies, how)) == pytest.approx(right)
    assert found.score(merge_many.merged(found, copies, merge_many.AVERAGE))["accuracy"] < right["accuracy"] - 0.2


def test_fusion_is_measured_beside_the_best_network_finetuned_as_long(tmp_path: Path) -> None:
    found = rows(otfusion.PAIRS, tmp_path).set_index("network")
    tuned = found[found["finetuned"] >= 0]
    assert list(tuned.index) == [otfusion.BEST, otfusion.VANILLA, otfusion.OT, otfusion.ACTIVATIONS]
    each = found.loc[[otfusion.INDIVIDUAL, otfusion.BEST], "accuracy"]
    assert found.loc[otfusion.TOGETHER, "finetuned"] == -1
    assert (each > 0).all()


def test_a_specialist_sees_all_of_its_skill_and_the_generalist_none() -> None:
    images = fm.data.load("digits").train
    special, general = skill_transfer.split(images, 4, 0.1, np.random.default_rng(0))
    assert len(special) + len(general) == len(images)
    assert general.counts()[4] == 0
    assert special.counts()[4] == images.counts()[4]
    assert len(special) - special.counts()[4] == round(0.1 * (len(images) - images.counts()[4]))


def test_shares_of_nothing_and_of_all_are_generalist_and_specialist(tmp_path: Path) -> None:
    found = rows(skill_transfer.STUDY, tmp_path, points=2)
    ends = found[found["network"] != skill_transfer.SHARED].pivot_table(
        index="share", columns="network", values="accuracy"
    )
    assert (ends.nunique(axis=1) == 1).all()


def test_what_is_cut_to_its_own_shapes_stays_and_what_is_wider_gets_the_rest() -> None:
    narrow, wide = {"w": torch.ones(2, 3)}, {"w": torch.zeros(4, 5)}
    assert torch.equal(different_widths.cut(wide, wide)["w"], wide["w"])
    grown = different_widths.cut(narrow, wide)["w"]
    assert grown.sum() == 6 == grown[:2, :3].sum()
    assert different_widths.cut(wide, narrow)["w"].shape == (2, 3)


def test_two_widths_are_fused_both_ways(tmp_path: Path) -> None:
    sizes = {"width": 32, "narrow": 16, "images": 1000, "epochs": 12, "public_images": 150}
    found = rows(different_widths.STUDY, tmp_path, **sizes).set_index(["result", "network"])["before"]
    for result in ("wide", "narrow"):
        assert found[result, different_widths.ALONE] > 0.6
        for ground in ("weights", "activations"):
            assert found[result, f"OT by {ground} + REPAIR"] > 0.3
            assert found[result, f"OT by {ground}"] > found[result, different_widths.UNITS]


def test_the_strongest_units_come_first_and_the_function_stays(tmp_path: Path) -> None:
    found = bench(tmp_path)
    a = found.trained(0)
    ordered = pruning.strongest_first(a, found.spec)
    torch.testing.assert_close(found.probabilities(ordered), found.probabilities(a), atol=1e-6, rtol=1e-4)
    for name in ("fc1.weight", "fc2.weight"):
        norms = ordered[name].abs().sum(1)
        assert (norms.diff() <= 1e-5).all()


def test_learned_coefficients_and_a_stitch_between_a_network_and_itself_lose_nothing(tmp_path: Path) -> None:
    found = bench(tmp_path)
    networks = [found.trained(i) for i in (0, 1)]
    mixed = found.score(trajectory.learned(found, networks), found.val)["loss"]
    assert mixed < found.score(fm.average(networks), found.val)["loss"]
    alike = [networks[0]] * 12  # as of one training: only their scale is left to learn
    scaled = found.score(trajectory.learned(found, alike, rate=2.0), found.val)["loss"]
    assert scaled <= found.score(networks[0], found.val)["loss"] * (1 + 1e-6)
    own = trajectory.stitched(found, networks[0], networks[0], "fc1")
    agree = own.argmax(1) == found.probabilities(networks[0]).argmax(1)
    assert agree.double().mean() > 0.95
    hard = fm.attacked(found.model, networks[0], found.test, attack=ATTACK)
    hardened = found.trained(0, name="hard-", attack=ATTACK)
    assert found.score(networks[0])["loss"] < found.score(networks[0], hard)["loss"]
    assert found.score(hardened, hard)["loss"] < found.score(networks[0], hard)["loss"]


def test_averages_over_one_network_repeated_are_that_network(tmp_path: Path) -> None:
    found = bench(tmp_path)
    again = [found.trained(0)] * 4
    right = found.probabilities(again[0])
    torch.testing.assert_close(found.probabilities(trajectory.swad(found, again)), right)
    torch.testing.assert_close(trajectory.swag(found, again, samples=2), right)


def table_of(key: list[str], values: dict[Any, Any], columns: list[str]) -> pd.DataFrame:
    """Rows of ``columns`` by the values of ``key``."""
    return pd.DataFrame([dict(zip([*key, *columns], [*at, *row], strict=True)) for at, row in values.items()])


def test_a_fusion_is_told_before_and_after_finetuning_of_one_ground() -> None:
    made = {
        ("mlp", 2, 0, otfusion.INDIVIDUAL): (0.5, -1.0), ("mlp", 2, 0, otfusion.TOGETHER): (0.6, -1.0),
        ("mlp", 2, 0, otfusion.BEST): (0.5, 0.7), ("mlp", 2, 0, otfusion.VANILLA): (0.1, 0.2),
        ("mlp", 2, 0, otfusion.OT): (0.11, 0.3), ("mlp", 2, 0, otfusion.ACTIVATIONS): (0.22, 0.4),
    }  # fmt: skip
    found = table_of(["model", "n", "seed", "network"], made, ["accuracy", "finetuned"])
    said = otfusion.PAIRS.answer(found.assign(seconds=0.0))
    assert "2 mlp: fused by transport (activations) 22.0 % (vanilla 10.0), finetuned 40.0 (vanilla 20.0" in said
    better = found.assign(finetuned=found["finetuned"].where(found["network"] != otfusion.OT, 0.5))
    assert "transport (weights) 11.0 % (vanilla 10.0), finetuned 50.0" in otfusion.PAIRS.answer(better)


def test_a_column_of_fewer_seeds_says_so() -> None:
    made = {
        (private_split.MERGED, 2, 0): (0.5,),
        (private_split.MERGED, 2, 1): (0.7,),
        (private_split.MERGED, 8, 0): (0.9,),
    }
    found = private_split._table(table_of(["network", "epochs", "seed"], made, ["accuracy"]), "epochs")
    assert found.splitlines()[0].endswith("| epochs = 2 | epochs = 8 (1 seed) |")
    assert found.splitlines()[2].endswith("| 60.0 (+0.0) | 90.0 (+0.0) |")


@pytest.mark.parametrize(("rival", "said"), [(0.4, "above"), (0.5003, "level with"), (0.6, "below")])
def test_on_which_side_of_its_rivals_a_retrained_merge_lies_is_read_from_the_rows(rival: float, said: str) -> None:
    names = ("best client, retrained", "plain average, retrained", "ensemble", "control n")
    reached = {private_split.MERGED: 0.5, "control 1": rival, **dict.fromkeys(names, 0.9)}
    made = {(seed, 3, fault, name): (x,) for name, x in reached.items() for seed in (0, 1) for fault in (False, True)}
    found = table_of(["seed", "n", "fault", "network"], made, ["accuracy"]).assign(epochs=4, init="independent")
    assert f"lies {said} control 1" in private_split.STUDY.answer(found)


def test_seeds_that_agree_have_a_deviation_of_nothing() -> None:
    made = {("wide", "alone", seed): (0.5, 0.625, 0.0) for seed in (0, 1)}
    found = different_widths._ours(table_of(["result", "network", "seed"], made, ["before", "after", "seconds"]))
    assert "| 50.0 ± 0.0 | 62.5 ± 0.0 |" in found


@pytest.mark.parametrize(("fused", "said"), [(0.9, "Both survive, in part"), (0.6, "They do not both survive")])
def test_whether_both_survive_is_read_from_the_rows(fused: float, said: str) -> None:
    ways = (skill_transfer.VANILLA, skill_transfer.OT, skill_transfer.ACTIVATIONS, skill_transfer.SHARED)
    made = {(0, name, share): (0.7, 0.1, 0.8) for name in (*ways, skill_transfer.ENSEMBLE) for share in (0.0, 0.5, 1.0)}
    made[0, skill_transfer.OT, 0.5] = (fused, 0.5, 0.8)
    found = table_of(["seed", "network", "share"], made, ["accuracy", "skill", "rest"])
    assert skill_transfer.STUDY.answer(found).startswith(f"{said}: fused by transport a network reaches")


@pytest.mark.parametrize(("error", "said"), [(0.1, "It is better calibrated"), (0.3, "It is not better calibrated")])
def test_whether_a_merge_is_better_calibrated_is_read_from_the_rows(error: float, said: str) -> None:
    of = biased_split
    names = ("A", "B", of.FULL, of.ENSEMBLE, of.UNALIGNED, of.SHARED, of.WEIGHTS, of.ACTIVATIONS)
    made = {(0, name, 0.5): (0.3, 2.0, 0.2, 0.5) for name in names} | {(0, of.REPAIRED, 0.5): (0.4, 1.5, error, 0.5)}
    found = table_of(["seed", "network", "alpha"], made, ["accuracy", "loss", "calibration", "confidence"])
    assert said in of.STUDY.answer(found)
    assert ("which is why its loss is 1.50" in of.STUDY.answer(found)) == (error < 0.2)


def test_bytes_are_told_by_the_number_of_sums() -> None:
    names = ("sees everything", "two sums", "two sums, one client gone", "eight sums")
    made = {("digits", 5, 0, n): (0.9 - s / 100, 0.9, 100.0 * s) for n, s in zip(names, (1, 4, 4, 16), strict=True)}
    found = table_of(["dataset", "clients", "seed", "server"], made, ["merged", "retrained", "bytes_up"])
    said = secure_alignment.STUDY.answer(found)
    assert "A client sends 4.0\ntimes as many bytes with two sums, 16.0 times with eight" in said


def test_two_averages_that_are_one_network_are_told_to_be() -> None:
    made = {("one run", name, seed): (0.5 + seed / 10, 1.0, 0.2, 1) for name in ("SWA", "LAWA") for seed in (0, 1)}
    keys, columns = ["situation", "method", "seed"], ["accuracy", "loss", "attacked", "inference"]
    assert "LAWA, of the latest three, are the same network here." in averaging._ours(table_of(keys, made, columns))
    other = table_of(keys, made | {("one run", "LAWA", 1): (0.5, 1.0, 0.2, 1)}, columns)
    assert "same network" not in averaging._ours(other)


def test_a_skill_that_no_image_shows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the skill is class 10, counted from 0, of which 'digits' \(10 classes\) has too few"
    ):
        rows(skill_transfer.STUDY, tmp_path, skill=10)


@pytest.mark.parametrize(("merged", "said"), [(0.9, "a"), (0.5, "no")])
def test_whether_merging_gains_as_pre_training_is_read_from_the_rows(merged: float, said: str) -> None:
    of = train_merge_train
    reached = {of.ONE: 0.8, of.TWO_SCHEDULES: 0.7, of.PAPER: 0.5, of.ACTIVATIONS: merged}
    made = {(0, 3, 3, name): (1.0, accuracy) for name, accuracy in reached.items()}
    found = table_of(["seed", "kernel", "n", "network"], made, ["loss", "accuracy"])
    assert of.STUDY.answer(found).startswith(f"Merging shows {said} gain as pre-training.")
