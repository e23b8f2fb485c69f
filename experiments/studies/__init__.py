"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import (
    averaging,
    barrier,
    biased_split,
    counterexample,
    curves,
    different_widths,
    filter_size,
    lmc,
    merge_many,
    otfusion,
    private_split,
    pruning,
    secure_alignment,
    skill_transfer,
    surface,
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
    *lmc.STUDIES,
    averaging.STUDY,
    *barrier.STUDIES,
    surface.STUDY,
    curves.STUDY,
    biased_split.STUDY,
    counterexample.STUDY,
    *otfusion.STUDIES,
    skill_transfer.STUDY,
    different_widths.STUDY,
    pruning.STUDY,
    secure_alignment.STUDY,
)
