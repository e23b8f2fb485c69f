"""Studies: experiments by name, each a configuration and the rows that answer its question. One file a study."""

from experiments.studies import (
    averaging,
    barrier,
    biased_split,
    counterexample,
    curves,
    different_widths,
    filter_size,
    inversion,
    leakage,
    lmc,
    merge_many,
    otfusion,
    pays,
    private_split,
    pruning,
    secure_alignment,
    skill_transfer,
    surface,
    symmetries,
    train_merge_train,
    weight_decay,
)
from experiments.studies.study import STUDIES

__all__ = ["STUDIES"]

STUDIES.add(
    pays.STUDY,
    filter_size.STUDY,
    weight_decay.STUDY,
    merge_many.STUDY,
    train_merge_train.STUDY,
    private_split.STUDY,
    biased_split.STUDY,
    *lmc.STUDIES,
    *barrier.STUDIES,
    counterexample.STUDY,
    symmetries.STUDY,
    surface.STUDY,
    curves.STUDY,
    *otfusion.STUDIES,
    skill_transfer.STUDY,
    different_widths.STUDY,
    pruning.STUDY,
    averaging.STUDY,
    *leakage.STUDIES,
    secure_alignment.STUDY,
    inversion.STUDY,
)
