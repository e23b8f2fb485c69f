"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import (
    barrier,
    counterexample,
    curves,
    leakage,
    lmc,
    pays,
    secure_alignment,
    surface,
    symmetries,
)
from experiments.studies.study import STUDIES

__all__ = ["STUDIES"]

STUDIES.add(
    counterexample.STUDY, symmetries.STUDY, *lmc.STUDIES, *barrier.STUDIES, surface.STUDY, curves.STUDY,
    pays.STUDY, *leakage.STUDIES, secure_alignment.STUDY,
)  # fmt: skip
