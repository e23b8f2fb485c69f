"""Does merging pay: the study's entry, and what its page makes of the rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.compare.paired import Paired, holm, paired
from experiments.report.theme import INK, MARKS, SERIES, figure, legend, styled
from experiments.studies.does_merging_pay import (
    BEST,
    CLIENT,
    COEFFICIENTS,
    ENSEMBLE,
    EVEN,
    FEDAVG,
    FOLDED,
    MERGED,
    NONE,
    PLANS,
    PUBLIC,
    RECOMPUTED,
    RIVALS,
    TAUGHT,
    Pays,
)
from experiments.studies.page import table
from experiments.studies.pays_cells import CYCLE, FEDDF, FEDMA, ONE, WEIGHTS, cells
from experiments.studies.study import Study

SETTING = ["model", "partition", "init", "n"]
DEFAULT_WAY = ("stacked", "False", "head_test")
WHOLE_WAY = ("stacked", "True", "head_test")
"""Teacher, unlabelled images, and the column: as the program's defaults have it, and with unlabelled images."""
COMPARED = {
    "head alone": (NONE, "False", "head_test"),
    "mean teacher": ("mean", "False", "test"),
    "mean teacher + head": ("mean", "False", "head_test"),
    "stacked": ("stacked", "False", "test"),
    "stacked + head": DEFAULT_WAY,
    "stacked, unlabelled": ("stacked", "True", "test"),
    "all of that + head": WHOLE_WAY,
}
METHODS = {
    f"{FEDDF}": (FEDDF, "mean", ""),
    f"{FEDMA}, {ONE}": (FEDMA, "", ONE),
    f"{FEDMA}, {CYCLE}": (FEDMA, "", CYCLE),
    f"{ENSEMBLE}, {WEIGHTS}": (ENSEMBLE, WEIGHTS, ""),
}
"""Rivals as the page calls them -> network, teacher, and of what."""
OWN_HEAD, NEW_HEAD = ("val", "test"), ("head_val", "head_test")
LEVEL = 0.05


@dataclass(frozen=True)
class Against:
    """The merged network less ``other`` in one setting, in points, with everything the same; ``p`` is corrected."""

    setting: tuple[str, ...]
    other: str
    difference: Paired
    p: float


def _read(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with keys as text and values as numbers, without what one cell was measured twice."""
    found = rows.astype(dict.fromkeys(["n", "seed", "teacher", "unlabelled", "of"], str))
    for column in ("val", "test", "head_val", "head_test"):
        found[column] = pd.to_numeric(found[column], errors="coerce")
    return found


def _scores(part: pd.DataFrame, network: str, way: tuple[str, str, str]) -> pd.Series:
    """Seed -> test accuracy of ``network`` in one way, in percent."""
    teacher, unlabelled, column = way
    chosen = part[(part["network"] == network) & (part["teacher"] == teacher)]
    chosen = chosen[chosen["unlabelled"] == unlabelled]
    return 100 * chosen.set_index("seed")[column]


def _chosen(part: pd.DataFrame, network: str) -> pd.Series:
    """Seed -> test accuracy of ``network`` in the way of its own that is best on val, in percent."""
    own = part[part["network"] == network]
    ways = [own[["seed", *columns]].set_axis(["seed", "val", "test"], axis=1) for columns in (OWN_HEAD, NEW_HEAD)]
    every = pd.concat(ways, ignore_index=True).dropna()
    return 100 * every.loc[every.groupby("seed")["val"].idxmax()].set_index("seed")["test"]


def _settings(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """In the order in which they were measured, of each the seeds that have all three networks."""
    for setting, part in rows.groupby(SETTING, sort=False):
        ends = [set(_scores(part, network, WHOLE_WAY).dropna().index) for network in (MERGED, BEST, PUBLIC)]
        if whole := set.intersection(*ends):
            yield tuple(map(str, setting)), part[part["seed"].isin(whole)]


def family(rows: pd.DataFrame) -> list[Against]:
    """The tests: in each setting merged against the best client and against the public labels, everything the same."""
    found = []
    for setting, part in _settings(rows):
        merged = _scores(part, MERGED, WHOLE_WAY)
        for other in (BEST, PUBLIC):
            differences = (merged - _scores(part, other, WHOLE_WAY)).dropna()
            found.append((setting, other, paired(differences.tolist())))
    corrected = holm([difference.t for *_, difference in found])
    return [Against(*one, float(p)) for one, p in zip(found, corrected, strict=True)]


def _ours(rows: pd.DataFrame) -> str:
    rows = _read(rows)
    parts = [
        _levels(rows),
        _winner(rows),
        _differences(rows),
        _short(rows),
        _mergers(rows),
        _rivals(rows),
        _fedavg(rows),
        _missing(rows),
    ]
    return "\n\n".join(filter(None, parts))


def _mean(scores: pd.Series) -> str:
    return f"{scores.mean():.1f}" if len(scores) else "–"


def _levels(rows: pd.DataFrame) -> str:
    head = [*SETTING, "seeds", "clients", "ensemble, mean / stacked / by class"]
    lines = []
    for setting, part in _settings(rows):
        merged = _scores(part, MERGED, WHOLE_WAY)
        alone = 100 * part[part["network"] == CLIENT]["test"]
        together = [_mean(_scores(part, ENSEMBLE, (t, "False", "test"))) for t in ("mean", "stacked", "by-class")]
        line = [*setting, len(merged), _mean(alone), " / ".join(together)]
        line += [
            " / ".join(_mean(_scores(part, one, way)) for one in (BEST, MERGED, PUBLIC)) for way in COMPARED.values()
        ]
        lines.append([*line, " / ".join(_mean(_chosen(part, one)) for one in (BEST, MERGED, PUBLIC))])
    return (
        "Test accuracy, mean over seeds. Three numbers are best client / merged / network of the public labels alone: "
        "with a new head and no retraining; retrained on the public labels with the clients' mean as teacher, without "
        "and with a new head; with a stacked teacher, likewise; that with unlabelled images, likewise; "
        "each in the one of all these ways that is best on val.\n\n" + table([*head, *COMPARED, "chosen on val"], lines)
    )


def _winner(rows: pd.DataFrame) -> str:
    """Which way is best for the merged network on val; what the program does by default was chosen by this table."""
    found = {
        way: [
            _scores(part, MERGED, (teacher, unlabelled, column.replace("test", "val"))).mean()
            for _, part in _settings(rows)
        ]
        for way, (teacher, unlabelled, column) in COMPARED.items()
    }
    levels = pd.DataFrame(found)
    labelled = levels[[way for way, (_, unlabelled, _) in COMPARED.items() if unlabelled == "False"]]
    lines = [
        [way, f"{levels[way].mean():.1f}", f"{levels[way].min():.1f}", *(
            int((some.idxmax(axis=1) == way).sum()) if way in some else "–" for some in (labelled, levels)
        )]
        for way in COMPARED
    ]  # fmt: skip
    return (
        f"How the merged network is best retrained, on val: mean and lowest of {len(levels)} settings, and in how many "
        "of them a way is the best of those without unlabelled images, and of all. By default the program does "
        f"*{next(way for way, how in COMPARED.items() if how == DEFAULT_WAY)}*, and learns from unlabelled public "
        "images where there are any.\n\n"
        + table(["way", "mean", "lowest", "best without unlabelled", "best of all"], lines)
    )


def _differences(rows: pd.DataFrame) -> str:
    lines = []
    for one in family(rows):
        d = one.difference
        interval = "–" if math.isnan(d.low) else f"{d.low:+.1f} to {d.high:+.1f}"
        lines.append(
            [*one.setting, one.other, f"{d.mean:+.1f}", interval, d.n, "–" if math.isnan(one.p) else f"{one.p:.3f}"]
        )
    return (
        "Merged less the other with everything the same, in points, paired by seed; p is Holm's, over all tests here."
        "\n\n" + table([*SETTING, "less", "difference", "95 % interval", "seeds", "p"], lines)
    )


def _short(rows: pd.DataFrame) -> str:
    """Where the aim is missed: above the best client wherever clients are skewed, within a point of any ensemble."""
    skewed = [one for one in family(rows) if one.other == BEST and one.setting[1] != EVEN]
    missed = [
        f"{_called(one.setting)} ({one.difference.mean:+.1f}, from {one.difference.low:+.1f})"
        for one in skewed
        if not one.difference.low > 0
    ]
    gaps = {setting: gap for setting, gap in _beside_ensemble(rows).items() if gap < -1}
    below = [f"{_called(setting)} ({gap:+.1f})" for setting, gap in gaps.items()]
    return (
        f"What was aimed at. Above the best client, interval and all, where clients are skewed: "
        f"{len(skewed) - len(missed)} of {len(skewed)} settings. Not in {'; '.join(missed) or 'none'}. Within a point "
        f"of the best ensemble or above it: all settings but {'; '.join(below) or 'none'}."
    )


def _called(setting: tuple[str, ...]) -> str:
    model, partition, init, n = setting
    return f"{model} {partition}, {init}, n = {n}"


def _beside_ensemble(rows: pd.DataFrame) -> dict[tuple[str, ...], float]:
    """Of each setting the merged network, with everything, less the best ensemble of clients, in points."""
    found = {}
    for setting, part in _settings(rows):
        ensembles = [_scores(part, ENSEMBLE, (t, "False", "test")) for t in ("mean", "stacked", "by-class")]
        found[setting] = _scores(part, MERGED, WHOLE_WAY).mean() - max(scores.mean() for scores in ensembles)
    return found


def _fedavg(rows: pd.DataFrame) -> str:
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        rivals = part[part["network"].isin([FEDAVG, RECOMPUTED])]
        merged = _scores(part, MERGED, WHOLE_WAY)
        for (network, rounds), found in rivals.groupby(["network", "of"], sort=False):
            scores = (100 * found.set_index("seed")[column] for column in ("test", "head_test"))
            lines.append([*setting, network, rounds, len(found), *map(_mean, scores), _mean(merged)])
    if not lines:
        return ""
    return (
        "FedAvg with 10 local epochs in one round, 2 in each of five, 1 in each of twenty; one round is the traffic of "
        "the merge without its head.\n\n"
        + table([*SETTING, "network", "rounds", "seeds", "accuracy", "with a head", "merged, all of that"], lines)
    )


def _mergers(rows: pd.DataFrame) -> str:
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        for network in TAUGHT:
            scores = {way: _scores(part, network, how) for way, how in COMPARED.items()}
            if not (seeds := scores["all of that + head"].dropna().index).empty:
                merged = [_scores(part, MERGED, how) for how in COMPARED.values()]
                pairs = zip(merged, scores.values(), strict=True)
                line = [" / ".join(_mean(one.reindex(seeds).dropna()) for one in pair) for pair in pairs]
                lines.append([*setting, network, len(seeds), *line])
    if not lines:
        return ""
    return (
        f"Merged / merged by another merger that a teacher guides, everything else the same: {COEFFICIENTS} of each "
        f"client and tensor, and {FOLDED}'s learned matrices. Their teacher is that of the retraining, the mean where "
        "there is none.\n\n" + table([*SETTING, "merger", "seeds", *COMPARED], lines)
    )


def _rivals(rows: pd.DataFrame) -> str:
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        for name, (network, teacher, of) in METHODS.items():
            chosen = (part["network"] == network) & (part["teacher"] == teacher) & (part["of"] == of)
            found = part[chosen].set_index("seed")
            if found.empty:
                continue
            merged = [_scores(part, MERGED, way).reindex(found.index).dropna() for way in (DEFAULT_WAY, WHOLE_WAY)]
            scores = [(100 * found[column]).dropna() for column in ("test", "head_test")]
            lines.append([*setting, name, len(found), *map(_mean, scores), *map(_mean, merged)])
    if not lines:
        return ""
    return (
        f"Rivals. {FEDDF} distils the clients' mean ensemble into their plain average, on all public images and no "
        f"label. {FEDMA} matches and averages layer by layer, in {ONE}, or one layer a round in {CYCLE}, in which "
        "clients retrain what is not fixed yet, for no more epochs in all than in their first round. The ensemble with "
        f"{WEIGHTS} has one weight a client, those under which the public labels are most likely. Merged is of "
        "the same seeds.\n\n"
        + table(
            [*SETTING, "rival", "seeds", "accuracy", "with a head", "merged, by default", "merged, all of that"],
            lines,
        )
    )


def _coverage(rows: pd.DataFrame) -> dict[tuple[str, str, str], tuple[int, int]]:
    """What, model and n -> how many settings and seeds of the whole plan there are, and how many are measured."""
    keys = [*SETTING, "seed"]
    averaged = rows[rows["network"] == FEDAVG].groupby(keys).size()
    last = rows[(rows["network"] == COEFFICIENTS) & (rows["unlabelled"] == "True")].groupby(keys).size()
    there = {
        MERGED: {(*setting, seed) for setting, part in _settings(rows) for seed in part["seed"]},
        FEDAVG: {tuple(map(str, key)) for key, found in averaged.items() if found == len(Pays.fedavg)},
        RIVALS: {tuple(map(str, key)) for key in last.index},
    }
    planned = dict.fromkeys(
        (grid.what, grid.model, partition, init, str(n), str(seed))
        for grid in PLANS[Pays.plan]
        for seed, n, partition, init in grid.settings(Pays.seeds)
    )
    counts: dict[tuple[str, str, str], tuple[int, int]] = {}
    for what, model, partition, init, n, seed in planned:
        whole, measured = counts.get((what, model, n), (0, 0))
        found = (model, partition, init, n, seed) in there[what]
        counts[what, model, n] = whole + 1, measured + found
    return counts


def _missing(rows: pd.DataFrame) -> str:
    lines = [[*key, whole, measured, whole - measured] for key, (whole, measured) in _coverage(rows).items()]
    return (
        "What is measured of the plan: partitions x starts x seeds. Three clients of two classes each are not in it: "
        "four classes would be nobody's.\n\n"
    ) + table(["", "model", "n", "planned", "measured", "missing"], lines)


def _answer(rows: pd.DataFrame) -> str:
    rows = _read(rows)
    tests, within, chosen = family(rows), [*_beside_ensemble(rows).values()], []
    for _, part in _settings(rows):
        chosen.append((_chosen(part, MERGED) - _chosen(part, BEST)).mean())
    said = []
    for other in (BEST, PUBLIC):
        means = [one.difference.mean for one in tests if one.other == other]
        sure = [one.difference.mean > 0 for one in tests if one.other == other and one.p < LEVEL]
        said.append(
            f"{_range(means)} points (above 0 in {sum(m > 0 for m in means)} of {len(means)} settings, significantly "
            f"so in {sum(sure)}, significantly below in {len(sure) - sum(sure)})"
        )
    whole, measured = map(sum, zip(*_coverage(rows).values(), strict=True))
    return f"""
With the same retraining, stacked teacher, unlabelled images and head, the merged network less the best client is
{said[0]}, and less a network of the public labels alone {said[1]}. Less the best ensemble of clients it is
{_range(within)} points, and within a point of it or above in {sum(d >= -1 for d in within)} of {len(within)} settings.
Each in the way that is best for it on val, it is {_range(chosen)} points from the best client.
{measured} of the plan's {whole} settings and seeds are measured."""


def _range(values: list[float]) -> str:
    ends = dict.fromkeys(f"{value:+.1f}" for value in (min(values), max(values)))
    return " to ".join(ends)


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    tests = family(_read(rows))
    settings = list(dict.fromkeys(one.setting for one in tests))
    fig, ax = figure("Merged less the other, everything the same", 1.5 + 0.32 * len(settings))
    for k, other in enumerate((BEST, PUBLIC)):
        chosen = [one for one in tests if one.other == other]
        y = [-settings.index(one.setting) - 0.22 * k for one in chosen]
        x = [one.difference.mean for one in chosen]
        half = [0 if math.isnan(one.difference.high) else one.difference.high - one.difference.mean for one in chosen]
        ax.errorbar(x, y, xerr=half, fmt=MARKS[k], color=SERIES[k], label=f"less {other}", linestyle="none", capsize=2)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks([-i for i in range(len(settings))], [*map(_called, settings)])
    ax.set_ylim(-len(settings) + 0.3, 0.5)
    ax.set_xlabel("points on the test split, 95 % interval")
    legend(fig, columns=2)
    return fig


STUDY = Study(
    "does-merging-pay",
    cells,
    "merged, best client and public labels alone with everything the same, over skew, clients, starts; rivals",
    title="Does merging pay?",
    source="a question of fedmerge's own, and of anyone who holds private data",
    question="""
Clients train on private images from independent or from pretrained networks, and send their networks once. Is the
network that a server merges of theirs better than the best of them, and than a network of the server's own labelled
images, when all three get the same retraining, the same teacher, the same unlabelled images and the same sums for
their last layer? How much is the merge, how much the teacher, how much the sums?""",
    cost="some 17 hours on one core for all cells; rows as they come, so stop it and go on with --resume",
    sizes={
        "quick": Pays(seeds=(0,), plan="a toy", labels=100, epochs=1, fedavg=((1, 1),)),
        "default": Pays(),
    },
    answer=_answer,
    theirs=f"""
Nothing is published for these settings. A trial before the study (CIFAR-10, 6 clients of 2,500 images, 10 epochs,
independent, one seed, Dirichlet 0.1 three) had, as {BEST} / merged / {PUBLIC}:

| | `cnn` Dirichlet 0.1 | two classes | Dirichlet 0.5 | IID | `hlb` 8 Dirichlet 0.1 |
|---|--:|--:|--:|--:|--:|
| ensemble, mean / stacked | 31.5 / 46.6 | 21.1 / 44.9 | 43.3 / 47.4 | 46.6 / 47.7 | 47.9 / 65.1 |
| mean teacher | 36.3 / 42.2 | 31.3 / 41.3 | 44.0 / 43.7 | 45.6 / 44.9 | 60.9 / 60.6 |
| stacked | 39.7 / 43.4 | 35.2 / 42.8 | 44.8 / 44.2 | 44.9 / 45.0 | 61.3 / 60.8 |
| stacked, 4,000 unlabelled | 43.2 / 45.1 | 36.8 / 42.2 | 46.2 / 46.1 | 46.1 / 46.0 | 64.1 / 64.0 |
| all of that + head | 45.3 / 46.8 / 46.6 | 40.5 / 45.3 / – | 46.9 / 47.6 / 46.2 | 46.6 / 47.2 / 45.9 | 65.5 / 65.4 / 63.3 |""",  # noqa: E501
    ours=_ours,
    explains="""
The best client is chosen on val, as is the ridge strength of a head; test is looked at once. All that is compared with
the merge has its retraining (half on labels, half on the teacher; unlabelled images on the teacher alone), the same
draws, and a head from sums over the same private images, so what is left is the start: merged weights, one client's, or
those of the public labels. That the last one is near shows how much of the whole comes from teacher and sums, which
carry private data too.

FedMA here keeps the width of its layers, which the paper lets grow, and FedDF averages probabilities, the paper logits.
DIMAT (Saadati et al., CVPR 2024) is not among the rivals: the aggregator of APPFL 1.12 that has its name reads units
from graphs written by hand for its own ResNets, VGGs and one network of two convolutions and two linear layers, and
none of these networks has one.""",
    draw=_draw,
)
