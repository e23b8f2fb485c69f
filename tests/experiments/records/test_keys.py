"""Which config keys tell runs apart, and the groups of runs that differ in their seed alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.records.keys import differing_keys, problem, setups, titles, unused
from experiments.records.runs import find
from server import RunConfig

WriteRun = Callable[..., Path]


def test_setups_are_named_by_what_differs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=1, lr=0.1)
    write_run("runs/b", seed=0, lr=0.1)
    write_run("runs/c", seed=0, lr=0.2, controls="none")
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["lr"]
    assert {name: [run.seed for run in group] for name, group in setups(runs).items()} == {
        "lr=0.1": [0, 1],
        "lr=0.2": [0],
    }


def test_setups_are_called_as_all_their_runs(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(f"runs/a{seed}", seed=seed, lr=0.1, name="slow", tags=f"try {seed}")
        write_run(f"runs/b{seed}", seed=seed, lr=0.2, name=f"number {seed}")
        write_run(f"runs/c{seed}", seed=seed, lr=0.3, name="fast", restarts=1)
        write_run(f"runs/d{seed}", seed=seed, lr=0.4, name="fast", restarts=1)
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["lr", "restarts"]
    assert list(titles(setups(runs)).values()) == ["slow", "lr=0.2, restarts=3", "fast, lr=0.3", "fast, lr=0.4"]
    assert titles(setups([run for run in runs if run.config["name"] == "slow"])) == {"": "slow"}


def test_names_that_confuse_two_setups_are_not_used(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", lr=0.1, name="lr=0.2")
    write_run("runs/b", lr=0.2)
    assert list(titles(setups(find(tmp_path / "runs"))).values()) == ["lr=0.1", "lr=0.2"]


def test_a_key_that_one_run_lacks_and_booleans_are_spelt_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", nesterov=True)
    write_run("runs/b")
    assert list(setups(find(tmp_path / "runs"))) == ["nesterov=true", "nesterov=–"]


def test_what_a_run_does_not_use_neither_names_nor_parts_a_setup(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f0", strategy="fedavg", merger="average", restarts=7, controls="ensemble", retrain="labels")
    write_run("runs/f1", strategy="fedavg", merger="ties", controls="ensemble", retrain="both", seed=1)
    write_run("runs/a", merger="average", aligner="activation-matching")
    write_run("runs/m")
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["strategy", "merger"]
    assert {name: len(group) for name, group in setups(runs).items()} == {
        "strategy=merge-many, merger=average": 1,
        "strategy=fedavg": 2,
        "strategy=merge-many, merger=merge-many": 1,
    }


def test_retraining_counts_where_only_a_control_retrains(write_run: WriteRun, tmp_path: Path) -> None:
    for epochs in (1, 5):
        write_run(f"runs/{epochs}", strategy="fedavg", retrain_epochs=epochs, controls="plain-average-retrain")
    assert differing_keys(find(tmp_path / "runs")) == ["retrain-epochs"]


def test_passes_before_the_first_round_count_only_where_there_are_some(write_run: WriteRun, tmp_path: Path) -> None:
    for name, init in (("a", "shared"), ("b", "pretrained")):
        write_run(f"{name}/1", init=init, pretrain_epochs=1)
        write_run(f"{name}/5", init=init, pretrain_epochs=5)
    assert differing_keys(find(tmp_path / "a")) == []
    assert differing_keys(find(tmp_path / "b")) == ["pretrain-epochs"]


def test_a_strategy_of_another_version_keeps_all_its_keys(write_run: WriteRun, tmp_path: Path) -> None:
    for merger in ("average", "soup-of-the-day"):
        write_run(f"runs/{merger}", strategy="fedfuture", merger=merger)
    write_run("runs/other", merger="soup-of-the-day")
    assert differing_keys(find(tmp_path / "runs")) == ["strategy", "merger"]


def test_what_follows_from_the_model_tells_no_setups_apart_written_out_or_not(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("runs/mlp", width=128, momentum=0.9, schedule="cosine")
    write_run("runs/older", width=0, lr=0.0, local_epochs=0, batch_size=0, optimizer="", seed=1)
    write_run(
        "runs/cnn", model="cnn", width=1, kernel_size=5, lr=0.01, batch_size=64, local_epochs=10, weight_decay=1e-5
    )
    assert differing_keys(find(tmp_path / "runs")) == ["model"]
    write_run("runs/slow", model="cnn", width=1, lr=0.05)  # the other's own rate is a choice here
    assert differing_keys(find(tmp_path / "runs")) == ["model", "local-epochs", "batch-size", "lr"]


def test_momentum_of_adam_tells_no_setups_apart(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", optimizer="adam", momentum=0.9)
    write_run("runs/b", optimizer="adam", momentum=0.5)
    assert differing_keys(find(tmp_path / "runs")) == []


def test_runs_with_and_without_differential_privacy_are_two_setups(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(f"runs/plain{seed}", seed=seed, dp_clip=0.5)
        write_run(f"runs/older{seed}", seed=seed)
        write_run(f"runs/private{seed}", seed=seed, dp_epsilon=8.0, dp_noise=-1.0)
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["dp-epsilon"]
    groups = {name: {run.name[:-1] for run in group} for name, group in setups(runs).items()}
    assert groups["dp-epsilon=8.0"] == {"private"}
    assert len(groups) == 2


def test_how_often_central_privacy_may_fail_tells_setups_apart(write_run: WriteRun, tmp_path: Path) -> None:
    for delta in (1e-5, 1e-3):
        write_run(f"runs/central{delta}", strategy="dp-fedavg", init="shared", dp_delta=delta)
    assert differing_keys(find(tmp_path / "runs")) == ["dp-delta"]
    for delta in (1e-5, 1e-3):
        write_run(f"plain/{delta}", strategy="fedavg", init="shared", dp_delta=delta)
    assert differing_keys(find(tmp_path / "plain")) == []


def test_a_choice_that_another_run_has_by_default_tells_them_not_apart(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/merged", head="analytic", init="shared")
    write_run("runs/fedavg", head="analytic", init="shared", strategy="fedavg")
    assert differing_keys(find(tmp_path / "runs")) == ["strategy"]


@pytest.mark.parametrize(
    ("given", "idle", "counts"),
    [
        ({"secure": True}, {"reference"}, {"secure-sums", "pretrain-epochs"}),
        ({"secure": True, "init": "shared"}, {"reference", "pretrain-epochs"}, {"secure-sums"}),
        ({"secure": True, "strategy": "fedavg", "init": "shared"}, {"secure-sums", "pretrain-epochs"}, set()),
        ({"secure": True, "strategy": "fedavg", "init": "pretrained"}, {"secure-sums"}, {"pretrain-epochs"}),
        ({}, {"secure-sums", "pretrain-epochs"}, {"reference"}),
    ],
)
def test_what_masked_sums_do_not_read_is_not_used(given: dict, idle: set[str], counts: set[str]) -> None:
    found = unused(RunConfig.parse(given).flat())
    assert found >= idle
    assert not found & counts


def test_a_strategy_that_blurs_what_it_aggregates_solves_the_problem_of_the_others() -> None:
    plain, blurred = (
        RunConfig.parse({"strategy": name, "init": "shared", "controls": "none", **more}).flat()
        for name, more in (
            ("fedavg", {}), ("dp-fedavg", {"strategy-options": "noise_multiplier=1, clipping_norm=1", "dp-delta": 1e-4}),
        )
    )  # fmt: skip
    assert problem(plain) == problem(blurred)
    private = RunConfig.parse({"dp-epsilon": 3, "dp-delta": 1e-4, "strategy": "fedavg", "init": "shared"}).flat()
    assert problem(private)["dp-delta"] == 1e-4
