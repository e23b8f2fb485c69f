"""Averages over a stream of networks against the mean of all of them, written out."""

import copy

import pytest
import torch
from nets import SelfTied, noise
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fedmerge import average, running_average, running_averages
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError

every_average = pytest.mark.parametrize("name", list(running_averages()))


def stream(n: int = 7):
    like = SelfTied(4).state_dict()
    networks = [noise(like, i) for i in range(n)]
    for i, network in enumerate(networks):
        network["norm.num_batches_tracked"] = torch.tensor(10 - i)
    return networks


def after(networks, name: str, **options):
    found = running_average(name, **options)
    for network in networks:
        found.update(network)
    return found


@every_average
def test_an_average_keeps_names_kinds_and_its_input(name: str) -> None:
    networks = stream()
    before = copy.deepcopy(networks)
    found = after(networks, name)
    assert found.count == 7
    torch.testing.assert_close(networks, before, rtol=0, atol=0)
    assert found.params.keys() == networks[0].keys()
    assert all(tensor.dtype == networks[0][k].dtype for k, tensor in found.params.items())
    held = found.params
    for tensor in (*networks[-1].values(), *held.values()):
        tensor.zero_()  # neither what was given nor what was handed out is what the average holds
    torch.testing.assert_close(found.params, after(before, name).params, rtol=0, atol=0)


@every_average
def test_an_average_of_one_network_is_that_network(name: str) -> None:
    network = stream(1)[0]
    torch.testing.assert_close(after([network] * 3, name).params, network)


@every_average
def test_an_average_that_was_put_away_goes_on_as_if_it_had_not_been(name: str) -> None:
    networks = stream()
    for cut in (1, 4, 6):
        found = running_average(name)
        found.load_state(copy.deepcopy(after(networks[:cut], name).state()), like=networks[0])
        for network in networks[cut:]:
            found.update(network)
        torch.testing.assert_close(found.params, after(networks, name).params, rtol=0, atol=0)
        assert found.count == 7


@every_average
def test_bad_requests_are_named(name: str) -> None:
    found = running_average(name)
    with pytest.raises(ParamsError, match="no network was seen yet; call update"):
        _ = found.params
    found.update(stream(1)[0])
    wrong = stream(1)[0] | {"head.bias": torch.zeros(3)}
    with pytest.raises(ParamsError, match=r"tensor 'head.bias' of model 1 has shape \(3,\), expected \(4,\)"):
        found.update(wrong)
    with pytest.raises(ConfigError, match=f"{name} does not take speed: "):
        running_average(name, speed=1)
    with pytest.raises(UnknownNameError, match="unknown running average 'swo'"):
        running_average("swo")


def test_swa_is_the_mean_of_all_and_lawa_of_the_latest() -> None:
    networks = stream()
    torch.testing.assert_close(after(networks, "swa").params, average(networks))
    torch.testing.assert_close(after(networks, "lawa", latest=3).params, average(networks[4:]), rtol=0, atol=0)
    torch.testing.assert_close(after(networks[:2], "lawa", latest=3).params, average(networks[:2]), rtol=0, atol=0)
    assert len(after(networks, "lawa", latest=2).state()) == 1 + 2 * len(networks[0])


def test_ema_weighs_by_powers_of_its_decay() -> None:
    networks = stream()
    weights = [0.8**6, *(0.2 * 0.8 ** (6 - i) for i in range(1, 7))]
    torch.testing.assert_close(after(networks, "ema", decay=0.8).params, average(networks, weights))


@pytest.mark.parametrize(("name", "rule"), [("swa", get_swa_multi_avg_fn()), ("ema", get_ema_multi_avg_fn(0.9))])
def test_parameters_are_those_of_torchs_averaged_model(name: str, rule) -> None:
    model = SelfTied(4)
    expected = AveragedModel(model, multi_avg_fn=rule)
    for network in stream():
        model.load_state_dict(network)
        expected.update_parameters(model)
    found = after(stream(), name).params
    for key, tensor in expected.module.named_parameters():
        torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"decay of ema is 1; expected a number in \[0, 1\)"):
        running_average("ema", decay=1)
    with pytest.raises(ConfigError, match="latest of lawa is 1.5; expected a whole number from 1"):
        running_average("lawa", latest=1.5)


def test_of_more_networks_than_lawa_keeps_the_newest_stay() -> None:
    networks = stream(4)
    found = running_average("lawa", latest=2)
    found.load_state(after(networks, "lawa", latest=5).state(), like=networks[0])
    torch.testing.assert_close(found.params, average(networks[2:]))


@every_average
def test_a_state_of_another_kind_is_refused_and_changes_nothing(name: str) -> None:
    networks = stream(3)
    found = after(networks, name)
    before = found.params
    other = after(networks, "swa" if name == "lawa" else "lawa").state()
    with pytest.raises(ParamsError, match="this state is not of a running average of such networks"):
        found.load_state(other, like=networks[0])
    small = {key: value[:1] if value.dim() else value for key, value in found.state().items()}
    with pytest.raises(ParamsError, match="this state is not of a running average of such networks"):
        found.load_state(small, like=networks[0])
    assert found.count == 3
    torch.testing.assert_close(found.params, before, rtol=0, atol=0)
