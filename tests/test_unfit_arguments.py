"""What repair, folding, interpolation, training and evaluation do not take ends in an error of ours."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import SHAPE, network, pictures
from torch import nn
from unfit import EXTREME, NO_STATE_DICTS, ODD, ends_well

import fedmerge as fm
from fedmerge.models import Recipe

MODEL, DATA = network("self-tied"), pictures(6)
A, B = (dict(network("self-tied", seed).state_dict()) for seed in (1, 2))
CURVE = fm.interpolate(MODEL, A, B, DATA, points=2)


def _train(**given: Any) -> object:
    return fm.train(**{"generator": torch.Generator().manual_seed(0), **given})


CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    **{
        f"repair {method}": (
            fm.repair,
            {"model": MODEL, "params": A, "data": DATA, "method": method, "sources": [A, B]},
        )
        for method in fm.repairs()
    },
    "repair and fold": (fm.repair, {"model": MODEL, "params": A, "data": DATA, "method": "none", "fold": True}),
    "fold_norms": (fm.fold_norms, {"model": MODEL, "params": A, "example_input": torch.zeros(2, *SHAPE)}),
    "interpolate": (fm.interpolate, {"model": MODEL, "a": A, "b": B, "data": DATA, "points": 2}),
    "attacked": (fm.attacked, {"model": MODEL, "params": A, "data": DATA, "attack": fm.PGD(8, 2)}),
    "barrier": (fm.barrier, {"curve": CURVE}),
    "train": (_train, {"model": MODEL, "params": A, "data": DATA, "recipe": Recipe(), "epochs": 1}),
    "evaluate": (fm.evaluate, {"model": MODEL, "params": A, "data": DATA}),
    "predict": (fm.predict, {"model": MODEL, "params": A, "data": DATA}),
}
every_call = pytest.mark.parametrize("name", CALLS)
IMAGES = {
    "none": pictures(0),
    "one": pictures(1),
    "smaller": pictures(4, shape=(3, 1, 1)),
    "grey": pictures(4, shape=(1, 4, 4)),
    "labels beyond": replace(DATA, labels=DATA.labels + 9),
    "more classes": replace(DATA, classes=tuple("abcdefgh")),
}
NETWORKS: dict[str, nn.Module] = {
    "another": network("mlp"),
    "without tensors": nn.Flatten(),
    "half": network("self-tied").half(),
    "on no device": network("self-tied").to("meta"),
    "of features": nn.Sequential(network("self-tied"), nn.Unflatten(1, (2, 2))),
}


def parameters(name: str) -> list[str]:
    """Of the call ``name``; of corrections those that they share are looked at in one of them."""
    call, _ = CALLS[name]
    every = list(inspect.signature(fm.train if call is _train else call).parameters)
    if call is fm.repair and name != "repair repair":
        return ["params", "data", "fold"] if name == "repair and fold" else ["params", "data", "sources", "weights"]
    return every


@every_call
def test_no_value_of_any_argument_ends_in_a_raw_exception(name: str) -> None:
    call, good = CALLS[name]
    call(**good)  # as it should be
    wrong = {
        f"{argument}={value!r:.40}": said
        for argument in parameters(name)
        for value in (*ODD, *EXTREME)
        if not (argument in ("epochs", "points") and isinstance(value, int) and 100 < value < 2**63)
        if not (
            argument in ("along", "correct", "method", "on_epoch") and callable(value)
        )  # what that raises is its author's
        if (said := ends_well(lambda a=argument, v=value: call(**{**good, a: v})))  # type: ignore[misc]
    }
    assert not wrong


@every_call
def test_no_state_dict_images_or_network_that_do_not_fit_end_in_a_raw_exception(name: str) -> None:
    call, good = CALLS[name]
    changes: dict[str, dict[str, object]] = {}
    for argument in {"params", "a", "b"} & good.keys():
        changes |= {f"{argument}: {kind}": {argument: bad(A)} for kind, bad in NO_STATE_DICTS.items()}
    if "sources" in good:
        changes |= {f"sources: {kind}": {"sources": [A, bad(B)]} for kind, bad in NO_STATE_DICTS.items()}
    if "data" in good:
        changes |= {f"data: {kind}": {"data": images} for kind, images in IMAGES.items()}
    if "model" in good:
        changes |= {f"model: {kind}": {"model": model} for kind, model in NETWORKS.items()}
    wrong = {
        what: said for what, change in changes.items() if (said := ends_well(lambda c=change: call(**{**good, **c})))
    }  # type: ignore[misc]
    assert not wrong


SPEC = fm.perm_spec(MODEL, torch.zeros(2, *SHAPE))
RUNNING = fm.running_average("swa")
RUNNING.update(A)
METHODS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "spec.sizes": (SPEC.sizes, {"params": A}),
    "spec.identity": (SPEC.identity, {"params": A}),
    "spec.random": (SPEC.random, {"generator": torch.Generator(), "params": A}),
    "spec.occurrences": (SPEC.occurrences, {"group": SPEC.groups[0]}),
    "spec.makes": (SPEC.makes, {"name": next(iter(A)), "axis": 0}),
    "spec.draw": (SPEC.draw, {"path": "spec.svg", "title": ""}),
    "images.select": (DATA.select, {"indices": [0]}),
    "images.to": (DATA.to, {"device": "cpu"}),
    "images.normalise": (DATA.normalise, {"batch": DATA.images}),
    "split.client": (fm.data.split(fm.data.Dataset("x", pictures(60), None), clients=2, rng=np.random.default_rng(0)).client, {"index": 0}),
    "running_average.update": (RUNNING.update, {"params": A}),
    "running_average.load_state": (RUNNING.load_state, {"state": RUNNING.state(), "like": A}),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_no_argument_of_a_method_ends_in_a_raw_exception(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a name without a folder is a file here
    call, good = METHODS[name]
    call(**good)
    wrong = {
        f"{argument}={value!r:.40}": said
        for argument in good
        for value in (*ODD, *EXTREME)
        if (said := ends_well(lambda a=argument, v=value: call(**{**good, a: v})))  # type: ignore[misc]
    }
    assert not wrong
