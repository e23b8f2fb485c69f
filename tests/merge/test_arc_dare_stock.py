"""Slerp, DARE and Model Stock against their formulas, computed here from the papers and in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge import merge, perm_spec
from fedmerge.errors import ConfigError
from fedmerge.merge import average

NET = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3))
SPEC = perm_spec(NET.eval(), torch.zeros(2, 4))


def states(n: int, near: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    base = {k: torch.randn(v.shape, generator=generator) for k, v in NET.state_dict().items() if v.is_floating_point()}
    base["2.running_var"] = base["2.running_var"].abs() + 1
    kept = {k: v for k, v in NET.state_dict().items() if not v.is_floating_point()}
    models = [{k: v + near * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(n)]
    return [{**m, "2.running_var": m["2.running_var"].abs() + 1, **kept} for m in (base, *models)]


def arrays(params: dict[str, torch.Tensor], name: str) -> np.ndarray:
    return params[name].double().numpy().ravel()


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_two_is_shoemakes_formula_on_every_parameter(t: float) -> None:
    _, a, b = states(2)
    found = merge([a, b], spec=SPEC, method="slerp", order="average", weights=[1 - t, t]).params
    for name in SPEC.parameters:
        v, w = arrays(a, name), arrays(b, name)
        omega = np.arccos(v @ w / np.linalg.norm(v) / np.linalg.norm(w))
        expected = (np.sin((1 - t) * omega) * v + np.sin(t * omega) * w) / np.sin(omega)
        np.testing.assert_allclose(arrays(found, name), expected, rtol=1e-5, atol=1e-6)
    mean = average([a, b], [1 - t, t])
    for name in found.keys() - SPEC.parameters:
        assert torch.equal(found[name], mean[name])


def test_slerp_of_three_is_the_point_of_the_sphere_to_which_all_pull_equally() -> None:
    _, *models = states(3, near=0.7)
    shares = np.array([0.5, 0.3, 0.2])
    found = merge(models, spec=SPEC, method="slerp", order="average", weights=shares.tolist()).params
    for name in SPEC.parameters:
        values = np.stack([arrays(m, name) for m in models])
        norms = np.linalg.norm(values, axis=1)
        # The coefficients of the values are those of their directions.
        coefficients, *_ = np.linalg.lstsq(values.T, arrays(found, name), rcond=None)
        m, directions = (coefficients @ (values / norms[:, None])), values / norms[:, None]
        assert np.linalg.norm(m) == pytest.approx(1, abs=1e-5)
        along = directions - (directions @ m)[:, None] * m
        logarithms = np.arccos(np.clip(directions @ m, -1, 1))[:, None] * along / np.linalg.norm(along, axis=1)[:, None]
        np.testing.assert_allclose(shares @ logarithms, 0, atol=1e-5)


def test_slerp_averages_what_points_the_same_way() -> None:
    _, a, b = states(2)
    a, b = a | {"0.bias": torch.full((6,), 0.5)}, b | {"0.bias": torch.full((6,), 1.5), "3.bias": 3 * a["3.bias"]}
    found = merge([a, b], spec=SPEC, method="slerp", order="average", weights=[1, 3]).params
    torch.testing.assert_close(found["0.bias"], torch.full((6,), 1.25))
    torch.testing.assert_close(found["3.bias"], 2.5 * a["3.bias"])


def test_slerp_averages_what_has_no_direction_or_an_opposite_one() -> None:
    _, a, b = states(2)
    zero = {**b, "0.bias": torch.zeros(6), "3.bias": -2 * a["3.bias"]}
    found = merge([a, zero], spec=SPEC, method="slerp", order="average").params
    torch.testing.assert_close(found["0.bias"], a["0.bias"] / 2)
    torch.testing.assert_close(found["3.bias"], -a["3.bias"] / 2)


def test_slerp_reads_nothing_of_a_model_of_weight_0() -> None:
    _, a, b = states(2)
    expected = merge([a, b], spec=SPEC, method="slerp", order="average", weights=[1, 2]).params
    for factor in (0.0, -1.0):
        third = {k: factor * v if k in SPEC.parameters else v for k, v in a.items()}
        found = merge([a, b, third], spec=SPEC, method="slerp", order="average", weights=[1, 2, 0]).params
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dare_keeps_each_number_of_a_step_with_that_probability_and_rescales_it() -> None:
    base, a, _ = states(2)
    many = 200
    spec = SPEC
    sums = {name: torch.zeros_like(base[name], dtype=torch.float64) for name in spec.parameters}
    for seed in range(many):
        found = merge([a], spec=spec, method="dare", base=base, density=0.4, rng=np.random.default_rng(seed)).params
        for name in spec.parameters:
            step = (found[name] - base[name]).double() / (a[name] - base[name]).double()
            whole = (step - 2.5).abs() < 1e-3
            assert bool((whole | (step.abs() < 1e-3)).all())
            sums[name] += whole
    shares = torch.cat([s.flatten() for s in sums.values()]) / many
    # 63 binomial shares of 200 draws: deviation sqrt(.4 * .6 / 200) = .035, five of them at most.
    assert float((shares - 0.4).abs().max()) < 5 * 0.035
    assert float(shares.mean()) == pytest.approx(0.4, abs=5 * 0.035 / len(shares) ** 0.5)


def test_dare_that_drops_nothing_is_task_arithmetic_and_with_elected_signs_ties() -> None:
    base, *models = states(3)
    given = {"spec": SPEC, "base": base, "weights": [1, 2, 3], "scale": 1.5}
    plain = merge(models, method="dare", density=1.0, **given).params
    torch.testing.assert_close(plain, merge(models, method="task-arithmetic", **given).params)
    elected = merge(models, method="dare", density=1.0, elect=True, **given).params
    torch.testing.assert_close(elected, merge(models, method="ties", density=1.0, **given).params)
    assert not torch.equal(plain["0.weight"], elected["0.weight"])
    with pytest.raises(ConfigError, match=r"density of dare is 0; expected a probability in \(0, 1\]"):
        merge(models, method="dare", density=0, **given)


@pytest.mark.parametrize("n", [2, 4])
def test_model_stock_is_its_formula_with_the_mean_cosine_of_all_pairs(n: int) -> None:
    base, *models = states(n, near=0.1)
    shared = {k: torch.randn_like(v) for k, v in base.items() if v.is_floating_point()}
    models = [{k: v + shared[k] if k in SPEC.parameters else v for k, v in m.items()} for m in models]
    found = merge(models, spec=SPEC, method="model-stock", base=base).params
    for name in SPEC.parameters:
        steps = np.stack([arrays(m, name) - arrays(base, name) for m in models])
        cosines = (steps @ steps.T) / np.outer(*[np.linalg.norm(steps, axis=1)] * 2)
        cosine = cosines[np.triu_indices(n, 1)].mean()
        t = n * cosine / (1 + (n - 1) * cosine)
        assert 0 < t < 1
        expected = t * (arrays(base, name) + steps.mean(0)) + (1 - t) * arrays(base, name)
        np.testing.assert_allclose(arrays(found, name), expected, rtol=1e-5, atol=1e-6)


def test_model_stock_stays_at_the_base_where_steps_disagree_and_goes_to_the_mean_where_they_agree() -> None:
    base, a, _ = states(2)
    back = {k: 2 * base[k] - v if k in SPEC.parameters else v for k, v in a.items()}
    torch.testing.assert_close(
        merge([a, back], spec=SPEC, method="model-stock", base=base).params["0.weight"], base["0.weight"]
    )
    torch.testing.assert_close(
        merge([a, a], spec=SPEC, method="model-stock", base=base).params["0.weight"], a["0.weight"]
    )
