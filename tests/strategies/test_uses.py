"""What a strategy says it uses, against what moves its network."""

from pathlib import Path

import pytest
import torch
from local_grid import LocalGrid
from torch import nn

import strategies
from fedmerge import mergers, models, perm_spec
from fedmerge.errors import UnknownNameError
from fedmerge.pipeline import Pipeline, Workbench
from server import Run, RunConfig, RunDirectory

pytestmark = pytest.mark.usefixtures("no_collections")

BASE = {
    "clients": 3, "local-epochs": 1, "width": 8, "init": "shared", "optimizer": "sgd", "local-evaluation": False,
    "partition": "shards", "controls": "none", "keep-clients": False,
    "aligner": "weight-matching", "merger": "merge-many", "reference": "largest", "repair": "recompute", "restarts": 5,
    "retrain": "labels", "retrain-epochs": 1,
}  # fmt: skip
OTHER = {
    "aligner": "activation-matching", "merger": "average", "reference": "2", "repair": "none", "restarts": 1,
    "retrain": "both", "retrain-epochs": 3,
}  # fmt: skip
OPTIONS = {"bulyan": "num_malicious_nodes=0", "qfedavg": "client_learning_rate=0.1"}


def model(path: Path, **changes: object) -> bytes:
    config = RunConfig.parse({**BASE, **changes})
    Run(config, RunDirectory.open(path, config)).execute(LocalGrid(3))
    return (path / "model.safetensors").read_bytes()


def used(given: dict[str, object]) -> set[str]:
    steps = {key: value for key, value in {**BASE, **given}.items() if key in vars(Pipeline())}
    return {name.replace("_", "-") for name in strategies.uses(str(given["strategy"]), Pipeline(**steps))}


@pytest.mark.parametrize("strategy", strategies.STRATEGIES)
def test_what_a_strategy_does_not_use_changes_no_byte(strategy: str, tmp_path: Path) -> None:
    given = {"strategy": strategy, "strategy-options": OPTIONS.get(strategy, "")}
    changes = {key: value for key, value in OTHER.items() if key not in used(given)}
    assert strategy == "merge-many" or changes
    assert model(tmp_path / "a", **given) == model(tmp_path / "b", **given, **changes)


@pytest.mark.parametrize("merger", mergers())
def test_what_a_merger_does_not_use_changes_no_byte(merger: str, tmp_path: Path) -> None:
    given = {"strategy": "merge-many", "merger": merger}
    changes = {key: OTHER[key] for key in ("aligner", "reference", "restarts") if key not in used(given)}
    if changes:
        assert model(tmp_path / "a", **given) == model(tmp_path / "b", **given, **changes)


@pytest.mark.parametrize(
    ("strategy", "steps", "expected"),
    [
        ("fedavg", {}, set()),
        ("scaffold", {}, set()),
        ("fedavg-retrain", {}, {"retrain", "teacher", "retrain_epochs"}),
        ("fedavg-retrain", {"retrain": "labels"}, {"retrain", "retrain_epochs"}),
        ("feddf", {}, {"retrain_epochs"}),
        ("fedma", {}, {"reference", "repair"}),
        ("fedavg-aligned", {}, {"aligner", "reference", "restarts"}),
        ("papa", {}, {"aligner", "merger", "reference", "repair", "restarts"}),
        ("papa", {"merger": "average"}, {"merger", "repair"}),
        ("merge-many", {}, {*vars(Pipeline()), "retrain_epochs"}),
        ("merge-many", {"retrain": "none"}, set(vars(Pipeline())) - {"teacher"}),
        ("merge-many", {"merger": "fisher", "retrain": "none"}, set(vars(Pipeline())) - {"teacher"}),
        ("merge-many", {"merger": "hierarchical", "retrain": "none"}, set(vars(Pipeline())) - {"reference", "teacher"}),
        ("merge-many", {"merger": "ties", "retrain": "none"}, {"merger", "repair", "retrain"}),
        ("merge-many", {"merger": "learned-coefficients", "retrain": "none"}, set(vars(Pipeline()))),
        (
            "merge-many",
            {"merger": "ensemble-distillation", "retrain": "none"},
            {*vars(Pipeline()), "retrain_epochs"} - {"teacher"},
        ),
    ],
)
def test_what_is_used(strategy: str, steps: dict[str, str], expected: set[str]) -> None:
    assert strategies.uses(strategy, Pipeline(**steps)) == expected


def test_unknown_names_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fedavg'"):
        strategies.uses("fedavrg", Pipeline())
    with pytest.raises(UnknownNameError, match="unknown merger 'mean'"):
        strategies.uses("merge-many", Pipeline(merger="mean"))


class Bare(nn.Module):
    """Its first hidden units are the output of no layer; of its second, two weights are multiplied on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.up = nn.Parameter(torch.randn(5, 64)), nn.Parameter(torch.randn(6, 5))
        self.out = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.out(torch.relu(x.flatten(1) @ (self.up @ self.weight).T))


def test_units_that_an_aligner_cannot_see_are_named_before_anyone_trains(caplog: pytest.LogCaptureFixture) -> None:
    network, split = Bare(), RunConfig().setup().split()
    public = split.public_images
    spec = perm_spec(network, public.normalise(public.images[:2]))
    bench = Workbench(network, spec, public, split.val_images, models.recipe("mlp"), retrain_epochs=1, seed=0)
    (hidden,) = (group for group, n in spec.sizes().items() if n == 5)
    for name, pipeline, said in (
        ("merge-many", Pipeline(), True), ("merge-many", Pipeline("weight-matching"), False), ("fedavg", Pipeline(), False)
    ):  # fmt: skip
        caplog.clear()
        caplog.set_level("INFO", logger="flwr")  # a simulation in the same process may have silenced it
        strategies.build(name, bench=bench, pipeline=pipeline)
        line = f"activation-matching leaves in their order units that show in no activation: {hidden}"
        assert (line in caplog.text) == said
