import codecs
from pathlib import Path

import pytest

from fedmerge.errors import ConfigError
from server import RunConfig, changed, chosen, read_toml


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
        ({"min-replies": 4, "fraction-train": 0.5}, r"min-replies = 4, and a round asks 2 of 5 clients .*; lower it"),
        ({"reference": "3", "fraction-train": 0.5}, r"reference = '3', and a round asks 2 of 5 .*; take largest or"),
        ({"server-average": "sma"}, r"unknown server_average 'sma'.*did you mean 'swa'"),
        ({"server-average": "ema", "server-average-options": "decay=2"}, r"server-average-options: decay of ema is 2"),
        ({"server-average": "swa", "server-average-options": "decay=x"}, r"server-average-options 'decay=x': expected"),
        ({"server-average-options": "decay=0.5"}, r"'decay=0.5' is for no average; choose one with server-average"),
        ({"merger": "ties"}, r"merger ties adds up steps .* there is none in round 1; use --init shared, or another"),
        ({"clients": True}, r"options: clients = True: .*should be a number"),
        ({"width": True}, r"options: width = True: .*should be a number"),
        ({"width": 0.3}, r"options: width of model 'mlp' is 0.3 \(width counts hidden units a layer, 128 by default\)"),
        ({"width": float("inf")}, r"options: width = inf: .*finite number"),
        ({"partition-alpha": float("inf")}, r"options: partition-alpha = inf: .*finite number"),
        ({"local-epochs": True}, r"options: local-epochs = True: .*should be a number"),
        ({"momentum": 1}, r"options: momentum = 1: .*less than 1"),
        ({"momentum": -0.5}, r"options: momentum of a recipe is -0.5; expected a number in \[0, 1\)"),
        ({"nesterov": "yes"}, r"options: nesterov = 'yes': Input should be '', True or False"),
        ({"schedule": "cosin"}, r"options: unknown schedule 'cosin'.*did you mean 'cosine'"),
        ({"width": float("nan")}, r"options: width = nan"),
        ({"model": "hlb", "width": 0.5}, r"width of model 'hlb' is 0.5 \(width counts base channels, 64 by default\)"),
        ({"model": "hlb", "kernel-size": 2.5}, r"options: kernel-size = 2.5"),
        ({"model": "resnet50", "width": 2}, r"options: model 'resnet50' has no option width"),
        ({"lr": float("inf")}, r"options: lr = inf: .*finite number"),
        ({"lr": float("nan")}, r"options: lr = nan: .*finite number"),
        ({"seed": 2**63}, r"options: seed = 9223372036854775808: .*less than 2\*\*63"),
        ({"reference": "x"}, r"options: reference = 'x': expected largest, best or a client, 0 to 4"),
        ({"reference": "5"}, r"options: reference = '5': expected largest, best or a client, 0 to 4"),
        ({"public-fraction": 1.0}, r"public-fraction = 1.0: .*less than 1"),
        ({"hand-out": "best"}, r"options: hand-out = 'best': .*'last' or 'best-on-val'"),
        ({"frozen-share": 1.0}, r"options: frozen-share = 1.0: .*less than 1"),
        (
            {"frozen-share": 0.4},
            r"options: frozen-share = 0.4 leaves weights where all .*each begins elsewhere; use --init",
        ),
    ],
)
def test_each_wrong_value_is_named_with_what_is_possible(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(values, "options")


def test_the_run_and_fedavg_as_its_control_freeze_the_same_share_of_the_clients_weights() -> None:
    config = RunConfig.parse({"frozen-share": 0.4, "init": "pretrained"})
    assert [one.client_task().frozen_share for one in (config, config.fedavg())] == [0.4, 0.4]


def test_a_client_is_fine_as_the_reference_of_rounds_that_ask_all_and_where_it_is_not_used() -> None:
    assert RunConfig.parse({"reference": "3", "fraction-train": 0.95}).reference == "3"
    assert RunConfig.parse({"reference": "3", "fraction-train": 0.5, "strategy": "fedavg"}).reference == "3"


def test_a_merger_of_steps_is_fine_where_there_is_a_base_or_where_it_is_not_used() -> None:
    assert RunConfig.parse({"merger": "ties", "init": "shared"}).merger == "ties"
    assert RunConfig.parse({"merger": "ties", "init": "pretrained"}).merger == "ties"
    assert RunConfig.parse({"merger": "ties", "strategy": "fedavg"}).merger == "ties"


def test_another_model_for_a_written_configuration_brings_what_is_its_own() -> None:
    mlp = RunConfig.parse({"momentum": 0.5, "clients": 3}).flat()
    assert RunConfig.parse(changed(mlp, {"model": "cnn"})) == RunConfig.parse(
        {"model": "cnn", "momentum": 0.5, "clients": 3}
    )
    assert changed(mlp, {"model": "mlp", "lr": 0.1}) == {**mlp, "lr": 0.1}
    assert changed(mlp, {"clients": 3}) == mlp


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"local-epochs": 5}),
        ({"retrain-epochs": 7}, {"local-epochs": 5}),
        ({"secure": True}, {"clients": 12}),
        ({"secure": True, "min-replies": 4}, {"clients": 12}),
        ({"secure": True, "clients": 12}, {"fraction-train": 0.5}),
        ({}, {"clients": 30}),
        ({"controls": "ensemble"}, {"clients": 30}),
    ],
)
def test_what_followed_from_a_key_follows_from_its_new_value(given: dict, options: dict) -> None:
    written = RunConfig.parse(given).flat()
    assert RunConfig.parse(changed(written, options)) == RunConfig.parse({**given, **options})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "analytic"), ({"strategy": "fedavg-retrain", "init": "shared"}, "analytic"),
        ({"strategy": "fedavg"}, "none"), ({"strategy": "feddf"}, "none"), ({"strategy": "fedavg-aligned"}, "none"),
        ({"retrain": "none"}, "none"), ({"secure": True}, "analytic"), ({"dp-noise": 1.0}, "none"), ({"head": "none"}, "none"),
        ({"strategy": "fedavg", "head": "analytic"}, "analytic"),
    ],
)  # fmt: skip
def test_a_head_from_sums_is_the_default_where_networks_are_retrained_and_nothing_is_blurred(values, expected) -> None:
    config = RunConfig.parse(values)
    assert config.head == expected
    assert config.fedavg().head == "none"
    if "head" not in values:  # and it is no choice: with another strategy the default is another
        again = RunConfig.parse(changed(config.flat(), {"strategy": "fedavg", "controls": "none"}))
        assert again.head == "none"
        assert "head" not in chosen(config.flat())


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = RunConfig.parse(
        {"clients": 7, "partition-alpha": 0.1, "strategy": "fedadam", "strategy-options": "tau=1e-3"}
    )
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert RunConfig.read(file) == config


def test_configurations_are_equal_whatever_they_are_called() -> None:
    one, other = RunConfig.parse({"name": "one"}), RunConfig.parse({"name": "other", "tags": "x"})
    assert len({one, other, RunConfig.parse({})}) == 1
    assert one != RunConfig.parse({"name": "one", "seed": 1})
    assert one.differences(RunConfig.parse({"clients": 6, "seed": 1})) == {"clients": (5, 6), "seed": (0, 1)}


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


def test_what_a_key_says_twice_is_refused_and_every_error_names_its_file() -> None:
    for values, words in (
        ({"strategy-options": "a=1, b=2, a=1"}, "strategy-options: 'a' is given twice; leave one out"),
        ({"strategy-options": "a=x"}, "strategy-options 'a=x': expected 'name=number'"),
        ({"controls": "none, all"}, "controls = 'none, all' says two things"),
        ({"model": "nowhere:build"}, "nowhere"),
    ):
        with pytest.raises(ConfigError, match="^my.toml: ") as caught:
            RunConfig.parse(values, "my.toml")
        assert words in str(caught.value)


def test_a_folder_is_a_data_set_and_a_torchvision_name_a_model(tmp_path: Path) -> None:
    config = RunConfig.parse({"dataset": str(tmp_path), "model": "mobilenet_v2"})
    assert (config.dataset, config.model) == (str(tmp_path), "mobilenet_v2")


def test_the_flower_app_lists_every_key_with_its_default() -> None:
    import tomllib

    shipped = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert shipped.pop("out") == ""
    assert shipped.pop("resume") is False
    assert shipped.pop("clients") == 0  # as many as there are nodes
    assert shipped == {k: v for k, v in RunConfig().flat().items() if k != "clients"}


def test_controls_by_name_all_or_none() -> None:
    assert RunConfig.parse({"controls": "none"}).control_names() == ()
    with pytest.raises(ConfigError, match="controls = 'all, none' says two things; leave out 'none'"):
        RunConfig.parse({"controls": "all, none"})
    with pytest.raises(ConfigError, match="controls = 'none, ensemble' says two things; leave out 'none'"):
        RunConfig.parse({"controls": "none, ensemble"})
    assert RunConfig.parse({"controls": "public-only, ensemble"}).control_names() == ("ensemble", "public-only")
    assert len(RunConfig.parse({"controls": "all"}).control_names()) == 10


def test_fedprox_tells_its_clients_the_proximal_weight() -> None:
    task = RunConfig.parse({"strategy": "fedprox", "strategy-options": "proximal_mu=0.3"}).client_task()
    assert task.proximal_mu == 0.3
    assert RunConfig.parse({"strategy": "fedavg", "strategy-options": ""}).client_task().proximal_mu == 0.0


TEXT = '# a comment, über alles\nclients = 3\npartition-alpha = 0.25\t\nreference = "best"'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", " \t\r\n"])
def test_a_file_is_read_as_any_editor_saves_it(encoding: str, newline: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    for end in ("", newline):
        file.write_bytes((TEXT.replace("\n", newline) + end).encode(encoding))
        config = RunConfig.read(file)
        assert (config.clients, config.partition_alpha, config.reference) == (3, 0.25, "best")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_both_orders_of_bytes_are_read(mark: bytes, tmp_path: Path) -> None:
    order = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    (tmp_path / "config.toml").write_bytes(mark + TEXT.encode(order))
    assert RunConfig.read(tmp_path / "config.toml").clients == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# é".encode("latin-1"), "not a TOML file: line 1 is not UTF-8 text .*; save it as UTF-8"),
        (b"clients = 3\n\n# \xff", "not a TOML file: line 3 is not UTF-8 text"),
        (TEXT.encode("utf-16-le"), "holds NUL bytes, as binary files and UTF-16 without a byte-order mark do"),
        (b"\x89PNG\r\n\x1a\n", "line 1 is not UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"c", "line 1 is not UTF-16 text"),
        (b'dataset = "C:\\photos"', r"write a Windows path in single quotes, 'C:.photos'"),
        (b"a = " + b"[" * 20000, "not a TOML file: "),
        (b"a = " + b"9" * 5000, "not a TOML file: "),
        (b"clients = 3\nclients = 4", "not a TOML file: "),
    ],
)
def test_text_of_another_kind_says_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.toml: .*{message}"):
        RunConfig.read(tmp_path / "config.toml")


def test_a_windows_path_in_single_quotes_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"dataset = 'C:\\temp\\new'\r\n")
    assert read_toml(tmp_path / "config.toml") == {"dataset": "C:\\temp\\new"}
