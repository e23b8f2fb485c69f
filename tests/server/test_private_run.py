"""Runs under differential privacy: what leaves a client, what it has spent, and what is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from local_grid import LocalGrid
from short_run import rows, run
from written import contents

from fedmerge.errors import ConfigError, FedmergeError, RoundError
from fedmerge.models import Recipe
from fedmerge.tasks import METRICS, ClientTask
from server import Callback, RunConfig, _grid, read_model

PRIVATE = {"dp_epsilon": 4.0, "dp_delta": 1e-4, "local_epochs": 2, "rounds": 2, "init": "shared", "controls": "none"}


def test_a_client_tells_nothing_that_is_not_blurred_and_spends_what_it_may(tmp_path: Path) -> None:
    heard = []
    grid = LocalGrid(4, spoil=lambda client, reply: heard.append(reply) or reply)
    found = run(tmp_path / "a", grid, **PRIVATE)
    assert {kind for kind, _ in grid.asked} == {"query", "train"}  # nobody evaluates on private images
    for reply in heard:
        assert set(reply.content[METRICS]) <= {"client", "num-examples", "steps", "reach", "seconds"}
    local = [row for row in rows(tmp_path / "a") if row["split"] == "local"]
    assert len(local) == 8
    assert all(row["loss"] is None and row["accuracy"] is None for row in local)
    privacy = found["privacy"]
    assert (privacy["delta"], privacy["clip"]) == (1e-4, 1.0)
    assert [client["client"] for client in privacy["clients"]] == [0, 1, 2, 3]
    assert all(3.9 < client["epsilon"] <= 4.0 for client in privacy["clients"])


def test_who_is_asked_less_often_has_spent_less(tmp_path: Path) -> None:
    found = run(tmp_path / "a", fraction_train=0.5, seed=0, **PRIVATE)
    asked = dict.fromkeys(range(4), 0)
    for row in rows(tmp_path / "a"):
        if row["stage"] == "client" and row["split"] == "local":
            asked[row["client"]] += 1
    spent = {client["client"]: client["epsilon"] for client in found["privacy"]["clients"]}
    assert set(spent) == {client for client, times in asked.items() if times}
    assert set(asked.values()) > {1}  # some once, some twice or never
    for client, epsilon in spent.items():
        assert (epsilon > 3.9) == (asked[client] == 2)


def test_a_private_run_that_goes_on_has_the_same_bytes_and_the_same_account(tmp_path: Path) -> None:
    class Killed(Callback):
        def after_round(self, server_round, params, state, kept) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Killed()], **PRIVATE)
    run(tmp_path / "a", resume=True, **PRIVATE)
    run(tmp_path / "b", **PRIVATE)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_account_of_a_resumed_run_is_of_those_who_were_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone when the run goes on has spent what it has, and changes nobody else's account."""
    settings = {**PRIVATE, "clients": 5, "rounds": 4, "fraction_train": 0.5, "local_epochs": 1, "strategy": "fedavg"}

    class Killed(Callback):
        def after_round(self, server_round, params, state, kept) -> None:
            if server_round == 2:
                raise KeyboardInterrupt

    before = LocalGrid(5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", before, callbacks=[Killed()], **settings)
    gone = next(client for kind, client in before.asked if kind == "train")
    told = json.loads((tmp_path / "a" / "summary.json").read_text())["privacy"]["clients"]
    assert {client["client"] for client in told} == {client for kind, client in before.asked if kind == "train"}
    after = LocalGrid(5, spoil=lambda client, reply: None if client == gone else reply)
    monkeypatch.setattr(_grid.meet, "__kwdefaults__", {"timeout": 0.5})
    found = run(tmp_path / "a", after, resume=True, **settings)
    asked = Counter(client for kind, client in (*before.asked, *after.asked) if kind == "train")
    spent = {client["client"]: client["epsilon"] for client in found["privacy"]["clients"]}
    assert spent.keys() == asked.keys()
    assert gone in spent
    by_rounds = {asked[client]: epsilon for client, epsilon in spent.items()}
    assert all(spent[client] == by_rounds[times] for client, times in asked.items())
    assert [by_rounds[times] for times in sorted(by_rounds)] == sorted(set(spent.values()))


def test_a_failed_run_says_what_was_spent(tmp_path: Path) -> None:
    grid = LocalGrid(4)

    def silent(client: int, reply: Message) -> Message | None:
        return None if len([kind for kind, _ in grid.asked if kind == "train"]) > 4 else reply

    grid.spoil = silent
    with pytest.raises(RoundError, match="round 2 got 0 usable replies"):
        run(tmp_path / "a", grid, timeout=1, **PRIVATE)
    spent = json.loads((tmp_path / "a" / "summary.json").read_text())["privacy"]["clients"]
    assert [client["client"] for client in spent] == [0, 1, 2, 3]
    assert all(3.9 < client["epsilon"] <= 4.0 for client in spent)  # both rounds asked them


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dp-epsilon": 0}, "dp-epsilon = 0: nothing can be learned without spending any"),
        ({"dp-epsilon": 1, "dp-noise": 1}, "both say how much noise"),
        ({"dp-noise": -0.5}, "dp-noise = -0.5; expected 0"),
        ({"dp-epsilon": 1, "strategy": "qfedavg", "init": "shared"}, "qfedavg reads the losses of clients"),
    ],
)
def test_a_configuration_that_cannot_be_private_is_refused_in_a_line(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        RunConfig.parse(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dp_delta": 0.01}, "delta is 0.01 with"), ({"model": "resnet20", "width": 0.25}, "BatchNorm cannot support")],
)
def test_a_run_that_cannot_be_private_asks_nobody(tmp_path: Path, settings: dict, said: str) -> None:
    grid = LocalGrid(4)
    with pytest.raises(FedmergeError, match=said):
        run(tmp_path / "a", grid, **{**PRIVATE, **settings})
    assert not grid.asked
    assert said in json.loads((tmp_path / "a" / "summary.json").read_text())["status"]


def test_noise_of_the_seed_can_be_taken_off_and_secret_noise_cannot() -> None:
    """Who knows the task trains on no image at all, and so draws the noise that the client drew."""
    task = ClientTask(
        dataset="digits", model="mlp", width=8, clients=4, dp_noise=5.0, dp_delta=1e-3, init="shared", local_epochs=1
    )
    task = replace(task, training=Recipe(lr=1.0, momentum=0.0, batch_size=10**6))  # one step
    start = task.network().state_dict()
    images = task.split().client(0)

    def noisy(task: ClientTask, **how: bool) -> torch.Tensor:
        params = task.train(0, start, images=images, **how)[0].params
        return torch.cat([(start[name] - value).flatten() for name, value in params.items()]) * len(images)

    clean = noisy(replace(task, dp_noise=0.0))
    drawn = noisy(task) - clean
    assert torch.equal(noisy(task), noisy(task))
    assert float(drawn.std()) == pytest.approx(5.0, rel=0.05)
    for how in ({"task": replace(task, secret_noise=True)}, {"task": task, "secret_noise": True}):
        one, other = noisy(**how) - clean, noisy(**how) - clean
        for a, b in ((one, other), (one, drawn)):
            # Of independent draws; six deviations, for these are others each time.
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / len(a) ** 0.5
        assert float(one.std()) == pytest.approx(5.0, rel=6 / (2 * len(one)) ** 0.5)


@pytest.mark.parametrize("by_owner", [True, False])
def test_an_owner_or_the_run_asks_for_secret_noise(by_owner: bool, tmp_path: Path) -> None:
    def grid() -> LocalGrid:
        made = LocalGrid(2)
        made.node_config = {"secret-noise": True} if by_owner else {}
        return made

    given = {"clients": 2, "dp_noise": 1.0, "dp_delta": 1e-3, "init": "shared", "controls": "none", "head": "none"}
    found = [
        run(tmp_path / name, grid(), secret_noise=not by_owner, strategy="fedavg", local_epochs=1, **given)
        for name in ("a", "b")
    ]
    assert found[0]["privacy"] == found[1]["privacy"]
    a, b = (read_model(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert not any(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("secret", [True, False])
def test_a_round_that_was_cut_off_counts_for_whom_it_asked_and_again_where_the_noise_is_another(
    secret: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone when the run goes on had been asked for the second round, too."""

    def kill(client: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train" and before.asked.count(("train", client)) == 2:
            raise KeyboardInterrupt
        return reply

    given = {**PRIVATE, "dp_epsilon": -1, "dp_noise": 1.0, "secret_noise": secret, "local_epochs": 1, "rounds": 2}
    given |= {"strategy": "fedavg", "min_replies": 1}
    before = LocalGrid(4, spoil=kill)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", before, **given)
    told = json.loads((tmp_path / "a" / "summary.json").read_text())["privacy"]["clients"]
    after = LocalGrid(4, spoil=lambda client, reply: None if client == 3 else reply)
    monkeypatch.setattr(_grid.meet, "__kwdefaults__", {"timeout": 0.5})
    found = run(tmp_path / "a", after, resume=True, **given)
    task = RunConfig.read(tmp_path / "a" / "config.toml").client_task()
    held = [len(rows) for rows in task.split().clients]
    assert [c["epsilon"] for c in told] == [task.spent(n, 2) for n in held]
    times = [3, 3, 3, 2] if secret else [2, 2, 2, 2]
    assert [c["epsilon"] for c in found["privacy"]["clients"]] == [
        task.spent(n, rounds) for n, rounds in zip(held, times, strict=True)
    ]
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_rounds_of_secret_noise_stay_told_where_their_checkpoint_is_gone(tmp_path: Path) -> None:
    given = {**PRIVATE, "dp_epsilon": -1, "dp_noise": 1.0, "secret_noise": True, "local_epochs": 1, "rounds": 3}

    class Killed(Callback):
        def after_round(self, server_round, params, state, kept) -> None:
            if server_round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Killed()], **given)
    (tmp_path / "a" / "checkpoint" / "last.safetensors").unlink()
    found = run(tmp_path / "a", resume=True, **given)
    told = run(tmp_path / "b", **{**given, "rounds": 5})  # two rounds, and then three
    assert found["privacy"]["clients"] == told["privacy"]["clients"]
