"""Pictures of many runs: when they are there, and that what is drawn is the table beside them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.compare.points import against, over, ranks, rounds, steps
from experiments.compare.stages import compare
from experiments.records.runs import Run, find
from experiments.report import overviews
from experiments.report.overviews import OVERVIEWS, short, stages
from experiments.report.theme import png, svg

WriteRun = Callable[..., Path]
STAGES = [
    {"stage": s, "title": s, "accuracy": a, "loss": 1.0, "sd": None, "note": ""}
    for s, a in (("plain-average", 0.3), ("merged", 0.8), ("repaired", 0.75), ("retrained", 0.9))
]


@pytest.fixture
def varied(write_run: WriteRun, tmp_path: Path) -> list[Run]:
    """Two strategies, two numbers of clients, two alphas, two seeds, three rounds."""
    for strategy in ("fedavg", "merge-many"):
        for clients in (2, 4):
            for alpha in (0.1, 1.0):
                for seed in range(2):
                    write_run(f"runs/{strategy}-{clients}-{alpha}-{seed}", strategy=strategy, clients=clients,
                              partition_alpha=alpha, seed=seed, rounds=3)  # fmt: skip
    return find(tmp_path / "runs")


def _there(runs: list[Run]) -> set[str]:
    return {overview.name for overview in OVERVIEWS if not overview.data(runs).empty}


def test_a_picture_is_there_where_the_runs_vary_in_it(varied: list[Run]) -> None:
    assert _there(varied) == {
        "steps", "accuracy-over-rounds", "accuracy-over-clients", "accuracy-over-partition-alpha",
        "accuracy-against-client-time", "ranks",
    }  # fmt: skip


def test_of_one_setup_of_one_round_only_its_own_stages_are_drawn(write_run: WriteRun) -> None:
    assert _there([Run.load(write_run())]) == {"steps", "stage-accuracy"}
    assert _there([Run.load(write_run("cut", finished=False))]) == set()


def test_every_picture_is_a_file_and_has_the_colours_of_its_page(varied: list[Run]) -> None:
    for overview in OVERVIEWS:
        if not overview.data(varied).empty:
            figure = overview.draw(varied)
            assert png(figure)[1:4] == b"PNG"
            assert not re.search(r"(fill|stroke): (?!none|var\(--)", svg(figure, overview.title, name=overview.name))


def test_steps_add_up_to_the_outcome(write_run: WriteRun) -> None:
    run = Run.load(write_run(summary={"stages": STAGES}))
    table = steps([run])
    assert table["step"].tolist() == ["plain-average", "merged", "repaired", "retrained"]
    assert table["gain"].tolist()[1:] == pytest.approx([0.5, -0.05, 0.15])
    assert table["accuracy"].iloc[0] + table["gain"].sum() == pytest.approx(0.9)
    ax = overviews.draw_steps([run]).axes[0]
    assert [text.get_text() for text in ax.texts] == ["90.0  (+50.0, −5.0, +15.0)"]
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx([-5, 15, 50])


def test_of_many_setups_the_best_steps_are_drawn(write_run: WriteRun, tmp_path: Path) -> None:
    for k in range(25):
        changed: list[dict[str, Any]] = [*STAGES[:3], {**STAGES[3], "accuracy": 0.5 + k / 100}]
        write_run(f"runs/{k}", lr=0.1 + k, summary={"stages": changed})
    ax = overviews.draw_steps(find(tmp_path / "runs")).axes[0]
    assert len(ax.texts) == 20
    assert "the best 20 of 25 setups" in ax.get_xlabel()
    assert "lr=0.1" not in [label.get_text() for label in ax.get_yticklabels()]


def test_accuracy_over_clients_is_the_mean_of_its_seeds(varied: list[Run]) -> None:
    table = over("clients", varied)
    row = table[(table["setup"] == "partition-alpha=0.1, strategy=merge-many") & (table["clients"] == 4)].iloc[0]
    of_cell = [r for r in varied if r.path.name.startswith("merge-many-4-0.1")]
    by_hand = [s.accuracy for r in of_cell if (s := r.stage("retrained")) is not None]
    assert row["n"] == 2
    assert row["accuracy"] == pytest.approx(np.mean(by_hand))
    assert row["sd"] == pytest.approx(np.std(by_hand, ddof=1))
    figure = next(o for o in OVERVIEWS if o.name == "accuracy-over-clients").draw(varied)
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    same = table[table["setup"] == row["setup"]]
    assert drawn["partition-alpha=0.1, merge-many"] == pytest.approx(100 * same["accuracy"].to_numpy())


def test_alpha_means_nothing_to_other_partitions(write_run: WriteRun, tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        write_run(f"runs/{alpha}", partition="iid", partition_alpha=alpha)
    assert over("partition-alpha", find(tmp_path / "runs")).empty


def test_accuracy_over_rounds_is_the_outcome_of_each_round(varied: list[Run]) -> None:
    table = rounds(varied)
    setup = "partition-alpha=1.0, clients=2, strategy=fedavg"
    row = table[(table["setup"].map(lambda s: set(s.split(", "))) == set(setup.split(", "))) & (table["round"] == 2)]
    cells = [r.metrics for r in varied if r.path.name.startswith("fedavg-2-1.0")]
    by_hand = [m[(m["stage"] == "retrained") & (m["round"] == 2)]["accuracy"].item() for m in cells]
    assert row["accuracy"].item() == pytest.approx(np.mean(by_hand))


def test_traffic_is_up_and_down_together(write_run: WriteRun, tmp_path: Path) -> None:
    for clients in (2, 4):
        sizes = {"bytes_up": 10**6 * clients, "bytes_down": 2 * 10**6 * clients}
        write_run(f"runs/{clients}", clients=clients, summary={"sizes": sizes})
    runs = find(tmp_path / "runs")
    assert against("bytes", runs)["bytes"].tolist() == [6e6, 12e6]
    assert against("server_seconds", runs).empty


def test_time_at_the_server_is_drawn_where_every_run_knows_it(write_run: WriteRun, tmp_path: Path) -> None:
    for k, aligner in enumerate(("weight-matching", "activation-matching")):
        for seed in range(2):
            env = {"server_seconds": 2.0 + 4 * k + seed}
            write_run(f"runs/{aligner}-{seed}", aligner=aligner, seed=seed, env=env)
    runs = find(tmp_path / "runs")
    table = against("server_seconds", runs)
    assert dict(zip(table["method"], table["server_seconds"], strict=True)) == {
        "aligner=weight-matching": 2.5,
        "aligner=activation-matching": 6.5,
    }
    assert "accuracy-against-server-time" in _there(runs)


def test_many_methods_against_cost_keep_seven_names(write_run: WriteRun, tmp_path: Path) -> None:
    for k in range(9):
        write_run(f"runs/{k}", strategy=f"s{k}", clients=2 + k)
    figure = overviews.draw_costs("client_seconds", "seconds", 1.0, find(tmp_path / "runs"))
    assert len(figure.legends[0].get_texts()) == 7
    assert len(figure.axes[0].containers) == 9


def test_ranks_are_drawn_best_first(varied: list[Run]) -> None:
    table = ranks(varied)
    ax = overviews.draw_ranks(varied).axes[0]
    assert [text.get_text() for text in ax.texts] == [f"{rank:.2f}" for rank in table["rank"]]
    assert table["rank"].is_monotonic_increasing
    assert ax.patches[0].get_width() == pytest.approx(table["critical"].iloc[0])


def test_more_setups_than_colours_leave_the_picture_of_stages_out(varied: list[Run]) -> None:
    assert stages(varied).empty
    few = [run for run in varied if run.config["clients"] == 2]
    assert stages(few)["accuracy"].tolist() == compare(few)["accuracy"].tolist()


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("strategy=krum, clients=3", "krum, clients=3"),
        ("repair=none, nesterov=true, init=shared", "repair=none, nesterov=true, shared"),
        ("", ""),
    ],
)
def test_words_speak_for_their_keys(setup: str, shown: str) -> None:
    assert short(setup) == shown
