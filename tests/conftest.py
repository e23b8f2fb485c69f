import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers the lowest priority but four, and beside other tests they would hardly come forward.
os.environ.setdefault("RAY_worker_niceness", "0")

import warnings
from pathlib import Path

import pytest
import torch

# Importing Flower touches typer -> click, which warns about its own future.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flwr.serverapp  # noqa: F401

from fedmerge import data

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest, and mostly waits, begins: the others are done beside it."""
    items.sort(key=lambda item: item.path.name != "test_simulation.py")


def pytest_collection_finish() -> None:
    """What was imported stays: torch's half a million objects are not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests write no cache outside their temporary folder."""
    before = os.environ.get("FEDMERGE_CACHE")
    os.environ["FEDMERGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FEDMERGE_CACHE"]
    else:
        os.environ["FEDMERGE_CACHE"] = before


@pytest.fixture(scope="session")
def digits() -> data.Images:
    """The real digits, all of them."""
    return data.load("digits").train


@pytest.fixture
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of Flower's strategies collect garbage once a reply, a third of a second each in a process of this size.

    ``strategies`` make that quick where nobody has frozen objects, but here all that was imported is.
    """
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for run directories."""
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Every test begins with one thread: a run in this process sets as many as there are cores, and sums differ by that."""
    torch.set_num_threads(1)
