"""Pictures: real figures, and the numbers that are drawn in them."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.compare.stages import compare
from experiments.records.runs import Run, find
from experiments.report import classes, plots
from experiments.report.illustrations import of_one
from experiments.report.many import Many
from experiments.report.theme import DPI, SERIES, VARIABLES, WIDTH, png, svg
from fedmerge.errors import RunDirectoryError
from server._stages import in_order

WriteRun = Callable[..., Path]


def _labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def _lengths(ax: Axes) -> list[float]:
    return [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]


def _ticks(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def _chunks(png: bytes) -> list[bytes]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kinds.append(png[at + 4 : at + 8])
        at += length + 12
    return kinds


def test_all_pictures_of_a_run_are_png_files_and_touch_nothing_global(write_run: WriteRun, tmp_path: Path) -> None:
    run, before = Run.load(write_run(rounds=4)), dict(mpl.rcParams)
    assert len(list(of_one(run, tmp_path))) == len(plots.PICTURES) - 1  # who holds which labels is a table there
    files = list((tmp_path / "plots").iterdir())
    assert {file.name for file in files} == {f"{picture.name}.png" for picture in plots.PICTURES}
    for file in files:
        width, height = struct.unpack(">II", file.read_bytes()[16:24])
        assert width == round(WIDTH * DPI)
        assert height > 300
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_only_what_a_run_has_is_drawn(write_run: WriteRun) -> None:
    fedavg = Run.load(write_run("fedavg", strategy="fedavg"))
    assert [drawn.title for drawn in of_one(fedavg)] == ["Stage accuracy", "Accuracy by class", "Reliability"]
    cut = Run.load(write_run("cut", finished=False, rounds=3))
    assert [drawn.title for drawn in of_one(cut)] == ["Stage accuracy", "Accuracy over rounds"]


def test_equal_data_gives_equal_bytes_without_date_or_version(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    first = png(plots.stage_accuracy(run))
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "savefig.dpi": 30, "savefig.bbox": "tight"}):
        assert png(plots.stage_accuracy(run)) == first
        assert svg(plots.stage_accuracy(run), "x", name="a") == svg(plots.stage_accuracy(run), "x", name="a")
    assert b"tEXt" not in _chunks(first)
    assert b"tIME" not in _chunks(first)


def test_bars_are_as_long_as_the_accuracies(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    figure = plots.stage_accuracy(run)
    (ax,) = figure.axes
    assert _lengths(ax) == pytest.approx([100 * s.accuracy for s in run.stages])
    assert _ticks(ax) == [s.title for s in run.stages]
    assert "± sd over clients" in ax.get_xlabel()
    assert {"merged after alignment", "averaged without alignment", "single clients", "guessing"} <= set(
        _labels(figure)
    )
    mean = run.stages[0]
    assert f"{100 * mean.accuracy:.2f} ± {100 * (mean.sd or 0):.2f}" in [text.get_text() for text in ax.texts]


def test_retraining_an_average_is_not_shown_as_alignment(write_run: WriteRun) -> None:
    figure = plots.stage_accuracy(Run.load(write_run(strategy="fedavg-retrain")))
    assert "merged after alignment" not in _labels(figure)


def test_seeds_become_mean_and_deviation(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"runs/{seed}", seed=seed)
    runs = find(tmp_path / "runs")
    (ax,) = plots.dots(Many.of(runs)).axes
    assert _lengths(ax) == pytest.approx((100 * compare(runs)["accuracy"]).tolist())
    assert "± sd over 3 seeds" in ax.get_xlabel()


def test_setups_become_dots_with_a_legend(write_bench: Callable[[], Path]) -> None:
    many = Many.of(find(write_bench()))
    table = many.table
    figure = plots.dots(many)
    (ax,) = figure.axes
    assert _labels(figure) == [many.name(setup) for setup in dict.fromkeys(table["setup"])]
    dots = [container.lines[0] for container in ax.containers if isinstance(container, ErrorbarContainer)]
    drawn = np.concatenate([dot.get_xdata() for dot in dots if dot is not None])
    assert drawn == pytest.approx(100 * table["accuracy"].to_numpy())
    assert "Retrained" in _ticks(ax)  # its titles differ between setups
    assert "MergeMany, anchored" in _ticks(ax)


def test_one_unknown_stage_of_one_run_without_classes(write_run: WriteRun) -> None:
    stages = [{"stage": "new", "title": "New", "accuracy": None, "loss": 1.0, "sd": None, "note": ""}]
    run = Run.load(write_run(summary={"stages": stages, "classes": [], "labels": {}}))
    figure = plots.stage_accuracy(run)
    assert _labels(figure) == ["others"]
    assert "–" in [text.get_text() for text in figure.axes[0].texts]
    assert "±" not in figure.axes[0].get_xlabel()


def test_accuracy_by_class_is_the_share_of_the_diagonal_worst_class_of_the_outcome_first(write_run: WriteRun) -> None:
    retrained, public = [[6, 2], [0, 4]], [[7, 1], [3, 1]]
    by_class = [{"stage": "public-only", "split": "test", "confusion": public},
                {"stage": "merged", "split": "test", "confusion": public},
                {"stage": "retrained", "split": "test", "confusion": retrained}]  # fmt: skip
    summary = {"classes": ["cat", "dog"], "labels": {}, "per_class": by_class}
    figure = classes.accuracy_by_class(Run.load(write_run(summary=summary)))
    assert _ticks(figure.axes[0]) == ["cat", "dog"]
    said = re.findall(r"<title>(.*?)</title>", svg(figure, "", name=""))
    assert said == [
        "MergeMany, anchored + repair + retrain, class cat: 75.00 %",
        "MergeMany, anchored + repair + retrain, class dog: 100.00 %",
        "Public only, class cat: 87.50 %", "Public only, class dog: 25.00 %",
    ]  # fmt: skip


def test_reliability_is_what_the_bins_say(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    figure = classes.reliability(run)
    outcome = next(of for of in run.calibration if of.stage == "retrained")
    said = re.findall(r"<title>(.*retrain.*?)</title>", svg(figure, "", name=""))
    assert f"MergeMany, anchored + repair + retrain: ECE {100 * outcome.ece:.2f} points" in said
    for b in outcome.bins:
        ending = f"{b.examples} images at {100 * b.confidence:.1f} %: {100 * b.accuracy:.1f} % right"
        assert any(tip.endswith(ending) for tip in said)
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()


def test_the_legend_names_the_series_that_it_switches(write_run: WriteRun) -> None:
    drawn = ElementTree.fromstring(svg(classes.reliability(Run.load(write_run())), "", name=""))
    series = {part.get("data-series") for part in drawn.iter() if part.get("data-series")}
    legend = [part.get("data-legend") for part in drawn.iter() if part.get("data-legend")]
    assert len(series) > 2
    assert series <= set(legend)
    assert all(legend.count(name) == 2 for name in series)  # its mark and its name


def test_every_count_stands_in_its_cell(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    ax = classes.label_distribution(run).axes[0]
    counts = list(run.labels.values())
    shown = [text.get_text() for text in ax.texts]
    assert shown == [f"{count:,}" if count else "·" for row in counts for count in row]
    assert _ticks(ax)[0] == f"public  ({sum(counts[0])})"


def test_many_classes_and_holders_stay_legible(write_run: WriteRun) -> None:
    names = [f"class number {i}" for i in range(100)]
    held = {f"client {i}": [i % 7] * 100 for i in range(120)}
    ax = classes.label_distribution(Run.load(write_run(summary={"classes": names, "labels": held}))).axes[0]
    assert len(ax.texts) == 0
    assert len(ax.get_yticks()) <= 40
    assert len(ax.get_xticks()) <= 20


def test_long_class_names_are_turned(write_run: WriteRun) -> None:
    summary = {"classes": ["automobile", "cat"], "labels": {"client 0": [0, 0], "client 1": [3, 1]}}
    ax = classes.label_distribution(Run.load(write_run(summary=summary))).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["automobile", "cat"]
    assert ax.get_xticklabels()[0].get_rotation() == 30


def test_objectives_end_at_100_percent(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    figure = plots.merge_objective(run)
    (ax,) = figure.axes
    for line, climb in zip(ax.lines, run.merges, strict=True):
        values = np.array(climb.objective)
        assert np.asarray(line.get_ydata()) == pytest.approx(100 * values / values[-1])
    assert _labels(figure) == ["merge-many: 8 sweeps", "merge-many-paper: 14 sweeps"]


def test_merges_of_one_name_share_a_colour_and_a_line_in_the_legend(write_run: WriteRun) -> None:
    merges: list[dict[str, Any]] = [
        {"round": r, "name": "merge-many", "objective": [1.0, 2.0, 3.0][: r % 3 + 1], "converged": r != 2}
        for r in range(1, 11)
    ]
    merges.append({"round": 11, "name": "other", "objective": [0.0], "converged": False})
    figure = plots.merge_objective(Run.load(write_run(summary={"merges": merges})))
    assert _labels(figure) == [
        "merge-many: 10 merges, 1 to 3 sweeps, 1 not converged",
        "other: 1 sweep, not converged",
    ]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_merges_of_many_names_have_no_legend(write_run: WriteRun) -> None:
    merges = [{"round": 1, "name": f"m{i}", "objective": [1.0], "converged": True} for i in range(9)]
    assert _labels(plots.merge_objective(Run.load(write_run(summary={"merges": merges})))) == []


def test_the_barrier_is_the_height_over_the_chord(write_run: WriteRun) -> None:
    flat = {"loss": [1.0, 2.0, 3.0], "accuracy": [0.9, 0.8, 0.7]}
    bump = {"loss": [1.0, 7.0, 3.0], "accuracy": [0.9, 0.1, 0.7]}
    line = {"clients": [4, 7], "alphas": [0, 0.5, 1], "split": "val", "naive": bump, "aligned": flat}
    above, below = plots.interpolation(Run.load(write_run(summary={"interpolation": line}))).axes
    above_legend, below_legend = above.get_legend(), below.get_legend()
    assert above_legend is not None
    assert below_legend is not None
    assert [t.get_text() for t in above_legend.get_texts()] == [
        "as they came: barrier 5.000", "aligned: barrier 0.000", "chord between the ends",
    ]  # fmt: skip
    assert [t.get_text() for t in below_legend.get_texts()] == [
        "as they came: barrier 70.00 points", "aligned: barrier 0.00 points",
    ]  # fmt: skip
    assert np.asarray(above.lines[1].get_ydata()).tolist() == [1.0, 2.0, 3.0]  # the chord
    assert below.get_xlabel() == "α (0: client 4, 1: client 7); val split"


def test_accuracy_over_rounds_follows_the_metrics(write_run: WriteRun) -> None:
    run = Run.load(write_run(rounds=5, strategy="fedavg"))
    figure = plots.accuracy_over_rounds(run)
    metrics = run.metrics[(run.metrics["stage"] == "aggregated") & (run.metrics["split"] == "test")]
    said = re.findall(r"<title>FedAvg, round (\d): ([\d.]+) %</title>", svg(figure, "", name=""))
    assert said == [(str(k), f"{100 * a:.2f}") for k, a in enumerate(metrics["accuracy"], 1)]
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) == 5]
    assert any(np.allclose(np.asarray(y), 100 * metrics["accuracy"].to_numpy(), rtol=1e-12) for y in drawn)
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    clients = run.metrics[run.metrics["client"].notna() & (run.metrics["split"] == "test")]
    means = 100 * clients.groupby("round")["accuracy"].mean().to_numpy()
    assert np.asarray(lines["clients: mean and range"].get_ydata()) == pytest.approx(means)


def test_of_many_stages_over_rounds_those_of_the_strategy_stay(write_run: WriteRun) -> None:
    labels = _labels(plots.accuracy_over_rounds(Run.load(write_run(rounds=3))))
    assert "+ retrain" in labels
    assert "Best client + retrain" not in labels


def test_a_stage_measured_once_is_no_line(write_run: WriteRun) -> None:
    assert "Centralised" not in _labels(plots.accuracy_over_rounds(Run.load(write_run(rounds=3))))


def test_what_is_not_there_is_named(write_run: WriteRun) -> None:
    empty: dict[str, Any] = {
        "stages": [],
        "labels": {},
        "merges": [],
        "interpolation": None,
        "per_class": [],
        "calibration": [],
    }
    run = Run.load(write_run(summary=empty))
    pictures: list[tuple[Callable[[], Figure], str]] = [
        (lambda: plots.stage_accuracy(run), "no stage was measured in .*run"),
        (lambda: classes.label_distribution(run), "does not say who holds which labels"),
        (lambda: classes.accuracy_by_class(run), "does not say what its networks make of each class"),
        (lambda: classes.reliability(run), "does not say how sure its networks are"),
        (lambda: plots.merge_objective(run), "has no merge whose objective could be drawn"),
        (lambda: plots.interpolation(run), "has no interpolation between two clients"),
        (lambda: plots.accuracy_over_rounds(run), "no stage that was measured in two rounds"),
    ]
    for draw, message in pictures:
        with pytest.raises(RunDirectoryError, match=message):
            draw()


def test_every_stage_of_a_run_has_a_family() -> None:
    of_families = set().union(*(members for _, _, members in plots.FAMILIES))
    assert set(in_order()) - of_families == {"averaged"}  # its network is none of the round's


def test_a_picture_in_a_page_has_no_colour_of_its_own(write_run: WriteRun) -> None:
    run = Run.load(write_run(rounds=3))
    used: set[str] = set()
    for picture in of_one(run):
        styles = re.findall(r'style="([^"]*)"', str(picture.svg))
        colours = {c for style in styles for c in re.findall(r"(?:fill|stroke): ([^;]+)", style)}
        assert colours <= {"none", *(f"var(--{name})" for name in VARIABLES)}
        assert "<image" not in str(picture.svg)
        used |= colours
    assert {"var(--ink)", "var(--soft)", "var(--rule)", "var(--series-1)", "var(--series-2)"} <= used


def test_pictures_of_one_page_share_no_reference(write_run: WriteRun) -> None:
    figure = plots.stage_accuracy(Run.load(write_run()))
    first, second = (set(re.findall(r'id="([^"]*)"', svg(figure, "x", name=name))) for name in "ab")
    assert first
    assert not first & second
    text = svg(figure, 'a "b" <c>', name="a")
    assert set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', text))
    assert {one or other for one, other in re.findall(r'url\(#(\w+)\)|href="#(\w+)"', text)} <= first
    assert ElementTree.fromstring(text).get("aria-label") == 'a "b" <c>'


@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_text_and_series_stand_out_from_the_paper(paper: int) -> None:
    colour = {name: pair[paper] for name, pair in VARIABLES.items()}

    def luminance(colour: str) -> float:
        c = np.array(to_rgb(colour))
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    def contrast(name: str) -> float:  # WCAG 2.2, "contrast ratio"
        low, high = sorted((luminance(colour[name]), luminance(colour["page"])))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast("ink"), contrast("soft")) >= 4.5  # text, success criterion 1.4.3
    assert min(contrast(f"series-{k}") for k in range(1, len(SERIES) + 1)) >= 2.2
