"""What ``fedmerge audit`` found: the rows of ``audit.json``, written by the audit and read by reports."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedmerge.errors import RunDirectoryError
from fedmerge.files import read_text

FILE = "audit.json"


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One attack on the networks of one stage.

    Attributes:
        setup: In which keys of the configuration its runs differ from others, with their values; ``""`` of one setup.
        stage: Which networks, for example ``"merged"``.
        title: What tables call them.
        attack: A name of :data:`fedmerge.privacy.ATTACKS`.
        targets: How many networks were attacked; their scores are pooled.
        shadows: How many networks the attacker trained for each.
        members: Members over all targets that can be held against an outsider of their class.
        outsiders: Images of members' classes that neither a target nor what it began from was trained on.
        auc: Area under the ROC, with its 95 % interval.
        auc_low: Lower end.
        auc_high: Upper end.
        auc_sd: Standard deviation of the area over targets; None of a single one.
        balanced_accuracy: At the best threshold.
        tpr_1: Share of members found at 1 % false alarms, with its Clopper-Pearson interval.
        tpr_1_low: Lower end.
        tpr_1_high: Upper end.
        tpr_01: Likewise at 0.1 %.
        tpr_01_low: Lower end.
        tpr_01_high: Upper end.
        enough_1: Whether there are non-members enough for 1 %.
        enough_01: Whether there are for 0.1 %.
        accuracy: Mean test accuracy of the targets.
    """

    setup: str
    stage: str
    title: str
    attack: str
    targets: int
    shadows: int
    members: int
    outsiders: int
    auc: float
    auc_low: float
    auc_high: float
    auc_sd: float | None
    balanced_accuracy: float
    tpr_1: float
    tpr_1_low: float
    tpr_1_high: float
    tpr_01: float
    tpr_01_low: float
    tpr_01_high: float
    enough_1: bool
    enough_01: bool
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """How many known members were laid to the client that holds them.

    Attributes:
        setup: As of an attack.
        view: Who guesses, from what.
        value: The share, with its 95 % interval.
        low: Lower end.
        high: Upper end.
        of: Members.
        chance: The share told rightly by naming, in each run, the client that holds most.
    """

    setup: str
    view: str
    value: float
    low: float
    high: float
    of: int
    chance: float


@dataclass(frozen=True, kw_only=True)
class RiskRow:
    """How the risk of single members is in a stage, beside that in networks of single clients.

    Attributes:
        setup: As of an attack.
        stage: As of an attack.
        title: What tables call it.
        before: Mean risk of the members in a client's network (:func:`fedmerge.privacy.risk`).
        after: Mean risk in the networks of the stage.
        rises: Share of members whose risk is higher there, by chance too, with its 95 % interval.
        rises_low: Lower end.
        rises_high: Upper end.
        surely_rises: Share of those whose rise is beyond chance.
        surely_falls: Likewise of a fall.
        of: Members whose risk is known in both.
    """

    setup: str
    stage: str
    title: str
    before: float
    after: float
    rises: float
    rises_low: float
    rises_high: float
    surely_rises: float
    surely_falls: float
    of: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The ROC of one stage: shares of non-members and of members above falling thresholds."""

    setup: str
    stage: str
    title: str
    attack: str
    false: tuple[float, ...]
    true: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The contents of ``audit.json``.

    Attributes:
        sentence: The answer.
        shadows: Shadow federations of each run.
        seconds: What it took.
        rows: Every stage and attack.
        sources: Whose was it?
        risks: Whose risk rises? Every stage but single clients'.
        curves: Each stage, by the attack of the sentence.
        runs: Names of the runs that were attacked.
    """

    sentence: str
    shadows: int
    seconds: float
    rows: tuple[AttackRow, ...]
    sources: tuple[SourceRow, ...]
    curves: tuple[Curve, ...]
    runs: tuple[str, ...]
    risks: tuple[RiskRow, ...] = ()

    def table(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def to_json(self) -> str:
        """As text, readable and one line a row."""
        parts = asdict(self)
        return json.dumps(parts, indent=1) + "\n"


def read_audit(folder: Path) -> Audit | None:
    """What was found about the run or runs in ``folder``; None where nobody asked.

    Raises:
        RunDirectoryError: The file cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        given: Any = json.loads(read_text(file))
        return TypeAdapter(Audit).validate_python(given)
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise RunDirectoryError(f"{file} cannot be read ({first}); run `fedmerge audit {folder}` again") from error


def best(found: Iterable[AttackRow], setup: str, stage: str) -> AttackRow:
    """The attack that finds most in a stage, by area."""
    return max((row for row in found if (row.setup, row.stage) == (setup, stage)), key=lambda row: row.auc)
