import itertools
import sys

import numpy as np
import pytest
import torch
from nets import Residual, SelfTied, mlp, noise, plus
from torch import nn

from fedmerge import align, average, merge, merge_many, perm_spec, permute
from fedmerge.align import _activations
from fedmerge.data import Images
from fedmerge.errors import ParamsError, UnknownNameError
from fedmerge.spec.trace import trace


def planted(n: int, seed: int, scale: float = 1.0):
    """A federation of ``n`` permuted noisy copies of one residual net; also the copies before they were permuted."""
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    truth = noise(net.state_dict(), seed)
    generator = torch.Generator().manual_seed(seed)
    aligned = [plus(truth, noise(truth, 100 * seed + i + 1, scale)) for i in range(n)]
    return spec, [permute(m, spec.random(generator), spec=spec) for m in aligned], aligned


def squared_mean(models) -> float:
    mean = average(models)
    return sum(float((v.double() ** 2).sum()) for v in mean.values())


@pytest.mark.parametrize("n", [3, 12])
def test_the_default_reaches_the_oracle_of_a_planted_federation(n: int) -> None:
    ratios = []
    for seed in range(3):
        spec, models, aligned = planted(n, seed)
        found = merge_many(models, spec=spec, rng=np.random.default_rng(seed))
        ratios.append(found.objective / squared_mean(aligned))
    assert min(ratios) >= 0.99


def test_the_papers_start_stays_below_the_oracle_with_many_models() -> None:
    spec, models, aligned = planted(12, 0)
    assert merge_many(models, spec=spec, start="paper").objective / squared_mean(aligned) < 0.6


@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("net", ["residual", "self-tied"])
def test_merging_permuted_copies_of_one_network_gives_that_network(n: int, net: str) -> None:
    model, x = (Residual(), torch.randn(2, 20)) if net == "residual" else (SelfTied(8), torch.randn(2, 3, 4, 4))
    spec = perm_spec(model, x)
    state = noise(model.state_dict(), 5)
    generator = torch.Generator().manual_seed(9)
    copies = [state] + [permute(state, spec.random(generator), spec=spec) for _ in range(n - 1)]
    found = merge_many(copies, spec=spec)
    torch.testing.assert_close(found.params, state, rtol=1e-6, atol=1e-6)
    assert found.converged


def test_the_objective_rises_and_equals_the_squared_norm_of_the_mean() -> None:
    spec, models, _ = planted(4, 1)
    for start in ("anchored", "paper"):
        found = merge_many(models, spec=spec, start=start, weights=[3, 1, 1, 2])
        assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(found.history))
        names = spec.parameters
        value = sum(float((found.params[k].double() ** 2).sum()) for k in names)
        assert found.objective == pytest.approx(value, rel=1e-5)


def test_no_model_can_be_aligned_better_to_the_mean_of_the_others() -> None:
    spec, models, _ = planted(3, 2)
    found = merge_many(models, spec=spec)
    assert found.converged
    moved = [permute(m, p, spec=spec) for m, p in zip(models, found.perms, strict=True)]
    for i, m in enumerate(moved):
        others = average([other for j, other in enumerate(moved) if j != i])
        again = align(m, to=others, spec=spec, start="identity")
        assert again.objective <= again.history[0] * (1 + 1e-9)


def test_the_params_are_the_mean_of_the_reordered_models() -> None:
    spec, models, _ = planted(3, 3)
    found = merge_many(models, spec=spec, weights=[1, 2, 3])
    moved = [permute(m, p, spec=spec) for m, p in zip(models, found.perms, strict=True)]
    expected = {k: (moved[0][k].double() + 2 * moved[1][k].double() + 3 * moved[2][k].double()) / 6 for k in moved[0]}
    torch.testing.assert_close({k: v.double() for k, v in found.params.items()}, expected, rtol=1e-5, atol=1e-6)


def test_the_anchor_keeps_its_order_until_the_sweeps() -> None:
    spec, models, _ = planted(3, 4)
    found = merge_many(models, spec=spec, reference=1, max_sweeps=0)
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.perms[1].values())
    assert not found.converged


def test_one_model_is_returned_as_it_is() -> None:
    spec, models, _ = planted(1, 0)
    found = merge_many(models, spec=spec)
    torch.testing.assert_close(found.params, models[0], rtol=1e-6, atol=1e-7)
    assert found.sweeps == 0


def test_average_weighs_in_float64_and_keeps_integers() -> None:
    model = SelfTied(4)
    a, b = model.state_dict(), noise(model.state_dict(), 1)
    b["norm.num_batches_tracked"] = torch.tensor(7)
    mean = average([a, b], [1, 3])
    torch.testing.assert_close(mean["head.bias"], (a["head.bias"] + 3 * b["head.bias"]) / 4)
    assert mean["norm.num_batches_tracked"].dtype == torch.int64
    assert int(mean["norm.num_batches_tracked"]) == 7
    many = [{"w": torch.full((1,), 0.1)} for _ in range(1000)]
    assert float(average(many)["w"]) == float(torch.tensor(0.1))


def test_bad_weights_models_and_names_are_named() -> None:
    spec, models, _ = planted(2, 0)
    with pytest.raises(ParamsError, match=r"weights \[1.0\] do not fit 2 models; give 2 finite"):
        merge_many(models, spec=spec, weights=[1.0])
    with pytest.raises(ParamsError, match="do not fit 2 models"):
        average(models, [-1.0, 2.0])
    with pytest.raises(ParamsError, match="no model was given"):
        average([])
    with pytest.raises(UnknownNameError, match=r"unknown start of MergeMany 'papre'.*did you mean 'paper'"):
        merge_many(models, spec=spec, start="papre")
    with pytest.raises(UnknownNameError, match="unknown merger 'mean'"):
        merge(models, spec=spec, method="mean")
    with pytest.raises(ParamsError, match="model 1 has an extra tensor"):
        merge_many([models[0], {**models[1], "extra": torch.zeros(1)}], spec=spec)


def test_a_wide_mlp_of_two_models_is_aligned_exactly_on_its_only_layer() -> None:
    net = mlp(6, 64, 3)
    spec = perm_spec(net, torch.randn(2, 6))
    state = net.state_dict()
    other = permute(state, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    torch.testing.assert_close(merge([state, other], spec=spec).params, dict(state), rtol=1e-6, atol=1e-6)


def test_models_aligned_in_parallel_give_what_one_after_the_other_gives() -> None:
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    models = [noise(net.state_dict(), i) for i in range(5)]
    threads = torch.get_num_threads()
    one, three = (merge_many(models, spec=spec, workers=workers, rng=np.random.default_rng(3)) for workers in (1, 3))
    torch.testing.assert_close(one.params, three.params, rtol=0, atol=0)
    assert one.history == three.history
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("aligner", ["activation-matching", "optimal-transport-activations"])
@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3}, {"method": "hierarchical"}])
def test_networks_aligned_by_activations_are_traced_once_for_each_size_of_a_batch(
    aligner: str, options: dict[str, object], digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Flatten(), *mlp(64, 12, 10))
    spec, models = perm_spec(net, torch.zeros(1, 1, 8, 8)), [noise(net.state_dict(), i) for i in range(4)]
    seen = {"model": net, "data": digits.select(range(150)), "batch_size": 100}
    alone = align(models[1], to=models[0], spec=spec, method=aligner, **seen)
    traced: list[int] = []
    monkeypatch.setattr(_activations, "trace", lambda *given: traced.append(len(given[1][0])) or trace(*given))
    found = merge(models, spec=spec, aligner=aligner, aligner_options=seen, max_sweeps=0, **options)
    assert traced == [100, 50]
    if "workers" in options:
        assert all(torch.equal(perm, alone.perms[group]) for group, perm in found.perms[1].items())


def test_an_alignment_that_fails_in_a_thread_is_told() -> None:
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    models = [noise(net.state_dict(), i) for i in range(3)]
    threads = torch.get_num_threads()
    with pytest.raises(ParamsError, match=r"model= and data= was not given"):
        merge_many(models, spec=spec, aligner="activation-matching", workers=2)
    assert torch.get_num_threads() == threads


def test_a_merge_says_which_groups_were_too_wide_for_exact_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(4, 30, 12, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    models = [noise(net.state_dict(), i) for i in range(3)]
    assert merge_many(models, spec=spec, aligner_options={"wide": 20}).approximate == ("0",)
    assert merge_many(models, spec=spec).approximate == ()
    few = {"wide": 20}
    assert merge(models, spec=spec, method="hierarchical", aligner_options=few).approximate == ("0",)
    assert merge(models, spec=spec, method="hierarchical").approximate == ()
    module, anchored = sys.modules["fedmerge.merge._cycle_consistent"], {"start": "anchored", "aligner_options": few}
    monkeypatch.setattr(module, "merge_many", lambda given, **how: merge_many(given, **{**how, **anchored}))
    assert merge(models, spec=spec, method="cycle-consistent").approximate == ("0",)


def test_giving_memory_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    models = [noise(net.state_dict(), i) for i in range(3)]
    kept = merge_many(models, spec=spec)
    monkeypatch.setattr(sys.modules["fedmerge.merge._merge_many"], "_LARGE", 0)
    torch.testing.assert_close(merge_many(models, spec=spec).params, kept.params, rtol=0, atol=0)
