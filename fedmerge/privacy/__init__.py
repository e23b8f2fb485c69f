"""What a network tells of the images that it was trained on: attacks, what they achieve, and what that proves.

Losses and logits in, scores out; nothing is trained here.
"""

from fedmerge.privacy._attacks import ATTACKS, Attack, attacks, lira, loss_threshold, rmia
from fedmerge.privacy._one_run import OneRun, audited_epsilon, one_run
from fedmerge.privacy._others import others
from fedmerge.privacy._rates import FPRS, Rate, Rates, clopper_pearson, rates
from fedmerge.privacy._seen import Flags, Seen, Vector, confidence
from fedmerge.privacy._source import by_class, source, source_rate

__all__ = [
    "ATTACKS",
    "FPRS",
    "Attack",
    "Flags",
    "OneRun",
    "Rate",
    "Rates",
    "Seen",
    "Vector",
    "attacks",
    "audited_epsilon",
    "by_class",
    "clopper_pearson",
    "confidence",
    "lira",
    "loss_threshold",
    "one_run",
    "others",
    "rates",
    "rmia",
    "source",
    "source_rate",
]
