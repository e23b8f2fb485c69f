"""In which keys runs differ, side by side."""

from collections.abc import Callable
from pathlib import Path

from experiments.records.differences import differences
from experiments.records.runs import find


def test_every_key_that_differs_is_there_with_a_dash_where_it_is_not_used(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    write_run("runs/a", seed=1, strategy="fedavg", restarts=9, name="mine", controls="ensemble")
    write_run("runs/b", restarts=4, controls="ensemble", local_evaluation=False)
    (write_run("runs/c") / "config.toml").unlink()
    a, b, lost = find(tmp_path / "runs")
    found = differences([a, b])
    assert found == {
        "strategy": ("fedavg", "merge-many"),
        "aligner": ("–", "weight-matching"),
        "reference": ("–", "largest"),
        "restarts": ("–", "4"),
        "merger": ("–", "merge-many"),
        "repair": ("–", "recompute"),
        "retrain-epochs": ("–", "5"),
        "seed": ("1", "0"),
        "name": ("mine", "–"),
        "local-evaluation": ("–", "false"),
    }
    assert differences([a, a]) == {}
    assert {values[1] for values in differences([a, lost]).values()} == {"–"}


def test_what_stands_for_the_models_own_value_is_shown_as_that_value(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    write_run("runs/older", lr=0.0, local_epochs=0, optimizer="")
    write_run("runs/newer", lr=0.2, local_epochs=20, optimizer="adam")
    newer, older = find(tmp_path / "runs")
    assert differences([older, newer]) == {"lr": ("0.05", "0.2"), "optimizer": ("sgd", "adam")}
