"""Who holds which images: partitions of a training pool between clients.

Every partitioner takes the labels of the pool and returns, for each client, positions into it. Every position
is given to exactly one client, and no client is left without images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from fedmerge._arguments import check_arguments
from fedmerge.data._images import IndexArray
from fedmerge.errors import PartitionError
from fedmerge.registry import Entry, Registry

_MIN_IMAGES = 10  # NIID-Bench draws again while a client holds fewer
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class Partition(Entry):
    """A partition: ``make(labels, clients, rng, **needs)`` deals the positions ``0 .. n - 1`` to ``clients``.

    It is given labels ``(n,)``, and what it needs as keywords; it returns the positions of each client's images.

    Example:
        >>> fm.data.PARTITIONS["dirichlet"].title
        'dirichlet'
    """

    make: Callable[..., list[IndexArray]]

    can_need = frozenset({"partition_alpha", "per_client"})
    called = ("labels clients rng", "")


PARTITIONS: Registry[Partition] = Registry("partition", Partition, "partitions")
"""The partitions; filled at the end of this file."""


def partitions() -> tuple[str, ...]:
    """Names of the partitions.

    Example:
        >>> "dirichlet" in fm.data.partitions()
        True
    """
    return tuple(PARTITIONS)


def partition_summaries() -> dict[str, str]:
    """Partition name -> one line about it.

    Example:
        >>> sorted(fm.data.partition_summaries()) == sorted(fm.data.partitions())
        True
    """
    return PARTITIONS.summaries()


def partition(
    labels: npt.ArrayLike,
    *,
    clients: int,
    rng: np.random.Generator,
    name: str = "iid",
    partition_alpha: float = 0.5,
    per_client: int = 2,
) -> tuple[IndexArray, ...]:
    """Deal the images with these ``labels`` to ``clients``.

    Args:
        labels: Integers ``(n,)``.
        clients: How many clients there are.
        rng: The source of all draws.
        name: One of :func:`partitions`, or ``module:function`` of your own.
        partition_alpha: Concentration of ``dirichlet``: small is skewed, large is even. Others ignore it.
        per_client: Shards of a client (``shards``) or classes of a client (``classes``). Others ignore it.

    Returns:
        For each client an ascending int64 array of positions; together they hold ``0 .. n - 1`` once each.

    Raises:
        UnknownNameError: No partition has this name.
        PartitionError: It cannot be made with these numbers; says what was given and what is possible.
        ConfigError: ``rng`` is no generator.

    Example:
        >>> parts = fm.data.partition([0] * 6 + [1] * 6, clients=3, rng=np.random.default_rng(0), name="iid")
        >>> [len(part) for part in parts], sorted(int(i) for part in parts for i in part) == list(range(12))
        ([4, 4, 4], True)
    """
    check_arguments(partition, {"rng": rng})
    entry = PARTITIONS[name]
    check_count("clients", clients, 1)
    check_count("per_client", per_client, 0)
    try:
        held = np.asarray(labels)
    except ValueError as error:  # lists of different lengths
        raise PartitionError(f"labels are no array ({error}); expected integers (n,)") from error
    if held.ndim != 1 or (held.size and held.dtype.kind not in "iu"):
        raise PartitionError(f"labels are {held.dtype} {held.shape}; expected integers (n,)")
    held = held.astype(np.int64)
    if clients > len(held):
        raise PartitionError(f"{clients} clients cannot share {len(held)} images; at most {len(held)} can")
    supplies = {"partition_alpha": partition_alpha, "per_client": per_client}
    dealt = entry.make(held, clients, rng, **{option: supplies[option] for option in entry.needs})
    try:
        parts = [np.sort(np.asarray(part, dtype=np.int64)) for part in dealt]
        whole = len(parts) == clients and np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(held)))
    except (TypeError, ValueError):  # no lists of positions
        whole = False
    if not whole:
        raise PartitionError(
            f"partition {name!r} must return {clients} lists that together hold each position from 0 to "
            f"{len(held) - 1} once; it returned something else"
        )
    if empty := [str(client) for client, part in enumerate(parts) if not len(part)]:
        raise PartitionError(
            f"partition {name!r} of {len(held)} images leaves client {', '.join(empty)} of {clients} without "
            "images; ask for fewer clients"
        )
    return tuple(parts)


def check_count(name: str, given: object, least: int) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        PartitionError: Names what was given.
    """
    if not isinstance(given, Integral) or isinstance(given, bool) or given < least:
        raise PartitionError(f"{name} is {given!r}; a whole number of at least {least} is needed")


def _iid(labels: IndexArray, clients: int, rng: np.random.Generator) -> list[IndexArray]:
    return np.array_split(rng.permutation(len(labels)), clients)


def _dirichlet(
    labels: IndexArray, clients: int, rng: np.random.Generator, *, partition_alpha: float
) -> list[IndexArray]:
    r"""For each class, shares :math:`p \sim \mathrm{Dir}(\alpha, ..., \alpha)` over the clients.

    As in NIID-Bench (Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022,
    arXiv:2102.02079): a client that already holds its equal part n / clients gets no more of the classes that
    follow, and the draw is repeated until every client holds at least 10 images (or half its equal part,
    where that is less). The Dirichlet prior is that of Hsu et al., "Measuring the Effects of Non-Identical
    Data Distribution for Federated Visual Classification", 2019, arXiv:1909.06335, who draw the classes of
    each client rather than the clients of each class. At most 1,000 draws are made.
    """
    if not isinstance(partition_alpha, Real) or not partition_alpha > 0 or not np.isfinite(partition_alpha):
        raise PartitionError(f"partition_alpha is {partition_alpha}; a positive, finite number is needed")
    concentration = np.full(clients, np.clip(float(partition_alpha), 1e-100, 1e100))  # numpy's draws end beyond
    equal = len(labels) / clients
    enough = min(_MIN_IMAGES, max(1, int(equal / 2)))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    least = 0
    for _ in range(_MAX_DRAWS):
        cuts = []
        held = np.zeros(clients, dtype=np.int64)
        for positions in members:
            share = rng.dirichlet(concentration) * (held < equal)
            if not share.sum() > 0:  # all of a very skewed draw fell to clients that have their part
                share = np.zeros(clients)
                share[rng.choice(np.flatnonzero(held < equal))] = 1
            ends = np.floor(np.cumsum(share / share.sum())[:-1] * len(positions)).astype(np.int64)
            cuts.append(ends)
            held += np.diff(ends, prepend=0, append=len(positions))
        least = max(least, int(held.min()))
        if held.min() >= enough:
            break
    else:
        raise PartitionError(
            f"partition_alpha {partition_alpha} left one of {clients} clients with at most {least} of {len(labels)} "
            f"images in each of {_MAX_DRAWS} draws, and {enough} are needed; raise partition_alpha or "
            "ask for fewer clients"
        )
    dealt = [np.split(rng.permutation(positions), ends) for positions, ends in zip(members, cuts, strict=True)]
    return [np.concatenate(pieces) for pieces in zip(*dealt, strict=True)]


def _shards(labels: IndexArray, clients: int, rng: np.random.Generator, *, per_client: int) -> list[IndexArray]:
    """The pathological non-IID partition, with ``per_client`` = 2 shards for each client.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    arXiv:1602.05629, section 3. Images of one class are shuffled before the cut.
    """
    count = clients * per_client
    if per_client < 1 or count > len(labels):
        raise PartitionError(
            f"{clients} clients with {per_client} shards each need {count} shards of {len(labels)} images; "
            f"between 1 and {len(labels)} shards are possible"
        )
    order = rng.permutation(len(labels))
    pieces = np.array_split(order[np.argsort(labels[order], kind="stable")], count)
    dealt = rng.permutation(count).reshape(clients, per_client)
    return [np.concatenate([pieces[shard] for shard in mine]) for mine in dealt]


def _classes(labels: IndexArray, clients: int, rng: np.random.Generator, *, per_client: int) -> list[IndexArray]:
    """NIID-Bench's #C=k (Li et al., ICDE 2022, arXiv:2102.02079, section 4.1) with k = ``per_client``.

    Client i holds class i modulo the number of classes and k - 1 others, and the holders of a class share its
    images equally. Where the source would leave a class without a holder and drop its images, classes without
    a holder are taken first.
    """
    present = np.unique(labels)
    if not 1 <= per_client <= len(present):
        raise PartitionError(f"{per_client} classes per client; between 1 and {len(present)} are possible")
    if clients * per_client < len(present):
        raise PartitionError(
            f"{clients} clients with {per_client} classes each cannot hold all {len(present)} classes; "
            f"at least {-(-len(present) // per_client)} clients are needed"
        )
    holds = np.zeros((clients, len(present)), dtype=bool)
    holds[np.arange(clients), np.arange(clients) % len(present)] = True
    for _ in range(per_client - 1):
        for client in range(clients):
            lacking = ~holds[client]
            unheld = lacking & ~holds.any(axis=0)
            holds[client, rng.choice(np.flatnonzero(unheld if unheld.any() else lacking))] = True
    parts: list[list[IndexArray]] = [[] for _ in range(clients)]
    for column, label in enumerate(present):
        holders = np.flatnonzero(holds[:, column])
        pieces = np.array_split(rng.permutation(np.flatnonzero(labels == label)), len(holders))
        for holder, piece in zip(holders, pieces, strict=True):
            parts[holder].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


PARTITIONS.add(
    Partition("iid", _iid, "images dealt at random, equally many to each client"),
    Partition(
        "dirichlet",
        _dirichlet,
        "each class shared out by a Dirichlet draw (partition-alpha; small is skewed)",
        needs=frozenset({"partition_alpha"}),
    ),
    Partition(
        "shards",
        _shards,
        "images sorted by class and cut; each client gets two pieces (McMahan 2017)",
        needs=frozenset({"per_client"}),
    ),
    Partition(
        "classes", _classes, "each client holds two classes only (NIID-Bench's #C=2)", needs=frozenset({"per_client"})
    ),
)
