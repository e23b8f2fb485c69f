from pathlib import Path

import pytest

from experiments.grids import files as grid
from experiments.launch.simulation import try_out
from fedmerge.errors import ConfigError
from server import RunConfig

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


@pytest.fixture
def written(tmp_path: Path):
    """``written(text)`` is a grid file."""

    def write(text: str, name: str = "grid.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def names(path: Path, **options) -> list[str]:
    return [cell.name for cell in grid.read(path, **options)]


def test_cells_times_grid_over_the_base(written) -> None:
    cells = grid.read(written(GRID))
    assert [c.name for c in cells] == [
        "merge-many-seed=0", "merge-many-seed=1", "merge-many-seed=2",
        "fedavg-shared-seed=0", "fedavg-shared-seed=1", "fedavg-shared-seed=2",
    ]  # fmt: skip
    assert {c.config.clients for c in cells} == {3}
    assert cells[4].config == RunConfig.parse({"clients": 3, "strategy": "fedavg", "init": "shared", "seed": 1})


def test_a_base_alone_is_one_run(written) -> None:
    assert names(written("[base]\nclients = 2\n")) == ["run"]


def test_a_named_cell_has_a_grid_of_its_own(written) -> None:
    text = (
        GRID + '[[cells]]\nname = "transport"\naligner = "optimal-transport"\ngrid = {restarts = [1, 2], seed = [7]}\n'
    )
    assert names(written(text))[6:] == ["transport-seed=7-restarts=1", "transport-seed=7-restarts=2"]
    assert {c.config.aligner for c in grid.read(written(text))[6:]} == {"optimal-transport"}


def test_runs_are_called_as_their_cell_and_tags_are_no_part_of_a_name(written) -> None:
    text = '[base]\ntags = "thesis"\n[[cells]]\nname = "mine"\nrounds = 2\n[[cells]]\nseed = 1\ntags = "a, b"\n'
    cells = grid.read(written(text))
    assert [(c.name, c.config.name, c.config.tags) for c in cells] == [
        ("mine", "mine", "thesis"), ("seed=1", "", "a, b"),
    ]  # fmt: skip


def test_what_a_cell_says_itself_is_not_varied(written) -> None:
    assert names(written("[grid]\nseed = [0, 1]\n[[cells]]\nseed = 9\n[[cells]]\nrounds = 2")) == [
        "seed=9", "rounds=2-seed=0", "rounds=2-seed=1",
    ]  # fmt: skip


def test_underscores_are_dashes(written) -> None:
    (cell,) = grid.read(written("[base]\nlocal_epochs = 3\n"))
    assert cell.config.local_epochs == 3


def test_values_that_read_the_same_give_different_names(written) -> None:
    text = '[[cells]]\nmerger = "hierarchical"\n[[cells]]\nmodel = "hlb"\ngrid = {optimizer = ["sgd", "adam"]}\n'
    assert names(written(text)) == ["hierarchical", "hlb-sgd", "hlb-adam"]
    text = '[base]\nstrategy = "fedavg"\n[[cells]]\nstrategy = "merge-many"\n[[cells]]\nmerger = "merge-many"\n'
    assert names(written(text)) == ["strategy=merge-many", "merger=merge-many"]


def test_long_names_stay_names_of_folders(written) -> None:
    controls = ", ".join(["public-only", "centralised"] * 8)
    found = names(written(f'[base]\ncontrols = "{controls}"\n[[cells]]\ncontrols = "{controls}, ensemble"\n'))
    assert len(found[0]) < 140


def test_excluded_combinations_are_left_out(written) -> None:
    text = GRID + '[[exclude]]\nstrategy = "fedavg"\nseed = [1, 2]\n[[exclude]]\ninit = "independent"\nseed = 0\n'
    assert names(written(text)) == ["merge-many-seed=1", "merge-many-seed=2", "fedavg-shared-seed=0"]


def test_runs_that_are_impossible_may_be_excluded(written) -> None:
    text = '[grid]\nmerger = ["merge-many", "ties"]\ninit = ["shared", "independent"]\n'
    with pytest.raises(ConfigError, match=r"1 of 4 runs cannot be made .*ties-independent: merger ties adds up steps"):
        grid.read(written(text))
    assert len(names(written(text + '[[exclude]]\nmerger = "ties"\ninit = "independent"\n'))) == 3


def test_every_impossible_run_is_named_in_one_message(written) -> None:
    def check(config: RunConfig) -> None:
        if config.model == "vgg11":
            raise ConfigError("vgg11 does not take 8x8 images")

    text = '[base]\nmin-replies = 4\n[grid]\nmodel = ["mlp", "vgg11"]\nclients = [3, 4]\n'
    with pytest.raises(ConfigError) as caught:
        grid.read(written(text), check=check)
    assert "3 of 4 runs cannot be made" in str(caught.value)
    assert "mlp-clients=3, vgg11-clients=3: min-replies = 4 exceeds the number of clients, 3" in str(caught.value)
    assert "vgg11-clients=4: vgg11 does not take 8x8 images" in str(caught.value)


def test_a_file_extends_another_key_by_key(written, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    written(GRID + "[quick]\nclients = 2\n", "parent.toml")
    child = written('extends = "../parent.toml"\n[base]\nwidth = 16\n[grid]\nseed = [5]\n', "below/child.toml")
    cells = grid.read(child)
    assert [c.name for c in cells] == ["merge-many-seed=5", "fedavg-shared-seed=5"]
    assert {(c.config.clients, c.config.width) for c in cells} == {(3, 16)}
    assert {c.config.clients for c in grid.read(child, quick=True)} == {2}


def test_own_cells_take_the_place_of_inherited_ones_and_a_fixed_key_that_of_a_varied_one(written) -> None:
    written(GRID, "parent.toml")
    child = written('extends = "parent.toml"\n[base]\nseed = 4\n[[cells]]\nstrategy = "fedprox"\n', "child.toml")
    (cell,) = grid.read(child)
    assert (cell.name, cell.config.seed, cell.config.clients) == ("fedprox", 4, 3)


def test_quick_sets_values_for_all_and_shortens_lists(written) -> None:
    text = GRID + "[[cells]]\nrounds = 5\ngrid = {clients = [6, 9]}\n[quick]\nrounds = 1\nclients = 2\nseed = [0, 1]\n"
    found = grid.read(written(text), quick=True)
    assert [c.name for c in found] == [
        "merge-many-seed=0", "merge-many-seed=1", "fedavg-shared-seed=0", "fedavg-shared-seed=1",
    ]  # fmt: skip
    assert {(c.config.clients, c.config.rounds) for c in found} == {(2, 1)}
    assert len(grid.read(written(text))) == 12
    with pytest.raises(ConfigError, match=r"has no \[quick\] table; run it without --quick"):
        grid.read(written(GRID), quick=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no runs; give it \[base\], \[grid\] or \[\[cells\]\]"),
        ("[bse]\nclients = 2", "unknown table 'bse': known are base, .*did you mean 'base'"),
        ("[grid]\nseed = []", r"grid.seed = \[\]: expected a list of at least one value"),
        ("[grid]", "grid is empty; give it keys with lists"),
        ("[grid]\nseed = 3", "grid.seed = 3: expected a list"),
        ("[grid]\nsead = [1]", r"grid.toml: grid.sead: unknown key 'sead'.*did you mean 'seed'"),
        ("[base]\nrouds = 1", r"grid.toml: base.rouds: unknown key 'rouds'.*did you mean 'rounds'"),
        ("[[cells]]\n[[cells]]\nseeds = 1", r"cells 2.seeds: unknown key 'seeds'.*did you mean 'seed'"),
        ("[[cells]]\ngrid = {alignr = [1]}", r"cells 1.grid.alignr: unknown key.*did you mean 'aligner'"),
        ("[[exclude]]\nmergr = 1", "exclude 1.mergr: unknown key 'mergr'.*did you mean 'merger'"),
        ("[quick]\nclient = 1", "quick.client: unknown key 'client'.*did you mean 'clients'"),
        ("[grid]\nmerger = ['average', 'merge-mny']", "grid.merger: unknown merger 'merge-mny'.*mean 'merge-many'"),
        ("[base]\nclients = 'x'", "base.clients = 'x': Input should be a valid integer"),
        ("[[cells]]\nseed = 1\n[[cells]]\nseed = 1", "two cells are the same run, seed=1 and seed=1"),
        ("[[cells]]\nname = 'a'\n[[cells]]\nname = 'b'\ntags = 'c'", "two cells are the same run, a and b"),
        ("[[cells]]\nseed = 1\ngrid = {seed = [1]}", "cells 1: seed is both given and varied"),
        ("[grid]\nseed = [1]\n[[exclude]]\nclients = 5", "every run is excluded"),
        ("cells = 3", "cells = 3: expected tables"),
        ("cells = [3]", "cells 1 = 3: expected a table"),
        ("base = 3", "base = 3: expected a table"),
        ("[[cells]]\nname = 3", "cells 1.name = 3: expected text"),
        ("[[cells]]\nname = 'a'\nseed = 1\n[[cells]]\nname = 'a'\nseed = 2\n", None),
        ("extends = 3", "extends = 3: expected the name of a file"),
        ("extends = 'nowhere.toml'", "nowhere.toml: cannot be read"),
        ("extends = 'grid.toml'", "extends grid.toml, which extends this file again"),
    ],
)
def test_grids_that_cannot_be_run_are_named(text: str, message: str | None, written) -> None:
    if message is None:  # one name twice is told apart by what the cells say
        assert names(written(text)) == ["seed=1", "seed=2"]
        return
    with pytest.raises(ConfigError, match=message):
        grid.read(written(text))


@pytest.mark.parametrize(
    "file", sorted((Path(grid.__file__).parents[1] / "configs").glob("*.toml")), ids=lambda f: f.stem
)
def test_the_shipped_grids_are_valid(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# Question:")
    assert grid.read(file)
    if "[quick]" in text:
        assert "Expected with --quick" in text
        assert f"{len(grid.read(file, quick=True, check=try_out))} runs" in text


def test_files_of_a_grid_are_read_as_any_editor_saves_them(written, tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_bytes(GRID.replace("\n", "\r\n").encode("utf-8-sig"))
    child = tmp_path / "child.toml"
    child.write_bytes('extends = "parent.toml"\n[grid]\nseed = [5]'.encode("utf-16"))
    expected = (
        grid.read(written('extends = "plain.toml"\n[grid]\nseed = [5]', "x.toml"))
        if written(GRID, "plain.toml")
        else []
    )
    assert grid.read(child) == expected
