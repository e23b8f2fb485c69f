"""Statistics of norms: those of one batch of all images in training mode, however the images divide."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pictures import pictures
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedmerge import _statistics, data, normalisation, perm_spec, repair
from fedmerge.errors import DataError, ParamsError
from fedmerge.merge import merge


class Doubled(nn.BatchNorm2d):
    """A layer of somebody's own, which does more than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Norms(nn.Module):
    """Norms of every kind, each of which sees what those before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first = nn.Conv2d(3, 4, 3), Doubled(4)
        self.each = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.b, self.c, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.SyncBatchNorm(4)
        self.rows, self.length = nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None)
        self.d, self.by_batch = nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False)
        self.last, self.drop, self.idle = nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(torch.relu(self.first(self.a(x))))
        x = self.shared(self.b(x))
        x = torch.relu(self.shared(self.c(x))).flatten(2)
        x = self.length(self.rows(x.transpose(1, 2)).transpose(1, 2)).mean(2)
        return self.head(self.drop(self.last(torch.sin(self.by_batch(self.d(x.tanh()))))))


def norms(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Norms()
    model.idle.running_mean.fill_(7)
    return model


def one_batch(model: nn.Module, images: data.Images) -> dict[str, Tensor]:
    """What torch itself stores: the oracle."""
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer is not model.idle:
            layer.reset_running_stats()
            layer.momentum = None
        elif isinstance(layer, _NormBase):
            layer.momentum = 1.0  # without one it stores nothing at all
        elif isinstance(layer, nn.Dropout):
            layer.eval()
    with torch.no_grad():
        model(images.normalise(images.images))
    return model.state_dict()


@pytest.mark.parametrize("crowded", [False, True], ids=["held", "run again"])
@pytest.mark.parametrize(("n", "batch"), [(9, 9), (9, 4), (9, 8), (9, 1), (8, 3), (7, 6), (3, 500)])
def test_they_are_those_of_one_batch_however_the_images_divide(
    n: int, batch: int, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalisation, "_BATCH", batch)
    monkeypatch.setattr(_statistics, "_crowded", lambda device: lambda: crowded)
    model, images = norms(), pictures(n)
    found = repair(model, model.state_dict(), data=images)
    expected = one_batch(model, images)
    assert found["shared.num_batches_tracked"] == 2
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=1e-5)


def test_the_plain_values_of_a_norm_are_those_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_BATCH", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    images = pictures(9)
    with torch.no_grad():
        values = model[:2](images.normalise(images.images)).double()
    for method in ("recompute", "repair"):
        found = repair(model, model.state_dict(), data=images, method=method, sources=[model.state_dict()])
        torch.testing.assert_close(found["2.running_mean"].double(), values.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["2.running_var"].double(), values.var(0), rtol=1e-5, atol=1e-6)


def test_a_large_mean_costs_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_BATCH", 2)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[:, :, None, None])
        model[0].bias.fill_(1e3)
    images = pictures(9)
    with torch.no_grad():
        expected = model[0](images.normalise(images.images)).double().var((0, 2, 3))
    found = repair(model, model.state_dict(), data=images)
    torch.testing.assert_close(found["1.running_var"].double(), expected, rtol=1e-5, atol=0)


def test_a_pass_leaves_what_it_need_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_BATCH", 2)
    answers = iter([100, 60, 40, 60, 60] + [40] * 50)  # what is free at first, and after each piece
    monkeypatch.setattr(_statistics, "usable_memory", lambda: next(answers))
    runs = []
    model, images = norms(), pictures(8)
    model.register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    found = repair(model, model.state_dict(), data=images)
    # Four pieces; the second is dropped at the first norm, all of them at every later one.
    assert len(runs) > 4
    for name, tensor in one_batch(norms(), images).items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=1e-5)


class Frozen(nn.Module):
    """BatchNorm that is meant to stay: it is none of torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(3))
        self.register_buffer("running_var", torch.ones(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(x.mean((2, 3)), self.running_mean, self.running_var))


class Lower(nn.BatchNorm2d):
    """It calls the function that ``F.batch_norm`` calls."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, True
        )


class Alone(nn.BatchNorm2d):
    """It normalises by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) / (self.running_var[:, None, None] + self.eps).sqrt()


def test_norms_of_ones_own_are_measured_where_they_call_torch_and_named_where_not() -> None:
    images = pictures(9)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Lower(4), nn.Flatten(), nn.Linear(64, 4))
    found = repair(model, model.state_dict(), data=images)
    with torch.no_grad():
        seen = model[0](images.normalise(images.images))
    torch.testing.assert_close(found["1.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["1.running_var"], seen.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    model[1] = Alone(4)
    for method in ("recompute", "repair"):
        with pytest.raises(ParamsError, match="norm '1', a Alone, does not normalise by torch's batch_norm"):
            repair(model, model.state_dict(), data=images, method=method, sources=[model.state_dict()])


class Fickle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) if len(x) == 2 else self.other(x)
        return self.head(x.mean((2, 3)))


def test_what_is_no_norm_of_the_data_stays() -> None:
    model = Frozen()
    found = repair(model, model.state_dict(), data=pictures(4))
    torch.testing.assert_close(dict(found), dict(model.state_dict()), rtol=0, atol=0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    found = repair(plain, plain.state_dict(), data=pictures(0))  # nothing to measure: no image is needed
    torch.testing.assert_close(dict(found), dict(plain.state_dict()), rtol=0, atol=0)


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = norms()
    state = copy.deepcopy(model.state_dict())
    for method in ("recompute", "repair"):
        with pytest.raises(DataError, match="holds no images"):
            repair(model, state, data=pictures(0), method=method, sources=[state])
        with pytest.raises(
            DataError, match="norm without running statistics sees one value a channel on the 1 images of pictures"
        ):
            repair(model, state, data=pictures(1), method=method, sources=[state])
    rows = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48))
    with pytest.raises(DataError, match="norm '1' sees one value a channel on the 1 images of pictures"):
        repair(rows, rows.state_dict(), data=pictures(1))
    narrow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten())
    with pytest.raises(DataError, match="instance norm .* sees one value a channel and image"):
        repair(narrow, narrow.state_dict(), data=pictures(3))
    monkeypatch.setattr(normalisation, "_BATCH", 2)
    with pytest.raises(ParamsError, match="which norms this network calls depends on the images"):
        repair(Fickle(), Fickle().state_dict(), data=pictures(3))
    with pytest.raises(DataError, match="Broken does not take the images of pictures.*: broken"):  # as it does anywhere
        repair(Broken(), Broken().state_dict(), data=pictures(3))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        raise ValueError("broken")


def test_a_soup_of_networks_with_rows_is_cooked_from_any_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_BATCH", 4)
    images = pictures(9)
    images = replace(images, labels=torch.zeros_like(images.labels))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([99.0, 0, 0, 0]))  # it is always right, so every model joins
    spec = perm_spec(model, images.normalise(images.images[:2]))
    state = model.state_dict()
    found = merge([state, state], spec=spec, method="greedy-soup", order="average", model=model, data=images)
    with torch.no_grad():
        values = model[:2](images.normalise(images.images))
    torch.testing.assert_close(found.params["2.running_var"], values.var(0), rtol=1e-4, atol=1e-6)
