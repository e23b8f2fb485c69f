"""The server of runs in which no client's network is seen: masked sums over Flower's messages."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import ParamsError, RoundError
from fedmerge.flower.arrays import UnusableError, read_array
from fedmerge.flower.replies import T, record
from fedmerge.heads import HeadSums
from fedmerge.merge import Merge
from fedmerge.pipeline import Params, correct
from fedmerge.secure import KEYS, PARTIES, SHARES, WORDS, Terms, Total, Words, decode, objective, size, unmask
from fedmerge.tasks import ARRAYS, CONFIG, EXAMPLES
from strategies._federated import Served, Summed
from strategies._replies import check_sums

_LOSS, _ACCURACY = "/loss", "/accuracy"


class Masked(Served):
    """Flower strategy: clients train and align themselves, and only masked sums leave them.

    The clients align to the network that they are sent, which is public: of round 1 with independent initialisation one
    that the server trained on the public split, else the one from which all begin. A first sum is taken of all that
    stay, at least ``min_replies``; then each aligns itself to the sum less its own network, and a second sum is taken
    of the same clients or not at all, for two sums that one client sets apart would tell its network. The better sum
    counts, by the squared norm of its mean. It is repaired and retrained with public images. Numbers of images, losses
    and accuracies go into the sums too.

    A sum costs four messages to each client and as many back: keys, shares, words of 8 bytes a number, shares.

    Args:
        aligned: Whether clients align; else their networks are averaged as FedAvg averages them.
        sums: Sums in a round.
        options: Of :class:`Served`; of the pipeline it reads the aligner and its restarts, repair and retraining.
    """

    passes = ("_grid", "_cohort")

    def __init__(self, *, aligned: bool = True, sums: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.aligned, self.sums = aligned, sums if aligned else 1

    def fewest(self) -> int:
        """The sum of one network is that network."""
        return 2

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As every strategy's; the grid is kept for the further messages of the round."""
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def _config(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        """As every strategy's, with the terms of the sum."""
        terms = Terms(
            max(self.federation.min_replies, self.fewest()), self.pipeline.aligner if self.aligned else "",
            self.pipeline.restarts,
        )  # fmt: skip
        return ConfigRecord({**super()._config(config, server_round), **terms.to_config()})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the sums of a round, and go on from the better one."""
        server_round += self.federation.offset
        like = {**self._sent.to_torch_state_dict(), _LOSS: torch.zeros(()), _ACCURACY: torch.zeros(())}
        keys = dict(self._read(replies, server_round, _keys)[0])
        self._cohort = list(self._asked.values())
        total, stayed = self._sum(server_round, keys, like, self.federation.min_replies)
        history = [objective(total, self.bench.spec)]
        for _ in range(1, self.sums):
            again = self._again(server_round, total, stayed, like)
            if again is None:
                break
            history.append(objective(again, self.bench.spec))
            if history[-1] <= max(history[:-1]):
                break
            total = again
        said = [math.nan if self.federation.task.is_private else float(total.mean[name]) for name in (_LOSS, _ACCURACY)]
        summed = Summed(len(stayed), total.weight, *said)
        params = self._usable(server_round, total)
        self.federation.on_summed(server_round, summed)
        if self.aligned:
            converged = len(history) > 1 and history[-1] <= max(history[:-1])
            merged = Merge(params, (), max(history), tuple(history), len(history), converged)
            self.federation.on_merge(server_round, merged)
        self.on_stage(server_round, "merged" if self.aligned else "aggregated", params)
        params, _ = correct(
            params, bench=self.bench, pipeline=self.pipeline, server_round=server_round, on_stage=self.on_stage
        )
        return ArrayRecord(params), MetricRecord({"clients": len(stayed), EXAMPLES: total.weight})

    def head_sums(self, params: Params, like: HeadSums, *, server_round: int) -> tuple[HeadSums, int]:
        """What the last layer of ``params`` can be made of, added up over clients under masks, and over how many.

        Args:
            params: The network that clients look at their images with.
            like: The same sums over the public images.
            server_round: Whose cohort is asked.

        Raises:
            RoundError: Too few clients stayed, or the sum is none of images.
        """
        config = self._config(ConfigRecord({}), server_round)
        question = RecordDict({ARRAYS: ArrayRecord(params), CONFIG: config})
        self._cohort = list(self.federation.cohort(server_round).values())
        keys = self._ask("head", dict.fromkeys(self._cohort, question), server_round, _keys)
        shapes = {"gram": like.gram, "cross": like.cross}
        total, stayed = self._sum(server_round, keys, shapes, self.federation.min_replies)
        gram, cross = (total.mean[name] * total.weight for name in shapes)
        gram[-1, -1], cross[-1] = gram[-1, -1].round(), cross[-1].round()  # numbers of images
        sums = HeadSums(gram, cross, int(gram[-1, -1]))
        try:
            check_sums(sums, like)
        except UnusableError as error:
            raise RoundError(f"the masked sum is of no images ({error}); nobody sees whose fault that is") from error
        return sums, len(stayed)

    def _again(self, server_round: int, total: Total, stayed: list[int], like: Params) -> Total | None:
        """The sum of the same clients, each aligned to the others' mean; None where one of them is gone."""
        mean = ArrayRecord({name: total.mean[name] for name in self._sent})
        config = self._config(ConfigRecord({"masked-weight": total.weight}), server_round)
        keys = self._ask(
            "realign", dict.fromkeys(stayed, RecordDict({ARRAYS: mean, CONFIG: config})), server_round, _keys
        )
        try:
            return self._sum(server_round, keys, like, len(stayed), "of the same clients as the sum before")[0]
        except RoundError as error:
            why = str(error).removeprefix(f"round {server_round}: ")
            self.federation.on_note(server_round, f"the first sum stays: {why}")
            return None

    def _sum(
        self, server_round: int, roster: Mapping[int, bytes], like: Params, least: int, why: str = "min-replies"
    ) -> tuple[Total, list[int]]:
        """One masked sum of the clients in ``roster``, and of whom it is.

        Raises:
            RoundError: Fewer than ``least`` stayed; it says ``why`` so many are needed.
        """
        threshold = max(least, self.fewest())

        def enough(came: Mapping[int, Any], what: str) -> None:
            if len(came) < threshold:
                raise RoundError(
                    f"round {server_round}: {len(came)} of {len(self._cohort)} clients {what}, and a masked sum needs "
                    f"{threshold} ({why}); it was not unmasked"
                )

        enough(roster, "sent keys")
        everyone = _record(roster, KEYS)
        shares = self._ask("share", dict.fromkeys(roster, everyone), server_round, lambda c, r: _shares(c, r, roster))
        enough(shares, "sent shares")
        sealed = {to: _record({of: sent[to] for of, sent in shares.items()}, SHARES) for to in shares}
        masked = self._ask("words", sealed, server_round, lambda c, r: (c, _words(r, size(like))))
        enough(masked, "sent a masked network")
        survivors = RecordDict({CONFIG: ConfigRecord({PARTIES: list(masked)})})
        opened = self._ask("open", dict.fromkeys(masked, survivors), server_round, lambda c, r: _shares(c, r, shares))
        words = unmask(masked, opened, roster=roster, sent=shares, threshold=threshold)
        try:
            return decode(words, like), list(masked)
        except ParamsError as error:
            raise RoundError(
                f"round {server_round}: the masked sum is none ({error}); a client sent something else"
            ) from error

    def _usable(self, server_round: int, total: Total) -> Params:
        """The mean, if it can be a network; which client spoils it nobody can say."""
        try:
            return self._expected.network(ArrayRecord({name: total.mean[name] for name in self._sent}))
        except UnusableError as error:
            raise RoundError(
                f"round {server_round}: the mean of the clients is no network ({error}); under masks nobody sees whose "
                "fault that is"
            ) from error

    def _ask(
        self, what: str, contents: Mapping[int, RecordDict], server_round: int,
        read: Callable[[int, RecordDict], tuple[int, T]],
    ) -> dict[int, T]:  # fmt: skip
        """Send each client its content, and read what comes back."""
        nodes = self.federation.nodes
        self._asked = {nodes[client]: client for client in contents}
        self._questions = [
            Message(content, message_type=f"query.masked_{what}", dst_node_id=nodes[client])
            for client, content in contents.items()
        ]
        replies = self._grid.send_and_receive(self._questions, timeout=self.federation.timeout)
        return dict(self._read(replies, server_round, read, prefix=f"masked sum, {what}: ")[0])


def _record(values: Mapping[int, bytes], name: str) -> RecordDict:
    return RecordDict({CONFIG: ConfigRecord({PARTIES: list(values), name: list(values.values())})})


def _keys(client: int, content: RecordDict) -> tuple[int, bytes]:
    return client, _bytes(record(content, CONFIG, ConfigRecord).get(KEYS), 64)


def _shares(client: int, content: RecordDict, expected: Iterable[int]) -> tuple[int, dict[int, bytes]]:
    told: Any = record(content, CONFIG, ConfigRecord)
    parties, shares = told.get(PARTIES), told.get(SHARES)
    if not isinstance(shares, list) or not isinstance(parties, list) or sorted(parties) != sorted(expected):
        raise UnusableError("its shares are not those of the clients that take part")
    return client, {party: _bytes(one, None) for party, one in zip(parties, shares, strict=True)}


def _bytes(value: Any, length: int | None) -> bytes:
    if not isinstance(value, bytes) or len(value) > 64 or (length is not None and len(value) != length):
        raise UnusableError(f"it sent {type(value).__name__} where {length or 'some'} bytes were expected")
    return value


def _words(content: RecordDict, count: int) -> Words:
    arrays = record(content, WORDS, ArrayRecord)
    return read_array(WORDS, arrays.get(WORDS), shape=(count,), dtype=np.dtype(np.uint64)).numpy()
