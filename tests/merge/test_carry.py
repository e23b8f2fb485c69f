"""OT fusion against the formulas of its authors' code, and networks carried as the merge carried them."""

import functools
import itertools

import numpy as np
import ot
import pytest
import torch
from nets import mlp, noise
from pictures import pictures
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from fedmerge import PermSpec, average, merge, mergers, perm_spec
from fedmerge.merge import Merge, ordered, takes
from fedmerge.merge._carry import Carrying, carry

State = dict[str, Tensor]


class Chain(nn.Module):
    """Layers without bias, in the order in which they are named: convolutions, then linear maps."""

    def __init__(self, channels: tuple[int, ...], *widths: int) -> None:
        super().__init__()
        last = channels[-1] * 4 if channels else widths[0]
        sizes = (last, *widths) if channels else widths
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(channels)
        )
        self.maps = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convolutions:
            x = torch.relu(layer(x))
        x = x.flatten(1)
        for layer in self.maps[:-1]:
            x = torch.relu(layer(x))
        return self.maps[-1](x)


def published(one: State, other: State, *, mass: str, correction: str, past_correction: bool, reg: float) -> State:
    """The mean of ``one`` and of ``other`` carried onto it, written after the paper's Alg. 1 and its authors' code.

    Its plans go from the units of ``other`` (rows) to those of ``one`` (columns). The last layer is averaged after its
    inputs are carried (``skip_last_layer``). A layer of images is read as its channels times what is left.
    """
    previous: np.ndarray | None = None
    result = {}
    names = list(one)
    for name in names:
        w0, w1 = (m[name].double().numpy() for m in (other, one))
        aligned = w0
        if previous is not None:
            columns = w0.reshape(len(w0), len(previous), -1)
            aligned = np.einsum("oir,ij->ojr", columns, previous).reshape(len(w0), *w1.shape[1:])
        if name == names[-1]:
            moved = aligned
        else:
            rows = [w.reshape(len(w), -1) for w in (w0, w1)]
            order = {"uniform": None, "norm": 2, "norm-l1": 1}[mass]
            mu, nu = (np.ones(len(w)) if order is None else np.linalg.norm(w, order, axis=1) for w in rows)
            cost = cdist(aligned.reshape(len(w0), -1), rows[1])
            mu, nu = mu / mu.sum(), nu / nu.sum()
            plan = ot.sinkhorn(mu, nu, cost, reg, numItermax=20_000) if reg else ot.emd(mu, nu, cost)
            previous = {
                "paper": plan / plan.sum(0),  # --correction --proper-marginals
                "none": plan * len(w1),  # --correction alone: divided by uniform marginals, whatever they are
                "function": plan / plan.sum(0),
            }[correction]
            inputs = aligned if past_correction else w0
            moved = np.tensordot(previous.T, inputs, 1)
            if correction == "function":  # ours, not theirs: what leaves a unit is dealt out by its own mass
                previous = plan / plan.sum(1, keepdims=True)
        result[name] = ((torch.from_numpy(moved) + one[name].double()) / 2).float()
    return result


NETWORKS = {
    "two layers": (lambda w: Chain((), 5, w, 3), (5,)),
    "four layers": (lambda w: Chain((), 5, w, w + 2, w, 3), (5,)),
    "convolutions": (lambda w: Chain((2, w, w + 1), w, 3), (2, 2, 2)),
}


@functools.cache
def spec_of(name: str, width: int) -> PermSpec:
    make, shape = NETWORKS[name]
    return perm_spec(make(width), torch.randn(2, *shape))


def states(name: str, widths: tuple[int, int]) -> tuple[PermSpec, State, State]:
    """Two networks whose units have very different norms."""
    make, _ = NETWORKS[name]
    found = []
    for seed, width in enumerate(widths):
        state = noise(make(width).state_dict(), seed, 0.5)
        scales = {
            k: 1 + 3 * torch.rand(len(v), generator=torch.Generator().manual_seed(seed)) for k, v in state.items()
        }
        found.append({k: v * scales[k].reshape(-1, *[1] * (v.dim() - 1)) for k, v in state.items()})
    return spec_of(name, widths[0]), *found


WIDTHS = [(6, 6), (5, 8), (8, 5)]
CASES = [  # name, widths, past_correction (inputs that are not carried fit one width only), reg
    *((name, widths, True, 0.0) for name in NETWORKS for widths in WIDTHS),
    *((name, (6, 6), False, 0.0) for name in NETWORKS),
    *(("four layers", widths, True, 0.5) for widths in WIDTHS),
]


@pytest.mark.parametrize("correction", ["function", "paper", "none"])
@pytest.mark.parametrize("mass", ["uniform", "norm", "norm-l1"])
@pytest.mark.parametrize(("name", "widths", "past_correction", "reg"), CASES)
def test_fusion_is_the_published_one(name, widths, past_correction, reg, mass, correction) -> None:
    spec, one, other = states(name, widths)
    solver = {"solver": "sinkhorn", "regularisation": reg, "cost_scale": "none"} if reg else {}
    found = merge(
        [one, other], spec=spec, method="ot-fusion", mass=mass, correction=correction, past_correction=past_correction,
        **solver,
    )  # fmt: skip
    expected = published(one, other, mass=mass, correction=correction, past_correction=past_correction, reg=reg)
    torch.testing.assert_close(found.params, expected, rtol=1e-4, atol=1e-5)
    # What the merge says it averaged is what it averaged.
    torch.testing.assert_close(average(ordered([one, other], found, spec=spec)), found.params, rtol=0, atol=0)


NO_MEANS = {
    "dare", "ensemble-distillation", "fisher", "fs-merge", "greedy-soup", "learned-coefficients", "model-stock", "regmean", "slerp",
    "task-arithmetic", "ties",
}  # fmt: skip


@pytest.mark.parametrize("method", list(mergers()))
def test_the_networks_in_the_order_of_a_mean_average_to_that_mean(method: str) -> None:
    if method in NO_MEANS:
        pytest.skip("its result is no mean of the networks")
    model = nn.Sequential(nn.Flatten(), mlp(48, 7, 6, 4))
    spec = perm_spec(model, torch.randn(2, 3, 4, 4))
    models = [noise(model.state_dict(), i) for i in range(3)]
    given = {"model": model, "data": pictures(20)} if "data" in takes(method) else {}
    options = [{}]
    if method.startswith("ot-fusion"):
        options = [
            {"mass": mass, "correction": correction, "past_correction": past}
            for mass in ("uniform", "norm")
            for correction in ("function", "paper", "none")
            for past in (True, False)
        ]
    for some in options:
        found = merge(models, spec=spec, method=method, weights=[1, 2, 3], **given, **some)
        torch.testing.assert_close(average(ordered(models, found, spec=spec), [1, 2, 3]), found.params)
        value = sum(float(found.params[k].double().square().sum()) for k in spec.parameters)
        if method.startswith("ot-fusion"):
            assert found.objective == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("correction", ["function", "paper", "none"])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "unbalanced"])
@pytest.mark.parametrize("mass", ["norm", "norm-l1"])
def test_units_without_weights_weigh_nothing_and_harm_no_other(mass: str, solver: str, correction: str) -> None:
    spec, one, other = states("four layers", (6, 6))
    name = "maps.1.weight"
    for state, dead in ((one, [0, 3]), (other, [2])):
        state[name][dead] = 0
    options = {"mass": mass, "solver": solver, "correction": correction, "regularisation": 0.1}
    found = merge([one, other], spec=spec, method="ot-fusion", **options)
    assert all(bool(v.isfinite().all()) for v in found.params.values())
    assert max(float(v.abs().max()) for v in found.params.values()) < 50
    (group,) = (f.group for f in spec.axes[name][0][0])
    if solver == "exact":
        alive = found.maps[1][group].sum(1)[[1, 2, 4, 5, 6, 7]]
        assert float(alive.sum()) == pytest.approx(1, abs=1e-6)
    whole = {**one, name: torch.zeros_like(one[name])}
    found = merge([whole, {**other, name: whole[name]}], spec=spec, method="ot-fusion", **options)
    assert all(bool(v.isfinite().all()) for v in found.params.values())


def test_a_unit_without_mass_becomes_zero() -> None:
    plan = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)
    make, read = Carrying().matrices(plan)
    assert make.tolist() == [[1, 0], [1, 0], [0, 0]]
    assert read.tolist() == [[0.5, 0], [0.5, 0], [0, 0]]


class Written(nn.Module):
    """An embedding, ``x @ w`` and a transposed convolution make units on other axes than linear maps do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.place = nn.Embedding(7, width), nn.Parameter(torch.randn(5, width))
        self.up, self.down = nn.Parameter(torch.randn(width, 2 * width)), nn.Parameter(torch.randn(2 * width, width))
        self.conv, self.out = nn.ConvTranspose1d(width, width, 2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.place
        x = x + torch.relu(x @ self.up) @ self.down
        return self.out(torch.relu(self.conv(x.transpose(1, 2))).mean(2))


def test_a_network_and_its_split_copy_fuse_to_the_same_function_on_whatever_axis_units_are_made() -> None:
    narrow, wide, x = Written(4).eval(), Written(8).eval(), torch.randint(7, (6, 5))
    spec = perm_spec(narrow, x)
    assert sorted(spec.sizes().values()) == [4, 4, 8]
    state = noise(narrow.state_dict(), 0, 0.5)
    plans = {g: torch.eye(n, dtype=torch.float64).repeat_interleave(2, 0) / (2 * n) for g, n in spec.sizes().items()}
    widened = carry(state, plans, spec=spec)
    narrow.load_state_dict(state)
    wide.load_state_dict(widened)
    torch.testing.assert_close(wide(x), narrow(x), rtol=1e-4, atol=1e-5)
    for models, net in (([state, widened], narrow), ([widened, state], wide)):
        found = merge(models, spec=spec, method="ot-fusion")
        net.load_state_dict(found.params)
        torch.testing.assert_close(net(x), narrow(x) if net is wide else wide(x), rtol=1e-4, atol=1e-5)


def test_a_merge_says_how_it_carried() -> None:
    spec, one, other = states("two layers", (6, 6))
    found = merge([one, other], spec=spec, method="ot-fusion", mass="norm", correction="none", past_correction=False)
    assert found.carrying == Carrying("none", past_correction=False)
    moved = ordered([one, other], found, spec=spec)
    as_function = ordered([one, other], Merge(found.params, (), 0.0, (), 0, True, found.maps), spec=spec)
    torch.testing.assert_close(moved[0], one)
    assert not torch.allclose(moved[1]["maps.0.weight"], as_function[1]["maps.0.weight"])
