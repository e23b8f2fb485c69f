"""The verdict: its numbers against the files of the runs, its words against what the numbers say."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.compare.verdict import sentence, verdicts
from experiments.records.runs import find

WriteRun = Callable[..., Path]
NAMES = {
    "fedavg": "FedAvg",
    "client-best-retrained": "best client + retrain",
    "public-only": "public only",
    "ensemble": "the ensemble of clients",
}


def _stages(**accuracies: float) -> dict[str, object]:
    titles = {"merged": "MergeMany", "retrained": "+ retrain"}
    rows = [
        {"stage": name.replace("_", "-"), "title": titles.get(name, name), "accuracy": a, "loss": 1.0, "sd": None, "note": ""}
        for name, a in accuracies.items()
    ]  # fmt: skip
    return {"stages": rows}


def _said(path: Path) -> str:
    (found,) = verdicts(find(path))
    return sentence(found)


def test_the_numbers_of_one_run_are_those_of_its_summary(write_run: WriteRun) -> None:
    given = _stages(
        ensemble=0.91, merged=0.7, retrained=0.9, fedavg=0.925, client_best_retrained=0.8975, public_only=0.85
    )
    path = write_run(summary=given)
    text = _said(path)
    stages = {s["stage"]: s["accuracy"] for s in json.loads((path / "summary.json").read_text())["stages"]}
    assert text.startswith(f"MergeMany + retrain ends at {100 * stages['retrained']:.2f} %: ")
    for stage, name in NAMES.items():
        difference = stages["retrained"] - stages[stage]
        way = "above" if difference > 0 else "below"
        expected = rf"{100 * abs(difference):.2f}( points)? {way} {re.escape(name)} \({100 * stages[stage]:.2f} %\)"
        assert re.search(expected, text), expected
    assert len(re.findall("above|below", text)) == len(NAMES)


def test_one_seed_says_that_it_cannot_tell_and_what_its_images_leave(write_run: WriteRun) -> None:
    path = write_run(summary=_stages(retrained=0.9, fedavg=0.9) | {"classes": ["a", "b"], "labels": {"test": [40, 60]}})
    text = _said(path)
    z = stats.norm.ppf(0.975)
    n, share = 100, 0.9
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert "level with FedAvg (90.00 %)" in text
    assert "one seed cannot tell" in text
    assert f"100 test images alone leave {100 * (centre - half):.2f} to {100 * (centre + half):.2f} %" in text


@pytest.mark.parametrize(("public", "said"), [(0.95, True), (0.85, False), (0.9, False)])
def test_where_public_data_alone_is_better_the_sentence_begins_with_that(
    write_run: WriteRun, public: float, said: bool
) -> None:
    text = _said(write_run(summary=_stages(retrained=0.9, public_only=public)))
    assert text.startswith("Public data alone is better (public only): ") == said
    assert ("better" in text) == said


def test_what_was_not_computed_is_named(write_run: WriteRun) -> None:
    text = _said(write_run(summary=_stages(retrained=0.9, fedavg=0.8)))
    assert "not computed: best client + retrain, public only, the ensemble of clients" in text


def test_fedavg_is_not_held_against_itself(write_run: WriteRun) -> None:
    text = _said(write_run(strategy="fedavg", summary=_stages(aggregated=0.9, public_only=0.8)))
    assert "FedAvg" not in text
    assert "10.00 points above public only (80.00 %)" in text


@pytest.mark.parametrize(
    ("fedavg", "best", "said"),
    [
        ([0.5, 0.51, 0.49], [0.6, 0.61, 0.59], "3 seeds tell it from FedAvg and best client + retrain"),
        ([0.5, 0.51, 0.49], [0.7, 0.9, 0.6], "3 seeds tell it from FedAvg but not from best client + retrain"),
        ([0.9, 0.7, 0.6], [0.7, 0.9, 0.6], "3 seeds cannot tell it from FedAvg or best client + retrain"),
    ],
)
def test_seeds_tell_apart_what_the_corrected_tests_tell_apart(
    write_run: WriteRun, tmp_path: Path, fedavg: list[float], best: list[float], said: str
) -> None:
    ends = [0.8, 0.812, 0.791]
    for seed, accuracies in enumerate(zip(ends, fedavg, best, strict=True)):
        end, f, b = accuracies
        write_run(f"runs/{seed}", seed=seed, summary=_stages(retrained=end, fedavg=f, client_best_retrained=b))
    text = _said(tmp_path / "runs")
    assert said in text
    raw = [stats.ttest_rel(ends, other).pvalue for other in (fedavg, best)]
    low, high = sorted(raw)
    corrected = {low: min(1.0, 2 * low), high: min(1.0, max(2 * low, high))}
    shown = [float(p) for p in re.findall(r"p = ([\d.]+)", text)] + [0.0] * text.count("p < 0.001")
    assert sorted(shown) == pytest.approx(sorted(corrected.values()), abs=1e-3)
    for other in (fedavg, best):
        found = stats.ttest_rel(ends, other)
        half = found.confidence_interval(0.95).high - (sum(ends) - sum(other)) / 3
        assert f"{100 * abs(sum(ends) - sum(other)) / 3:.2f} ± {100 * half:.2f}" in text


def test_setups_come_best_first_each_with_its_name(write_bench: Callable[[], Path]) -> None:
    found = verdicts(find(write_bench()))
    assert len(found) == 4
    assert [v.accuracy for v in found] == sorted((v.accuracy for v in found), reverse=True)
    assert all(sentence(v).startswith(f"{v.setup}: ") for v in found)


def test_runs_that_did_not_finish_have_no_verdict(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", finished=False)
    assert verdicts(find(tmp_path / "runs")) == []


def test_what_was_chosen_on_val_is_named_with_its_round_and_counted_over_seeds(
    write_run: WriteRun, tmp_path: Path
) -> None:
    titles = {
        "merged": "MergeMany",
        "repaired": "+ repair",
        "retrained": "+ retrain",
        "chosen": "Best on val",
        "head": "+ head",
    }

    def chosen(stage: str, server_round: int, *stages: str) -> dict[str, object]:
        given = _stages(merged=0.7, repaired=0.8, retrained=0.75, chosen=0.8, **dict.fromkeys(stages, 0.85))
        rows = [{**row, "title": titles[row["stage"]]} for row in given["stages"]]
        return {"stages": rows, "handed_out": {"round": server_round, "stage": stage, "loss": 1.0, "accuracy": 0.8}}

    one = _said(write_run("one", summary=chosen("repaired", 2)))
    assert one.startswith("Best on val (MergeMany + repair of round 2) ends at 80.00 %")
    headed = _said(write_run("headed", summary=chosen("merged", 1, "head")))
    assert headed.startswith("Best on val + head (MergeMany of round 1) ends at 85.00 %")
    for seed, (stage, server_round) in enumerate((("repaired", 2), ("retrained", 1), ("repaired", 2))):
        write_run(f"runs/{seed}", seed=seed, summary=chosen(stage, server_round))
    several = _said(tmp_path / "runs")
    assert several.startswith(
        "Best on val (2 × MergeMany + repair of round 2, 1 × MergeMany + repair + retrain of round 1)"
    )


def test_a_run_of_fedavg_that_chose_is_what_others_are_held_against(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", hand_out="best-on-val", summary=_stages(retrained=0.7, chosen=0.9))
    write_run("runs/b", hand_out="best-on-val", strategy="fedavg", summary=_stages(aggregated=0.5, chosen=0.8))
    said = {found.setup: sentence(found) for found in verdicts(find(tmp_path / "runs"))}
    assert "10.00 points above FedAvg (80.00 %)" in said["strategy=merge-many"]
    assert "FedAvg" not in said["strategy=fedavg"]


def test_a_verdict_rests_on_the_seeds_that_have_what_it_is_held_against(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(4):
        held = {"fedavg": 0.8} if seed < 2 else {}
        best = {"client_best_retrained": 0.7} if seed < 1 else {}
        write_run(f"runs/{seed}", seed=seed, summary=_stages(retrained=0.9 + 0.001 * seed, **held, **best))
    text = _said(tmp_path / "runs")
    assert "above FedAvg (80.00 % over 2 of the seeds, p = 0.003)" in text
    assert "above best client + retrain (70.00 % over 1 of the seeds)" in text
    assert text.endswith("; 2 seeds tell it from FedAvg but not from best client + retrain.")


def test_public_data_is_not_better_by_round_off(write_run: WriteRun, tmp_path: Path) -> None:
    ends, public = [0.1, 0.2, 0.4], [0.4, 0.1, 0.2]
    assert np.mean(np.subtract(ends, public)) < 0
    for seed, (end, alone) in enumerate(zip(ends, public, strict=True)):
        write_run(f"runs/{seed}", seed=seed, summary=_stages(retrained=end, public_only=alone))
    text = _said(tmp_path / "runs")
    assert text.startswith("+ retrain ends at 23.33")
    assert "points from public only" in text


def test_what_has_no_accuracy_is_neither_above_nor_below_and_comes_last(write_run: WriteRun, tmp_path: Path) -> None:
    for clients, accuracy in ((3, float("nan")), (4, 0.7), (5, 0.8)):
        write_run(f"runs/{clients}", clients=clients, summary=_stages(retrained=accuracy, fedavg=0.75))
    write_run("runs/6", clients=6, summary=_stages(retrained=0.6, fedavg=float("nan")))
    said = [sentence(found) for found in verdicts(find(tmp_path / "runs"))]
    assert [text.partition(":")[0] for text in said] == ["clients=5", "clients=4", "clients=6", "clients=3"]
    assert said[-1] == "clients=3: + retrain has no accuracy."
    assert not any("nan" in text for text in said)
