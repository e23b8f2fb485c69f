"""What users bring: by ``module:name`` from their own folder, and as entry points of an installed package."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from no_ray import simulate_here
from safetensors.torch import load_file, save_file

import fedmerge as fm
from experiments import cli
from server import RunConfig

MINE = '''
import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedmerge as fm
from fedmerge.align import Aligner
from fedmerge.models import Model, Recipe
from fedmerge.training import Training
from server import Control


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.hidden(x.flatten(1)).relu())


net = Model("net", lambda classes, in_shape: Net(), "mine", recipe=Recipe(lr=0.25, batch_size=8, epochs=2))


def spots():
    """Three kinds of spots."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    images = rng.integers(0, 90, (150, 1, 4, 4)) + 80 * np.eye(3, 16)[labels].reshape(150, 1, 4, 4)
    images = images.astype(np.uint8)
    return (images[:120], labels[:120]), (images[120:], labels[120:].astype(np.int32))


def alternating(labels, clients, rng):
    """One by one."""
    return [np.arange(client, len(labels), clients) for client in range(clients)]


def backwards(params, *, to, spec, rng, model, data, restarts=1, device="cpu"):
    """All units in reverse, whoever comes."""
    assert len(data) and isinstance(model, Net)
    return fm.Alignment({g: torch.arange(n).flip(0) for g, n in spec.sizes(params).items()}, 0.0, (0.0,), 1, True)


reverse = Aligner("reverse", backwards, "units in reverse", needs=frozenset({"model", "data"}))


def second(models, *, spec, weights, rng, aligner="", aligner_options=None, keep=1, **options):
    """The second of the networks, after the aligner."""
    perms = fm.align(models[keep], models[0], spec=spec, method=aligner, **aligner_options or {}).perms
    return fm.Merge(fm.permute(models[keep], perms, spec=spec), tuple(perms for _ in models), 0.0, (), 0, True)


def doubled(model, params, **given):
    """Everything twice."""
    return {name: 2 * tensor for name, tensor in params.items()}


def lifted(model, params, public, *, teachers, **given):
    """Everything plus one."""
    assert len(teachers) == 3
    return Training({name: tensor + 1 for name, tensor in params.items()}, (), (), steps=1, seconds=0.0)


def client_0(world, results, stage):
    """Client 0 alone."""
    yield world.measure(stage, results[0].params)


first = Control("first", client_0, "client 0", title="First", stage="first", note="of all", of_clients=True)


class Plain(FedAvg):
    """Flower's own, in a class of mine."""


def floats():
    """The spots as numbers that the network takes, in a loader."""
    train, test = (torch.utils.data.TensorDataset(d.normalise(d.images), d.labels) for d in parts("mine:spots"))
    return train, torch.utils.data.DataLoader(test, batch_size=7)


def parts(name):
    found = fm.data.load(name)
    return found.train, found.test


class Halves(Net):
    """Takes the halves of an image by their names."""

    def forward(self, left, right):
        return super().forward(torch.cat([left, right], 1))


halves = Model("halves", lambda classes, in_shape: Halves(), "mine", recipe=net.recipe)


def columns():
    """The same as rows of two halves."""
    rows = [(d.normalise(d.images).flatten(1), d.labels) for d in parts("mine:spots")]
    return tuple({"left": x[:, :8], "right": x[:, 8:], "label": y} for x, y in rows)


class Words(nn.Module):
    """The mean of a few tokens, classified."""

    def __init__(self):
        super().__init__()
        self.token, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.hidden(self.token(ids).mean(1)).relu())


def texts():
    """Kinds of texts, each with a word of its own; no test set."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    ids = rng.integers(3, 9, (150, 5))
    ids[:, 2] = labels
    return (ids, labels), None
'''
BROUGHT = {
    "model": "mine:net", "dataset": "mine:spots", "partition": "mine:alternating",
    "aligner": "mine:reverse", "merger": "mine:second", "repair": "mine:doubled", "retrain": "mine:lifted",
    "controls": "mine:first",
}  # fmt: skip
FEW = {"clients": 3, "controls": "none", "retrain": "none", "repair": "none", "init": "shared"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder far from the repository, and a process that forgets its modules afterwards."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry in fm.registry.REGISTRIES.values():
        monkeypatch.setattr(registry, "_brought", {})
    yield tmp_path
    for name in ("mine", "wrong", "broken", "leaves"):
        sys.modules.pop(name, None)


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    simulate_here(monkeypatch.setattr)
    monkeypatch.setattr(cli, "_report", lambda path, tracker: None)  # pictures have tests of their own
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def options(given: dict[str, object]) -> list[str]:
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def check_run(out: Path, names: dict[str, str]) -> None:
    """The run in ``out`` is that of the methods above, whatever they were called."""
    config = RunConfig.read(out / "config.toml")
    assert {key: getattr(config, key) for key in names} == names
    assert (config.lr, config.batch_size, config.local_epochs) == (0.25, 8, 2)
    split = config.setup().split()
    assert [len(client) for client in split.clients] == [32, 32, 32]
    assert len(split.test_images) == 30
    kept = load_file(out / "clients" / "round-1-client-1.safetensors")
    assert list(kept) == ["hidden.bias", "hidden.weight", "out.bias", "out.weight"]
    merged = {
        "hidden.weight": kept["hidden.weight"].flip(0), "hidden.bias": kept["hidden.bias"].flip(0),
        "out.weight": kept["out.weight"].flip(1), "out.bias": kept["out.bias"],
    }  # fmt: skip
    expected = {name: 2 * tensor + 1 for name, tensor in merged.items()}  # doubled, then lifted
    torch.testing.assert_close(load_file(out / "model.safetensors"), expected, rtol=0, atol=0)
    (row,) = [row for row in json.loads((out / "summary.json").read_text())["stages"] if row["stage"] == "first"]
    client = load_file(out / "clients" / "round-1-client-0.safetensors")
    found = fm.evaluate(config.setup().network(), client, split.test_images)
    assert (row["title"], row["note"], row["accuracy"]) == ("First", "of all", found.accuracy)


def test_a_run_takes_everything_from_a_module_of_the_current_folder_and_its_config_repeats_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "run", *options({**FEW, **BROUGHT}), "--out", "a") == 0
    check_run(folder / "a", BROUGHT)
    assert call(monkeypatch, "run", "a/config.toml", "--out", "b") == 0
    assert (folder / "a/model.safetensors").read_bytes() == (folder / "b/model.safetensors").read_bytes()
    assert call(monkeypatch, "run", "--resume", "--out", "b") == 0


def outcome(out: Path) -> tuple[object, ...]:
    """What a run wrote, without times."""
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "model.safetensors").read_bytes(), summary, [{**row, "seconds": 0} for row in rows]


def test_rows_of_any_kind_give_what_the_same_images_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {
        "clients": 3,
        "partition": "dirichlet",
        "partition-alpha": 1.0,
        "restarts": 1,
        "controls": "centralised, ensemble",
    }
    for dataset, model in {"spots": "net", "columns": "halves"}.items():
        given = {"dataset": f"mine:{dataset}", "model": f"mine:{model}", **few}
        assert call(monkeypatch, "run", *options(given), "--out", dataset) == 0
    assert outcome(folder / "columns") == outcome(folder / "spots")
    images, floats = fm.data.load("mine:spots"), fm.data.load("mine:floats")
    for part in ("train", "test"):
        pixels, numbers = getattr(images, part), getattr(floats, part)
        torch.testing.assert_close(numbers.normalise(numbers.images), pixels.normalise(pixels.images), rtol=0, atol=0)
        assert (numbers.labels.tolist(), numbers.classes) == (pixels.labels.tolist(), pixels.classes)


def test_tokens_are_run_and_merged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"dataset": "mine:texts", "model": "mine:Words"}
    few = {"clients": 2, "local-epochs": 30, "lr": 0.3, "controls": "none"}
    assert call(monkeypatch, "run", *options({**given, **few}), "--out", "out") == 0
    _, summary, _ = outcome(folder / "out")
    assert {row["stage"]: row["accuracy"] for row in summary["stages"]}["retrained"] > 0.9
    assert len(summary["per_class"][0]["confusion"]) == 3
    kept = [str(folder / "out" / "clients" / f"round-1-client-{client}.safetensors") for client in range(2)]
    looks = {"aligner": "activation-matching", "merger": "regmean", "repair": "repair"}
    assert call(monkeypatch, "merge", *kept, *options({**given, **looks}), "-o", "m.safetensors") == 0
    assert load_file(folder / "m.safetensors")["token.weight"].shape == (9, 6)
    assert (
        call(
            monkeypatch,
            "run",
            *options(
                {
                    **given,
                }
            ),
            "--augment",
            "--out",
            "no",
        )
        == 2
    )
    assert "a batch to augment has shape (1, 5); expected (N, C, H, W)" in capsys.readouterr().err


def test_a_strategy_of_flowers_kind_and_a_grid_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {**BROUGHT, **FEW, "strategy": "mine:Plain"}
    lines = [f"{key} = {value!r}" for key, value in base.items() if key != "merger"]
    (folder / "grid.toml").write_text("\n".join(["[base]", *lines, "[grid]", 'merger = ["mine:second"]', "seed = [0]"]))
    assert call(monkeypatch, "bench", "grid.toml", "--out", "out") == 0
    (run,) = (folder / "out" / "cells").iterdir()
    kept = [load_file(run / "clients" / f"round-1-client-{client}.safetensors") for client in range(3)]
    torch.testing.assert_close(load_file(run / "model.safetensors"), fm.average(kept), rtol=1e-6, atol=1e-7)


def test_merge_and_spec_take_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "spec", "mine:Net", "--input-shape", "1,4,4") == 0
    assert "hidden.weight" in capsys.readouterr().out
    nets = [fm.models.build("mine:Net", classes=3, in_shape=(1, 4, 4), seed=seed).state_dict() for seed in (0, 1)]
    assert not torch.equal(nets[0]["out.weight"], nets[1]["out.weight"])
    for name, net in zip("xy", nets, strict=True):
        save_file(net, folder / f"{name}.safetensors")
    given = {"model": "mine:Net", "dataset": "mine:spots", "aligner": "mine:reverse", "merger": "mine:second"}
    assert call(monkeypatch, "merge", "x.safetensors", "y.safetensors", *options(given), "-o", "m.safetensors") == 0
    assert torch.equal(load_file(folder / "m.safetensors")["out.weight"], nets[1]["out.weight"].flip(1))


def install(folder: Path, package: str, points: dict[str, dict[str, str]]) -> None:
    """A package as pip leaves it: entry points beside the module."""
    about = folder / f"{package}-1.5.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    (about / "entry_points.txt").write_text(
        "\n".join(
            f"[fedmerge.{group}]\n" + "\n".join(f"{k} = {v}" for k, v in p.items()) for group, p in points.items()
        )
    )


TOY = {
    "models": {"toy-net": "mine:net"}, "datasets": {"toy-spots": "mine:spots"},
    "partitions": {"toy-turns": "mine:alternating"}, "strategies": {"toy-plain": "mine:Plain"},
    "aligners": {"toy-reverse": "mine:reverse", "toy-broken": "absent:f"}, "mergers": {"toy-second": "mine:second"},
    "repairs": {"toy-doubled": "mine:doubled"}, "retrainings": {"toy-lifted": "mine:lifted"},
    "controls": {"toy-first": "mine:first"},
}  # fmt: skip


def test_an_installed_package_brings_names_that_are_run_and_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder / "site", "toy", TOY)
    (folder / "mine.py").rename(folder / "site" / "mine.py")
    sys.path.append(str(folder / "site"))
    names = {
        "model": "toy-net", "dataset": "toy-spots", "partition": "toy-turns", "aligner": "toy-reverse",
        "merger": "toy-second", "repair": "toy-doubled", "retrain": "toy-lifted", "controls": "toy-first",
    }  # fmt: skip
    assert call(monkeypatch, "run", *options({**FEW, **names}), "--out", "a") == 0
    check_run(folder / "a", names)
    assert RunConfig.parse({"strategy": "toy-plain"}).strategy == "toy-plain"
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "160")
    assert call(monkeypatch, "list") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, summary in {
        "toy-net": "mine", "toy-spots": "Three kinds of spots.", "toy-turns": "One by one.",
        "toy-reverse": "units in reverse", "toy-second": "The second of the networks, after the aligner.",
        "toy-plain": "Flower's own, in a class of mine.", "toy-doubled": "Everything twice.",
        "toy-lifted": "Everything plus one.", "toy-first": "client 0",
    }.items():  # fmt: skip
        assert f"{name} {summary} (from toy 1.5)" in shown
    assert "toy-broken cannot be used: aligner 'toy-broken' of toy 1.5: importing absent failed with" in shown
    assert call(monkeypatch, "run", "--merger", "toy-secnd") == 2
    assert "did you mean 'toy-second'?" in capsys.readouterr().err


def test_two_packages_that_offer_one_name_are_both_named(folder: Path) -> None:
    for package in ("one", "two"):
        install(folder / "site", package, {"mergers": {"best": f"{package}.merge:best", "average": "mine:second"}})
    sys.path.append(str(folder / "site"))
    with pytest.raises(
        fm.FedmergeError, match=r"'best' is offered by one 1.5 \(one.merge:best\) and two 1.5 \(two.mer"
    ):
        fm.registry.REGISTRIES["merger"]["best"]
    told = {plugin.name: problem for plugin, _, problem in fm.registry.REGISTRIES["merger"].offers()}
    assert told["average"] == "'average' is fedmerge's own; write mine:second"


WRONG = """
import sys
from torch import nn
from mine import *
number = 3
def needs(depth): "A net."
def fails(): raise RuntimeError("no weights\\nhere")
def nothing(): return None
def one_class(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
def greedy(labels, clients, rng): return [np.arange(len(labels))] * clients
def late(labels, clients): return []
def bare(): return np.zeros((9, 5)), None
def nameless(): return [np.zeros((9, 5))], None
def prices(): return (np.zeros((9, 5)), np.zeros((9, 1))), None
def table(): return (np.zeros((99, 5)), np.arange(99) % 3), None
def labels(): return (np.zeros((9, 1, 4, 4), np.uint8), np.zeros(9)), None
def pictures(): return np.zeros((9, 1, 4, 4), np.uint8)
def align(params, to): "An aligner that takes too little."
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "absent:net"}, "model 'absent:net': importing absent failed with ModuleNotFoundError: No module named"),
        ({"model": "broken:net"}, "importing broken failed with SyntaxError"),
        ({"model": "leaves:net"}, "importing leaves failed with SystemExit: 3"),
        ({"model": "wrong:nett"}, "there is no 'nett' in wrong ("),
        ({"model": "wrong:number"}, "its make is 3; give the function or class"),
        ({"model": "wrong:needs"}, "it is called with (classes, in_shape), which it does not take: too many positional"),
        ({"model": "wrong:fails"}, "failed with RuntimeError: no weights here; expected a function that returns"),
        ({"model": "wrong:nothing"}, "model 'wrong:nothing' returned a NoneType; expected a torch.nn.Module"),
        ({"model": "wrong:one_class"}, "gives shape (1, 1) for images of shape (1, 1, 4, 4); expected logits (1, 3)"),
        ({"model": "wrong:reverse"}, "model 'wrong:reverse' is a Aligner; expected a Model, or the function"),
        ({"partition": "wrong:greedy"}, "must return 5 lists that together hold each position from 0 to 95 once"),
        ({"partition": "wrong:late"}, "it is called with (labels, clients, rng), which it does not take: too many"),
        ({"dataset": "wrong:needs"}, "data set 'wrong:needs' is called without arguments, which it does not take"),
        ({"dataset": "wrong:fails"}, "data set 'wrong:fails' failed with RuntimeError: no weights here"),
        ({"dataset": "wrong:pictures"}, "returned a ndarray; expected a fedmerge.data.Dataset, or (train, test)"),
        ({"dataset": "wrong:bare"}, "wrong:bare (train) is a ndarray; expected Images, (x, y), or a data set or loader"),
        ({"dataset": "wrong:nameless"}, "wrong:nameless (train) has no labels; expected (x, y), or a data set or loader"),
        ({"dataset": "wrong:prices"}, "labels are torch.float64 (9, 1); expected int64 (9,): a run deals rows to clients by"),
        ({"dataset": "wrong:table"}, "model 'mine:net' failed with RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ({"dataset": "wrong:table", "model": "mlp"}, "model 'mlp' for 3 classes and images of shape (5,); expected at least"),
        ({"dataset": "wrong:labels"}, "wrong:labels (train): labels are torch.float64 (9,); expected int64 (9,)"),
        ({"aligner": "wrong:align"}, "it is called with (params, to=, spec=, rng=, restarts=), which it does not take"),
        ({"aligner": "mine:backwards"}, "missing a required argument: 'model' (fedmerge.align.Aligner says what one"),
        ({"strategy": "wrong:needs"}, "it is called with (bench=, pipeline=, on_stage="),
        ({"repair": "wrong:needs"}, "called with (model, params, data=, sources=, weights=, device=), which it does not"),
        ({"retrain": "wrong:needs"}, "called with (model, params, public, teachers=, recipe=, epochs=, generator=, device="),
        ({"controls": "none, wrong:needs"}, "called with (world, results, stage), which it does not take"),
        ({"controls": "wrong:second"}, "it is called with (world, results, stage), which it does not take"),
        ({"controls": "publik-only"}, "unknown control 'publik-only'"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_in_one_line_before_anything_trains(
    given: dict[str, str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "wrong.py").write_text(WRONG)
    (folder / "broken.py").write_text("def (")
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    arguments = options({"model": "mine:net", "dataset": "mine:spots", **given})
    assert call(monkeypatch, "run", *arguments, "--out", "out") == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (folder / "out").exists()


def test_a_data_set_of_ones_own_is_normalised_by_its_training_images(folder: Path) -> None:
    given = fm.data.load("mine:spots")
    assert given.test is not None
    pixels = given.train.images.double() / 255
    assert (given.classes, given.test.classes) == (("0", "1", "2"), ("0", "1", "2"))
    np.testing.assert_allclose(given.train.mean, [float(pixels.mean())], rtol=1e-6)
    np.testing.assert_allclose(given.test.std, [float(pixels.std(correction=0))], rtol=1e-6)
