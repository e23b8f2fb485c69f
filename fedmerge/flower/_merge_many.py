"""MergeMany for anyone's Flower app: Flower's FedAvg, in which the server aligns, merges, repairs and retrains."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedmerge._arguments import check_arguments
from fedmerge._called import called
from fedmerge._check import check_number
from fedmerge._copies import duplicate
from fedmerge.align import ALIGNERS, Aligner, check_observable
from fedmerge.data import Images, as_data, labelled
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError
from fedmerge.flower.arrays import UnusableError
from fedmerge.flower.replies import MOST_IMAGES, T, number, only, shown, sift
from fedmerge.flower.sanity import Expected, Probe, check_made
from fedmerge.merge import MERGERS, Merger, average
from fedmerge.models import Recipe
from fedmerge.normalisation import REPAIRS, Repair
from fedmerge.pipeline import Params, Pipeline, Workbench, align_merge_retrain, measures
from fedmerge.retraining import RETRAININGS, Retraining
from fedmerge.spec import perm_spec
from fedmerge.tasks import check_carried, device_of
from fedmerge.teachers import TEACHERS
from fedmerge.training import evaluate


@dataclass(frozen=True)
class _Answer:
    """A usable answer: who gave it (Flower's node id), its network, what it counts, and all that came with it."""

    client: int
    params: Params
    examples: float
    content: RecordDict


class MergeMany(FedAvg):
    """Flower strategy for any PyTorch app: a round's networks are aligned, merged, repaired and retrained.

    Takes the place of Flower's ``FedAvg`` in a ServerApp. ClientApps stay as they are: they answer with one
    ``ArrayRecord`` (the state dict that they were sent, trained) and one ``MetricRecord`` with ``num-examples``. All
    options of ``FedAvg`` hold. Nothing is kept between rounds, so a new object can go on from any round's arrays.

    An answer that cannot be used (an error, missing or foreign tensors, NaN, numbers that no training reaches) is
    logged and left out; it ends no round. Metrics are aggregated over the answers that have the same ones as most.
    Beside them the round's ``MetricRecord`` holds ``merge-objective`` and ``merge-sweeps`` of mergers that climb, and
    with labelled public data ``public-accuracy-average`` (of the clients' plain mean, which is what FedAvg would have
    returned) and ``public-accuracy-merged``, ``-repaired`` and ``-retrained``. The last is measured on what was
    trained on. Where no answer is right or wrong, the four are losses, ``public-loss-average`` and so on.

    Methods are names, ``module:name`` of your own, or functions (``fedmerge.align.Aligner``, ``fedmerge.merge.Merger``
    ... say with what they are called; an entry of that class says what else it needs).

    Args:
        model: The network, a template that is not modified.
        example: What the network takes, for tracing its symmetries (see :func:`fedmerge.perm_spec`); not needed with
            ``public``.
        public: Data that the server may see: a DataLoader, a Dataset, ``(x, y)``, ``x`` without labels, or what
            :func:`fedmerge.data.as_data` makes of them with a forward function and a loss. Without it only weights are
            compared, and nothing is repaired or retrained.
        val: Held-out data for choices (``reference="best"``, ``merger="greedy-soup"``); ``public`` if None.
        aligner: A name from :func:`fedmerge.aligners`; by default ``"activation-matching"``, without public data
            ``"weight-matching"``.
        merger: A name from :func:`fedmerge.mergers`.
        reference: Whom all others are aligned to: ``"largest"`` (most examples), ``"best"`` or a node id.
        restarts: Climbs per alignment.
        repair: A name from :func:`fedmerge.repairs`; by default ``"recompute"``, without public data ``"none"``.
        retrain: ``"labels"``, ``"distill"`` (from the clients' ensemble), ``"both"`` or ``"none"``; by default as much
            as the public data allow.
        teacher: What the clients' predictions on public data are made into where they are learned from, a name of
            ``fedmerge.teachers.TEACHERS``: ``"stacked"`` on the public labels, which is far better than their
            ``"mean"`` where clients know different classes; by default the one where labels allow it, else the other.
            ``"by-class"`` asks for counts that answers do not hold.
        recipe: How to retrain.
        retrain_epochs: Passes over the public data; the recipe's if None.
        seed: Of the climbs and of retraining; equal answers in equal order give equal bytes.
        device: Where the server computes: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        options: Of Flower's FedAvg.

    Raises:
        UnknownNameError: An option or method that does not exist.
        ConfigError: A step that needs public data or labels, and there are none; a number out of its range.
        SpecError: The network cannot be traced, or the merger does not know its layers.
        DataError: Public data that the network does not take.

    Example:
        >>> import torch
        >>> from fedmerge.flower import MergeMany
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> strategy = MergeMany(model=net, example=torch.zeros(1, 4), fraction_evaluate=0.5)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        example: Any = None,
        public: Any = None,
        val: Any = None,
        aligner: str | Aligner | Callable[..., Any] | None = None,
        merger: str | Merger | Callable[..., Any] = "merge-many",
        reference: str | int = "largest",
        restarts: int = 5,
        repair: str | Repair | Callable[..., Any] | None = None,
        retrain: str | Retraining | Callable[..., Any] | None = None,
        teacher: str = "auto",
        recipe: Recipe | None = None,
        retrain_epochs: int | None = None,
        seed: int = 0,
        device: str = "auto",
        **options: Any,
    ) -> None:
        known = [*inspect.signature(FedAvg).parameters, *inspect.signature(type(self)).parameters]
        for option in options:
            if option not in known:
                raise UnknownNameError("option of MergeMany", option, known)
        numbers = {"restarts": restarts, "recipe": recipe, "retrain_epochs": retrain_epochs, "seed": seed}
        check_arguments(MergeMany.__init__, {"reference": reference, **numbers})
        if retrain_epochs is not None:
            check_number("retrain_epochs", retrain_epochs, 0)
        digits = str(reference)
        if reference not in ("largest", "best") and not (digits.isdecimal() and digits.isascii()):
            raise ConfigError(f"reference is {reference!r}; expected 'largest', 'best' or a node id")
        super().__init__(**options)
        if not isinstance(model, nn.Module):
            raise ParamsError(f"model is a {type(model).__name__}; expected a network (an nn.Module)")
        model = duplicate(model).cpu()
        check_carried(type(model).__name__, model)
        data = None if public is None else as_data(public, model, "public")
        model = called(model, None if data is None else data.forward)
        if data is None and example is None:
            raise ConfigError(
                "MergeMany has neither example nor public; give example=x, what the network takes, or public=data"
            )
        self._labelled = data is not None and labelled(data)
        self.pipeline = Pipeline(
            aligner=ALIGNERS.named(aligner or ("weight-matching" if data is None else "activation-matching")),
            merger=MERGERS.named(merger),
            reference=str(reference),
            restarts=restarts,
            repair=REPAIRS.named(repair or ("none" if data is None else "recompute")),
            retrain=RETRAININGS.named(retrain or _retraining(data)),
            teacher=TEACHERS.named(teacher),
        )
        _check(self.pipeline, data, data if val is None else as_data(val, model, "val"))
        MERGERS[self.pipeline.merger].check(model)
        recipe = recipe or Recipe()
        sample = (data.normalise(data.images[:2]),) if data is not None and example is None else example
        shown = data if data is not None or not isinstance(sample, Tensor) else as_data(sample, model, "example")
        spec = perm_spec(model, sample)
        self._bench = Workbench(
            model, spec, shown, shown if val is None else as_data(val, model, "val"), recipe,  # type: ignore[arg-type]
            recipe.epochs if retrain_epochs is None else retrain_epochs, seed, device_of(device),
        )  # fmt: skip
        self._probe = None
        if shown is not None:
            self._probe = Probe(model, shown, self._bench.device, measured=measures(self.pipeline))
            left = check_observable(self.pipeline.aligner, model, spec, shown, self._bench.device)
            if left:
                log(WARNING, "%s leaves in their order: %s", self.pipeline.aligner, ", ".join(left))

    def summary(self) -> None:
        """Log the steps of the server, then Flower's own summary."""
        log(INFO, "\t├──> fedmerge: %s", ", ".join(f"{step} {how}" for step, how in vars(self.pipeline).items()))
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; notes what is sent, for answers are compared with that.

        Raises:
            ParamsError: The arrays are no state dict of the network.
        """
        _check_sent(arrays, self._bench.model)
        self._sent = arrays
        self._expected = Expected(arrays, self._bench.spec.parameters, self._probe)
        self._questions = list(super().configure_train(server_round, arrays, config, grid))
        return self._questions

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg."""
        self._questions = list(super().configure_evaluate(server_round, arrays, config, grid))
        return self._questions

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align, merge, repair and retrain the usable answers; nothing if there are none.

        Raises:
            RoundError: The result is not finite.
        """

        def read(client: int, content: RecordDict) -> _Answer:
            weight = self._weight(only(content, MetricRecord))
            return _Answer(client, self._expected.network(only(content, ArrayRecord)), weight, content)

        answers = self._sifted(replies, read, server_round, "aggregate_train")
        if not answers:
            return None, None
        made: dict[str, float] = {}
        if self._labelled:
            mean = average([a.params for a in answers], [a.examples for a in answers])
            made |= self._measured("average", mean)

        def on_stage(server_round: int, stage: str, params: Params) -> None:
            if self._labelled:
                made.update(self._measured(stage, params))

        found = align_merge_retrain(
            answers, bench=self._bench, pipeline=self.pipeline, server_round=server_round,
            base=self._sent.to_torch_state_dict(), on_stage=on_stage,
        )  # fmt: skip
        check_made(found.params, f"round {server_round}: MergeMany", of=len(answers))
        if found.merge is not None and found.merge.history:
            made |= {"merge-objective": found.merge.objective, "merge-sweeps": found.merge.sweeps}
        like = answers[0].params
        arrays = ArrayRecord({name: found.params[name].to(like[name].dtype) for name in self._sent})
        if found.note:
            log(WARNING, "aggregate_train: %s", found.note)
        metrics = self.train_metrics_aggr_fn(_alike([a.content for a in answers]), self.weighted_by_key)
        metrics = MetricRecord() if metrics is None else metrics
        for name, value in made.items():
            metrics[name] = value
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As FedAvg, of the usable answers."""

        def read(client: int, content: RecordDict) -> RecordDict:
            self._weight(only(content, MetricRecord))
            return content

        found = self._sifted(replies, read, server_round, "aggregate_evaluate")
        return self.evaluate_metrics_aggr_fn(_alike(found), self.weighted_by_key) if found else None

    def _sifted(
        self, replies: Iterable[Message], read: Callable[[int, RecordDict], T], server_round: int, step: str
    ) -> list[T]:
        """What was read of the usable answers; the others are logged."""
        asked = {m.metadata.dst_node_id: m.metadata.dst_node_id for m in self._questions}
        found, failures = sift(replies, read, server_round=server_round, asked=asked, questions=self._questions)
        if asked:
            log(INFO, "%s: Received %s results and %s failures", step, len(found), len(failures))
        for failure in failures:
            log(WARNING, "%s: the answer of node %s is left out: %s", step, failure.client, failure.reason)
        return found

    def _weight(self, metrics: MetricRecord) -> float:
        _form(metrics)
        weight = number(metrics, self.weighted_by_key, 0, MOST_IMAGES)
        if not weight:
            raise UnusableError(f"metric {self.weighted_by_key!r} is 0, expected more")
        return weight

    def _measured(self, stage: str, params: Params) -> dict[str, float]:
        found = evaluate(self._bench.model, params, self._bench.public, device=self._bench.device)
        known = not math.isnan(found.accuracy)
        return {f"public-accuracy-{stage}": found.accuracy} if known else {f"public-loss-{stage}": found.loss}


def _retraining(data: Images | None) -> str:
    """As much as the public data allow."""
    if data is None:
        return "none"
    return "distill" if not labelled(data) else "both" if data.classes else "labels"


def _check(pipeline: Pipeline, data: Images | None, val: Images | None) -> None:
    """Refuse steps that need what the server does not have."""
    judged = val is not None and labelled(val)
    seen, known = data is not None, data is not None and labelled(data)
    merger, retraining = MERGERS[pipeline.merger], RETRAININGS[pipeline.retrain]
    steps = {
        f"aligner {pipeline.aligner!r}": "data" in ALIGNERS[pipeline.aligner].needs and "aligner" in merger.reads,
        f"merger {pipeline.merger!r}": "data" in merger.needs and not (merger.judges and val is not None),
        f"repair {pipeline.repair!r}": "data" in REPAIRS[pipeline.repair].needs,
        f"retrain {pipeline.retrain!r}": pipeline.retrain != "none",
        f"reference {pipeline.reference!r}": pipeline.reference == "best" and val is None,
    }
    for step, looks in steps.items():
        if looks and not seen:
            raise ConfigError(f"{step} looks at public data, and there are none; give public=data or another method")
    if seen and not known and retraining.labelled:
        raise ConfigError(
            f"retrain {pipeline.retrain!r} reads labels, and not all rows of public have one; give labels, or take "
            "retrain='distill'"
        )
    if val is not None and not judged and (merger.judges or pipeline.reference == "best"):
        raise ConfigError(
            f"merger {pipeline.merger!r} or reference {pipeline.reference!r} chooses by labels, and not all rows of "
            f"{val.name} have one; give val=(x, y)"
        )
    if data is not None and not data.classes and ("teachers" in retraining.needs or "epochs" in merger.needs):
        raise ConfigError(
            f"retrain {pipeline.retrain!r} or merger {pipeline.merger!r} learns probabilities of classes, and the "
            "answers to public are no classes; take retrain='labels' or 'none', and another merger"
        )
    if pipeline.counts_labels:
        raise ConfigError(
            f"teacher {pipeline.teacher!r} asks how many images of each class a client has, which Flower's answers do "
            "not say; take teacher='auto', 'stacked' or 'mean'"
        )
    if data is not None and "target" in retraining.needs:
        TEACHERS[pipeline.teacher].check(data)


def _check_sent(arrays: ArrayRecord, model: nn.Module) -> None:
    """Refuse arrays to begin from that are no state dict of ``model``."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(array.shape) for name, array in arrays.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise ParamsError(
                f"tensor {name!r} is {given.get(name, 'missing')} in the arrays to begin from and "
                f"{expected.get(name, 'missing')} in {type(model).__name__}; start with "
                "ArrayRecord(model.state_dict()) of the model that MergeMany has"
            )


def _form(metrics: MetricRecord) -> frozenset[tuple[str, int]]:
    """The keys of ``metrics``, each with how many numbers it holds; -1 for one that is no list.

    Raises:
        UnusableError: A metric is no number.
    """
    for key, value in metrics.items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, int | float):
                raise UnusableError(f"metric {shown(key)} is {shown(value)}, expected numbers")
    return frozenset((key, len(value) if isinstance(value, list) else -1) for key, value in metrics.items())


def _finite(metrics: MetricRecord) -> bool:
    numbers = (one for value in metrics.values() for one in (value if isinstance(value, list) else [value]))
    return all(map(math.isfinite, numbers))


def _alike(contents: list[RecordDict]) -> list[RecordDict]:
    """Those of ``contents`` whose metrics have the form that most have, because Flower's functions need one form.

    Without those that hold NaN or infinite numbers, as a measure that is not defined on somebody's rows does.
    """
    whole = [content for content in contents if _finite(only(content, MetricRecord))]
    if whole and len(whole) < len(contents):
        log(WARNING, "%d of %d answers have metrics that are not finite", len(contents) - len(whole), len(contents))
        contents = whole
    forms = [_form(only(content, MetricRecord)) for content in contents]
    most = max(forms, key=forms.count)
    if others := len(forms) - forms.count(most):
        log(WARNING, "%d of %d answers have other metrics than most: left out of their mean", others, len(forms))
    return [content for content, form in zip(contents, forms, strict=True) if form == most]
