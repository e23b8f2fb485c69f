"""Every public name shows an example, and every example says what happens."""

import dataclasses
import doctest
import inspect
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import fedmerge as fm
import fedmerge.privacy

NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (fm, fm.data, fm.models)
    for name in module.__all__
    if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
}
INVERSIONS = ("Quality", "Reconstruction", "invert_model", "invert_update", "quality", "recover_labels")
NAMES |= {f"fedmerge.privacy.{name}": getattr(fedmerge.privacy, name) for name in INVERSIONS}
GIVEN = {
    "fm": fm,
    "np": np,
    "torch": torch,
    "Path": Path,
    "tempfile": tempfile,
    "dataclasses": dataclasses,
    "math": math,
    "safetensors": safetensors,
}


@pytest.mark.parametrize("name", NAMES)
def test_its_example_gives_what_it_says(name: str) -> None:
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(NAMES[name]) or "", dict(GIVEN), name, None, None)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
