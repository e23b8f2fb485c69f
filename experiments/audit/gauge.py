"""What an attacker sees of the networks of one federation, stage by stage, kept in a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from experiments.audit.federations import Arena, Indices
from fedmerge.pipeline import Params
from fedmerge.privacy import Flags, Seen, confidence
from fedmerge.training import predict
from server import RunDirectory
from strategies import ClientResult

CLIENT, ENSEMBLE = "client", "ensemble"
Logits = tuple[Tensor, Tensor, Tensor]
"""Of the audited, the population's and the test images."""


@dataclass(frozen=True)
class Gauge:
    """Measures each network of a federation once, on all that attacks ask for.

    Attributes:
        arena: Where.
        held: What each client of the federation holds.
        begun: Clients whose images were in what the networks of the last round began from.
        seen: Stage -> what an attacker sees of its networks, in the order in which they were added.
        accuracies: Stage -> test accuracy of each of them.
        probabilities: Stage -> what each of its networks predicts of the audited images.
    """

    arena: Arena
    held: Sequence[Indices]
    begun: Sequence[int] = ()
    seen: dict[str, Seen] = field(default_factory=dict)
    accuracies: dict[str, list[float]] = field(default_factory=dict)
    probabilities: dict[str, list[Tensor]] = field(default_factory=dict)

    def logits(self, params: Params) -> Logits:
        """Of the audited, the population's and the test images."""
        world, parts = self.arena.world, (self.arena.images, self.arena.world.split.val_images, self.arena.test)
        audited, population, test = (predict(world.model, params, part, device=world.device) for part in parts)
        return audited, population, test

    def clients(self, results: Sequence[ClientResult], owners: Sequence[int]) -> None:
        """The clients' own networks, and their mean prediction, in which images of ``owners`` are."""
        found = [self.logits(r.params) for r in results]
        self.add(CLIENT, found, [[r.client] for r in results])
        self.together(ENSEMBLE, found, owners)

    def together(self, stage: str, logits: Sequence[Logits], owners: Sequence[int]) -> None:
        """The mean prediction of networks of the clients ``owners``."""
        audited, population, test = (_mean(parts) for parts in zip(*logits, strict=True))
        self.add(stage, [(audited, population, test)], [owners])

    def network(
        self, stage: str, params: Params, owners: Sequence[int] | None = None, *, attacker: int | None = None
    ) -> None:
        """A network made of the clients ``owners``; of all if left out. An ``attacker`` asks of no image of its own."""
        apart = self.begun if attacker is None else [*self.begun, attacker]
        self.add(stage, [self.logits(params)], [range(len(self.held)) if owners is None else owners], apart)

    def add(
        self,
        stage: str,
        logits: Sequence[Logits],
        owners: Sequence[Sequence[int]],
        apart: Sequence[int] | None = None,
    ) -> None:
        """The networks of a stage by their logits, each made of the clients ``owners``.

        Images of the clients ``apart``, of :attr:`begun` if left out, are no outsiders.
        """
        labels, population = self.arena.images.labels, self.arena.world.split.val_images.labels
        inside = np.stack([self._of(who) for who in owners])
        found = Seen(
            np.stack([confidence(audited, labels) for audited, _, _ in logits]),
            inside,
            np.stack([confidence(other, population) for _, other, _ in logits]),
            ~inside & ~self._of(self.begun if apart is None else apart),
        )
        self.seen[stage] = Seen.stack([self.seen[stage], found]) if stage in self.seen else found
        right = [float((test.argmax(1) == self.arena.test.labels).double().mean()) for _, _, test in logits]
        self.accuracies.setdefault(stage, []).extend(right)
        self.probabilities.setdefault(stage, []).extend(audited.double().softmax(1) for audited, _, _ in logits)

    def _of(self, clients: Sequence[int]) -> Flags:
        """Which of the audited images one of these clients holds."""
        held = [self.held[i] for i in clients]
        found: Flags = np.isin(self.arena.audited, np.concatenate(held) if held else [])
        return found

    @property
    def accuracy(self) -> dict[str, float]:
        """Stage -> mean test accuracy of its networks."""
        return {stage: float(np.mean(found)) for stage, found in self.accuracies.items()}


def _mean(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the probabilities."""
    return torch.stack([part.double().log_softmax(1) for part in logits]).logsumexp(0) - math.log(len(logits))


def write(path: Path, seen: Mapping[str, Seen], accuracy: Mapping[str, float]) -> None:
    """Keep what was seen of a federation; a reader sees all or nothing."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for stage, part in seen.items():
        arrays |= {
            f"{stage}/confidence": part.confidence.astype(np.float32),
            f"{stage}/population": part.population.astype(np.float32),
            f"{stage}/members": part.members.astype(np.uint8),
            f"{stage}/outsiders": part.outside.astype(np.uint8),
            f"{stage}/accuracy": np.array([accuracy[stage]]),
        }
    RunDirectory(path.parent).write_bytes(path.name, save(arrays))


def read(path: Path) -> tuple[dict[str, Seen], dict[str, float]]:
    """What :func:`write` kept."""
    arrays = load_file(path)
    stages = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
    flags = {s: [arrays[f"{s}/{side}"].astype(bool) for side in ("members", "outsiders")] for s in stages}
    seen = {s: Seen(arrays[f"{s}/confidence"], ins, arrays[f"{s}/population"], out) for s, (ins, out) in flags.items()}
    return seen, {s: float(arrays[f"{s}/accuracy"][0]) for s in stages}
