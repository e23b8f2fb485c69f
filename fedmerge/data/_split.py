"""The images of a run by purpose: public, val and test at the server, a private partition per client."""

from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np
import torch

from fedmerge._arguments import check_arguments, checked
from fedmerge.data._images import Dataset, Images, IndexArray
from fedmerge.data._partition import check_count
from fedmerge.data._partition import partition as deal
from fedmerge.errors import PartitionError


@dataclass(frozen=True, eq=False)
class Split:
    """Which image serves which purpose: ascending indices into the pool; no image of it has two purposes.

    The pool is ``dataset.train`` followed by ``dataset.test`` where the data set has one. Nothing is copied
    until images are asked for, and a client asks for its own only.

    Attributes:
        dataset: Where the images are.
        public: What the server may retrain, recompute statistics and distil on.
        val: What hyper-parameters are chosen on.
        test: What results are reported on.
        clients: The private partition of each client.
        unlabelled: Those of ``public`` whose labels the server does not know.

    Example:
        >>> digits = fm.data.load("digits")
        >>> shares = fm.data.split(digits, clients=3, rng=np.random.default_rng(0))
        >>> len(shares.public_images) + len(shares.val_images) + len(shares.test_images) + sum(map(len, shares.clients))
        1797
    """

    dataset: Dataset
    public: IndexArray
    val: IndexArray
    test: IndexArray
    clients: tuple[IndexArray, ...]
    unlabelled: IndexArray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def public_images(self) -> Images:
        """The public images, copied into memory; the label of one without is -1."""
        images = self._take(self.public, "public")
        images.labels[torch.from_numpy(np.isin(self.public, self.unlabelled))] = -1
        return images

    @property
    def val_images(self) -> Images:
        """The validation images, copied into memory."""
        return self._take(self.val, "val")

    @property
    def test_images(self) -> Images:
        """The test images; the data set's own test part as it is, where there is one."""
        return self._take(self.test, "test") if self.dataset.test is None else self.dataset.test

    @checked
    def client(self, index: int) -> Images:
        """The private images of one client (from 0), copied into memory."""
        if not 0 <= index < len(self.clients):
            raise PartitionError(f"client {index} asked for; there are clients 0 to {len(self.clients) - 1}")
        return self._take(self.clients[index], f"client {index}")

    def _take(self, indices: IndexArray, purpose: str) -> Images:
        return replace(self.dataset.train.select(indices), name=f"{self.dataset.name} ({purpose})")


def split(
    dataset: Dataset,
    *,
    clients: int,
    rng: np.random.Generator,
    partition: str = "iid",
    partition_alpha: float = 0.5,
    per_client: int = 2,
    client_images: int = 0,
    public_fraction: float = 0.1,
    val_fraction: float = 0.05,
    test_fraction: float = 0.2,
    public_labels: int = 0,
) -> Split:
    """Give every image of ``dataset`` one purpose, or with ``client_images`` at most one.

    The data set's own test part is the test split. Where it has none, ``test_fraction`` of its images are cut
    out first. What is left is the training pool: ``public_fraction`` and ``val_fraction`` of it go to the
    server, the rest is dealt to the clients. Test, public and val are stratified by class, as are the public images
    that keep their labels. They are drawn before the partition or from a stream of their own, so with the same ``rng``
    seed they are the same for every partition and any number of clients.

    Args:
        dataset: What to split.
        clients: Number of private partitions.
        rng: The source of all draws.
        partition: One of :func:`fedmerge.data.partitions`.
        partition_alpha: See :func:`fedmerge.data.partition`.
        per_client: See :func:`fedmerge.data.partition`.
        client_images: How many images a client holds on average, so that more clients do not mean less for each; the
            rest of the pool then serves nobody. 0 deals all images.
        public_fraction: Of the training pool, in [0, 1).
        val_fraction: Of the training pool, in [0, 1).
        test_fraction: Of all images, in (0, 1); used only where the data set has no test part.
        public_labels: How many of the public images keep their labels; 0 for all of them.

    Raises:
        UnknownNameError: No partition has this name.
        PartitionError: The split cannot be made with these numbers.
        DataError: A label that is no class.
        ConfigError: ``dataset`` is no data set, or ``rng`` no generator.

    Example:
        >>> digits = fm.data.load("digits")
        >>> rng = np.random.default_rng(0)
        >>> shares = fm.data.split(digits, clients=3, rng=rng, partition="dirichlet", partition_alpha=0.3)
        >>> bool(set(shares.client(0).labels.tolist()) <= set(range(10)))
        True
    """
    check_arguments(split, {"dataset": dataset, "rng": rng})
    check_count("clients", clients, 1)
    check_count("client_images", client_images, 0)
    for part in (dataset.train, dataset.test):
        if part is not None:
            part.check_labels()
    labels = dataset.train.labels.cpu().numpy()
    pool = np.arange(len(labels), dtype=np.int64)
    if dataset.test is not None:
        test = np.arange(len(labels), len(labels) + len(dataset.test), dtype=np.int64)
    else:
        count = _count("test_fraction", test_fraction, len(pool))
        if not count:
            raise PartitionError(f"test_fraction is 0 and {dataset.name} has no test set; give a fraction above 0")
        test, pool = _stratified(labels, pool, count, rng)
    wanted = {
        "public_fraction": _count("public_fraction", public_fraction, len(pool)),
        "val_fraction": _count("val_fraction", val_fraction, len(pool)),
    }
    left = len(pool) - sum(wanted.values())
    if left < max(clients, 1):
        raise PartitionError(
            f"public_fraction {public_fraction} and val_fraction {val_fraction} leave {max(left, 0)} of "
            f"{len(pool)} images for {clients} clients; lower them or ask for fewer clients"
        )
    public, pool = _stratified(labels, pool, wanted["public_fraction"], rng)
    val, pool = _stratified(labels, pool, wanted["val_fraction"], rng)
    if client_images:
        if not 0 < clients * client_images <= len(pool):
            raise PartitionError(
                f"client_images is {client_images}: {clients} clients would hold {clients * client_images} images, and "
                f"there are {len(pool)} for them; give at most {len(pool) // clients}, or 0 for all"
            )
        pool, _ = _stratified(labels, pool, clients * client_images, rng)
    dealt = deal(
        labels[pool],
        clients=clients,
        rng=rng,
        name=partition,
        partition_alpha=partition_alpha,
        per_client=per_client,
    )
    check_count("public_labels", public_labels, 0)
    if public_labels > len(public):
        raise PartitionError(
            f"public_labels is {public_labels}, and there are {len(public)} public images; give at most as many, 0 for "
            "all, or a larger public_fraction"
        )
    kept = _stratified(labels, public, public_labels, rng.spawn(1)[0])[0] if public_labels else public
    return Split(dataset, public, val, test, tuple(pool[p] for p in dealt), np.setdiff1d(public, kept))


@checked
def label_counts(split: Split) -> dict[str, list[int]]:
    """Holder (``"public"``, ``"val"``, ``"test"``, ``"client 0"`` ...) -> its number of images per class.

    Example:
        >>> shares = fm.data.split(fm.data.load("digits"), clients=2, rng=np.random.default_rng(0))
        >>> list(fm.data.label_counts(shares))
        ['public', 'val', 'test', 'client 0', 'client 1']
    """
    train, test = split.dataset.train, split.dataset.test
    labels = train.labels.numpy() if test is None else np.concatenate([train.labels, test.labels])
    holders = {"public": split.public, "val": split.val, "test": split.test}
    holders |= {f"client {index}": held for index, held in enumerate(split.clients)}
    classes = len(train.classes)
    return {name: np.bincount(labels[held], minlength=classes).tolist() for name, held in holders.items()}


def _count(name: str, fraction: float, total: int) -> int:
    """``fraction`` of ``total`` images, rounded; a fraction above 0 that rounds to none is an error."""
    if not isinstance(fraction, Real) or not 0 <= fraction < 1:
        raise PartitionError(f"{name} is {fraction}; a number from 0 up to but not including 1 is needed")
    count = round(fraction * total)
    if fraction and not count:
        enough = f" or at least {1 / total:.2g}" if total else ""
        raise PartitionError(f"{name} {fraction} of {total} images is none; give 0{enough}")
    return count


def _stratified(
    labels: IndexArray, pool: IndexArray, count: int, rng: np.random.Generator
) -> tuple[IndexArray, IndexArray]:
    """Draw ``count`` of ``pool``, each class in proportion (largest remainders first): (drawn, left)."""
    shuffled = rng.permutation(pool)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, sizes = np.unique(labels[pool], return_counts=True)
    exact = sizes * (count / max(len(pool), 1))
    take = np.floor(exact).astype(np.int64)
    take[np.argsort(take - exact, kind="stable")[: count - take.sum()]] += 1
    rank = np.arange(len(pool)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn = rank < np.repeat(take, sizes)
    return np.sort(by_class[drawn]), np.sort(by_class[~drawn])
