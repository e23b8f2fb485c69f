"""The proof: in whatever precision a network computes, a right spec is kept and a wrong one is found."""

import dataclasses
import itertools
from collections import UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fedmerge as fm
from fedmerge import perm_spec, permute
from fedmerge.errors import ParamsError
from fedmerge.spec import operators
from fedmerge.spec._weights import permutations

Middle = Callable[[Tensor], Tensor]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers, and what is done between them: ``forward(self, x, middle)``."""

    def __init__(self, forward: Callable[..., Any], middle: Middle = torch.relu) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.join, self.middle = forward, middle

    def forward(self, x: Any) -> Any:
        return self.join(self, x)


def plain(m: Net, x: Tensor) -> Tensor:
    return m.b(m.middle(m.a(x)))  # type: ignore[no-any-return]


def norm_in_float32(m: Net, x: Tensor) -> Tensor:
    h = m.middle(m.a(x)).to(torch.float32)
    return m.b((h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype))  # type: ignore[no-any-return]


def in_autocast(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        h = m.middle(m.a(x))
    return m.b(h.float())  # type: ignore[no-any-return]


def only_in(dtype: torch.dtype) -> Callable[[Net, Tensor], Tensor]:
    def forward(m: Net, x: Tensor) -> Tensor:
        assert x.dtype == dtype
        return plain(m, x)

    return forward


def looped(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 6)
    for _ in range(2):
        h = torch.tanh(m.middle(m.a(x)) + h)
    return m.b(h * torch.full((len(x), 1), 2.0))  # type: ignore[no-any-return]


COMPUTES: dict[str, tuple[Callable[[Net, Tensor], Tensor], torch.dtype]] = {
    "float32": (plain, torch.float32),
    "float64": (plain, torch.float64),
    "bfloat16": (plain, torch.bfloat16),
    "float16": (plain, torch.float16),
    "norm in float32 of float32": (norm_in_float32, torch.float32),
    "norm in float32 of bfloat16": (norm_in_float32, torch.bfloat16),
    "half inside": (lambda m, x: m.b(m.middle(m.a(x)).half().float()), torch.float32),
    "double inside": (lambda m, x: m.b(m.middle(m.a(x).double()).float()), torch.float32),
    "autocast without gradients": (in_autocast, torch.float32),
    "checkpointed": (lambda m, x: m.b(m.middle(checkpoint(m.a, x, use_reentrant=False))), torch.float32),
    "new tensors in a loop": (looped, torch.float32),
    "float32 and nothing else": (only_in(torch.float32), torch.float32),
    "bfloat16 and nothing else": (only_in(torch.bfloat16), torch.bfloat16),
    "float16 and nothing else": (only_in(torch.float16), torch.float16),
    "the bits": (lambda m, x: m.b(m.middle(m.a(x)).view(torch.int32).view(torch.float32)), torch.float32),
    "the place of the largest": (lambda m, x: plain(m, x).argmax(-1), torch.float32),
    "an output of minus infinity": (
        lambda m, x: plain(m, x).masked_fill(torch.tensor([True, False, False]), -torch.inf), torch.float32,
    ),
    "logarithms": (lambda m, x: m.b(m.middle(m.a(x).log())), torch.float32),
    "large numbers": (lambda m, x: plain(m, x) * 1e30, torch.float32),
    "a second output of round-off": (
        lambda m, x: (plain(m, x), nn.functional.layer_norm(m.a(x), (6,)).mean(-1)), torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTES)
def test_a_right_spec_is_kept_in_every_precision(case: str) -> None:
    forward, dtype = COMPUTES[case]
    torch.manual_seed(0)
    spec = perm_spec(Net(forward).to(dtype), X.to(dtype))
    assert spec.sizes() == {"a": 6}, str(spec)


@pytest.mark.parametrize("case", COMPUTES)
def test_a_wrong_spec_is_found_in_every_precision(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators.HANDLERS, "cumsum", operators.HANDLERS["dropout"])
    forward, dtype = COMPUTES[case]
    torch.manual_seed(0)
    spec = perm_spec(Net(forward, lambda h: h.cumsum(1)).to(dtype), X.to(dtype))
    assert spec.groups == ()
    assert any("changed the output when permuted" in f.reason for f in spec.frozen), str(spec)


def _spoilt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.a.weight.fill_(torch.nan)
    return model


GIVEN: dict[str, tuple[Callable[[Net], nn.Module], Tensor]] = {
    "an input of zeros": (lambda m: m, 0 * X),
    "an input that is not finite": (lambda m: m, X * torch.nan),
    "weights that are not finite": (_spoilt, X),
    "no weights at all": (lambda m: m.to("meta"), X),
    "an input without numbers": (lambda m: m, X.to("meta")),
    "weights that are not trained": (lambda m: m.requires_grad_(False), X),
}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("right", [True, False])
def test_the_proof_does_not_hang_on_the_numbers_given(case: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators.HANDLERS, "cumsum", operators.HANDLERS["dropout"])
    make, x = GIVEN[case]
    torch.manual_seed(0)
    spec = perm_spec(make(Net(plain, torch.relu if right else lambda h: h.cumsum(1))), x)
    assert spec.groups == (("a",) if right else ()), str(spec)


@dataclasses.dataclass(frozen=True)
class Batch:
    x: Tensor
    name: str = "train"


Pair = namedtuple("Pair", "x y")

ARGUMENTS: dict[str, tuple[Callable[[Any], Tensor], Any]] = {
    "a dict as one argument": (lambda given: given["image"], {"image": X}),
    "a dict by name": (lambda given: given, {"x": X}),
    "a list": (lambda given: given[0] + given[1], [X, X]),
    "nested": (lambda given: given["a"][0]["b"] * given["k"], ({"a": [{"b": X}], "k": 2.0, "s": "x", "n": None},)),
    "a dataclass": (lambda given: given.x, Batch(X)),
    "an object": (lambda given: given.x, SimpleNamespace(x=X, device=torch.device("cpu"))),
    "a named tuple": (lambda given: given.x, Pair(X, X)),
    "a mapping": (lambda given: given["x"], (UserDict(x=X),)),
    "bytes": (lambda given: given.float() / 255, torch.arange(12, dtype=torch.uint8).reshape(3, 4)),
}
RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda y: (y, None, 3),
    "a dict": lambda y: {"logits": y, "text": "x", "loss": 0.5},
    "a dataclass": Batch,
    "an object": lambda y: SimpleNamespace(logits=[y]),
    "sparse": lambda y: y.to_sparse(),
    "in place": lambda y: y.add_(1),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_come_in_any_container(case: str) -> None:
    read, given = ARGUMENTS[case]
    spec = perm_spec(Net(lambda m, x: plain(m, read(x))), given)
    assert spec.sizes() == {"a": 6}


@pytest.mark.parametrize("case", RESULTS)
def test_results_come_in_any_container(case: str) -> None:
    spec = perm_spec(Net(lambda m, x: RESULTS[case](plain(m, x))), X)
    assert spec.sizes() == {"a": 6}


WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (nn.DataParallel, "module.a"),
    "compiled": (torch.compile, "_orig_mod.a"),
    "a compiled part": (lambda m: nn.Sequential(torch.compile(m)), "0._orig_mod.a"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapper_changes_names_only(case: str) -> None:
    wrap, name = WRAPPED[case]
    model = wrap(Net(plain))
    spec = perm_spec(model, X)
    assert spec.sizes() == {name: 6}
    assert spec.axes.keys() == model.state_dict().keys()


class WithVersion(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_what_a_state_dict_holds_beside_tensors_is_left_alone() -> None:
    model = WithVersion(plain)
    spec, state = perm_spec(model, X), model.state_dict()
    moved = permute(state, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    assert moved["_extra_state"] == {"version": 1}
    model.load_state_dict(moved)


def test_a_state_dict_may_call_the_tensors_otherwise() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def renamed(module: nn.Module, state: dict[str, Tensor], prefix: str, versions: Any) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}first.{name}"] = state.pop(f"{prefix}0.{name}")

    def named_back(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}0.{name}"] = state.pop(f"{prefix}first.{name}")

    model._register_state_dict_hook(renamed)
    model.register_load_state_dict_pre_hook(named_back)
    spec = perm_spec(model, torch.randn(2, 4))
    assert spec.sizes() == {"first": 6}
    params = model.state_dict()
    data, given = fm.data.as_data((torch.randn(6, 4), torch.arange(6) % 2), model, "rows"), [params, params]
    for method in ("regmean", "fs-merge"):
        with pytest.raises(ParamsError, match=r"parameter '0.weight' of Sequential has another name in its state dict"):
            fm.merge(given, spec=spec, method=method, model=model, data=data, order="average")


def test_no_two_small_groups_are_always_permuted_alike() -> None:
    sizes = {f"{n}.{k}": n for n in (2, 3) for k in range(7)}
    trials = list(permutations(sizes, torch.Generator().manual_seed(0)))
    for n in (2, 3):
        codes = [tuple(tuple(t[g].tolist()) for t in trials) for g in sizes if sizes[g] == n]
        assert all(a != b for a, b in itertools.combinations(codes, 2))
        assert all(any(perm != tuple(range(n)) for perm in code) for code in codes)
