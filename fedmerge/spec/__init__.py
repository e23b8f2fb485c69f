"""Permutation symmetries of networks: traced, printed, applied."""

from fedmerge.spec.axes import Factor, Frozen, PermSpec, permute
from fedmerge.spec.trace import perm_spec

__all__ = ["Factor", "Frozen", "PermSpec", "perm_spec", "permute"]
