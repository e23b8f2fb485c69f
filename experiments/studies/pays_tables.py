"""Does merging pay: tables of what was measured, and the differences between networks that were treated alike."""

import math
from dataclasses import dataclass

import pandas as pd

from experiments.compare.paired import Paired, holm, paired
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
    ROUNDS,
    TAUGHT,
    Pays,
)  # fmt: skip
from experiments.studies.page import table
from experiments.studies.pays_cells import CYCLE, FEDDF, FEDMA, ONE, WEIGHTS

Parts = list[tuple[tuple[str, ...], pd.DataFrame]]
"""Settings, each with its rows."""

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
_SEEDS = 3


@dataclass(frozen=True)
class Against:
    """The merged network less ``other`` in one setting, in points, with everything the same; ``p`` is corrected."""

    setting: tuple[str, ...]
    other: str
    difference: Paired
    p: float


def read(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with keys as text and values as numbers, and a column that says which network had which way."""
    found = rows.astype(dict.fromkeys(["n", "seed", "teacher", "unlabelled", "of"], str))
    for column in ("val", "test", "head_val", "head_test"):
        found[column] = pd.to_numeric(found[column], errors="coerce")
    found["way"] = found["network"] + "/" + found["teacher"] + "/" + found["unlabelled"]
    return found.astype({"way": object, "seed": object})  # compared some thousand times, in half the time of text


def accuracies(part: pd.DataFrame, network: str, way: tuple[str, str, str]) -> pd.Series:
    """Seed -> test accuracy of ``network`` in one way, in percent."""
    teacher, unlabelled, column = way
    chosen = (part["way"] == f"{network}/{teacher}/{unlabelled}").to_numpy()
    return pd.Series(100 * part[column].to_numpy()[chosen], part["seed"].to_numpy()[chosen])


def best_way(part: pd.DataFrame, network: str) -> pd.Series:
    """Seed -> test accuracy of ``network`` in the way of its own that is best on val, in percent."""
    own = part[part["network"] == network]
    ways = [own[["seed", *columns]].set_axis(["seed", "val", "test"], axis=1) for columns in (OWN_HEAD, NEW_HEAD)]
    every = pd.concat(ways, ignore_index=True).dropna()
    return 100 * every.loc[every.groupby("seed")["val"].idxmax()].set_index("seed")["test"]


def settings(rows: pd.DataFrame) -> Parts:
    """In the order in which they were measured, of each the seeds that have all three networks."""
    found = []
    for setting, part in rows.groupby(SETTING, sort=False):
        ends = [set(accuracies(part, network, WHOLE_WAY).dropna().index) for network in (MERGED, BEST, PUBLIC)]
        if whole := set.intersection(*ends):
            found.append((tuple(map(str, setting)), part[part["seed"].isin(whole)]))
    return found


def family(parts: Parts) -> list[Against]:
    """The tests: in each setting merged against the best client and against the public labels, everything the same."""
    found = []
    for setting, part in parts:
        merged = accuracies(part, MERGED, WHOLE_WAY)
        for other in (BEST, PUBLIC):
            differences = (merged - accuracies(part, other, WHOLE_WAY)).dropna()
            found.append((setting, other, paired(differences.tolist())))
    corrected = holm([difference.t for *_, difference in found])
    return [Against(*one, float(p)) for one, p in zip(found, corrected, strict=True)]


def ours(rows: pd.DataFrame) -> str:
    """All tables of the page."""
    rows = read(rows)
    parts = settings(rows)
    tables = [
        _levels(parts),
        _parts(parts),
        _winner(parts),
        _differences(parts),
        _short(parts),
        _mergers(rows),
        _rivals(rows),
        _fedavg(rows),
        _rounds(rows),
        _missing(rows),
    ]
    return "\n\n".join(filter(None, tables))


def _mean(scores: pd.Series) -> str:
    return f"{scores.mean():.1f}" if len(scores) else "–"


def _levels(parts: Parts) -> str:
    head = [*SETTING, "seeds", "clients", "ensemble, mean / stacked / by class"]
    lines = []
    for setting, part in parts:
        merged = accuracies(part, MERGED, WHOLE_WAY)
        alone = 100 * part[part["network"] == CLIENT]["test"]
        together = [_mean(accuracies(part, ENSEMBLE, (t, "False", "test"))) for t in ("mean", "stacked", "by-class")]
        line = [*setting, len(merged), _mean(alone), " / ".join(together)]
        line += [
            " / ".join(_mean(accuracies(part, one, way)) for one in (BEST, MERGED, PUBLIC)) for way in COMPARED.values()
        ]
        lines.append([*line, " / ".join(_mean(best_way(part, one)) for one in (BEST, MERGED, PUBLIC))])
    return (
        "Test accuracy, mean over seeds. Three numbers are best client / merged / network of the public labels alone: "
        "with a new head and no retraining; retrained on the public labels with the clients' mean as teacher, without "
        "and with a new head; with a stacked teacher, likewise; that with unlabelled images, likewise; "
        "each in the one of all these ways that is best on val.\n\n" + table([*head, *COMPARED, "chosen on val"], lines)
    )


def _parts(parts: Parts) -> str:
    """What each part of the pipeline is worth where the others are as they are."""
    taught, stacked, more = ("mean", "False", "test"), ("stacked", "False", "test"), ("stacked", "True", "test")
    steps = {
        "a stacked teacher instead of the mean": ((MERGED, stacked), (MERGED, taught)),
        "its answers to unlabelled images, besides": ((MERGED, more), (MERGED, stacked)),
        "a head from sums, besides": ((MERGED, WHOLE_WAY), (MERGED, more)),
        f"with all of that: merged weights instead of the {BEST}'s": ((MERGED, WHOLE_WAY), (BEST, WHOLE_WAY)),
        f"merged weights instead of those of {PUBLIC} alone": ((MERGED, WHOLE_WAY), (PUBLIC, WHOLE_WAY)),
        "with none of that but a head: merged weights instead of the best client's": (
            (MERGED, (NONE, "False", "head_test")), (BEST, (NONE, "False", "head_test")),
        ),
    }  # fmt: skip
    lines = []
    for part, (after, before) in steps.items():
        line = [part]
        for skewed in (True, False):
            gains = [
                (accuracies(found, *after) - accuracies(found, *before)).mean()
                for setting, found in parts
                if (setting[1] != EVEN) == skewed
            ]
            ends = f" ({min(gains):+.1f} to {max(gains):+.1f})" if gains else ""
            line.append(f"{sum(gains) / len(gains):+.1f}{ends}" if gains else "–")
        lines.append(line)
    return (
        "How much is the merge, how much the teacher, how much the sums: points on test, mean over settings (lowest to "
        "highest).\n\n" + table(["part", "skewed clients", "IID"], lines)
    )


def _winner(parts: Parts) -> str:
    """Which way is best for the merged network on val; what the program does by default was chosen by this table."""
    found = {
        way: [
            accuracies(part, MERGED, (teacher, unlabelled, column.replace("test", "val"))).mean() for _, part in parts
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


def _differences(parts: Parts) -> str:
    lines = []
    for one in family(parts):
        d = one.difference
        interval = "–" if math.isnan(d.low) else f"{d.low:+.1f} to {d.high:+.1f}"
        lines.append(
            [*one.setting, one.other, f"{d.mean:+.1f}", interval, d.n, "–" if math.isnan(one.p) else f"{one.p:.3f}"]
        )
    return (
        "Merged less the other with everything the same, in points, paired by seed; p is Holm's, over all tests here."
        "\n\n" + table([*SETTING, "less", "difference", "95 % interval", "seeds", "p"], lines)
    )


def _short(parts: Parts) -> str:
    """Where the aim is missed: above the best client wherever clients are skewed, within a point of any ensemble."""
    skewed = [
        one for one in family(parts) if one.other == BEST and one.setting[1] != EVEN and one.difference.n >= _SEEDS
    ]
    missed = [
        f"{called(one.setting)} ({one.difference.mean:+.1f}, from {one.difference.low:+.1f})"
        for one in skewed
        if not one.difference.low > 0
    ]
    beside = beside_ensemble(parts)
    gaps = {one.setting: gap for one in skewed if (gap := beside[one.setting]) < -1}
    below = [f"{called(setting)} ({gap:+.1f})" for setting, gap in gaps.items()]
    return (
        f"What was aimed at, in skewed settings of {_SEEDS} seeds or more. Above the best client, interval and all: "
        f"{len(skewed) - len(missed)} of {len(skewed)}. Not in {'; '.join(missed) or 'none'}. Within a point of the "
        f"best ensemble or above it: all but {'; '.join(below) or 'none'}."
    )


def called(setting: tuple[str, ...]) -> str:
    """A setting in words."""
    model, partition, init, n = setting
    return f"{model} {partition}, {init}, n = {n}"


def beside_ensemble(parts: Parts) -> dict[tuple[str, ...], float]:
    """Of each setting the merged network, with everything, less the best ensemble of clients, in points."""
    found = {}
    for setting, part in parts:
        ensembles = [accuracies(part, ENSEMBLE, (t, "False", "test")) for t in ("mean", "stacked", "by-class")]
        found[setting] = accuracies(part, MERGED, WHOLE_WAY).mean() - max(scores.mean() for scores in ensembles)
    return found


def _fedavg(rows: pd.DataFrame) -> str:
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        rivals = part[part["network"].isin([FEDAVG, RECOMPUTED])]
        merged = accuracies(part, MERGED, WHOLE_WAY)
        for (network, rounds), found in rivals.groupby(["network", "of"], sort=False):
            scores = (100 * found.set_index("seed")[column] for column in ("test", "head_test"))
            same = merged.reindex(found["seed"]).dropna()
            lines.append([*setting, network, rounds, len(found), *map(_mean, scores), _mean(same)])
    if not lines:
        return ""
    return (
        "FedAvg with 10 local epochs in one round, 2 in each of five, 1 in each of twenty; one round is the traffic of "
        "the merge without its head, which is of the same seeds here.\n\n"
        + table([*SETTING, "network", "rounds", "seeds", "accuracy", "with a head", "merged, all of that"], lines)
    )


def _rounds(rows: pd.DataFrame) -> str:
    rounds, epochs = Pays.rounds
    numbers = [str(r) for r in range(1, rounds + 1)]
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        own = part[part["network"] == ROUNDS]
        if own.empty:
            continue
        line = [*setting, own["seed"].nunique()]
        for r in numbers:
            there = own[own["of"] == r]
            ways = ((NONE, "True", "test"), (NONE, "True", "head_test"), COMPARED["stacked, unlabelled"], WHOLE_WAY)
            line.append(" / ".join(_mean(accuracies(there, ROUNDS, way)) for way in ways))
        same = part[part["seed"].isin(own["seed"])]
        averaged = same[same["network"].isin([FEDAVG, RECOMPUTED]) & (same["of"] == numbers[-1])]
        others = [
            _mean(best_way(one, name)) for one, name in ((averaged.assign(network=FEDAVG), FEDAVG), (same, MERGED))
        ]
        lines.append([*line, _mean(best_way(own, ROUNDS)), *others])
    if not lines:
        return ""
    return (
        f"The pipeline in {rounds} rounds of {epochs} local epochs, with a stacked teacher and unlabelled images: of "
        "each round the merged network / the same with a new head / retrained, which is where the next round begins / "
        "the same with a new head. Then what is handed out if round, stage and head are chosen on val, and beside it "
        "FedAvg of as many rounds and epochs, and the one round of before, both in the way that is best for them on "
        "val.\n\n"
        + table(
            [
                *SETTING,
                "seeds",
                *(f"round {r}" for r in numbers),
                "chosen on val",
                f"FedAvg, {rounds} rounds",
                "one round",
            ],
            lines,
        )
    )


def _mergers(rows: pd.DataFrame) -> str:
    lines = []
    for setting, part in rows.groupby(SETTING, sort=False):
        for network in TAUGHT:
            scores = {way: accuracies(part, network, how) for way, how in COMPARED.items()}
            if not (seeds := scores["all of that + head"].dropna().index).empty:
                merged = [accuracies(part, MERGED, how) for how in COMPARED.values()]
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
            merged = [accuracies(part, MERGED, way).reindex(found.index).dropna() for way in (DEFAULT_WAY, WHOLE_WAY)]
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


def coverage(rows: pd.DataFrame) -> dict[tuple[str, str, str], tuple[int, int]]:
    """What, model and n -> how many settings and seeds of the whole plan there are, and how many are measured."""
    keys = [*SETTING, "seed"]
    averaged = rows[rows["network"] == FEDAVG].groupby(keys).size()
    last = rows[(rows["network"] == COEFFICIENTS) & (rows["unlabelled"] == "True")].groupby(keys).size()
    there = {
        MERGED: {(*setting, seed) for setting, part in settings(rows) for seed in part["seed"]},
        FEDAVG: {tuple(map(str, key)) for key, found in averaged.items() if found == len(Pays.fedavg)},
        RIVALS: {tuple(map(str, key)) for key in last.index},
        ROUNDS: set(rows[rows["network"] == ROUNDS][keys].astype(str).itertuples(index=False, name=None)),
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
    lines = [[*key, whole, measured, whole - measured] for key, (whole, measured) in coverage(rows).items()]
    return (
        "What is measured of the plan: partitions x starts x seeds. Three clients of two classes each are not in it: "
        "four classes would be nobody's.\n\n"
    ) + table(["", "model", "n", "planned", "measured", "missing"], lines)
