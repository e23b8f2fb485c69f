"""Whose was it? The client of an image that is known to be a member."""

import numpy as np
import numpy.typing as npt

from fedmerge.errors import ConfigError
from fedmerge.privacy._rates import Rate, clopper_pearson
from fedmerge.privacy._seen import Vector

Clients = npt.NDArray[np.int64]


def source(confidence: Vector) -> Clients:
    """The client that each image is laid to: the one whose own network is surest of it.

    Hu, Salcic, Sun, Dobbie, Zhang, "Source Inference Attacks in Federated Learning", ICDM 2021, arXiv:2109.05659:
    whoever sees each client's network takes the one with the smallest loss. A merged network alone has no such order:
    it is the same for every candidate, so of its members it tells no more than their classes do (:func:`by_class`).

    Args:
        confidence: Float ``(clients, N)``, of the clients' own networks (:func:`fedmerge.privacy.confidence`).

    Returns:
        Int64 ``(N,)``.
    """
    surest: Clients = np.asarray(confidence).argmax(0)
    return surest


def by_class(labels: npt.ArrayLike, counts: npt.ArrayLike) -> Clients:
    """The client that each image is laid to by its class alone: the one that holds most images of it.

    Args:
        labels: Int64 ``(N,)``.
        counts: ``(clients, classes)``: how many images of each class a client holds.
    """
    most: Clients = np.asarray(counts)[:, np.asarray(labels)].argmax(0)
    return most


def source_rate(guessed: npt.ArrayLike, owners: npt.ArrayLike) -> Rate:
    """The share of members that were laid to their owner.

    Raises:
        ConfigError: There are no members, or guesses do not fit.

    Example:
        >>> from fedmerge.privacy import source_rate
        >>> source_rate([0, 1, 1, 2], [0, 1, 2, 2]).value
        0.75
    """
    named, true = np.asarray(guessed), np.asarray(owners)
    if named.shape != true.shape:
        raise ConfigError(f"guessed is {named.shape} and owners {true.shape}; expected one guess a member")
    right = named == true
    if not right.size:
        raise ConfigError("there is no member whose owner could be guessed")
    return clopper_pearson(int(right.sum()), right.size)
