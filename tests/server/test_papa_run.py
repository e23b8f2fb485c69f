"""PAPA over the in-process grid against a plain loop over a population."""

from pathlib import Path

import pytest
import torch
from local_grid import LocalGrid
from short_run import accuracy, run

from fedmerge import average
from fedmerge.errors import ConfigError
from fedmerge.streams import torch_stream
from fedmerge.training import train
from server import RunConfig, read_model

PLAIN = {"strategy": "papa", "merger": "average", "repair": "none", "init": "shared", "controls": "none"}


@pytest.mark.parametrize(("alpha", "every", "fraction"), [(0.9, 1, 1.0), (0.25, 2, 1.0), (0.5, 1, 0.5)])
def test_every_client_goes_on_from_its_own_pulled_network(
    alpha: float, every: int, fraction: float, tmp_path: Path
) -> None:
    options = f"alpha={alpha}, every={every}"
    grid = LocalGrid(4)
    run(
        tmp_path / "a", grid, rounds=3, strategy_options=options, fraction_train=fraction, partition="dirichlet",
        **PLAIN,
    )  # fmt: skip
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    asked = [client for kind, client in grid.asked if kind.startswith("train")]
    size = len(asked) // 3
    split, model, recipe = config.setup().split(), config.setup().network(), config.recipe()
    own: dict[int, dict[str, torch.Tensor]] = {}
    mean = dict(model.state_dict())
    for r in (1, 2, 3):
        cohort = sorted(asked[(r - 1) * size : r * size])
        trained = {
            i: train(
                model, own.get(i, mean), split.client(i), recipe=recipe, epochs=2,
                generator=torch_stream(0, "local-training", r, i),
            ).params
            for i in cohort
        }  # fmt: skip
        mean = average(list(trained.values()), [len(split.client(i)) for i in cohort])
        keeps = alpha if r % every == 0 else 1.0
        for i, params in trained.items():
            own[i] = {k: keeps * params[k] + (1 - keeps) * mean[k] for k in mean}
            if r == 3:
                written = read_model(tmp_path / "a" / "clients" / f"round-3-client-{i}.safetensors")
                torch.testing.assert_close(written, params, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read_model(tmp_path / "a" / "model.safetensors"), mean, rtol=1e-4, atol=1e-5)


def test_a_population_replaced_by_its_mean_in_every_round_is_fedavg(tmp_path: Path) -> None:
    run(tmp_path / "papa", rounds=3, strategy_options="alpha=0", **PLAIN)
    run(tmp_path / "fedavg", rounds=3, **{**PLAIN, "strategy": "fedavg"})
    torch.testing.assert_close(
        read_model(tmp_path / "papa" / "model.safetensors"), read_model(tmp_path / "fedavg" / "model.safetensors")
    )


def test_independent_clients_are_brought_into_one_order_and_their_mean_is_repaired(tmp_path: Path) -> None:
    settings = {"strategy": "papa", "rounds": 2, "controls": "none", "local_epochs": 6, "repair": "repair"}
    aligned = run(tmp_path / "a", **settings)
    plain = run(tmp_path / "b", merger="average", **settings)
    assert [s["stage"] for s in aligned["stages"]] == ["client-mean", "client-best", "aggregated", "repaired"]
    assert [s["title"] for s in aligned["stages"]][2] == "PAPA, independent init"
    assert [m["round"] for m in aligned["merges"]] == [1, 2]
    assert accuracy(aligned, "repaired") > accuracy(plain, "repaired")


def test_a_mean_that_is_none_and_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="papa pulls clients towards their mean, and merger regmean is none; use merge"
    ):
        run(tmp_path / "a", strategy="papa", merger="regmean")
    with pytest.raises(ConfigError, match="papa: alpha is 2 and every 1; expected a number in"):
        run(tmp_path / "b", strategy="papa", strategy_options="alpha=2")
    with pytest.raises(ConfigError, match="papa: alpha is 0.9 and every 0.5; expected"):
        run(tmp_path / "c", strategy="papa", strategy_options="every=0.5")
