"""A method is described in one place: what an entry says holds, and one that says too little is refused."""

import functools
import inspect
import pickle
from functools import partial

import pytest
import torch
from flwr.serverapp import strategy as flower
from torch import nn

import fedmerge as fm
import strategies
from fedmerge import data, models
from fedmerge.align import ALIGNERS, Aligner
from fedmerge.errors import UnknownNameError
from fedmerge.merge import MERGERS, Merger
from fedmerge.models import Recipe
from fedmerge.normalisation import REPAIRS, Repair
from fedmerge.registry import Entry, Registry
from fedmerge.retraining import RETRAININGS
from strategies import STRATEGIES, Strategy

GIVEN = {"name": "mine", "make": lambda **_: None, "summary": "one of mine"}


def parameters(function: object) -> set[str]:
    """Names of the keywords of a function, without those that it collects."""
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {p.name for p in found if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("registry", "entry", "problem"),
    [
        (ALIGNERS, Aligner(**{**GIVEN, "summary": ""}), "aligner 'mine' .* its summary is ''; give one line"),
        (ALIGNERS, Aligner(**{**GIVEN, "summary": "a\nb"}), "give one line"),
        (ALIGNERS, Aligner(**{**GIVEN, "make": None}), "its make is None; give the function or class"),  # type: ignore[arg-type]
        (ALIGNERS, Aligner(**{**GIVEN, "name": ""}), "aligner '' cannot be registered: it has no name"),
        (ALIGNERS, Aligner(**{**GIVEN, "name": "ste"}), "aligner 'ste' cannot be registered: this name is taken"),
        (ALIGNERS, Aligner(**GIVEN, needs=frozenset({"base"})), "needs base; it can be supplied with data, model"),
        (MERGERS, Merger(**GIVEN, needs=frozenset({"data"}), options=("data",)), "both needs and may be given data"),
        (MERGERS, Merger(**GIVEN, reads=frozenset({"repair"})), "reads repair; steps of an alignment are aligner, "),
        (MERGERS, Merger(**GIVEN, judges=True), "judges by images and needs no data"),
        (REPAIRS, Repair(**GIVEN, needs=frozenset({"teachers"})), "repair 'mine' .* data, sources"),
        (data.PARTITIONS, data.Partition(**GIVEN, needs=frozenset({"alpha"})), "partition_alpha, per_client"),
        (models.MODELS, models.Model(**GIVEN, recipe=Recipe(), options={"depth": 3}), "bias, kernel_size, width"),
        (models.MODELS, models.Model(**GIVEN, recipe=Recipe(), counts="units"), "counts units, and it has no width"),
        (STRATEGIES, Strategy(**GIVEN, reads=frozenset({"merge"})), "reads or fixes merge; the steps are aligner, "),
        (STRATEGIES, Strategy(**GIVEN, fixes={"repaire": "none"}), "reads or fixes repaire"),
        (STRATEGIES, Strategy(**GIVEN, fixes={"merger": "averag"}), "unknown merger 'averag'.*did you mean 'average'"),
        (STRATEGIES, Strategy(**GIVEN, told={"proximal_mu": 1.0}), "told proximal_mu, which are not among its opt"),
    ],
)
def test_an_entry_that_is_incomplete_or_contradicts_itself_is_refused_when_it_is_registered(
    registry: Registry[Entry], entry: Entry, problem: str
) -> None:
    known = dict(registry)
    with pytest.raises(ValueError, match=problem):
        registry.add(entry)
    assert dict(registry) == known


def test_an_entry_without_what_every_entry_has_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'summary'"):
        Aligner(name="mine", make=lambda **_: None)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ALIGNERS)
def test_what_an_aligner_needs_is_what_it_takes(name: str) -> None:
    entry = ALIGNERS[name]
    taken = parameters(entry.make)
    assert taken >= {"to", "spec", "rng", "restarts"} | entry.needs
    if "data" in taken and not entry.needs:  # only where an option asks for it
        assert taken & {"ground", "cost"}


@pytest.mark.parametrize("name", MERGERS)
def test_what_a_merger_needs_reads_and_may_be_given_is_what_it_takes(name: str) -> None:
    entry = MERGERS[name]
    taken = parameters(entry.make) - {"spec", "weights", "rng"}
    assert entry.needs | set(entry.options) == taken
    passed_on = {"aligner", "reference", "restarts"} if "order" in taken else set()
    assert entry.reads <= taken | passed_on


@pytest.mark.parametrize("name", data.PARTITIONS)
def test_what_a_partition_needs_is_what_it_takes(name: str) -> None:
    assert parameters(data.PARTITIONS[name].make) == data.PARTITIONS[name].needs


@pytest.mark.parametrize("name", models.MODELS)
def test_the_options_of_a_model_are_those_that_it_takes(name: str) -> None:
    make = models.MODELS[name].make
    fixed = set(make.keywords) if isinstance(make, partial) else set()
    network = make.func if isinstance(make, partial) else make
    assert {p for p in inspect.signature(network).parameters if p not in ("classes", "in_shape")} - fixed == set(
        models.MODELS[name].options
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_options_of_a_strategy_are_the_numbers_that_it_takes(name: str) -> None:
    entry = STRATEGIES[name]
    known = {k.lower(): v for k, v in (vars(strategies) | vars(flower)).items() if inspect.isclass(v)}
    base = known.get(name.replace("-", ""), entry.make)
    numbers = {p.name for p in inspect.signature(base).parameters.values() if p.annotation in (int, float)}
    assert set(entry.options) == numbers - set(inspect.signature(flower.FedAvg).parameters)


@pytest.mark.parametrize("name", RETRAININGS)
def test_a_retraining_runs_the_clients_networks_if_its_labels_do_not_count_alone(name: str) -> None:
    make = RETRAININGS[name].make
    weight = make.keywords["labels_weight"] if isinstance(make, partial) else 1.0
    assert ("teachers" in RETRAININGS[name].needs) == (weight < 1)


def test_lists_of_methods_say_the_options_of_strategies() -> None:
    assert "; alpha: how much of itself a network keeps in a pull, every: " in strategies.summaries()["papa"]
    assert strategies.summaries()["fedavg"] == STRATEGIES["fedavg"].summary
    with pytest.raises(UnknownNameError, match="unknown option of strategy fedavg 'eta': known are \\(none\\)"):
        STRATEGIES.check_options("fedavg", ["eta"])


def test_functions_of_ones_own_are_methods_as_they_are_and_by_a_name_that_a_notebook_may_give_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for registry in (ALIGNERS, MERGERS, models.MODELS):
        monkeypatch.setattr(registry, "_entries", dict(registry))
        monkeypatch.setattr(registry, "_own", set())
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = fm.perm_spec(net, torch.zeros(1, 3))
    (group,) = spec.groups
    a, b = ({k: v + i for k, v in net.state_dict().items()} for i in (0, 1))

    def turned(params, *, to, spec, rng, restarts=1):
        """Every unit one on."""
        return fm.Alignment({group: torch.arange(4).roll(1)}, 0.0, (), 0, True)

    def one(found, *, spec, weights, rng, which=0, **options):
        return fm.Merge(dict(found[which]), tuple(spec.identity(m) for m in found), 0.0, (), 0, True)

    assert fm.align(b, a, spec=spec, method=turned).perms[group].tolist() == [3, 0, 1, 2]
    mean = fm.merge([a, b], spec=spec, aligner=turned, max_sweeps=0).params["0.bias"]
    torch.testing.assert_close(mean, (a["0.bias"] + b["0.bias"].roll(1)) / 2)
    assert torch.equal(fm.merge([a, b], spec=spec, method=one, which=1).params["0.bias"], b["0.bias"])
    for summary in ("once", "twice"):
        fm.register("merger", "one", one, summary=summary)
    assert fm.mergers()["one"] == "twice"
    assert torch.equal(fm.merge([a, b], spec=spec, method="one", which=1).params["0.bias"], b["0.bias"])
    fm.register("aligner", "turned", turned)
    assert fm.aligners()["turned"] == "Every unit one on."
    fm.register("model", "tiny", lambda classes, in_shape: nn.Linear(3, classes), recipe=Recipe(lr=0.5))
    assert models.recipe("tiny").lr == 0.5
    with pytest.raises(ValueError, match="merger 'ties' cannot be registered: this name is taken"):
        fm.register("merger", "ties", one)
    with pytest.raises(ValueError, match="its summary is 'a.nb'; give one line"):
        fm.register("merger", "one", one, summary="a\nb")
    assert fm.mergers()["one"] == "twice"
    with pytest.raises(UnknownNameError, match="unknown kind of method 'mergr'.*did you mean 'merger'"):
        fm.register("mergr", "one", one)
    with pytest.raises(
        fm.FedmergeError, match=r"aligner '<lambda>' cannot be used: it is called with \(params, to=, spec"
    ):
        fm.align(b, a, spec=spec, method=lambda params, to: None)  # type: ignore[arg-type, misc]
    with pytest.raises(fm.FedmergeError, match="merger 'given' returned a NoneType; expected a Merge"):
        fm.merge([a, b], spec=spec, method=functools.partial(late, 0))


def late(number, found, *, spec, weights, rng, **options):
    return None


def test_an_unknown_name_says_the_same_in_another_process() -> None:
    error = UnknownNameError("aligner", "weight-macthing", ("weight-matching", "none"))
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.known, found.nearest) == (str(error), ("none", "weight-matching"), "weight-matching")
