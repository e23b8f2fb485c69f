"""Teacher, unlabelled public images and analytic head in a run: federated, counted, fair, and checked like any reply."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from local_grid import LocalGrid
from safetensors.torch import load_file
from short_run import QUICK, accuracy, run
from sklearn.linear_model import Ridge
from torch import nn

import fedmerge as fm
from fedmerge.errors import DataError, RoundError
from fedmerge.heads import STRENGTHS
from fedmerge.pipeline import retrain_on_public
from fedmerge.streams import numpy_stream
from fedmerge.teachers import teach
from server import Callback, Run, RunConfig, RunDirectory, World

HEADED: dict[str, Any] = {
    "head": "analytic", "teacher": "stacked", "public_fraction": 0.2, "public_labels": 60, "clients": 3,
    "local_evaluation": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], LocalGrid]:
    path, grid = tmp_path_factory.mktemp("headed") / "run", LocalGrid(3)
    return path, run(path, grid, **HEADED, controls="best-client-retrain, public-retrain, ensemble"), grid


def check_ridge(path: Path, summary: dict[str, Any]) -> None:
    """The last layer is the ridge regression of the pooled private features, scaled."""
    config = RunConfig.read(path / "config.toml")
    split, model = config.setup().split(), config.setup().network()
    found = load_file(path / "model.safetensors")
    model.load_state_dict(found)
    features: list[torch.Tensor] = []
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].double()))
    labels = []
    with torch.no_grad():
        for client in range(3):
            images = split.client(client)
            model(images.normalise(images.images))
            labels.append(images.labels)
    z, y = torch.cat(features), nn.functional.one_hot(torch.cat(labels), 10).double()
    (said,) = (note for note in summary["notes"] if note.startswith("head"))
    strength = float(said.split("at strength ")[1].split()[0])
    assert strength in STRENGTHS
    ridge = Ridge(alpha=strength * float(z.square().sum(0).mean())).fit(z.numpy(), y.numpy())
    ours, theirs = found["out.weight"].double(), torch.from_numpy(ridge.coef_)
    scale = float((ours * theirs).sum() / theirs.square().sum())
    torch.testing.assert_close(ours / scale, theirs, rtol=1e-5, atol=1e-6)  # float32 in the file
    bias = found["out.bias"].double() / scale
    torch.testing.assert_close(bias, torch.from_numpy(ridge.intercept_), rtol=1e-5, atol=1e-6)
    assert f" of 3 clients, {len(z)} images" in said


def test_the_head_of_a_federation_is_the_ridge_regression_of_the_pooled_private_features(headed) -> None:
    check_ridge(*headed[:2])


MASKED = {
    "secure": True, "clients": 3, "local_epochs": 2, "public_fraction": 0.2, "repair": "none", "controls": "none",
    "aligner": "weight-matching", "timeout": 0.3,
}  # fmt: skip


def test_under_masks_it_is_too_and_no_client_tells_its_sums(tmp_path: Path) -> None:
    told: list[tuple[str, set[str], int]] = []

    def hear(client: int, reply: Message) -> Message:
        records = {name: set(record) for name, record in reply.content.items()}
        size = len(reply.content["words"]["words"].data) if "words" in records else 0
        told.append((reply.metadata.message_type, set(records), size))
        return reply

    summary = run(tmp_path, LocalGrid(3, spoil=hear), **MASKED)
    check_ridge(tmp_path, summary)
    assert "head from the masked sum of 3 clients" in " ".join(summary["notes"])
    assert RunConfig.read(tmp_path / "config.toml").head == "analytic"  # by default
    began = next(i for i, (kind, *_) in enumerate(told) if kind == "query.masked_head")
    kinds = [kind for kind, *_ in told[began:]]
    assert kinds == [f"query.masked_{what}" for what in ("head", "share", "words", "open") for _ in range(3)]
    assert not [records for _, records, _ in told if "arrays" in records]
    width = 16 + 1
    (size,) = {size for kind, _, size in told[began:] if kind == "query.masked_words"}
    assert 8 * (width * width + width * 10 + 1) <= size < 8 * (width * width + width * 10 + 1) + 200


def test_under_masks_its_messages_are_counted_once(tmp_path: Path) -> None:
    settings = {**MASKED, "retrain": "none", "local_epochs": 1, "secure_sums": 1}
    found = [run(tmp_path / head, head=head, **settings)["sizes"] for head in ("analytic", "none")]
    model, words = 3 * 4 * found[0]["parameters"], 3 * 8 * (17 * 17 + 17 * 10 + 1)
    for key, size in (("bytes_down", model), ("bytes_up", words)):
        more = found[0][key] - found[1][key]
        assert size < more < 1.5 * size, key  # keys and shares beside it


def test_under_masks_it_stays_where_clients_leave_and_a_second_sum_of_fewer_is_refused(tmp_path: Path) -> None:
    asked: list[str] = []

    def leaving(after: int) -> Any:
        def spoil(client: int, reply: Message) -> Any:
            if client == 1 and reply.metadata.message_type == "query.masked_head":
                asked.append(reply.metadata.message_type)
                return None if len(asked) > after else reply
            return reply

        return spoil

    few = run(tmp_path / "few", LocalGrid(3, spoil=leaving(0)), min_replies=3, **MASKED)
    (note,) = (note for note in few["notes"] if note.startswith("head"))
    assert note.startswith("head as it was: round 1: 2 of 3 clients sent keys, and a masked sum needs 3")
    assert accuracy(few, "head") == accuracy(few, "retrained")
    assert few["status"] == "finished"
    asked.clear()
    config = RunConfig.parse({k.replace("_", "-"): v for k, v in {**QUICK, **MASKED, "min_replies": 2}.items()})
    whole = Run(config, RunDirectory.open(tmp_path / "whole", config))
    whole.execute(LocalGrid(3, spoil=leaving(1)))
    like = fm.head_sums(whole.world.model, whole.params, whole.world.split.public_images)
    with pytest.raises(RoundError, match="0 of 3 clients sent shares"):  # of two sums, the difference is a client's
        whole.world.masked(whole.params, like)


def test_what_controls_go_through_is_what_the_merge_goes_through(headed) -> None:
    path, summary, grid = headed
    titles = {s["stage"]: s["title"] for s in summary["stages"]}
    assert titles["client-best-retrained"] == "Best client + retrain + head"
    assert titles["public-retrained"] == "Public labels + retrain + head"
    assert titles["head"] == "+ head"
    asked = [kind for kind, _ in grid.asked if "head" in kind]
    assert asked == ["query.head_sums"] * 9  # three networks, three clients
    # Random features of a narrow network trained for two epochs: without the sums this is far away.
    assert min(accuracy(summary, s) for s in ("client-best-retrained", "public-retrained", "head")) > 0.5
    assert accuracy(summary, "retrained") < 0.5
    assert accuracy(summary, "ensemble-taught") > accuracy(summary, "ensemble")
    assert (
        accuracy(summary, "head")
        == [
            json.loads(line)["accuracy"]
            for line in (path / "metrics.jsonl").read_text().splitlines()
            if '"head"' in line
        ][-1]
    )


def test_a_network_of_the_public_labels_is_trained_in_as_many_passes_as_a_client(tmp_path: Path) -> None:
    settings = {"clients": 2, "local_evaluation": False, "head": "none", "retrain": "labels", "repair": "none",
                "merger": "average", "controls": "public-retrain"}  # fmt: skip
    told = run(tmp_path, rounds=2, local_epochs=1, lr=0.3, **settings)
    world = World(RunConfig.read(tmp_path / "config.toml"), Callback())
    begun = retrain_on_public(world.start, (), bench=world.bench, how="labels", server_round=0)  # 2 passes
    found = retrain_on_public(begun, (), bench=world.bench, how="labels", server_round=2)
    assert accuracy(told, "public-retrained") == fm.evaluate(world.model, found, world.split.test_images).accuracy


def test_the_messages_of_the_head_are_counted(headed, tmp_path: Path) -> None:
    _, summary, _ = headed
    without = run(tmp_path / "run", **{**HEADED, "head": "none", "controls": "none"})
    model = 4 * summary["sizes"]["parameters"]
    width = 16 + 1
    sizes = [{key: s["sizes"][key] for key in ("bytes_up", "bytes_down")} for s in (summary, without)]
    assert sizes[0]["bytes_down"] - sizes[1]["bytes_down"] == 3 * model
    assert sizes[0]["bytes_up"] - sizes[1]["bytes_up"] == 3 * 8 * (width * width + width * 10)


def _sums(change: Any) -> Any:
    def spoil(client: int, reply: Message) -> Any:
        if client == 1 and "gram" in reply.content.get("arrays", {}):
            sums = {k: v.numpy().copy() for k, v in reply.content["arrays"].items()}
            change(sums, reply)
            reply.content["arrays"] = ArrayRecord({k: torch.from_numpy(np.asarray(v)) for k, v in sums.items()})
        return reply

    return spoil


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sums, reply: sums.update(gram=sums["gram"][:5, :5].copy()), "'gram' has shape"),
        (lambda sums, reply: sums["cross"].__setitem__((0, 0), np.nan), "'cross' holds NaN"),
        (lambda sums, reply: sums["gram"].__setitem__((0, 1), 1e6), "not symmetric"),
        (lambda sums, reply: sums["gram"].__setitem__((2, 2), -1e4), "a square is negative"),
        (lambda sums, reply: sums["gram"].__setitem__((-1, -1), 7), "the sums are not of its"),
        (lambda sums, reply: sums["cross"].__setitem__((0, 0), 1e3), "by class and over all classes differ"),
        (lambda sums, reply: (sums["gram"][:-1].__imul__(1e4), sums["gram"][:, :-1].__imul__(1e4),
                              sums["cross"][:-1].__imul__(1e4)), "mean square is more than 10000 times"),
        (lambda sums, reply: sums.update(more=np.zeros(1)), "expected gram and cross"),
        (lambda sums, reply: reply.content["metrics"].__setitem__("num-examples", 10**6), "'num-examples' is 1000000"),
    ],
)  # fmt: skip
def test_sums_that_are_of_no_images_are_left_out_and_named(change: Any, reason: str, tmp_path: Path) -> None:
    settings = {**HEADED, "clients": 2, "local_epochs": 1, "retrain": "none", "restarts": 1, "controls": "none"}
    summary = run(tmp_path / "run", LocalGrid(2, spoil=_sums(change)), **settings)
    (failure,) = summary["failures"]
    assert (failure["client"], failure["reason"][:6]) == (1, "head: ")
    assert reason in failure["reason"]
    assert any(note.startswith("head from the sums of 1 client,") for note in summary["notes"])


CONVOLVED = """
from torch import nn

class Convolved(nn.Sequential):
    def __init__(self, classes, in_shape):
        super().__init__(nn.Conv2d(in_shape[0], classes, in_shape[1:]), nn.Flatten())
"""


def test_a_network_keeps_its_head_where_it_has_no_linear_one_and_where_too_few_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**HEADED, "local_epochs": 1, "retrain": "none", "restarts": 1, "controls": "none"}

    def silent(client: int, reply: Message) -> Any:
        return None if "gram" in reply.content.get("arrays", {}) and client else reply

    summary = run(tmp_path / "few", LocalGrid(3, spoil=silent), min_replies=2, timeout=0.3, **settings)
    assert "head as it was: 1 usable sums of 3, and min-replies is 2" in summary["notes"]
    assert accuracy(summary, "head") == accuracy(summary, "repaired")
    (tmp_path / "convolved_network.py").write_text(CONVOLVED)
    monkeypatch.syspath_prepend(tmp_path)
    without = run(
        tmp_path / "none", model="convolved_network:Convolved", width=0, **{**settings, "aligner": "weight-matching"}
    )
    (note,) = without["notes"]
    assert note.startswith("head as it was: Convolved does not end in a linear layer")


def test_a_teacher_without_enough_labels_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    grid = LocalGrid(3)
    with pytest.raises(DataError, match="'stacked' needs two labelled images of one class; of the 288 public images 9"):
        run(tmp_path / "run", grid, **{**HEADED, "public_labels": 9})
    assert grid.asked == []


def test_clients_say_their_label_counts_only_where_the_teacher_needs_them(tmp_path: Path) -> None:
    said: list[Any] = []

    def watch(client: int, reply: Message) -> Any:
        if reply.metadata.message_type == "train":
            said.append(reply.content["metrics"].get("label-counts"))
            if client == 2 and said[-1]:
                reply.content["metrics"]["label-counts"] = [1] * 10
        return reply

    settings = {"clients": 3, "local_epochs": 1, "controls": "none", "restarts": 1, "partition": "dirichlet"}
    summary = run(tmp_path / "counted", LocalGrid(3, spoil=watch), teacher="by-class", **settings)
    expected = summary["labels"]
    assert sorted(said) == sorted(expected[f"client {i}"] for i in range(3))
    (failure,) = summary["failures"]
    assert (failure["client"], failure["reason"]) == (
        2, f"metric 'label-counts' adds up to 10, expected its {sum(expected['client 2'])} images",
    )  # fmt: skip
    plain = {"strategy": "fedavg", "init": "shared", "teacher": "by-class"}  # which has no teacher
    for i, other in enumerate(({"teacher": "mean"}, {"teacher": "by-class", "retrain": "labels"}, plain)):
        said.clear()
        run(tmp_path / str(i), LocalGrid(3, spoil=watch), **{**settings, **other})
        assert said == [None] * 3
    said.clear()
    run(tmp_path / "control", LocalGrid(3, spoil=watch), **{**settings, **plain, "controls": "ensemble"})
    assert None not in said
    assert fm.data.load("digits").classes == tuple(summary["classes"])


def test_a_merger_that_learns_from_the_teacher_gets_what_the_runs_teacher_says(tmp_path: Path) -> None:
    settings = {"clients": 3, "local_epochs": 1, "controls": "none", "restarts": 1, "partition": "dirichlet", "retrain": "none",
                "repair": "none", "reference": "0", "aligner": "weight-matching", "public_labels": 60}  # fmt: skip
    run(tmp_path, teacher="by-class", merger="learned-coefficients", **settings)
    setup = RunConfig.read(tmp_path / "config.toml").setup()
    split, network = setup.split(), setup.network()
    models = [load_file(tmp_path / "clients" / f"round-1-client-{i}.safetensors") for i in range(3)]
    taught = teach(
        "by-class", network, models, split.public_images, counts=[split.client(i).counts() for i in range(3)]
    )
    public = split.public_images
    found = fm.merge(
        models, spec=fm.perm_spec(network, (public.normalise(public.images[:2]),)), method="learned-coefficients",
        weights=[len(rows) for rows in split.clients], rng=numpy_stream(0, "merge", 1), reference=0, restarts=1,
        aligner="weight-matching", model=network, data=public, target=taught.on_public,
    )  # fmt: skip
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), found.params, rtol=0, atol=0)
    plain = fm.merge(
        models, spec=fm.perm_spec(network, (public.normalise(public.images[:2]),)), rng=numpy_stream(0, "merge", 1)
    )
    assert not all(torch.equal(found.params[name], tensor) for name, tensor in plain.params.items())
