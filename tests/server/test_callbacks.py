"""A run says of everything that takes long how far it is, and of controls before they begin."""

import sys
from pathlib import Path

import pytest
from short_run import run

from server import CONTROLS, Callback, RunConfig, controls
from server.app import Log


class Heard(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.said: list[str] = []

    def step(self, name: str, done: int, total: int) -> None:
        self.told.append((name, done, total))

    def say(self, text: str) -> None:
        self.said.append(text)


class Ended(Callback):
    def step(self, name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt


def test_every_phase_of_a_run_is_told_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    monkeypatch.setattr(controls, "_LONG", 0.0)
    monkeypatch.setattr(controls, "duration", lambda seconds: "so long")
    run(tmp_path / "a", callbacks=[heard], controls="default", init="pretrained", clients=3, local_epochs=1)
    began = [name for name, done, _ in heard.told if not done]
    assert began.count("clients train") == 2  # of the run, and of FedAvg
    assert began.count("clients evaluate") == 1
    for phase in (
        *("clients connect", "clients say who they are", "warming up", "tracing the network", "rounds", "training"),
        *("evaluating clients", "aligning models", "merging, sweep 1", "asking the ensemble", "interpolating"),
        *(f"control {name}" for name in CONTROLS if CONTROLS[name].usual),
    ):
        assert phase in began, phase
    assert sorted(began) == sorted(name for name, done, total in heard.told if done == total)
    announced = {f"control {name} takes about so long" for name in CONTROLS if CONTROLS[name].usual}
    assert announced <= set(heard.said)  # all of them are long here


def test_what_a_control_takes_is_known_about_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients that would each take 90 s for 100 images twice: training takes .45 s an image."""
    from server import World
    from strategies import ClientResult

    monkeypatch.setattr(controls, "usable_cores", lambda: 2)
    config = RunConfig.parse({"clients": 3, "rounds": 4, "local-epochs": 2, "retrain-epochs": 5, "init": "shared"})
    world = World(config, Callback())
    results = [ClientResult(c, {}, 100, 0.1, 0.9, 90.0) for c in range(3)]
    public = len(world.split.public_images)
    seconds = {name: CONTROLS[name].seconds(world, results) for name in CONTROLS if name != "paper-start"}
    assert seconds["fedavg"] == pytest.approx(4 * 3 * 90 / 2)
    assert seconds["best-client-retrain"] == pytest.approx(5 * public * 0.45)
    assert seconds["public-only"] == pytest.approx((4 * 2 * 100 + 4 * 5 * public) * 0.45, rel=0.1)
    assert seconds["ensemble"] == 0


def test_a_control_that_would_take_longer_than_the_run_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    few, many = (RunConfig.parse({"clients": n}) for n in (20, 21))
    assert (few.left_out(), many.left_out()) == ((), ("paper-start",))
    assert set(few.control_names()) - set(many.control_names()) == {"paper-start"}
    assert RunConfig.parse(many.flat() | {"clients": 5}).control_names() == many.control_names()  # as it is written
    for asked in ("default, paper-start", "paper-start", "all"):
        named = RunConfig.parse({"clients": 21, "controls": asked})
        assert "paper-start" in named.control_names()
        assert named.left_out() == ()
    assert RunConfig.parse({"clients": 21, "controls": "none"}).left_out() == ()
    assert RunConfig.parse({"clients": 21, "strategy": "fedavg"}).left_out() == ()
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[heard, Ended()], clients=21, controls="default")
    (line,) = [text for text in heard.said if text.startswith("left out")]
    assert "paper-start; --controls 'default, paper-start'" in line


def test_flwr_run_says_in_its_log_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("server.app.log", lambda level, text, *values: said.append(text % values))
    monkeypatch.setattr(sys.modules["fedmerge.progress"], "_PAUSE", 0.0)
    tell = Log()
    tell.step("clients train", 0, 2)
    tell.step("clients train", 2, 2)
    assert said == ["fedmerge: clients train: 0 of 2"]
