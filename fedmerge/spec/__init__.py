"""Permutation symmetries of networks: traced, printed, applied."""

from fedmerge.spec._spec import Factor, Frozen, PermSpec, permute
from fedmerge.spec._trace import perm_spec

__all__ = ["Factor", "Frozen", "PermSpec", "perm_spec", "permute"]
