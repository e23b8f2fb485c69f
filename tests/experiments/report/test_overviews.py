"""Pictures of many runs: when they are there, and that what is drawn is the table beside them."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_run
from local_grid import LocalGrid
from matplotlib.figure import Figure

from experiments.compare.points import against, finals, over, ranks, rounds, steps, sureness
from experiments.compare.stages import compare
from experiments.records.runs import Run, find
from experiments.report.many import Many, short
from experiments.report.overviews import OVERVIEWS, stages
from experiments.report.tables import percent
from experiments.report.theme import png, svg

WriteRun = Callable[..., Path]
STAGES = [
    {"stage": s, "title": s, "accuracy": a, "loss": 1.0, "sd": None, "note": ""}
    for s, a in (("plain-average", 0.3), ("merged", 0.8), ("repaired", 0.75), ("retrained", 0.9))
]


@pytest.fixture(scope="module")
def varied(writer: WriteRun, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two strategies, two numbers of clients, two alphas, two seeds, three rounds; not to be changed."""
    folder = tmp_path_factory.mktemp("varied")
    for strategy in ("fedavg", "merge-many"):
        for clients in (2, 4):
            for alpha in (0.1, 1.0):
                for seed in range(2):
                    writer(folder / f"{strategy}-{clients}-{alpha}-{seed}", strategy=strategy, clients=clients,
                           partition_alpha=alpha, seed=seed, rounds=3)  # fmt: skip
    return find(folder)


def _there(runs: list[Run]) -> set[str]:
    many = Many.of(runs)
    return {overview.name for overview in OVERVIEWS if not overview.data(many).empty}


def _drawn(name: str, runs: list[Run]) -> Figure:
    many, overview = Many.of(runs), next(o for o in OVERVIEWS if o.name == name)
    return overview.draw(many, overview.data(many))


def test_a_picture_is_there_where_the_runs_vary_in_it(varied: list[Run]) -> None:
    assert _there(varied) == {
        "outcomes", "steps", "accuracy-over-rounds", "accuracy-over-clients", "accuracy-over-partition-alpha",
        "accuracy-against-client-time", "ranks", "reliability",
    }  # fmt: skip


def test_of_one_setup_of_one_round_only_its_own_stages_are_drawn(write_run: WriteRun) -> None:
    assert _there([Run.load(write_run())]) == {"outcomes", "steps", "stage-accuracy", "reliability"}
    assert _there([Run.load(write_run("cut", finished=False))]) == set()


def test_every_picture_is_a_file_and_has_the_colours_of_its_page(varied: list[Run]) -> None:
    many, titles = Many.of(varied), []
    for overview in OVERVIEWS:
        if not (found := overview.data(many)).empty:
            figure = overview.draw(many, found)
            assert png(figure)[1:4] == b"PNG"
            assert not re.search(
                r"(fill|stroke): (?!none|url\(#|var\(--)", svg(figure, overview.title, name=overview.name)
            )
            titles.append(figure.get_suptitle())
    assert len(set(titles)) == len(titles)  # no two charts of one title


def test_steps_add_up_to_the_outcome(write_run: WriteRun) -> None:
    run = Run.load(write_run(summary={"stages": STAGES}))
    table = steps([run]).means
    assert table["step"].tolist() == ["plain-average", "merged", "repaired", "retrained"]
    assert table["gain"].tolist()[1:] == pytest.approx([0.5, -0.05, 0.15])
    assert table["accuracy"].iloc[0] + table["gain"].sum() == pytest.approx(0.9)
    ax = _drawn("steps", [run]).axes[0]
    assert [text.get_text() for text in ax.texts] == ["90.0  (+50.0, −5.0, +15.0)"]
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx([-5, 15, 50])


def test_of_many_setups_the_best_steps_are_drawn(write_run: WriteRun, tmp_path: Path) -> None:
    for k in range(25):
        changed: list[dict[str, Any]] = [*STAGES[:3], {**STAGES[3], "accuracy": 0.5 + k / 100}]
        write_run(f"runs/{k}", lr=0.1 + k, summary={"stages": changed})
    ax = _drawn("steps", find(tmp_path / "runs")).axes[0]
    assert len(ax.texts) == 24
    assert "the best 24 of 25 setups" in ax.get_xlabel()
    assert "lr=0.1" not in [label.get_text() for label in ax.get_yticklabels()]


def test_accuracy_over_clients_is_the_mean_of_its_seeds(varied: list[Run]) -> None:
    table = over("clients", varied).means
    row = table[(table["setup"] == "partition-alpha=0.1, strategy=merge-many") & (table["clients"] == 4)].iloc[0]
    of_cell = [r for r in varied if r.path.name.startswith("merge-many-4-0.1")]
    by_hand = [s.accuracy for r in of_cell if (s := r.stage("retrained")) is not None]
    assert row["n"] == 2
    assert row["accuracy"] == pytest.approx(np.mean(by_hand))
    assert row["sd"] == pytest.approx(np.std(by_hand, ddof=1))
    figure = _drawn("accuracy-over-clients", varied)
    for at in table[table["setup"] == row["setup"]].to_dict("records"):
        said = f"{percent(at['accuracy'], at['sd'])} %, n = 2"
        assert f"<title>partition-alpha=0.1, merge-many; clients {at['clients']}: {said}</title>" in svg(
            figure, "", name=""
        )
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "partition-alpha=0.1, merge-many" in legend


def test_alpha_means_nothing_to_other_partitions(write_run: WriteRun, tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        write_run(f"runs/{alpha}", partition="iid", partition_alpha=alpha)
    assert over("partition-alpha", find(tmp_path / "runs")).empty


def test_accuracy_over_rounds_is_the_outcome_of_each_round(varied: list[Run]) -> None:
    table = rounds(varied).means
    setup = "partition-alpha=1.0, clients=2, strategy=fedavg"
    row = table[(table["setup"].map(lambda s: set(s.split(", "))) == set(setup.split(", "))) & (table["round"] == 2)]
    cells = [r.metrics for r in varied if r.path.name.startswith("fedavg-2-1.0")]
    by_hand = [m[(m["stage"] == "retrained") & (m["round"] == 2)]["accuracy"].item() for m in cells]
    assert row["accuracy"].item() == pytest.approx(np.mean(by_hand))


def test_before_its_head_a_network_stands_for_its_round(tmp_path: Path) -> None:
    short_run.run(tmp_path / "runs" / "a", LocalGrid(2), clients=2, rounds=3, local_epochs=1, controls="none")
    runs = find(tmp_path / "runs")
    m = runs[0].metrics
    by_hand = [
        m[(m["stage"] == stage) & (m["round"] == r) & (m["split"] == "test")]["accuracy"].item()
        for r, stage in ((1, "retrained"), (2, "retrained"), (3, "head"))
    ]
    assert rounds(runs).means[["round", "accuracy"]].to_numpy().tolist() == [[r, by_hand[r - 1]] for r in (1, 2, 3)]


def test_traffic_is_up_and_down_together(write_run: WriteRun, tmp_path: Path) -> None:
    for clients in (2, 4):
        sizes = {"bytes_up": 10**6 * clients, "bytes_down": 2 * 10**6 * clients}
        write_run(f"runs/{clients}", clients=clients, summary={"sizes": sizes})
    runs = find(tmp_path / "runs")
    assert against("bytes", runs).means["bytes"].tolist() == [6e6, 12e6]
    assert against("server_seconds", runs).empty


def test_time_at_the_server_is_drawn_where_every_run_knows_it(write_run: WriteRun, tmp_path: Path) -> None:
    for k, aligner in enumerate(("weight-matching", "activation-matching")):
        for seed in range(2):
            env = {"server_seconds": 2.0 + 4 * k + seed}
            write_run(f"runs/{aligner}-{seed}", aligner=aligner, seed=seed, env=env)
    runs = find(tmp_path / "runs")
    table = against("server_seconds", runs).means
    assert dict(zip(table["method"], table["server_seconds"], strict=True)) == {
        "aligner=weight-matching": 2.5,
        "aligner=activation-matching": 6.5,
    }
    assert "accuracy-against-server-time" in _there(runs)


def test_many_methods_against_cost_keep_seven_names(write_run: WriteRun, tmp_path: Path) -> None:
    for k in range(9):
        write_run(f"runs/{k}", strategy=f"s{k}", clients=2 + k)
    figure = _drawn("accuracy-against-client-time", find(tmp_path / "runs"))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 8
    assert names[-1] == "2 others"
    assert len(figure.axes[0].containers) == 9


def test_outcomes_are_drawn_best_first_with_a_dot_per_seed(varied: list[Run]) -> None:
    found, figure = finals(varied), _drawn("outcomes", varied)
    best = found.means.sort_values("accuracy", ascending=False)
    (ax,) = figure.axes
    of_name = {short(setup): accuracy for setup, accuracy in zip(best["setup"], best["accuracy"], strict=True)}
    rows = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert [of_name[row] for row in rows] == sorted(of_name.values(), reverse=True)
    dots = [line for line in ax.lines if line.get_markersize() == 3 and len(np.atleast_1d(line.get_xdata()))]
    assert sorted(float(np.atleast_1d(dot.get_xdata())[0]) for dot in dots) == pytest.approx(
        sorted(100 * found.seeds["accuracy"])
    )


def test_outcomes_share_one_scale_that_no_outlier_stretches(write_run: WriteRun, tmp_path: Path) -> None:
    for k, accuracy in enumerate((0.93, 0.94, 0.945, 0.95, 0.4)):
        sizes = {"bytes_up": 10 + k, "bytes_down": 1}
        stages = [{**STAGES[3], "accuracy": accuracy}]
        write_run(f"runs/{k}", clients=2 + k, summary={"stages": stages, "sizes": sizes})
    runs = find(tmp_path / "runs")
    low, high = Many.of(runs).limits
    assert 92 < low < 93
    assert 95 < high < 96
    for name in ("accuracy-over-clients", "accuracy-against-traffic"):
        assert _drawn(name, runs).axes[0].get_ylim() == (low, high)
    ax = _drawn("outcomes", runs).axes[0]
    assert ax.get_xlim() == (low, high)
    assert [text.get_text() for text in ax.texts] == ["◂ 40.00"]  # what lies below is said


def test_setups_are_called_by_what_differs_said_once_or_by_their_users_name(
    write_run: WriteRun, writer: WriteRun, tmp_path: Path
) -> None:
    for merger in ("merge-many", "average"):
        write_run(f"runs/{merger}", merger=merger, init="shared")
    write_run("runs/fedavg", strategy="fedavg", init="independent")
    many = Many.of(find(tmp_path / "runs"))
    assert set(map(many.name, many.groups)) == {
        "shared, merge-many",
        "shared, merge-many, average",
        "independent, fedavg",
    }
    for merger in ("merge-many", "average"):
        writer(tmp_path / "named" / merger, merger=merger, name=f"my {merger}")
    many = Many.of(find(tmp_path / "named"))
    assert set(map(many.name, many.groups)) == {"my merge-many", "my average"}


def test_ticks_of_long_and_short_scales_have_room(write_run: WriteRun, tmp_path: Path) -> None:
    for k, server_seconds in enumerate((0.004, 0.02, 0.9, 30.0)):
        write_run(f"runs/{k}", restarts=1 + k, env={"server_seconds": server_seconds})
    figure = _drawn("accuracy-against-server-time", find(tmp_path / "runs"))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels(which="both") if label.get_text()]
    boxes = sorted((box.x0, box.x1) for box in boxes)
    assert len(boxes) >= 3
    assert all(right < left for (_, right), (left, _) in pairwise(boxes))


def test_bins_of_seeds_are_put_together_by_their_images(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, (sure, right, images) in enumerate(((0.81, 0.5, 100), (0.89, 1.0, 300))):
        bins = [
            {"confidence": sure, "accuracy": right, "examples": images},
            {"confidence": 0.2, "accuracy": 0, "examples": 0},
        ]
        given = [{"stage": "retrained", "split": "test", "ece": 0.1 + 0.1 * seed, "bins": bins}]
        write_run(f"runs/{seed}", seed=seed, summary={"calibration": given})
    table = sureness(find(tmp_path / "runs")).means
    assert table[["confidence", "accuracy", "images", "ece"]].to_numpy() == pytest.approx(
        np.array([[(81 + 267) / 400, (50 + 300) / 400, 400, 0.15]])
    )


def test_ranks_are_drawn_best_first(varied: list[Run]) -> None:
    table = ranks(varied).means
    ax = _drawn("ranks", varied).axes[0]
    assert [text.get_text() for text in ax.texts] == [f"{rank:.2f}" for rank in table["rank"]]
    assert table["rank"].is_monotonic_increasing
    assert ax.patches[0].get_width() == pytest.approx(table["critical"].iloc[0])


def test_more_setups_than_colours_leave_the_picture_of_stages_out(varied: list[Run]) -> None:
    assert stages(Many.of(varied)).empty
    few = [run for run in varied if run.config["clients"] == 2]
    assert sorted(stages(Many.of(few)).means["accuracy"]) == sorted(compare(few)["accuracy"])


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
