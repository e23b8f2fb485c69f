"""The last layer in closed form: one more exchange with the clients, of sums over their private images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedmerge.errors import DataError, RoundError, SpecError
from fedmerge.flower.replies import Failure, sift
from fedmerge.heads import HeadSums, best_head, head_of, head_sums
from fedmerge.pipeline import Params
from fedmerge.tasks import ARRAYS, CONFIG, HEAD_SUMS
from server._grid import WatchedGrid
from server._world import MaskedSums, World
from strategies import read_head_sums

_QUERY = f"query.{HEAD_SUMS}"


@dataclass(frozen=True)
class Headed:
    """A network with the head that is best on val.

    Attributes:
        params: The network.
        note: What became of its head.
        failures: Answers that could not be used.
        bytes_down: Sent to clients; 0 under masks, where the run counts what it sends and gets.
        bytes_up: Sent by them and used; 0 there, too.
    """

    params: Params
    note: str
    failures: list[Failure] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class _Told:
    """Sums over the images of so many clients, or ``why`` there are none."""

    total: HeadSums | None
    clients: int = 0
    why: str = ""
    failures: list[Failure] = field(default_factory=list)
    bytes_up: int = 0


def with_head(world: World, params: Params, clients: Sequence[int]) -> Headed:
    """Ask ``clients`` for their sums and give the network the best head of them, or leave it the one that it has.

    It is left where the network has no linear head, where labels are no classes, where fewer clients answer than the
    run needs, and where no ridge regression is better on val; of what :func:`fedmerge.heads.best_head` chooses. Where
    the run is on masked sums, so are these, and ``clients`` are the cohort of the last round.
    """
    public = world.split.public_images.labelled
    try:
        head_of(world.model, public)
        like = head_sums(world.model, params, public, device=world.device)
    except (SpecError, DataError) as error:
        return Headed(params, f"head as it was: {error}")
    told = _asked(world, params, clients, like) if world.masked is None else _masked(world.masked, params, like)
    down = len(clients) * _bytes(params.values()) if world.masked is None else 0
    if told.total is None:
        return Headed(params, f"head as it was: {told.why}", told.failures, down, told.bytes_up)
    found = best_head(world.model, params, told.total, world.split.val_images, device=world.device)
    sums = f"the {'sums' if world.masked is None else 'masked sum'} of {told.clients} client{'s'[: told.clients != 1]}"
    note = f"head from {sums}, {told.total.examples} images, at strength {found.strength or 0:g}"
    if found.strength is None:
        note = f"head as it was: none from {sums} is better on val"
    if found.singular:
        note += f" (singular at {', '.join(f'{s:g}' for s in found.singular)})"
    return Headed(found.params, note, told.failures, down, told.bytes_up)


def _asked(world: World, params: Params, clients: Sequence[int], like: HeadSums) -> _Told:
    """Each client's own sums."""
    config, nodes = world.config, {world.meeting.nodes[client]: client for client in clients}
    task = ConfigRecord({**world.task.to_config()})
    questions = [
        Message(RecordDict({CONFIG: task, ARRAYS: ArrayRecord(params)}), dst_node_id=node, message_type=_QUERY)
        for node in nodes
    ]
    replies = WatchedGrid(world.grid).send_and_receive(questions, timeout=config.timeout)
    sums, failures = sift(
        replies,
        lambda client, content: read_head_sums(client, content, like=like, most=world.meeting.images[client]),
        server_round=config.rounds,
        asked=nodes,
        questions=questions,
    )
    failures = [Failure(f.server_round, f.client, f"head: {f.reason}") for f in failures]
    up = len(sums) * _bytes((like.gram, like.cross))
    if len(sums) < config.min_replies:
        why = f"{len(sums)} usable sums of {len(nodes)}, and min-replies is {config.min_replies}"
        return _Told(None, len(sums), why, failures, up)
    return _Told(sum(sums[1:], sums[0]), len(sums), "", failures, up)


def _masked(take: MaskedSums, params: Params, like: HeadSums) -> _Told:
    """The clients' sums made one under masks; their bytes are counted with those of the other masked sums."""
    try:
        total, clients = take(params, like)
    except RoundError as error:
        return _Told(None, why=str(error))
    return _Told(total, clients)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
