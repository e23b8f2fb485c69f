"""The measurements run end to end on digits; what they find on real photographs is in docs/results."""

import pytest

from experiments.benchmarks import alignment, channels_last, memory, sinkhorn


def test_the_alignment_benchmark_shows_ours_and_the_peers_that_are_installed(capsys) -> None:
    given = ["--models", "mlp", "--repeats", "1", "--peers", "ot", "--many", "2", "--many-model", "mlp"]
    assert alignment.main(given) == 0
    shown = capsys.readouterr().out
    lines = [line.split(" | ") for line in shown.splitlines() if line.startswith("| mlp | planted")]
    values = {line[2]: (float(line[5]), float(line[6].strip(" |"))) for line in lines}
    assert values["fedmerge weight-matching"][0] >= values["fedmerge optimal-transport"][0]
    assert all(error < 1e-12 for _, error in values.values())
    assert "| 2 | planted | fedmerge weight-matching to the first, mean |" in shown


@pytest.mark.slow
def test_merging_from_the_disk_takes_few_copies_of_a_model(capsys) -> None:
    assert memory.main(["--n", "4", "--how", "mapped"]) == 0
    assert "| mapped |" in capsys.readouterr().out


def test_sinkhorn_rebasin_is_measured_from_where_it_begins(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "OURS", {"short": {"steps": 5}})
    assert sinkhorn.main(["--networks", "mlp", "--kinds", "planted", "--seeds", "0"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:3] == ["| mlp", "planted", "short"]
    assert float(row[3]) < 0.1
    assert row[4] == "1.000 (1.000)"
    monkeypatch.setattr(sinkhorn, "OURS", {"idle": {"steps": 5, "start": "forward-greedy"}})
    assert sinkhorn.main(["--networks", "mlp", "--kinds", "planted", "--seeds", "0"]) == 1


def test_channels_last_is_the_same_training_and_its_seconds_stand_beside_the_others(capsys) -> None:
    assert channels_last.main(["--networks", "hlb:4", "--images", "8", "--rounds", "1"]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("│")]
    assert row[1] == "hlb:4"
    assert float(row[3]) > 0
    assert 0 < float(row[4]) < 1e-3
