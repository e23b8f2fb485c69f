"""fedmerge in anyone's own Flower app: the strategy, and how replies are read without trust.

``from fedmerge.flower import MergeMany`` instead of ``from flwr.serverapp.strategy import FedAvg``. This is the only
room of the library that imports Flower; ``import fedmerge`` does not import it.
"""

try:
    import flwr.serverapp  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flwr":
        raise
    raise ImportError("fedmerge.flower needs Flower, which is not installed: pip install 'flwr>=1.41,<1.43'") from None

from fedmerge.flower._merge_many import MergeMany

__all__ = ["MergeMany"]
