"""What weight matching keeps between solutions of its groups, and what it does with wide groups."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from nets import Residual, SelfTied, mlp, noise, plus
from torch import Tensor, nn

from fedmerge import align, memory, perm_spec, permute
from fedmerge.align.climb import CANDIDATES, Climb, assign
from fedmerge.errors import ResourceError


class Branches(nn.Module):
    """Concatenated convolutions, flattened into a linear layer: axes of several segments and of several factors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.both = nn.Conv2d(9, 6, 3, padding=1)
        self.out = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.out(self.both(x).relu().flatten(1))


class Heads(nn.Module):
    """Attention, whose axes are products of heads and of units within a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


NETWORKS = {
    "residual": (Residual(), (2, 20)),
    "self-tied": (SelfTied(12), (2, 3, 4, 4)),
    "branches": (Branches(), (2, 3, 4, 4)),
    "heads": (Heads(), (2, 5, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_products_equal_those_computed_anew(name: str) -> None:
    model, shape = NETWORKS[name]
    spec = perm_spec(model, torch.randn(shape))
    a, b = noise(model.state_dict(), 0), noise(model.state_dict(), 1)
    kept, rng = Climb(b, a, spec), np.random.default_rng(0)
    perms = spec.identity()
    for step in range(30):
        group = str(rng.choice(spec.groups))
        perm = perms[group].clone()
        if step % 7 == 6:
            perm = torch.from_numpy(rng.permutation(len(perm)))
        else:  # a swap, which leaves most of a product standing
            i, j = rng.choice(len(perm), 2, replace=False)
            perm[[i, j]] = perm[[j, i]]
        perms = perms | {group: perm}
        for g in spec.groups:
            found = kept._gain(perms, g, kept.places[g])
            anew = Climb(b, a, spec)._gain(perms, g, kept.places[g])
            np.testing.assert_allclose(found, anew, rtol=0, atol=1e-12 * np.abs(anew).max())
    assert kept._held


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gain_is_what_the_objective_gains_by_that_unit(name: str) -> None:
    model, shape = NETWORKS[name]
    spec = perm_spec(model, torch.randn(shape))
    a, b = noise(model.state_dict(), 0), noise(model.state_dict(), 1)
    climb = Climb(b, a, spec)
    perms = spec.random(torch.Generator().manual_seed(0))
    for group in spec.groups:
        if climb.tied[group]:
            continue
        gain = climb._gain(perms, group, climb.places[group])
        other = perms | {group: perms[group].roll(1)}
        at = np.arange(len(gain))
        risen = gain[at, other[group]].sum() - gain[at, perms[group]].sum()
        assert climb.objective(other) - climb.objective(perms) == pytest.approx(risen, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_candidates_that_are_all_pairs_give_the_exact_alignment(name: str) -> None:
    model, shape = NETWORKS[name]
    spec = perm_spec(model, torch.randn(shape))
    assert max(spec.sizes().values()) <= CANDIDATES
    a, b = noise(model.state_dict(), 0), noise(model.state_dict(), 1)
    exact, sparse = align(b, to=a, spec=spec), align(b, to=a, spec=spec, wide=2)
    assert sparse.objective == pytest.approx(exact.objective, rel=1e-12)
    assert exact.approximate == ()
    assert set(sparse.approximate) == {g for g, n in spec.sizes().items() if n >= 2}


def test_wide_groups_are_solved_among_candidates_and_said_to_be() -> None:
    net = mlp(8, 300, 200, 3)
    spec = perm_spec(net, torch.randn(2, 8))
    truth = noise(net.state_dict(), 0)
    planted = spec.random(torch.Generator().manual_seed(0))
    moved = permute(plus(truth, noise(truth, 1, 0.1)), planted, spec=spec)
    found = align(moved, to=truth, spec=spec, wide=250)
    assert found.approximate == ("0",)
    assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in spec.groups)
    other = noise(net.state_dict(), 7)
    exact, sparse = align(other, to=truth, spec=spec), align(other, to=truth, spec=spec, wide=150)
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(sparse.history))
    assert sparse.objective > 0.99 * exact.objective
    assert align(other, to=truth, spec=spec, method="forward-greedy").approximate == ()


def test_the_sparse_assignment_is_the_best_over_its_entries() -> None:
    rng = np.random.default_rng(0)
    gain = rng.standard_normal((40, 40)) - 5
    climb_all = assign(gain)
    from scipy.sparse import csr_array

    assert torch.equal(assign(csr_array(gain)), climb_all)
    few = np.where((rng.random((40, 40)) < 0.2) | np.eye(40, dtype=bool), gain, -1e6)
    sparse = csr_array(np.where(few > -1e6, few, 0.0))
    assert torch.equal(assign(sparse), assign(few))


def test_methods_that_hold_whole_matrices_refuse_groups_too_wide_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(4, 100, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    monkeypatch.setattr(memory, "usable_memory", lambda: 8 * 100 * 100)
    with pytest.raises(
        ResourceError, match=r"frank-wolfe holds 6 matrices .* group '0' of 100 units; .* 'weight-match"
    ):
        align(b, to=a, spec=spec, method="frank-wolfe")
    assert align(b, to=a, spec=spec).converged
