"""A run's config.toml says how it was trained: held against what torch's optimiser, networks and loss were given."""

import math
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from short_run import rows, run
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fedmerge.training
from experiments.records.keys import used
from experiments.records.runs import Run
from fedmerge import models
from fedmerge.models import Model, Recipe
from server import RunConfig, RunDirectory

ALONE = {
    "clients": 1, "strategy": "fedavg", "init": "shared", "controls": "none", "local-evaluation": False, "width": 0,
    "client-images": 50, "local-epochs": 0, "retrain-epochs": 0,
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "the model's own": {"model": "mlp"},
    "a warm-up, decay and Nesterov's momentum": {"model": "resnet20", "width": 0.25, "local-epochs": 3},
    "another optimiser": {"model": "mlp", "optimizer": "adam", "lr": 0.002, "weight-decay": 0.01},
    "everything else": {
        "model": "mlp", "momentum": 0.0, "schedule": "one-cycle", "warmup": 0.4, "label-smoothing": 0.3, "augment": True,
        "batch-size": 7, "local-epochs": 2, "lr": 0.3,
    },
}  # fmt: skip
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "one-cycle": lambda t: 1 - t,
}


class Given:
    """What torch was given while a client trained."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[dict[str, Any]] = []
        self.kinds: set[str] = set()
        self.batches: list[int] = []
        self.smoothing: set[float] = set()
        self.augmented = 0
        loss, moved = nn.functional.cross_entropy, fedmerge.training.augment

        def cross_entropy(*args: Any, label_smoothing: float = 0.0, **options: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                self.smoothing.add(label_smoothing)
            return loss(*args, label_smoothing=label_smoothing, **options)

        def augment(*args: Any) -> torch.Tensor:
            self.augmented += 1
            return moved(*args)

        patch.setattr(nn.functional, "cross_entropy", cross_entropy)
        patch.setattr(fedmerge.training, "augment", augment)

    def step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        self.kinds.add(type(optimizer).__name__.lower())
        self.groups.append({k: v for k, v in group.items() if k != "params"})

    def forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled() and inputs[0].ndim == 4 and isinstance(module, self.outer):
            self.batches.append(len(inputs[0]))

    outer: type[nn.Module] = nn.Module


@pytest.mark.parametrize("choice", CHOICES)
def test_the_values_of_config_toml_are_those_that_torch_was_given(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**ALONE, **CHOICES[choice]}
    RunConfig.parse(values).client_task().warm_up()  # once a process, and no part of the run
    given = Given(monkeypatch)
    given.outer = type(RunConfig.parse(values).setup().network())
    with ExitStack() as hooks:
        for handle in (register_optimizer_step_pre_hook(given.step), register_module_forward_pre_hook(given.forward)):
            hooks.callback(handle.remove)
        run(tmp_path / "a", **values)
    said = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    assert used(Run.load(tmp_path / "a").config).items() <= said.items()  # what a report shows
    assert {"", 0.0, -1.0}.isdisjoint(
        said[key] for key in ("lr", "batch-size", "local-epochs", "optimizer", "schedule")
    )
    sizes, epochs = given.batches, said["local-epochs"]
    assert len(sizes) == epochs * math.ceil(50 / said["batch-size"])
    assert sum(sizes) == epochs * 50
    assert given.kinds == {said["optimizer"]}
    for key in ("momentum", "nesterov", "weight-decay"):
        if key in used(said):  # by adam two of them are not
            assert {group[key.replace("-", "_")] for group in given.groups} == {said[key]}, key
    progress = [(step + 0.5) / len(sizes) for step in range(len(sizes))]
    warm = said["warmup"]
    falls = [SCHEDULES[said["schedule"]]((t - warm) / (1 - warm)) if t >= warm else t / warm for t in progress]
    assert [group["lr"] for group in given.groups] == pytest.approx([said["lr"] * fall for fall in falls])
    assert given.smoothing == {said["label-smoothing"]}
    assert given.augmented == (len(sizes) if said["augment"] else 0)


def test_a_run_repeated_from_its_own_config_has_the_same_bytes_whatever_its_model_says_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(classes: int, shape: tuple[int, int, int], width: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, classes))

    before = Model(
        "fickle", network, "one layer", recipe=Recipe(lr=0.1, epochs=2), options={"width": 9}, counts="units"
    )
    monkeypatch.setitem(models.MODELS._entries, "fickle", before)
    run(tmp_path / "a", model="fickle", width=0, local_epochs=0, retrain_epochs=0)
    later = Recipe("adam", 0.003, nesterov=True, weight_decay=0.1, batch_size=9, schedule="cosine", warmup=0.5,
                   label_smoothing=0.2, augment=True, epochs=3)  # fmt: skip
    monkeypatch.setitem(models.MODELS._entries, "fickle", replace(before, recipe=later, options={"width": 5}))
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    run(tmp_path / "b", **config.flat())
    names = ["config.toml", "model.safetensors", *(f"clients/round-1-client-{i}.safetensors" for i in range(4))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    now = RunConfig.parse({"model": "fickle"})
    differ = {key for key, value in now.flat().items() if config.flat()[key] != value}
    assert differ >= {"width", "lr", "optimizer", "nesterov", "schedule", "augment", "local-epochs", "retrain-epochs"}


def test_a_folder_of_an_older_version_whose_zeros_stood_for_the_model_is_the_same_run(tmp_path: Path) -> None:
    new = {"momentum", "nesterov", "weight-decay", "schedule", "warmup", "label-smoothing", "augment", "channels-last"}
    old = {key: value for key, value in RunConfig().flat().items() if key not in new}
    assert old["lr"] == old["local-epochs"] == old["width"] == 0
    tmp_path.joinpath("config.toml").write_text(tomli_w.dumps(old))
    RunDirectory.open(tmp_path, RunConfig.parse({"lr": 0.05}), resume=True)
    assert RunConfig.read(tmp_path / "config.toml") == RunConfig.parse({})
    assert tomllib.loads((tmp_path / "config.toml").read_text())["momentum"] == 0.9
