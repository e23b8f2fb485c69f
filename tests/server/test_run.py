"""Whole runs over an in-process grid: real apps, real data, real training."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from local_grid import LocalGrid
from short_run import accuracy, rows, run

import strategies
from fedmerge import aligners, average, evaluate, running_averages
from fedmerge.errors import ConfigError, RoundError
from fedmerge.models import Recipe
from fedmerge.pipeline import reference_client
from fedmerge.streams import torch_stream
from fedmerge.tasks import ARRAYS, METRICS, ClientTask, Setup, device_of
from fedmerge.training import train
from server import RunConfig, read_model

pytestmark = pytest.mark.usefixtures("no_collections")


def test_one_shot_merging_shows_every_stage_and_control(tmp_path: Path) -> None:
    found = run(tmp_path / "a", controls="all", repair="repair", local_epochs=8)
    stages = [s["stage"] for s in found["stages"]]
    assert stages == [
        "client-mean", "client-best", "ensemble", "plain-average", "merged-paper-start", "merged", "repaired",
        "retrained", "head", "plain-average-retrained", "client-best-retrained", "public-retrained", "public-only", "public-only-n", "centralised",
        "fedavg", "ensemble-taught",
    ]  # fmt: skip
    assert accuracy(found, "plain-average") < accuracy(found, "merged")
    assert accuracy(found, "centralised") > accuracy(found, "client-mean")
    assert found["status"] == "finished"
    assert (found["asked"], found["answered"], found["failures"]) == (4, 4, [])
    assert [m["name"] for m in found["merges"]] == ["merge-many-paper", "merge-many"]
    curve = found["interpolation"]
    assert len(curve["alphas"]) == 11
    assert min(curve["aligned"]["accuracy"]) > min(curve["naive"]["accuracy"])
    assert sum(map(sum, found["labels"].values())) == 1797
    network = sum(t.numel() * 4 for t in read_model(tmp_path / "a" / "model.safetensors").values())
    sums = (16 + 1) * (16 + 1 + 10) * 8  # for the head: features and a one, by themselves and by the ten classes
    assert found["sizes"]["bytes_up"] == 4 * (network + sums)


def test_the_written_model_is_the_last_stage(tmp_path: Path) -> None:
    found = run(tmp_path / "a")
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    split = config.setup().split()
    params = read_model(tmp_path / "a" / "model.safetensors")
    model = config.setup().network()
    assert evaluate(model, params, split.test_images).accuracy == accuracy(found, "head")
    assert len(list((tmp_path / "a" / "clients").glob("round-1-client-*.safetensors"))) == 4
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_two_runs_of_one_seed_write_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "a", rounds=2)
    run(tmp_path / "b", rounds=2)
    files = ["model.safetensors", "summary.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    run(tmp_path / "c", rounds=2, seed=1)
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_batch_norm_counters_stay_integers_through_fedavg(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    from PIL import Image

    for c in range(3):
        (folder / str(c)).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) // 2 + 40 * c
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(c) / f"{i}.png")
    found = run(
        tmp_path / "a",
        dataset=str(folder),
        model="resnet20",
        width=0.25,
        clients=2,
        strategy="fedadam",
        init="shared",
        rounds=2,
        local_epochs=1,
        server_average="swa",
    )
    for name in ("model", "averaged"):
        params = read_model(tmp_path / "a" / f"{name}.safetensors")
        counters = [v for k, v in params.items() if k.endswith("num_batches_tracked")]
        assert counters
        assert all(c.dtype == torch.int64 and int(c) > 0 for c in counters)
        assert all((v > 0).all() for k, v in params.items() if k.endswith("running_var"))
    assert found["status"] == "finished"


@pytest.mark.parametrize("strategy", strategies.STRATEGIES)
def test_every_strategy_runs_two_rounds_with_one_broken_client(strategy: str, tmp_path: Path) -> None:
    def spoil(client: int, reply: Message) -> Message:
        if client == 2 and ARRAYS in reply.content:
            name = next(iter(reply.content[ARRAYS]))
            reply.content[ARRAYS][name] = Array(reply.content[ARRAYS][name].numpy() * np.nan)
        return reply

    given = {
        "bulyan": "num_malicious_nodes=0", "qfedavg": "client_learning_rate=0.1",
        "dp-fedavg": "noise_multiplier=0.01, clipping_norm=10",
    }  # fmt: skip
    options = given.get(strategy, "")
    grid = LocalGrid(4, spoil=spoil)
    found = run(
        tmp_path / "a",
        grid,
        strategy=strategy,
        strategy_options=options,
        init="shared",
        rounds=2,
        controls="none",
        local_epochs=4,
    )
    assert found["status"] == "finished"
    assert [(f["round"], f["client"]) for f in found["failures"]] == [(1, 2), (2, 2)]
    assert "holds NaN or infinite values" in found["failures"][0]["reason"]
    assert found["stages"][-1]["accuracy"] > (0.15 if strategy == "fedyogi" else 0.45)  # its own rates are that small
    assert {r["round"] for r in rows(tmp_path / "a")} == {1, 2}


def test_a_broken_client_changes_nothing_for_the_others(tmp_path: Path) -> None:
    def spoil(client: int, reply: Message) -> Message | None:
        return None if client == 3 and ARRAYS in reply.content else reply

    run(tmp_path / "a", LocalGrid(4, spoil=spoil), timeout=0.5)
    trained = {int(p.stem.split("-")[-1]): read_model(p) for p in (tmp_path / "a" / "clients").iterdir()}
    assert sorted(trained) == [0, 1, 2]
    run(tmp_path / "b")
    for i in trained:
        whole = read_model(tmp_path / "b" / "clients" / f"round-1-client-{i}.safetensors")
        torch.testing.assert_close(trained[i], whole, rtol=0, atol=0)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert {"round": 1, "client": 3, "reason": "no reply in time"} in summary["failures"]


def test_too_few_replies_fail_the_round_and_leave_what_was_finished(tmp_path: Path) -> None:
    rounds = {"n": 0}

    def spoil(client: int, reply: Message) -> Message:
        if ARRAYS in reply.content and client != 0:
            rounds["n"] += 1
            if rounds["n"] > 3:  # from round 2 on
                reply.content[METRICS]["num-examples"] = 1.5
        return reply

    with pytest.raises(
        RoundError, match=r"round 2 got 1 usable replies of 4, expected at least 3: client 1: .*num-examples"
    ):
        run(tmp_path / "a", LocalGrid(4, spoil=spoil), rounds=3, min_replies=3)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["status"].startswith("failed: round 2 got 1 usable replies")
    assert {r["round"] for r in rows(tmp_path / "a")} == {1}
    assert (tmp_path / "a" / "checkpoint" / "last.safetensors").exists()


AVERAGED = {"strategy": "fedavg", "init": "shared", "controls": "none"}


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """FedAvg of one, two and three rounds."""
    paths = [tmp_path_factory.mktemp("fedavg") / str(rounds) for rounds in (1, 2, 3)]
    for rounds, path in enumerate(paths, 1):
        run(path, rounds=rounds, **AVERAGED)
    return paths


@pytest.mark.parametrize("name", running_averages())
def test_the_global_network_is_averaged_over_the_rounds_beside_the_run(
    name: str, tmp_path: Path, fedavg: list[Path]
) -> None:
    options = {"lawa": "latest=2", "ema": "decay=0.5"}.get(name, "")
    found = run(tmp_path / "a", rounds=3, server_average=name, server_average_options=options, **AVERAGED)
    rounds = [read_model(path / "model.safetensors") for path in fedavg]
    weights = {"swa": [1, 1, 1], "ema": [0.25, 0.25, 0.5], "lawa": [0, 1, 1]}[name]
    averaged = read_model(tmp_path / "a" / "averaged.safetensors")
    torch.testing.assert_close(averaged, average(rounds, weights), rtol=1e-5, atol=1e-6)
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    test = config.setup().split().test_images
    assert accuracy(found, "averaged") == evaluate(config.setup().network(), averaged, test).accuracy
    assert [r["round"] for r in rows(tmp_path / "a") if r["stage"] == "averaged"] == [1, 2, 3]
    assert rows(fedavg[-1]) == [r for r in rows(tmp_path / "a") if r["stage"] != "averaged"]


@pytest.mark.parametrize("merger", ["task-arithmetic", "ties"])
def test_steps_are_added_to_what_the_clients_were_sent_in_that_round(merger: str, tmp_path: Path) -> None:
    settings = {"merger": merger, "init": "shared", "repair": "none", "retrain": "none", "partition": "dirichlet"}
    run(tmp_path / "one", rounds=1, **settings)
    run(tmp_path / "two", rounds=2, **settings)
    config = RunConfig.read(tmp_path / "one" / "config.toml")
    examples = np.array([len(c) for c in config.setup().split().clients], dtype=float)
    weights = examples / examples.sum()
    bases = [config.setup().network().state_dict(), read_model(tmp_path / "one" / "model.safetensors")]
    for r, (base, path) in enumerate(zip(bases, ("one", "two"), strict=True), 1):
        clients = [read_model(tmp_path / path / "clients" / f"round-{r}-client-{i}.safetensors") for i in range(4)]
        names = list(base)
        origin = torch.cat([base[k].flatten() for k in names]).double().numpy()
        steps = np.stack([torch.cat([c[k].flatten() for k in names]).double().numpy() for c in clients]) - origin
        if merger == "ties":
            for step in steps:
                step[np.abs(step) < np.sort(np.abs(step))[-round(0.2 * len(step))]] = 0  # equals are kept
            agree = (np.sign(steps) == np.sign(weights @ steps)) & (steps != 0)
            share = (weights[:, None] * agree).sum(0)
            step = (weights[:, None] * steps * agree).sum(0) / np.where(share > 0, share, 1)
        else:
            step = weights @ steps
        found = read_model(tmp_path / path / "model.safetensors")
        got = torch.cat([found[k].flatten() for k in names]).double().numpy()
        np.testing.assert_allclose(got, origin + step, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_clients_is_asked_in_each_round(tmp_path: Path) -> None:
    grid = LocalGrid(4)
    run(tmp_path / "a", grid, rounds=3, fraction_train=0.5, strategy="fedavg", init="shared")
    trained = [client for kind, client in grid.asked if kind.startswith("train")]
    assert len(trained) == 6
    assert len(set(trained)) > 2  # not the same two each time


def test_nodes_that_this_run_does_not_need_are_left_alone(tmp_path: Path) -> None:
    grid = LocalGrid(7)
    run(tmp_path / "a", grid, clients=3)
    assert {client for kind, client in grid.asked if kind.startswith("train")} == {0, 1, 2}


def test_clients_evaluate_on_their_own_images_unless_told_not_to(tmp_path: Path) -> None:
    for path, local in (("a", True), ("b", False)):
        grid = LocalGrid(4)
        run(tmp_path / path, grid, head="none", local_evaluation=local)
        assert any(kind.startswith("evaluate") for kind, _ in grid.asked) is local
        assert (summary := json.loads((tmp_path / path / "summary.json").read_text()))["failures"] == []
        found = [row for row in rows(tmp_path / path) if row["stage"] == "global"]
        assert [row["client"] for row in found] == list(range(4)) * local
        assert all(row["split"] == "local" and row["examples"] > 0 and 0 < row["accuracy"] < 1 for row in found)
        assert summary["sizes"]["bytes_down"] == (1 + local) * summary["sizes"]["bytes_up"] > 0


def test_missing_nodes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import _grid

    monkeypatch.setattr(_grid.meet, "__kwdefaults__", {"timeout": 0.3})
    with pytest.raises(RoundError, match=r"2 of 4 clients connected within 0 s"):
        run(tmp_path / "a", LocalGrid(2))


def test_nodes_are_counted_once_their_number_settles() -> None:
    from server._grid import connected

    assert connected(LocalGrid(3), settle=0.1) == 3
    with pytest.raises(RoundError, match="no client connected within 0 s; start SuperNodes"):
        connected(LocalGrid(0), settle=0.1, timeout=0.2)


def test_nodes_that_fail_to_say_who_they_are_are_named(tmp_path: Path) -> None:
    from flwr.clientapp import ClientApp

    silent = ClientApp()

    @silent.query()
    def query(message, context):
        raise ImportError("no module named torch")

    with pytest.raises(
        RoundError, match=r"no node answers for client 0 \(4 of 4 missing\): node \d+: ImportError: no mod"
    ):
        run(tmp_path / "a", LocalGrid(4, app=silent))


@pytest.mark.parametrize(
    ("reference", "retrain", "merger"),
    [("best", "distill", "merge-many"), ("2", "both", "merge-many-paper"), ("largest", "none", "average")],
)
def test_each_step_can_be_chosen_or_switched_off(reference: str, retrain: str, merger: str, tmp_path: Path) -> None:
    repair = "none" if merger == "average" else "recompute"
    found = run(tmp_path / "a", reference=reference, retrain=retrain, merger=merger, repair=repair, partition="shards")
    stages = [s["stage"] for s in found["stages"]]
    assert ("retrained" in stages) == (retrain != "none")
    assert ("repaired" in stages) == (repair != "none")


@pytest.mark.parametrize("aligner", aligners())
def test_every_aligner_serves_a_run(aligner: str, tmp_path: Path) -> None:
    found = run(tmp_path / "a", clients=2, aligner=aligner, restarts=1, local_epochs=6, retrain="none", head="none")
    assert accuracy(found, "merged") > accuracy(found, "plain-average")


def test_a_reference_that_is_no_client_is_named_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference = '9': expected largest, best or a client, 0 to 3"):
        run(tmp_path / "a", reference="9")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("strategy", ["merge-many", "papa", "fedma"])
def test_for_a_reference_that_does_not_answer_the_largest_stands_in_and_the_record_says_so(
    strategy: str, tmp_path: Path
) -> None:
    results = [SimpleNamespace(client=client, examples=client) for client in (0, 2)]
    assert reference_client("1", results, None) == 1  # type: ignore[arg-type]
    grid = LocalGrid(3)
    trained: list[int] = []  # client 1 is silent in round 2

    def silent(client: int, reply: Message) -> Message | None:
        if ARRAYS not in reply.content or "train" not in reply.metadata.message_type:
            return reply
        trained.append(client)
        return None if client == 1 and len(trained) > 3 else reply

    grid.spoil = silent
    small = {"clients": 3, "rounds": 2, "timeout": 1, "local_epochs": 1, "controls": "none", "retrain": "none"}
    found = run(tmp_path / "a", grid, strategy=strategy, reference="1", **small)
    assert found["status"] == "finished"
    assert [(f["round"], f["client"]) for f in found["failures"] if "evaluation" not in f["reason"]] == [(2, 1)]
    (note,) = (note for note in found["notes"] if "reference" in note)
    assert note.startswith("round 2: ")
    assert note.endswith("client 1, the reference, did not answer: aligned to the one with the most images")


def test_a_task_survives_its_message_and_a_missing_key_is_named() -> None:
    task = ClientTask(server_round=3, local_epochs=4, training=Recipe(lr=0.5, epochs=4), partition="shards")
    assert ClientTask.from_config({**task.to_config(), "server-round": 3, "other": 1}) == task
    with pytest.raises(ConfigError, match="the server's message lacks 'model'"):
        ClientTask.from_config({k: v for k, v in task.to_config().items() if k != "model"})


def test_independent_initialisations_differ_and_the_shared_one_does_not() -> None:
    setup = Setup()
    a, b, server = (setup.network(c).state_dict()["fc1.weight"] for c in (0, 1, None))
    assert not torch.equal(a, b)
    assert not torch.equal(a, server)
    assert torch.equal(server, setup.network().state_dict()["fc1.weight"])


def test_pretrained_clients_begin_at_a_network_that_saw_the_public_images(tmp_path: Path) -> None:
    settings = {"init": "pretrained", "pretrain_epochs": 7, "strategy": "fedavg"}
    settings |= {"controls": "public-only", "retrain": "none"}
    found = run(tmp_path / "a", **settings)
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    setup, split = config.setup(), config.setup().split()
    network, public = setup.network(), split.public_images
    start = train(
        network, network.state_dict(), public, recipe=config.recipe(), epochs=7,
        generator=torch_stream(config.seed, "retrain", 0),
    ).params  # fmt: skip
    first = rows(tmp_path / "a")[0]
    assert (first["round"], first["stage"], first["split"]) == (0, "pretrained", "test")
    assert first["accuracy"] == evaluate(network, start, split.test_images).accuracy > 0.3
    assert found["stages"][0]["accuracy"] == first["accuracy"]
    for i in range(4):
        sent = read_model(tmp_path / "a" / "clients" / f"round-1-client-{i}.safetensors")
        torch.testing.assert_close(sent, config.client_task().train(i, start)[0].params)
    # As many images as a client saw in its 2 epochs, and those of the pretraining; nothing is retrained.
    epochs = round((2 * np.mean([len(c) for c in split.clients]) + 7 * len(public)) / len(public))
    alone = train(
        network, network.state_dict(), public, recipe=config.recipe(), epochs=epochs,
        generator=torch_stream(config.seed, "public-only"),
    )  # fmt: skip
    assert accuracy(found, "public-only") == evaluate(network, alone.params, split.test_images).accuracy


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="device 'tpu': expected auto, cpu or cuda"):
        device_of("tpu")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="torch sees no GPU; use --device cpu or auto"):
        device_of("cuda")


def test_public_images_are_seen_as_long_under_masks_as_without(tmp_path: Path) -> None:
    settings = {"strategy": "fedavg-retrain", "init": "shared", "retrain": "labels", "head": "none", "rounds": 2}
    controls = ("public-only", "public-only-n")
    plain, masked = (
        run(tmp_path / str(secure), controls=", ".join(controls), secure=secure, keep_clients=False, **settings)
        for secure in (False, True)
    )
    for control in controls:
        assert accuracy(masked, control) == accuracy(plain, control)
