"""The measurement of one round, at toy size on digits."""

import pandas as pd
import pytest

from experiments.benchmarks import one_shot


def test_every_start_is_measured_once_on_both_splits(tmp_path, capsys) -> None:
    given = ["--dataset", "digits", "--n", "2", "--seeds", "0", "--epochs", "1", "--clients", str(tmp_path / "clients")]
    given += ["--out", str(tmp_path / "out")]
    assert one_shot.main([*given, "--init", "independent"]) == 0
    first = pd.read_csv(tmp_path / "out" / "rows.csv", keep_default_na=False)
    assert one_shot.main(given) == 0
    rows = pd.read_csv(tmp_path / "out" / "rows.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(rows[rows["init"] == "independent"], first)
    assert not rows.duplicated(list(one_shot.KEYS)).any()
    assert set(rows["start"]) == {*one_shot.STARTS, "mean client", "ensemble", "public only", "pretrained"}
    assert rows[["val", "test"]].stack().between(0.05, 1).all()
    accuracy = rows[rows["init"] == "independent"].set_index(["start", "stage"])["test"]
    ours, average = accuracy["MergeMany, weight matching", "merged"], accuracy["plain average", "merged"]
    assert ours > average
    printed = capsys.readouterr().out
    assert "| plain average | + distill |" in printed
    assert "independent, n = 2 | pretrained, n = 2 | shared, n = 2" in printed
    with pytest.raises(SystemExit):
        one_shot.main([*given, "--width", "4"])
    assert "which are not these" in capsys.readouterr().err


def test_differences_are_those_of_the_same_seed_and_clients(tmp_path) -> None:
    """By hand: 2, 4 and 6 points above the best client with the same retraining, whose own scores scatter more."""
    best, ours = (0.5, 0.7, 0.6), (0.52, 0.74, 0.66)
    rows = pd.DataFrame(
        [
            {"seed": seed, "init": "shared", "n": 3, "start": start, "stage": "+ both", "test": scores[seed]}
            for seed in (2, 0, 1)
            for start, scores in ((one_shot.BEST, best), (one_shot.ACTIVATIONS, ours))
        ]
    )
    line = one_shot.differences(rows, "test").splitlines()[-1]
    # Student's 0.975 quantile at two degrees of freedom is 4.303; the deviation of 2, 4, 6 is 2.
    low, high = 4 - 4.303 * 2 / 3**0.5, 4 + 4.303 * 2 / 3**0.5
    assert line == (
        f"| {one_shot.ACTIVATIONS} | + both | best client + both | shared | 3 | +4.0 | {low:+.1f} to {high:+.1f} | 3 of 3 |"
    )
