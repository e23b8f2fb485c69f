"""What ``import fedmerge as fm`` offers; imported when the first of these names is asked for."""

from fedmerge import data, models
from fedmerge.adversarial import PGD, attacked
from fedmerge.align import Alignment, align, aligners
from fedmerge.checkpoints import open_params
from fedmerge.comparison import Agreement, Distance, Plane, agreement, distance, plane
from fedmerge.connectivity import Barrier, Curve, barrier, interpolate
from fedmerge.curves import LearnedCurve, Subspace, curve, subspace
from fedmerge.dp_sgd import DPSGD
from fedmerge.errors import FedmergeError
from fedmerge.folding import Folding, fold_norms
from fedmerge.heads import Head, HeadSums, analytic_head, best_head, head_sums
from fedmerge.merge import Merge, average, merge, merge_many, mergers, papa, running_average, running_averages
from fedmerge.normalisation import repair, repairs
from fedmerge.progress import progress
from fedmerge.registry import register
from fedmerge.spec import PermSpec, perm_spec, permute
from fedmerge.stacking import Stack, stack
from fedmerge.training import evaluate, predict, train

__all__: list[str] = [
    "DPSGD",
    "PGD",
    "Agreement",
    "Alignment",
    "Barrier",
    "Curve",
    "Distance",
    "FedmergeError",
    "Folding",
    "Head",
    "HeadSums",
    "LearnedCurve",
    "Merge",
    "PermSpec",
    "Plane",
    "Stack",
    "Subspace",
    "agreement",
    "align",
    "aligners",
    "analytic_head",
    "attacked",
    "average",
    "barrier",
    "best_head",
    "curve",
    "data",
    "distance",
    "evaluate",
    "fold_norms",
    "head_sums",
    "interpolate",
    "merge",
    "merge_many",
    "mergers",
    "models",
    "open_params",
    "papa",
    "perm_spec",
    "permute",
    "plane",
    "predict",
    "progress",
    "register",
    "repair",
    "repairs",
    "running_average",
    "running_averages",
    "stack",
    "subspace",
    "train",
]
