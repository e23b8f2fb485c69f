"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import barrier, counterexample, curves, lmc, pays, secure_alignment, surface
from experiments.studies.study import STUDIES

__all__ = ["STUDIES"]

STUDIES.add(
    counterexample.STUDY, *lmc.STUDIES, *barrier.STUDIES, surface.STUDY, curves.STUDY, secure_alignment.STUDY,
    pays.STUDY,
)  # fmt: skip
