"""fedmerge: align, merge, repair and compare networks trained on private data.

``import fedmerge as fm`` needs neither Flower nor Ray. State dicts go in and come out; nothing that is
passed in is modified.
"""

from importlib.metadata import PackageNotFoundError, version

from fedmerge import data, models
from fedmerge.align import Alignment, align, aligners
from fedmerge.checkpoints import open_params
from fedmerge.connectivity import Barrier, Curve, barrier, interpolate
from fedmerge.errors import FedmergeError
from fedmerge.folding import Folding, fold_norms
from fedmerge.merge import Merge, average, merge, merge_many, mergers, papa, running_average, running_averages
from fedmerge.normalisation import repair, repairs
from fedmerge.registry import register
from fedmerge.spec import PermSpec, perm_spec, permute
from fedmerge.training import evaluate, predict, train

try:
    __version__ = version("fedmerge")
except PackageNotFoundError:  # the source on a path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Alignment",
    "Barrier",
    "Curve",
    "FedmergeError",
    "Folding",
    "Merge",
    "PermSpec",
    "__version__",
    "align",
    "aligners",
    "average",
    "barrier",
    "data",
    "evaluate",
    "fold_norms",
    "interpolate",
    "merge",
    "merge_many",
    "mergers",
    "models",
    "open_params",
    "papa",
    "perm_spec",
    "permute",
    "predict",
    "register",
    "repair",
    "repairs",
    "running_average",
    "running_averages",
    "train",
]
