from pathlib import Path

import pytest

from experiments import bench
from fedmerge.errors import ConfigError, RunDirectoryError
from server import RunConfig, RunDirectory

GRID = """
[base]
clients = 3
[[cells]]
strategy = "merge-many"
[[cells]]
strategy = "fedavg"
init = "shared"
[grid]
seed = [0, 1, 2]
"""


def grid(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return file


def test_cells_times_grid_over_the_base(tmp_path: Path) -> None:
    cells = bench.read(grid(tmp_path, GRID))
    assert [c.name for c in cells] == [
        "merge-many-seed=0", "merge-many-seed=1", "merge-many-seed=2",
        "fedavg-shared-seed=0", "fedavg-shared-seed=1", "fedavg-shared-seed=2",
    ]  # fmt: skip
    assert {c.config.clients for c in cells} == {3}
    assert cells[4].config == RunConfig.parse({"clients": 3, "strategy": "fedavg", "init": "shared", "seed": 1})


def test_a_base_alone_is_one_run(tmp_path: Path) -> None:
    (cell,) = bench.read(grid(tmp_path, "[base]\nclients = 2\n"))
    assert cell.name == "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bse]\nclients = 2", r"unknown table 'bse'; known are \[base\]"),
        ("[grid]\nseed = []", r"grid.seed = \[\]: expected a list of at least one value"),
        ("[grid]\nseed = 3", r"grid.seed = 3: expected a list"),
        ("[grid]\nsead = [1]", r"cell 1: unknown key 'sead'.*did you mean 'seed'"),
        ("[[cells]]\nseed = 1\n[[cells]]\nseed = 1", "two cells are the same run, seed=1"),
    ],
)
def test_grids_that_cannot_be_run_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.read(grid(tmp_path, text))


def test_a_folder_with_other_runs_is_left_alone(tmp_path: Path) -> None:
    cells = bench.read(grid(tmp_path, GRID))
    out = tmp_path / "out"
    RunDirectory.open(out / "cells" / "another", RunConfig())
    with pytest.raises(RunDirectoryError, match="already holds runs; choose another --out, or --resume"):
        bench.run(cells, out)
    with pytest.raises(RunDirectoryError, match=r"holds runs of another grid \(another\)"):
        bench.run(cells, out, resume=True)


def test_the_shipped_grids_are_valid() -> None:
    files = sorted((Path(bench.__file__).parent / "configs").glob("*.toml"))
    assert files
    for file in files:
        assert bench.read(file)
        assert file.read_text().startswith("# Question:")
