"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import (
    averaging,
    biased_split,
    counterexample,
    different_widths,
    filter_size,
    merge_many,
    otfusion,
    private_split,
    pruning,
    skill_transfer,
    train_merge_train,
    weight_decay,
)
from experiments.studies.study import STUDIES

__all__ = ["STUDIES"]

STUDIES.add(
    filter_size.STUDY,
    weight_decay.STUDY,
    merge_many.STUDY,
    train_merge_train.STUDY,
    private_split.STUDY,
    biased_split.STUDY,
    otfusion.PAIRS,
    otfusion.MANY,
    skill_transfer.STUDY,
    different_widths.STUDY,
    pruning.STUDY,
    averaging.STUDY,
    counterexample.STUDY,
)
