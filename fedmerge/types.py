"""What algorithms take and return."""

from collections.abc import Mapping

from torch import Tensor

Params = Mapping[str, Tensor]
"""A state dict: name -> tensor. Nothing that is passed in is modified."""

Perms = Mapping[str, Tensor]
"""Group of units -> permutation; ``perms[g][i] = j``: unit i of the result is unit j of the source."""
