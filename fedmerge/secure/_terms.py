"""On what terms a client gives its network into a masked sum: a plain record that a server sends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

Scalar = str | int

KEYS, PARTIES, SHARES, WORDS = "keys", "parties", "shares", "words"
"""Names in the messages of a masked sum; values of the last three stand beside the parties that they belong to."""


@dataclass(frozen=True)
class Terms:
    """What a client is told beside its task.

    Attributes:
        threshold: So many clients must stay until a sum is unmasked.
        aligner: How it aligns its network to the anchor; ``""`` leaves the order of its units.
        restarts: Climbs of that alignment.
    """

    threshold: int
    aligner: str = ""
    restarts: int = 5

    def to_config(self) -> dict[str, Scalar]:
        """The flat form."""
        return {f"masked-{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Read the flat form; None where the server asks for plain networks."""
        if "masked-threshold" not in config:
            return None
        return cls(**{name: config[f"masked-{name}"] for name in cls.__dataclass_fields__})
