"""REPAIR from the weights alone: exact where its hypothesis holds."""

import pytest
import torch
from nets import SelfTied, mlp, noise
from pictures import pictures
from torch import nn

from fedmerge import average, repair
from fedmerge.errors import ParamsError


def test_units_with_isotropic_inputs_get_the_mean_deviation_of_their_sources() -> None:
    model = nn.Sequential(nn.Flatten(), mlp(48, 6, 4))
    sources = [noise(model.state_dict(), i) for i in (1, 2, 3)]
    weights = [1.0, 2.0, 5.0]
    found = repair(
        model,
        average(sources, weights),
        data=pictures(2),
        method="repair-closed-form",
        sources=sources,
        weights=weights,
    )
    # With inputs of unit covariance the deviation of a unit is the norm of its weights.
    goal = sum(w / 8 * s["1.0.weight"].norm(dim=1) for w, s in zip(weights, sources, strict=True))
    torch.testing.assert_close(found["1.0.weight"].norm(dim=1), goal)
    torch.testing.assert_close(found["1.2.weight"], average(sources, weights)["1.2.weight"])


def test_a_normalised_unit_of_copies_keeps_its_statistics_and_of_opposites_shrinks_them() -> None:
    model = SelfTied(4)
    state = noise(model.state_dict(), 1)
    state["norm.running_var"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    same = repair(model, state, data=pictures(2), method="repair-closed-form", sources=[state, state])
    torch.testing.assert_close(same, state)
    other = state | {"stem.weight": 0.5 * state["stem.weight"]}
    other["stem.weight"][0] *= -1
    merged = average([state, other])
    found = repair(model, merged, data=pictures(2), method="repair-closed-form", sources=[state, other])
    # Norms 1 and 1/2: their mean is 3/4; the mean of the vectors has 1/4 in unit 0, which is opposed, else 3/4.
    torch.testing.assert_close(found["norm.running_var"], torch.tensor([1 / 9, 2.0, 3.0, 4.0]))


def test_it_needs_the_sources() -> None:
    model = SelfTied(4)
    with pytest.raises(ParamsError, match="repair-closed-form needs the aligned networks that were merged; pass them"):
        repair(model, model.state_dict(), data=pictures(2), method="repair-closed-form")
