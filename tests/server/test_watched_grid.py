"""Meeting the clients, and replies on their way: what one node does costs none of the others anything."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from local_grid import LocalGrid
from reply_kinds import EVALUATION, HARMLESS, QUERY, TRAINING, Kind, copied
from short_run import run

from fedmerge.errors import ConfigError, RoundError
from fedmerge.flower.replies import Failure
from fedmerge.tasks import ARRAYS, METRICS, ClientTask
from server import RunConfig, WatchedGrid
from server._grid import meet

TASK = ClientTask(clients=3)
IMAGES = [10**4, 10**4, 10**4]


def met(kind: Kind | None, *, nodes: int = 3, images: list[int] = IMAGES, who: int = 1, **terms: object):
    def spoil(client: int, reply: Message):
        return kind.change(reply) if kind is not None and client == who else reply

    grid = LocalGrid(nodes, spoil=spoil)
    found = meet(WatchedGrid(grid), images, task=TASK, timeout=0.001, **terms)
    holders = {client: node for node, client in grid.partition.items()}
    assert all(found.nodes[client] == holders[client] for client in found.nodes)
    return found


def test_clients_say_how_many_images_they_have() -> None:
    held = [len(rows) for rows in TASK.split().clients]
    found = met(None)
    assert found.images == dict(enumerate(held))
    assert found.failures == []
    fewer = met(Kind(lambda reply: set_metric(reply, "num-examples", 7)))
    assert fewer.images == {0: held[0], 1: 7, 2: held[2]}
    silent = met(Kind(lambda reply: without(reply, "num-examples")))  # another ClientApp may not know
    assert silent.images == {0: held[0], 1: 10**4, 2: held[2]}
    (failure,) = met(None, images=[10**4, held[1] - 1, 10**4]).failures
    assert failure.client == 1
    assert re.search(
        rf"node \d+: metric 'num-examples' is {held[1]}, expected .* in \[1, {held[1] - 1}\]", failure.reason
    )


def set_metric(reply: Message, key: str, value: int) -> Message:
    reply.content[METRICS][key] = value
    return reply


def without(reply: Message, key: str) -> Message:
    del reply.content[METRICS][key]
    return reply


@pytest.mark.parametrize("what", list(QUERY))
def test_a_node_that_does_not_say_who_it_is_is_named_and_left_out(what: str) -> None:
    found = met(QUERY[what])
    assert sorted(found.nodes) == [0, 2]
    ((failure),) = found.failures
    assert (failure.server_round, failure.client) == (0, 1)
    assert re.search(re.sub(r"\^.*?error: |error: ", "", QUERY[what].reason), failure.reason), failure.reason
    assert re.search(r"^node \d+: ", failure.reason)
    with pytest.raises(
        RoundError, match=r"no node answers for client 1 \(1 of 3 missing\): node \d+: .*partition-id from 0"
    ):
        met(QUERY[what], fewest=3)


def test_two_nodes_with_one_partition_are_both_left_alone() -> None:
    """Nobody knows which is right, and the one that lies is not to have the other's place."""
    claimed = Kind(lambda reply: set_metric(reply, "client", 0))
    found = met(claimed)
    assert sorted(found.nodes) == [2]
    assert found.failures == [
        Failure(0, 0, "2 nodes say that they hold its partition"),
        Failure(0, 1, "no node says that it holds its partition"),
    ]


def test_a_node_beyond_the_clients_of_the_run_may_say_what_it_likes() -> None:
    assert sorted(met(QUERY["no metrics"], nodes=4, who=3).nodes) == [0, 1, 2]
    assert met(QUERY["no metrics"], nodes=4, who=3).failures == []


def test_nodes_met_before_are_not_asked_again() -> None:
    """Not even by another run over the same grid."""
    watched = WatchedGrid(LocalGrid(0))
    watched.met.update({0: 5, 1: 6, 2: 7})
    found = meet(WatchedGrid(watched), IMAGES, task=TASK)
    assert (found.nodes, found.images) == ({0: 5, 1: 6, 2: 7}, dict(enumerate(IMAGES)))


def files(path: Path) -> dict[str, bytes]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {"model": (path / "model.safetensors").read_bytes(), "rows": json.dumps(rows).encode()}


@pytest.mark.parametrize("strategy", ["fedavg", "merge-many"])
def test_a_run_with_a_bad_reply_a_round_writes_what_it_writes_without_that_client(
    strategy: str, tmp_path: Path
) -> None:
    def spoiling(kinds: Iterable[Kind], evaluations: Iterable[Kind], introduction: Kind | None = None):
        waiting = {"train": iter(kinds), "evaluate": iter(evaluations), "query": iter([introduction] * 9)}

        def spoil(client: int, reply: Message):
            kind = next(waiting[reply.metadata.message_type.split(".")[0]]) if client == 2 else None
            return reply if kind is None else kind.change(reply)

        return LocalGrid(4, spoil=spoil)

    names = ["bytes that are garbage", "a header of 3.6 TiB", "client another's", "num-examples 10**30", "silence"]
    names += ["1e38 in one weight", "train-loss as a list", "a reply from a node that was not asked"]
    kinds = [TRAINING[name] if name in TRAINING else HARMLESS[name] for name in names]
    # The tests' network has other names than the table's.
    kinds[0] = Kind(lambda reply: changed(reply, b"garbage"))
    kinds[1] = Kind(lambda reply: changed(reply, b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118))
    kinds[5] = Kind(lambda reply: changed(reply, None))
    evaluations = [list(EVALUATION.values())[i] for i in range(0, 24, 3)]
    settings = {
        "strategy": strategy, "init": "shared", "rounds": len(kinds), "local_epochs": 1, "controls": "none", "timeout": 0.001, "client_images": 40,
        "retrain_epochs": 1, "aligner": "weight-matching", "restarts": 1,
    }  # fmt: skip
    found = run(tmp_path / "bad", spoiling(kinds, evaluations), **settings)
    gone = [Kind(lambda reply: [])] * len(kinds)
    run(tmp_path / "gone", spoiling(gone, gone), **settings)
    assert files(tmp_path / "bad") == files(tmp_path / "gone")
    assert found["status"] == "finished"
    assert {f["client"] for f in found["failures"]} == {2}
    assert [f["round"] for f in found["failures"]] == [r for r in range(1, len(kinds) + 1) for _ in range(2)]
    assert all(f["reason"].startswith("evaluation: ") for f in found["failures"][1::2])
    never = run(tmp_path / "never", spoiling((), (), QUERY["client as a list"]), **{**settings, "rounds": 2})
    assert [(f["round"], f["client"]) for f in never["failures"]] == [(0, 2)]
    assert (never["asked"], never["answered"]) == (6, 6)


def changed(reply: Message, data: bytes | None) -> Message:
    name, array = next(iter(reply.content[ARRAYS].items()))
    values = array.numpy()
    values.reshape(-1)[0] = 1e38
    other = Array(values) if data is None else Array(array.dtype, array.shape, array.stype, data)
    reply.content[ARRAYS][name] = other
    return reply


def test_a_forged_reply_does_not_keep_the_true_one_from_being_waited_for() -> None:
    class Slow(LocalGrid):
        """The forged reply comes at once, the true one later."""

        looks = 0

        def pull_messages(self, message_ids):
            self.looks += 1
            ids = sorted(message_ids)
            replies = list(super().pull_messages(ids)) if self.looks > 1 else []
            for name in ids if self.looks == 1 else ():
                forged = copied(
                    Message(RecordDict({METRICS: MetricRecord({"client": 0})}), reply_to=self.waiting[name])
                )
                forged.metadata.__dict__["_src_node_id"] = 4711
                replies.append(forged)
            return replies

    found = meet(WatchedGrid(Slow(3)), IMAGES, task=TASK, timeout=5)
    assert sorted(found.nodes) == [0, 1, 2]
    assert found.failures == []


@pytest.mark.parametrize("error", [ValueError("no such object"), KeyError("x"), MemoryError()])
def test_a_reply_that_flower_cannot_unpack_is_its_senders_failure(error: Exception) -> None:
    class Broken(LocalGrid):
        def pull_messages(self, message_ids):
            ids = list(message_ids)
            if any(self.partition[self.waiting[i].metadata.dst_node_id] == 1 for i in ids if i in self.waiting):
                raise error
            return super().pull_messages(ids)

    found = meet(WatchedGrid(Broken(3)), IMAGES, task=TASK, timeout=5)
    assert sorted(found.nodes) == [0, 2]
    assert f"the reply cannot be unpacked ({type(error).__name__}" in found.failures[0].reason


def test_a_lost_connection_is_no_bad_reply() -> None:
    class Gone(LocalGrid):
        def pull_messages(self, message_ids):
            raise ConnectionError("the SuperLink is gone")

    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        meet(WatchedGrid(Gone(3)), IMAGES, task=TASK, timeout=5)


@pytest.mark.parametrize(
    ("strategy", "options", "clients", "lost", "message"),
    [
        ("bulyan", "num_malicious_nodes=0", 4, 2, r"round 1 got 2 usable .* at least 3 \(Bulyan needs at least 3\): cl"),
        ("krum", "num_malicious_nodes=1", 5, 1, r"got 4 usable replies of 5, expected at least 5 \(Krum needs at least 5"),
        ("multikrum", "num_malicious_nodes=1", 5, 1, r"at least 5 \(MultiKrum needs at least 5\): client 0: no reply"),
        ("fedadam", "eta=1e300", 3, 0, "round 1: FedAdam made NaN or infinite values in tensor .* of 3 finite networks"),
    ],
)  # fmt: skip
def test_a_strategy_that_can_make_nothing_of_what_is_left_says_so(
    strategy: str, options: str, clients: int, lost: int, message: str, tmp_path: Path
) -> None:
    def spoil(client: int, reply: Message):
        return [] if client < lost and ARRAYS in reply.content else reply

    settings = {
        "strategy": strategy,
        "strategy_options": options,
        "init": "shared",
        "timeout": 0.001,
        "client_images": 40,
        "controls": "none",
    }
    with pytest.raises(RoundError, match=message):
        run(tmp_path / "a", LocalGrid(clients, spoil=spoil), clients=clients, local_epochs=1, **settings)


def test_a_round_too_small_for_the_strategy_is_refused_before_anyone_trains(tmp_path: Path) -> None:
    grid = LocalGrid(4)
    with pytest.raises(ConfigError, match="Bulyan needs at least 7 replies, and a round asks 4; take more clients"):
        run(tmp_path / "a", grid, strategy="bulyan", strategy_options="num_malicious_nodes=1", init="shared")
    assert not any(kind.startswith("train") for kind, _ in grid.asked)


def test_a_share_of_the_clients_that_are_there_too_small_for_min_replies_is_refused_before_anyone_trains(
    tmp_path: Path,
) -> None:
    grid = LocalGrid(4, spoil=lambda client, reply: set_metric(reply, "client", -1) if client < 2 else reply)
    settings = {"fraction_train": 0.5, "min_replies": 2, "strategy": "fedavg", "init": "shared"}
    with pytest.raises(ConfigError, match="min-replies is 2, and a round asks 1 of the 2 clients that are there; sta"):
        run(tmp_path / "a", grid, **settings)
    assert not any(kind.startswith("train") for kind, _ in grid.asked)


@pytest.mark.parametrize(
    ("strategy", "option", "expected"),
    [
        ("fedtrimmedavg", "beta=0.5", "a number from 0 to 0.499"),
        ("qfedavg", "client_learning_rate=0", "a number above 0"),
        ("krum", "num_malicious_nodes=0.5", "a whole number from 0"),
        ("bulyan", "num_malicious_nodes=nan", "a whole number from 0"),
        ("multikrum", "num_nodes_to_select=0", "a whole number from 1"),
        ("fedprox", "proximal_mu=-1", "a number from 0"),
        ("fedavgm", "server_momentum=-0.5", "a number from 0 to 1"),
        ("fedadam", "tau=0", "a number above 0"),
    ],
)
def test_options_out_of_their_range_are_named(strategy: str, option: str, expected: str) -> None:
    name, value = option.split("=")
    said = f"strategy {strategy}: option {name} is {value}; expected {expected}"
    with pytest.raises(ConfigError, match=re.escape(said)):
        RunConfig.parse({"strategy": strategy, "strategy-options": option, "init": "shared"})


def test_what_a_client_calls_itself_beside_a_config_is_nothing_to_the_run(tmp_path: Path) -> None:
    """Records of its own are ignored, also with the name of one of ours."""

    def spoil(client: int, reply: Message):
        reply.content["config"] = ConfigRecord({"seed": 99})
        return reply

    run(tmp_path / "a", LocalGrid(4, spoil=spoil), local_epochs=1, controls="none")
    run(tmp_path / "b", LocalGrid(4), local_epochs=1, controls="none")
    assert files(tmp_path / "a") == files(tmp_path / "b")
