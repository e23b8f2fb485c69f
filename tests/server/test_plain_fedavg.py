"""FedAvg of fedmerge against FedAvg in plain PyTorch: the same weights after two rounds. On Ray in ``test_simulation.py``."""

from pathlib import Path

import plain
import pytest
import torch
from short_run import run

from server import RunConfig, read_model

NETWORKS = {
    "mlp": {},
    "cnn": {"width": 1, "kernel_size": 2, "lr": 0.02, "batch_size": 20, "client_images": 60},
    "resnet20": {"width": 0.25, "local_epochs": 1},  # BatchNorm, augmentation, a schedule with a warm-up
}


@pytest.mark.parametrize("model", list(NETWORKS))
def test_fedavg_gives_the_weights_of_a_plain_pytorch_loop(model: str, tmp_path: Path) -> None:
    settings = {
        "strategy": "fedavg", "init": "shared", "rounds": 2, "partition": "dirichlet", "controls": "none", "model": model,
        **NETWORKS[model],
    }  # fmt: skip
    run(tmp_path / "a", **settings)
    config = RunConfig.read(tmp_path / "a" / "config.toml")
    assert len({len(c) for c in config.setup().split().clients}) > 1  # the weights of the mean matter
    found, expected = read_model(tmp_path / "a" / "model.safetensors"), plain.federate(config)
    assert any(not torch.allclose(found[k], v) for k, v in config.setup().network().state_dict().items())
    assert any("running_var" in k for k in found) is (model == "resnet20")
    torch.testing.assert_close(found, {k: expected[k] for k in found}, rtol=1e-5, atol=1e-6)
