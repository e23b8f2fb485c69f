"""What merging does not take ends in an error of ours, with what was given; what is only unusual, works."""

import copy
import inspect

import numpy as np
import pytest
import torch
from pictures import SHAPE, network, pictures
from torch import nn
from unfit import AS_GIVEN, EXTREME, NO_STATE_DICTS, ODD, ends_well

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, FedmergeError, ParamsError, SpecError, UnknownNameError
from fedmerge.merge import MERGERS, ordered, takes
from fedmerge.models import Recipe

MODEL = network("one-layer")
SPEC = fm.perm_spec(MODEL, torch.zeros(2, *SHAPE))
A, B = (dict(network("one-layer", seed).state_dict()) for seed in (1, 2))
DATA = pictures(6)
every_merger = pytest.mark.parametrize("method", list(fm.mergers()))
FEW = {"epochs": 1, "restarts": 1, "max_steps": 2, "max_sweeps": 2}


def given(method: str) -> dict[str, object]:
    """What a merger cannot do without, and few steps."""
    supplies = {"model": MODEL, "data": DATA, "base": A, "recipe": Recipe(), **FEW}
    return {k: v for k, v in supplies.items() if k in takes(method)}


def merged(method: str, models: object = (A, B), **changes: object) -> fm.Merge:
    return fm.merge(models, **{"spec": SPEC, "method": method, **given(method), **changes})  # type: ignore[arg-type]


def unfit(kind: str, params: dict[str, torch.Tensor]) -> object:
    return NO_STATE_DICTS[kind](params)


@every_merger
def test_no_model_that_is_none_is_merged(method: str) -> None:
    for kind in NO_STATE_DICTS:
        bad = unfit(kind, B)
        # Alone, a network of fewer inputs may be right.
        for models in ([A, bad], [bad, A], *([] if kind == "a narrower tensor" else [[bad]])):
            with pytest.raises(FedmergeError, match=r".{20}"):
                merged(method, models)
        if "base" in takes(method):
            with pytest.raises(FedmergeError, match=r".{20}"):
                merged(method, base=bad)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare", "model-stock"])
def test_models_with_a_base_are_named_by_their_own_position(method: str) -> None:
    bad = {**B, "1.0.weight": torch.full_like(B["1.0.weight"], torch.nan)}
    for models, base, said in (
        ([A, bad], A, "of model 1 "),
        ([bad, A], A, "of model 0 "),
        ([A, B], bad, "of the base "),
    ):
        with pytest.raises(ParamsError, match=f"tensor '1.0.weight' {said}holds"):
            merged(method, models, base=base)
    with pytest.raises(ParamsError, match="the base lacks tensor '1.0.weight'"):
        merged(method, base={k: v for k, v in A.items() if k != "1.0.weight"})


@every_merger
def test_models_of_other_precision_layout_or_with_gradients_are_merged(method: str) -> None:
    for kind, change in AS_GIVEN.items():
        found = merged(method, [change(A), change(B)]).params
        for name, tensor in found.items():
            assert tensor.dtype == change(A)[name].dtype, kind
            assert not tensor.requires_grad, kind
            assert bool(tensor.isfinite().all()), kind


@every_merger
def test_one_model_is_merged_with_itself(method: str) -> None:
    found = merged(method, [A], base=A) if "base" in takes(method) else merged(method, [A])
    assert found.params.keys() == A.keys()
    if method != "ensemble-distillation":
        torch.testing.assert_close(found.params, A, rtol=1e-4, atol=1e-5)


@every_merger
def test_no_value_of_any_option_ends_in_a_raw_exception(method: str) -> None:
    names = {*inspect.signature(MERGERS[method].make).parameters}
    wrong = {
        f"{name}={value!r:.40}": said
        for name in sorted(names - {"_", "options", "epochs"})
        for value in (*ODD, *EXTREME)
        if not (name in ("aligner", "progress") and callable(value))  # what that raises is its author's
        if not (name in ("max_steps", "restarts") and isinstance(value, int) and 100 < value < 2**63)
        if (said := ends_well(lambda n=name, v=value: merged(method, **{n: v})))  # type: ignore[misc]
    }
    assert not wrong


@every_merger
def test_numbers_and_names_of_another_type_are_refused(method: str) -> None:
    for name, parameter in inspect.signature(MERGERS[method].make).parameters.items():
        if parameter.annotation in (int, float, str, bool) and name not in ("device", "order", "start"):
            with pytest.raises(FedmergeError, match=rf"{name} is a list; expected"):
                merged(method, **{name: []})
        if parameter.annotation in (int, float):
            for value in (float("nan"), float("inf"), "3", True, None):
                with pytest.raises(ConfigError, match=rf"{name} is {value!r}; expected a (whole|finite) number"):
                    merged(method, **{name: value})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights \[1.0\] do not fit 2 models"),
        ([1, 2, 3], "do not fit 2 models"),
        ([1, -1], "do not fit 2 models; give 2 finite non-negative numbers"),
        ([0, 0], "do not fit 2 models; give 2 finite non-negative numbers with a positive sum"),
        ([1, float("nan")], "do not fit 2 models"),
        ([1, float("inf")], "do not fit 2 models"),
        ([1, 10**400], "are not numbers; give 2"),
        ([1, 1j], "are not numbers; give 2"),
        (["1", "2"], "are not numbers; give 2"),
        ([True, False], "are not numbers; give 2"),
        ([[1, 2]], "do not fit 2 models"),
        ([1, [2]], "are not numbers; give 2"),
        ([1, None], "do not fit 2 models|are not numbers"),
        (5, "do not fit 2 models"),
        ({"a": 1, "b": 2}, "are not numbers; give 2"),
        (object(), "are not numbers; give 2"),
    ],
)
def test_weights_that_are_none_are_refused(weights: object, message: str) -> None:
    for use in (fm.average, fm.papa, lambda m, weights: fm.merge_many(m, spec=SPEC, weights=weights)):
        with pytest.raises(ParamsError, match=message):
            use([A, B], weights=weights)


def test_weights_of_any_size_and_kind_are_shares() -> None:
    expected = fm.average([A, B], [1, 3])
    for weights in (
        (0.25, 0.75), np.array([1, 3]), torch.tensor([1.0, 3.0], requires_grad=True), [5e307, 1.5e308], [1e-320, 3e-320],
    ):  # fmt: skip
        torch.testing.assert_close(fm.average([A, B], weights), expected)


@every_merger
def test_lists_of_models_that_are_none_are_refused(method: str) -> None:
    for models, message in (
        ([], "no model was given; give at least one state dict"),
        (A, "models is a dict; give a list of state dicts"),
        (None, "models is a NoneType; give a list of state dicts"),
        (iter([A, B]), "models is a list_iterator; give a list"),
        ({"a": A, "b": B}, "models is a dict; give a list"),
        ("ab", "model 0 is a str|models is a str"),
    ):
        with pytest.raises(ParamsError, match=message):
            merged(method, models)


READS = {
    method: [
        (nn.Sequential(MODEL, nn.Unflatten(1, (2, 2))), r"answers 1 images of pictures with torch.float32 \(1, 2, 2\)")
    ]
    for method in ("fisher", "greedy-soup", "ensemble-distillation", "fs-merge", "learned-coefficients")
}
"""Mergers that read the answers of a network; the others look at its units only."""


@every_merger
def test_images_and_networks_that_do_not_fit_are_named(method: str) -> None:
    if "data" not in takes(method):
        pytest.skip("it looks at no image")
    narrow = Images(DATA.images[:, :1], DATA.labels, DATA.classes, (0.5,), (0.3,), "grey")
    for data, message in (
        (pictures(4, shape=(3, 5, 5)), "Sequential does not take the images of pictures"),
        (narrow, "Sequential does not take the images of grey"),
        (pictures(0), "pictures holds no images"),
        (DATA.images, "does not take the rows of data, torch.uint8 .* give bytes as float, or as fm.data.Images"),
        (
            (DATA.images, DATA.labels),
            "does not take the rows of data, torch.uint8 .* give bytes as float, or as fm.data.Images",
        ),
    ):
        with pytest.raises(DataError, match=message):
            merged(method, data=data)
    for model, message in (
        (A, "model is a dict; expected a network"),
        (network, "model is a function; expected a network"),
        (network("mlp"), "these parameters are not a state dict of Sequential"),
        (copy.deepcopy(MODEL).half(), None),
        *READS.get(method, ()),
    ):
        with pytest.raises(ParamsError if message else DataError, match=message or "does not take the images"):
            merged(method, model=model)


@every_merger
def test_specs_generators_and_options_that_are_none_are_named(method: str) -> None:
    other = network("residual")
    with pytest.raises(ParamsError, match=r"model \d lacks tensor|missing|extra"):
        merged(method, spec=fm.perm_spec(other, torch.zeros(2, *SHAPE)))
    for spec in (None, MODEL, {}):
        with pytest.raises(SpecError, match="spec is .*; expected a PermSpec"):
            merged(method, spec=spec)
    for rng in (0, np.random.RandomState(0), torch.Generator(), np.random):
        with pytest.raises(ConfigError, match=r"rng is .*; expected a generator, as np.random.default_rng\(seed\)"):
            merged(method, rng=rng)
    with pytest.raises(UnknownNameError, match=rf"unknown option of merger {method} 'nosuch': known are"):
        merged(method, nosuch=1)
    with pytest.raises(ConfigError, match="restarts is 0; expected a whole number of at least 1"):
        merged(method, restarts=0)
    if "reference" in takes(method):
        with pytest.raises(ParamsError, match="reference is 2; there are 2 models, from 0"):
            merged(method, reference=2)
    if "device" in takes(method):
        with pytest.raises(ConfigError, match="device is 'gpu'; expected 'cpu' or a device of this machine"):
            merged(method, device="gpu")


def test_options_of_single_methods_are_named() -> None:
    for method, option, value, message in (
        ("merge-many", "start", "papr", "unknown start of MergeMany 'papr'.*did you mean 'paper'"),
        ("merge-many", "aligner", "nosuch", "unknown aligner 'nosuch'"),
        ("merge-many", "aligner_options", {"nosuch": 1}, "unknown option of weight-matching 'nosuch'"),
        ("hierarchical", "aligner_options", {"spec": SPEC}, r"aligner_options hold \['spec'\]"),
        ("layer-wise", "settled", ["nosuch"], "unknown group 'nosuch'"),
        ("layer-wise", "settled", "1.0", "settled is '1.0'; expected a list"),
        ("cycle-consistent", "tolerance", -1.0, "tolerance is -1.0; expected a finite number of at least 0"),
        ("ties", "density", 0.0, r"density of ties is 0; expected a share in \(0, 1\]"),
        ("ties", "density", 1.5, r"density of ties is 1.5; expected a share in \(0, 1\]"),
        ("fisher", "floor", -1.0, "floor of fisher is -1.0; expected a number of 0 or above"),
        ("regmean", "scale", 1.1, r"scale of regmean is 1.1; expected a number in \[0, 1\]"),
        ("greedy-soup", "statistics", "nosuch", "unknown repair 'nosuch'"),
        ("ensemble-distillation", "epochs", -1, "epochs is -1; at least 0 is needed"),
        ("ensemble-distillation", "recipe", {"lr": 1}, "recipe is a dict; expected a Recipe or None"),
        ("fs-merge", "lr", -0.1, "lr of fs-merge is -0.1; expected a number of 0 or above"),
        ("fs-merge", "target", torch.ones(5, 4), r"teacher is \(5, 4\); expected \(6, 4\)"),
        ("learned-coefficients", "lr", -0.1, "lr of learned-coefficients is -0.1; expected a number of 0 or above"),
        ("learned-coefficients", "target", torch.ones(6, 4), "the teacher's rows do not add up to 1"),
        ("ot-fusion", "mass", "heavy", "unknown mass of optimal transport 'heavy'"),
        ("ot-fusion", "metric", "l3", "unknown metric of optimal transport 'l3'"),
        ("ot-fusion", "correction", "nosuch", "unknown correction of OT fusion"),
        ("ot-fusion", "clip", (2.0, 1.0), r"expected \(low, high\)"),
        ("ot-fusion", "clip", 3, r"clip is 3; expected \(a finite number, a finite number\) or None"),
        ("ot-fusion", "batch_size", 0, "batch_size is 0; expected a whole number of at least 1"),
    ):
        with pytest.raises(FedmergeError, match=message):
            merged(method, **{option: value})


def test_an_explicit_start_wins_over_that_of_the_order() -> None:
    for order, start in (("merge-many", "paper"), ("merge-many-paper", "anchored")):
        found = merged("fisher", order=order, start=start)
        expected = merged("fisher", order={"paper": "merge-many-paper", "anchored": "merge-many"}[start])
        assert all(torch.equal(t, expected.params[name]) for name, t in found.params.items())


def test_the_population_takes_numbers_that_are_shares() -> None:
    for alpha in (-0.1, 1.1, float("nan"), "x", None, True):
        with pytest.raises(ConfigError, match="alpha"):
            fm.papa([A, B], alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown order 'nosuch'"):
        fm.papa([A, B], order="nosuch", spec=SPEC)
    with pytest.raises(ParamsError, match="papa needs the symmetries"):
        fm.papa([A, B], order="merge-many")
    for kind in NO_STATE_DICTS:
        if kind not in ("whole numbers", "truth values"):
            assert ends_well(lambda k=kind: fm.papa([A, unfit(k, B)])) is None  # type: ignore[misc]


def test_running_averages_take_networks_that_fit_and_options_that_they_have() -> None:
    for name in fm.running_averages():
        for kind in NO_STATE_DICTS:
            running = fm.running_average(name)
            running.update(A)
            if kind not in ("whole numbers", "truth values"):
                with pytest.raises(ParamsError, match=r".{20}"):
                    running.update(unfit(kind, B))  # type: ignore[arg-type]
            assert ends_well(lambda n=name, k=kind: fm.running_average(n).load_state(unfit(k, A), A)) is None  # type: ignore[misc]
            torch.testing.assert_close(running.params if kind not in ("whole numbers", "truth values") else A, A)
        with pytest.raises(FedmergeError, match="nosuch"):
            fm.running_average(name, nosuch=1)
        for option in ("decay", "latest"):
            for value in ODD:
                assert ends_well(lambda n=name, o=option, v=value: fm.running_average(n, **{o: v})) is None  # type: ignore[misc]
    for value in ODD:
        with pytest.raises(FedmergeError):
            fm.running_average(value)


def test_only_the_models_that_were_merged_are_ordered_by_a_merge() -> None:
    found = merged("merge-many")
    with pytest.raises(ParamsError, match="3 models were given, but the merge is of 2"):
        ordered([A, B, A], found, spec=SPEC)
    with pytest.raises(ParamsError, match="found is a dict; expected a Merge"):
        ordered([A, B], found.params, spec=SPEC)  # type: ignore[arg-type]


def test_arguments_too_few_too_many_or_twice_are_named() -> None:
    for call in (
        lambda: fm.merge([A, B]),
        lambda: fm.merge([A, B], SPEC),
        lambda: fm.merge([A, B], spec=SPEC, models=[A]),
        lambda: fm.merge_many([A, B]),
        fm.average,
        lambda: fm.average([A], [1], 3),
        lambda: fm.average([A], nosuch=3),
    ):
        with pytest.raises(FedmergeError, match="it takes|known are|unknown option"):
            call()  # type: ignore[operator]
