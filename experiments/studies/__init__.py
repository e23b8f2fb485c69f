"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import counterexample, pays
from experiments.studies.study import STUDIES

__all__ = ["STUDIES"]

STUDIES.add(counterexample.STUDY, pays.STUDY)
