"""Runs on masked sums over real messages: what the server gets, and what it makes of it."""

import hashlib
import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from local_grid import LocalGrid
from short_run import rows, run

from fedmerge.errors import RoundError
from fedmerge.secure import WORDS, encode
from fedmerge.tasks import METRICS, ClientTask
from server import read_model

SHORT = {"local_epochs": 1, "retrain": "none", "controls": "none", "keep_clients": False, "local_evaluation": False}
SECURE = {**SHORT, "timeout": 0.2, "secure": True, "repair": "none", "aligner": "weight-matching"}


class Heard(LocalGrid):
    """Keeps what clients answer, as (what was asked, client, reply); ``silent`` says whose answer to what is lost."""

    def __init__(self, n: int = 4, silent: Callable[[str, int, int], bool] = lambda what, client, time: False) -> None:
        super().__init__(n, spoil=self.hear)
        self.silent, self.heard, self.now = silent, list[tuple[str, int, Message]](), -1

    def _spoilt(self, message: Message) -> Any:
        self.now = self.partition[message.metadata.dst_node_id]
        return super()._spoilt(message)

    def hear(self, client: int, reply: Message) -> Message | None:
        what = self.asked[-1][0]
        time = sum(1 for w, c, _ in self.heard if (w, c) == (what, client))
        self.heard.append((what, client, reply))
        return None if self.silent(what, client, time) else reply

    def times(self, what: str) -> int:
        return sum(1 for w, _ in self.asked if w == what)


def values(reply: Message) -> dict[str, Any]:
    """All that a reply says, by record and key, but for who sent it."""
    return {
        f"{name}/{key}": value.data if isinstance(value, Array) else value
        for name, record in reply.content.items()
        for key, value in record.items()
    }


def test_another_network_of_one_client_changes_nothing_that_the_server_gets_but_words_under_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, networks = ClientTask.train, list[tuple[dict[str, torch.Tensor], int]]()

    def listen(path: Path, change: float) -> dict[tuple[str, int], dict[str, Any]]:
        """What the server gets, where the dice of each client fall alike in every run."""
        grid, thrown = Heard(), defaultdict[int, Iterator[int]](itertools.count)

        def dice(length: int) -> bytes:
            text = f"{grid.now} {next(thrown[grid.now])}".encode()
            return hashlib.blake2b(text, digest_size=length).digest()

        def changed(task: ClientTask, client: int, *given: Any, **how: Any) -> Any:
            found, examples = train(task, client, *given, **how)
            if client == 1:
                for tensor in found.params.values():
                    tensor += change * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
                networks.append((found.params, examples))
            return found, examples

        monkeypatch.setattr("secrets.token_bytes", dice)
        monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", dice)
        monkeypatch.setattr(ClientTask, "train", changed)
        run(path, grid, strategy="fedavg", init="shared", **SECURE)
        return {(what, client): values(reply) for what, client, reply in grid.heard if what != "query"}

    one, other = listen(tmp_path / "a", 0.0), listen(tmp_path / "b", 1.0)
    assert one.keys() == other.keys()
    differ = [(key, name) for key in one for name in one[key] if one[key][name] != other[key][name]]
    assert differ == [(("query.masked_words", 1), f"{WORDS}/{WORDS}")]
    # And there by just what the networks differ: every other network fits the same words, under another mask.
    words = [np.load(io.BytesIO(heard[differ[0][0]][differ[0][1]])) for heard in (one, other)]
    (a, examples), (b, _) = networks
    plain = [encode(network, examples, 4)[:-1] for network in (a, b)]
    assert np.array_equal((words[1] - words[0])[: len(plain[0])], plain[1] - plain[0])


def test_no_reply_holds_a_number_of_a_network_or_anything_in_plain(tmp_path: Path) -> None:
    grid = Heard()
    run(tmp_path / "a", grid, **SECURE)
    kept = [state["network"].to_torch_state_dict() for state in grid.states.values()]
    pieces = [row.numpy().tobytes() for params in kept for t in params.values() if t.dim() == 2 for row in t[:, :8]]
    assert len(pieces) > 4 * 16
    for what, client, reply in grid.heard:
        said = values(reply)
        assert said.pop(f"{METRICS}/client", client) == client
        if what != "query":  # where a node says who it is: and of how many images
            said = {k: v for k, v in said.items() if not k.endswith("/parties")}
            texts = [v for value in said.values() for v in (value if isinstance(value, list) else [value])]
            assert {type(text) for text in texts} <= {bytes}, what
            assert not any(piece in text for piece in pieces for text in texts), what


def test_one_that_drops_out_before_its_words_come_is_left_out_exactly_and_the_run_goes_on(tmp_path: Path) -> None:
    late = run(
        tmp_path / "late", Heard(silent=lambda what, client, _: (what, client) == ("query.masked_words", 2)), **SECURE
    )
    never = run(tmp_path / "never", Heard(silent=lambda what, client, _: (what, client) == ("train", 2)), **SECURE)
    assert (late["answered"], never["answered"]) == (3, 3)
    assert [(f["client"], f["reason"]) for f in late["failures"]] == [(2, "masked sum, words: no reply in time")]
    assert (tmp_path / "late" / "model.safetensors").read_bytes() == (
        tmp_path / "never" / "model.safetensors"
    ).read_bytes()
    assert late["merges"] == never["merges"]


def test_with_more_drop_outs_than_the_threshold_allows_the_run_fails_with_its_reason_and_nobody_opens_a_mask(
    tmp_path: Path,
) -> None:
    grid = Heard(silent=lambda what, client, _: what == "query.masked_words" and client in (0, 2))
    with pytest.raises(
        RoundError, match=r"2 of 4 clients sent a masked network, and a masked sum needs 3 \(min-replies\)"
    ):
        run(tmp_path / "a", grid, **SECURE)
    assert grid.times("query.masked_words") == 4
    assert grid.times("query.masked_open") == 0
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_a_second_sum_is_of_the_same_clients_or_is_not_taken(tmp_path: Path) -> None:
    grid = Heard(silent=lambda what, client, time: (what, client, time) == ("query.masked_words", 3, 1))
    found = run(tmp_path / "a", grid, **SECURE)
    assert (grid.times("query.masked_words"), grid.times("query.masked_open")) == (8, 4)
    assert found["status"] == "finished"
    assert len(found["merges"][0]["objective"]) == 1
    assert [one["client"] for one in found["failures"]] == [3]
    assert found["notes"][-1] == (
        "round 1: the first sum stays: 3 of 4 clients sent a masked network, and a masked sum needs 4 (of the same clients "
        "as the sum before); it was not unmasked"
    )


def test_a_client_gives_no_shares_for_a_second_sum_of_others_than_the_first(tmp_path: Path) -> None:
    class Greedy(Heard):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            for m in messages:
                if m.metadata.message_type == "query.masked_share" and self.times("query.masked_realign"):
                    config = m.content["config"]
                    config["parties"], config["keys"] = config["parties"][:3], config["keys"][:3]
            return super().push_messages(messages)

    grid = Greedy()
    found = run(tmp_path / "a", grid, **SECURE)
    refusals = [f["reason"] for f in found["failures"] if f["client"] is not None]
    assert len(refusals) == 4
    assert {r for r in refusals if "a second sum is of all clients of the first, or of none" in r} == set(refusals)
    assert grid.times("query.masked_words") == 4


@pytest.mark.parametrize("strategy", ["fedavg", "fedavg-retrain"])
def test_under_masks_a_mean_is_what_it_is_without(strategy: str, tmp_path: Path) -> None:
    how = {**SHORT, "strategy": strategy, "init": "shared", "retrain": "labels", "retrain_epochs": 1, "head": "none"}
    stages = [run(tmp_path / str(secure), secure=secure, **how)["stages"] for secure in (False, True)]
    assert [s["stage"] for s in stages[0] if not s["stage"].startswith("client")] == [s["stage"] for s in stages[1]]
    plain, masked = (read_model(tmp_path / str(secure) / "model.safetensors") for secure in (False, True))
    for name, tensor in plain.items():
        torch.testing.assert_close(masked[name], tensor, rtol=1e-4, atol=1e-5)


def test_two_runs_of_one_seed_write_the_same_bytes_though_their_keys_differ(tmp_path: Path) -> None:
    grids = [Heard(), Heard()]
    for name, grid in zip("ab", grids, strict=True):
        run(tmp_path / name, grid, rounds=2, **SECURE)
    for file in ("model.safetensors", "summary.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    keys = [{values(r)["config/keys"] for what, _, r in grid.heard if what == "train"} for grid in grids]
    assert len(keys[0] | keys[1]) == 16


def test_the_traffic_is_what_was_sent(tmp_path: Path) -> None:
    sizes = run(tmp_path / "a", Heard(), **SECURE, init="shared")["sizes"]
    network = sizes["parameters"]
    words = 4 * 2 * 8 * (network + 3)  # four clients, two sums; loss, accuracy and the number of images too
    assert words < sizes["bytes_up"] < words + 4 * 2 * 1000
    assert 4 * 2 * 4 * network < sizes["bytes_down"] < 4 * 2 * 4 * network + 4 * 2 * 2500


def test_a_sum_that_can_be_no_network_fails_the_round(tmp_path: Path) -> None:
    def noise(client: int, reply: Message) -> Message:
        if client == 1 and WORDS in reply.content:
            words = reply.content[WORDS][WORDS].numpy()
            words = np.append(words[:-1] + np.uint64(2**61), words[-1])
            reply.content[WORDS][WORDS] = Array(words)
        return reply

    with pytest.raises(RoundError, match="the mean of the clients is no network .*nobody sees whose fault"):
        run(tmp_path / "a", LocalGrid(4, spoil=noise), strategy="fedavg", init="shared", **SECURE)


def test_under_differential_privacy_masks_go_on_and_no_loss_is_said(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    found = run(tmp_path / "a", **{**SECURE, "timeout": 60}, dp_noise=1.0, dp_delta=1e-3)
    assert [spent["noise_multiplier"] for spent in found["privacy"]["clients"]] == [1.0] * 4
    (local,) = (row for row in rows(tmp_path / "a") if row["split"] == "local")
    assert (local["stage"], local["client"], local["loss"], local["accuracy"]) == ("client-mean", None, None, None)
    assert local["examples"] > 4
