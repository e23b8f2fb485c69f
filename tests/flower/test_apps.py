"""Whole apps of other people: their ServerApp and ClientApp in this process, with fedmerge's strategy in two lines."""

import difflib
import importlib
import logging
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from local_grid import LocalGrid

ROOT = Path(__file__).parents[2]
STANDARD = Path(__file__).parent / "standard"
CONFIG = {"num-server-rounds": 1, "fraction-evaluate": 0.5, "local-epochs": 1, "learning-rate": 0.05, "batch-size": 16}


def run(folder: Path, package: str, config: dict, clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app in ``folder``, as Flower's simulation runs it."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        client, server = (importlib.import_module(f"{package}.{name}_app").app for name in ("client", "server"))
        grid = LocalGrid(clients, app=client)
        grid.run_config = config
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def test_an_app_of_the_form_of_flowers_quickstart_with_two_lines_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = (STANDARD / "standard_app" / "server_app.py").read_text()
    changed = published.replace(
        "from flwr.serverapp.strategy import FedAvg", "from fedmerge.flower import MergeMany"
    ).replace(
        "strategy = FedAvg(fraction_evaluate=fraction_evaluate)",
        "strategy = MergeMany(model=global_model, public=load_centralized_dataset(), fraction_evaluate=fraction_evaluate)",
    )
    differ = [line for line in difflib.ndiff(published.splitlines(), changed.splitlines()) if line[0] in "+-"]
    assert [line[0] for line in differ] == ["-", "+", "-", "+"]
    page = (ROOT / "docs" / "flower.md").read_text()
    assert all(line[2:].strip() in page for line in differ)  # the page shows these very lines
    made = {}
    caplog.set_level(logging.INFO, logger="flwr")
    for name, text in {"fedavg": published, "merge-many": changed}.items():
        folder = tmp_path / name
        shutil.copytree(STANDARD, folder)
        (folder / "standard_app" / "server_app.py").write_text(text)
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        run(folder, "standard_app", CONFIG, 2, monkeypatch)
        made[name] = torch.load(folder / "final_model.pt", weights_only=True)
    like = {k: (t.shape, t.dtype) for k, t in made["fedavg"].items()}
    assert {k: (t.shape, t.dtype) for k, t in made["merge-many"].items()} == like
    (best,) = re.findall(r"'public-accuracy-retrained': '([\d.e+-]+)'", caplog.text)[-1:]
    assert float(best) > 0.3  # of ten colours


def test_the_example_of_an_own_app_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = ROOT / "examples" / "own-app"
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    run(folder, "own_app", config, 3, monkeypatch)
    accuracies = [float(a) for a in re.findall(r"^round \d: accuracy ([\d.]+)$", capsys.readouterr().out, re.M)]
    assert len(accuracies) == 3
    assert accuracies[0] < 0.3
    assert accuracies[-1] > 0.85
