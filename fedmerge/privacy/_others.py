"""What one client sees of the others in a merged network."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedmerge.align import align
from fedmerge.errors import ConfigError
from fedmerge.spec import PermSpec, permute


def others(
    merged: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    share: float,
    spec: PermSpec,
    rng: np.random.Generator,
    aligned: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    r"""The mean of the other clients' networks, as a client works it out: the merged network less its own.

    A plain mean :math:`m = \sum_i w_i P_i \theta_i` of networks brought into one order by permutations hides nothing
    from those who took part. A client knows its network and its share w, finds its own order P by aligning its network
    to the merged one, and has

    .. math:: \frac{m - w P \theta}{1 - w},

    the mean of the others, and with two clients the other's network itself, up to the order of its units, which changes
    no answer. This is the permutation-aware attack: without the alignment the difference of two networks in different
    orders is noise. What is done to the network after the mean (REPAIR, retraining) spoils it.

    Args:
        merged: The network that all receive.
        own: The attacker's own.
        share: The attacker's weight in the mean, in (0, 1).
        spec: The permutation symmetries.
        rng: For the alignment.
        aligned: Whether the merged network was made of aligned networks; a plain average needs no search.
        options: Of :func:`fedmerge.align`: ``method``, ``restarts`` ...

    Returns:
        A state dict. Integers are those of ``merged``.

    Raises:
        ConfigError: A share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; expected the attacker's weight in the mean, above 0 and below 1")
    mine = dict(own)
    if aligned:
        mine = permute(own, align(own, to=merged, spec=spec, rng=rng, **options).perms, spec=spec)
    return {
        name: (tensor - share * mine[name]) / (1 - share) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in merged.items()
    }
