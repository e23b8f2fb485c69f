"""What the server holds does not grow with the rounds."""

import gc
from pathlib import Path

import pytest
import torch
from local_grid import LocalGrid
from short_run import run

from server import Callback
from server.records import Row
from strategies import _federated

SHORT = {
    "clients": 2,
    "width": 4,
    "rounds": 20,
    "local-epochs": 1,
    "client-images": 16,
    "public-fraction": 0.02,
    "test-fraction": 0.02,
    "aligner": "weight-matching",
    "restarts": 1,
    "retrain": "none",
    "controls": "none",
    "local-evaluation": False,
    "keep-clients": False,
}


def held() -> int:
    """Bytes of all tensors that something refers to."""
    gc.collect()
    return sum(found.nbytes for found in gc.get_objects() if type(found) is torch.Tensor)


@pytest.mark.parametrize("strategy", ["merge-many", "papa", "fedma"])
def test_after_20_rounds_the_server_holds_no_more_tensors_than_after_5(strategy: str, tmp_path: Path) -> None:
    found: dict[int, int] = {}

    class Watch(Callback):
        def row(self, row: Row) -> None:
            if row.round in (5, 19) and row.stage in ("merged", "aggregated"):
                found[row.round] = held()

    run(tmp_path / "run", callbacks=[Watch()], **{**SHORT, "strategy": strategy})
    assert found[19] <= found[5]


def test_collections_that_flower_asks_for_once_a_reply_search_few_objects(tmp_path: Path) -> None:
    searched: list[int] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            searched.append(len(gc.get_objects()))

    settings = {"clients": 3, "init": "shared", "rounds": 2, "local_epochs": 1, "controls": "none"}
    gc.unfreeze()  # what the tests froze
    _federated._frozen.cache_clear()
    everything = len(gc.get_objects())
    gc.callbacks.append(watch)
    try:
        run(tmp_path / "a", LocalGrid(3), strategy="qfedavg", strategy_options="client_learning_rate=0.1", **settings)
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(watch)
        gc.freeze()
        _federated._frozen.cache_clear()
    few = [n for n in searched if n < everything / 100]
    assert len(few) >= 2 * 3, searched
