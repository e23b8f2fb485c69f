"""The measurement of one round, at toy size on digits."""

import pandas as pd

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
    assert set(rows["start"]) == {*one_shot.STARTS, "mean client", "ensemble", "public only"}
    assert rows[["val", "test"]].stack().between(0.05, 1).all()
    accuracy = rows[rows["init"] == "independent"].set_index(["start", "stage"])["test"]
    ours, average = accuracy["MergeMany, weight matching", "merged"], accuracy["plain average", "merged"]
    assert ours > average
    printed = capsys.readouterr().out
    assert "| plain average | + distill |" in printed
    assert "independent, n = 2 | shared, n = 2" in printed
