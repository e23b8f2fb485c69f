import numpy as np
import pytest
import torch
from nets import Residual, noise

from fedmerge import perm_spec
from fedmerge.align import forward_greedy, weight_matching


def test_it_is_the_start_of_weight_matching_and_polished_is_its_end() -> None:
    model = Residual(4, 8, 8)
    spec = perm_spec(model, torch.randn(2, 4))
    for seed in range(5):
        a, b = noise(model.state_dict(), seed), noise(model.state_dict(), seed + 50)
        whole = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(seed))
        start = forward_greedy(b, to=a, spec=spec, rng=np.random.default_rng(seed))
        assert start.objective == pytest.approx(whole.history[0], rel=1e-12)
        polished = forward_greedy(b, to=a, spec=spec, rng=np.random.default_rng(seed), polish=True)
        assert polished.history == whole.history
