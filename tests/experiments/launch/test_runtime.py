"""What keeps Ray from being had, each said in a line at once. Ray itself starts in ``test_simulation.py``."""

import signal
import socket
from pathlib import Path

import pytest
import ray

from experiments.launch import runtime
from experiments.launch.runtime import existing_cluster, root_cause, running
from fedmerge.errors import ResourceError

CLIENT = {"num_cpus": 1.0, "num_gpus": 0.0}


def refusal() -> str:
    """What is said where Ray cannot be had."""
    with pytest.raises(ResourceError) as error, running({"log_to_driver": False}, CLIENT):
        raise AssertionError("Ray must not be there")
    assert not ray.is_initialized()
    return str(error.value)


@pytest.fixture
def port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_dead_address_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert f"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port}: Connection refused; start one with" in refusal()
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
    assert "Connection refused" in refusal()


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:99999")
    assert "is no address: Port out of range 0-65535; expected host:port, or auto" in refusal()


def test_a_server_that_is_not_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        assert "did not answer as a Ray cluster within 1 s" in refusal()


def test_a_temporary_folder_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    said = refusal()
    assert f"temporary folder {long} is too long for its sockets; set RAY_TMPDIR" in said


def test_a_temporary_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    before = signal.getsignal(signal.SIGTERM)
    said = refusal()
    assert said.startswith("Ray cannot start: ")
    assert str(tmp_path / "file") in said
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("given", "found"), [("", ""), ("local", ""), (" auto ", "auto"), ("host:1", "host:1")])
def test_only_an_address_elsewhere_is_an_existing_cluster(
    given: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert existing_cluster() == found


def test_the_root_cause_is_the_first_error() -> None:
    first, second, third = ValueError("first"), OSError("second"), RuntimeError("third")
    second.__cause__, third.__context__ = first, second
    assert root_cause(third) is first
    third.__suppress_context__ = True  # as `raise ... from None` does
    assert root_cause(third) is third
