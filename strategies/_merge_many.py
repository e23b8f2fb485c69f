"""The strategy of fedmerge: align the clients' networks, merge, repair, retrain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedmerge.align import needs_images
from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.merge import MERGERS, average, merge, ordered, takes
from fedmerge.models import Recipe
from fedmerge.normalisation import repair
from fedmerge.spec import PermSpec
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.training import evaluate
from strategies._federated import Aggregate, Federated
from strategies._replies import ClientResult, Params
from strategies._retrain import retrain


@dataclass(frozen=True)
class Workbench:
    """What the server has besides the clients' networks: the architecture and the images that it may see.

    Attributes:
        model: The architecture, a template that is never modified.
        spec: Its permutation symmetries.
        public: The public split: for statistics and retraining.
        val: The validation split: for choices.
        recipe: How to retrain.
        retrain_epochs: Passes over the public split.
        seed: Seed of the run.
        device: Where the server computes.
    """

    model: nn.Module
    spec: PermSpec
    public: Images
    val: Images
    recipe: Recipe
    retrain_epochs: int
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class Pipeline:
    """Which method for which step; ``"none"`` switches a step off."""

    aligner: str = "activation-matching"
    merger: str = "merge-many"
    reference: str = "largest"
    restarts: int = 5
    repair: str = "recompute"
    retrain: str = "both"


OnStage = Callable[[int, str, Params], None]
"""Called with the round, the name of the stage and its network."""


def reference_client(reference: str, results: Sequence[ClientResult], bench: Workbench) -> int:
    """Position in ``results`` of the client to which all others are aligned.

    ``reference`` is ``"largest"`` (most images; the lowest id of equals), ``"best"`` (accuracy on the
    validation split) or a client's id.

    Raises:
        ConfigError: Neither of these, or a client that did not answer.
    """
    if reference == "largest":
        return max(range(len(results)), key=lambda i: (results[i].examples, -i))
    if reference == "best":
        scores = [evaluate(bench.model, r.params, bench.val, device=bench.device).accuracy for r in results]
        return max(range(len(results)), key=lambda i: (scores[i], -i))
    clients = [r.client for r in results]
    if not reference.isdigit() or int(reference) not in clients:
        raise ConfigError(
            f"reference {reference!r}: expected 'largest', 'best' or one of the clients that answered, {clients}"
        )
    return clients.index(int(reference))


def how_to_align(results: Sequence[ClientResult], bench: Workbench, pipeline: Pipeline) -> dict[str, Any]:
    """The options of an alignment of the clients' networks to one of them, for a merger."""
    images = {"model": bench.model, "data": bench.public, "device": bench.device}
    return {
        "reference": reference_client(pipeline.reference, results, bench),
        "restarts": pipeline.restarts,
        "aligner": pipeline.aligner,
        "aligner_options": images if needs_images(pipeline.aligner) else None,
    }


def align_merge_retrain(
    results: Sequence[ClientResult],
    *,
    bench: Workbench,
    pipeline: Pipeline,
    server_round: int = 1,
    base: Params | None = None,
    on_stage: OnStage = lambda r, name, params: None,
) -> Aggregate:
    """One round of the server: align -> merge -> repair -> retrain, each stage reported.

    ``base`` is the network that all clients began from, for the mergers that add up steps from it.
    """
    models, weights = [r.params for r in results], [float(r.examples) for r in results]
    supplies = {
        "model": bench.model, "data": bench.public, "device": bench.device,
        "recipe": bench.recipe, "epochs": bench.retrain_epochs, "base": base,
    }  # fmt: skip
    if MERGERS[pipeline.merger].judges:
        supplies["data"] = bench.val
    merged = merge(
        models,
        spec=bench.spec,
        method=pipeline.merger,
        weights=weights,
        rng=numpy_stream(bench.seed, "merge", server_round),
        **how_to_align(results, bench, pipeline),
        **{name: value for name, value in supplies.items() if name in takes(pipeline.merger)},
    )
    params = merged.params
    on_stage(server_round, "merged", params)
    if pipeline.repair != "none":
        sources = ordered(models, merged, spec=bench.spec)
        params = repair(
            bench.model, params, data=bench.public, method=pipeline.repair,
            sources=sources, weights=weights, device=bench.device,
        )  # fmt: skip
        on_stage(server_round, "repaired", params)
    if pipeline.retrain != "none":
        params = retrain_on_public(params, models, bench=bench, how=pipeline.retrain, server_round=server_round)
        on_stage(server_round, "retrained", params)
    return Aggregate(params, merged)


def retrain_on_public(
    params: Params, teachers: Sequence[dict[str, Tensor]], *, bench: Workbench, how: str, server_round: int
) -> Params:
    """Retrain with the stream of this round; every control uses the same one, so comparisons are paired."""
    return retrain(
        bench.model, params, bench.public, how=how, teachers=teachers, recipe=bench.recipe,
        epochs=bench.retrain_epochs, generator=torch_stream(bench.seed, "retrain", server_round), device=bench.device,
    ).params  # fmt: skip


class MergeMany(Federated):
    """Flower strategy: the clients are asked as by FedAvg; the server aligns, merges, repairs, retrains."""

    def __init__(self, *, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> None:
        super().__init__(**options)
        self.bench, self.pipeline, self.on_stage = bench, pipeline, on_stage

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """The pipeline instead of a mean."""
        return align_merge_retrain(
            results,
            bench=self.bench,
            pipeline=self.pipeline,
            server_round=server_round,
            base=self._sent.to_torch_state_dict(),
            on_stage=self.on_stage,
        )


class FedAvgRetrain(Federated):
    """The fair control: the plain weighted mean, then the same retraining on the public split."""

    def __init__(self, *, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> None:
        super().__init__(**options)
        self.bench, self.pipeline, self.on_stage = bench, pipeline, on_stage

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """Average, then retrain."""
        models = [r.params for r in results]
        params = average(models, [r.examples for r in results])
        self.on_stage(server_round, "aggregated", params)
        if self.pipeline.retrain != "none":
            params = retrain_on_public(
                params, models, bench=self.bench, how=self.pipeline.retrain, server_round=server_round
            )
            self.on_stage(server_round, "retrained", params)
        return Aggregate(params)
