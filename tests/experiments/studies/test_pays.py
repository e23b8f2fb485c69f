"""What the page of does-merging-pay makes of rows whose differences are known, and what its cells measure."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import optimize, stats

import fedmerge as fm
from experiments.studies import pays, pays_cells, pays_tables
from experiments.studies.does_merging_pay import (
    BEST,
    ENSEMBLE,
    FEDAVG,
    FOLDED,
    MERGED,
    NONE,
    PUBLIC,
    RECOMPUTED,
    ROUNDS,
    TENTH,
    Pays,
    Setting,
)
from experiments.studies.study import Work
from server import RunConfig

RESULTS = Path(__file__).parents[3] / "docs" / "results"

LESS_BEST = {0: 0.02, 1: 0.05, 2: 0.035}


def rows() -> pd.DataFrame:
    """Three seeds: merged above the best client by as much as said, below public labels by a point each."""
    found = []
    for seed, gain in LESS_BEST.items():
        merged = 0.5 + 0.1 * seed
        where = {"model": "cnn", "partition": "two classes", "n": 6, "init": "independent", "seed": seed, "of": ""}
        empty = {"val": 0.1, "test": 0.2, "head_val": "", "head_test": "", "strength": ""}
        found += [{**where, "network": ENSEMBLE, "teacher": t, "unlabelled": False, **empty, "test": merged + 0.005}
                  for t in ("mean", "stacked", "by-class")]  # fmt: skip
        ends = {MERGED: merged, BEST: merged - gain, PUBLIC: merged + 0.01}
        for teacher, unlabelled in (("mean", False), ("stacked", False), ("stacked", True)):
            found += [
                {**where, "network": name, "teacher": teacher, "unlabelled": unlabelled, **empty, "head_test": end}
                for name, end in ends.items()
            ]
    return pd.DataFrame(found)


def test_the_family_is_the_whole_way_paired_by_seed_and_corrected_once() -> None:
    best, public = pays_tables.family(pays_tables.settings(pays_tables.read(rows())))
    assert (best.other, best.difference.n, round(best.difference.mean, 6)) == (BEST, 3, 3.5)
    points = [100 * gain for gain in LESS_BEST.values()]
    half = stats.t.ppf(0.975, 2) * pd.Series(points).std() / math.sqrt(3)
    assert best.difference.low == pytest.approx(3.5 - half)
    assert best.p == pytest.approx(stats.ttest_1samp(points, 0).pvalue)  # the other has no spread, so nothing to test
    assert (public.other, round(public.difference.mean, 6), math.isnan(public.p)) == (PUBLIC, -1.0, True)


def test_the_page_says_levels_differences_and_how_much_is_missing() -> None:
    text = pays.STUDY.ours(rows())
    assert "| cnn | two classes | independent | 6 | best client | +3.5 |" in text
    assert "56.5 / 60.0 / 61.0 |" in text  # best client / merged / public labels, with everything
    assert "| merged | cnn | 6 | 40 | 3 | 37 |" in text  # four partitions, two starts, five seeds
    assert "| FedAvg | hlb | 6 | 12 | 0 | 12 |" in text
    assert "| merged | cnn | 3 | 30 | 0 | 30 |" in text  # three clients of two classes each are no setting
    assert "interval and all: 0 of 1. Not in cnn two classes, independent, n = 6 (+3.5, from -" in text
    assert text.count("or above it: all but none.") == 1  # half a point below the best ensemble
    answer = pays.STUDY.answer(rows())
    assert "the best client is\n+3.5 points (above 0 in 1 of 1 settings" in answer
    assert "\n-0.5 points, and within a point of it or above in 1 of 1 settings" in answer


def test_the_way_is_chosen_on_val_network_by_network() -> None:
    found = rows().astype(object)
    found.loc[(found["network"] == MERGED) & (found["teacher"] == "mean"), ["val", "test"]] = 0.9, 0.3
    found.loc[(found["network"] == BEST) & (found["teacher"] == "stacked"), ["head_val", "head_test"]] = 0.8, 0.7
    assert "| 70.0 / 30.0 / 20.0 |\n" in pays.STUDY.ours(found)  # by val .8, .9 and .1; what has no val is no choice


def test_the_default_is_the_best_way_on_val_of_those_without_unlabelled_images() -> None:
    found = rows().astype(object)
    default = (found["network"] == MERGED) & (found["teacher"] == "stacked") & ~found["unlabelled"].astype(bool)
    found.loc[default, "head_val"] = 0.9
    found.loc[(found["network"] == MERGED) & found["unlabelled"].astype(bool), "head_val"] = 0.8
    text = pays.STUDY.ours(found)
    assert "| stacked + head | 90.0 | 90.0 | 1 | 1 |" in text
    assert "| all of that + head | 80.0 | 80.0 | – | 0 |" in text
    assert "By default the program does *stacked + head*" in text
    config = RunConfig.parse({})
    assert (config.retrain, config.teacher, config.head) == ("both", "auto", "analytic")


def test_a_seed_that_lacks_one_of_the_three_networks_is_left_out() -> None:
    found = rows()
    found = found[~((found["network"] == PUBLIC) & (found["seed"] == 1))]
    best, public = pays_tables.family(pays_tables.settings(pays_tables.read(found)))
    assert (best.difference.n, public.difference.n, round(best.difference.mean, 6)) == (2, 2, 2.75)


def test_rivals_stand_beside_merged_of_the_same_seeds() -> None:
    found = rows()
    kept = found[(found["network"] == MERGED) & (found["seed"] == 2)]
    columns = {"network": FOLDED, "head_test": 0.9, "test": 0.8}
    rivals = [kept.assign(**columns), kept.iloc[:1].assign(network="FedDF", unlabelled=True, test=0.5, head_test=0.6)]
    text = pays.STUDY.ours(pd.concat([found, *rivals]))
    assert "| cnn | two classes | independent | 6 | FS-Merge | 1 | – / – | 20.0 / 80.0 | 70.0 / 90.0 |" in text
    assert "| cnn | two classes | independent | 6 | FedDF | 1 | 50.0 | 60.0 | 70.0 | 70.0 |" in text
    assert "| rivals | hlb | 6 | 12 | 0 | 12 |" in text


def test_few_rounds_stand_beside_fedavg_and_one_round_each_chosen_on_val() -> None:
    found = rows().astype(object)
    kept = found[(found["network"] == MERGED) & (found["teacher"] == "stacked") & found["unlabelled"].astype(bool)]
    one = kept.assign(val=0.1, head_val=0.7, head_test=0.61)
    late = kept.assign(network=ROUNDS, val=0.9, test=0.8, head_val=0.5, head_test=0.6)
    early = late.assign(teacher=NONE, val=0.2, test=0.3, head_val=0.95, head_test=0.75)
    made = [early.assign(of="1"), late.assign(of="1"), early.assign(of="5", head_val=0.1), late.assign(of="5")]
    average = late.assign(network=FEDAVG, teacher="", unlabelled="", of="5")
    better = average.assign(network=RECOMPUTED, head_val=0.99, head_test=0.5)
    text = pays.STUDY.ours(pd.concat([found.drop(kept.index), one, *made, average, better]))
    start = "| cnn | two classes | independent | 6 | 3 |"
    row = next(line for line in text.splitlines() if line.startswith(start) and line.endswith("| 75.0 | 50.0 | 61.0 |"))
    assert row.split(" | ")[5:7] == ["30.0 / 75.0 / 80.0 / 60.0", "– / – / – / –"]
    assert "| few rounds | cnn | 6 | 24 | 3 | 21 |" in text


def test_what_was_measured_is_still_a_cell_of_the_plan(tmp_path: Path) -> None:
    measured = pd.read_csv(RESULTS / "does-merging-pay.csv", keep_default_na=False, dtype=str)
    begun = json.loads((RESULTS / "does-merging-pay.json").read_text())["config"]
    config = Pays(seeds=tuple(begun["seeds"]), plan=begun["plan"])
    planned = {tuple(map(str, cell.key.values())) for cell in pays_cells.cells(config, Work(tmp_path))}
    key = ["model", "partition", "n", "init", "seed", "network", "teacher", "unlabelled", "of"]
    measured.loc[measured["network"] == RECOMPUTED, "network"] = FEDAVG  # of one cell
    measured.loc[measured["network"] == ROUNDS, ["teacher", "unlabelled", "of"]] = (
        "stacked",
        "True",
        str(config.rounds[0]),
    )
    there = set(measured[key].itertuples(index=False, name=None))
    assert len(there) >= 1000
    assert there <= planned


def test_learned_weights_are_those_of_the_highest_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    hints = [gain * torch.nn.functional.one_hot(labels, 4) for gain in (1.5, 1.0, 0.0)]
    predictions = [(h + torch.randn(300, 4, generator=generator)).double().softmax(1) for h in hints]
    said = torch.stack([p[torch.arange(300), labels] for p in predictions], 1).numpy()
    weights = pays_cells.mixture(predictions, labels).numpy()
    found = optimize.minimize(
        lambda w: -math.fsum(map(math.log, said @ w)), [1 / 3] * 3, method="SLSQP", bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12},
    )  # fmt: skip
    assert weights == pytest.approx(found.x, abs=2e-3)
    assert 1 > weights[0] > weights[1] > 0.1


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Two clients on digits."""
    config = Pays(seeds=(0,), plan="a toy", labels=100, epochs=3)
    return Setting(Work(tmp_path), config, "digits", 0, 2, TENTH, "independent")


def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """From now on nothing is scored; the networks that would be come here."""
    heard: list[dict[str, torch.Tensor]] = []

    def hear(one: Setting, params: dict[str, torch.Tensor]) -> dict[str, object]:
        heard.append(params)
        return {}

    monkeypatch.setattr(Setting, "scores", hear)
    return heard


def test_feddf_reads_no_label(setting: Setting) -> None:
    found = pays_cells.feddf(setting)
    public = setting.public
    again = Setting(setting.work, setting.config, "digits", 0, 2, TENTH, "independent")
    again.__dict__["public"] = replace(public, labels=(public.labels.clamp_min(0) + 3) % 10)
    assert pays_cells.feddf(again) == found


def test_fedma_in_one_round_is_layer_wise_matching_and_a_cycle_ends_with_one_network(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = scored(monkeypatch)
    for rounds in (pays_cells.ONE, pays_cells.CYCLE):
        pays_cells.fedma(setting, rounds)
    results, spec = setting.results, setting.bench(unlabelled=True).spec
    largest = max(range(2), key=lambda i: (results[i].examples, -i))
    expected = fm.merge(
        [r.params for r in results], spec=spec, method="layer-wise", reference=largest,
        weights=[float(r.examples) for r in results],
    ).params  # fmt: skip
    assert all(torch.equal(heard[0][name], tensor) for name, tensor in expected.items())
    first, last = "fc1.weight", "out.weight"
    assert torch.equal(heard[1][first], heard[0][first])  # fixed in round 1
    assert not torch.equal(heard[1][last], heard[0][last])


def test_the_first_of_few_rounds_is_the_one_round_and_the_next_begin_where_it_ended(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pays_cells.few_rounds(setting, 1, setting.config.epochs)
    once = [pays_cells.retrained(setting, MERGED, teacher, unlabelled=True) for teacher in (NONE, "stacked")]
    assert [{**row, **scores} for row, scores in zip(found, once, strict=True)] == found
    assert [(row.get("teacher"), row["of"]) for row in found] == [(NONE, 1), (None, 1)]
    heard = scored(monkeypatch)
    pays_cells.few_rounds(setting, 2, 0)  # clients that do not train answer with what they were given
    assert all(torch.allclose(heard[1][name], tensor, atol=1e-6) for name, tensor in heard[2].items())
    assert not torch.allclose(heard[3]["out.weight"], heard[2]["out.weight"], atol=1e-3)
