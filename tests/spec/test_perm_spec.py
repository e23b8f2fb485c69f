import gc
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Residual, SelfTied, mlp
from torch import Tensor, nn

from fedmerge import models
from fedmerge.errors import ParamsError, SpecError
from fedmerge.spec import Factor, PermSpec, perm_spec, permute


def relative_error(model: nn.Module, spec: PermSpec, x: Tensor, seed: int = 0) -> float:
    """Distance of the outputs before and after a random permutation of all groups, in float64."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    state = {
        k: v * (0.5 + torch.rand(v.shape, generator=generator)) + 0.05 if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    moved = permute(state, spec.random(generator), spec=spec)
    a = torch.func.functional_call(model, state, (x.double(),))
    b = torch.func.functional_call(model, moved, (x.double(),))
    return float((a - b).norm() / a.norm())


SHAPES = {"mlp": (1, 8, 8)}


@pytest.mark.parametrize("name", models.names())
def test_every_model_keeps_its_function_and_has_nearly_all_its_parameters_permutable(name: str) -> None:
    shape = SHAPES.get(name, (3, 32, 32))
    width = {"vgg11": 0.25, "resnet18": 0.25, "resnet20": 0.5, "resnet20-layernorm": 0.5, "hlb": 8}.get(name, 0)
    model = models.build(name, classes=10, in_shape=shape, width=width, seed=0)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    spec = perm_spec(model, x)
    assert relative_error(model, spec, x) < 1e-9
    assert spec.permutable_share() > 0.95, str(spec)
    reasons = {f.reason for f in spec.frozen}
    assert all("network" in r for r in reasons), reasons


def test_the_widest_stream_of_hlb_is_permuted_together() -> None:
    model = models.build("hlb", classes=10, in_shape=(3, 32, 32), width=8, seed=0)
    spec = perm_spec(model, torch.randn(2, 3, 32, 32))
    widest = max(spec.sizes().values())
    share = sum(
        math.prod(spec.shapes[k])
        for k, axes in spec.axes.items()
        if any(f.size == widest for axis in axes for segment in axis for f in segment if f.group)
    )
    assert share > 0.5 * sum(math.prod(s) for s in spec.shapes.values())


def test_batch_norm_statistics_move_with_their_channels() -> None:
    spec = perm_spec(SelfTied(), torch.randn(2, 3, 5, 5))
    (group,) = spec.groups
    names = {o.name for o in spec.occurrences(group)}
    assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= names
    assert spec.parameters.isdisjoint({"norm.running_mean", "norm.num_batches_tracked"})


def test_one_group_may_index_two_axes_of_one_tensor() -> None:
    model = SelfTied()
    spec = perm_spec(model, torch.randn(2, 3, 5, 5))
    (group,) = spec.groups
    assert sorted(o.axis for o in spec.occurrences(group) if o.name == "loop.weight") == [0, 1]
    assert relative_error(model, spec, torch.randn(2, 3, 5, 5)) < 1e-12


def test_flatten_after_convolution_moves_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4 * 4, 3))
    x = torch.randn(2, 1, 6, 6)
    spec = perm_spec(model, x)
    assert spec.axes["3.weight"][1] == ((Factor("0", 5), Factor(None, 16)),)
    assert relative_error(model, spec, x) < 1e-12


def test_a_residual_stream_is_one_group() -> None:
    model = Residual(20, 32, 48)
    spec = perm_spec(model, torch.randn(2, 20))
    assert spec.sizes() == {"stem": 32, "up.0": 48, "up.1": 48}
    places = {(o.name, o.axis) for o in spec.occurrences("stem")}
    assert {("up.0.weight", 1), ("down.0.weight", 0), ("down.1.bias", 0), ("head.weight", 1)} <= places


def test_concatenation_lays_groups_end_to_end() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    spec = perm_spec(Dense(), torch.randn(2, 4))
    assert spec.axes["c.weight"][1] == ((Factor("a", 3),), (Factor("b", 5),))
    assert relative_error(Dense(), spec, torch.randn(2, 4)) < 1e-12


def test_depthwise_convolution_ties_input_and_output_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    spec = perm_spec(model, torch.randn(2, 3, 5, 5))
    assert spec.sizes() == {"0": 6}
    assert relative_error(model, spec, torch.randn(2, 3, 5, 5)) < 1e-12


def test_a_grouped_convolution_moves_its_groups_and_the_units_within() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 2))
    spec = perm_spec(model, torch.randn(2, 3, 5, 5))
    assert spec.sizes() == {"0": 2, "0#1": 3, "1": 4}
    assert spec.axes["1.weight"][:2] == (((Factor("0", 2), Factor("1", 4)),), ((Factor("0#1", 3),),))
    assert relative_error(model, spec, torch.randn(2, 3, 5, 5)) < 1e-12


def test_weight_tying_moves_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(self.stem(x))))))

    spec = perm_spec(Tied(), torch.randn(2, 3))
    assert spec.axes["a.weight"] == spec.axes["b.weight"] != ((), ())


@pytest.mark.parametrize("whole", [True, False], ids=["the layer", "its statistics"])
def test_a_norm_that_is_called_under_two_names_moves_with_both(whole: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)
            self.first = nn.BatchNorm2d(6)
            self.second = self.first if whole else nn.BatchNorm2d(6)
            self.second.running_mean, self.second.running_var = self.first.running_mean, self.first.running_var

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.b(self.first(self.a(x)).relu())).relu().mean((2, 3)))

    spec = perm_spec(Shared(), torch.randn(2, 3, 4, 4))
    assert list(spec.sizes().values()) == [6]
    assert spec.axes["first.running_var"] == spec.axes["second.running_var"] == spec.axes["a.bias"]


def test_an_operator_that_is_not_understood_freezes_what_enters_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.cumsum(self.a(x), 1))))

    spec = perm_spec(Odd(), torch.randn(2, 4))
    assert spec.groups == ("b",)
    assert any(f.name == "a.weight" and "cumsum" in f.reason for f in spec.frozen)


def test_a_wrong_handler_is_caught_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmerge.spec import operators

    monkeypatch.setitem(operators.HANDLERS, "cumsum", operators.HANDLERS["dropout"])

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.a(x), 1))

    spec = perm_spec(Odd(), torch.randn(2, 4))
    assert spec.groups == ()
    assert any("changed the output" in f.reason for f in spec.frozen)


def test_inputs_and_outputs_of_the_network_stay() -> None:
    spec = perm_spec(mlp(4, 6, 3), torch.randn(2, 4))
    assert {(f.name, f.axis, f.reason) for f in spec.frozen} == {
        ("0.weight", 1, "an input of the network"),
        ("2.weight", 0, "an output of the network"),
        ("2.bias", 0, "an output of the network"),
    }


def test_an_example_input_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(SpecError, match=r"Sequential cannot be traced .*\[\(2, 7\)\]"):
        perm_spec(mlp(4, 6, 3), torch.randn(2, 7))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = SelfTied().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    perm_spec(model, torch.randn(2, 3, 5, 5))
    assert model.training
    assert model.stem.weight.dtype == torch.float32
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_symmetries_are_counted_as_products_of_factorials() -> None:
    spec = perm_spec(mlp(4, 5, 6, 2), torch.randn(2, 4))
    assert spec.log10_symmetries() == pytest.approx(math.log10(math.factorial(5) * math.factorial(6)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_permutation_and_its_inverse_give_back_the_same_bytes(seed: int, hidden: list[int]) -> None:
    model = mlp(3, *hidden, 2)
    spec = perm_spec(model, torch.randn(2, 3))
    state = model.state_dict()
    perms = spec.random(torch.Generator().manual_seed(seed))
    back = permute(permute(state, perms, spec=spec), {g: torch.argsort(p) for g, p in perms.items()}, spec=spec)
    torch.testing.assert_close(back, dict(state), rtol=0, atol=0)


def test_permute_does_what_the_convention_says() -> None:
    model = mlp(3, 4, 2)
    spec, state = perm_spec(model, torch.randn(2, 3)), model.state_dict()
    moved = permute(state, {"0": torch.tensor([2, 0, 3, 1])}, spec=spec)
    for i, j in enumerate([2, 0, 3, 1]):
        assert torch.equal(moved["0.weight"][i], state["0.weight"][j])
        assert torch.equal(moved["2.weight"][:, i], state["2.weight"][:, j])
    assert moved["2.bias"].data_ptr() != state["2.bias"].data_ptr()


def test_permute_refuses_what_is_no_permutation() -> None:
    model = mlp(3, 4, 2)
    spec, state = perm_spec(model, torch.randn(2, 3)), model.state_dict()
    with pytest.raises(ParamsError, match=r"perms\['0'\] is not a permutation of 0..3"):
        permute(state, {"0": torch.tensor([0, 0, 1, 2])}, spec=spec)
    with pytest.raises(ParamsError, match="no group 'x' in this spec: known are 0"):
        permute(state, {"x": torch.arange(4)}, spec=spec)


def test_sizes_are_read_from_a_network_of_another_width() -> None:
    spec = perm_spec(mlp(3, 4, 2), torch.randn(2, 3))
    assert spec.sizes(mlp(3, 9, 2).state_dict()) == {"0": 9}
    broken = {**mlp(3, 9, 2).state_dict(), "2.weight": torch.zeros(2, 8)}
    with pytest.raises(ParamsError, match=r"axis 1 of '2.weight' has length 8, expected 9 for group '0'"):
        spec.sizes(broken)
    with pytest.raises(ParamsError, match="tensor '2.bias' is missing"):
        spec.sizes({k: v for k, v in broken.items() if k != "2.bias"} | {"2.weight": torch.zeros(2, 9)})


def test_a_spec_whose_group_has_two_sizes_is_refused() -> None:
    with pytest.raises(SpecError, match="group 'g' has 3 units, but axis 0 of 'b' gives it 4"):
        PermSpec({"a": (((Factor("g", 3),),),), "b": (((Factor("g", 4),),),)}, {"a": (3,), "b": (4,)}, frozenset("ab"))


class Attention(nn.Module):
    """Heads split off by reshape, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 12) for _ in range(3)), None, None, None
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.o = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, 3, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.softmax(q @ k.transpose(-1, -2), -1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, n, 12)).mean(1)


def test_reshaped_heads_move_as_heads_and_units_within() -> None:
    model = Attention()
    spec = perm_spec(model, torch.randn(2, 6, 8))
    assert sorted(spec.sizes().values()) == [3, 4, 4]
    assert relative_error(model, spec, torch.randn(2, 6, 8)) < 1e-10


def test_no_weight_is_held_when_the_spec_is_there() -> None:
    """The export ends as cyclic garbage, which must not keep the caller's numbers until Python collects it."""
    model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
    own = {id(p) for p in model.parameters()}
    places = {p.data_ptr() for p in model.parameters()}
    gc.collect()
    gc.disable()
    try:
        perm_spec(model, torch.zeros(2, 1, 8, 8))
        held = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and id(o) not in own]
        assert not [tuple(t.shape) for t in held if t.data_ptr() in places]
    finally:
        gc.enable()


def test_threads_trace_side_by_side() -> None:
    """``torch.export`` keeps what it notes of a network in variables that all threads share."""
    networks, x = [mlp(6, 9, 4) for _ in range(8)], torch.randn(2, 6)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: perm_spec(model, x).sizes(), networks))
    assert found == [{"0": 9}] * 8
