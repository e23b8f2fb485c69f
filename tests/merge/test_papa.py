"""PAPA: the mean stays, the distances to it shrink, and functions survive a common order."""

import pytest
import torch
from nets import SelfTied, mlp, noise

from fedmerge import average, papa, perm_spec, permute
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError

WEIGHTS = [1.0, 2.0, 5.0]


def population():
    like = SelfTied(4).state_dict()
    found = [noise(like, i) for i in range(3)]
    for i, params in enumerate(found):
        params["norm.num_batches_tracked"] = torch.tensor(i)
    return found


def test_a_pull_keeps_the_mean_and_shrinks_every_distance_to_it_by_alpha() -> None:
    models = population()
    before = [{k: v.clone() for k, v in m.items()} for m in models]
    mean = average(models, WEIGHTS)
    pulled = papa(models, alpha=0.7, weights=WEIGHTS)
    torch.testing.assert_close(models, before, rtol=0, atol=0)
    torch.testing.assert_close(average(pulled, WEIGHTS), mean)
    for old, new in zip(models, pulled, strict=True):
        for name, centre in mean.items():
            if centre.is_floating_point():
                torch.testing.assert_close(new[name] - centre, 0.7 * (old[name] - centre), rtol=1e-4, atol=1e-6)
            else:
                assert new[name].dtype == torch.int64
                assert int(new[name]) == 2


def test_the_ends_are_the_mean_itself_and_copies() -> None:
    models = population()
    for params in papa(models, alpha=0, weights=WEIGHTS):
        torch.testing.assert_close(params, average(models, WEIGHTS), rtol=0, atol=0)
    for old, new in zip(models, papa(models, alpha=1), strict=True):
        for name, tensor in old.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(new[name], tensor, rtol=0, atol=0)
                assert new[name].data_ptr() != tensor.data_ptr()


def test_ten_weak_pulls_are_one_strong_one() -> None:
    models = population()
    often = models
    for _ in range(10):
        often = papa(often, alpha=0.99, weights=WEIGHTS)
    torch.testing.assert_close(often, papa(models, alpha=0.99**10, weights=WEIGHTS), rtol=1e-5, atol=1e-6)


def test_permuted_copies_are_one_network_in_a_common_order() -> None:
    net = mlp(5, 7, 6, 3)
    state = noise(net.state_dict(), 1)
    spec = perm_spec(net, torch.randn(2, 5))
    generator = torch.Generator().manual_seed(0)
    copies = [state] + [permute(state, spec.random(generator), spec=spec) for _ in range(2)]
    for params in papa(copies, alpha=0.5, order="merge-many", spec=spec):
        torch.testing.assert_close(params, state, rtol=1e-5, atol=1e-6)


def test_bad_requests_are_named() -> None:
    models = population()
    with pytest.raises(ConfigError, match=r"alpha of papa is 1.5; expected a number in \[0, 1\]"):
        papa(models, alpha=1.5)
    with pytest.raises(ParamsError, match="papa needs the symmetries to align by 'merge-many'; pass spec="):
        papa(models, order="merge-many")
    with pytest.raises(UnknownNameError, match="unknown order 'merge-may'.*did you mean 'merge-many'"):
        papa(models, order="merge-may", spec=perm_spec(SelfTied(4), torch.randn(2, 3, 4, 4)))
    with pytest.raises(ParamsError, match=r"weights \[1.0\] do not fit 3 models"):
        papa(models, weights=[1.0])
    with pytest.raises(UnknownNameError, match="unknown option of papa 'alhpa'"):
        papa(models, alhpa=0.5)
