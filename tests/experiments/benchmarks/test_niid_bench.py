"""The measurement of NIID-Bench's set-up, at toy size on digits."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.benchmarks import niid_bench

TOY = ["--dataset", "digits", "--kernel-size", "2", "--clients", "3", "--rounds", "2", "--epochs", "2", "--no-augment"]


def global_rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "aggregated"]


def test_every_strategy_and_the_plain_loop_give_a_row_and_a_second_call_repeats_none(tmp_path, capsys) -> None:
    given = [*TOY, "--out", str(tmp_path / "out"), "--partitions", "iid"]
    assert niid_bench.main([*given, "--strategies", "plain", "fedavg"]) == 0
    first = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert niid_bench.main(given) == 0
    rows = pd.read_csv(tmp_path / "out" / "rows.csv")
    pd.testing.assert_frame_equal(rows.head(2), first)
    assert list(rows["strategy"]) == ["plain", "fedavg", "fedprox", "scaffold", "fednova"]
    test = {name: global_rows(tmp_path / "out" / f"iid-{name}-0") for name in rows["strategy"][1:]}
    assert [of[-1]["accuracy"] for of in test.values()] == list(rows["accuracy"][1:])
    assert all(
        math.log(10) > of[0]["loss"] > of[1]["loss"] for of in test.values()
    )  # better than a guess, and better again
    loss = {name: of[-1]["loss"] for name, of in test.items()}
    assert loss["fednova"] == pytest.approx(loss["fedavg"], rel=1e-6)  # clients of one size take equal steps
    assert len({round(loss[name], 6) for name in ("fedavg", "fedprox", "scaffold")}) == 3
    printed = capsys.readouterr().out
    assert "| iid | FedAvg | " in printed
    assert "71.32 ± .33 (Flower)" in printed
    assert niid_bench.main([*given, "--rounds", "3"]) == 2
    assert "was measured with other rounds" in capsys.readouterr().err


def test_fedavg_and_the_plain_loop_learn_alike(tmp_path) -> None:
    given = [*TOY, "--rounds", "6", "--epochs", "12", "--out", str(tmp_path / "out"), "--partitions", "iid"]
    assert niid_bench.main([*given, "--strategies", "plain", "fedavg"]) == 0
    plain, ours = pd.read_csv(tmp_path / "out" / "rows.csv")["accuracy"]
    assert plain > 0.6
    assert abs(plain - ours) < 0.1


def test_a_reduction_deals_so_many_images_to_the_clients() -> None:
    parser_given = type("Given", (), {})()
    vars(parser_given).update(
        dataset="digits", kernel_size=2, clients=3, alpha=0.5, rounds=1, epochs=1, images=300, mu=0.01, no_augment=False
    )
    config = niid_bench.configuration(parser_given, "dirichlet", "fedprox", 0)
    assert sum(len(c) for c in config.setup().split().clients) == pytest.approx(300, abs=3)
    assert config.client_task().proximal_mu == 0.01
    recipe = config.recipe()
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay, recipe.nesterov) == ("sgd", 0.9, 1e-5, False)
    assert (recipe.schedule, recipe.augment) == ("constant", True)


def test_crops_and_flips_keep_every_pixel_in_its_picture() -> None:
    ramp = (
        torch.arange(12.0 * 12).view(1, 1, 12, 12).expand(64, 3, 12, 12) + torch.arange(64)[:, None, None, None] * 1e3
    )
    moved = niid_bench.crop_and_flip(ramp, torch.Generator().manual_seed(0))
    assert moved.shape == ramp.shape
    assert torch.equal(moved.flatten(1).amin(1) // 1000, torch.arange(64.0))
    assert torch.equal(moved.flatten(1).amax(1) // 1000, torch.arange(64.0))
    steps = moved.diff(dim=3)[:, 0, 6, 4:7]
    assert {1.0, -1.0} == set(steps.unique().tolist())  # some were turned
