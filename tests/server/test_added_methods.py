"""A new method is one function or class and one entry: nothing else knows of it, and everything works with it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid
from safetensors.torch import load_file
from short_run import run
from torch import Tensor, nn

import fedmerge as fm
import strategies
from experiments.compare.verdict import verdicts
from experiments.records.keys import unused
from experiments.records.runs import Run as ReadRun
from fedmerge import data, models
from fedmerge.align import ALIGNERS, Aligner
from fedmerge.errors import ConfigError, ParamsError, RoundError, UnknownNameError
from fedmerge.merge import MERGERS, Merger
from fedmerge.models import Recipe
from fedmerge.normalisation import REPAIRS, Repair
from fedmerge.pipeline import Aggregate, OnStage, Pipeline
from fedmerge.retraining import RETRAININGS, Retraining
from fedmerge.training import Training
from server import CONTROLS, Control, RunConfig, World
from server.records import Row
from strategies import STRATEGIES, ClientResult, Federated, Strategy
from strategies._registry import checked

REGISTRIES = (ALIGNERS, MERGERS, REPAIRS, RETRAININGS, data.PARTITIONS, models.MODELS, STRATEGIES)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries that afterwards are without what a test adds."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry))


def network(classes: int, in_shape: tuple[int, int, int], width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(in_shape)), width), nn.ReLU(), nn.Linear(width, classes))


def by_bias(
    params: State, *, to: State, spec: fm.PermSpec, rng: np.random.Generator, restarts: int = 1
) -> fm.Alignment:
    """Units in the order that their biases have in the reference."""
    (group,) = spec.groups
    perm = params["1.bias"].argsort()[to["1.bias"].argsort().argsort()]
    return fm.Alignment({group: perm}, 0.0, (0.0,), 1, True)


def heaviest(
    found: Sequence[State], *, spec: fm.PermSpec, weights: Sequence[float], rng: np.random.Generator, **_: Any
) -> fm.Merge:
    """The one network that counts most."""
    one = found[int(np.argmax(weights))]
    return fm.Merge(dict(one), tuple(spec.identity(m) for m in found), 0.0, (), 0, True)


def doubled(model: nn.Module, params: State, **_: Any) -> State:
    return {name: 2 * tensor for name, tensor in params.items()}


def lifted(model: nn.Module, params: State, public: data.Images, **_: Any) -> Training:
    return Training({name: tensor + 1 for name, tensor in params.items()}, (0.0,), (0.0,), steps=1, seconds=0.0)


def alternating(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.arange(client, len(labels), clients) for client in range(clients)]


class Middle(Federated):
    """The mean of the clients, each as much as any other, times a factor."""

    def __init__(self, *, bench: Any, pipeline: Any, on_stage: OnStage, factor: float = 1.0, **options: Any):
        super().__init__(**options)
        self.on_stage, self.factor = on_stage, factor

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        mean = {k: self.factor * v for k, v in fm.average([r.params for r in results]).items()}
        self.on_stage(server_round, "aggregated", mean)
        return Aggregate(mean)


class Picky(FedAvg):
    """A strategy of Flower's kind whose option ends in one of Python's errors."""

    def __init__(self, *, which: float = 0.0, **options: Any):
        super().__init__(**options)
        self.which = which

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        given = list(replies)
        return super().aggregate_train(server_round, [given[self.which]] if self.which < 9 else [*{}["none"]])


def unwilling(pipeline: Pipeline, optimizer: str, init: str) -> str:
    return "wants one beginning; use --init shared" if init == "independent" else ""


def add_all() -> None:
    ALIGNERS.add(Aligner(name="by-bias", make=by_bias, summary="units by their biases"))
    MERGERS.add(Merger(name="heaviest", make=heaviest, summary="the one that counts most", title="Heaviest client"))
    REPAIRS.add(Repair(name="doubled", make=doubled, summary="everything twice"))
    RETRAININGS.add(Retraining(name="lifted", make=lifted, summary="everything plus one"))
    data.PARTITIONS.add(data.Partition(name="alternating", make=alternating, summary="one by one"))
    models.MODELS.add(
        models.Model(
            name="tiny", make=network, summary="one layer", recipe=Recipe(), options={"width": 4}, counts="units"
        )
    )
    STRATEGIES.add(
        Strategy(
            name="middle", make=Middle, title="Middle", summary="an even mean", options={"factor": "of the mean"},
            check=unwilling,
        )
    )  # fmt: skip


TINY = {"model": "tiny", "width": 0, "partition": "alternating", "clients": 3, "local_epochs": 1, "controls": "none"}


def test_an_aligner_of_ones_own_aligns_alone_and_in_a_merger() -> None:
    add_all()
    model = network(3, (1, 2, 2), 6)
    spec = fm.perm_spec(model, torch.zeros(2, 1, 2, 2))
    a = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    (group,) = spec.groups
    b = fm.permute(a, {group: torch.tensor([3, 0, 5, 1, 4, 2])}, spec=spec)
    assert fm.aligners()["by-bias"] == "units by their biases"
    perms = fm.align(b, a, spec=spec, method="by-bias").perms
    torch.testing.assert_close(fm.permute(b, perms, spec=spec), a, rtol=0, atol=0)
    for merger in ("merge-many", "hierarchical"):
        torch.testing.assert_close(fm.merge([a, b], spec=spec, method=merger, aligner="by-bias").params, a)


def test_a_merger_and_a_repair_of_ones_own_are_taken_by_name() -> None:
    add_all()
    model = network(3, (1, 2, 2), 6)
    spec = fm.perm_spec(model, torch.zeros(2, 1, 2, 2))
    a, b = ({k: v + i for k, v in model.state_dict().items()} for i in (0, 1))
    merged = fm.merge([a, b], spec=spec, method="heaviest", weights=[1, 3], reference=1).params
    torch.testing.assert_close(merged, b)
    with pytest.raises(UnknownNameError, match="unknown option of merger heaviest 'density'"):
        fm.merge([a, b], spec=spec, method="heaviest", density=0.5)
    images = data.Images(
        torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), (0.5,), (1.0,), "two"
    )
    torch.testing.assert_close(fm.repair(model, b, data=images, method="doubled"), doubled(model, b))


@pytest.mark.parametrize(("which", "said"), [(0.5, "TypeError: list indices"), (8, "IndexError"), (9, "KeyError")])
def test_what_a_strategy_of_flowers_kind_raises_ends_the_round_in_a_line(
    which: float, said: str, tmp_path: Path
) -> None:
    add_all()
    STRATEGIES.add(
        Strategy(name="picky", make=checked(Picky), title="Picky", summary="one of them", options={"which": "whom"})
    )
    settings = {**TINY, "strategy": "picky", "strategy_options": f"which={which}", "init": "shared"}
    with pytest.raises(RoundError, match=rf"round 1: Picky makes nothing of 3 replies \({said}") as refused:
        run(tmp_path / "a", LocalGrid(3), **settings)
    assert "\n" not in str(refused.value)


class Mixing(nn.Module):
    """A normalisation over the batch by hand, which differential privacy does not bear."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1) - x.flatten(1).mean(0))


def test_a_network_of_ones_own_that_cannot_be_private_is_refused_before_anyone_is_asked(tmp_path: Path) -> None:
    made = models.Model("mixing", lambda classes, in_shape: Mixing(classes), "mixes", recipe=Recipe())
    models.MODELS.add(made)
    grid = LocalGrid(3)
    with pytest.raises(ParamsError, match="what it makes of an image depends on the others of a batch"):
        run(tmp_path / "a", grid, **{**TINY, "model": "mixing", "partition": "iid"}, dp_noise=1.0, dp_delta=1e-3)
    assert not grid.asked


def test_a_strategy_a_partition_and_a_model_of_ones_own_run(tmp_path: Path) -> None:
    add_all()
    summary = run(
        tmp_path / "a", LocalGrid(3), **TINY, init="shared", strategy="middle", strategy_options="factor=0.5"
    )  # fmt: skip
    clients = [load_file(tmp_path / "a" / "clients" / f"round-1-client-{i}.safetensors") for i in range(3)]
    assert clients[0]["1.weight"].shape == (4, 64)
    half = {name: tensor / 2 for name, tensor in fm.average(clients).items()}
    torch.testing.assert_close(load_file(tmp_path / "a" / "model.safetensors"), half)
    titles = {row["stage"]: row["title"] for row in summary["stages"]}
    assert titles["aggregated"] == "Middle, shared init"
    dealt = data.partition([0] * 7, clients=3, rng=np.random.default_rng(0), name="alternating")
    assert [part.tolist() for part in dealt] == [[0, 3, 6], [1, 4], [2, 5]]
    held = RunConfig.parse({k.replace("_", "-"): v for k, v in TINY.items()}).setup().split().clients
    assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize(("stage", "title"), [("mine", "mine + head"), ("", "Middle, shared init + head")])
def test_a_head_is_said_to_be_put_on_what_a_strategy_of_ones_own_makes(stage: str, title: str, tmp_path: Path) -> None:
    class Telling(Middle):
        def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
            made = fm.average([r.params for r in results])
            if stage:
                self.on_stage(server_round, stage, made)
            return Aggregate(made)

    add_all()
    STRATEGIES.add(Strategy(name="telling", make=Telling, title="Middle", summary="a mean"))
    run(tmp_path, **{**TINY, "controls": "ensemble"}, init="shared", strategy="telling", head="analytic")
    (verdict,) = verdicts([ReadRun.load(tmp_path)])
    assert verdict.title == title


def test_the_steps_of_a_pipeline_are_of_ones_own(tmp_path: Path) -> None:
    add_all()
    summary = run(
        tmp_path / "a", LocalGrid(3), **TINY, init="shared", aligner="by-bias", merger="heaviest", repair="doubled",
        retrain="lifted", head="none",
    )  # fmt: skip
    clients = [load_file(tmp_path / "a" / "clients" / f"round-1-client-{i}.safetensors") for i in range(3)]
    largest = clients[0]  # all hold as many images, or one more: the first has most
    expected = {name: 2 * tensor + 1 for name, tensor in largest.items()}
    torch.testing.assert_close(load_file(tmp_path / "a" / "model.safetensors"), expected)
    assert {row["stage"]: row["title"] for row in summary["stages"]}["merged"] == "Heaviest client"


def test_a_merger_that_is_a_function_may_read_all_of_an_alignment() -> None:
    found = MERGERS.find(heaviest)
    assert found.reads == {"aligner", "reference", "restarts"}
    MERGERS.add(found)
    assert not unused({"strategy": "merge-many", "merger": "heaviest", "controls": "none"}) & found.reads


def test_what_an_entry_says_is_known_to_configurations_and_comparisons() -> None:
    add_all()
    idle = unused({"strategy": "middle", "partition": "alternating", "controls": "none"})
    assert idle >= {"partition-alpha", "aligner", "merger", "repair", "retrain", "retrain-epochs"}
    assert "merger" not in unused({"strategy": "merge-many", "merger": "heaviest", "controls": "none"})
    assert "aligner" in unused({"strategy": "merge-many", "merger": "heaviest", "controls": "none"})
    assert strategies.summaries()["middle"] == "an even mean; factor: of the mean"
    with pytest.raises(ConfigError, match="middle wants one beginning; use --init shared"):
        RunConfig.parse({"strategy": "middle", "init": "independent"})
    with pytest.raises(ConfigError, match="unknown option of strategy middle 'facto'.*did you mean 'factor'"):
        RunConfig.parse({"strategy": "middle", "init": "shared", "strategy-options": "facto=2"})
    with pytest.raises(
        ConfigError, match="width of model 'tiny' is 1.5 .width counts units, 4 by default.*whole number"
    ):
        RunConfig.parse({"model": "tiny", "width": 1.5})


def half_the_clients(world: World, results: Sequence[ClientResult], stage: str) -> Iterator[Row]:
    yield world.measure(stage, fm.average([result.params for result in results[: len(results) // 2]]))


def test_a_control_of_ones_own_is_one_function_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTROLS, "_entries", dict(CONTROLS))
    CONTROLS.add(
        Control(
            "half",
            half_the_clients,
            "the mean of half the clients",
            title="Half",
            stage="half",
            note="without the rest",
            of_clients=True,
        )
    )
    found = run(tmp_path / "run", controls="half", **{"local-epochs": 1, "width": 4})
    titles = {stage["stage"]: (stage["title"], stage["note"]) for stage in found["stages"]}
    assert titles["half"] == ("Half", "without the rest")
    (row,) = [stage for stage in found["stages"] if stage["stage"] == "half"]
    kept = [load_file(tmp_path / "run" / f"clients/round-1-client-{client}.safetensors") for client in (0, 1)]
    config = RunConfig.parse({"clients": 4, "width": 4})
    expected = fm.evaluate(config.setup().network(), fm.average(kept), config.setup().split().test_images)
    assert row["accuracy"] == pytest.approx(expected.accuracy)


@pytest.mark.parametrize("missing", ["stage", "note"])
def test_a_control_without_its_row_is_refused_when_it_is_registered(missing: str) -> None:
    given = {"stage": "half", "note": "without the rest", missing: ""}
    with pytest.raises(ValueError, match=f"control 'half' cannot be registered: it has no {missing}"):
        CONTROLS.add(Control("half", half_the_clients, "the mean of half the clients", **given))
