"""Whatever network and example are given, the answer is a spec or a SpecError that says what to change."""

import contextlib
import random
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge import perm_spec
from fedmerge.errors import SpecError


class Net(nn.Module):
    """Two layers and the function that joins them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.join = forward
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.join(self, x)


def mlp(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.a(x)))  # type: ignore[no-any-return]


def in_training_only(m: Net, x: Tensor) -> Tensor:
    if not m.training:
        raise RuntimeError("no statistics yet")
    return mlp(m, x)


def endless(m: Net, x: Tensor) -> Tensor:
    return endless(m, x)


def says_nothing(m: Net, x: Tensor) -> Tensor:
    raise AssertionError


def shrinking(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    while h.norm() > 1:
        h = h / 2
    return m.b(h)  # type: ignore[no-any-return]


def through_numpy(m: Net, x: Tensor) -> Tensor:
    return mlp(m, torch.from_numpy(x.numpy() * 2))


def locked() -> nn.Module:
    model = Net(mlp)
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
WORDS = torch.zeros(2, 5, dtype=torch.long)


def reader() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "a function": (lambda: mlp, X, "cannot trace a function.*give a torch.nn.Module"),
    "a class": (lambda: nn.Linear, X, "cannot trace a type.*give a torch.nn.Module"),
    "a state dict": (lambda: Net(mlp).state_dict(), X, "give a torch.nn.Module"),
    "an array": (lambda: Net(mlp), X.numpy(), r"NumPy array of shape \(3, 4\).*torch.from_numpy"),
    "an array in a dict": (lambda: Net(mlp), ({"x": [X.numpy()]},), r"torch.from_numpy"),
    "a string": (lambda: Net(mlp), "image.png", r"\['str'\]: the model raised TypeError.*give the arguments"),
    "None": (lambda: Net(mlp), None, r"give the arguments that its forward takes, \(x"),
    "a number": (lambda: Net(mlp), 3, r"give the arguments that its forward takes"),
    "no argument": (lambda: Net(mlp), (), r"missing 1 required positional argument.*give the arguments"),
    "too many arguments": (lambda: Net(mlp), (X, X), r"give the arguments that its forward takes, \(x"),
    "another shape": (lambda: Net(mlp), torch.randn(3, 5), r"\[\(3, 5\)\].*give an input of the shape"),
    "no dimension": (lambda: Net(mlp), torch.tensor(1.0), "give an input of the shape"),
    "whole numbers": (lambda: Net(mlp), torch.ones(3, 4, dtype=torch.long), "its weights: torch.float32"),
    "floats for tokens": (reader, torch.rand(2, 5), "tokens: torch.long"),
    "tokens without a row": (reader, WORDS + 50, "give numbers that its embeddings have rows for"),
    "an empty batch": (lambda: Net(mlp), X[:0], "give a batch that is not empty"),
    "returns nothing": (lambda: Net(lambda m, x: None), X, "returns no tensor but NoneType"),
    "returns a word": (lambda: Net(lambda m, x: "cat"), X, "returns no tensor but str"),
    "a branch on values": (lambda: Net(lambda m, x: mlp(m, x) if x.sum() > 0 else x), X, "decides by the values"),
    "a loop on values": (lambda: Net(shrinking), X, "decides by the values"),
    "a float of the output": (lambda: Net(lambda m, x: float(mlp(m, x).sum())), X, "decides by the values"),
    "NumPy within": (lambda: Net(through_numpy), X, "leaves torch for NumPy"),
    "another device within": (lambda: Net(lambda m, x: mlp(m, x.to("meta"))), X, "device=x.device"),
    "training only": (lambda: Net(in_training_only), X, "raised RuntimeError: no statistics yet.*in eval mode"),
    "endless recursion": (lambda: Net(endless), X, "the model raised RecursionError"),
    "an error without words": (lambda: Net(says_nothing), X, "the model raised AssertionError; give"),
    "a lock": (locked, X, "cannot be copied: TypeError.*_thread.lock"),
    "no weights yet": (lambda: nn.Sequential(nn.LazyLinear(3)), X, "'0.weight' is not initialised; run it"),
    "nested tensors": (
        lambda: Net(lambda m, x: torch.nested.nested_tensor([m.a(x)[0]])), X, "torch.export does not follow",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_traced_is_refused_with_what_to_change(case: str) -> None:
    make, example, words = REFUSED[case]
    with pytest.raises(SpecError, match=words) as caught:
        perm_spec(make(), example)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_script_module_is_refused_for_the_module_that_it_was() -> None:
    with pytest.raises(SpecError, match="give the module as it was before torch.jit"):
        perm_spec(torch.jit.script(nn.Sequential(nn.Linear(4, 3))), X)


def test_a_failure_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for case in ("a branch on values", "another shape"):
        make, example, _ = REFUSED[case]
        with pytest.raises(SpecError):
            perm_spec(make(), example)
    assert capfd.readouterr() == ("", "")


STAYS: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "noise on units": (lambda m, x: m.b(m.a(x) + torch.rand(6)), "rand draws random numbers, also in eval mode"),
    "dropout that is always on": (lambda m, x: m.b(F.dropout(m.a(x))), "dropout draws random numbers"),
    "a root of what is negative": (
        lambda m, x: m.b((-1 - m.a(x).abs()).sqrt()), "could not be proved .*: the output is NaN or infinite",
    ),
    "nothing": (lambda m, x: mlp(m, x) * 0, "could not be proved .*: the output is zero"),
    "round-off": (
        lambda m, x: F.layer_norm(m.wide(x), (64,)).mean(-1), "could not be proved .*: round-off alone moves the output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_says_the_true_reason(case: str) -> None:
    forward, words = STAYS[case]
    torch.manual_seed(0)
    spec = perm_spec(Net(forward, wide=nn.Linear(4, 64)), X)
    assert spec.groups == ()
    reasons = {f.reason for f in spec.frozen if f.name.startswith(("a.", "wide."))}
    assert not any("changed the output" in reason for reason in reasons)
    assert any(re.search(words, reason) for reason in reasons), reasons


def _ambush(m: Net, x: Tensor) -> Tensor:
    """Changes whatever of the process it can."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    x = x.add_(torch.rand(1)) * random.random() * np.random.rand()  # noqa: NPY002
    m.a.weight.data = m.a.weight.data * 2
    return mlp(m, x)


def _ambush_that_fails(m: Net, x: Tensor) -> Tensor:
    _ambush(m, x)
    raise ValueError("after the damage")


@pytest.mark.parametrize("forward", [_ambush, _ambush_that_fails, in_training_only])
def test_process_model_and_input_are_as_they_were(forward: Callable[[Net, Tensor], Tensor]) -> None:
    model, x = Net(forward).train(), X.clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states: Sequence[Callable[[], Any]] = (
        torch.get_default_dtype, torch.get_num_threads, random.getstate, torch.backends.mha.get_fastpath_enabled,
        lambda: torch.get_rng_state().tolist(), lambda: np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.is_grad_enabled,
    )  # fmt: skip
    kept = [state() for state in states]
    with contextlib.suppress(SpecError):
        perm_spec(model, x)
    assert [state() for state in states] == kept
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, X)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
