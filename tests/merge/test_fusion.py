"""OT fusion: different widths, soft plans, and the limit in which it is an assignment."""

import functools

import numpy as np
import ot
import pytest
import torch
from nets import Residual, mlp, noise
from pictures import pictures
from scipy.spatial.distance import cdist
from torch import nn

from fedmerge import PermSpec, align, average, merge, perm_spec, permute
from fedmerge.align.transport import Transport
from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError, UnknownNameError
from fedmerge.merge._carry import carry
from fedmerge.merge._fusion import ot_fusion
from fedmerge.spec.axes import Factor


class Convolutions(nn.Module):
    """Convolution, BatchNorm, flatten, two linear layers; ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 4, 2 * width)
        self.out = nn.Linear(2 * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.out(torch.relu(self.hidden(x.flatten(1))))


class Stream(Residual):
    """A residual net of any width."""

    def __init__(self, width: int) -> None:
        super().__init__(inputs=5, stream=width, hidden=2 * width)


MAKERS = {
    "mlp": (lambda w: mlp(5, w, 2 * w, 3), (5,)),
    "convolutions": (Convolutions, (2, 4, 4)),
    "residual": (Stream, (5,)),
}
every_network = pytest.mark.parametrize("name", MAKERS)


def network(name: str, width: int, seed: int = 0):
    """A network in eval mode with random statistics, and its state dict in float64."""
    make, shape = MAKERS[name]
    net = make(width).double().eval()
    state = noise(net.state_dict(), seed, 0.5)
    state = {k: v.double().abs() + 0.5 if k.endswith("running_var") else v for k, v in state.items()}
    state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    return net, state, torch.randn(6, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.cache
def spec_of(name: str, width: int) -> PermSpec:
    make, shape = MAKERS[name]
    return perm_spec(make(width), torch.zeros(6, *shape))


def outputs(net: nn.Module, state, x: torch.Tensor) -> torch.Tensor:
    net.load_state_dict(state)
    return net.eval()(x)


def split(name: str, width: int):
    """A network, and the same function with every unit split in two, with its plan from narrow to wide."""
    narrow, state, x = network(name, width)
    wide = MAKERS[name][0](2 * width).double().eval()
    spec = spec_of(name, width)
    plans = {g: torch.eye(n, dtype=torch.float64).repeat_interleave(2, 0) / (2 * n) for g, n in spec.sizes().items()}
    return narrow, state, wide, carry(state, plans, spec=spec), spec, x


@every_network
def test_splitting_every_unit_keeps_the_function(name: str) -> None:
    narrow, state, wide, widened, _, x = split(name, 4)
    torch.testing.assert_close(outputs(wide, widened, x), outputs(narrow, state, x))


@every_network
def test_a_network_and_its_split_copy_fuse_to_the_same_function_at_either_width(name: str) -> None:
    narrow, state, wide, widened, spec, x = split(name, 4)
    expected = outputs(narrow, state, x)
    up = ot_fusion([widened, state], spec=spec)
    down = ot_fusion([state, widened], spec=spec)
    torch.testing.assert_close(outputs(wide, up.params, x), expected)
    torch.testing.assert_close(outputs(narrow, down.params, x), expected)
    assert up.perms == ()
    assert down.perms == ()
    assert all(plan.shape == (2 * n, n) for plan, n in zip(up.maps[1].values(), spec.sizes().values(), strict=True))


def test_the_published_correction_changes_the_scale_of_other_widths_and_nothing_at_equal_ones() -> None:
    narrow, state, wide, widened, spec, x = split("mlp", 4)
    paper = ot_fusion([widened, state], spec=spec, weights=[0, 1], correction="paper")
    assert (outputs(wide, paper.params, x) - outputs(narrow, state, x)).norm() > 0.1 * outputs(narrow, state, x).norm()
    other = noise(state, 3)
    one, two = (ot_fusion([state, other], spec=spec, correction=c) for c in ("paper", "function"))
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=0)


@every_network
def test_equal_widths_are_the_assignment_of_the_aligner(name: str) -> None:
    a, spec = network(name, 6)[1], spec_of(name, 6)
    b = network(name, 6, seed=1)[1]
    found = merge([a, b], spec=spec, method="ot-fusion")
    expected = align(b, to=a, spec=spec, method="optimal-transport")
    assert all(torch.equal(found.perms[1][g], expected.perms[g]) for g in spec.groups)
    torch.testing.assert_close(found.params, average([a, permute(b, expected.perms, spec=spec)]), rtol=0, atol=0)
    assert found.maps == ()


def test_exact_transport_by_pot_is_that_assignment() -> None:
    net, a, x = network("mlp", 7)
    spec = perm_spec(net.float(), x.float())
    b = network("mlp", 7, seed=1)[1]
    hard = ot_fusion([a, b], spec=spec).perms[1][spec.groups[0]]
    units = [torch.cat([m["0.weight"], m["0.bias"][:, None]], 1) for m in (a, b)]
    cost = Transport().distances(*units).numpy()
    assert np.array_equal(ot.emd(ot.unif(7), ot.unif(7), cost).argmax(1), hard.numpy())


def test_a_small_regularisation_hardens_to_the_permutation_and_a_large_one_is_soft() -> None:
    net, a, x = network("mlp", 6)
    spec = perm_spec(net.float(), x.float())
    planted = spec.random(torch.Generator().manual_seed(0))
    b = permute(a, planted, spec=spec)
    sharp = ot_fusion([a, b], spec=spec, solver="sinkhorn", regularisation=0.005)
    for group in spec.groups:
        assert torch.equal(sharp.maps[1][group].argmax(1), torch.argsort(planted[group]))
        torch.testing.assert_close(
            sharp.maps[1][group].sum(1), torch.full((len(planted[group]),), 1 / len(planted[group])).double()
        )
    torch.testing.assert_close(sharp.params, a, rtol=1e-3, atol=1e-3)
    soft = ot_fusion([a, b], spec=spec, solver="sinkhorn", regularisation=10.0)
    flat = soft.maps[1][spec.groups[0]]
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / flat.numel()), rtol=0.2, atol=0)


def test_relaxed_marginals_tend_to_the_balanced_plan() -> None:
    net, a, x = network("mlp", 5)
    spec = perm_spec(net.float(), x.float())
    b = network("mlp", 5, seed=1)[1]
    group = spec.groups[0]
    balanced = ot_fusion([a, b], spec=spec, solver="sinkhorn", regularisation=0.1).maps[1][group]
    gaps = []
    for relaxation in (0.1, 10.0, 1000.0):
        plan = ot_fusion(
            [a, b], spec=spec, solver="unbalanced", regularisation=0.1, marginal_relaxation=relaxation
        ).maps[1][group]
        gaps.append(float((plan - balanced).abs().sum()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01


def test_mass_by_norm_sends_most_of_the_largest_unit() -> None:
    net, a, x = network("mlp", 4)
    spec = perm_spec(net.float(), x.float())
    b = dict(a)
    b["0.weight"] = a["0.weight"] * torch.tensor([10.0, 1, 1, 1])[:, None]
    plan = ot_fusion([a, b], spec=spec, mass="norm").maps[1][spec.groups[0]]
    norms = torch.cat([b["0.weight"], b["0.bias"][:, None]], 1).norm(dim=1)
    torch.testing.assert_close(plan.sum(0), norms / norms.sum())


def test_buffers_follow_and_counters_stay() -> None:
    net, a, x = network("convolutions", 4)
    spec = perm_spec(net.float(), x.float())
    b = permute(a, spec.random(torch.Generator().manual_seed(2)), spec=spec)
    b["norm.num_batches_tracked"] = torch.tensor(9)
    found = ot_fusion([a, b], spec=spec)
    torch.testing.assert_close(found.params["norm.running_var"], a["norm.running_var"])
    assert int(found.params["norm.num_batches_tracked"]) == 9


def test_what_does_not_fit_is_named() -> None:
    _, state, _, widened, spec, _ = split("convolutions", 4)
    with pytest.raises(ParamsError, match=r"model 1: axis 1 of 'hidden.weight' has length 15, expected 16 for"):
        ot_fusion([state, {**state, "hidden.weight": torch.ones(8, 15)}], spec=spec)
    with pytest.raises(ParamsError, match="model 1 lacks tensor 'out.bias'"):
        ot_fusion([state, {k: v for k, v in state.items() if k != "out.bias"}], spec=spec)
    with pytest.raises(ParamsError, match="model 1 has an extra tensor 'more'"):
        ot_fusion([state, {**state, "more": torch.ones(1)}], spec=spec)
    with pytest.raises(ParamsError, match="'out.bias' of model 0 holds 3 values that are NaN"):
        ot_fusion([{**state, "out.bias": torch.full((3,), float("nan"))}], spec=spec)
    with pytest.raises(ParamsError, match=r"parameter 'out.bias' of model 0 is torch.int64; convert it"):
        ot_fusion([{**state, "out.bias": torch.ones(3, dtype=torch.int64)}], spec=spec)
    with pytest.raises(ParamsError, match="different widths, which need past_correction=True"):
        ot_fusion([state, widened], spec=spec, past_correction=False)
    with pytest.raises(
        UnknownNameError, match=r"unknown solver of optimal transport 'sinkhron'.*did you mean 'sinkhorn'"
    ):
        ot_fusion([state], spec=spec, solver="sinkhron")
    with pytest.raises(ParamsError, match=r"'out.weight' of model 1 has shape \(4, 8\), expected \(3, 8\)"):
        ot_fusion([state, {**state, "out.weight": torch.ones(4, 8)}], spec=spec)
    with pytest.raises(ParamsError, match="'out.weight' of model 1 has shape .*, expected 2 dimensions"):
        ot_fusion([state, {**state, "out.weight": torch.ones(4)}], spec=spec)
    lone = PermSpec({"w": (((Factor("g", 3),),), ((Factor("g", 3),),))}, {"w": (3, 3)}, frozenset({"w"}))
    with pytest.raises(SpecError, match="nothing shows which units of group 'g' of model 1 are those of the reference"):
        ot_fusion([{"w": torch.ones(3, 3)}, {"w": torch.ones(4, 4)}], spec=lone)


PICTURED = {
    "mlp": lambda w: nn.Sequential(nn.Flatten(), mlp(32, w, 2 * w, 3)),
    "convolutions": Convolutions,
    "residual": lambda w: nn.Sequential(nn.Flatten(), Residual(32, w, 2 * w)),
}
every_pictured = pytest.mark.parametrize("name", PICTURED)
IMAGES = pictures(30, shape=(2, 4, 4))


@functools.cache
def pictured_spec(name: str, width: int) -> PermSpec:
    return perm_spec(PICTURED[name](width), IMAGES.normalise(IMAGES.images[:2]))


def pictured(name: str, width: int, seed: int = 0):
    """A network that takes images, its symmetries, and a state dict of it."""
    torch.manual_seed(seed)
    net = PICTURED[name](width).eval()
    state = noise(net.state_dict(), seed, 0.3)
    state = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in state.items()}
    return net, pictured_spec(name, width), state


@pytest.mark.parametrize(
    ("options", "of", "solve"),
    [
        ({}, lambda d: d, ot.emd),
        ({"squared": True, "cost_scale": "log"}, lambda d: np.log1p(d**2), ot.emd),
        ({"solver": "sinkhorn"}, lambda d: d / d.max(), lambda m, n, d: ot.sinkhorn(m, n, d, 0.1, numItermax=9999)),
        (
            {"solver": "sinkhorn", "cost_scale": "mean"},
            lambda d: d / d.mean(),
            lambda m, n, d: ot.sinkhorn(m, n, d, 0.1, numItermax=9999),
        ),
        (
            {"solver": "unbalanced", "marginal_relaxation": 2.0},
            lambda d: d / d.max(),
            lambda m, n, d: ot.unbalanced.sinkhorn_unbalanced(m, n, d, 0.1, 2.0, numItermax=9999),
        ),
    ],
)
@pytest.mark.parametrize("mass", ["uniform", "norm"])
@pytest.mark.parametrize("ground", ["weights", "activations"])
def test_one_hidden_layer_of_two_widths_is_fused_as_computed_by_hand(ground, mass, options, of, solve) -> None:
    small, large = (nn.Sequential(nn.Flatten(), mlp(32, n, 3)) for n in (4, 6))
    spec = perm_spec(small, IMAGES.normalise(IMAGES.images[:2]))
    a, b = (noise(net.state_dict(), seed, 0.3) for seed, net in enumerate((small, large)))
    units = [np.column_stack([m["1.0.weight"], m["1.0.bias"]]).astype(np.float64) for m in (a, b)]
    pixels = IMAGES.normalise(IMAGES.images).flatten(1).double().numpy()
    rows = [u @ np.column_stack([pixels, np.ones(30)]).T for u in units] if ground == "activations" else units
    mu, nu = (np.linalg.norm(u, axis=1) if mass == "norm" else np.ones(len(u)) for u in units)
    plan = solve(mu / mu.sum(), nu / nu.sum(), of(cdist(*rows)))
    found = ot_fusion(
        [a, b], spec=spec, weights=[1, 2], ground=ground, model=[small, large], data=IMAGES, batch_size=7, mass=mass,
        regularisation=0.1, **options,
    )  # fmt: skip
    torch.testing.assert_close(found.maps[1][spec.groups[0]].numpy(), plan, rtol=1e-3, atol=1e-7)
    make, read = plan / plan.sum(1, keepdims=True), plan / plan.sum(0, keepdims=True)
    expected = {
        "1.0.weight": (a["1.0.weight"] + 2 * torch.from_numpy(make @ b["1.0.weight"].double().numpy())) / 3,
        "1.0.bias": (a["1.0.bias"] + 2 * torch.from_numpy(make @ b["1.0.bias"].double().numpy())) / 3,
        "1.2.weight": (a["1.2.weight"] + 2 * torch.from_numpy(b["1.2.weight"].double().numpy() @ read.T)) / 3,
        "1.2.bias": (a["1.2.bias"] + 2 * b["1.2.bias"]) / 3,
    }
    torch.testing.assert_close(found.params, {k: v.float() for k, v in expected.items()}, rtol=1e-3, atol=1e-5)


def test_each_correction_carries_by_its_own_matrices() -> None:
    spec = perm_spec(mlp(5, 4, 3), torch.randn(2, 5))
    a, b = (noise(mlp(5, n, 3).state_dict(), n) for n in (4, 6))
    plan = ot_fusion([a, b], spec=spec, mass="norm").maps[1][spec.groups[0]]
    by_rows, by_columns = plan / plan.sum(1, keepdim=True), plan / plan.sum(0, keepdim=True)
    for correction, make, read in (
        ("function", by_rows, by_columns), ("paper", by_rows, by_rows), ("none", 4 * plan, 4 * plan)
    ):  # fmt: skip
        found = ot_fusion([a, b], spec=spec, weights=[0, 1], mass="norm", correction=correction).params
        torch.testing.assert_close(found["0.weight"], (make @ b["0.weight"].double()).float())
        torch.testing.assert_close(found["2.weight"], (b["2.weight"].double() @ read.T).float())


@every_pictured
def test_activations_at_equal_widths_are_the_assignment_of_the_aligner(name: str) -> None:
    net, spec, a = pictured(name, 6)
    b = pictured(name, 6, seed=1)[2]
    found = merge([a, b], spec=spec, method="ot-fusion-activations", model=net, data=IMAGES)
    expected = align(b, to=a, spec=spec, method="optimal-transport-activations", model=net, data=IMAGES)
    assert all(torch.equal(found.perms[1][g], expected.perms[g]) for g in spec.groups)
    torch.testing.assert_close(found.params, average([a, permute(b, expected.perms, spec=spec)]), rtol=0, atol=0)
    by_weights = merge([a, b], spec=spec, method="ot-fusion")
    assert any(not torch.equal(found.perms[1][g], by_weights.perms[1][g]) for g in spec.groups)


@every_pictured
@pytest.mark.parametrize("options", [{}, {"metric": "cosine", "centre": True}, {"normalise": True, "squared": True}])
def test_activations_fuse_a_network_and_its_split_copy_to_the_same_function(name: str, options) -> None:
    narrow, spec, state = pictured(name, 4)
    wide = PICTURED[name](8).eval()
    plans = {g: torch.eye(n, dtype=torch.float64).repeat_interleave(2, 0) / (2 * n) for g, n in spec.sizes().items()}
    widened = carry(state, plans, spec=spec)
    x = IMAGES.normalise(IMAGES.images)
    narrow.load_state_dict(state)
    expected = narrow(x)
    for models, nets in (([widened, state], [wide, narrow]), ([state, widened], [narrow, wide])):
        found = ot_fusion(models, spec=spec, ground="activations", model=nets, data=IMAGES, **options)
        nets[0].load_state_dict(found.params)
        torch.testing.assert_close(nets[0](x), expected, rtol=1e-4, atol=1e-4)


def test_networks_for_activations_that_do_not_fit_are_named() -> None:
    narrow, spec, state = pictured("convolutions", 4)
    wide, _, other = pictured("convolutions", 6)
    given = {"spec": spec, "ground": "activations", "data": IMAGES}
    with pytest.raises(
        ParamsError, match="model 1 and model 0 have different widths, so that no one network runs both"
    ):
        ot_fusion([state, other], model=narrow, **given)
    with pytest.raises(ParamsError, match="model= holds 3 networks for 2 models; give one network a model"):
        ot_fusion([state, other], model=[narrow, wide, wide], **given)
    with pytest.raises(ParamsError, match="these parameters are not a state dict of Convolutions: .* size mismatch"):
        ot_fusion([state, other], model=[narrow, narrow], **given)
    with pytest.raises(ParamsError, match="ot-fusion-activations runs the networks on public images, but model= was"):
        ot_fusion([state, other], model=[], **given)
    with pytest.raises(DataError, match="pictures holds no images; ot-fusion-activations needs at least one"):
        ot_fusion([state, other], spec=spec, ground="activations", model=[narrow, wide], data=pictures(0))
    with pytest.raises(UnknownNameError, match="unknown ground of optimal transport 'wieghts'.*mean 'weights'"):
        ot_fusion([state], spec=spec, ground="wieghts")
    with pytest.raises(UnknownNameError, match="unknown correction of OT fusion 'papper'.*mean 'paper'"):
        ot_fusion([state], spec=spec, correction="papper")
    with pytest.raises(ConfigError, match="regularisation is -1 and marginal_relaxation 1.0; both must be above 0"):
        ot_fusion([state], spec=spec, regularisation=-1)
