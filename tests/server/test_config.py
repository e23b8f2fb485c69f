from pathlib import Path

import pytest

from fedmerge.errors import ConfigError
from server import RunConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "mlp"}, r"options: unknown key 'modle'.*did you mean 'model'"),
        ({"model": "hbl"}, r"unknown model 'hbl'.*did you mean 'hlb'"),
        ({"dataset": "cifar"}, r"unknown dataset \(or folder\) 'cifar'.*did you mean 'cifar10'"),
        ({"partition": "dirichelt"}, r"unknown partition 'dirichelt'.*did you mean 'dirichlet'"),
        ({"strategy": "fedavrg"}, r"unknown strategy 'fedavrg'.*did you mean 'fedavg'"),
        ({"aligner": "x"}, r"unknown aligner 'x': known are .*weight-matching"),
        ({"merger": "merge-may"}, r"unknown merger 'merge-may'.*did you mean 'merge-many'"),
        ({"repair": "recompte"}, r"unknown repair 'recompte'.*did you mean 'recompute'"),
        ({"retrain": "label"}, r"unknown retrain 'label'.*did you mean 'labels'"),
        ({"optimizer": "sdg"}, r"unknown optimizer 'sdg'.*did you mean 'sgd'"),
        ({"controls": "ensemble, public"}, r"unknown control 'public'.*did you mean 'public-only'"),
        ({"strategy-options": "eta=big"}, r"strategy-options 'eta=big': expected 'name=number'"),
        ({"strategy-options": "eta"}, r"strategy-options 'eta': expected 'name=number'"),
        (
            {"strategy": "fedadam", "strategy-options": "beta1=0.9"},
            r"unknown option of strategy fedadam 'beta1'.*did you mean 'beta_1'",
        ),
        ({"strategy-options": "eta=1"}, r"unknown option of strategy merge-many 'eta'"),
        ({"clients": 0}, r"options: clients = 0: .*greater than or equal to 1"),
        ({"clients": "many"}, r"options: clients = 'many': .*integer"),
        ({"init": "share"}, r"options: init = 'share': .*'independent', 'shared' or 'pretrained'"),
        ({"clients": 3, "min-replies": 4}, r"min-replies = 4 exceeds the number of clients"),
        ({"server-average": "sma"}, r"unknown server_average 'sma'.*did you mean 'swa'"),
        ({"server-average": "ema", "server-average-options": "decay=2"}, r"server-average-options: decay of ema is 2"),
        ({"server-average": "swa", "server-average-options": "decay=x"}, r"server-average-options 'decay=x': expected"),
        ({"server-average-options": "decay=0.5"}, r"'decay=0.5' is for no average; choose one with server-average"),
        ({"merger": "ties"}, r"merger ties adds up steps .* there is none in round 1; use --init shared, or another"),
        ({"public-fraction": 1.0}, r"public-fraction = 1.0: .*less than 1"),
    ],
)
def test_each_wrong_value_is_named_with_what_is_possible(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(values, "options")


def test_a_merger_of_steps_is_fine_where_there_is_a_base_or_where_it_is_not_used() -> None:
    assert RunConfig.parse({"merger": "ties", "init": "shared"}).merger == "ties"
    assert RunConfig.parse({"merger": "ties", "init": "pretrained"}).merger == "ties"
    assert RunConfig.parse({"merger": "ties", "strategy": "fedavg"}).merger == "ties"


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = RunConfig.parse(
        {"clients": 7, "partition-alpha": 0.1, "strategy": "fedadam", "strategy-options": "tau=1e-3"}
    )
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert RunConfig.read(file) == config


def test_files_that_are_no_configuration_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read \(No such file"):
        RunConfig.read(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("clients = = 3")
    with pytest.raises(ConfigError, match="broken.toml: not a TOML file"):
        RunConfig.read(tmp_path / "broken.toml")
    (tmp_path / "key.toml").write_text('dateset = "digits"')
    with pytest.raises(ConfigError, match=r"key.toml: unknown key 'dateset'.*did you mean 'dataset'"):
        RunConfig.read(tmp_path / "key.toml")


def test_options_of_a_strategy_are_numbers() -> None:
    config = RunConfig(strategy_options="eta=0.1, num_malicious_nodes=1, tau=1e-3")
    assert config.options() == {"eta": 0.1, "num_malicious_nodes": 1, "tau": 1e-3}
    assert isinstance(config.options()["num_malicious_nodes"], int)


def test_a_folder_is_a_data_set_and_a_torchvision_name_a_model(tmp_path: Path) -> None:
    config = RunConfig.parse({"dataset": str(tmp_path), "model": "mobilenet_v2"})
    assert (config.dataset, config.model) == (str(tmp_path), "mobilenet_v2")


def test_the_flower_app_lists_every_key_with_its_default() -> None:
    import tomllib

    shipped = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert shipped.pop("out") == ""
    assert shipped.pop("clients") == 0  # as many as there are nodes
    assert shipped == {k: v for k, v in RunConfig().flat().items() if k != "clients"}


def test_controls_by_name_all_or_none() -> None:
    assert RunConfig.parse({"controls": "none"}).control_names() == ()
    assert RunConfig.parse({"controls": "public-only, ensemble"}).control_names() == ("ensemble", "public-only")
    assert len(RunConfig.parse({"controls": "all"}).control_names()) == 8


def test_fedprox_tells_its_clients_the_proximal_weight() -> None:
    task = RunConfig.parse({"strategy": "fedprox", "strategy-options": "proximal_mu=0.3"}).client_task()
    assert task.proximal_mu == 0.3
    assert RunConfig.parse({"strategy": "fedavg", "strategy-options": ""}).client_task().proximal_mu == 0.0
