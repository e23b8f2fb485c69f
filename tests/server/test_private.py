"""What a run on masked sums allows, stands for and refuses."""

import pytest

from fedmerge.errors import ConfigError
from server import RunConfig
from strategies import STRATEGIES


def parse(**values: object) -> RunConfig:
    return RunConfig.parse({key.replace("_", "-"): value for key, value in values.items()})


def test_a_run_on_masked_sums_reads_no_network_in_what_nobody_chose() -> None:
    found = parse(secure=True, clients=12, fraction_train=0.5)
    assert (found.retrain, found.controls, found.keep_clients) == ("labels", "public-only", False)
    assert (found.local_evaluation, found.min_replies, found.private) == (False, 4, False)
    assert found.pretrain_passes() == found.epochs()  # of the public anchor
    assert parse(secure=True, init="shared").pretrain_passes() == 0
    assert parse(secure=True, strategy="fedavg").pretrain_passes() == 0


def test_a_private_run_is_on_masked_sums_and_reads_back_as_it_is_written() -> None:
    found = parse(private=True, clients=3)
    assert (found.secure, found.min_replies) == (True, 3)
    assert RunConfig.parse(found.flat()) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"retrain": "both"}, "retrain = 'both' would read"),
        ({"retrain": "distill", "repair": "repair"}, "repair = 'repair', retrain = 'distill' would read"),
        ({"merger": "regmean"}, "merger = 'regmean' would read"),
        ({"merger": "learned-coefficients"}, "merger = 'learned-coefficients' would read"),
        ({"strategy": "feddf"}, "retrain = 'distill' would read"),
        (
            {"strategy": "krum"},
            r"would read; choose of strategies merge-many, fedavg-retrain, fedavg-aligned, fedavg, the",
        ),
        ({"controls": "ensemble, fedavg, public-only"}, "control 'ensemble', control 'fedavg' would read"),
        ({"keep_clients": True}, "keep-clients = true would read"),
        ({"min_replies": 1}, r"min-replies = 1 of the 5 clients of a round: .* expected 2 \(a sum of one is that"),
        ({"min_replies": 4, "fraction_train": 0.6}, r"min-replies = 4 of the 3 clients of a round: .* to 3$"),
        ({"min_replies": 6}, "min-replies = 6 of the 5 clients"),
        ({"private": True, "min_replies": 2}, r"expected 3 \(of two clients, each can tell the other's network\) to 5"),
        (
            {"private": True, "clients": 2},
            "asks 2 of 2 clients, and with private = true a sum is of at least 3 .*larger",
        ),
        ({"clients": 1}, "asks 1 of 1 clients, and with secure = true a sum is of at least 2"),
        ({"private": True, "controls": "public-only, centralised"}, "'centralised' trains on the clients' own images"),
        ({"private": True, "local_evaluation": True}, "each client tells its own accuracy"),
        ({"private": True, "secure": False}, "private = true goes with secure = true"),
    ],
)
def test_what_reads_more_than_sums_and_public_data_is_refused_in_one_line(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        parse(**{"secure": True, **given})
    assert "\n" not in str(refused.value)


def test_every_strategy_says_whether_sums_are_enough_for_it() -> None:
    allowed = {name for name, entry in STRATEGIES.items() if entry.sums}
    for name in STRATEGIES:
        options = {"bulyan": "num_malicious_nodes=0", "qfedavg": "client_learning_rate=0.1"}.get(name, "")
        given = {"secure": True, "strategy": name, "strategy_options": options, "init": "shared", "optimizer": "sgd"}
        if name in allowed and name != "feddf":  # which distils from the clients, whatever is asked for
            assert parse(**given).strategy == name
        else:
            with pytest.raises(ConfigError, match="would read"):
                parse(**given)
