"""Networks that people have and ``copy.deepcopy`` or autograd stumbles over: their own weights count, or it is said."""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pictures import SHAPE, pictures
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from unfit import ends_well

import fedmerge as fm
from fedmerge.errors import FedmergeError, ParamsError
from fedmerge.models import Recipe

DATA = pictures(6)
EXAMPLE = torch.zeros(2, *SHAPE)


class Closed(nn.Module):
    """Its forward calls a function that holds the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(48, 6), nn.Linear(6, 4)

        def hidden(x: Tensor) -> Tensor:
            return self.a(x.flatten(1)).relu()

        self.parts = {"body": [lambda x: self.h(hidden(x))]}

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["body"][0](x)


class Bag:
    """An object of somebody's own."""

    def __init__(self, of: object) -> None:
        self.of = of


class Held(NamedTuple):
    """A tuple by name."""

    of: Callable[[Tensor], Tensor]


class Within(nn.Module):
    """Its forward calls a function that holds the network and stands in something else."""

    def __init__(self, hold: Callable[[Callable[[Tensor], Tensor]], Any], take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(48, 6), nn.Linear(6, 4)
        self.held, self.take = hold(lambda x: self.h(self.a(x.flatten(1)).relu())), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.held)(x)


class Keeps(nn.Module):
    """It keeps what it last computed, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(48, 6), nn.Linear(6, 4)
        self(torch.zeros(1, *SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x.flatten(1)).relu()
        return self.h(self.last)


class Named(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4))


def changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = plain()
        change(model)
        return model

    return build


def scaled(model: nn.Sequential) -> None:
    model.scale = nn.Parameter(torch.randn(6))
    model[1].register_forward_hook(lambda module, given, out: out * model.scale)


def one_memory(model: nn.Sequential) -> None:
    del model[3]
    model.extend([nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)])
    model[5].weight = nn.Parameter(model[3].weight.data)


def in_inference() -> nn.Module:
    with torch.inference_mode():
        return plain()


RUN: dict[str, Callable[[], nn.Module]] = {
    "a function that holds the network": Closed,
    "a function in a tuple": lambda: Within(lambda f: (f,), lambda held: held[0]),
    "a function in a tuple in a list": lambda: Within(lambda f: [("body", f)], lambda held: held[0][1]),
    "a function in a tuple by name": lambda: Within(Held, lambda held: held.of),
    "a function in a deque": lambda: Within(lambda f: deque([f]), lambda held: held[0]),
    "a function in an object": lambda: Within(lambda f: {"k": Bag([f])}, lambda held: held["k"].of[0]),
    "a hook that holds the network": changed(scaled),
    "a compiled forward": changed(lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager"))),
    "a partial forward": changed(lambda m: setattr(m, "forward", functools.partial(nn.Sequential.forward, m))),
    "the older weight norm": changed(lambda m: weight_norm(m[1])),
    "weight norm under spectral norm": changed(
        lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m[1]))
    ),
    "kept activations": Keeps,
    "two parameters on one memory": changed(one_memory),
}
"""Networks that are run as any other."""

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "pruned": changed(lambda m: prune.l1_unstructured(m[1], "weight", 0.5)),  # its mask is a constant, so units stay
    "a lock": changed(lambda m: setattr(m, "lock", threading.Lock())),
    "a generator": changed(lambda m: setattr(m, "rows", (i for i in range(3)))),
    "not initialised": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 4)),
    "scripted": lambda: torch.jit.script(plain()),
    "scripted in part": changed(lambda m: m.__setitem__(1, torch.jit.script(m[1]))),
    "a sparse weight": changed(lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.detach().to_sparse()))),
    "answers by name": lambda: Named(plain()),
    "half": lambda: plain().half(),
    "no parameters": nn.Flatten,
    "made in inference mode": in_inference,
    "nothing trained": changed(lambda m: m.requires_grad_(False)),
}
"""Networks that some functions cannot take."""


def _calls(model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """One call on each way that a network takes through the library."""
    spec = fm.perm_spec(plain(), EXAMPLE)
    with contextlib.suppress(FedmergeError):
        spec = fm.perm_spec(model, EXAMPLE)
    seen: dict[str, Any] = {"model": model, "data": DATA}
    learned: dict[str, Any] = {"recipe": Recipe(), "epochs": 1, "generator": torch.Generator().manual_seed(0)}
    return {
        "average": lambda: fm.average([a, b]),
        "evaluate": lambda: fm.evaluate(model, b, DATA),
        "train": lambda: fm.train(model, b, DATA, **learned),
        "curve": lambda: fm.curve(model, a, b, DATA, **learned),
        "head_sums": lambda: fm.head_sums(model, b, DATA),
        "fold_norms": lambda: fm.fold_norms(model, b, EXAMPLE),
        "repair": lambda: fm.repair(model, b, data=DATA, method="repair", sources=[a, b]),
        "ties": lambda: fm.merge([a, b], spec=spec, method="ties", base=a, model=model),
        "learned-coefficients": lambda: fm.merge(
            [a, b], spec=spec, method="learned-coefficients", order="average", max_steps=1, **seen
        ),
        "fs-merge": lambda: fm.merge([a, b], spec=spec, method="fs-merge", order="average", max_steps=1, **seen),
        "ste": lambda: fm.align(b, to=a, spec=spec, method="ste", epochs=1, restarts=1, polish=False, **seen),
    }


@pytest.mark.parametrize("kind", [*RUN, *REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_no_network_ends_in_a_raw_exception(kind: str) -> None:
    build = (RUN | REFUSED)[kind]
    torch.manual_seed(0)
    model, other = build(), build()
    calls = _calls(model, dict(model.state_dict()), dict(other.state_dict()))
    wrong = {name: said for name, call in calls.items() if (said := ends_well(call))}
    assert not wrong
    if kind in RUN:
        for call in (calls["evaluate"], calls["train"], calls["curve"], calls["repair"]):
            call()


@pytest.mark.parametrize("kind", RUN)
@pytest.mark.filterwarnings("ignore")
def test_a_network_runs_with_the_parameters_that_are_given(kind: str) -> None:
    torch.manual_seed(0)
    model, other = RUN[kind](), RUN[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = other.eval()(DATA.normalise(DATA.images))
    torch.testing.assert_close(fm.predict(model, other.state_dict(), DATA), expected)
    trained = fm.train(
        model, other.state_dict(), DATA, recipe=Recipe(), epochs=1, generator=torch.Generator().manual_seed(0)
    ).params
    other.load_state_dict(trained)
    with torch.no_grad():
        moved = other(DATA.normalise(DATA.images))
    assert float((moved - expected).abs().max()) > 1e-6
    torch.testing.assert_close(fm.predict(model, trained, DATA), moved)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert list(fm.perm_spec(model, EXAMPLE).sizes().values()) == [6]


def test_two_parameters_on_one_memory_stay_one_whatever_trains_them() -> None:
    torch.manual_seed(0)
    model = RUN["two parameters on one memory"]()
    a, b = (RUN["two parameters on one memory"]().state_dict() for _ in range(2))
    learned = {"recipe": Recipe(), "epochs": 2, "generator": torch.Generator().manual_seed(0)}
    found = {
        "train": fm.train(model, a, DATA, **learned).params,
        "curve": fm.curve(model, a, b, DATA, **learned).at(0.5),
        **{m: fm.repair(model, a, data=DATA, method=m, sources=[a, b]) for m in fm.repairs()},
    }
    for name, params in found.items():
        assert torch.equal(params["3.weight"], params["5.weight"]), name
    corners = fm.subspace(model, [a, b], DATA, **learned).vertices
    assert all(torch.equal(corner["3.weight"], corner["5.weight"]) for corner in corners)
    tied = RUN["two parameters on one memory"]()
    tied[5].weight = tied[3].weight  # the same network as one parameter of two names
    learned["generator"] = torch.Generator().manual_seed(0)
    torch.testing.assert_close(dict(fm.train(tied, a, DATA, **learned).params), dict(found["train"]))
    bend = fm.curve(tied, a, b, DATA, **learned).at(0.5)
    assert torch.equal(bend["3.weight"], bend["5.weight"])
    assert not torch.equal(bend["5.weight"], fm.average([a, b])["5.weight"])


def test_what_is_frozen_stays_on_a_curve() -> None:
    torch.manual_seed(0)
    model = plain()
    model[1].requires_grad_(False)
    a, b = plain().state_dict(), plain().state_dict()
    learned = {"recipe": Recipe(), "epochs": 2, "generator": torch.Generator().manual_seed(0)}
    bend, straight = fm.curve(model, a, b, DATA, **learned).points[1], fm.average([a, b])
    assert torch.equal(bend["1.weight"], straight["1.weight"])
    assert not torch.equal(bend["3.weight"], straight["3.weight"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a lock", "cannot be copied: cannot pickle '_thread.lock' object"),
        ("not initialised", "has no weights yet: '1.weight' is not initialised; run it on an input first"),
        ("scripted", "is compiled by TorchScript.* before torch.jit.script"),
        ("nothing trained", "no parameter that is trained.*model.requires_grad_"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_run_is_named(kind: str, message: str) -> None:
    model = REFUSED[kind]()
    with pytest.raises(ParamsError, match=message):
        fm.train(model, model.state_dict(), DATA, recipe=Recipe(), epochs=1, generator=torch.Generator())
