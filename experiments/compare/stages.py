"""What runs are compared by: the stages of one run, and each stage over seeds and settings, paired with a reference.

Accuracies are shares in ``[0, 1]``.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from experiments.compare.paired import holm, paired
from experiments.records.keys import METHOD_KEYS, problem, setups
from experiments.records.runs import Run, Stage

RESULTS = ("retrained", "repaired", "merged", "aggregated")
"""Stages that are a strategy's outcome, the furthest first."""


_COMPARED = [
    "setup",
    "stage",
    "title",
    "n",
    "accuracy",
    "sd",
    "loss",
    "loss_sd",
    "difference",
    "difference_sd",
    "low",
    "high",
    "pairs",
    "p",
    "p_holm",
    "wilcoxon",
    "wilcoxon_holm",
    "reference",
    "note",
]


def stage_table(run: Run) -> pd.DataFrame:
    """The stages of one run: ``stage, title, accuracy, sd, loss, note``, a row each, in the order of the run.

    ``sd`` is the standard deviation over clients where the row is a mean over clients, else NaN.
    """
    return pd.DataFrame(
        {
            "stage": [s.stage for s in run.stages],
            "title": [s.title for s in run.stages],
            "accuracy": np.array([s.accuracy for s in run.stages], dtype=float),
            "sd": np.array([math.nan if s.sd is None else s.sd for s in run.stages], dtype=float),
            "loss": np.array([s.loss for s in run.stages], dtype=float),
            "note": [s.note for s in run.stages],
        }
    )


def outcome(run: Run) -> Stage | None:
    """The network that the strategy ends with: the furthest of :data:`RESULTS` that the run has."""
    return next((stage for name in RESULTS if (stage := run.stage(name)) is not None), None)


def full_title(titles: Sequence[str], title: str) -> str:
    """A title that goes on from the row before (``"+ retrain"``) with all that it goes on from."""
    at = titles.index(title)
    first = next((k for k in range(at, -1, -1) if not titles[k].startswith("+")), at)
    return " ".join(titles[first : at + 1])


def compare(runs: Sequence[Run], *, reference: str = "fedavg") -> pd.DataFrame:
    r"""Every stage of every setup, over the seeds whose runs finished.

    A run is paired with the run of the same seed and the same problem (all config keys but
    :data:`METHOD_KEYS`) that has the reference, first of all with itself; of several the one whose method agrees
    in most keys, so that of two initialisations its own is taken. :func:`experiments.compare.paired.paired` says
    what is made of the differences :math:`d_i` in accuracy of these pairs.

    Args:
        runs: Runs to compare; those that did not finish are left out.
        reference: What the others are held against: a stage, or a strategy (``"fedavg"``) whose aggregate it is.

    Returns:
        A row per setup and stage: ``setup, stage, title, n, accuracy, sd, loss, loss_sd, difference,
        difference_sd, low, high, pairs, p, p_holm, wilcoxon, wilcoxon_holm, reference, note``. ``n`` counts
        seeds; standard deviations are those of a sample (``n - 1``), NaN for a single one. ``low`` to ``high``
        is the 95 % confidence interval of ``difference``, ``p`` and ``wilcoxon`` are the p-values of the two
        tests, and those ending in ``_holm`` are corrected for the number of tests in the table. All of
        these are NaN where nothing can be paired and for the reference itself, which ``reference`` repeats.
    """
    rows = []
    groups = setups([run for run in runs if run.finished])
    # What is held against the reference comes first, the reference last.
    groups = dict(sorted(groups.items(), key=lambda g: any(_reference_row(run, reference) is not None for run in g[1])))
    counted = [run for members in groups.values() for run in members]
    for setup, members in groups.items():
        for stage, (title, note) in _stage_order(members).items():
            found = [(run, row) for run in members if (row := run.stage(stage)) is not None]
            pairs = [(row, _counterpart(run, counted, reference)) for run, row in found]
            found_pairs = paired([row.accuracy - o.accuracy for row, o in pairs if o is not None and o is not row])
            rows.append(
                {
                    "setup": setup,
                    "stage": stage,
                    "title": title,
                    "n": len(found),
                    **_mean_sd([row.accuracy for _, row in found], "accuracy", "sd"),
                    **_mean_sd([row.loss for _, row in found], "loss", "loss_sd"),
                    "difference": found_pairs.mean,
                    "difference_sd": found_pairs.sd,
                    "low": found_pairs.low,
                    "high": found_pairs.high,
                    "pairs": found_pairs.n,
                    "p": found_pairs.t,
                    "wilcoxon": found_pairs.wilcoxon,
                    "reference": reference,
                    "note": note,
                }
            )
    return _corrected(pd.DataFrame(rows, columns=_COMPARED))


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table of :func:`compare` the row of each setup's outcome, with the columns of that table.

    The p-values are corrected anew for these rows alone: who asks only how the outcomes stand to the reference has
    asked fewer questions.
    """
    rows = []
    for _, of_setup in table.groupby("setup", sort=False):
        named = of_setup.drop_duplicates("stage").set_index("stage", drop=False)
        rows += [named.loc[name] for name in RESULTS if name in named.index][:1]
    return _corrected(pd.DataFrame(rows, columns=list(table.columns)).reset_index(drop=True))


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(p_holm=holm(table["p"].astype(float)), wilcoxon_holm=holm(table["wilcoxon"].astype(float)))


def _stage_order(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """Stage -> title and note, in the order of the longest table; stages it lacks come at the end."""
    tables = sorted((run.stages for run in runs), key=len, reverse=True)
    order: dict[str, tuple[str, str]] = {}
    for row in (row for table in tables for row in table):
        order.setdefault(row.stage, (row.title, row.note))
    return order


def _reference_row(run: Run, reference: str) -> Stage | None:
    """The row of ``run`` that is the reference: that stage, or what that strategy made of the clients."""
    made_by = str(run.config.get("strategy", ""))
    aggregated = run.stage("aggregated") if made_by in (reference, f"{reference}-retrain") else None
    return run.stage(reference) or aggregated


def _counterpart(run: Run, runs: Sequence[Run], reference: str) -> Stage | None:
    """The reference row for ``run``: its own, else that of the nearest run of its seed and problem."""
    if (own := _reference_row(run, reference)) is not None:
        return own
    asked = problem(run.config)
    same = [
        (other, row)
        for other in runs
        if (row := _reference_row(other, reference)) is not None and problem(other.config) == asked
    ]
    if not same:
        return None

    def nearness(pair: tuple[Run, Stage]) -> tuple[bool, int]:
        agreeing = sum(pair[0].config.get(key) == run.config.get(key) for key in METHOD_KEYS)
        return pair[0].config.get("strategy") == reference, agreeing

    return max(same, key=nearness)[1]


def _mean_sd(values: Sequence[float], mean: str, sd: str) -> dict[str, float]:
    x = np.asarray(values, dtype=float)
    return {
        mean: float(x.mean()) if len(x) else math.nan,
        sd: float(x.std(ddof=1)) if len(x) > 1 and np.isfinite(x).all() else math.nan,
    }
