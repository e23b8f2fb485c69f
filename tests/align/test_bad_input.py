"""What alignment does not take ends in an error of ours, with what was given; what is only unusual, works."""

import inspect

import numpy as np
import pytest
import torch
from pictures import SHAPE, network, pictures
from unfit import AS_GIVEN, EXTREME, NO_STATE_DICTS, ODD, ends_well

import fedmerge as fm
from fedmerge.align import ALIGNERS, needs_images
from fedmerge.errors import ConfigError, DataError, FedmergeError, ParamsError, SpecError, UnknownNameError

MODEL = network("one-layer")
SPEC = fm.perm_spec(MODEL, torch.zeros(2, *SHAPE))
(GROUP,) = SPEC.groups
A, B = (dict(network("one-layer", seed).state_dict()) for seed in (1, 2))
DATA = pictures(6)
every_aligner = pytest.mark.parametrize("method", list(fm.aligners()))


def takes(method: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(ALIGNERS[method].make).parameters)


def aligned(method: str, params: object = B, /, **changes: object) -> fm.Alignment:
    few = {k: v for k, v in {"steps": 2, "epochs": 1, "max_steps": 2}.items() if k in takes(method)}
    images = {"model": MODEL, "data": DATA} if needs_images(method) else {}
    return fm.align(params, **{"to": A, "spec": SPEC, "method": method, **few, **images, **changes})  # type: ignore[arg-type]


@every_aligner
def test_no_network_that_is_none_is_aligned(method: str) -> None:
    for bad in NO_STATE_DICTS.values():
        with pytest.raises(FedmergeError, match=r".{20}"):
            aligned(method, bad(B))
        with pytest.raises(FedmergeError, match=r".{20}"):
            aligned(method, to=bad(A))


@every_aligner
def test_networks_of_other_precision_layout_or_with_gradients_are_aligned(method: str) -> None:
    for kind, change in AS_GIVEN.items():
        found = aligned(method, change(B), to=change(A))
        assert sorted(found.perms[GROUP].tolist()) == list(range(9)), kind
        assert not any(t.requires_grad for t in fm.permute(change(B), found.perms, spec=SPEC).values())


@every_aligner
def test_no_value_of_any_option_ends_in_a_raw_exception(method: str) -> None:
    """Of options that say how long it takes, a large value is right, and takes as long."""
    images = {"model": MODEL, "data": DATA} if "data" in takes(method) else {}

    def end(name: str, value: object) -> None:
        found = aligned(method, value) if name == "params" else aligned(method, **{**images, name: value})
        assert sorted(found.perms[GROUP].tolist()) == list(range(9))

    wrong = {
        f"{name}={value!r:.40}": said
        for name in sorted(takes(method).keys() - {"epochs"})
        for value in (*ODD, *EXTREME)
        if not (name in ("steps", "restarts", "bins") and isinstance(value, int) and 100 < value < 2**63)
        if (said := ends_well(lambda n=name, v=value: end(n, v)))  # type: ignore[misc]
    }
    assert not wrong


@every_aligner
def test_networks_whose_products_overflow_are_aligned_or_refused(method: str) -> None:
    for scale in (1e30, 1e160, 1e300):
        large = [{k: v.double() * scale for k, v in p.items()} for p in (A, B)]
        for to, params in (large, (A, large[1]), (large[0], B)):
            assert ends_well(lambda a=to, b=params: aligned(method, b, to=a)) is None  # type: ignore[misc]


@every_aligner
def test_what_is_no_spec_generator_option_or_device_is_named(method: str) -> None:
    for changes, kind, message in (
        ({"spec": None}, SpecError, "spec is None; expected a PermSpec"),
        ({"rng": 0}, ConfigError, "rng is 0; expected a generator"),
        ({"rng": np.random.RandomState(0)}, ConfigError, "rng is a RandomState; expected a generator"),
        ({"nosuch": 1}, UnknownNameError, "unknown option of .* 'nosuch': known are"),
        ({"restarts": 0}, ConfigError, "restarts is 0; expected a whole number of at least 1"),
        ({"restarts": 1.5}, ConfigError, "restarts is 1.5; expected a whole number"),
        ({"method": "nosuch"}, UnknownNameError, "unknown aligner 'nosuch'"),
        ({"method": None}, ConfigError, "method is None; expected a name"),
    ):
        with pytest.raises(kind, match=message):
            aligned(method, **changes)
    other = fm.perm_spec(network("residual"), torch.zeros(2, *SHAPE))
    with pytest.raises(ParamsError, match=r"model \d lacks tensor"):
        aligned(method, spec=other)
    if "data" in takes(method) and needs_images(method):
        with pytest.raises(
            DataError, match="does not take the rows of data, torch.uint8 .* give bytes as float, or as fm.data.Images"
        ):
            aligned(method, data=DATA.images)
        with pytest.raises(DataError, match="does not take the images"):
            aligned(method, data=pictures(4, shape=(3, 5, 5)))
        with pytest.raises(ParamsError, match="model is a dict; expected a network"):
            aligned(method, model=A)


@pytest.mark.parametrize(
    ("perms", "message"),
    [
        (None, "perms is a NoneType; expected group -> permutation"),
        ([torch.arange(9)], "perms is a list"),
        ({"nosuch": torch.arange(9)}, "no group 'nosuch' in this spec"),
        ({GROUP: list(range(9))}, "is a list; expected an int64 tensor"),
        ({GROUP: np.arange(9)}, "is a ndarray; expected an int64 tensor"),
        ({GROUP: torch.arange(9) + 0.5}, "is a torch.float32; expected an int64 tensor"),
        ({GROUP: torch.ones(9, dtype=torch.bool)}, "is a torch.bool"),
        ({GROUP: torch.arange(8)}, r"is not a permutation of 0..8 \(shape \(8,\)\)"),
        ({GROUP: torch.arange(1, 10)}, r"is not a permutation of 0..8"),
        ({GROUP: torch.zeros(9, dtype=torch.long)}, r"is not a permutation of 0..8"),
        ({GROUP: torch.arange(9)[None]}, r"has shape \(1, 9\); expected \(9,\)"),
    ],
)
def test_permutations_that_are_none_are_refused(perms: object, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        fm.permute(A, perms, spec=SPEC)  # type: ignore[arg-type]
    if isinstance(perms, dict):
        with pytest.raises(ParamsError, match=message):
            aligned("weight-matching", start=perms)


def test_no_network_that_is_none_is_reordered() -> None:
    perms = {GROUP: torch.arange(9).flip(0)}
    for kind, bad in NO_STATE_DICTS.items():
        assert ends_well(lambda b=bad: fm.permute(b(A), perms, spec=SPEC)) is None, kind  # type: ignore[misc]
    for spec in (None, {}, MODEL):
        assert ends_well(lambda s=spec: fm.permute(A, perms, spec=s)) is None  # type: ignore[misc]
