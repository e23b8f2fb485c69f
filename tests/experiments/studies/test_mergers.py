"""Every merger by number of clients: clients are trained once, and a merge keeps more than the average does."""

from pathlib import Path

import pandas as pd
import pytest

from experiments.studies.mergers import CLIENTS, Mergers, cells
from experiments.studies.study import Work


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two mergers of the first two and of all three clients."""
    config = Mergers(
        seeds=(0,), dataset="digits", model="mlp", width=32, clients=3, ns=(2, 3), val_fraction=0.1,
        mergers=("average", "merge-many"), statistics=("none", "repair"),
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("mergers")
    found = [{**cell.key, **row} for cell in cells(config, Work(folder, "digits")) for row in cell.measure()]
    assert len(list((folder / "networks").iterdir())) == 3
    return pd.DataFrame(found)


def test_a_merge_keeps_what_the_average_loses(rows: pd.DataFrame) -> None:
    score = rows.set_index(["n", "merger", "statistics"])["accuracy"]
    assert not score.index.has_duplicates
    assert score[3, "merge-many", "none"] > score[3, "average", "none"] + 0.1
    assert score[3, CLIENTS, "ensemble"] >= score[3, CLIENTS, "mean"]


def test_the_first_clients_are_the_same_whatever_their_number(rows: pd.DataFrame) -> None:
    best = rows[(rows["merger"] == CLIENTS) & (rows["statistics"] == "best on val")].set_index("n")["accuracy"]
    mean = rows[(rows["merger"] == CLIENTS) & (rows["statistics"] == "mean")].set_index("n")["accuracy"]
    third = 3 * mean[3] - 2 * mean[2]
    assert 0.5 < third <= 1
    assert best[3] in (pytest.approx(best[2]), pytest.approx(third))
