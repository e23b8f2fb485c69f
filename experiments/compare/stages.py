"""What runs are compared by: the stages of one run, and each stage over seeds and settings, paired with a reference.

Accuracies are shares in ``[0, 1]``.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from experiments.compare.paired import Paired, holm, paired
from experiments.records.keys import METHOD_KEYS, problem, setups
from experiments.records.runs import Run, Stage

RESULTS = ("head", "chosen", "retrained", "repaired", "merged", "aggregated")
"""Stages that are a strategy's outcome, the furthest first."""

CONTROL = "client-best-retrained"
"""The strongest control that is fixed beforehand: who does not beat it has not gained from the other clients."""

_TESTS = ("p", "control_p")
_COMPARED = [
    *("setup", "stage", "title", "n", "accuracy", "sd", "loss", "loss_sd"),
    *("difference", "difference_sd", "low", "high", "pairs", "p", "p_holm", "wilcoxon", "wilcoxon_holm", "reference"),
    *("control_difference", "control_low", "control_high", "control_pairs", "control_p", "control_p_holm"),
    *("control_wilcoxon", "control_wilcoxon_holm", "note"),
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


def handed_out(run: Run) -> str:
    """Which network was chosen on val, as ``"MergeMany, anchored + repair of round 2"``; ``""`` where none was."""
    if run.handed_out is None:
        return ""
    row = run.stage(run.handed_out.stage)
    title = run.handed_out.stage if row is None else full_title([s.title for s in run.stages], row.title)
    return f"{title} of round {run.handed_out.round}"


def compare(runs: Sequence[Run], *, reference: str = "fedavg") -> pd.DataFrame:
    r"""Every stage of every setup, over the seeds whose runs finished.

    :class:`Reference` says with what a run is paired, :func:`experiments.compare.paired.paired` what is made of the
    differences :math:`d_i` in accuracy of these pairs. One family of questions is tested, decided before any run:
    what each setup ends with (:data:`RESULTS`) against the reference, and against :data:`CONTROL`. Its p-values are
    corrected once, for all of them, so a contrast has one p wherever it is shown. Every other row has its difference
    with an interval and no p.

    Args:
        runs: Runs to compare; those that did not finish are left out.
        reference: What the others are held against: a stage, or a strategy (``"fedavg"``) whose aggregate it is.

    Returns:
        A row per setup and stage: ``setup, stage, title, n, accuracy, sd, loss, loss_sd, difference,
        difference_sd, low, high, pairs, p, p_holm, wilcoxon, wilcoxon_holm, reference, control_difference,
        control_low, control_high, control_pairs, control_p, control_p_holm, control_wilcoxon,
        control_wilcoxon_holm, note``. ``n`` counts seeds; standard deviations are those of a sample (``n - 1``), NaN
        for a single one. ``low`` to ``high`` is the 95 % confidence interval of ``difference``, ``p`` and
        ``wilcoxon`` are the p-values of the two tests, and those ending in ``_holm`` are corrected for the number of
        tests of the family. Those with ``control_`` before them are the same against :data:`CONTROL`. All of these
        are NaN where nothing can be paired and for the reference itself, which ``reference`` repeats.
    """
    rows = []
    groups = setups([run for run in runs if run.finished])
    counted = [run for members in groups.values() for run in members]
    held_to, control = Reference(reference, counted), Reference(CONTROL, counted)
    apart = reference != CONTROL  # else one test would count as two
    # What is held against the reference comes first, what ends with the reference last.
    groups = dict(sorted(groups.items(), key=lambda g: any(_ends_with(held_to, run) for run in g[1])))
    for setup, members in groups.items():
        order = _stage_order(members)
        end = next((name for name in RESULTS if name in order), None)
        for stage, (title, note) in order.items():
            found = [row for run in members if (row := run.stage(stage)) is not None]
            against, to_control = held_to.contrast(members, stage), control.contrast(members, stage)
            rows.append(
                {
                    "setup": setup,
                    "stage": stage,
                    "title": title,
                    "n": len(found),
                    **_mean_sd([row.accuracy for row in found], "accuracy", "sd"),
                    **_mean_sd([row.loss for row in found], "loss", "loss_sd"),
                    **_columns(against, tested=stage == end),
                    "difference_sd": against.sd,
                    "reference": reference,
                    **(_columns(to_control, tested=True, prefix="control_") if stage == end and apart else {}),
                    "note": note,
                }
            )
    table = pd.DataFrame(rows, columns=_COMPARED)
    for test in ("p", "wilcoxon"):
        family = [test, f"control_{test}"]
        corrected = holm(table[family].astype(float).to_numpy().ravel()).reshape(-1, 2)
        table[[f"{column}_holm" for column in family]] = corrected
    return table


def tests_of(table: pd.DataFrame) -> int:
    """How many tests the family of a table of :func:`compare` has."""
    return int(table[list(_TESTS)].notna().sum().sum())


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table of :func:`compare` the row of each setup's outcome, with the columns of that table."""
    rows = []
    for _, of_setup in table.groupby("setup", sort=False):
        named = of_setup.drop_duplicates("stage").set_index("stage", drop=False)
        rows += [named.loc[name] for name in RESULTS if name in named.index][:1]
    return pd.DataFrame(rows, columns=list(table.columns)).reset_index(drop=True)


class Reference:
    """What the results of runs are held against, a row for each run.

    A run is paired with the run of the same seed and the same problem (all config keys but :data:`METHOD_KEYS`) that
    has the reference, first of all with itself; of several the one whose method agrees in most keys, so that of two
    initialisations its own is taken.
    """

    def __init__(self, name: str, runs: Iterable[Run]) -> None:
        """``name`` is a stage, or a strategy whose aggregate is meant; it is looked for in ``runs``."""
        self.name = name
        self._rows: dict[str, list[tuple[Run, Stage]]] = {}
        for run in runs:
            if (row := self.own(run)) is not None:
                self._rows.setdefault(_problem(run), []).append((run, row))

    def own(self, run: Run) -> Stage | None:
        """The row of ``run`` that is the reference: that stage, or what that strategy made of the clients."""
        made_by = str(run.config.get("strategy", ""))
        once = run.config.get("rounds", 1) == 1  # after a retraining the next mean is another one
        same = made_by == self.name or (made_by == f"{self.name}-retrain" and once)
        aggregated = run.stage("aggregated") if same else None
        chosen = run.stage("chosen") if made_by == self.name else None
        return run.stage(self.name) or chosen or aggregated

    def of(self, run: Run) -> Stage | None:
        """The reference for ``run``: its own, else that of the nearest run of its seed and problem."""
        if (own := self.own(run)) is not None:
            return own

        def nearness(pair: tuple[Run, Stage]) -> tuple[bool, int]:
            agreeing = sum(pair[0].config.get(key) == run.config.get(key) for key in METHOD_KEYS)
            return pair[0].config.get("strategy") == self.name, agreeing

        same = self._rows.get(_problem(run), []) if self._rows else []
        return max(same, key=nearness)[1] if same else None

    def pairs(self, runs: Iterable[Run], stage: str) -> list[tuple[Stage, Stage]]:
        """Of each of ``runs`` its row ``stage`` and the reference, where it has both and they are two."""
        found = [(row, self.of(run)) for run in runs if (row := run.stage(stage)) is not None]
        return [(row, other) for row, other in found if other is not None and other is not row]

    def contrast(self, runs: Iterable[Run], stage: str) -> Paired:
        """What the differences in accuracy of :meth:`pairs` say."""
        return paired([row.accuracy - other.accuracy for row, other in self.pairs(runs, stage)])


def _ends_with(reference: Reference, run: Run) -> bool:
    own = reference.own(run)
    return own is not None and own is outcome(run)


def _problem(run: Run) -> str:
    return repr(sorted(problem(run.config).items()))


def _columns(found: Paired, *, tested: bool, prefix: str = "") -> dict[str, float]:
    """A contrast as the columns of a table, its tests only where they are of the family."""
    estimate = {"difference": found.mean, "low": found.low, "high": found.high, "pairs": found.n}
    tests = {"p": found.t, "wilcoxon": found.wilcoxon} if tested else {}
    return {f"{prefix}{name}": value for name, value in (estimate | tests).items()}


def _stage_order(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """Stage -> title and note, in the order of the longest table; stages it lacks come at the end."""
    tables = sorted((run.stages for run in runs), key=len, reverse=True)
    order: dict[str, tuple[str, str]] = {}
    for row in (row for table in tables for row in table):
        order.setdefault(row.stage, (row.title, row.note))
    return order


def _mean_sd(values: Sequence[float], mean: str, sd: str) -> dict[str, float]:
    x = np.asarray(values, dtype=float)
    return {
        mean: float(x.mean()) if len(x) else math.nan,
        sd: float(x.std(ddof=1)) if len(x) > 1 and np.isfinite(x).all() else math.nan,
    }
