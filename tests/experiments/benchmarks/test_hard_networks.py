from dataclasses import replace

import pytest

from experiments.benchmarks import hard_networks
from experiments.benchmarks.hard_nets import NETWORKS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_hard_network_keeps_its_function_and_moves_or_has_a_reason(network: str) -> None:
    row = hard_networks.measure(network)
    assert row.error < hard_networks.ERROR_BOUND
    assert row.share >= hard_networks.SHARE_BOUND or network in hard_networks.STAYS
    assert row.right(), row


def test_a_row_says_what_stays_and_a_lower_share_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hard_networks.main(["--networks", "LoRA"]) == 0
    assert "| LoRA | 543 | 4 | 0.9945 |" in capsys.readouterr().out
    row = hard_networks.measure("LoRA")
    for wrong in (
        replace(row, share=0.5),
        replace(row, error=1e-3),
        replace(row, stays={"group 0 changed the output": 1}),
    ):
        monkeypatch.setattr(hard_networks, "measure", lambda network, seed, wrong=wrong: wrong)
        assert hard_networks.main(["--networks", "LoRA"]) == 1
