"""A network is traced once: for all runs of its kind, for all rounds, for all clients of a process."""

from pathlib import Path

import pytest
import torch
from short_run import run
from torch import nn

import fedmerge as fm
from fedmerge import tasks
from fedmerge.errors import ConfigError
from fedmerge.tasks import Setup


class Small(nn.Module):
    """A user's own, of one hidden layer."""

    def __init__(self, classes: int, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(in_shape[1] * in_shape[2], 6), nn.Linear(6, classes)

    def forward(self, x):
        return self.out(self.hidden(x.flatten(1)).relu())


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every network that is exported from here on, by its class."""
    from fedmerge.spec import trace

    seen: list[str] = []
    export = trace.export

    def watched(model: nn.Module, *given, **options):
        seen.append(type(model).__name__)
        return export(model, *given, **options)

    monkeypatch.setattr(trace, "export", watched)
    monkeypatch.setattr(tasks, "_TRACED", {})
    return seen


def test_networks_of_one_kind_share_their_symmetries(exports: list[str]) -> None:
    first = Setup(width=8, clients=2, seed=0)
    spec = first.spec()
    assert Setup(width=8, clients=3, seed=1, init="shared", partition="shards").spec() is spec
    assert len(exports) == 1
    assert Setup(width=9, clients=2).spec().sizes() != spec.sizes()
    public = first.split().public_images
    assert fm.perm_spec(first.network(), public.normalise(public.images[:2])) == spec


def test_a_network_from_outside_is_traced_each_time(exports: list[str]) -> None:
    setup = Setup(model="test_traced_once:Small", clients=2)
    network = setup.network()
    assert setup.spec(network) == setup.spec(network)
    assert exports == ["Small", "Small"]


def test_a_model_of_a_users_own_is_never_taken_for_another_of_its_name(
    exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(model="squeezenet1_1", clients=2)
    tasks._TRACED[("squeezenet1_1", 0, 0, 10, (1, 8, 8))] = fm.perm_spec(nn.Linear(2, 2), torch.zeros(1, 2))
    monkeypatch.setattr(fm.models.MODELS, "_entries", dict(fm.models.MODELS._entries))
    monkeypatch.setattr(fm.models.MODELS, "_own", {"squeezenet1_1"})
    fm.models.MODELS.replace("squeezenet1_1", Small)
    assert "hidden.weight" in setup.spec().axes


class Half(Small):
    """Of a type that NumPy does not have."""

    def __init__(self, classes: int, in_shape: tuple[int, ...]) -> None:
        super().__init__(classes, in_shape)
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16()).float()


def test_weights_that_no_message_carries_are_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match=r"tensor 'hidden.weight' is torch.bfloat16, which no message carries; ret"):
        Setup(model="test_traced_once:Half", clients=2).network()


def test_a_simulation_splits_a_folder_as_it_is_now() -> None:
    setup = Setup(clients=2)
    before = setup.split()
    assert setup.split() is before
    tasks.read_anew()
    assert setup.split() is not before


@pytest.mark.parametrize("secure", [False, True])
def test_no_round_and_no_client_traces_again(secure: bool, tmp_path: Path, exports: list[str]) -> None:
    settings = {"clients": 3, "width": 8, "local_epochs": 1, "retrain": "none", "controls": "none", "secure": secure}
    traced = []
    for rounds in (1, 3):
        exports.clear()
        run(tmp_path / f"{rounds}", rounds=rounds, seed=rounds, **settings)
        traced.append(len(exports))
    # The symmetries in the first run, and once for batches of each size in which images are looked at.
    assert traced[0] > traced[1] == traced[0] - 1, traced
