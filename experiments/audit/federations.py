"""Shadow federations: a run's configuration, carried out in this process on other draws of the same images.

Nobody can tell from one run whether an image made a difference. So the run's own procedure (local training, rounds,
merging, repair, retraining) is repeated on other draws from a pool that holds the images of its clients and as many
that nobody trained on. The clients of a shadow are clients beyond those of the run: the same streams with further
numbers, and the images that its draw deals them. Who is in is drawn for each federation by itself, so that membership
in one says nothing about another, and each may be the target of all others.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedmerge.data import Images, Split, partition
from fedmerge.errors import ConfigError, DataError, SpecError
from fedmerge.heads import best_head, head_sums
from fedmerge.merge import MERGERS, average
from fedmerge.pipeline import Params, align_merge_retrain, retrain_on_public, retrained
from fedmerge.streams import numpy_stream
from server import Callback, RunConfig, World
from strategies import STRATEGIES, ClientResult, FedAvgRetrain, MergeMany

Indices = npt.NDArray[np.int64]
OnStage = Callable[[str, Params], None]


TESTED = 500
"""Test images on which accuracies are measured: of many networks, so a few images will do."""


class Arena:
    """The images that an attack is about, who holds them in each federation, and the server around them.

    Attributes:
        config: The configuration that every federation carries out.
        world: The server: network, public and validation images.
        members: What the run's clients hold.
        outsiders: As many images that they do not, as far as there are: those that the split leaves to nobody, then
            test images.
        audited: Of both, the images whose membership is asked for.
    """

    def __init__(self, config: RunConfig, *, images: int = 0) -> None:
        self.config, self.world = config, World(config, Callback())
        split, rng = self.world.split, numpy_stream(config.seed, "audit-images")
        self.members: Indices = np.sort(np.concatenate(split.clients))
        self.outsiders = _outsiders(split, len(self.members), rng)
        self.pool = np.concatenate([self.members, self.outsiders])
        some = rng.choice(self.pool, images, replace=False) if 0 < images < len(self.pool) else self.pool
        self.audited: Indices = np.sort(some)

    @cached_property
    def images(self) -> Images:
        """The audited images."""
        return taken(self.world.split, self.audited)

    @property
    def labels(self) -> Indices:
        """Their classes."""
        found: Indices = self.images.labels.numpy()
        return found

    @cached_property
    def test(self) -> Images:
        """Test images, for accuracies."""
        return self.world.split.test_images.first(TESTED)

    def dealt(self, federation: int) -> tuple[Indices, ...]:
        """What each client of the shadow ``federation`` (from 0) holds: as many images in all as the run's clients."""
        c, split = self.config, self.world.split
        rng = numpy_stream(c.seed, "shadow", federation)
        held = np.sort(rng.choice(self.pool, len(self.members), replace=False))
        parts = partition(
            labels_of(split)[held], clients=c.clients, rng=rng, name=c.partition, partition_alpha=c.partition_alpha
        )
        return tuple(held[part] for part in parts)

    def first_client(self, federation: int) -> int:
        """The number of the first client of a shadow; the run's own come before all."""
        return self.config.clients * (federation + 1)


def taken(split: Split, indices: Indices) -> Images:
    """Images of the pool of ``split`` at ``indices``, which ascend."""
    size = len(split.dataset.train)
    chosen = split.dataset.train.select(indices[indices < size])
    if split.dataset.test is None or int(indices.max()) < size:
        return chosen
    return chosen.joined(split.dataset.test.select(indices[indices >= size] - size))


def labels_of(split: Split) -> Indices:
    """The label of each image of the pool."""
    parts = [part.labels.numpy() for part in (split.dataset.train, split.dataset.test) if part is not None]
    return np.concatenate(parts)


def _outsiders(split: Split, wanted: int, rng: np.random.Generator) -> Indices:
    used = np.concatenate([split.public, split.val, split.test, *split.clients])
    unused = np.setdiff1d(np.arange(len(split.dataset.train)), used)
    unused = rng.permutation(unused)[:wanted]
    return np.sort(np.concatenate([unused, rng.permutation(split.test)[: wanted - len(unused)]]))


def local(
    arena: Arena, first: int, client: int, held: Indices, params: Params, *, server_round: int = 1
) -> ClientResult:
    """A client of a federation after its local training of one round.

    Args:
        arena: Whose configuration.
        first: Number of the federation's first client, which with ``client`` names its streams.
        client: Which client of the federation.
        held: Its images.
        params: The global network, where it begins unless it has one of its own.
        server_round: Which round.
    """
    task = replace(arena.config.client_task(), server_round=server_round)
    images = taken(arena.world.split, held)
    found, examples = task.train(first + client, params, images=images)
    return ClientResult(client, found.params, examples, label_counts=tuple(images.counts()))


def start(world: World) -> Params:
    """The network that a federation's first round begins from, as a run makes it."""
    params: Params = world.model.state_dict()
    if epochs := world.config.pretrain_passes():
        bench = replace(world.bench, retrain_epochs=epochs)
        params = retrain_on_public(params, (), bench=bench, how="labels", server_round=0)
    return params


def check(config: RunConfig) -> None:
    """Refuse a run that cannot be carried out here again.

    Raises:
        ConfigError: Says what of it, and what can.
    """
    known = [name for name, entry in STRATEGIES.items() if name in _MEANS or entry.make in _PIPELINES]
    if config.strategy not in known:
        raise ConfigError(
            f"strategy {config.strategy} keeps more from round to round than networks, so shadows of it cannot be "
            f"trained here; an audit takes {', '.join(known)}"
        )
    if config.fraction_train < 1:
        raise ConfigError(
            f"fraction-train = {config.fraction_train:g}: in each round others took part, and a run does not keep who "
            "was ever in; an audit needs fraction-train = 1"
        )
    if config.hand_out != "last":
        raise ConfigError(
            f"hand-out = {config.hand_out!r}: each federation would hand out the network of another stage or round; an "
            "audit attacks the same one of all and needs hand-out = 'last'"
        )
    if config.secure:
        raise ConfigError(
            "secure = true: the server saw no client's network, and neither can an audit; audit the same run with "
            "secure = false"
        )
    merger = config.pipeline().merger
    if config.rounds > 1 and "base" in MERGERS[merger].needs:
        raise ConfigError(
            f"merger {merger} adds up steps from the global network of the round before, which a run of several rounds "
            "does not keep; an audit needs rounds = 1, or another merger"
        )


_MEANS = frozenset({"fedavg", "fedprox"})
_PIPELINES = (MergeMany, FedAvgRetrain)


def aggregated(
    world: World, sent: Params, results: Sequence[ClientResult], server_round: int, on_stage: OnStage
) -> Params:
    """What the server makes of its clients in one round: the stages of the run's strategy, each told."""
    c, make = world.config, STRATEGIES[world.config.strategy].make
    if make is MergeMany:
        return align_merge_retrain(
            results, bench=world.bench, pipeline=world.pipeline, server_round=server_round, base=sent,
            on_stage=lambda _, stage, params: on_stage(stage, params),
        ).params  # fmt: skip
    params = average([r.params for r in results], [float(r.examples) for r in results])
    on_stage("aggregated", params)
    if c.strategy not in _MEANS and world.pipeline.retrain != "none":
        params, _ = retrained(results, params, bench=world.bench, pipeline=world.pipeline, server_round=server_round)
        on_stage("retrained", params)
    return params


def headed(world: World, params: Params, held: Sequence[Indices]) -> Params:
    """``params`` with the head that a run gives its network, from sums over the images of all clients."""
    try:
        sums = [head_sums(world.model, params, taken(world.split, part), device=world.device) for part in held]
    except (SpecError, DataError):
        return params
    return best_head(world.model, params, sum(sums[1:], sums[0]), world.split.val_images, device=world.device).params
