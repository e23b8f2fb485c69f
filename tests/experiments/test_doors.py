"""What users bring: by ``module:name`` from their own folder, and as entry points of an installed package."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from brought import call, options
from safetensors.torch import load_file

import fedmerge as fm
from server import RunConfig

BROUGHT = {
    "model": "mine:net", "dataset": "mine:spots", "partition": "mine:alternating",
    "aligner": "mine:reverse", "merger": "mine:second", "repair": "mine:doubled", "retrain": "mine:lifted",
    "controls": "mine:first",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("folder")
FEW = {"clients": 3, "controls": "none", "retrain": "none", "repair": "none", "init": "shared", "head": "none"}


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
        torch.save(net, folder / f"{name}.pt")
    given = {"model": "mine:Net", "dataset": "mine:spots", "aligner": "mine:reverse", "merger": "mine:second"}
    assert call(monkeypatch, "merge", "x.pt", "y.pt", *options(given), "-o", "m.safetensors") == 0
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


def test_a_data_set_of_ones_own_is_normalised_by_its_training_images(folder: Path) -> None:
    given = fm.data.load("mine:spots")
    assert given.test is not None
    pixels = given.train.images.double() / 255
    assert (given.classes, given.test.classes) == (("0", "1", "2"), ("0", "1", "2"))
    np.testing.assert_allclose(given.train.mean, [float(pixels.mean())], rtol=1e-6)
    np.testing.assert_allclose(given.test.std, [float(pixels.std(correction=0))], rtol=1e-6)
