"""What a server tells a client, and what both must agree on: plain records, no Flower.

A task travels in every message, so a client keeps nothing between rounds and any process can serve any
client. Keys of the flat form are the configuration keys (dashes).
"""

import hashlib
import math
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedmerge import data, models
from fedmerge._loading import beside_tensors, laid_aside
from fedmerge._optimizer import reach
from fedmerge._tree import tensors
from fedmerge.dp_sgd import DPSGD, check_delta
from fedmerge.errors import ConfigError, DataError
from fedmerge.freezing import frozen_weights
from fedmerge.heads import HeadSums, head_sums
from fedmerge.spec import PermSpec, perm_spec
from fedmerge.streams import numpy_stream, stream_seed, torch_stream
from fedmerge.training import Training, train

ARRAYS, CONFIG, METRICS, CORRECTION = "arrays", "config", "metrics", "correction"
"""Keys of the records in a message; a correction of the client's gradients is sent by some strategies only."""

CLIENT, EXAMPLES, REACH, LABEL_COUNTS = "client", "num-examples", "reach", "label-counts"
"""Keys of a client's metrics: its partition id, the number of its images, how far its steps reach
(:class:`fedmerge.training.Training`), and how many of its images are of each class, if it was asked."""

HEAD_SUMS = "head_sums"
"""The query for the sums of which the last layer of the network sent is made (:class:`fedmerge.heads.HeadSums`)."""

Scalar = str | int | float | bool

_WARM: set[tuple[Any, ...]] = set()
"""What this process has trained already."""

_TRACED: dict[tuple[Any, ...], PermSpec] = {}
"""The symmetries of the networks of fedmerge's own that this process has traced."""


@dataclass(frozen=True)
class Setup:
    """What server and clients must agree on: who holds which images, which network, which initialisation."""

    dataset: str = "digits"
    clients: int = 5
    partition: str = "iid"
    partition_alpha: float = 0.5
    client_images: int = 0
    public_fraction: float = 0.1
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    public_labels: int = 0
    model: str = "mlp"
    width: float = 0
    kernel_size: int = 0
    init: str = "independent"
    seed: int = 0

    def split(self) -> data.Split:
        """The data set cut into public, val, test and clients: a function of this record alone."""
        return _split(*self._cut())

    def digest(self) -> str:
        """What says that two nodes have one data set: a digest of classes and labels, the mean of some public inputs.

        There is none of the inputs, which two versions of a decoder may give otherwise in their last digit.
        """
        return _digest(*self._cut())

    def _cut(self) -> tuple[Any, ...]:
        return (
            self.dataset, self.clients, self.partition, self.partition_alpha, self.client_images,
            self.public_fraction, self.val_fraction, self.test_fraction, self.public_labels, self.seed,
        )  # fmt: skip

    def network(self, client: int | None = None) -> nn.Module:
        """A freshly initialised network: the server's, or with independent initialisation client ``client``'s own.

        What depends on data (the whitening of ``hlb``) is measured on the public split, which everyone may see,
        so it is the same for all and merges unharmed.

        Raises:
            ConfigError: A model from outside has tensors of a type that no message carries (bfloat16).
        """
        examples = self.split().public_images
        key = () if client is None else (client,)
        network = models.build(
            self.model,
            classes=len(examples.classes),
            in_shape=examples.shape,
            width=self.width,
            kernel_size=self.kernel_size,
            seed=stream_seed(self.seed, "init", *key),
            rows=examples,
        )
        models.initialise_from(network, examples)
        if models.MODELS.brought(self.model):
            check_carried(f"model {self.model!r}", network)
        return network

    def spec(self, network: nn.Module | None = None) -> PermSpec:
        """The permutation symmetries of :meth:`network`, which may be given if it is there already.

        They do not depend on weights: a model of fedmerge's own or of torchvision is traced once in this process, one
        from outside, which may be made in any way, each time.

        Raises:
            SpecError: The network cannot be traced (:func:`fedmerge.perm_spec`).
        """
        public = self.split().public_images
        kind = self.model, self.width, self.kernel_size, len(public.classes), public.shape
        ours = not models.MODELS.brought(self.model)
        if ours and kind in _TRACED:
            return _TRACED[kind]
        spec = perm_spec(self.network() if network is None else network, (public.normalise(public.images[:2]),))
        if ours:
            _TRACED[kind] = spec
        return spec


def read_anew() -> None:
    """Forget how data sets were split: files, and what a notebook registered, may have changed since."""
    _split.cache_clear()
    _digest.cache_clear()


def check_carried(what: str, network: nn.Module) -> None:
    """Refuse a network that no message of Flower carries, or whose answers nobody would take.

    Raises:
        ConfigError: Names ``what``, the tensor, and what to do.
    """
    for name, tensor in state_of(network).items():
        try:
            torch.empty(0, dtype=tensor.dtype).numpy()
        except TypeError as error:
            raise ConfigError(
                f"{what}: tensor {name!r} is {tensor.dtype}, which no message carries; return network.float()"
            ) from error
        apart = "; keep what is no weight out of the state dict: register_buffer(..., persistent=False)"
        if tensor.is_complex():
            raise ConfigError(f"{what}: tensor {name!r} is {tensor.dtype}, and numbers in messages are real{apart}")
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{what}: tensor {name!r} holds NaN or infinite values, as no answer may{apart}")


@lru_cache(maxsize=4)
def _split(
    dataset: str, clients: int, partition: str, partition_alpha: float, client_images: int,
    public_fraction: float, val_fraction: float, test_fraction: float, public_labels: int, seed: int,
) -> data.Split:  # fmt: skip
    return data.split(
        data.load(dataset),
        clients=clients,
        partition=partition,
        partition_alpha=partition_alpha,
        client_images=client_images,
        public_fraction=public_fraction,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        public_labels=public_labels,
        rng=numpy_stream(seed, "split"),
    )


@lru_cache(maxsize=4)
def _digest(*key: Any) -> str:
    split = _split(*key)
    found = hashlib.blake2b(repr(tuple(split.dataset.classes)).encode(), digest_size=16)
    for part in (split.dataset.train, split.dataset.test):
        if part is not None:
            found.update(part.labels.numpy().tobytes())
    some = split.public_images.first(100).images  # enough to tell one data set from another
    means = [float(one.double().nanmean()) for one in tensors(some) if not one.is_complex()]
    return f"{found.hexdigest()} {sum(means):.9g}"


@dataclass(frozen=True)
class ClientTask(Setup):
    """One client's work in one round.

    Attributes:
        local_epochs: Passes over its images.
        training: How it trains; the model's own recipe where it is left out.
        frozen: Names of parameters that are not trained, with commas between them.
        frozen_share: Share of the weights of the others that stay as they are sent, the same for all clients and
            rounds (:func:`fedmerge.freezing.frozen_weights`).
        rounds: How many there will be, for which the noise is chosen.
        dp_epsilon: What a client may spend of its privacy in all of them; -1 where that is not bounded.
        dp_noise: Its noise multiplier, given instead; -1 where it is not. With neither, training is not private.
        dp_clip: The norm to which the gradient of an image is clipped, if training is private.
        dp_delta: With which probability that may protect less.
        secret_noise: The noise, and which images a step takes, are drawn anew and not from the seed. Whoever knows the
            seed could take the noise off; but such a training cannot be repeated.
        label_counts: Whether it says how many of its images are of each class.
        dataset_digest: What the server's :meth:`digest` says of the data set; not compared if empty.
    """

    server_round: int = 1
    local_epochs: int = 1
    training: models.Recipe | None = None
    proximal_mu: float = 0.0
    frozen: str = ""
    frozen_share: float = 0.0
    rounds: int = 1
    dp_epsilon: float = -1.0
    dp_noise: float = -1.0
    dp_clip: float = 1.0
    dp_delta: float = 1e-5
    secret_noise: bool = False
    label_counts: bool = False
    device: str = "auto"
    dataset_digest: str = field(default="", compare=False)

    def split(self) -> data.Split:
        """As of a setup, of the data set that the server has too.

        Raises:
            DataError: It is another here.
        """
        if self.dataset_digest:
            (there, mean), (here, own) = self.dataset_digest.split(), self.digest().split()
            if there != here or not math.isclose(float(mean), float(own), rel_tol=1e-3, abs_tol=1e-6):
                raise DataError(
                    f"{self.dataset!r} is another data set on this node than on the server, and every node takes its "
                    "part of the same one; copy the server's, or write a ClientApp for data that are yours alone "
                    "(docs/tutorials/own-app.md)"
                )
        return super().split()

    @property
    def is_private(self) -> bool:
        """Whether clients train under differential privacy."""
        return self.dp_epsilon >= 0 or self.dp_noise >= 0

    def private(self, examples: int) -> DPSGD | None:
        """How a client with ``examples`` images blurs its gradients, so that all rounds together spend what they may.

        Raises:
            ConfigError: Not with so few images, or with these numbers.
        """
        if not self.is_private:
            return None
        recipe = self.recipe()
        epochs, delta = self.rounds * recipe.epochs, self.dp_delta
        check_delta(delta, examples)
        if self.dp_noise >= 0:
            return DPSGD(self.dp_noise, self.dp_clip)
        return DPSGD.for_epsilon(
            self.dp_epsilon, images=examples, batch_size=recipe.batch_size, epochs=epochs, delta=delta,
            max_grad_norm=self.dp_clip,
        )  # fmt: skip

    def spent(self, examples: int, rounds: int) -> float:
        """Epsilon at ``dp_delta`` of a client with ``examples`` images that was asked in ``rounds`` rounds.

        Infinite where training is not private.
        """
        private, recipe = self.private(examples), self.recipe()
        if private is None:
            return math.inf
        return private.epsilon(
            images=examples, batch_size=recipe.batch_size, epochs=rounds * recipe.epochs, delta=self.dp_delta
        )

    def recipe(self) -> models.Recipe:
        """How the client trains, for as many epochs as the task says."""
        return replace(self.training or models.recipe(self.model), epochs=self.local_epochs)

    def to_config(self) -> dict[str, Scalar]:
        """The flat form, with dashes, that fits a Flower ``ConfigRecord``; what the recipe says stands in it too.

        So a client asks no table of its own how a model is trained.
        """
        flat = vars(self) | vars(self.recipe())
        return {name.replace("_", "-"): value for name, value in flat.items() if name not in ("training", "epochs")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the flat form; keys of others (a strategy may add its own) are ignored.

        Raises:
            ConfigError: A key is missing.
        """

        def read(record: type[Any], apart: str) -> dict[str, Any]:
            values = {}
            for name in (f.name for f in fields(record) if f.name != apart):
                key = name.replace("_", "-")
                if key not in config:
                    raise ConfigError(f"the server's message lacks {key!r}; server and clients must run one fedmerge")
                values[name] = config[key]
            return values

        task = cls(**read(cls, "training"))
        return replace(task, training=models.Recipe(**read(models.Recipe, "epochs"), epochs=task.local_epochs))

    def train(
        self,
        client: int,
        arrays: Mapping[str, Tensor],
        correction: Mapping[str, Tensor] | None = None,
        *,
        images: data.Images | None = None,
        secret_noise: bool = False,
    ) -> tuple[Training, int]:
        """Train on partition ``client``, beginning at ``arrays`` or, in round 1 of independent initialisation, anew.

        ``correction`` is added to the gradient of every step. ``images`` stand for the partition: a shadow of a
        client is a client beyond those of the split, with images of its own. ``secret_noise`` is what the owner of the
        images says, whatever the task does.

        Returns:
            The trained network with its losses, and the number of images it was trained on.
        """
        images = self.split().client(client) if images is None else images
        independent = self.init == "independent" and self.server_round == 1
        network = self.network(client if independent else None)
        start = state_of(network) if independent else arrays
        for name in filter(None, self.frozen.split(",")):
            network.get_parameter(name).requires_grad_(False)
        generator = torch_stream(self.seed, "frozen-share")
        result = train(
            network,
            start,
            images,
            recipe=self.recipe(),
            epochs=self.local_epochs,
            generator=(
                torch.Generator().manual_seed(secrets.randbits(63))
                if self.is_private and (self.secret_noise or secret_noise)
                else torch_stream(self.seed, "local-training", self.server_round, client)
            ),
            device=device_of(self.device),
            proximal_mu=self.proximal_mu,
            correction=correction,
            frozen=frozen_weights(network, self.frozen_share, generator=generator) if self.frozen_share else None,
            private=self.private(len(images)),
        )
        return result, len(images)

    def warm_up(self) -> None:
        """Read the data and train for one step, once in this process: the first client's seconds are then training too.

        What is loaded, compiled or allocated at first use would otherwise count as the time of whoever comes first. No
        result and no random stream depends on it; what goes wrong here goes wrong again where it is reported.
        """
        with suppress(Exception):
            images = self.split().public_images
            recipe = replace(self.recipe(), epochs=1)
            kind = self.dataset, self.model, self.width, self.kernel_size, recipe, self.device, self.is_private
            if kind not in _WARM:
                _WARM.add(kind)
                network = self.network()
                few = images.first(recipe.batch_size)
                train(
                    network, state_of(network), few, recipe=recipe, epochs=1, generator=torch.Generator(),
                    device=device_of(self.device), private=DPSGD(1.0, 1.0) if self.is_private else None,
                )  # fmt: skip

    def head_sums(self, client: int, arrays: Mapping[str, Tensor]) -> HeadSums:
        """What the last layer of the network ``arrays`` can be made of, from partition ``client``."""
        return head_sums(self.network(), arrays, self.split().client(client), device=device_of(self.device))

    def reach(self, examples: int) -> float:
        """How far the steps of a client with ``examples`` images reach (:class:`fedmerge.training.Training`)."""
        recipe = self.recipe()
        return reach(recipe, recipe.epochs * math.ceil(examples / recipe.batch_size))


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network`` as it travels: what modules store beside tensors stays where it is."""
    state: dict[str, Tensor] = network.state_dict()
    beside = beside_tensors(state)
    return laid_aside(state, beside) if beside else state


def device_of(name: str) -> str:
    """``"auto"`` resolved to ``"cuda"`` where there is one, else ``"cpu"``.

    Raises:
        ConfigError: A GPU was asked for and there is none, or no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no GPU; use --device cpu or auto")
    return name
