"""State dicts keep the versions of their modules, without which some modules refuse them."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pictures import pictures
from safetensors.torch import save_file
from torch import Tensor, nn

import fedmerge as fm
from fedmerge._loading import load, versions
from fedmerge.errors import ParamsError
from fedmerge.merge import ordered, takes


class Versioned(nn.Linear):
    """Refuses a state dict that does not say of which version it is, as torchvision's MNASNet does.

    It stores more than tensors, and what it computes hangs on it.
    """

    _version, factor = 3, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)

    def get_extra_state(self) -> dict[str, float]:
        return {"factor": self.factor}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.factor = state["factor"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 3:
            raise ValueError(f"version {local_metadata.get('version')} is not 3")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), Versioned(80, 6), nn.ReLU(), nn.Linear(6, 4)
    )


def spec_of(model: nn.Module) -> fm.PermSpec:
    return fm.perm_spec(model, torch.zeros(2, 3, 4, 4))


def fits(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    assert dict(versions(params)) == dict(versions(model.state_dict()))
    assert params["4._extra_state"] == model.state_dict()["4._extra_state"]
    copy.deepcopy(model).load_state_dict(params)


def plain(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: copy.deepcopy(tensor) for name, tensor in params.items()}


def test_the_model_of_these_tests_refuses_a_dict_without_versions(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="version None is not 3"):
        model.load_state_dict(plain(model.state_dict()))


@pytest.mark.parametrize("method", fm.mergers())
def test_every_merger_keeps_them(method: str, model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    states = [model.state_dict(), other.state_dict()]
    given = {"model": model, "data": pictures(12), "base": states[0], "epochs": 1}
    used = {name: value for name, value in given.items() if name in takes(method)}
    if method == "fs-merge":
        pytest.skip("it folds linear layers and convolutions only")
    found = fm.merge(states, spec=spec_of(model), method=method, **used)
    fits(model, found.params)
    for params in ordered(states, found, spec=spec_of(model)):
        fits(model, params)


@pytest.mark.parametrize("method", fm.repairs())
@pytest.mark.parametrize("kept", [True, False], ids=["", "lost before"])
def test_every_repair_keeps_them(method: str, kept: bool, model: nn.Module) -> None:
    state = model.state_dict() if kept else plain(model.state_dict())
    found = fm.repair(model, state, data=pictures(5), method=method, sources=[state])
    (fits if kept else load)(model, found, *([] if kept else ["cpu"]))


@pytest.mark.parametrize("name", fm.running_averages())
def test_every_running_average_keeps_them_also_when_resumed(name: str, model: nn.Module) -> None:
    average, again = fm.running_average(name), fm.running_average(name)
    average.update(model.state_dict())
    average.update(model.state_dict())
    fits(model, average.params)
    again.load_state(average.state(), model.state_dict())
    fits(model, again.params)


def test_everything_else_that_returns_a_state_dict_keeps_them(model: nn.Module) -> None:
    state, spec, data = model.state_dict(), spec_of(model), pictures(8)
    fits(model, fm.average([state, state]))
    fits(model, fm.permute(state, spec.random(torch.Generator().manual_seed(0)), spec=spec))
    fits(model, fm.merge_many([state, state], spec=spec).params)
    fits(model, fm.fold_norms(model, state, torch.zeros(2, 3, 4, 4)).params)
    for params in fm.papa([state, state]):
        fits(model, params)
    trained = fm.train(
        model, state, data, recipe=fm.models.recipe("mlp"), epochs=1, generator=torch.Generator().manual_seed(0)
    )
    fits(model, trained.params)


def test_parameters_without_versions_are_taken_as_the_models_own(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}, file)
    expected = fm.predict(model, model.state_dict(), pictures(5))
    torch.testing.assert_close(fm.predict(model, plain(model.state_dict()), pictures(5)), expected)
    torch.testing.assert_close(fm.predict(model, fm.open_params(file), pictures(5)), expected)


def test_an_old_state_dict_is_loaded_by_the_rules_of_torch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48))
    old = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}  # as torch 0.4 wrote it
    assert load(model, old, "cpu")[1].num_batches_tracked == 0


def test_what_is_stored_beside_tensors_is_that_of_the_state_dict_that_is_given(
    model: nn.Module, tmp_path: Path
) -> None:
    other = copy.deepcopy(model)
    other[4].factor = -2.0
    data = pictures(6)
    with torch.no_grad():
        expected = other.eval()(data.normalise(data.images))
    torch.testing.assert_close(fm.predict(model, other.state_dict(), data), expected)
    bend = fm.curve(
        model, other.state_dict(), model.state_dict(), data, recipe=fm.models.recipe("mlp"), epochs=1,
        generator=torch.Generator().manual_seed(0),
    ).points[1]  # fmt: skip
    fits(other, bend)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    save_file(tensors, tmp_path / "net.safetensors")  # files and messages hold tensors alone
    torch.testing.assert_close(fm.predict(other, fm.open_params(tmp_path / "net.safetensors"), data), expected)
    moved = fm.merge([other.state_dict(), model.state_dict()], spec=spec_of(model), method="average")
    fits(other, moved.params)


def test_what_does_not_fit_is_named(model: nn.Module) -> None:
    with pytest.raises(ParamsError, match="not a state dict of Sequential: .*Missing key"):
        load(model, {}, "cpu")
    torn = model.state_dict()
    torn._metadata["4"]["version"] = 2
    with pytest.raises(ParamsError, match="not a state dict of Sequential: version 2 is not 3"):
        fm.evaluate(model, torn, pictures(3))


def test_mnasnet_is_trained_averaged_repaired_and_loaded() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.mnasnet0_5(num_classes=4)
    data, recipe = pictures(4, shape=(3, 32, 32)), fm.models.recipe("mlp")
    trained = fm.train(model, model.state_dict(), data, recipe=recipe, epochs=1, generator=torch.Generator())
    merged = fm.average([model.state_dict(), trained.params])
    model.load_state_dict(fm.repair(model, merged, data=data))
    fm.evaluate(model, plain(merged), data)
