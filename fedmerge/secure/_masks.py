"""A sum of which nobody sees a term.

The protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
against parties that are curious and do as they are told. Parties u < v agree on a key that nobody else knows; u adds
the stream of that key to its words and v takes it away, so that all of these masks cancel in the sum. A mask of u's own
goes on top. The seeds of both lie with all parties in shares (Shamir), of which ``threshold`` give a seed back: where u
ends before its words come, the others give their shares of its pairwise seed, and where its words came, those of its
own seed, never both. Fewer than ``threshold`` shares tell nothing.

Key agreement is X25519, keys are derived by HKDF-SHA256, masks are ChaCha20, shares travel under ChaCha20-Poly1305:
all from the package ``cryptography``; Shamir's shares are PyCryptodome's. ``flwr.common.secure_aggregation`` is not
used, because its masks come from a generator with a seed of 32 bits and its rounding from a global one.

Every sum needs new secrets: what is opened after one says nothing of another.
"""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmerge.errors import ConfigError, RoundError
from fedmerge.secure._fixed import Words

_SEED, _KEY = 16, 32
_NONCE = bytes(12)  # every key seals one message


@dataclass(frozen=True)
class Party:
    """One party of one sum, and all that it has to keep from message to message; a step returns the next state.

    Attributes:
        me: Its number, the same for everyone.
        threshold: So many parties must stay to the end.
        channel: Private key under which shares come.
        pair: Seed of the private key of its pairwise masks.
        own: Seed of its own mask.
        roster: Public keys of all who take part, by number.
        sealed: The shares that the others sent, by number.
        opened: Whether it has given shares away, which it does once.
    """

    me: int
    threshold: int
    channel: bytes = field(default_factory=lambda: secrets.token_bytes(_KEY), repr=False)
    pair: bytes = field(default_factory=lambda: secrets.token_bytes(_SEED), repr=False)
    own: bytes = field(default_factory=lambda: secrets.token_bytes(_SEED), repr=False)
    roster: Mapping[int, bytes] = field(default_factory=dict)
    sealed: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    opened: bool = False

    @property
    def keys(self) -> bytes:
        """Step 1: its public keys, for everyone."""
        return _public(_private(self.channel)) + _public(_of_seed(self.pair))

    def share(self, roster: Mapping[int, bytes]) -> tuple["Party", dict[int, bytes]]:
        """Step 2: to each other party its shares of both seeds, which that one alone can read.

        Args:
            roster: The public keys of all who take part.

        Raises:
            RoundError: Fewer than the threshold, its own keys are not among them, keys that are none, or asked twice.
        """
        self._once(self.roster, "sent shares")
        if len(roster) < self.threshold or roster.get(self.me) != self.keys or {*map(len, roster.values())} != {64}:
            raise RoundError(
                f"party {self.me} takes no part in a sum of {len(roster)}; its threshold: {self.threshold}"
            )
        parts = zip(*(_split(seed, self.threshold, len(roster)) for seed in (self.own, self.pair)), strict=True)
        plain = dict(zip(sorted(roster), map(b"".join, parts), strict=True))
        channel = _private(self.channel)
        sent = {
            other: ChaCha20Poly1305(_agreed(channel, roster[other][:_KEY], self.me, other)).encrypt(_NONCE, part, None)
            for other, part in plain.items()
        }
        return replace(self, roster=dict(roster)), sent

    def mask(self, words: Words, sealed: Mapping[int, bytes]) -> tuple["Party", Words]:
        """Step 3: its words under all masks.

        Args:
            words: What is to be summed.
            sealed: The shares that came from each party; those that sent none are left out from here on.

        Raises:
            RoundError: Fewer than the threshold, shares of somebody else, or asked twice.
        """
        self._once(self.sealed, "sent its words")
        self._expect(sealed, self.roster, "sent shares")
        masked = words + _stream(self.own, len(words))
        pair = _of_seed(self.pair)
        for other in sealed:
            if other != self.me:
                masked = _add(masked, pair, self.me, other, self.roster[other])
        return replace(self, sealed=dict(sealed)), masked

    def open(self, survivors: Collection[int]) -> tuple["Party", dict[int, bytes]]:
        """Step 4: of each who sent shares one share: of its own seed if its words came, of the pairwise one if not.

        Args:
            survivors: Whose words came.

        Raises:
            RoundError: Fewer than the threshold, somebody unknown, asked twice, or shares that cannot be read.
        """
        self._expect(survivors, self.sealed, "sent words")
        self._once(self.opened, "opened masks")
        channel, found = _private(self.channel), {}
        for other, part in self.sealed.items():
            key = _agreed(channel, self.roster[other][:_KEY], other, self.me)
            try:
                own, pair = _halves(ChaCha20Poly1305(key).decrypt(_NONCE, part, None))
            except InvalidTag as error:
                raise RoundError(f"the shares of party {other} are not its own") from error
            found[other] = own if other in survivors else pair
        return replace(self, opened=True), found

    def _once(self, done: object, what: str) -> None:
        if done:
            raise RoundError(f"party {self.me} has {what} once; a second time, for others, could tell its network")

    def _expect(self, given: Collection[int], among: Collection[int], what: str) -> None:
        if len(given) < self.threshold or self.me not in given or not set(given) <= set(among):
            raise RoundError(f"{len(given)} of {len(among)} parties {what}, the threshold is {self.threshold}")


def check_threshold(threshold: int, parties: int) -> None:
    """Refuse a threshold that leaves nothing hidden, or that cannot be met.

    Raises:
        ConfigError: Says what is possible.
    """
    if not 2 <= threshold <= parties:
        raise ConfigError(
            f"a masked sum of {parties} clients with a threshold of {threshold}: expected 2 (the sum of one network is "
            f"that network) to {parties}"
        )


def unmask(
    masked: Mapping[int, Words],
    opened: Mapping[int, Mapping[int, bytes]],
    *,
    roster: Mapping[int, bytes],
    sent: Collection[int],
    threshold: int,
) -> Words:
    """What the server makes of it: the sum of the words of all whose words came, modulo 2^64.

    Args:
        masked: Whose words came -> those words, under their masks.
        opened: Who answered last -> the shares it gave, by the party whose seed they are of.
        roster: The public keys.
        sent: Who sent shares, and so has masks with the others.
        threshold: How many shares give a seed back.

    Raises:
        RoundError: Too few words or shares, or shares that do not fit together.
    """
    if min(len(masked), len(opened)) < threshold:
        raise RoundError(
            f"{len(masked)} of {len(roster)} masked networks came and {len(opened)} clients opened their masks; the "
            f"threshold is {threshold}, so nothing can be unmasked"
        )
    places = {party: place for place, party in enumerate(sorted(roster), 1)}
    total: Words = np.stack(list(masked.values())).sum(0, dtype=np.uint64)
    for party in sent:
        seed = _joined([(places[who], shares[party]) for who, shares in opened.items()][:threshold], party)
        if party in masked:
            total = total - _stream(seed, len(total))
            continue
        pair = _of_seed(seed)
        if _public(pair) != roster[party][_KEY:]:
            raise RoundError(f"the shares of client {party}, which dropped out, do not fit its key")
        for other in masked:  # the mask that the other put on for nothing, put on by the one that is gone
            total = _add(total, pair, party, other, roster[other])
    return total


def _add(words: Words, pair: X25519PrivateKey, me: int, other: int, keys: bytes) -> Words:
    """``words`` with the mask that ``me`` shares with ``other``, of whom the lower number adds what the other takes."""
    mask = _stream(_agreed(pair, keys[_KEY:], *sorted((me, other))), len(words))
    return words + mask if me < other else words - mask


def _stream(seed: bytes, count: int) -> Words:
    """So many words that nobody can tell from random ones without ``seed``."""
    cipher = Cipher(algorithms.ChaCha20(_derived(seed, b"mask"), bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)


def _agreed(private: X25519PrivateKey, public: bytes, first: int, second: int) -> bytes:
    """The key that only the two know, for what goes from ``first`` to ``second``."""
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a key that makes every exchange zero
        raise RoundError("a public key that is none") from error
    return _derived(shared, f"{first} to {second}".encode())


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY, salt=None, info=b"fedmerge " + purpose).derive(secret)


def _private(key: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(key)


def _of_seed(seed: bytes) -> X25519PrivateKey:
    return _private(_derived(seed, b"pairwise"))


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _split(seed: bytes, threshold: int, parties: int) -> list[bytes]:
    return [share for _, share in Shamir.split(threshold, parties, seed, ssss=False)]


def _halves(both: bytes) -> tuple[bytes, bytes]:
    return both[:_SEED], both[_SEED:]


def _joined(shares: list[tuple[int, bytes]], party: int) -> bytes:
    if {len(share) for _, share in shares} != {_SEED}:
        raise RoundError(f"the shares of client {party} are not of {_SEED} bytes")
    return Shamir.combine(shares, ssss=False)
