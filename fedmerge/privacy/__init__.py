"""What a network tells of the images that it was trained on: attacks, what they achieve, and what that proves.

Attacks on membership take losses and logits and give scores; inversions take networks and give images.
"""

from fedmerge.privacy._attacks import ATTACKS, Attack, attacks, lira, loss_threshold, rmia
from fedmerge.privacy._drawing import Reconstruction
from fedmerge.privacy._inversion import OBJECTIVES, invert_update
from fedmerge.privacy._labels import recover_labels
from fedmerge.privacy._model_inversion import invert_model
from fedmerge.privacy._one_run import OneRun, audited_epsilon, one_run
from fedmerge.privacy._others import others
from fedmerge.privacy._quality import Quality, quality
from fedmerge.privacy._rates import FPRS, Rate, Rates, clopper_pearson, rates
from fedmerge.privacy._risk import RiskChange, risk, risk_change
from fedmerge.privacy._seen import Flags, Labels, Seen, Vector, confidence
from fedmerge.privacy._source import by_class, source, source_rate

__all__ = [
    "ATTACKS",
    "FPRS",
    "OBJECTIVES",
    "Attack",
    "Flags",
    "Labels",
    "OneRun",
    "Quality",
    "Rate",
    "Rates",
    "Reconstruction",
    "RiskChange",
    "Seen",
    "Vector",
    "attacks",
    "audited_epsilon",
    "by_class",
    "clopper_pearson",
    "confidence",
    "invert_model",
    "invert_update",
    "lira",
    "loss_threshold",
    "one_run",
    "others",
    "quality",
    "rates",
    "recover_labels",
    "risk",
    "risk_change",
    "rmia",
    "source",
    "source_rate",
]
