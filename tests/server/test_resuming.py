"""Runs that are cut off and go on: every strategy has in a checkpoint all that it carries from round to round."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from short_run import rows, run
from torch import nn
from written import contents

import strategies
from fedmerge.data import PARTITIONS
from fedmerge.errors import RoundError, RunDirectoryError
from fedmerge.tasks import ClientTask, read_anew
from server import Callback
from strategies import STRATEGIES, Federated, Federation

pytestmark = pytest.mark.usefixtures("no_collections")

SMALL = {
    "rounds": 3,
    "init": "shared",
    "width": 8,
    "local_epochs": 1,
    "retrain_epochs": 1,
    "restarts": 1,
    "fraction_train": 0.75,
}
CHANGES: dict[str, dict[str, Any]] = {
    "masked sums": {"strategy": "merge-many", "secure": True, "init": "independent"},
    "merge-many": {"init": "pretrained", "controls": "ensemble", "hand_out": "best-on-val"},
    "scaffold": {"init": "pretrained"},
    "papa": {"init": "independent"},
    "fedadam": {"server_average": "lawa"},
    "fedavgm": {"server_average": "swa"},
    "fedavg": {"server_average": "ema"},
}


class Copies(Callback):
    """Keeps the run's directory as it is after each round but the last: what a killed run leaves."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_round(self, server_round: int, *given: Any) -> None:
        shutil.copytree(self.path, self.path.with_name(f"cut-{server_round}"))


@pytest.mark.parametrize("strategy", [*strategies.STRATEGIES, "masked sums"])
def test_a_run_resumed_after_any_round_equals_one_that_was_not_cut_off(strategy: str, tmp_path: Path) -> None:
    settings = {**SMALL, "controls": "none", "strategy": strategy, **CHANGES.get(strategy, {})}
    whole = tmp_path / "whole"
    run(whole, callbacks=[Copies(whole)], **settings)
    files = [path.name for path in whole.glob("*.safetensors")]
    assert len(files) == 1 + ("server_average" in settings)
    for cut in (tmp_path / "cut-1", tmp_path / "cut-2"):
        run(cut, resume=True, **settings)
        for name in (*files, "summary.json"):
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), (cut.name, name)
        assert rows(cut) == rows(whole)


def test_an_interrupted_run_says_so_and_goes_on(tmp_path: Path) -> None:
    class Cut(Callback):
        rounds = 0

        def step(self, name: str, done: int, total: int) -> None:
            self.rounds += (name, done) == ("clients train", 0)
            if self.rounds == 2:
                raise KeyboardInterrupt

    settings = {**SMALL, "rounds": 2, "strategy": "fedavg", "controls": "none"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Cut()], **settings)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed: KeyboardInterrupt"
    assert run(tmp_path, resume=True, **settings)["status"] == "finished"


class Heavy(FedAvg):
    """FedAvg whose network moves half of its way, and which forgets to say what it keeps for that."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.before: dict[str, np.ndarray] = {}

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        new = {name: array.numpy() for name, array in arrays.items()}
        self.before = {name: (self.before.get(name, new[name]) + new[name]) / 2 for name in new}
        return ArrayRecord({name: Array(value) for name, value in self.before.items()}), metrics


class Stated(Heavy):
    """The same, which says so."""

    keeps = ("before",)


def test_a_strategy_that_does_not_state_its_state_is_refused_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES))
    for name, kind in {"heavy": Heavy, "stated": Stated}.items():
        STRATEGIES.replace(name, kind, title=name)
    settings = {**SMALL, "controls": "none"}
    with pytest.raises(
        RoundError, match="round 1: strategy Heavy changed 'before', which its keeps does not name, so"
    ) as caught:
        run(tmp_path / "heavy", strategy="heavy", **settings)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "heavy").glob("checkpoint/*"))
    assert run(tmp_path / "alone", strategy="heavy", **{**settings, "rounds": 1})["status"] == "finished"
    whole = tmp_path / "whole"
    run(whole, callbacks=[Copies(whole)], strategy="stated", **settings)
    run(tmp_path / "cut-1", resume=True, strategy="stated", **settings)
    assert (tmp_path / "cut-1" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class Holder:
    def __init__(self) -> None:
        self.seen = [np.zeros(2)]


class Own(Federated):
    """A strategy with attributes of every kind, as its author begins it."""

    shared: ClassVar[list[int]] = []
    keeps = ("kept",)
    passes = ("passing",)

    def __init__(self) -> None:
        super().__init__()
        self.number, self.array, self.tensor = 0, np.zeros(3), torch.zeros(3)
        self.nested, self.held, self.net = {"a": [np.zeros(2)]}, Holder(), nn.Linear(2, 1)
        self.rng, self.generator, self.nan = np.random.default_rng(0), torch.Generator(), float("nan")
        self.kept: Any = {}
        self.passing = 0
        self.join(Federation(nodes={0: 7}, task=ClientTask(), parameters=frozenset()))


ALTERATIONS: dict[str, Callable[[Own], object]] = {
    "number": lambda s: setattr(s, "number", 1),
    "array": lambda s: s.array.__setitem__(1, 5),
    "tensor": lambda s: s.tensor.add_(1),
    "nested": lambda s: s.nested["a"][0].__setitem__(0, 1),
    "held": lambda s: s.held.seen.append(np.ones(1)),
    "net": lambda s: s.net.bias.data.add_(1),
    "rng": lambda s: s.rng.random(),
    "generator": lambda s: torch.rand(1, generator=s.generator),
    "shared": lambda s: s.shared.append(1),
    "added": lambda s: setattr(s, "added", 0),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_change_of_anything_that_is_not_stated_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "shared", [])
    strategy = Own()
    strategy.array, strategy.nan = np.zeros(3), float("nan")  # the same numbers elsewhere
    strategy.kept, strategy.passing = {"a": np.ones(1)}, 3
    strategy.check_kept(1)
    ALTERATIONS[name](strategy)
    with pytest.raises(RoundError, match=f"round 1: strategy Own changed '{name}', which its keeps does not name, so"):
        strategy.check_kept(1)


def test_dicts_and_lists_of_arrays_come_back_as_they_were() -> None:
    for kept in (
        {"1": np.arange(2), "0": torch.ones(2)},
        [np.full(1, i) for i in range(12)],
        {"a:b[0]": np.array(3.0)},
    ):
        strategy, other = Own(), Own()
        strategy.kept = kept
        other.load_server_state(strategy.server_state())
        pairs = (
            zip(kept, other.kept, strict=True) if isinstance(kept, list) else ((kept[k], other.kept[k]) for k in kept)
        )
        assert (type(other.kept), len(other.kept)) == (type(kept), len(kept))
        assert all(np.array_equal(a, b) for a, b in pairs)
    for wrong in (3, {0: np.ones(1)}, {"a": "text"}, [object()]):
        strategy = Own()
        strategy.kept = wrong
        with pytest.raises(RoundError, match="strategy Own keeps 'kept.*; a checkpoint holds dicts"):
            strategy.server_state()


class Cut(Callback):
    """Ends a run after its first round; before that it has looked at what its folder says."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, []

    def after_round(self, server_round: int, *given: Any) -> None:
        self.said.append((self.path / "summary.json").exists())
        raise KeyboardInterrupt


DEALT = """
import numpy as np

def part(labels, clients, rng):
    rows = np.arange(len(labels))
    return [rows[:{images}], *np.array_split(rows[{images}:], clients - 1)]
"""


def test_a_resumed_run_says_nothing_of_a_former_end_while_it_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        cut = Cut(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, resume=tmp_path.joinpath("config.toml").exists(), callbacks=[cut], **SMALL)
        assert cut.said == [False]
        assert json.loads((tmp_path / "summary.json").read_text())["status"].startswith("failed")


@pytest.mark.parametrize(
    ("now", "part"), [(DEALT.format(images=90), "partition"), ("# A remark.\n" + DEALT.format(images=20), "dealt:part")]
)
def test_a_run_goes_on_with_the_partition_and_the_code_with_which_it_began(
    now: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    settings = {**SMALL, "strategy": "fedavg", "controls": "none", "partition": "dealt:part"}
    module, out = tmp_path / "dealt.py", tmp_path / "a"

    def written(text: str) -> None:
        module.write_text(text)
        sys.modules.pop("dealt", None)
        monkeypatch.setattr(PARTITIONS, "_brought", {})  # as in another process
        read_anew()

    written(DEALT.format(images=20))
    with pytest.raises(KeyboardInterrupt):
        run(out, callbacks=[Cut(out)], **settings)
    written(now)
    before = contents(out / "checkpoint"), rows(out)
    with pytest.raises(RunDirectoryError, match=f"was begun with another {part} than now; put that back"):
        run(out, resume=True, **settings)
    assert (contents(out / "checkpoint"), rows(out)) == before
    written(DEALT.format(images=20))
    assert run(out, resume=True, **settings)["status"] == "finished"
    assert json.loads((out / "env.json").read_text())["made_of"].keys() == {"data set", "partition", "dealt:part"}
