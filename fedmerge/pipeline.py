"""What a server makes of its clients' networks: align -> merge -> repair -> retrain."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor, nn

from fedmerge.align import ALIGNERS, needs_images
from fedmerge.align.traces import Traces, sharing
from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.merge import MERGERS, Merge, merge, ordered, takes
from fedmerge.models import Recipe
from fedmerge.normalisation import REPAIRS, repair
from fedmerge.retraining import RETRAININGS, retrain
from fedmerge.spec import PermSpec
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.teachers import TEACHERS, Teaching, teach
from fedmerge.training import evaluate

Params = dict[str, Tensor]


class Answer(Protocol):
    """What the server reads of a client's answer: who it is, its network, and how much that counts."""

    @property
    def client(self) -> int: ...  # noqa: D102

    @property
    def params(self) -> Params: ...  # noqa: D102

    @property
    def examples(self) -> float: ...  # noqa: D102


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
        traces: What the architecture was traced to, in any round.
    """

    model: nn.Module
    spec: PermSpec
    public: Images
    val: Images
    recipe: Recipe
    retrain_epochs: int
    seed: int
    device: str = "cpu"
    traces: Traces = field(default_factory=Traces, compare=False, repr=False)


@dataclass(frozen=True)
class Pipeline:
    """Which method for which step; ``"none"`` switches a step off."""

    aligner: str = "activation-matching"
    merger: str = "merge-many"
    reference: str = "largest"
    restarts: int = 5
    repair: str = "recompute"
    retrain: str = "both"
    teacher: str = "auto"

    @property
    def teaches(self) -> bool:
        """Whether its retraining or its merger reads what the clients teach."""
        return "target" in RETRAININGS[self.retrain].needs | takes(self.merger)

    @property
    def counts_labels(self) -> bool:
        """Whether its teacher has to know how many images of each class the clients have."""
        return self.teaches and "counts" in TEACHERS[self.teacher].needs


@dataclass(frozen=True)
class Aggregate:
    """What a strategy makes of the clients of a round; nothing of it is kept by the strategy.

    Attributes:
        params: The new global network.
        merge: How the clients were brought into one order, where they were.
        note: What a reader of the record has to know; empty if nothing.
    """

    params: Params
    merge: Merge | None = None
    note: str = ""


STEPS = frozenset(f.name for f in fields(Pipeline))
"""What a strategy can read of a pipeline."""


def measures(pipeline: Pipeline, reads: Collection[str] = STEPS) -> bool:
    """Whether those steps of ``pipeline`` run the clients' networks on images, each with its own statistics."""
    return (
        ("aligner" in reads and "data" in ALIGNERS[pipeline.aligner].needs)
        or ("merger" in reads and "data" in MERGERS[pipeline.merger].needs)
        or ("repair" in reads and REPAIRS[pipeline.repair].needs >= {"data", "sources"})
        or ("retrain" in reads and "teachers" in RETRAININGS[pipeline.retrain].needs)
    )


OnStage = Callable[[int, str, Params], None]
"""Called with the round, the name of the stage and its network."""


def reference_client(reference: str, results: Sequence[Answer], bench: Workbench) -> int:
    """Position in ``results`` of the client to which all others are aligned.

    ``reference`` is ``"largest"`` (most images; the lowest id of equals), ``"best"`` (accuracy on the
    validation split, or loss where there is none) or a client's id; of one that did not answer the largest stands in.

    Raises:
        ConfigError: Neither of these.
    """
    if reference == "largest" or stand_in(reference, results):
        return max(range(len(results)), key=lambda i: (results[i].examples, -i))
    if reference == "best":
        scores = [evaluate(bench.model, r.params, bench.val, device=bench.device).merit for r in results]
        return max(range(len(results)), key=lambda i: (scores[i], -i))
    clients = [r.client for r in results]
    if not reference.isdecimal():
        raise ConfigError(f"reference {reference!r}: expected 'largest', 'best' or the number of a client")
    return clients.index(int(reference))


def stand_in(reference: str, results: Sequence[Answer]) -> str:
    """What there is to note where the client that is the reference did not answer; nothing where it did."""
    if not reference.isdecimal() or int(reference) in [r.client for r in results]:
        return ""
    return f"client {reference}, the reference, did not answer: aligned to the one with the most images"


def how_to_align(results: Sequence[Answer], bench: Workbench, pipeline: Pipeline) -> dict[str, Any]:
    """The options of an alignment of the clients' networks to one of them, for a merger."""
    images = {"model": bench.model, "data": bench.public, "device": bench.device}
    return {
        "reference": reference_client(pipeline.reference, results, bench),
        "restarts": pipeline.restarts,
        "aligner": pipeline.aligner,
        "aligner_options": images if needs_images(pipeline.aligner) else None,
    }


def align_merge_retrain(
    results: Sequence[Answer],
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
    taught = None
    if "target" in takes(pipeline.merger):
        taught = teaching(results, bench=bench, pipeline=pipeline)
        supplies["target"] = None if taught is None else taught.on_public
    with sharing(bench.traces):
        merged = merge(
            models,
            spec=bench.spec,
            method=pipeline.merger,
            weights=weights,
            rng=numpy_stream(bench.seed, "merge", server_round),
            **how_to_align(results, bench, pipeline),
            **{name: value for name, value in supplies.items() if name in takes(pipeline.merger)},
        )
    on_stage(server_round, "merged", merged.params)
    sources = ordered(models, merged, spec=bench.spec) if pipeline.repair != "none" else ()
    params, note = correct(
        merged.params, bench=bench, pipeline=pipeline, server_round=server_round, on_stage=on_stage,
        sources=sources, weights=weights, results=results, taught=taught,
    )  # fmt: skip
    return Aggregate(params, merged, noted(note, stand_in(pipeline.reference, results)))


def noted(*notes: str) -> str:
    """All that there is to note, in one line."""
    return "; ".join(filter(None, notes))


def correct(
    params: Params,
    *,
    bench: Workbench,
    pipeline: Pipeline,
    server_round: int,
    on_stage: OnStage,
    sources: Sequence[Params] = (),
    weights: Sequence[float] | None = None,
    results: Sequence[Answer] = (),
    taught: Teaching | None = None,
) -> tuple[Params, str]:
    """A merged network repaired and retrained, each stage reported, and what there is to note about its teacher.

    The clients' answers are needed where the steps read them; ``taught`` is what they teach, where that is known.
    """
    note = "" if taught is None else taught.note
    if pipeline.repair != "none":
        params = repair(
            bench.model, params, data=bench.public, method=pipeline.repair,
            sources=sources, weights=weights, device=bench.device,
        )  # fmt: skip
        on_stage(server_round, "repaired", params)
    if pipeline.retrain != "none":
        params, note = retrained(
            results, params, bench=bench, pipeline=pipeline, server_round=server_round, taught=taught
        )
        on_stage(server_round, "retrained", params)
    return params, note


def retrained(
    results: Sequence[Answer], params: Params, *, bench: Workbench, pipeline: Pipeline, server_round: int,
    taught: Teaching | None = None,
) -> tuple[Params, str]:  # fmt: skip
    """``params`` retrained with the teacher that the clients are, and what there is to note about it."""
    taught = taught or teaching(results, bench=bench, pipeline=pipeline)
    models, how = [r.params for r in results], pipeline.retrain
    found = retrain_on_public(params, models, bench=bench, how=how, server_round=server_round, taught=taught)
    return found, "" if taught is None else taught.note


def teaching(results: Sequence[Answer], *, bench: Workbench, pipeline: Pipeline) -> Teaching | None:
    """What the clients teach on the public images; None where neither retraining nor merger reads it.

    Raises:
        ConfigError: The teacher needs the clients' label counts, and they did not send them.
        DataError: It needs more labels than there are.
    """
    if not pipeline.teaches:
        return None
    counts = [getattr(r, "label_counts", ()) for r in results] if pipeline.counts_labels else ()
    models = [r.params for r in results]
    return teach(pipeline.teacher, bench.model, models, bench.public, counts=counts, device=bench.device)


def retrain_on_public(
    params: Params, teachers: Sequence[dict[str, Tensor]], *, bench: Workbench, how: str, server_round: int,
    taught: Teaching | None = None,
) -> Params:  # fmt: skip
    """Retrain with the stream of this round; every control uses the same one, so comparisons are paired.

    Distillation aims at what is ``taught``, at the mean prediction of ``teachers`` if nothing is given.
    """
    return retrain(
        bench.model, params, bench.public, how=how, teachers=teachers, recipe=bench.recipe,
        epochs=bench.retrain_epochs, generator=torch_stream(bench.seed, "retrain", server_round), device=bench.device,
        target=None if taught is None else taught.on_public,
    ).params  # fmt: skip
